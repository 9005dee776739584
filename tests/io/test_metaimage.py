"""MetaImage: odd headers are refused or read exactly."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from medseg import io
from medseg.errors import BadFile

DATA = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
RAW = DATA.astype("<i2").tobytes("F")
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "1 2 3",
    "DimSize": "2 3 4",
    "ElementType": "MET_SHORT",
}
RAS = np.array([[-1.0, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


@pytest.fixture
def save(tmp_path):
    """Save a MetaImage file with fields changed, or left out where None."""

    def save(data=RAW, *, last="LOCAL", **changed):
        fields = {**FIELDS, **changed, "ElementDataFile": last}
        header = "".join(f"{field} = {value}\n" for field, value in fields.items() if value is not None)
        (tmp_path / "x.mha").write_bytes(header.encode() + data)
        return tmp_path / "x.mha"

    return save


def test_a_plain_file_is_read(save):
    volume = io.read(save())

    assert np.array_equal(volume.data, DATA)
    assert np.array_equal(volume.affine, RAS)


@pytest.mark.parametrize("name", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_big_endian_is_read_under_both_names(save, name):
    path = save(DATA.astype(">i2").tobytes("F"), **{"BinaryDataByteOrderMSB": None, name: "True"})

    assert np.array_equal(io.read(path).data, DATA)


@pytest.mark.parametrize("names", [("Rotation", "Position"), ("Orientation", "Origin"), ("TransformMatrix", "Offset")])
def test_matrix_and_offset_are_known_by_all_their_names(save, names):
    changed = {"TransformMatrix": None, "Offset": None}
    changed |= {names[0]: FIELDS["TransformMatrix"], names[1]: FIELDS["Offset"]}

    assert np.array_equal(io.read(save(**changed)).affine, RAS)


def test_rows_of_the_matrix_are_voxel_axes(save):
    volume = io.read(save(TransformMatrix="0 1 0 0 0 1 1 0 0"))

    # i runs along LPS y with 1 mm, j along z with 2 mm, k along x with 3 mm.
    expected = np.array([[0, 0, -3, -10], [-1, 0, 0, -20], [0, 2, 0, 30], [0, 0, 0, 1.0]])
    assert np.array_equal(volume.affine, expected)


@pytest.mark.parametrize("size", ["with", "without"])
def test_compressed_data_is_read(save, size):
    packed = zlib.compress(RAW)
    changed = {"CompressedDataSize": str(len(packed))} if size == "with" else {}

    assert np.array_equal(io.read(save(packed, CompressedData="True", **changed)).data, DATA)


def test_a_wrong_checksum_is_refused(save):
    packed = zlib.compress(RAW)
    damaged = packed[:-1] + bytes([packed[-1] ^ 1])

    with pytest.raises(BadFile, match="checksum"):
        io.read(save(damaged, CompressedData="True"))


def test_of_a_4d_file_one_volume_is_chosen(save):
    both = np.stack([DATA, DATA + 100], axis=3).astype("<i2").tobytes("F")
    path = save(both, NDims=4, DimSize="2 3 4 2", ElementSpacing="1 2 3 1", Offset="10 20 30 0",
                TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1")  # fmt: skip

    with pytest.raises(BadFile, match="--volume"):
        io.read(path)
    assert np.array_equal(io.read(path, volume_index=1).data, DATA + 100)
    assert np.array_equal(io.read(path, volume_index=1).affine, RAS)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"ObjectType": "Mesh"}, "not an image"),
        ({"NDims": "4"}, "dimensions"),
        ({"NDims": "2", "DimSize": "6 4"}, "picture"),
        ({"DimSize": "2 3 0"}, "axis"),
        ({"DimSize": "2 3 x"}, "dimsize"),
        ({"DimSize": None}, "dimsize"),
        ({"DimSize": "2 3 5"}, "too short"),
        ({"DimSize": "2 3 3"}, "more data"),
        ({"ElementNumberOfChannels": "3"}, "colour"),
        ({"ElementType": "MET_UCHAR_ARRAY"}, "type"),
        ({"ElementType": None}, "type"),
        ({"BinaryData": "False"}, "text"),
        ({"BinaryDataByteOrderMSB": "maybe"}, "neither"),
        ({"CompressedData": "True"}, "zlib|compressed"),
        ({"TransformMatrix": None}, "assume-geometry"),
        ({"Offset": None}, "assume-geometry"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0"}, "transformmatrix"),
        ({"TransformMatrix": "2 0 0 0 1 0 0 0 1"}, "length 1"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0.6 0.8"}, "shear"),
        ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "finite"),
        ({"Offset": "1 2 inf"}, "finite"),
        ({"ElementSpacing": None}, "voxels"),
        ({"ElementSpacing": "1 2 -3"}, "positive"),
        ({"ElementSpacing": "1 2 0"}, "positive"),
        ({"ElementSpacing": "1 2 nan"}, "finite"),
        ({"HeaderSize": "100"}, "skips"),
        ({"HeaderSize": "-1"}, "skips"),
        ({"last": "LIST"}, "several files"),
        ({"last": "x%02d.raw 1 4 1"}, "several files"),
        ({"last": "none.raw"}, "missing"),
        ({"offset": "1 2 3"}, "twice"),
        ({"Origin": "1 2 3"}, "twice"),
    ],
)
def test_an_odd_header_is_refused_with_the_reason(save, changed, reason):
    path = save(**changed)

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(str(path))


def test_spacing_alone_is_enough_only_when_told(save):
    path = save(TransformMatrix=None, Offset=None)

    assert np.array_equal(io.read(path, assume_geometry="pixdim").affine, np.diag([1.0, 2, 3, 1]))
