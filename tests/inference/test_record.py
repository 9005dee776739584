"""The run record's parts: equal hashes for equal scans, objects at their places, nothing that names
anyone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from making import networks as tiny
from making.strategies import rotation
from medseg.errors import BadOutput
from medseg.inference import record
from medseg.machine import peak_memory_bytes
from medseg.packages import versions
from medseg.volume import Volume, reorient


def sample(dtype: str = "f4") -> Volume:
    return Volume(np.arange(60).reshape(3, 4, 5).astype(dtype), tiny.affine_of((1, 2, 3)))


def test_the_hash_does_not_depend_on_how_voxels_lie_in_memory():
    volume = sample()
    expected = record.voxel_hash(volume)
    assert record.voxel_hash(volume.with_data(np.asfortranarray(volume.data))) == expected
    assert record.voxel_hash(volume.with_data(volume.data.astype(">f4"))) == expected
    assert record.voxel_hash(reorient(reorient(volume, "LSP"), "RAS")) == expected


def test_the_hash_tells_scans_apart_by_voxels_geometry_dtype_and_shape():
    volume = sample()
    changed = volume.data.copy()
    changed[1, 2, 3] += 1
    moved = volume.affine.copy()
    moved[0, 3] += 1e-3
    others = [
        volume.with_data(changed),
        Volume(volume.data, moved),
        sample("f8"),
        sample("i4"),
        Volume(volume.data.reshape(4, 3, 5), volume.affine),
        reorient(volume, "LPS"),
    ]
    assert len({record.voxel_hash(other) for other in [volume, *others]}) == 1 + len(others)


def test_describe_says_grid_and_type():
    described = record.describe(reorient(sample("i2"), "SPL"))
    assert {key: described[key] for key in ("shape", "spacing_mm", "orientation", "dtype")} == {
        "shape": [5, 4, 3],
        "spacing_mm": [3.0, 2.0, 1.0],
        "orientation": "SPL",
        "dtype": "int16",
    }
    json.dumps(described)


def test_versions_name_medseg_python_and_packages():
    found = versions()
    assert found.keys() >= {"medseg", "python", "numpy", "torch"}
    assert all(isinstance(value, str) and "/" not in value for value in found.values())


def test_peak_memory_is_at_least_what_was_just_used():
    block = np.ones(30_000_000, np.uint8)
    assert block.nbytes < peak_memory_bytes() < 1e12


def blobs() -> np.ndarray:
    labels = np.zeros((12, 12, 12), np.uint16)
    labels[1:4, 1:3, 1:2] = 5
    labels[6:8, 6:8, 6:8] = 5
    labels[8, 8, 8] = 5  # touches the last one at a corner: one object
    labels[8:10, 6:8, 6:8] = 700  # touches it with a face, but is another structure
    return labels


def test_objects_are_connected_components_of_each_label_with_boxes_in_mm():
    affine = tiny.affine_of((2.0, 1.0, 0.5), (10, 20, 30))
    numbers, rows = record.found_objects(Volume(blobs(), affine))
    assert [(row["label"], row["voxels"]) for row in rows] == [(5, 9), (5, 6), (700, 8)]
    assert [row["object"] for row in rows] == [1, 2, 3]
    assert rows[0]["box_mm"] == [[10 + 2 * 5.5, 25.5, 32.75], [10 + 2 * 8.5, 28.5, 34.25]]
    assert rows[1]["box_mm"] == [[11, 20.5, 30.25], [17, 22.5, 30.75]]
    assert rows[2]["ml"] == pytest.approx(8 * 1.0 / 1000)
    assert numbers.data.dtype == np.uint16
    assert np.array_equal(numbers.data > 0, blobs() > 0)
    for row in rows:
        where = numbers.data == row["object"]
        assert where.sum() == row["voxels"]
        assert ndimage.label(where, np.ones((3, 3, 3)))[1] == 1


def test_boxes_of_a_tilted_scan_hold_the_corners_of_every_voxel():
    affine = tiny.affine_of((2.0, 1.0, 0.5), (10, 20, 30))
    affine[:3, :3] = rotation((1, 0.2, -0.3, 0.1)) @ affine[:3, :3]
    numbers, rows = record.found_objects(Volume(blobs(), affine))
    for row in rows:
        low, high = np.argwhere(numbers.data == row["object"]).min(0) - 0.5, None
        high = np.argwhere(numbers.data == row["object"]).max(0) + 0.5
        ends = np.array(np.meshgrid(*zip(low, high))).reshape(3, -1)
        world = affine[:3, :3] @ ends + affine[:3, 3:]
        assert np.allclose(row["box_mm"], [world.min(1), world.max(1)], atol=1e-3)


def test_an_empty_map_has_no_objects():
    numbers, rows = record.found_objects(Volume(np.zeros((4, 4, 4), np.uint8), np.eye(4)))
    assert rows == []
    assert not numbers.data.any()


def test_a_record_is_written_whole_as_json(tmp_path: Path):
    record.write_record(tmp_path / "r.json", {"a": 1, "b": ["ä"]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1, "b": ["ä"]}
    with pytest.raises(BadOutput):
        record.write_record(tmp_path / "nowhere" / "r.json", {})
