"""NIfTI: odd headers are refused or read exactly, scaling and types are right."""

from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from making.notices import notices
from making.strategies import affines
from medseg import io
from medseg.errors import BadFile, BadOutput, DataWarning
from medseg.io.nifti import stored_sizes
from medseg.volume import Volume

AFFINE = np.array([[0, -2.0, 0, 10], [1.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
DATA = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


@pytest.fixture
def save(tmp_path):
    """Save a good NIfTI file whose header was changed: `save(offset=(struct code, values...),
    ...)`.
    """

    def save(data=DATA, *, affine=AFFINE, name="x.nii", kind=nib.Nifti1Image, order="<", **patches):
        image = kind(data, affine, dtype=data.dtype)
        if order == ">":
            image = kind(data, affine, image.header.as_byteswapped(">"), dtype=data.dtype)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        raw = bytearray(image.to_bytes())
        for place, (code, *values) in patches.items():
            struct.pack_into(order + code, raw, int(place.removeprefix("at")), *values)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return tmp_path / name

    return save


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_every_type_version_and_byte_order_is_read_exactly(save, kind, order, dtype):
    ends = np.iinfo(dtype) if dtype[0] in "ui" else np.finfo(dtype)
    data = np.array([ends.min, ends.max, 0, 1, 2, 3], dtype).reshape(1, 2, 3)

    volume = io.read(save(data, kind=kind, order=order))

    assert volume.data.dtype == np.dtype(dtype)
    assert volume.data.dtype.isnative
    assert np.array_equal(volume.data, data)
    assert np.array_equal(volume.affine, AFFINE)


SLOPE, DIM, PIXDIM, OFFSET, UNITS, QCODE = "at112", "at40", "at76", "at108", "at123", "at252"


@pytest.mark.parametrize(
    ("slope", "inter", "expected", "dtype"),
    [
        (1, 0, DATA, "i2"),
        (0, 7, DATA, "i2"),
        (np.nan, np.nan, DATA, "i2"),
        (1, -1024, DATA.astype(int) - 1024, "i2"),
        (-3, 2**20, DATA.astype(int) * -3 + 2**20, "i4"),
        (0.5, 0.25, (DATA.astype("f8") * 0.5 + 0.25), "f4"),
        (0.1, 0, (DATA.astype("f8") * float(np.float32(0.1))), "f4"),
    ],
)
def test_scaling_is_applied_and_whole_numbers_stay_exact(save, slope, inter, expected, dtype):
    volume = io.read(save(**{SLOPE: ("2f", slope, inter)}))

    assert volume.data.dtype == np.dtype(dtype)
    assert np.array_equal(volume.data, expected.astype(dtype))


@given(st.integers(-(2**15), 2**15), st.integers(-(2**23), 2**23))
@settings(max_examples=60, deadline=None)
def test_whole_number_scaling_equals_arithmetic_without_limits(tmp_path_factory, slope, inter):
    data = np.array([-(2**31), 2**31 - 1, -1, 0, 1, 12345], np.int32).reshape(1, 2, 3)
    path = tmp_path_factory.mktemp("x") / "x.nii"
    raw = bytearray(nib.Nifti1Image(data, np.eye(4)).to_bytes())
    struct.pack_into("<2f", raw, 112, slope, inter)
    path.write_bytes(raw)

    found = io.read(path).data

    factor, shift = (slope, inter) if slope else (1, 0)
    assert [int(value) for value in found.ravel()] == [
        int(value) * factor + shift for value in data.ravel()
    ]


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({SLOPE: ("2f", np.inf, 5)}, "scaling"),
        ({SLOPE: ("2f", np.nan, -1024)}, "scaling"),
        ({SLOPE: ("2f", 1, np.nan)}, "scaling"),
        ({SLOPE: ("2f", 2, np.inf)}, "scaling"),
        ({DIM: ("8h", 2, 3, 20, 1, 1, 1, 1, 1)}, "picture"),
        ({DIM: ("8h", 3, 3, 4, 0, 1, 1, 1, 1)}, "axis"),
        ({DIM: ("8h", 3, 3, -4, 5, 1, 1, 1, 1)}, "axis"),
        ({DIM: ("8h", 0, 3, 4, 5, 1, 1, 1, 1)}, "dimensions"),
        ({DIM: ("8h", 8, 3, 4, 5, 1, 1, 1, 1)}, "dimensions"),
        ({DIM: ("8h", 3, 3, 4, 4, 1, 1, 1, 1)}, "more data"),
        ({DIM: ("8h", 3, 3, 4, 6, 1, 1, 1, 1)}, "too short"),
        ({DIM: ("8h", 5, 1, 4, 5, 1, 3, 1, 1)}, "per voxel"),
        ({DIM: ("8h", 4, 3, 4, 0, 0, 1, 1, 1)}, "axis"),
        ({DIM: ("8h", 4, 3, 4, 2, 0, 1, 1, 1)}, "more data"),
        ({DIM: ("8h", 5, 3, 4, 5, 0, 2, 1, 1)}, "per voxel"),
        ({"at70": ("h", 128)}, "colour"),
        ({"at70": ("h", 2304)}, "colour"),
        ({"at70": ("h", 32)}, "complex"),
        ({"at70": ("h", 1536)}, "type"),
        ({"at70": ("h", 512), "at72": ("h", 8)}, "contradicts"),
        ({"at70": ("h", 2), "at72": ("h", 0)}, "more data"),
        ({"at70": ("h", 16), "at72": ("h", 0)}, "too short"),
        ({OFFSET: ("f", 1e9)}, "too short"),
        ({OFFSET: ("f", -100)}, "impossible"),
        ({OFFSET: ("f", np.nan)}, "impossible"),
        ({OFFSET: ("f", np.inf)}, "impossible"),
        ({OFFSET: ("f", 352.5)}, "impossible"),
        ({OFFSET: ("f", 0)}, "impossible"),
        ({QCODE: ("2h", 0, 0)}, "assume-geometry"),
        ({QCODE: ("2h", 7, 1)}, "assume-geometry"),
        ({QCODE: ("2h", -1, 1)}, "assume-geometry"),
        ({PIXDIM: ("4f", 1, 1, 1, 1)}, "assume-geometry"),  # sform says 1 x 2 x 3
        ({PIXDIM: ("4f", 1, 1, 1, 1), QCODE: ("2h", 0, 1)}, "assume-geometry"),
        ({PIXDIM: ("4f", 1, np.nan, 2, 3)}, "assume-geometry"),
        ({PIXDIM: ("4f", 1, 0, 2, 3)}, "assume-geometry"),
        ({"at268": ("3f", 11, -20, 5)}, "assume-geometry"),  # qform shifted by 1 mm
        ({"at268": ("3f", -10, -20, 5)}, "assume-geometry"),  # qform mirrored in x
        ({PIXDIM: ("f", -1)}, "assume-geometry"),  # handedness
        ({PIXDIM: ("f", 0.5)}, "assume-geometry"),
        ({"at256": ("3f", 1, 1, 1)}, "assume-geometry"),
        ({"at280": ("4f", 0, -2, np.nan, 10), QCODE: ("2h", 0, 1)}, "assume-geometry|finite"),
        ({"at280": ("4f", 0, -2, 0, np.inf), QCODE: ("2h", 0, 1)}, "finite"),
        (
            {
                "at280": ("8f", 1, -2, 0, 0, 1, 2, 0, 0),
                QCODE: ("2h", 0, 1),
                PIXDIM: ("4f", 1, 2**0.5, 8**0.5, 3),
            },
            None,
        ),
        ({"at280": ("8f", 1, 1.2, 0, 0, 0, 1.6, 0, 0), QCODE: ("2h", 0, 1)}, "sheared"),
        ({"at280": ("12f", *[0] * 12), QCODE: ("2h", 0, 1)}, "assume-geometry|spacing"),
        ({UNITS: ("B", 5)}, "unit"),
        ({"at344": ("4s", b"ni1\0")}, "pair"),
        ({"at344": ("4s", b"xxxx")}, "not a NIfTI"),
        ({"at0": ("i", 349)}, "not a NIfTI"),
    ],
)
def test_an_odd_header_is_refused_with_the_reason(save, patches, reason):
    path = save(**patches)
    if reason is None:
        assert io.read(path).shape == DATA.shape
        return

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("assumed", "expected"),
    [("sform", AFFINE), ("qform", np.diag([2.0, 1, 3, 1])), ("pixdim", np.diag([2.0, 1, 3, 1]))],
)
def test_assumed_geometry_settles_a_contradiction_with_a_warning(save, assumed, expected):
    path = save(**{"at256": ("6f", 0, 0, 0, 0, 0, 0), PIXDIM: ("4f", 1, 2, 1, 3)})
    with pytest.raises(BadFile, match="assume-geometry"):
        io.read(path)

    with pytest.warns(DataWarning, match=assumed):
        volume = io.read(path, assume_geometry=assumed)

    assert np.allclose(volume.affine, expected)


def test_an_unknown_assumption_is_refused(save):
    with pytest.raises(BadFile, match="sform, qform or pixdim"):
        io.read(save(), assume_geometry="magic")


@given(affine=affines())
@settings(max_examples=100, deadline=None)
def test_any_scanner_geometry_agrees_with_its_own_qform(tmp_path_factory, affine):
    path = tmp_path_factory.mktemp("x") / "x.nii"
    image = nib.Nifti1Image(np.zeros((200, 180, 3), np.uint8), affine)
    image.set_qform(affine, 1)
    nib.save(image, path)

    assert np.array_equal(io.read(path).affine, nib.load(path).affine)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1)])
def test_lengths_become_mm(save, unit, factor):
    affine = AFFINE.copy()
    affine[:3] /= factor

    volume = io.read(save(affine=affine, **{UNITS: ("B", unit)}))

    assert np.allclose(volume.affine, AFFINE, rtol=1e-6)


def test_extensions_are_passed_over(tmp_path):
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", b"some long secret comment")
    )
    nib.save(image, tmp_path / "x.nii.gz")

    volume = io.read(tmp_path / "x.nii.gz")

    assert np.array_equal(volume.data, DATA)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_of_several_volumes_one_is_chosen(save, name):
    data = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 6)).astype(np.uint8)
    path = save(data, name=name)

    with pytest.raises(BadFile, match=r"6 volumes.*--volume"):
        io.read(path)
    with pytest.raises(BadFile, match="no volume 6"):
        io.read(path, volume_index=6)
    with pytest.raises(BadFile, match="no volume -1"):
        io.read(path, volume_index=-1)
    for index in range(6):
        assert np.array_equal(io.read(path, volume_index=index).data, data[..., index])


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 4, 5, 1, 1), (3, 4, 1), (1, 1, 5), (1, 1, 1)])
def test_axes_of_one_are_no_problem(save, shape):
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)

    assert np.array_equal(io.read(save(data)).data, data.reshape(shape[:3]))


@pytest.mark.parametrize(
    "patches",
    [
        {DIM: ("8h", 4, 3, 4, 5, 0, 1, 1, 1)},
        {DIM: ("8h", 4, 3, 4, 5, -1, 7, 7, 7)},
        {DIM: ("8h", 7, 3, 4, 5, 0, 0, 0, 0)},
        {DIM: ("8h", 5, 3, 4, 5, 1, -32768, 1, 1)},
        {SLOPE: ("2f", np.nan, 0)},
        {SLOPE: ("2f", np.inf, 0)},
        {SLOPE: ("2f", -np.inf, np.nan)},
        {SLOPE: ("2f", np.inf, np.inf)},
        {"at72": ("h", 0)},
        {"at72": ("h", 0), DIM: ("8h", 4, 3, 4, 5, 0, 1, 1, 1), SLOPE: ("2f", np.nan, 0)},
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_fields_that_the_reference_library_mends_are_read_with_a_warning(save, patches, order):
    path = save(order=order, **patches)

    with pytest.warns(DataWarning) as caught:
        volume = io.read(path)

    assert len(notices(caught)) == len(patches)
    assert all(sentence.startswith(f"{path}: ") for sentence in notices(caught))
    assert np.array_equal(volume.data, DATA)
    assert volume.data.dtype == DATA.dtype
    assert np.array_equal(volume.affine, AFFINE)


def test_mended_sizes_are_those_that_are_told(save):
    assert stored_sizes(save(**{DIM: ("8h", 5, 3, 4, 5, 0, -2, 1, 1)})) == (3, 4, 5, 1, 1)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("data", [DATA, np.stack([DATA, DATA + 100], 3)], ids=["3-D", "4-D"])
def test_a_nii_gz_that_is_not_gzipped_is_read_as_it_is_with_a_warning(save, kind, data):
    path = save(data, kind=kind)
    path = path.rename(path.with_name("x.nii.gz"))

    with pytest.warns(DataWarning, match=r"x\.nii\.gz: it is not gzipped"):
        volume = io.read(path, volume_index=0)

    assert np.array_equal(volume.data, DATA)
    assert stored_sizes(path) == data.shape
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadFile, match="too short"):
        io.read(path, volume_index=0)


PAIRS = ["x.hdr", "x.img", "x.hdr.gz", "x.img.gz"]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_pair_is_read_by_either_of_its_names(tmp_path, name, kind, order):
    image = kind(DATA, AFFINE)
    if order == ">":
        image = kind(DATA, AFFINE, image.header.as_byteswapped(">"))
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", b"some long secret comment")
    )
    image.set_sform(AFFINE, 4)
    nib.save(image, tmp_path / name)

    for path in tmp_path.iterdir():
        volume = io.read(path)
        assert np.array_equal(volume.data, DATA)
        assert np.array_equal(volume.affine, AFFINE)
        assert volume.space.sform_code == 4
        assert io.strip_suffix(path) == "x"
        assert io.is_readable_name(path) == (".hdr" in path.name)  # a pair is one scan in a folder


def pair(folder, data=DATA, name="x.hdr", **patches):
    nib.save(nib.Nifti1Pair(data, AFFINE), folder / name)
    raw = bytearray((folder / name).read_bytes())
    for place, (code, *values) in patches.items():
        struct.pack_into("<" + code, raw, int(place.removeprefix("at")), *values)
    (folder / name).write_bytes(raw)
    return folder / name


def test_a_pair_may_be_packed_in_one_file_only(tmp_path):
    path = pair(tmp_path)
    voxels = tmp_path / "x.img"
    (tmp_path / "x.img.gz").write_bytes(gzip.compress(voxels.read_bytes()))
    with pytest.raises(BadFile, match=r"both x\.img and x\.img\.gz"):
        io.read(path)

    voxels.unlink()

    assert np.array_equal(io.read(path).data, DATA)


def test_of_a_pair_with_several_volumes_one_is_chosen_and_capitals_stay_capitals(tmp_path):
    path = pair(tmp_path, np.stack([DATA, DATA + 100, DATA + 200], 3))
    (tmp_path / "x.img").rename(tmp_path / "X.IMG")
    path = path.rename(tmp_path / "X.HDR")

    with pytest.raises(BadFile, match="3 volumes"):
        io.read(path)

    assert np.array_equal(io.read(path, volume_index=2).data, DATA + 200)


@pytest.mark.parametrize("offset", [16, 512, 17])
def test_the_voxels_of_a_pair_may_begin_later_in_their_file(tmp_path, offset):
    path = pair(tmp_path, **{OFFSET: ("f", offset)})
    (tmp_path / "x.img").write_bytes(b"?" * offset + DATA.tobytes("F"))

    assert np.array_equal(io.read(path).data, DATA)


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({OFFSET: ("f", -16)}, "impossible"),
        ({OFFSET: ("f", 1)}, "too short"),
        ({DIM: ("8h", 3, 3, 4, 6, 1, 1, 1, 1)}, "too short"),
        ({DIM: ("8h", 3, 3, 4, 4, 1, 1, 1, 1)}, "more data"),
        ({"at344": ("4s", b"n+1\0")}, r"name it \.nii"),
        ({"at344": ("4s", b"xxxx")}, "Analyze"),
        ({"at0": ("i", 340)}, "not a NIfTI"),
        ({QCODE: ("2h", 0, 0)}, "assume-geometry"),
    ],
)
def test_an_odd_pair_is_refused_with_the_reason(tmp_path, patches, reason):
    path = pair(tmp_path, **patches)

    for one in (path, tmp_path / "x.img"):
        with pytest.raises(BadFile, match=reason) as caught:
            io.read(one)
        assert str(caught.value).startswith(f"{one}: ")


def test_half_a_pair_and_analyze_files_are_refused(tmp_path):
    path = pair(tmp_path)
    (tmp_path / "x.img").unlink()
    with pytest.raises(BadFile, match=r"x\.img is missing"):
        io.read(path)
    with pytest.raises(BadFile, match="no such file"):
        io.read(tmp_path / "x.img")
    nib.save(nib.AnalyzeImage(DATA, np.eye(4)), tmp_path / "old.img")
    for name in ("old.img", "old.hdr"):
        with pytest.raises(BadFile, match="does not say which side of it is left"):
            io.read(tmp_path / name)
    path.write_bytes(path.read_bytes()[:347])
    (tmp_path / "x.img").write_bytes(DATA.tobytes())
    with pytest.raises(BadFile, match="too short"):
        io.read(path)


def test_the_header_of_a_pair_under_another_name_says_what_to_do_and_that_works(save, tmp_path):
    path = save(**{"at344": ("4s", b"ni1\0"), OFFSET: ("f", 0)})
    with pytest.raises(BadFile, match=r"name it \.hdr, with the voxels beside it as \.img"):
        io.read(path)

    content = path.read_bytes()
    (tmp_path / "x.hdr").write_bytes(content[:352])
    (tmp_path / "x.img").write_bytes(content[352:])

    assert np.array_equal(io.read(tmp_path / "x.hdr").data, DATA)


def test_a_dicom_file_called_img_is_no_half_of_a_pair(tmp_path):
    (tmp_path / "x.img").write_bytes(bytes(128) + b"DICM" + bytes(60))

    assert io.is_dicom_source(tmp_path / "x.img")


@pytest.mark.parametrize(
    "name",
    ["dim4_is_0.nii", "slope_nan_intercept_0.nii", "slope_inf_intercept_0.nii", "bitpix_0.nii"],
)
def test_the_scans_with_one_empty_field_hold_what_is_expected(shared_data, name):
    folder = shared_data / "cases/files/nifti-fields-the-library-mends"

    with pytest.warns(DataWarning, match=name):
        volume = io.read(folder / name)

    expected = nib.load(folder / "expected.nii.gz")
    assert np.array_equal(volume.data, np.asanyarray(expected.dataobj))
    assert np.array_equal(volume.affine, expected.affine)


def test_the_scan_that_is_not_gzipped_holds_what_is_expected(shared_data):
    folder = shared_data / "cases/files/nii-gz-not-gzipped"

    with pytest.warns(DataWarning, match="not gzipped"):
        volume = io.read(folder / "scan.nii.gz")

    expected = nib.load(folder / "expected.nii.gz")
    assert np.array_equal(volume.data, np.asanyarray(expected.dataobj))
    assert np.array_equal(volume.affine, expected.affine)


def test_text_under_the_name_of_a_scan_is_refused(tmp_path):
    for name in ("x.nii", "x.nii.gz"):
        (tmp_path / name).write_text("this is only text, but long enough to be a header " * 20)
        with pytest.raises(BadFile, match=name):
            io.read(tmp_path / name)


def test_a_wrong_gz_suffix_is_named(save, tmp_path):
    packed = save(name="x.nii.gz").read_bytes()
    (tmp_path / "y.nii").write_bytes(packed + bytes(400))

    with pytest.raises(BadFile, match=r"name it \.nii\.gz"):
        io.read(tmp_path / "y.nii")


def test_long_axes_are_written_as_nifti_2(tmp_path):
    volume = Volume(np.arange(40000, dtype=np.uint16).reshape(40000, 1, 1), AFFINE)

    io.write(volume, tmp_path / "x.nii.gz")

    assert isinstance(nib.load(tmp_path / "x.nii.gz"), nib.Nifti2Image)
    assert np.array_equal(np.asanyarray(nib.load(tmp_path / "x.nii.gz").dataobj), volume.data)
    assert np.array_equal(io.read(tmp_path / "x.nii.gz").data, volume.data)


def test_header_text_of_the_input_never_reaches_the_output(save, tmp_path):
    path = save(
        **{
            "at148": ("80s", b"SECRET NAME"),
            "at228": ("24s", b"SECRET FILE"),
            "at328": ("16s", b"SECRET"),
        }
    )

    io.write(io.read(path), tmp_path / "out.nii")

    assert b"SECRET" in path.read_bytes()
    assert b"SECRET" not in (tmp_path / "out.nii").read_bytes()


def test_what_nifti_cannot_hold_is_refused(tmp_path):
    with pytest.raises(BadOutput, match="complex"):
        io.write(Volume(np.zeros((2, 2, 2), complex), np.eye(4)), tmp_path / "x.nii.gz")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given_dtype", "kept"), [(bool, "u1"), (np.float16, "f4"), (">i2", "i2"), ("i8", "i8")]
)
def test_types_nifti_lacks_are_widened(tmp_path, given_dtype, kept):
    data = np.array([0, 1, 1, 0, 1, 1, 0, 1]).reshape(2, 2, 2).astype(given_dtype)

    io.write(Volume(data, np.eye(4)), tmp_path / "x.nii")

    assert io.read(tmp_path / "x.nii").data.dtype == np.dtype(kept)
    assert np.array_equal(io.read(tmp_path / "x.nii").data, data)


def test_real_scans_and_label_maps_are_what_nibabel_reads(shared_data):
    scans = sorted((shared_data / "hippocampus").rglob("*.nii.gz"))[::25]
    assert scans

    for path in scans:
        image = nib.load(path)
        volume = io.read(path)
        assert np.array_equal(volume.data, np.asanyarray(image.dataobj))
        assert np.array_equal(volume.affine, image.affine)
