"""Files of one format to another, from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg import io
from medseg.api.scoring import table_of
from medseg.errors import BadConfig
from medseg.evaluation import chosen_labels, table_for, table_in
from medseg.inference import Segmentation
from medseg.labels import LabelTable, is_label_table
from medseg.models import is_model, load_models, write_models
from medseg.text import as_names


def convert(
    scan: io.ScanLike | Segmentation,
    target: str | os.PathLike[str],
    *,
    labels: LabelTable | str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    segment: Sequence[str | int] = (),
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    series: str | int | None = None,
    repair: bool = False,
    suv: bool = False,
    options: io.DicomOptions | None = None,
) -> Path:
    """Write a scan or a label map in another format, as `medseg convert` does, and return the file;
    voxels and geometry stay as they are.

    scan: a path, or any other form of a scan; a label table, or what has one, where the target is
    called as tables are. target: its suffix decides the format; of a model of nnU-Net or MONAI a
    folder. labels: names and colours for `.seg.nrrd` and `.dcm`. source: the DICOM images that
    DICOM labels are about. segment: only these structures, laid on top of each other in order. The
    others are as of `medseg.read`. Raises `BadFile`, `BadConfig`, `BadOutput`.
    """
    place = io.as_path(target, "target")
    about = None if source is None else io.as_path(source, "source")
    if options is not None and not isinstance(options, io.DicomOptions):
        raise BadConfig(f"options are a medseg.io.DicomOptions, and this is {io.what_is(options)}")
    reading: dict[str, Any] = {
        "volume_index": volume_index, "assume_geometry": assume_geometry, "series": series,
        "repair": repair, "suv": suv,
    }  # fmt: skip
    is_list = isinstance(segment, list | tuple)
    names = as_names([str(one) for one in segment] if is_list else segment, "segment")
    table = table_of(labels)
    if io.is_path(scan):
        path = io.as_path(scan, "what is converted")
        _convert(path, place, names=names, table=table, source=about, options=options, **reading)
        return place
    if isinstance(scan, Segmentation):
        table, scan = table or scan.table, scan.labels
    if names or any(one not in (None, False) for one in reading.values()):
        raise BadConfig("segment, volume_index, series and the like are about files")
    io.write(io.as_volume(scan), place, table=table, source=about, options=options)
    return place


def _convert(
    path: Path, place: Path, *, names: Sequence[str], table: LabelTable | None, **how: Any
) -> None:
    """Write a file as another; how: what `io.convert_file` takes."""
    if is_model(path):
        write_models(load_models([str(path)]), place)
        return
    if is_label_table(place):
        (table or table_in(path)).write(place)
        return
    io.check_target(path, place, names)
    table = table or table_for(path, place)
    if names and io.embedded_table(path) is None and not io.label_kind(path):
        read_how = {name: how[name] for name in ("volume_index", "assume_geometry")}
        chosen, table = chosen_labels(path, names, table, **read_how)
        io.write(chosen, place, table=table, source=how["source"], options=how["options"])
    else:
        io.convert_file(path, place, table=table, segments=list(names) or None, **how)
