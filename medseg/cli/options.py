"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medseg.errors import BadConfig
from medseg.text import decimal_number, harmless, whole_number


class Command(TyperCommand):
    """A command whose numbers are read as everywhere in medseg; Python's `int` takes 1_0 for 10."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, then look once more at what stands behind the options that gave a
        number.
        """
        words, found = list(args), super().parse_args(ctx, args)
        for option in self.params:
            value = ctx.params.get(option.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
                _check_numbers(ctx, option.opts, words)
        return found


def _check_numbers(ctx: Any, names: Sequence[str], words: Sequence[str]) -> None:
    for text in _behind(names, words):
        try:
            decimal_number(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param_hint=names[0]) from None


def _behind(names: Sequence[str], words: Sequence[str]) -> Iterator[str]:
    """What the words of a command line give an option of these names."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, equals, text = word.partition("=")
        if name in names:
            yield text if equals else following


VolumeIndex = Annotated[
    int | None,
    typer.Option("--volume", min=0, help="Which volume of a file that holds several, from 0."),
]
AssumeGeometry = Annotated[
    str | None,
    typer.Option(
        metavar="sform|qform|pixdim",
        help="What to trust where a header contradicts itself or says nothing.",
    ),
]
Series = Annotated[
    str | None,
    typer.Option(
        metavar="N|N.M|UID",
        help="Which volume of DICOM that holds several, as `medseg info` numbers them.",
    ),
]
Repair = Annotated[
    bool,
    typer.Option(
        "--repair",
        help=(
            "Resample DICOM with missing, doubled or uneven slices, or gantry tilt, to an even"
            " grid."
        ),
    ),
]
SegType = Annotated[
    str,
    typer.Option(
        "--seg-type", metavar="binary|labelmap", help="DICOM SEG: bit planes, or smaller and newer."
    ),
]
Deidentify = Annotated[
    bool,
    typer.Option(
        "--deidentify", help="DICOM results without patient and study; their UIDs are replaced."
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="DICOM results with the same UIDs and dates in every run."
    ),
]
Suv = Annotated[
    bool, typer.Option("--suv", help="Read DICOM PET as standardised uptake values by body weight.")
]


At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="MM,MM",
        help=(
            "Also areas of all structures in the axial slices at these heights (mm along S, as"
            " viewers show them), e.g. --at=-120.5,30."
        ),
    ),
]


def parse_heights(text: str | None) -> tuple[float, ...]:
    """Heights in mm such as -120.5,30."""
    try:
        heights = tuple(decimal_number(part.strip()) for part in (text or "").split(",") if text)
        if not all(abs(one) < 1e6 for one in heights):  # nor nan
            raise ValueError(text)
        return tuple(dict.fromkeys(heights))
    except ValueError:
        shown = f"'{harmless(text)}' is not a list of heights in mm such as -120.5,30"
        raise typer.BadParameter(shown, param_hint="--at") from None


def check_one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `typer.BadParameter` for a value that is not allowed."""
    if value not in allowed:
        raise typer.BadParameter(f"'{value}' is not one of {', '.join(allowed)}", param_hint=option)


#: The words of options that are no settings of `medseg.Settings`.
_WORDS = {
    "--seg-type": ("binary", "labelmap"),
    "--progress": ("auto", "json"),
    "--checkpoint": ("final", "best", "latest"),
    "--layout": ("auto", "cases", "bids"),
}


def check_words(words: Mapping[str, str], device: str) -> None:
    """Raise `typer.BadParameter` for an option with a word that it does not take."""
    from medseg.inference import SETTING_WORDS, check_device

    known = _WORDS | {f"--{name}": allowed for name, allowed in SETTING_WORDS.items()}
    for option, word in words.items():
        check_one_of(option, word, known[option])
    try:
        check_device(device)
    except BadConfig as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def parse_values(text: str) -> tuple[int, ...]:
    """Label values such as 17,53."""
    try:
        return tuple(dict.fromkeys(whole_number(part) for part in text.split(",")))
    except ValueError:
        shown = f"'{harmless(text)}' is not a list of label values such as 17,53"
        raise typer.BadParameter(shown, param_hint="--probabilities") from None


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no announcements; warnings stay.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def parse_seconds(text: str, option: str = "--time") -> float:
    """A time such as 30m, 1.5h, 90s, 1h30m, or a number of minutes."""
    import re

    units = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
    match = re.fullmatch(
        r"(?:\s*\d+(?:\.\d+)?\s*[dhms])+\s*|\s*(\d+(?:\.\d+)?)\s*", text, re.IGNORECASE
    )
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text, re.IGNORECASE)
    total = (
        float(match[1]) * 60
        if match and match[1]
        else sum(float(n) * units[unit.lower()] for n, unit in parts)
    )
    if not match or total <= 0:
        raise typer.BadParameter(
            f"'{text}' is not a time such as 30m, 8h or 1h30m", param_hint=option
        )
    return total


def parse_bytes(text: str, option: str) -> int:
    """A size such as 4GB, 3.5G, 800MB or a number of bytes."""
    import re

    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise typer.BadParameter(f"'{text}' is not a size such as 4GB or 800MB", param_hint=option)
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


Exact = Annotated[
    bool,
    typer.Option("--exact", help="Models of nnU-Net: compute every voxel as nnU-Net does; slower."),
]
Folds = Annotated[
    str | None,
    typer.Option(
        "--folds", metavar="N,N|all", help="Models of nnU-Net: these folds. Default: all there are."
    ),
]
CheckpointName = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="final|best|latest",
        help="Models of nnU-Net: which weights of a fold.",
    ),
]
Orientation = Annotated[
    str,
    typer.Option(
        "--orientation",
        metavar="auto|stored|RAS|LPS|LAS",
        help=(
            "Models of nnU-Net: what a scan is turned to before they see it. auto: as the model's"
            " reader does; where it does nothing, DICOM to LPS."
        ),
    ),
]
Postprocess = Annotated[
    bool,
    typer.Option(
        "--postprocess",
        help="Models of nnU-Net: keep only the parts that postprocessing.json says.",
    ),
]
Roi = Annotated[
    str | None,
    typer.Option(
        "--roi", metavar="NAMES",
        help="Only these structures, by name or number: liver,spleen. Of a set of models, "
        "those that find none of them are not run; where a coarse model lies beside, only the "
        "region around them is computed.",
    ),
]  # fmt: skip


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
    from medseg.inference import BRAIN_RESULTS, DICOM_RESULTS

    kinds = tuple(kind.strip().lower() for kind in also.split(",") if kind.strip())
    for kind in kinds:
        check_one_of("--also", kind, (*DICOM_RESULTS, *BRAIN_RESULTS))
    return kinds
