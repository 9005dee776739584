"""3D Slicer's segmentation file, `.seg.nrrd`: a label map, or several layers, with names, colours
and codes.

The format is Slicer's Docs/developer_guide/modules/segmentations.md; what is optional there and
needed in practice follows Libs/MRML/Core/vtkMRMLSegmentationStorageNode.cxx. Slicer loses every
segment but the first without `Layer`, and clips each layer to the union of the `Extent`s in it;
older ones clip it to the `Extent` of its first segment. So all segments of a layer are given that
of the layer, as Slicer does. Slicer 4.10 and older knew no layers: there every segment is a volume
of its own, in the order of the segments. Plain `.nrrd` and `.nhdr` are segmentations if they name
segments.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig, BadFile, BadGeometry, BadOutput, DataWarning
from medseg.io.nrrd import (
    Header,
    Layout,
    header_text,
    parse_header,
    parse_layout,
    read_data,
    write_attached,
)
from medseg.io.voxels import Overlap, chosen, labels_only, make_volume
from medseg.volume import Volume, same_grid

if TYPE_CHECKING:
    from medseg.labels import Code, Label, LabelTable

# medseg.labels is imported where used: it writes its tables through medseg.files, in this package.

_CONTEXT = "Segmentation category and type - 3D Slicer General Anatomy list"
_REGION_CONTEXT = "Anatomic codes - DICOM master list"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A segment of a file: its layer, its value in that, and its label, whose value is that which
    it has once the layers are one label map. extent: the first and last voxel along i, j, k that
    the file states; () if it does not.
    """

    layer: int
    stored: int
    label: Label
    extent: tuple[int, ...]


def names_segments(path: str | Path) -> bool:
    """Whether a NRRD file is a segmentation, whatever its name: its header names a first segment,
    as Slicer's do.
    """
    try:
        return "Segment0_ID" in parse_header(path).keys
    except BadFile:  # whoever reads it says why
        return False


def read_seg_nrrd(
    path: str | Path,
    *,
    volume_index: int | None = None,
    assume_geometry: str | None = None,
    segments: Sequence[str] | None = None,
) -> Volume:
    """The label map of a Slicer segmentation, as uint8 or uint16. Raises `BadFile`.

    Several layers are merged; if segments of different layers share a value, all are numbered 1, 2,
    ... in their order (`read_table` numbers them alike). segments: only these, by name or label
    value, laid over each other in this order, the later over the earlier; without it, segments that
    overlap are refused (`Overlap`).
    """
    header, layout, all_segments = parse_segments(path, assume_geometry)
    check_index(path, volume_index)
    selection = None if segments is None else chosen_segments(path, all_segments, segments)
    layers = checked_layers(path, header, layout, all_segments)
    labels = (
        _merged(path, layers, all_segments) if selection is None else painted(layers, selection)
    )
    return labels_only(path, make_volume(path, labels, layout.affine))


def check_index(path: str | Path, volume_index: int | None) -> None:
    """Raise `BadFile` where another volume than the only one is asked for."""
    if volume_index not in (None, 0):
        raise BadFile(f"{path}: is one segmentation, there is no volume {volume_index} in it")


def chosen_segments(
    path: str | Path, segments: Sequence[Segment], names: Sequence[str]
) -> list[Segment]:
    """The segments of these names or label values, in that order. Raises `BadFile`."""
    by_value = {segment.label.value: segment for segment in segments}
    return [by_value[value] for value in chosen(path, _table(path, segments), names)]


def checked_layers(
    path: str | Path, header: Header, layout: Layout, segments: Sequence[Segment]
) -> NDArray:
    """All layers, (layer, i, j, k). Raises `BadFile` for values that no segment names; warns of
    labels where Slicer shows none.
    """
    layers = _layers(path, header, layout)
    for number, layer in enumerate(layers):
        there = [segment for segment in segments if segment.layer == number]
        _check_layer(path, layer, segments=there, layout=layout)
    return layers


def _check_layer(
    path: str | Path, layer: NDArray, *, segments: Sequence[Segment], layout: Layout
) -> None:
    """Raise `BadFile` for values that no segment names; warn of labels where Slicer shows none."""
    values = labels_only(path, make_volume(path, layer, layout.affine)).data
    if _reaches_out(values, [segment.extent for segment in segments]):
        warnings.warn(
            f"{path}: labels reach beyond the extent that its header states, where 3D Slicer does "
            "not show them; "
            "all were read",
            DataWarning,
            stacklevel=3,
        )
    is_named = np.zeros(65536, bool)
    is_named[[0, *(segment.stored for segment in segments)]] = True
    if not is_named[values].all():
        raise BadFile(
            f"{path}: holds label values that it does not name; export the segmentation again"
        )


def _merged(path: str | Path, layers: NDArray, segments: Sequence[Segment]) -> NDArray:
    """All segments as one label map. Raises `Overlap` where layers share voxels."""
    labels = np.zeros(layers.shape[1:], np.uint16, order="F")
    shared = 0
    for number, layer in enumerate(layers):
        new_value = np.zeros(65536, np.uint16)
        for segment in segments:
            if segment.layer == number:
                new_value[segment.stored] = segment.label.value
        layer_labels = new_value[layer.astype(np.uint16, copy=False)]
        shared += int(np.count_nonzero((labels > 0) & (layer_labels > 0)))
        np.maximum(labels, layer_labels, out=labels)
    if shared:
        raise Overlap(path, shared)
    return labels


def painted(layers: NDArray, segments: Sequence[Segment]) -> NDArray:
    """Segments laid over each other as one label map, later ones over earlier."""
    labels = np.zeros(layers.shape[1:], np.uint16, order="F")
    for segment in segments:
        labels[layers[segment.layer] == segment.stored] = segment.label.value
    return labels


def read_segments(
    path: str | Path, *, assume_geometry: str | None = None
) -> Iterator[tuple[Label, Volume]]:
    """The segments of a Slicer segmentation one by one, each with its mask of 0 and 1 (uint8); they
    may overlap.

    Label values are those of `read_table`. Raises `BadFile`.
    """
    header, layout, segments = parse_segments(path, assume_geometry)
    layers = _layers(path, header, layout)
    for segment in segments:
        mask = (layers[segment.layer] == segment.stored).astype(np.uint8)
        yield segment.label, make_volume(path, mask, layout.affine)


def read_table(path: str | Path) -> LabelTable:
    """Names, colours and codes of a Slicer segmentation, values as `read_seg_nrrd` gives them.
    Raises `BadFile`.
    """
    return _table(path, parse_segments(path, None)[2])


def _table(path: str | Path, segments: Sequence[Segment]) -> LabelTable:
    from medseg.labels import LabelTable

    try:
        return LabelTable(tuple(segment.label for segment in segments))
    except BadConfig as error:
        raise BadFile(f"{path}: {error}; export the segmentation again") from None


def _layers(path: str | Path, header: Header, layout: Layout) -> NDArray:
    """All layers, (layer, i, j, k)."""
    data = read_data(path, header, layout)
    return data[np.newaxis] if layout.list_axis is None else np.moveaxis(data, layout.list_axis, 0)


def _reaches_out(values: NDArray, extents: Sequence[tuple[int, ...]]) -> bool:
    """Whether a layer has labels outside the box around the extents of its segments; Slicer cuts it
    to that box.
    """
    if not extents or not all(extents):
        return False
    boxes = [
        extent
        for extent in extents
        if all(extent[2 * axis] <= extent[2 * axis + 1] for axis in range(3))
    ]
    inside = 0
    if boxes:
        low, high = np.min(boxes, axis=0)[::2], np.max(boxes, axis=0)[1::2]
        box = tuple(slice(max(0, int(a)), max(0, int(b) + 1)) for a, b in zip(low, high))
        inside = int(np.count_nonzero(values[box]))
    return int(np.count_nonzero(values)) > inside


def parse_segments(
    path: str | Path, assume_geometry: str | None
) -> tuple[Header, Layout, list[Segment]]:
    """The header of a segmentation, what its data is, and its segments. Raises `BadFile`."""
    header = parse_header(path)
    layout = parse_layout(path, header, assume_geometry)
    count = 1 if layout.list_axis is None else layout.sizes[layout.list_axis]
    _check_segmentation(path, header.keys)
    segments: list[Segment] = []
    while f"Segment{len(segments)}_ID" in header.keys:
        segments.append(_segment(path, header.keys, len(segments)))
    segments = _in_layers(path, header.keys, segments, count=count)
    places = [(segment.layer, segment.stored) for segment in segments]
    if len(set(places)) != len(places) or not all(0 <= layer < count for layer, _ in places):
        raise BadFile(
            f"{path}: two of its segments are the same, or one is in a layer that does not exist"
        )
    if len({segment.stored for segment in segments}) != len(segments):
        segments = [_renumbered(segment, n) for n, segment in enumerate(segments, 1)]
    return header, layout, segments


def _check_segmentation(path: str | Path, keys: dict[str, str]) -> None:
    """Raise `BadFile` for a header that names no segment."""
    if "Segment0_ID" in keys:
        return
    if any(key.startswith("Segmentation_") for key in keys):
        raise BadFile(f"{path}: is a segmentation without any segment; add one in 3D Slicer")
    raise BadFile(
        f"{path}: names no segment, so it is not a Slicer segmentation; if it is a scan, name it"
        " .nrrd"
    )


def _in_layers(
    path: str | Path, keys: dict[str, str], segments: list[Segment], *, count: int
) -> list[Segment]:
    """The segments, each in its layer out of `count`. Raises `BadFile` where the header leaves open
    which that is.
    """
    has_layer = [f"Segment{number}_Layer" in keys for number in range(len(segments))]
    if all(has_layer) or (count == 1 and not any(has_layer)):
        return segments
    if any(has_layer) or count != len(segments):
        raise BadFile(
            f"{path}: does not say of all segments in which layer they are; export the segmentation"
            " again"
        )
    # Certain: before it knew layers, Slicer wrote just this, a volume for every segment and in
    # their order, and newer ones read it so.
    return [replace(segment, layer=number) for number, segment in enumerate(segments)]


def _renumbered(segment: Segment, value: int) -> Segment:
    return replace(segment, label=replace(segment.label, value=value))


def _segment(path: str | Path, keys: dict[str, str], number: int) -> Segment:
    from medseg.labels import MAX_VALUE, Label

    def text(name: str, missing: str = "") -> str:
        return unescape(keys.get(f"Segment{number}_{name}", missing))

    try:
        layer, value = int(text("Layer", "0")), int(text("LabelValue", "1"))
        # Before 4.10 it was called otherwise.
        shade = text("Color") or text("DefaultColor")
        color = [round(float(part) * 255) for part in shade.split()]
    except (ValueError, OverflowError):
        raise BadFile(
            f"{path}: what it says about segment {number} is damaged; export it again"
        ) from None
    if not 1 <= value <= MAX_VALUE:
        raise BadFile(
            f"{path}: the label value of segment {number} is not between 1 and {MAX_VALUE}"
        )
    extent = text("Extent").split()
    whole = len(extent) == 6 and all(re.fullmatch(r"-?\d{1,9}", part) for part in extent)
    codes = _read_terminology(text("Tags"))
    name = text("Name").strip() or text("ID").strip() or f"label {value}"
    label = Label(value, name, _color_or_other(color, value), **codes)
    return Segment(
        layer=layer,
        stored=value,
        label=label,
        extent=tuple(map(int, extent)) if whole else (),
    )


def _color_or_other(color: Sequence[int], value: int) -> tuple[int, int, int]:
    """The colour that a file gives a segment, or one of medseg's where it gives none."""
    from medseg.labels import LabelTable

    if len(color) == 3 and all(0 <= part <= 255 for part in color):
        return color[0], color[1], color[2]
    return LabelTable.from_values([value]).labels[0].color


def _read_terminology(tags: str) -> dict[str, Code | None]:
    from medseg.labels import Code

    match = re.search(r"(?:^|\|)TerminologyEntry:([^|]*)", tags)
    parts = match[1].split("~") if match else []
    if len(parts) < 7:
        return {}
    # Parts 0 and 4 name the lists that the codes are from.
    places = {"category": 1, "type": 2, "type_modifier": 3, "region": 5, "region_modifier": 6}
    pieces = {field: parts[place].split("^") for field, place in places.items()}
    # What has more parts is longer at its end, or holds a `~` in a name: then the places are wrong.
    if len(parts) > 7 and any(len(code) != 3 for code in pieces.values()):
        return {}
    return {
        field: Code(*code) if len(code) == 3 and code[1] else None for field, code in pieces.items()
    }


def write_seg_nrrd(
    volume: Volume, path: str | Path, *, table: LabelTable | None = None, surfaces: bool = False
) -> None:
    """Write a label map as a Slicer segmentation of one layer. Raises `BadOutput`.

    Every label of `table` becomes a segment, present or not; values that it does not name get
    'label N'. With `surfaces` Slicer builds and shows the surfaces of all segments when it opens
    the file, which takes its time.
    """
    from scipy import ndimage  # here, because it takes longer to import than all readers together

    from medseg.labels import LabelTable

    try:
        labels = labels_only(path, volume)
    except BadFile as error:
        raise BadOutput(f"{error}; a .seg.nrrd holds a label map only") from None
    boxes = ndimage.find_objects(labels.data)
    present = [value for value, box in enumerate(boxes, 1) if box is not None]
    table_labels = table.labels if table is not None else ()
    table_values = {label.value for label in table_labels}
    other_labels = LabelTable.from_values(
        value for value in present if value not in table_values
    ).labels
    segments = sorted((*table_labels, *other_labels), key=lambda label: label.value)
    extent = extent_of(labels.data)
    lines = _common_lines(surfaces)
    for number, label in enumerate(segments):
        lines += _segment_lines(number, label, layer=0, extent=extent)
    write_layers(path, labels, [labels.data], lines=lines, dtype=_label_dtype(segments))


def write_segments(
    segments: Iterable[tuple[Label, Volume]], path: str | Path, *, surfaces: bool = False
) -> None:
    """Write masks, which may overlap, as a Slicer segmentation of as many layers as that takes.
    Raises `BadOutput`. They are taken one after the other.

    A mask is a volume whose voxels are not 0 inside; all have one grid. The first layer with room
    takes a mask, so masks that do not overlap make a file of one layer. Raises `BadConfig` for a
    value that two labels share and `BadGeometry` for masks on different grids.
    """
    from medseg.labels import LabelTable

    grid: Volume | None = None
    layers: list[NDArray] = []
    places: list[tuple[Label, int]] = []
    for label, mask in segments:
        grid = grid or mask
        if not same_grid(grid, mask):
            raise BadGeometry("the masks of one segmentation must have one grid")
        inside = mask.data != 0
        free = (n for n, layer in enumerate(layers) if not layer[inside].any())
        layer = next(free, len(layers))
        if layer == len(layers):
            layers.append(np.zeros(grid.shape, np.uint16, order="F"))
        layers[layer][inside] = label.value
        places.append((label, layer))
    if grid is None:
        raise BadOutput(f"{path}: there is no segment to write")
    table = LabelTable(tuple(label for label, _ in places))  # refuses values that are used twice
    dtype = _label_dtype(table.labels)
    extents = [extent_of(layer) for layer in layers]
    lines = _common_lines(surfaces)
    for number, (label, layer) in enumerate(places):
        lines += _segment_lines(number, label, layer=layer, extent=extents[layer])
    write_layers(path, grid, layers, lines=lines, dtype=dtype)


def write_layers(
    path: str | Path,
    grid: Volume,
    layers: Sequence[NDArray],
    *,
    lines: Sequence[str],
    dtype: np.dtype,
) -> None:
    """Write layers on the grid of a volume, with the key-value lines of a segmentation. Raises
    `BadOutput`.
    """
    header = header_text(path, grid, dtype)
    data = layers[0]
    if len(layers) > 1:  # Slicer lists layers along the first axis
        header = _with_layers(header, len(layers))
        stack = np.empty((len(layers), *grid.shape), dtype, order="F")
        for number, layer in enumerate(layers):
            stack[number] = layer
        data = stack.reshape((-1, *grid.shape[1:]), order="F")
    write_attached(path, header + "\n".join(lines) + "\n", data, dtype=dtype)


def extent_of(layer: NDArray) -> str:
    """The first and last voxel along i, j, k of what is not 0 in a layer, as a header states it."""
    planes = (layer.any(axis=(1, 2)), layer.any(axis=(0, 2)), layer.any(axis=(0, 1)))
    sides = [np.flatnonzero(plane) for plane in planes]
    if not sides[0].size:
        return "0 -1 0 -1 0 -1"
    return " ".join(f"{side[0]} {side[-1]}" for side in sides)


def _with_layers(header: str, count: int) -> str:
    """The header of a volume, made that of `count` volumes along a first axis."""
    for before, after in (
        ("\ndimension: 3\n", "\ndimension: 4\n"),
        ("\nsizes: ", f"\nsizes: {count} "),
        ("\nspace directions: ", "\nspace directions: none "),
        ("\nkinds: ", "\nkinds: list "),
    ):
        header = header.replace(before, after)
    return header


def _label_dtype(labels: Sequence[Label]) -> np.dtype:
    largest = max((label.value for label in labels), default=0)
    return np.dtype(np.uint8 if largest <= 255 else np.uint16)


def _common_lines(surfaces: bool) -> list[str]:
    return [
        "Segmentation_MasterRepresentation:=Binary labelmap",
        (
            "Segmentation_ContainedRepresentationNames:=Binary"
            f" labelmap|{'Closed surface|' if surfaces else ''}"
        ),
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]


def _segment_lines(number: int, label: Label, *, layer: int, extent: str) -> list[str]:
    fields = {
        "ID": f"Segment_{label.value}",
        "Name": escape(label.name),
        "NameAutoGenerated": "0",
        "Color": color_text(label),
        "ColorAutoGenerated": "0",
        "LabelValue": str(label.value),
        "Layer": str(layer),
        "Extent": extent,
        "Tags": escape("Segmentation.Status:inprogress|" + terminology(label)),
    }
    return [f"Segment{number}_{name}:={value}" for name, value in fields.items()]


def color_text(label: Label) -> str:
    """The colour of a label as a header states it."""
    return " ".join(f"{part / 255:.6g}" for part in label.color)


def terminology(label: Label) -> str:
    """The tag that says what a label is; '' where it has no category or no type, without which
    Slicer reads none.
    """
    if label.category is None or label.type is None:
        return ""
    parts = [
        _CONTEXT,
        _code_text(label.category),
        _code_text(label.type),
        _code_text(label.type_modifier),
    ]
    parts += [_REGION_CONTEXT, _code_text(label.region), _code_text(label.region_modifier)]
    return f"TerminologyEntry:{'~'.join(parts)}|"


def _code_text(code: Code | None) -> str:
    return "^".join(re.sub(r"[\^~|]", " ", part) for part in code) if code else "^^"


def escape(text: str) -> str:
    """A text as the value of a key."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", " ")


def unescape(text: str) -> str:
    """The text in the value of a key."""
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)
