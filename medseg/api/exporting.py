"""What other programs read, from Python: a model's network, the surfaces of structures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from medseg.api.scoring import label_map, table_of
from medseg.errors import BadConfig
from medseg.evaluation import find_table
from medseg.inference import Segmentation, export as write_onnx, write_torchscript
from medseg.io import ScanLike, as_path, is_path
from medseg.labels import LabelTable
from medseg.models import load_checkpoint, load_single
from medseg.text import as_whole
from medseg.view import export_surfaces

_OF_MODELS = (".onnx", ".ts")


def export(
    source: ScanLike | Segmentation,
    output: str | os.PathLike[str],
    *,
    structures: Sequence[str | int] | None = None,
    table: LabelTable | str | os.PathLike[str] | None = None,
    max_triangles: int | None = None,
) -> list[Path]:
    """Write the structures of a label map as smooth, closed surfaces, or a model's network, as
    `medseg export` does, and return the files.

    source: any form of a label map, or what `segment` returned; for a network the name or folder
    of a model. output: a name in .glb, .gltf, .obj or .stl, or a folder for an STL file of each
    structure; in .onnx or .ts for a network. structures: only these, by name or number. table: what
    the values mean; else what lies beside the labels. max_triangles: of all together, about; else
    as few as keep within a quarter of a voxel. Raises `BadConfig`, `BadFile`, `BadOutput`, and
    `BadModel`.
    """
    place = as_path(output, "output")
    if place.suffix.lower() in _OF_MODELS:
        if structures is not None or table is not None or max_triangles is not None:
            raise BadConfig("structures, table and max_triangles are about surfaces, not networks")
        return _network(source, place)
    if isinstance(structures, str):
        raise BadConfig("structures are a list of names; give ['liver'] for one")
    if max_triangles is not None:  # a closed surface has 4 or more
        max_triangles = as_whole(max_triangles, "max_triangles", least=4)
    names = None if structures is None else [str(one) for one in structures]
    files, _ = export_surfaces(
        label_map(source),
        [place],
        table=_table(table, source),
        structures=names,
        max_triangles=max_triangles,
    )
    return files


def _network(source: object, path: Path) -> list[Path]:
    if not isinstance(source, str | os.PathLike):
        raise BadConfig("a network is exported from the name or the folder of a model; give that")
    name = os.fspath(source)
    if path.suffix.lower() == ".ts":
        write_torchscript(load_single(name), path)
        return [path]
    written = write_onnx(load_checkpoint(name), path)
    return [written.network, written.description]


def _table(table: LabelTable | str | os.PathLike[str] | None, source: object) -> LabelTable | None:
    if table is not None:
        return table_of(table)
    if isinstance(source, Segmentation):
        return source.table
    return find_table(None, Path(source), Path(source)) if is_path(source) else None
