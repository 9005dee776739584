"""MGH: odd headers are refused or read exactly."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from medseg import io
from medseg.errors import BadFile, BadOutput
from medseg.volume import Volume

DATA = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
AFFINE = np.array([[-1.0, 0, 0, 10], [0, 0, 2, -20], [0, -3, 0, 30], [0, 0, 0, 1]])


@pytest.fixture
def save(tmp_path):
    """Save an MGH file made by nibabel with numbers in its header changed: `save(at28=("h",
    0))`.
    """

    def save(data=DATA, *, tail=b"", name="x.mgh", **patches):
        raw = bytearray(nib.MGHImage(data, AFFINE).to_bytes())
        for place, (code, *values) in patches.items():
            struct.pack_into(">" + code, raw, int(place.removeprefix("at")), *values)
        content = bytes(raw) + tail
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", ["x.mgh", "x.mgz"])
@pytest.mark.parametrize("tail", [b"", struct.pack(">4f", 2.3, 0.1, 3, 0), b"\0\0\0\1any tags"])
def test_scan_parameters_and_tags_behind_the_voxels_are_passed_over(save, name, tail):
    volume = io.read(save(name=name, tail=tail))

    assert np.array_equal(volume.data, DATA)
    assert np.allclose(volume.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({"at0": ("i", 2)}, "not an MGH"),
        ({"at4": ("i", 0)}, "axis"),
        ({"at4": ("i", -3)}, "axis"),
        ({"at4": ("i", 30)}, "too short"),
        ({"at16": ("i", 0)}, "axis"),
        ({"at20": ("i", 6)}, "type"),
        ({"at20": ("i", 3)}, "too short"),
        ({"at28": ("h", 0)}, "assume-geometry"),
        ({"at30": ("f", 0)}, "positive"),
        ({"at30": ("f", np.nan)}, "finite"),
        ({"at30": ("f", np.inf)}, "finite"),
        ({"at42": ("f", 0.5)}, "length 1"),
        ({"at42": ("f", np.nan)}, "finite"),
        ({"at78": ("f", np.nan)}, "finite"),
    ],
)
def test_an_odd_header_is_refused_with_the_reason(save, patches, reason):
    path = save(**patches)

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(str(path))


def test_a_header_without_geometry_is_read_only_when_told(save):
    volume = io.read(save(at28=("h", 0)), assume_geometry="pixdim")

    assert np.allclose(volume.affine, np.diag([1, 3, 2, 1]))


def test_of_several_frames_one_is_chosen(save):
    data = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 3)).astype(np.int16)
    path = save(data)

    with pytest.raises(BadFile, match="--volume"):
        io.read(path)
    for index in range(3):
        assert np.array_equal(io.read(path, volume_index=index).data, data[..., index])


@pytest.mark.parametrize(
    ("given_type", "largest", "kept"),
    [
        ("i8", 255, "u1"),
        ("u2", 256, "i2"),
        ("u2", 65535, "i4"),
        ("u4", 7, "u1"),
        ("f8", 0.5, "f4"),
        ("i1", 9, "u1"),
    ],
)
def test_other_types_become_the_smallest_that_holds_them(tmp_path, given_type, largest, kept):
    data = np.zeros((2, 3, 4), given_type)
    data[1, 2, 3] = largest

    io.write(Volume(data, AFFINE), tmp_path / "x.mgz")

    assert io.read(tmp_path / "x.mgz").data.dtype == np.dtype(kept)
    assert np.array_equal(io.read(tmp_path / "x.mgz").data, data)
    assert np.array_equal(np.asanyarray(nib.load(tmp_path / "x.mgz").dataobj), data)


@pytest.mark.parametrize(
    ("given_type", "value"), [("u4", 2**31), ("i8", -(2**31) - 1), ("f8", 0.1)]
)
def test_what_would_be_changed_is_refused(tmp_path, given_type, value):
    with pytest.raises(BadOutput, match="MGH"):
        io.write(Volume(np.full((2, 2, 2), value, given_type), AFFINE), tmp_path / "x.mgz")

    assert not list(tmp_path.iterdir())
