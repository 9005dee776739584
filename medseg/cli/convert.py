"""`medseg convert` and `medseg info`: parse, call, show."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import Dicom, Json, Reading, Series, check_choices
from medseg.cli.show import print_table, show_warning
from medseg.errors import BadFile, DataWarning
from medseg.text import harmless

if TYPE_CHECKING:
    from rich.text import Text

    from medseg.io.dicom import Listed


def convert(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A scan, label map, DICOM, label table, or model of nnU-Net or MONAI.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Where to; the suffix decides the format.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Names and colours for .seg.nrrd, .dcm and tables; any label table.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(metavar="DICOM", help="The DICOM images that DICOM labels are about."),
    ] = None,
    segment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STRUCTURE",
            help="Only this, by name or number; again: on top.",
        ),
    ] = None,
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest", help="Put labels of another grid on the source's by nearest neighbour."
        ),
    ] = False,
    *,
    reading: Reading,
    series: Series = None,
    dicom: Dicom,
) -> None:
    """Convert a volume to another format: voxels and geometry stay as they are.

    OUTPUT.dcm is a DICOM segmentation and OUTPUT.rtstruct.dcm a structure set, of the series of
    --source. A model becomes a folder. Label tables are .csv, .tsv, .ctbl, .txt (FreeSurfer) and
    .label (ITK-SNAP).

    Examples:
    medseg convert scan.mgz scan.nii.gz
    medseg convert FreeSurferColorLUT.txt labels.label
    """
    from medseg import io
    from medseg.evaluation import chosen_labels, table_for, table_in
    from medseg.labels import LabelTable, is_label_table, same_name
    from medseg.models import is_model, load_models, write_models

    check_choices(dicom)
    if is_model(path):
        write_models(load_models([str(path)]), target)
        return
    if is_label_table(target):
        (LabelTable.read(labels) if labels else table_in(path)).write(target)
        return
    io.check_target(path, target, segment or ())
    embedded = io.embedded_table(path)
    table = LabelTable.read(labels) if labels else table_for(path, target)
    options = io.DicomOptions(
        **asdict(dicom), nearest=nearest, series=series, repair=reading.repair
    )
    if segment and embedded is None and not io.label_kind(path):
        chosen, table = chosen_labels(
            path, segment, table, volume_index=reading.volume,
            assume_geometry=reading.assume_geometry, option="--segment",
        )  # fmt: skip
        io.write(chosen, target, table=table, source=source, options=options)
        return
    if embedded and segment:
        segment = [same_name(one, embedded.names.values()) or one for one in segment]
    io.convert_file(
        path,
        target,
        table=table,
        source=source,
        segments=segment or None,
        options=options,
        **_asked(reading, series),
    )


def _asked(reading: Reading, series: str | int | None) -> dict[str, Any]:
    """What `io.read` is told of how to read."""
    return {
        "volume_index": reading.volume,
        "assume_geometry": reading.assume_geometry,
        "series": series,
        "repair": reading.repair,
        "suv": reading.suv,
    }


def info(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Scans, label maps, DICOM folders, zips and DICOMDIRs; or models.",
        ),
    ],
    *,
    reading: Reading,
    series: Series = None,
    as_json: Json = False,
) -> None:
    """Say what is in a file: grid, orientation, intensities. DICOM with several volumes is listed.

    Of a model, medseg's, nnU-Net's or MONAI's: what it was trained for and how, and what of it
    would be used. Models of `medseg models` are known by their names.

    Examples:
    medseg info scan.nii.gz dicom/
    medseg info brain-fast
    """
    import json

    from medseg.inference import describe
    from medseg.io import Overlap, embedded_table, label_kind, read
    from medseg.models import is_model

    for path in paths:
        if is_model(path) or _names_model(path):
            _print_model(path, as_json)
            continue
        if kind := label_kind(path):
            _print_structures(path, kind, as_json)
            continue
        if series is None and reading.volume is None and (volumes := _several_volumes(path)):
            _print_volumes(path, volumes, as_json)
            continue
        try:
            scan = read(path, **_asked(reading, series))
        except Overlap:  # no one label map, but its structures can be listed
            _print_structures(path, "segmentation whose structures overlap", as_json)
            continue
        facts = describe(scan) | {
            "affine": scan.affine.tolist(),
            "minimum": float(scan.data.min()),
            "maximum": float(scan.data.max()),
            "ml": round(scan.voxel_mm3 * scan.data.size / 1000, 3),
        }
        if table := embedded_table(path):
            facts["segments"] = table.names
        if as_json:
            print(json.dumps({"file": str(path)} | facts))
        else:
            print_table(str(path), ("", ""), [(key, _plain(value)) for key, value in facts.items()])


def _print_structures(path: Path, kind: str, as_json: bool) -> None:
    """The names that a segmentation or structure set carries."""
    import json

    from medseg.io import embedded_table

    table = embedded_table(path)
    assert table is not None
    if as_json:
        print(json.dumps({"file": str(path), "kind": kind, "segments": table.names}))
        return
    title = f"{path}: DICOM {kind}" if kind in ("SEG", "RTSTRUCT") else f"{path}: {kind}"
    rows = [(str(value), name) for value, name in table.names.items()]
    print_table(title, ("number", "structure"), rows, right=(0,))


def _names_model(path: Path) -> bool:
    """Whether a path is the name of a model of `medseg models`, and no file."""
    from medseg.inference import UNTRAINED
    from medseg.models import known_models

    return str(path) in (*known_models(), *UNTRAINED) and not path.exists()


def _print_model(path: Path, as_json: bool) -> None:
    """What there is to say of a model, or of each of a set; its folder may hold one that cannot be
    used.
    """
    from medseg.inference import UNTRAINED
    from medseg.models import facts_of, load_models

    if (untrained := UNTRAINED.get(str(path))) is not None and not path.exists():
        labels = {str(value): name for value, name in untrained.table.names.items()}
        one = {"name": str(path), "about": untrained.about, "channels": 1, "labels": labels}
        _show_facts(path, [one], {}, as_json)
        return
    models = load_models([str(path)])
    each = [models] if isinstance(models, list) else list(models.models)
    facts = [facts_of(checkpoints) for checkpoints in each]
    _show_facts(path, facts, {} if isinstance(models, list) else models.table.names, as_json)


def _show_facts(
    path: Path, facts: Sequence[dict[str, Any]], of_set: Mapping[int, str], as_json: bool
) -> None:
    """Show the facts of models, and the labels of the set that they are, if they are one."""
    import json

    if as_json:
        shared = {"labels": dict(of_set)} if of_set else {}
        print(json.dumps({"file": str(path), "kind": "model", **shared, "models": list(facts)}))
        return
    for one in facts:
        rows = [(key, _words(value)) for key, value in one.items()]
        print_table(f"{path}: a model", ("", ""), rows)
    if of_set:
        rows = [(str(value), name) for value, name in of_set.items()]
        print_table(f"{path}: the labels of the set", ("number", "structure"), rows, right=(0,))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {name}" for key, name in value.items())
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)


def _several_volumes(path: Path) -> list[Listed]:
    """The volumes of DICOM that holds several, or none."""
    from medseg.io import is_dicom_source, list_volumes

    if not is_dicom_source(path):
        return []
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always", DataWarning)
        try:
            volumes = list_volumes(path)
        except BadFile:  # `read` says why
            return []
    if len(volumes) < 2:  # what there is to say is said when it is read
        return []
    for warning in messages:
        show_warning(warning.message, warning.category)
    return volumes


def _print_volumes(path: Path, found: Sequence[Listed], as_json: bool) -> None:
    if as_json:
        import json

        # The description may name a person, and what is printed here may end in a file.
        facts = [
            {key: value for key, value in asdict(one).items() if key != "description"}
            for one in found
        ]
        print(json.dumps({"file": str(path), "volumes": facts}))
        return
    rows = []
    for_eyes = sys.stdout.isatty()
    for volume in found:
        spacing = " x ".join(f"{s:.3g}" for s in volume.spacing_mm) if volume.spacing_mm else ""
        state = volume.problem.removeprefix(f"{path}: ").split(";")[0] + (
            " (--repair)" if volume.repairable else ""
        )
        grid = (" x ".join(map(str, volume.shape)), spacing, volume.orientation)
        name = (
            volume.folder,
            str(volume.series_number or ""),
            volume.description if for_eyes else "",
        )
        rows.append((volume.number, *name, volume.modality, *grid, state))
    title = f"{path}: {len(found)} volumes; choose one with --series"
    columns = (
        "series",
        "folder",
        "number",
        "description",
        "kind",
        "voxels",
        "mm",
        "axes",
        "cannot be read because",
    )
    # A column that is empty, such as the folder where there is but one, says nothing.
    indices = [
        n for n in range(len(columns)) if any(row[n] for row in rows) or columns[n] == columns[-1]
    ]
    print_table(
        title, tuple(columns[n] for n in indices), [tuple(row[n] for n in indices) for row in rows]
    )


def _plain(value: Any) -> str | Text:
    if isinstance(value, dict):
        from rich.text import Text

        return Text("\n".join(f"{key} {harmless(str(name))}" for key, name in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], list):
        from rich.text import Text

        return Text("\n".join(" ".join(f"{x:.6g}" for x in row) for row in value))
    return " x ".join(f"{x:.6g}" for x in value) if isinstance(value, list) else str(value)
