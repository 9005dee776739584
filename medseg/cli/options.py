"""Options that several commands share, in groups, and how their values are read.

A group is a data class: its fields are options, its name of a panel is where the help shows them. A
command takes a group as one argument; `medseg.cli.command` takes it apart for typer. So an option
of `infer` that `batch` should have too is written once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

import typer

from medseg.errors import BadConfig
from medseg.text import decimal_number, harmless, seconds_of, whole_number

if TYPE_CHECKING:
    from medseg.inference import Extras, Model as Loaded, Settings

# No `from __future__ import annotations` here: the fields of groups are looked at while the command
# line is made, and looking texts up takes time.


def in_panel(panel: str, *names: str, **about: Any) -> Any:
    """An option that the help shows in a panel."""
    return typer.Option(*names, rich_help_panel=panel, **about)


def _models(default: str) -> Any:
    return typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help=(
            "A name from `medseg models`, a model folder, or a folder or zip of nnU-Net or MONAI;"
            f" several are averaged. Default: {default}."
        ),
    )


Model = Annotated[list[str] | None, _models("what suits the scan, brain or ct-tissues")]
CohortModel = Annotated[list[str] | None, _models("brain")]
Roi = Annotated[
    str | None,
    typer.Option(
        "--roi",
        metavar="STRUCTURES",
        help="Only these, by name or number: liver,spleen.",
    ),
]
OneModel = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="A name from `medseg models`, or a model folder."
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="TABLE",
        help=(
            "Names of the labels: .csv, .ctbl, .tsv, FreeSurfer's .txt or ITK-SNAP's .label."
            " Default: what lies beside the labels."
        ),
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda|cuda:N|mps", help="Where the network runs."),
]
Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder, or s3://BUCKET/FOLDER."),
]


@dataclass(frozen=True, kw_only=True)
class Network:
    """How the network runs."""

    PANEL: ClassVar[str] = "How the network runs"

    device: Device = "auto"
    precision: Annotated[
        str, typer.Option(metavar="auto|fp32|bf16|fp16", help="Arithmetic of the network.")
    ] = "auto"
    backend: Annotated[
        str, typer.Option(metavar="auto|torch|openvino", help="What runs the network.")
    ] = "auto"
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=(
                "Use no more than this, all processes together, e.g. 4GB; may take longer."
                " Default: what is free."
            ),
        ),
    ] = None
    overlap: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            metavar="SHARE",
            help="Share by which windows overlap. Default: 0.5, or the model's.",
        ),
    ] = None
    windows: Annotated[
        int,
        typer.Option(
            "--batch", min=0, metavar="N", help="Windows at a time; 0: what suits the device."
        ),
    ] = 0
    tta: Annotated[
        bool | None,
        typer.Option(
            "--tta/--no-tta",
            help=(
                "Also predict mirrored, along the axes the model allows; slower. Default: no;"
                " models of nnU-Net as they were trained with --exact and on a GPU."
            ),
        ),
    ] = None
    cleanup: Annotated[
        bool, typer.Option("--cleanup/--no-cleanup", help="Clean up as the model says.")
    ] = True

    @property
    def max_memory_bytes(self) -> int | None:
        """The most memory, if it was said."""
        return parse_bytes(self.max_memory, "--max-memory") if self.max_memory else None


@dataclass(frozen=True, kw_only=True)
class OfNnunet:
    """What only models of nnU-Net know."""

    PANEL: ClassVar[str] = "Models of nnU-Net"

    exact: Annotated[
        bool, typer.Option("--exact", help="Compute every voxel as nnU-Net does; slower.")
    ] = False
    folds: Annotated[
        str | None,
        typer.Option(metavar="N,N|all", help="Only these folds. Default: all there are."),
    ] = None
    checkpoint: Annotated[
        str, typer.Option(metavar="final|best|latest", help="Which weights of a fold.")
    ] = "final"
    orientation: Annotated[
        str,
        typer.Option(
            metavar="auto|stored|RAS|LPS|LAS",
            help=(
                "What a scan is turned to before they see it. auto: as the model's reader does;"
                " where it does nothing, DICOM to LPS."
            ),
        ),
    ] = "auto"
    postprocess: Annotated[
        bool,
        typer.Option("--postprocess", help="Keep only the parts that postprocessing.json says."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Results:
    """What is written beside the labels."""

    PANEL: ClassVar[str] = "What is written beside the labels"

    also: Annotated[
        str,
        typer.Option(
            metavar="KINDS",
            help=(
                "Also write these: of DICOM seg,rtstruct,sr; of a brain brain-mask,"
                " intracranial-mask, stripped, tissue, volumes; of ct-tissues volumes; the label"
                " table for FreeSurfer lut, for ITK-SNAP itksnap."
            ),
        ),
    ] = ""
    probabilities: Annotated[
        str | None,
        typer.Option(
            metavar="STRUCTURES",
            help="Also write probabilities of these, by name or number: 17,amygdala.",
        ),
    ] = None
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write how unsure the model is, 0 to 1.")
    ] = False
    instances: Annotated[
        bool,
        typer.Option(
            "--instances", help="Also number separate objects; the record gets their boxes."
        ),
    ] = False


_READING = "How scans are read"
Volume = Annotated[
    int | None,
    in_panel(
        _READING, "--volume", min=0, metavar="N",
        help="Which volume of a file that holds several, from 0.",
    ),
]  # fmt: skip
AssumeGeometry = Annotated[
    str | None,
    in_panel(
        _READING,
        "--assume-geometry",
        metavar="sform|qform|pixdim",
        help="What to trust where a header contradicts itself or says nothing.",
    ),
]
Series = Annotated[
    str | None,
    in_panel(
        _READING,
        "--series",
        metavar="N|N.M|UID",
        help="Which volume of DICOM that holds several, as `medseg info` numbers them.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How scans are read."""

    PANEL: ClassVar[str] = _READING

    volume: Volume = None
    assume_geometry: AssumeGeometry = None
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help=(
                "Resample DICOM with missing, doubled or uneven slices, or gantry tilt, to an even"
                " grid."
            ),
        ),
    ] = False
    suv: Annotated[
        bool,
        typer.Option("--suv", help="Read DICOM PET as standardised uptake values by body weight."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Dicom:
    """How results are written as DICOM."""

    PANEL: ClassVar[str] = "DICOM results"

    seg_type: Annotated[
        str,
        typer.Option(
            metavar="binary|labelmap", help="DICOM SEG: bit planes, or smaller and newer."
        ),
    ] = "binary"
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="Without patient and study; UIDs are replaced.")
    ] = False
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same UIDs and dates in every run.")
    ] = False


_TOLD = "What is told"
Json = Annotated[
    bool,
    in_panel(_TOLD, "--json", help="Print the result as JSON instead of a table."),
]
Quiet = Annotated[
    bool,
    in_panel(_TOLD, "--quiet", "-q", help="No progress, no announcements; warnings stay."),
]


@dataclass(frozen=True, kw_only=True)
class Telling:
    """Options of every command: what is told of what it does."""

    PANEL: ClassVar[str] = _TOLD

    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="Tell each step; twice: all there is."),
    ] = 0
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add all that is done to this file.")
    ] = None

    @contextmanager
    def listening(self, command: str) -> Iterator[None]:
        """While the block runs, tell what is done."""
        if not self.verbose and self.log is None:
            yield
            return
        from medseg.logs import info, listening
        from medseg.packages import __version__

        with listening(verbose=self.verbose, file=self.log):
            info(__name__, "medseg %s %s begins", __version__, command)
            try:
                yield
            except BaseException as error:
                info(__name__, "%s ends with %s", command, type(error).__name__)
                raise
            info(__name__, "%s ends well", command)


def words_of(group: Any) -> list[str]:
    """The words of a command line that say what a group does; none for what is the default."""
    words: list[str] = []
    for field in fields(group):
        value = getattr(group, field.name)
        if value == field.default:
            continue
        option = get_args(field.type)[-1]
        declared = [name for name in (option.default, *option.param_decls) if isinstance(name, str)]
        name = next((one for one in declared if one.startswith("--")), "")
        name = name or "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            yes, _, no = name.partition("/")
            words.append(yes if value else no)
        else:
            words.append(f"{name}={value}")
    return words


def word_of_device(word: str) -> str:
    """The word, if it names a device. Raises `typer.BadParameter`."""
    from medseg.inference import check_device

    try:
        check_device(word)
    except BadConfig as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    return word


def check_choices(*groups: Any) -> None:
    """Raise `typer.BadParameter` for an option of groups with a word that it does not take."""
    from medseg.inference import SETTING_WORDS

    choices = _WORDS | SETTING_WORDS
    for group in groups:
        for name, word in vars(group).items():
            if name in choices:
                check_one_of("--" + name.replace("_", "-"), word, choices[name])
            elif name == "device":
                word_of_device(word)


def settings_of(
    model: "Loaded", *, network: Network, nnunet: OfNnunet, results: Results, roi: str | None
) -> "Settings":
    """What the options say of how to run a model. Raises `BadConfig`."""
    from medseg.inference import Settings, labels_named

    return Settings(
        device=network.device,
        precision=network.precision,
        overlap=network.overlap,
        cleanup=network.cleanup,
        backend=network.backend,
        batch=network.windows,
        tta=network.tta,
        max_memory_bytes=network.max_memory_bytes,
        probabilities=_structures(model, results.probabilities, "--probabilities"),
        uncertainty=results.uncertainty,
        exact=nnunet.exact,
        orientation=nnunet.orientation,
        postprocess=nnunet.postprocess,
        roi=() if roi is None else labels_named(model, roi.split(",")),
    )


def _structures(model: "Loaded", text: str | None, option: str) -> tuple[int, ...]:
    """Label values such as 17,amygdala; numbers alone are looked up by whoever uses them."""
    from medseg.inference import labels_named

    parts = [part.strip() for part in (text or "").split(",") if text]
    try:
        return tuple(dict.fromkeys(whole_number(part) for part in parts))
    except ValueError:
        if not all(parts):
            shown = f"'{harmless(text)}' is not a list of structures such as 17,amygdala"
            raise typer.BadParameter(shown, param_hint=option) from None
        return labels_named(model, parts, option=option)


def extras_of(
    *, reading: Reading, dicom: Dicom, results: Results, series: str | None, **more: Any
) -> "Extras":
    """What the options say of how scans are read and what is written beside the labels; more: other
    fields of `medseg.inference.Extras`.
    """
    from medseg.inference import Extras
    from medseg.io import DicomOptions

    return Extras(
        instances=results.instances,
        volume_index=reading.volume,
        series=series,
        repair=reading.repair,
        assume_geometry=reading.assume_geometry,
        suv=reading.suv,
        also=parse_kinds(results.also),
        dicom=DicomOptions(
            seg_type=dicom.seg_type, deidentify=dicom.deidentify, deterministic=dicom.deterministic
        ),
        **more,
    )


def parse_heights(text: str | None) -> tuple[float, ...]:
    """Heights in mm such as -120.5,30."""
    try:
        heights = tuple(decimal_number(part.strip()) for part in (text or "").split(",") if text)
        if not all(abs(one) < 1e6 for one in heights):  # nor nan
            raise ValueError(text)
        return tuple(dict.fromkeys(heights))
    except ValueError:
        message = f"'{harmless(text)}' is not a list of heights in mm such as -120.5,30"
        raise typer.BadParameter(message, param_hint="--at") from None


def check_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `typer.BadParameter` for a value that is not allowed."""
    if value not in allowed:
        raise typer.BadParameter(f"'{value}' is not one of {', '.join(allowed)}", param_hint=option)


#: The words of options that are no settings of `medseg.Settings`, by the names of their fields.
_WORDS = {
    "seg_type": ("binary", "labelmap"),
    "progress": ("auto", "json"),
    "checkpoint": ("final", "best", "latest"),
}


def parse_seconds(text: str, option: str = "--time") -> float:
    """A time such as 30m, 1.5h, 90s, 1h30m, or a number of minutes."""
    try:
        return seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def parse_bytes(text: str, option: str) -> int:
    """A size such as 4GB, 3.5G, 800MB or a number of bytes."""
    import re

    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"'{text}' is not a size such as 4GB or 800MB", param_hint=option)
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def parse_workers(text: str) -> int:
    """A number of workers; 0 for auto."""
    if text == "auto":
        return 0
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 1024:
        raise typer.BadParameter(
            f"'{text}' is not a number from 1 on, or auto", param_hint="--workers"
        )
    return int(text)


def parse_changes(texts: Iterable[str]) -> dict[str, Any]:
    """What --set KEY=VALUE says, each value as YAML. Raises `BadConfig`."""
    from medseg.text import parse_yaml

    changes = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise BadConfig(f"--set {text}: write it as KEY=VALUE")
        try:
            changes[key] = parse_yaml(value)
        except ValueError as error:
            raise BadConfig(f"--set {text:.80}: the value is not YAML: {error}") from None
    return changes


def parse_place(text: str) -> "Path | str":
    """A folder, or the address of a place in a store as it is. Raises `BadConfig` for an address of
    another kind, of which a folder would be made here.
    """
    from medseg.cohort import is_store

    if "://" in text and not is_store(text):
        raise BadConfig(f"{text}: give a folder, or a place in s3://, gs:// or az://")
    return text if is_store(text) else Path(text)


def parse_folds(text: str | None) -> tuple[str, ...]:
    """Folds such as 0,3 or all."""
    folds = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if not all(fold == "all" or fold.isdigit() for fold in folds):
        raise typer.BadParameter(
            f"'{text}' is not a list of folds such as 0,3 or all", param_hint="--folds"
        )
    return tuple(dict.fromkeys(folds))


def parse_kinds(also: str) -> tuple[str, ...]:
    """What `--also` asks for."""
    from medseg.inference import BRAIN_RESULTS, DICOM_RESULTS, TABLE_RESULTS

    kinds = tuple(kind.strip().lower() for kind in also.split(",") if kind.strip())
    for kind in kinds:
        check_one_of("--also", kind, (*DICOM_RESULTS, *BRAIN_RESULTS, *TABLE_RESULTS))
    return kinds
