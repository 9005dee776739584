"""A file of a scan, of labels or of segments in another format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import BadOutput
from medseg.files import is_one_file
from medseg.io.formats import (
    DicomOptions,
    Overlap,
    each_mask,
    embedded_table,
    label_kind,
    read,
    write,
)
from medseg.io.slicer import write_segments
from medseg.io.slicer_copy import copy_segmentation, is_copied

if TYPE_CHECKING:
    from medseg.labels import LabelTable


def check_target(path: Path, target: Path, segments: Sequence[str] = ()) -> None:
    """Raise `BadOutput` where the file that is converted would be written over, and what the other
    format or the choice of segments leaves out be lost. A whole copy may take its place.
    """
    if is_one_file(path, target) and (segments or not is_copied(path, target)):
        raise BadOutput(f"{target} is the input and would be overwritten; choose another name")


def convert_file(
    path: Path,
    target: Path,
    *,
    table: LabelTable | None = None,
    source: Path | None = None,
    segments: Sequence[str] | None = None,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    series: str | int | None = None,
    repair: bool = False,
    suv: bool = False,
    options: DicomOptions | None = None,
) -> None:
    """Write what is in a file in the format of the target's suffix; voxels and geometry stay.

    A segmentation of 3D Slicer that stays one is copied with all that it says of its segments, and
    segments that overlap stay so where a `.seg.nrrd` is written. table: other names than the file's
    own. source: the DICOM images that DICOM labels are about. The others are as of `read`. Raises
    `BadFile`, `BadConfig`, `BadOutput`.
    """
    copies = is_copied(path, target)
    copy = partial(
        copy_segmentation, path, target, volume_index=volume_index, assume_geometry=assume_geometry
    )
    # Of labels in DICOM the options for DICOM are about the source alone.
    about_source = source is not None and not label_kind(path)
    if copies and not (table or source or series or repair or suv):
        copy(segments=segments)
        return
    try:
        volume = read(
            path,
            volume_index=volume_index,
            assume_geometry=assume_geometry,
            series=None if about_source else series,
            repair=repair and not about_source,
            suv=suv,
            source=source,
            segments=segments,
        )
    except Overlap:
        if not target.name.lower().endswith(".seg.nrrd"):
            raise
        if copies:
            copy(table=table)
        else:
            write_segments(each_mask(path, source=source, series=series, repair=repair), target)
        return
    table = table or embedded_table(path)
    write(volume, target, table=table, source=source, options=options)
