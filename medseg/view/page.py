"""One HTML page to look at a scan and its labels, offline: three planes, 3D, a legend with volumes.

The page holds everything it needs and may load nothing: its Content-Security-Policy names its
scripts and its style by their hashes and forbids every connection. NiiVue (`niivue/origin.json`)
draws the pictures, in radiological convention as 3D Slicer does. Nothing of a patient is in it:
scans are volumes without headers, and no file is named.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadGeometry
from medseg.files import atomic_write
from medseg.io import write_nifti
from medseg.labels import LabelTable
from medseg.text import harmless
from medseg.view.contrast import Contrast, contrast_of
from medseg.view.structures import full_table, is_fluid, labels_on_scan
from medseg.volume import Volume, crop, reorient, turned_onto, value_counts

#: A page holds at most so many voxels; larger scans become a preview, because browsers without a
#: graphics card take about three seconds for a million voxels.
MAX_EMBEDDED_VOXELS = 8 << 20
#: Longest axis that graphics cards of today show.
MAX_EMBEDDED_AXIS = 2048
#: Triangles of all structures in 3D; they add 1.6 MB to a page at most.
MAX_TRIANGLES = 350_000
#: Of larger label maps surfaces are those of every n-th voxel.
MAX_SURFACE_VOXELS = 32 << 20
#: Structures that one page can tell apart: the least width of a texture that WebGL 2 promises, and
#: the background.
MAX_STRUCTURES = 2047
#: Turn of the 3D view, azimuth and elevation in degrees: from the front, the patient's right on the
#: left.
TURN = (180, 10)
_FOLDER = Path(__file__).parent
_MARGIN_MM = 10.0  # around the content of a scan that is cropped
_CENTRE_SAMPLE = 200_000  # voxels from which the middle of a structure is found


@dataclass(frozen=True)
class Contents:
    """What a page shows.

    facts: what the page's program is told, JSON-ready. scan, labels: NIfTI files on one grid,
    gzipped where they are to stand in the page; labels are numbered 1, 2, ... in the order of
    `facts['structures']`. surfaces: those of the structures, as `facts['surfaces']` describes them.
    """

    facts: dict[str, Any]
    scan: bytes
    labels: bytes
    surfaces: bytes = b""


def prepare(
    scan: Volume,
    labels: Volume,
    table: LabelTable | None = None,
    *,
    title: str = "",
    max_voxels: int | None = MAX_EMBEDDED_VOXELS,
) -> Contents:
    """What a page shows of a scan and a label map (uint8 or uint16); volumes are always those of
    the whole label map.

    Scans of more than `max_voxels` voxels become a preview: cropped to their content, every n-th
    voxel, 256 greys. With None they stay as they are. Labels on another grid are drawn at their
    place in mm. Raises `BadGeometry` if that is nowhere in the scan, or if there are more
    structures than a page can show.
    """
    rows = _structures(labels, table)
    notes: list[str] = []
    on_grid = labels_on_scan(labels, scan).data
    if turned_onto(labels, scan) is None:
        notes.append(
            "The labels have another grid than the scan; they are drawn at their place in mm."
        )
    contrast = contrast_of(scan.data)
    shown = scan.with_data(_numbered(on_grid, rows))
    stored, slope, intercept = (
        (_whole(scan.data), 1.0, 0.0) if max_voxels is None else _compact(scan.data, contrast)
    )
    scan = scan.with_data(stored)
    if max_voxels is not None and (
        stored.size > max_voxels or max(stored.shape) > MAX_EMBEDDED_AXIS
    ):
        scan, shown, contrast, slope, intercept, said = _preview(
            scan, shown, contrast=contrast, slope=slope, intercept=intercept, max_voxels=max_voxels
        )
        notes += said
    surfaces, packed_surfaces = _surfaces(labels, [row["value"] for row in rows if row["index"]])
    middle = _world(scan.affine, (np.array(scan.shape) - 1) / 2)
    facts = {
        "title": harmless(title),
        "structures": rows,
        "notes": notes,
        "slope": slope,
        "intercept": intercept,
        "unit": contrast.unit,
        "window": _window(contrast),
        "start": _centre(labels) if labels.data.any() else middle,
        "turn": TURN,
        "surfaces": surfaces,
        "served": False,
    }
    if shown.data.max(initial=0) < 256:
        shown = shown.with_data(shown.data.astype(np.uint8))
    # To pack what stays on this machine only takes time.
    suffix = ".nii" if max_voxels is None else ".nii.gz"
    volumes = _nifti_bytes(scan, suffix), _nifti_bytes(shown, suffix)
    return Contents(facts, *volumes, packed_surfaces)


def _surfaces(labels: Volume, values: Sequence[int]) -> tuple[dict[str, Any], bytes]:
    """The surfaces of structures: what is said of them, and they themselves."""
    from medseg.view.meshes.packing import packed
    from medseg.view.meshes.surfaces import walls_of

    every = 1
    while labels.data.size > MAX_SURFACE_VOXELS * every**3:
        every += 1
    affine = labels.affine @ np.diag([every, every, every, 1.0])
    thin = Volume(labels.data[::every, ::every, ::every], affine)
    return packed(walls_of(thin, values, max_triangles=MAX_TRIANGLES))


def _numbered(labels: NDArray, rows: Sequence[dict[str, Any]]) -> NDArray[np.uint16]:
    """Labels as the numbers of the structures in the page, 0 for what it does not list."""
    numbers = np.zeros(int(labels.max(initial=0)) + 1, np.uint16)
    for row in rows:
        if row["index"] and row["value"] < len(numbers):
            numbers[row["value"]] = row["index"]
    return numbers[labels]


def page_html(contents: Contents, *, served: bool = False) -> str:
    """The page. With `served` it holds no voxels but fetches scan.nii, labels.nii and surfaces.gz
    from beside itself.
    """
    script = {name: _inline(_read(name)) for name in ("niivue/niivue.umd.js", "web/page.js")}
    style = _read("web/page.css")
    hashes = " ".join(_source(text) for text in script.values())
    connections = "'self'" if served else "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src {_source(style)}; img-src data: blob:;"
        f" connect-src {connections}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(contents.facts["title"] or "medseg view"),
        "style": style,
        # In a script element only these could end it or begin a comment.
        "facts": (
            json.dumps(contents.facts | {"served": served})
            .replace("<", "\\u003c")
            .replace("&", "\\u0026")
        ),
        "scan": "" if served else base64.b64encode(contents.scan).decode("ascii"),
        "labels": "" if served else base64.b64encode(contents.labels).decode("ascii"),
        "surfaces": "" if served else base64.b64encode(contents.surfaces).decode("ascii"),
        "niivue": script["niivue/niivue.umd.js"],
        "program": script["web/page.js"],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("web/page.html"))


def write_page(path: str | Path, contents: Contents) -> None:
    """Write the page as one file, whole or not at all. Raises `BadOutput`."""
    with atomic_write(path) as file:
        file.write(page_html(contents).encode())


def _structures(labels: Volume, table: LabelTable | None) -> list[dict[str, Any]]:
    """A row for every structure of the table: number on the page (0 if absent), volume, a voxel
    inside it in mm.
    """
    from scipy import ndimage

    counts = value_counts(labels.data, 1)
    boxes = ndimage.find_objects(labels.data)
    rows: list[dict[str, Any]] = []
    index = 0
    for label in full_table(labels, table).labels:
        count = int(counts[label.value]) if label.value < len(counts) else 0
        index += count > 0
        ml = round(count * labels.voxel_mm3 / 1000, 3)
        row = {
            "value": label.value,
            "name": harmless(label.name),
            "color": list(label.color),
            "ml": ml,
            "fluid": is_fluid(label),
        }
        centre = _centre(labels, label.value, boxes[label.value - 1]) if count else None
        rows.append(row | {"index": index if count else 0, "centre": centre})
    if index > MAX_STRUCTURES:
        raise BadGeometry(
            f"the labels hold {index} structures; a page shows at most {MAX_STRUCTURES}"
        )
    return rows


def _centre(
    labels: Volume, value: int | None = None, box: tuple[slice, ...] = (slice(0, None),) * 3
) -> list[float]:
    """RAS+ mm of the voxel of a structure in its box, or of all structures, that is nearest to
    their middle.
    """
    part = labels.data[box]
    flat = np.flatnonzero(part if value is None else part == value)
    some = np.unravel_index(flat[:: 1 + len(flat) // _CENTRE_SAMPLE], part.shape)
    inside = np.column_stack(some) + [side.start for side in box]
    away = ((inside - inside.mean(axis=0)) * labels.spacing_mm) ** 2
    return _world(labels.affine, inside[away.sum(axis=1).argmin()])


def _world(affine: NDArray, voxel: NDArray) -> list[float]:
    return [round(float(x), 4) for x in (affine @ (*voxel, 1.0))[:3]]


def _whole(data: NDArray) -> NDArray:
    """Voxels in a type that the page reads, unchanged: whole numbers of up to 32 bits, else
    float32.
    """
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    if data.dtype.kind in "iu" and data.dtype.itemsize < 4:
        return data
    return data.astype(np.float32)


def _compact(data: NDArray, contrast: Contrast) -> tuple[NDArray, float, float]:
    """Voxels as int16, with the slope and intercept that give back their values: whole numbers
    exactly.
    """
    if data.dtype.kind in "iub" and int(data.min()) >= -32768 and int(data.max()) <= 32767:
        return data.astype(np.int16), 1.0, 0.0
    slope = (contrast.most - contrast.least) / 4095 or 1.0
    return _scaled(data, contrast.least, slope, 4095).astype(np.int16), slope, contrast.least


def _preview(
    scan: Volume,
    labels: Volume,
    contrast: Contrast,
    slope: float,
    intercept: float,
    max_voxels: int,
) -> tuple[Volume, Volume, Contrast, float, float, list[str]]:
    """A scan and its labels made small enough for a page, and the sentences that say how."""
    low, high = contrast.low, contrast.high
    reach = (high - low) / 2
    least, most = max(contrast.least, low - reach), min(contrast.most, high + reach)
    grey = _scaled(
        scan.data, (least - intercept) / slope, (most - least) / 255 / slope, 255
    ).astype(np.uint8)
    dark = (low - least) / (most - least) * 255 + 0.1 * (high - low) / (most - least) * 255
    content = (grey > dark) | (labels.data > 0)
    start, stop = _box(content, scan.spacing_mm)
    shape = tuple(int(n) for n in stop - start)
    corner = (int(start[0]), int(start[1]), int(start[2]))
    small = [crop(volume, corner, shape) for volume in (scan.with_data(grey), labels)]  # type: ignore[arg-type]
    every = 1
    while (
        np.prod(left := [-(-n // every) for n in shape]) > max_voxels
        or max(left) > MAX_EMBEDDED_AXIS
    ):
        every += 1
    affine = small[0].affine @ np.diag([every, every, every, 1.0])
    thin = [Volume(volume.data[::every, ::every, ::every], affine) for volume in small]
    greys = (
        f"Values below {least:.4g} and above {most:.4g}{contrast.unit} are cut off, between them"
        " are 256 greys."
    )
    which = {2: "second", 3: "third"}.get(every, f"{every}th")
    voxels = f" It shows every {which} voxel along each axis." if every > 1 else ""
    sentences = [
        (
            f"The scan is too large for a page ({scan.data.size / 1e6:.0f} million voxels): this is"
            f" a preview, cropped to its content.{voxels} {greys}"
        ),
        "Volumes are those of the whole labels. The scan in full: medseg view --serve.",
    ]
    preview_contrast = Contrast(low, high, least, most=most, unit=contrast.unit)
    return thin[0], thin[1], preview_contrast, (most - least) / 255, least, sentences


def _scaled(data: NDArray, least: float, slope: float, steps: int) -> NDArray[np.float32]:
    out = (data.astype(np.float32) - np.float32(least)) / np.float32(slope)
    return np.clip(np.rint(out, out=out), 0, steps, out=out)


def _box(
    filled: NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> tuple[NDArray, NDArray]:
    """First voxel, and last voxel plus one, of what is filled, with a margin."""
    start, stop = np.zeros(3, int), np.array(filled.shape)
    for axis in range(3):
        there = np.flatnonzero(filled.any(axis=tuple({0, 1, 2} - {axis})))
        if len(there):
            margin = int(np.ceil(_MARGIN_MM / spacing_mm[axis]))
            start[axis], stop[axis] = (
                max(0, there[0] - margin),
                min(filled.shape[axis], there[-1] + 1 + margin),
            )
    return start, stop


def _nifti_bytes(volume: Volume, suffix: str) -> bytes:
    """A NIfTI file, stored along RAS so that the browser need not turn it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"volume{suffix}"
        write_nifti(reorient(volume, "RAS"), path)
        return path.read_bytes()


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script that cannot end the element it stands in."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _source(text: str) -> str:
    """How a Content-Security-Policy names a script or a style by its content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _window(contrast: Contrast) -> dict[str, float]:
    """The intensities that are black and white at first, and the least and most there are."""
    low, high, least, most = contrast.low, contrast.high, contrast.least, contrast.most
    return {"low": low, "high": high, "min": least, "max": most}
