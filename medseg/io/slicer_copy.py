"""Segmentations of 3D Slicer copied with all that their headers say of their segments.

A label map and a label table hold voxels, names, colours and codes. The file of Slicer says more:
the identifiers by which scenes and scripts call segments, their status and other tags, the lists
that terminology is from, colours finer than 1/255, which segments share a layer, where the file's
grid lies within that of the scan, and how surfaces are made. A copy keeps it. Other keys of the
file, which may name a patient, are not taken along.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.io.slicer import (
    Segment,
    check_index,
    checked_layers,
    chosen_segments,
    color_text,
    escape,
    extent_of,
    painted,
    parse_segments,
    terminology,
    write_layers,
)
from medseg.io.voxels import make_volume

if TYPE_CHECKING:
    from medseg.labels import Label, LabelTable

#: Where the grid of a file lay within the scan in the files of 4.5, whose extents count from there.
_OLD_EXTENT = "Segmentation_Extent"
#: What Slicer needs of the whole, where a file has none of it.
_WHOLE = {
    "Segmentation_MasterRepresentation": "Binary labelmap",
    "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
    "Segmentation_ReferenceImageExtentOffset": "0 0 0",
}


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """A segment with the keys that its file has for it, by their names without the number."""

    segment: Segment
    keys: dict[str, str]


def is_copied(path: str | Path, target: str | Path) -> bool:
    """Whether `copy_segmentation` is for these two: both are segmentations of 3D Slicer."""
    from medseg.io.formats import is_slicer_segmentation

    return Path(target).name.lower().endswith(".seg.nrrd") and is_slicer_segmentation(path)


def copy_segmentation(
    path: str | Path,
    target: str | Path,
    *,
    segments: Sequence[str] | None = None,
    table: LabelTable | None = None,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
) -> None:
    """Write the segmentation in `path` to `target`, a `.seg.nrrd`, with its voxels, layers,
    identifiers, names, colours, tags and terminology as they are.

    segments: only these, by name or label value, laid over each other in this order in one layer.
    table: other names, colours and codes for label values, which are those of `read_table`. Raises
    `BadFile`, `BadOutput`.
    """
    header, layout, all_segments = parse_segments(path, assume_geometry)
    check_index(path, volume_index)
    layers = checked_layers(path, header, layout, all_segments)
    kept = [
        _Kept(segment=segment, keys=_keys_of(header.keys, number))
        for number, segment in enumerate(all_segments)
    ]
    arrays = list(layers)
    if segments is not None:
        selection = chosen_segments(path, all_segments, segments)
        arrays = [painted(layers, selection)]
        kept = [_in_one_layer(one) for one in kept if one.segment in selection]
    dtype = np.dtype(np.uint16 if any(layer.max() > 255 for layer in arrays) else np.uint8)
    has_old_extents = segments is not None or _OLD_EXTENT in header.keys
    lines = _lines_of_whole(header.keys)
    for number, fields in enumerate(_fields(kept, arrays, table, anew=has_old_extents)):
        lines += [f"Segment{number}_{name}:={value}" for name, value in fields.items()]
    grid = make_volume(path, arrays[0], layout.affine)
    write_layers(target, grid, arrays, lines=lines, dtype=dtype)


def _in_one_layer(one: _Kept) -> _Kept:
    segment = replace(one.segment, layer=0, stored=one.segment.label.value)
    return replace(one, segment=segment)


def _keys_of(keys: dict[str, str], number: int) -> dict[str, str]:
    """What a header says of one segment."""
    prefix = f"Segment{number}_"
    return {key[len(prefix) :]: value for key, value in keys.items() if key.startswith(prefix)}


def _lines_of_whole(keys: dict[str, str]) -> list[str]:
    """The lines about the whole segmentation, short ones first: Slicer knows a segmentation of any
    name by the first of them, and looks no further than 800 characters.
    """
    whole = {key: value for key, value in keys.items() if re.match("Segmentation_.", key)}
    missing = dict(_WHOLE)
    if "Segmentation_SourceRepresentation" in whole:  # the newer name of the same
        del missing["Segmentation_MasterRepresentation"]
    if _OLD_EXTENT in whole:
        starts = whole.pop(_OLD_EXTENT).split()[::2]
        missing["Segmentation_ReferenceImageExtentOffset"] = " ".join(starts) or "0 0 0"
    lines = [f"{key}:={value}" for key, value in (missing | whole).items()]
    return sorted(lines, key=len)


def _fields(
    kept: Sequence[_Kept], layers: Sequence[NDArray], table: LabelTable | None, *, anew: bool
) -> list[dict[str, str]]:
    """The keys to write of each segment: those that the file has, what it lacks, and what a table
    says otherwise. anew: whether extents are found anew.
    """
    extents = []
    for number, layer in enumerate(layers):
        stated = [one.segment.extent for one in kept if one.segment.layer == number]
        needed = extent_of(layer)
        extents.append("" if _all_cover(stated, needed) and not anew else needed)
    all_fields = []
    for one in kept:
        segment, label = one.segment, one.segment.label
        color = one.keys.get("DefaultColor", color_text(label))
        fields = {"Name": escape(label.name), "Color": color} | one.keys
        fields |= {"LabelValue": str(segment.stored), "Layer": str(segment.layer)}
        fields |= {"Extent": extents[segment.layer]} if extents[segment.layer] else {}
        if table is not None and label.value in table:
            fields |= _as_table_says(table[label.value], fields.get("Tags", ""))
        all_fields.append(fields)
    return all_fields


def _all_cover(extents: Sequence[tuple[int, ...]], needed: str) -> bool:
    """Whether every segment of a layer states an extent around all that the layer holds, so that no
    Slicer, old or new, cuts any of it.
    """
    box = np.array(needed.split(), int)
    if box[1] < box[0]:
        return all(extents)
    inside = [
        bool(extent) and (np.array(extent)[::2] <= box[::2]).all()
        and (np.array(extent)[1::2] >= box[1::2]).all()
        for extent in extents
    ]  # fmt: skip
    return all(inside)


def _as_table_says(label: Label, tags: str) -> dict[str, str]:
    """The keys of a segment that a table renames; its other tags stay."""
    entry = escape(terminology(label))
    others = re.sub(r"(?:^|(?<=\|))TerminologyEntry:[^|]*\|?", "", tags)
    return {
        "Name": escape(label.name),
        "NameAutoGenerated": "0",
        "Color": color_text(label),
        "ColorAutoGenerated": "0",
        "Tags": others + entry if entry else tags,
    }
