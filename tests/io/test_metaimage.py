"""MetaImage: odd headers are refused or read exactly."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

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
        header = "".join(
            f"{field} = {value}\n" for field, value in fields.items() if value is not None
        )
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


@pytest.mark.parametrize(
    "names", [("Rotation", "Position"), ("Orientation", "Origin"), ("TransformMatrix", "Offset")]
)
def test_matrix_and_offset_are_known_by_all_their_names(save, names):
    changed = {"TransformMatrix": None, "Offset": None}
    changed |= {names[0]: FIELDS["TransformMatrix"], names[1]: FIELDS["Offset"]}

    assert np.array_equal(io.read(save(**changed)).affine, RAS)


def test_a_field_may_stand_there_under_two_names_that_agree(save):
    path = save(
        ElementByteOrderMSB="False", Position=FIELDS["Offset"], Rotation="1 0 0 0 1 0 0 0 1"
    )

    assert np.array_equal(io.read(path).data, DATA)
    assert np.array_equal(io.read(path).affine, RAS)


def test_a_byte_order_mark_before_the_header_is_passed_over(save):
    path = save()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert np.array_equal(io.read(path).data, DATA)


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
        ({"ElementNumberOfChannels": "3", "ElementType": "MET_UCHAR"}, "colour"),
        ({"ElementNumberOfChannels": "4", "ElementType": "MET_UCHAR"}, "colour"),
        ({"ElementNumberOfChannels": "0"}, "axis"),
        ({"ElementNumberOfChannels": "two"}, "damaged"),
        ({"DistanceUnits": "inch"}, "'inch'"),
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
        ({"HeaderSize": "100"}, "header itself"),
        ({"HeaderSize": "-2"}, "HeaderSize"),
        ({"HeaderSize": "-1", "CompressedData": "True"}, "HeaderSize"),
        ({"HeaderSize": "many"}, "headersize"),
        ({"last": "none.raw"}, "missing"),
        ({"offset": "1 2 3"}, "twice"),
        ({"Origin": "1 2 3"}, "twice"),
        ({"ElementByteOrderMSB": "True"}, "twice"),
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


@pytest.mark.parametrize(("unit", "mm"), [("um", 1e-3), ("mm", 1), ("cm", 10), ("?", 1), ("", 1)])
def test_lengths_of_every_unit_become_mm(save, unit, mm):
    path = save(DistanceUnits=unit)

    assert np.allclose(io.read(path).affine, np.diag([mm, mm, mm, 1]) @ RAS, rtol=1e-12)
    assert np.allclose(
        io.read(path, assume_geometry="pixdim").spacing_mm, np.array([1, 2, 3]) * mm, rtol=1e-12
    )


@pytest.mark.parametrize("channels", [2, 3, 4, 7])
def test_of_several_channels_one_is_chosen(save, channels):
    stack = np.stack([DATA + 100 * n for n in range(channels)])  # the channel is the fastest axis
    path = save(stack.astype("<i2").tobytes("F"), ElementNumberOfChannels=str(channels))

    with pytest.raises(BadFile, match=f"{channels} volumes"):
        io.read(path)

    for index in range(channels):
        assert np.array_equal(io.read(path, volume_index=index).data, DATA + 100 * index)
        assert np.array_equal(io.read(path, volume_index=index).affine, RAS)


def test_channels_of_a_4d_file_are_refused(save):
    path = save(
        RAW * 4, NDims=4, DimSize="2 3 4 2", ElementSpacing="1 2 3 1", ElementNumberOfChannels="2"
    )

    with pytest.raises(BadFile, match="4 dimensions and 2 channels"):
        io.read(path, volume_index=0)


@pytest.mark.parametrize(
    "lines",
    [
        "0008|0060 = CT",
        "Some Name = x = y",
        "é.x-y: z = 1",
        "Note = first line\nsecond line\n\nthird: x",
        "A = 1\nA = 2",
        "Empty =",
    ],
)
def test_user_fields_may_have_any_name_and_text_of_several_lines(tmp_path, save, lines):
    path = save()
    path.write_bytes(path.read_bytes().replace(b"DimSize", f"{lines}\nDimSize".encode()))

    assert np.array_equal(io.read(path).data, DATA)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, DATA)


@pytest.mark.parametrize(
    "damage", [b"DimSize \x11 2 3 4", b"BinaryDataByteOrderMSB True", b"CompressedData"]
)
def test_a_damaged_field_after_a_users_is_not_taken_for_its_text(save, damage):
    path = save(BinaryDataByteOrderMSB=None, CompressedData=None)
    path.write_bytes(path.read_bytes().replace(b"DimSize", b"Note = x\n" + damage + b"\nDimSize"))

    with pytest.raises(BadFile, match="damaged"):
        io.read(path)


def test_metadata_of_simpleitk_does_not_stop_reading(tmp_path):
    image = sitk.GetImageFromArray(DATA.T)
    for name in ("0010|0020", "two words", "odd:name", "x.y"):
        image.SetMetaData(name, "text\nof two lines")
    sitk.WriteImage(image, str(tmp_path / "x.mha"))

    assert np.array_equal(io.read(tmp_path / "x.mha").data, DATA)
