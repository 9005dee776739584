"""Files of surfaces: STL, OBJ and glTF.

Which way is up is each format's own convention. STL and OBJ have none: medseg writes millimetres in
LPS and says so in the first line (`SPACE=LPS`), where 3D Slicer writes and looks for it
(Libs/MRML/Core/vtkMRMLModelStorageNode.cxx). glTF 2.0 (ISO/IEC 12113:2022, 3.4) measures in metres,
with y up and the front looking along z: the points are RAS millimetres, and the transform of the
node above them leads there.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadOutput
from medseg.files import written_together
from medseg.labels import LabelTable
from medseg.packages import __version__
from medseg.text import harmless
from medseg.view.meshes.names import plain_names
from medseg.view.meshes.surfaces import Surface, surfaces_of
from medseg.view.structures import chosen_values, full_table
from medseg.volume import LPS, Volume

_STL_HEADER = b"medseg SPACE=LPS".ljust(80)
_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
#: RAS millimetres to metres with x to the patient's left, y up and z to the front, by columns.
_GLTF_MATRIX = [-0.001, 0, 0, 0, 0, 0, 0.001, 0, 0, 0.001, 0, 0, 0, 0, 0, 1]
#: Codes of glTF: float32, uint32, a buffer of points, one of indices, triangles.
_FLOAT, _UINT, _POINTS, _INDICES, _TRIANGLES = 5126, 5125, 34962, 34963, 4
_JSON, _BIN = 0x4E4F534A, 0x004E4942
_MAX_BYTES = 1 << 32
_ONE_FILE = (".glb", ".gltf", ".obj", ".stl")


def check_name(path: str | Path, count: int) -> None:
    """Raise `BadOutput` for a name that is none of a file, or of a folder of STL files, for `count`
    surfaces.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if target.is_dir() and suffix in _ONE_FILE:
        raise BadOutput(f"{path}: is a folder; name a file, or for STL a folder without a suffix")
    if target.is_dir():
        return
    if suffix == ".stl" and count != 1:
        raise BadOutput(
            f"{path}: an STL file holds one structure, and this would be {count}; name a folder, or"
            " one of the structures"
        )
    if suffix and suffix not in _ONE_FILE:
        raise BadOutput(
            f"{path}: surfaces are written as .glb, .gltf, .obj, .stl, or a folder of STL files;"
            " give such a name"
        )
    if target.exists() and not suffix:
        raise BadOutput(f"{path}: is a file; name a folder for the STL files")


def export_surfaces(
    labels: Volume,
    paths: Sequence[Path],
    *,
    table: LabelTable | None = None,
    structures: Sequence[str] | None = None,
    max_triangles: int | None = None,
) -> tuple[list[Path], list[Surface]]:
    """Write the structures of a label map, or those of these names or numbers, as surfaces to each
    of the paths; returns the files and the surfaces. table: names and colours; of values that it
    lacks, and without it, their numbers. Raises `BadConfig` for structures that are not there,
    `BadOutput` for names, before anything is computed, and places.
    """
    names = full_table(labels, table)
    values = chosen_values(labels, names, structures)
    for path in paths:
        check_name(path, len(values))
    surfaces = surfaces_of(labels, names, values, max_triangles=max_triangles)
    return [file for path in paths for file in write_surfaces(path, surfaces)], surfaces


def write_surfaces(path: str | Path, surfaces: Sequence[Surface]) -> list[Path]:
    """Write surfaces in the format that the suffix of a name says, all files or none, and return
    them; without one as STL files in a folder. Raises `BadOutput`.
    """
    check_name(path, len(surfaces))
    suffix = Path(path).suffix.lower()
    if suffix == ".obj":
        return write_obj(path, surfaces)
    if suffix in (".glb", ".gltf"):
        return write_gltf(path, surfaces)
    return write_stl(path, surfaces)


def write_stl(path: str | Path, surfaces: Sequence[Surface]) -> list[Path]:
    """Write a binary STL file for each surface, NAME.stl, into a folder; a single one to the file
    `path` if that ends in .stl. All of them or none. Raises `BadOutput`.
    """
    place = Path(path)
    names = plain_names([(one.value, one.name) for one in surfaces])
    is_file = place.suffix.lower() == ".stl" and not place.is_dir()
    paths = [place] if is_file else [place / f"{name}.stl" for name in names]
    with written_together() as stage:
        for target, surface in zip(paths, surfaces, strict=True):
            with stage(target).open("wb") as file:
                _write_stl(file, surface)
    return paths


def _write_stl(file: BinaryIO, surface: Surface) -> None:
    corners = _in_lps(surface.points)[surface.triangles]
    facets = np.zeros(len(corners), _STL_TRIANGLE)
    facets["normal"] = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    facets["corners"] = corners
    file.write(_STL_HEADER + struct.pack("<I", len(facets)))
    file.write(facets.tobytes())


def write_obj(path: str | Path, surfaces: Sequence[Surface]) -> list[Path]:
    """Write all surfaces as one OBJ file, an object each, and their colours to an MTL file beside
    it, both or none; returns their paths. Raises `BadOutput`.
    """
    target = Path(path)
    stem = plain_names([(0, target.stem)])[0] if " " in target.stem else target.stem
    colors = target.with_name(f"{stem}.mtl")
    names = plain_names([(one.value, one.name) for one in surfaces])
    with written_together() as stage:
        with stage(colors).open("w", encoding="ascii", newline="\n") as file:
            for name, surface in zip(names, surfaces):
                shares = " ".join(f"{part / 255:.4f}" for part in surface.color)
                file.write(f"newmtl {name}\nKd {shares}\nKa 0 0 0\nKs 0 0 0\nd 1\nillum 1\n")
        with stage(target).open("w", encoding="utf-8", newline="\n") as file:
            file.write(f"# medseg SPACE=LPS\n# millimetres\nmtllib {colors.name}\n")
            before = 1  # OBJ counts from 1, through all objects
            for name, surface in zip(names, surfaces):
                file.write(f"o {name}\nusemtl {name}\ns 1\n")
                np.savetxt(file, _in_lps(surface.points), fmt="v %.4f %.4f %.4f")
                np.savetxt(file, surface.triangles + before, fmt="f %d %d %d")
                before += len(surface.points)
    return [target, colors]


def write_gltf(path: str | Path, surfaces: Sequence[Surface]) -> list[Path]:
    """Write all surfaces as one glTF file, `.glb`, or `.gltf` with its data in it, whole or not at
    all. Raises `BadOutput`.
    """
    document, data = _gltf(surfaces)
    if len(data) >= _MAX_BYTES - (1 << 24):
        raise BadOutput(f"{path}: is too large for glTF; name fewer structures or triangles")
    is_text = Path(path).suffix.lower() == ".gltf"
    if is_text:
        packed = base64.b64encode(data).decode("ascii")
        document["buffers"][0]["uri"] = f"data:application/octet-stream;base64,{packed}"
    text = json.dumps(document, separators=(",", ":")).encode()
    with written_together() as stage, stage(path).open("wb") as file:
        if is_text:
            file.write(text)
        else:
            text += b" " * (-len(text) % 4)
            file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(data)))
            file.write(struct.pack("<II", len(text), _JSON) + text)
            file.write(struct.pack("<II", len(data), _BIN) + data)
    return [Path(path)]


def _gltf(surfaces: Sequence[Surface]) -> tuple[dict[str, Any], bytes]:
    """The JSON of a glTF file and the bytes that it describes."""
    nodes: list[dict[str, Any]] = [
        {
            "name": "RAS millimetres",
            "matrix": _GLTF_MATRIX,
            "children": list(range(1, len(surfaces) + 1)),
        }
    ]
    meshes, materials = [], []
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    data = bytearray()

    def add(array: NDArray, target: int, kind: str, **limits: list[float]) -> int:
        content = array.tobytes()
        views.append(
            {"buffer": 0, "byteOffset": len(data), "byteLength": len(content), "target": target}
        )
        data.extend(content)
        component = _FLOAT if array.dtype.kind == "f" else _UINT
        count = array.size if kind == "SCALAR" else len(array)
        about = {"bufferView": len(views) - 1, "componentType": component, "count": count}
        accessors.append(about | {"type": kind} | limits)
        return len(accessors) - 1

    for number, surface in enumerate(surfaces):
        points = surface.points.astype("<f4")
        limits = {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
        attributes = {
            "POSITION": add(points, _POINTS, "VEC3", **limits),
            "NORMAL": add(normals(surface).astype("<f4"), _POINTS, "VEC3"),
        }
        indices = add(surface.triangles.astype("<u4"), _INDICES, "SCALAR")
        name = harmless(surface.name)
        part = {"attributes": attributes, "indices": indices, "material": number}
        meshes.append({"name": name, "primitives": [part | {"mode": _TRIANGLES}]})
        nodes.append({"name": name, "mesh": number, "extras": {"label": surface.value}})
        color = [*(_linear(value) for value in surface.color), 1.0]
        look = {"baseColorFactor": color, "metallicFactor": 0.0, "roughnessFactor": 0.7}
        materials.append({"name": name, "pbrMetallicRoughness": look})
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"medseg {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
        "meshes": meshes,
        "materials": materials,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(data)}],
    }
    return document, bytes(data)


def normals(surface: Surface) -> NDArray[np.float32]:
    """(n, 3): at each point the mean normal of the triangles around it, weighted by their areas."""
    a, b, c = surface.points.astype(np.float64)[surface.triangles.T]
    every = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    places = surface.triangles.ravel()
    count = len(surface.points)
    sums = [np.bincount(places, every[:, axis], minlength=count) for axis in range(3)]
    return _unit(np.stack(sums, axis=1)).astype(np.float32)


def _unit(vectors: NDArray) -> NDArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Where there is no direction glTF still wants a unit vector.
    return np.where(lengths > 0, vectors / np.maximum(lengths, 1e-30), (0.0, 0.0, 1.0))


def _in_lps(points: NDArray[np.float32]) -> NDArray[np.float32]:
    return points * np.diag(LPS)[:3].astype(np.float32)


def _linear(part: int) -> float:
    """A part of an sRGB colour, 0 to 255, as light (IEC 61966-2-1), which glTF's factors are."""
    share = part / 255
    light = share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
    return round(light, 6)
