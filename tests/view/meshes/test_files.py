"""Files of surfaces, read by what their formats say."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from making import heads
from medseg.errors import BadOutput
from medseg.labels import Label, LabelTable
from medseg.view import Surface, surfaces_of, write_surfaces
from medseg.view.meshes.files import check_name
from medseg.volume import Volume


@pytest.fixture(scope="module")
def surfaces() -> list[Surface]:
    """A box at the patient's right and up, one in front, one at the left and down."""
    _, labels = heads.head("PIR", 20.0)
    return surfaces_of(labels, heads.TABLE)


def read_stl(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Header, normals and corners (n, 3, 3)."""
    content = path.read_bytes()
    count = struct.unpack("<I", content[80:84])[0]
    assert len(content) == 84 + 50 * count
    rows = np.frombuffer(content[84:], [("n", "<f4", 3), ("c", "<f4", (3, 3)), ("u", "<u2")])
    return content[:80], rows["n"], rows["c"]


def enclosed(corners: np.ndarray) -> float:
    a, b, c = np.moveaxis(corners.astype(float), 1, 0)
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def read_glb(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    assert struct.unpack("<4sII", content[:12]) == (b"glTF", 2, len(content))
    length, kind = struct.unpack("<II", content[12:20])
    assert kind == 0x4E4F534A
    assert length % 4 == 0
    document = json.loads(content[20 : 20 + length])
    size, kind = struct.unpack("<II", content[20 + length : 28 + length])
    assert kind == 0x004E4942
    assert size == len(content) - 28 - length == document["buffers"][0]["byteLength"]
    return document, content[28 + length :]


def accessor(document: dict, data: bytes, number: int) -> np.ndarray:
    about = document["accessors"][number]
    view = document["bufferViews"][about["bufferView"]]
    assert view["byteOffset"] % 4 == 0
    part = data[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    width = {"SCALAR": 1, "VEC3": 3}[about["type"]]
    array = np.frombuffer(part, {5126: "<f4", 5125: "<u4"}[about["componentType"]])
    assert len(array) == width * about["count"]
    return array.reshape(-1, width) if width > 1 else array


def test_stl_is_a_file_a_structure_in_lps_as_slicer_reads_it(surfaces, tmp_path):
    paths = write_surfaces(tmp_path / "new" / "stl", surfaces)
    assert [path.name for path in paths] == [
        "right_kidney.stl",
        "front_Grosse_b_amp.stl",
        "left_kidney.stl",
    ]
    assert sorted(paths) == sorted((tmp_path / "new" / "stl").iterdir())
    for path, surface in zip(paths, surfaces):
        header, normals, corners = read_stl(path)
        assert b"SPACE=LPS" in header
        assert not header.startswith(b"solid")
        assert np.allclose(corners * (-1, -1, 1), surface.points[surface.triangles], atol=1e-4)
        assert enclosed(corners) == pytest.approx(surface.mm3, rel=1e-4)  # outwards
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert np.allclose(normals * np.linalg.norm(across, axis=1)[:, None], across, atol=1e-4)


def test_one_structure_can_be_one_stl_file(surfaces, tmp_path):
    assert write_surfaces(tmp_path / "a.STL", surfaces[:1]) == [tmp_path / "a.STL"]
    assert len(read_stl(tmp_path / "a.STL")[2]) == len(surfaces[0].triangles)
    with pytest.raises(BadOutput, match="one structure, and this would be 3"):
        write_surfaces(tmp_path / "b.stl", surfaces)
    assert not (tmp_path / "b.stl").exists()


def test_obj_has_an_object_and_a_colour_for_each_structure(surfaces, tmp_path):
    paths = write_surfaces(tmp_path / "head.obj", surfaces)
    assert paths == [tmp_path / "head.obj", tmp_path / "head.mtl"]
    lines = paths[0].read_text(encoding="ascii").splitlines()
    assert "SPACE=LPS" in lines[0]
    assert "mtllib head.mtl" in lines
    words = [line.split() for line in lines]
    points = np.array([list(map(float, w[1:])) for w in words if w[0] == "v"])
    assert np.allclose(
        points * (-1, -1, 1), np.concatenate([s.points for s in surfaces]), atol=1e-4
    )
    faces: dict[str, list[list[int]]] = {}
    for word in words:
        if word[0] == "o":
            current = faces.setdefault(word[1], [])
        elif word[0] == "f":
            current.append(list(map(int, word[1:])))
    assert list(faces) == ["right_kidney", "front_Grosse_b_amp", "left_kidney"]
    for triangles, surface in zip(faces.values(), surfaces):
        assert enclosed(points[np.array(triangles) - 1]) == pytest.approx(surface.mm3, rel=1e-3)
    materials = paths[1].read_text(encoding="ascii").split("newmtl ")[1:]
    assert [one.split()[0] for one in materials] == list(faces)
    assert [w[1] for w in words if w[0] == "usemtl"] == list(faces)
    assert "Kd 1.0000 0.0000 0.0000" in materials[0]


def test_gltf_stands_upright_in_metres(surfaces, tmp_path):
    write_surfaces(tmp_path / "head.glb", surfaces)
    document, data = read_glb(tmp_path / "head.glb")
    assert document["asset"]["version"] == "2.0"
    root = document["nodes"][document["scenes"][document["scene"]]["nodes"][0]]
    matrix = np.array(root["matrix"]).reshape(4, 4).T
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1e-9)  # not mirrored
    middles = {}
    for child, surface in zip(root["children"], surfaces, strict=True):
        node = document["nodes"][child]
        (part,) = document["meshes"][node["mesh"]]["primitives"]
        points = accessor(document, data, part["attributes"]["POSITION"])
        about = document["accessors"][part["attributes"]["POSITION"]]
        assert np.array_equal(points.min(axis=0), np.array(about["min"], np.float32))
        assert np.array_equal(points.max(axis=0), np.array(about["max"], np.float32))
        normals = accessor(document, data, part["attributes"]["NORMAL"])
        assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        triangles = accessor(document, data, part["indices"]).reshape(-1, 3)
        assert np.allclose(points, surface.points)
        assert np.array_equal(triangles, surface.triangles)
        # Outwards: away from the middle, of boxes.
        assert (((points - points.mean(axis=0)) * normals).sum(axis=1) > 0).all()
        placed = points @ matrix[:3, :3].T + matrix[:3, 3]
        middles[node["extras"]["label"]] = placed.mean(axis=0)
        look = document["materials"][part["material"]]["pbrMetallicRoughness"]
        assert look["baseColorFactor"] == [*(int(c > 0) for c in surface.color), 1]
        assert node["name"] == surface.name
    # The asset's front looks along z and its y is up: its left is along x.
    assert middles[heads.LEFT][0] > middles[heads.RIGHT][0] + 0.02
    assert middles[heads.RIGHT][1] > middles[heads.LEFT][1] + 0.01
    assert middles[heads.FRONT][2] > middles[heads.LEFT][2] + 0.02
    assert abs(middles[heads.LEFT]).max() < 0.1


def test_gltf_as_text_holds_the_same(surfaces, tmp_path):
    write_surfaces(tmp_path / "head.glb", surfaces)
    write_surfaces(tmp_path / "head.gltf", surfaces)
    document = json.loads((tmp_path / "head.gltf").read_text(encoding="utf-8"))
    uri = document["buffers"][0].pop("uri")
    packed, data = read_glb(tmp_path / "head.glb")
    assert document == packed
    assert base64.b64decode(uri.partition("base64,")[2]) == data


def test_a_grey_of_a_screen_is_darker_as_light(tmp_path):
    labels = Volume(np.pad(np.ones((3, 3, 3), np.uint8), 1), np.eye(4))
    table = LabelTable((Label(1, "grey", (188, 188, 188)),))
    write_surfaces(tmp_path / "grey.glb", surfaces_of(labels, table))
    document, _ = read_glb(tmp_path / "grey.glb")
    factor = document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"]
    assert factor[:3] == pytest.approx([0.503] * 3, abs=1e-3)  # half the light (IEC 61966-2-1)


def test_names_that_are_none_are_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "folder.obj").mkdir()
    for name, match in (
        ("a.ply", "give such a name"),
        ("file", "is a file"),
        ("folder.obj", "is a folder"),
    ):
        with pytest.raises(BadOutput, match=match):
            check_name(tmp_path / name, 2)
    check_name(tmp_path, 2)
    check_name(tmp_path / "new", 2)


def test_what_cannot_be_written_leaves_what_was_there(surfaces, tmp_path):
    (tmp_path / "left_kidney.stl").mkdir()
    (tmp_path / "right_kidney.stl").write_text("old", encoding="utf-8")
    with pytest.raises(BadOutput, match=r"left_kidney\.stl"):
        write_surfaces(tmp_path, surfaces)
    assert (tmp_path / "right_kidney.stl").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "left_kidney.stl",
        "right_kidney.stl",
    ]


def test_a_name_of_a_structure_says_nothing_to_a_terminal(tmp_path):
    labels = Volume(np.pad(np.ones((3, 3, 3), np.uint8), 1), np.eye(4))
    table = LabelTable((Label(1, "a\x1b[31m\nmtllib evil.mtl", (9, 9, 9)),))
    for name in ("a.obj", "a.gltf"):
        write_surfaces(tmp_path / name, surfaces_of(labels, table))
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "\x1b" not in text
        assert "\nmtllib evil" not in text
