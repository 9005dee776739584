"""NRRD: odd headers are refused or read exactly."""

from __future__ import annotations

import bz2
import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from medseg import io
from medseg.errors import BadFile
from medseg.io.nrrd import parse_header

DATA = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
RAW = DATA.astype("<i2").tobytes("F")
FIELDS = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "2 3 4",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(10,20,30)",
}
RAS = np.array([[-1.0, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


@pytest.fixture
def save(tmp_path):
    """Save a NRRD file with fields changed, or left out where None."""

    def save(data=RAW, *, magic="NRRD0004", newline="\n", extra="", name="x.nrrd", **changed):
        fields = {**FIELDS, **{field.replace("_", " "): value for field, value in changed.items()}}
        given = (f"{field}: {value}" for field, value in fields.items() if value is not None)
        lines = [magic, *given, *extra.split("|")]
        header = newline.join(line for line in lines if line)
        (tmp_path / name).write_bytes((header + newline * 2).encode() + data)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    ("space", "flips"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("ras", (1, 1, 1)),
        ("Left-Anterior-Superior", (-1, 1, 1)),
        ("LAS", (-1, 1, 1)),
    ],
)
def test_each_space_becomes_ras(save, space, flips):
    expected = np.diag([*flips, 1.0]) @ np.array(
        [[1.0, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]
    )

    volume = io.read(save(space=space))

    assert np.array_equal(volume.affine, expected)
    assert np.array_equal(volume.data, DATA)


def test_big_endian_gzip_crlf_comments_and_keys_are_read(save):
    packed = gzip.compress(DATA.astype(">i2").tobytes("F"))

    volume = io.read(
        save(
            packed,
            endian="big",
            encoding="gz",
            newline="\r\n",
            extra="# comment|key:=a: value := x",
        )
    )

    assert np.array_equal(volume.data, DATA)
    assert volume.data.dtype.isnative
    assert np.array_equal(volume.affine, RAS)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_list_axis_is_dropped_or_chosen_from(save, first, count):
    stack = np.stack([DATA + 100 * n for n in range(count)], axis=0 if first else 3)
    vectors = (
        ["none", FIELDS["space directions"]] if first else [FIELDS["space directions"], "none"]
    )
    sizes = f"{count} 2 3 4" if first else f"2 3 4 {count}"
    kinds = "list domain domain domain" if first else "domain domain domain list"
    path = save(
        stack.astype("<i2").tobytes("F"),
        dimension=4,
        sizes=sizes,
        kinds=kinds,
        space_directions=" ".join(vectors),
    )

    if count > 1:
        with pytest.raises(BadFile, match="--volume"):
            io.read(path)

    assert np.array_equal(io.read(path, volume_index=count - 1).data, DATA + 100 * (count - 1))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"magic": "NRRD0009"}, "not a NRRD"),
        ({"sizes": "2 3"}, "dimensions"),
        ({"dimension": 2, "sizes": "6 4", "space_directions": "(1,0,0) (0,2,0)"}, "picture"),
        ({"sizes": "2 3 0"}, "axis"),
        ({"sizes": "2 3 -4"}, "axis"),
        ({"sizes": "2 3 x"}, "numbers"),
        ({"sizes": "2 3 5"}, "too short"),
        ({"sizes": "2 3 3"}, "more data"),
        ({"sizes": None}, "sizes"),
        ({"type": None}, "type"),
        ({"type": "block"}, "type"),
        ({"endian": None}, "endian"),
        ({"endian": "middle"}, "byte order"),
        ({"encoding": "txt"}, "encoding"),
        ({"encoding": "bzip2"}, "encoding"),
        ({"space": None}, "space"),
        ({"space": "scanner-xyz"}, "space"),
        ({"space": "left-posterior-superior-time"}, "space"),
        ({"space_directions": None}, "space"),
        ({"space_directions": "(1,0,0) (0,2,0)"}, "three axes"),
        ({"space_directions": "(1,0,0) (0,2,0) none"}, "three axes"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0)"}, "numbers"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,z)"}, "numbers"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,nan)"}, "finite"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,1,3)"}, "shear"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,2,0)"}, "shear"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,0)"}, "spacing"),
        ({"space_directions": "1 2 3"}, "vectors"),
        ({"space_origin": None}, "origin"),
        ({"space_origin": "(1,2)"}, "numbers"),
        ({"space_origin": "(1,2,inf)"}, "finite"),
        ({"space_units": '"inch" "inch" "inch"'}, "'inch', which is no unit"),
        ({"space_units": '"Mm" "Mm" "Mm"'}, "'Mm', which is no unit"),
        ({"space_units": '"mm" "mm"'}, "one unit for each of 3"),
        ({"space_units": "um"}, "one unit for each of 3"),
        ({"space_units": '"um" "" "um"'}, "some of its axes only"),
        ({"space_units": '"m" "m" "m"'}, "spacing"),  # voxels of 1 x 2 x 3 m
        ({"space_units": '"nm" "nm" "nm"'}, "spacing"),
        ({"extra": "sizes: 2 3 4"}, "twice"),
        ({"extra": "no colon here"}, "not NRRD"),
    ],
)
def test_an_odd_header_is_refused_with_the_reason(save, changed, reason):
    path = save(**changed)

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(str(path))


def test_colour_is_refused(save):
    data = np.zeros((3, 2, 3, 4), np.uint8).tobytes()
    vectors = "none (1,0,0) (0,2,0) (0,0,3)"

    path = save(data, type="uchar", dimension=4, sizes="3 2 3 4",
    kinds="RGB-color domain domain domain",
                space_directions=vectors)  # fmt: skip

    with pytest.raises(BadFile, match="colour"):
        io.read(path)


def test_spacings_alone_are_enough_only_when_told(save):
    path = save(space=None, space_directions=None, space_origin=None, extra="spacings: 1 2 3")
    with pytest.raises(BadFile, match="assume-geometry"):
        io.read(path)

    assert np.array_equal(io.read(path, assume_geometry="pixdim").affine, np.diag([1.0, 2, 3, 1]))


UNITS = {
    1e-3: [
        "um",
        "µm",
        "μm",
        "micron",
        "microns",
        "Micrometer",
        "micrometers",
        "micrometre",
        "MICROMETRES",
    ],
    1.0: ["mm", "millimeter", "millimeters", "Millimetre", "millimetres", "", "???"],
    10.0: ["cm", "centimeter", "centimetres"],
}


@pytest.mark.parametrize(
    ("mm", "unit"), [(mm, unit) for mm, units in UNITS.items() for unit in units]
)
def test_lengths_of_every_unit_become_mm(save, mm, unit):
    path = save(space_units=" ".join([f'"{unit}"'] * 3))

    assert np.allclose(io.read(path).affine, np.diag([mm, mm, mm, 1]) @ RAS, rtol=1e-12)
    assert np.allclose(
        io.read(path, assume_geometry="pixdim").spacing_mm, np.array([1, 2, 3]) * mm, rtol=1e-12
    )


def test_units_that_differ_are_those_of_the_axes_of_space_and_not_of_the_file(save):
    path = save(space_directions="(0,1,0) (0,0,2) (3,0,0)", space_units='"um" "mm" "cm"')

    affine = io.read(path).affine

    # i runs along y, in mm; j along z, in cm; k along x, in micrometres.
    expected = [[0, 0, -0.003, -0.01], [-1, 0, 0, -20], [0, 20, 0, 300], [0, 0, 0, 1]]
    assert np.allclose(affine, expected, rtol=1e-12)


@pytest.mark.parametrize("units", ['"mm" "" "mm"', '"millimetres" "mm" "Millimeter"', "um um um"])
def test_other_ways_to_name_units_are_understood(save, units):
    mm = 1e-3 if "um" in units else 1

    assert np.allclose(io.read(save(space_units=units)).affine, np.diag([mm, mm, mm, 1]) @ RAS)


def test_the_micro_sign_of_latin_1_is_understood(save):
    path = save(space_units='"\xb5m" "\xb5m" "\xb5m"')
    path.write_bytes(path.read_bytes().replace("µ".encode(), b"\xb5"))

    assert np.allclose(io.read(path).spacing_mm, (1e-3, 2e-3, 3e-3))


@pytest.mark.parametrize(
    ("extra", "mm"),
    [
        ("", 1),
        ('units: "um" "um" "um"', 1e-3),
        ('units: "cm" "cm" "cm"', 10),
        ('space units: "um" "um" "um"', 1e-3),
        ('units: "" "" ""', 1),
    ],
)
def test_spacings_alone_are_in_their_units(save, extra, mm):
    path = save(
        space=None, space_directions=None, space_origin=None, extra=f"spacings: 1 2 3|{extra}"
    )

    assert np.allclose(
        io.read(path, assume_geometry="pixdim").affine, np.diag([mm, 2 * mm, 3 * mm, 1])
    )


def test_units_of_spacings_that_are_not_certain_are_refused(save):
    for extra in (
        'units: "um" "um" "parsec"',
        'units: "um" "um" ""',
        'space units: "um" "mm" "um"',
    ):
        path = save(
            space=None, space_directions=None, space_origin=None, extra=f"spacings: 1 2 3|{extra}"
        )
        with pytest.raises(BadFile, match="unit"):
            io.read(path, assume_geometry="pixdim")


UNPLACED = [
    {"space": None},
    {"space": "scanner-xyz"},
    {"space_origin": None},
    {"space_directions": None},
    {"space_directions": None, "extra": "spacings: 1 2 3"},
    {"space": None, "space_directions": None, "space_origin": None},
    {"space": None, "space_directions": None, "space_origin": None, "extra": "spacings: 1 2 3"},
    {"space": None, "space_directions": None, "space_origin": None, "extra": "spacings: 1 2 nan"},
    {"space": None, "space_directions": None, "space_origin": None, "extra": "spacings: 1 2 0"},
    {"space": None, "space_units": '"foot" "foot" "foot"'},
    {"space": None, "space_directions": "(1,0,0) (0,2,0) (0,0,1e9)"},
    {"space": None, "dimension": 4, "sizes": "2 3 4 1", "kinds": None,
     "space_directions": "(1,0,0) (0,2,0) (0,0,3) none"},
    {"space": None, "dimension": 4, "sizes": "2 3 4 1", "kinds": None, "space_directions": None,
     "extra": "spacings: 1 2 3 1"},
    {"space": None, "dimension": 4, "sizes": "2 3 4 1", "kinds": "domain domain domain list",
     "space_directions": None, "extra": "spacings: 1 2 3 1"},
    {"space": None, "dimension": 4, "sizes": "1 2 3 4", "kinds": None, "space_directions": None,
     "extra": "spacings: nan 1 2 3"},
]  # fmt: skip


@pytest.mark.parametrize("changed", UNPLACED)
def test_where_an_option_is_advised_it_works(save, changed):
    path = save(**changed)
    with pytest.raises(BadFile) as caught:
        io.read(path)

    if "--assume-geometry pixdim" in str(caught.value):
        volume = io.read(path, assume_geometry="pixdim")
        assert np.allclose(volume.affine, np.diag([1, 2, 3, 1]))
        assert np.array_equal(volume.data, DATA)
    else:
        assert "correct the header" in str(caught.value)
        with pytest.raises(BadFile):
            io.read(path, assume_geometry="pixdim")


def test_the_option_is_advised_for_most_of_them(save):
    advised = 0
    for changed in UNPLACED:
        with pytest.raises(BadFile) as caught:
            io.read(save(**changed))
        advised += "--assume-geometry" in str(caught.value)
    assert advised == 8


@pytest.mark.parametrize("kind", ["vector", "list", "???", "none", "time"])
@pytest.mark.parametrize("first", [True, False])
def test_an_axis_of_channels_is_chosen_from_whatever_its_kind(save, kind, first):
    stack = np.stack([DATA, DATA + 100, DATA + 200], axis=0 if first else 3)
    vectors = (
        ["none", FIELDS["space directions"]] if first else [FIELDS["space directions"], "none"]
    )
    kinds = [kind, "domain domain domain"] if first else ["domain domain domain", kind]
    path = save(stack.astype("<i2").tobytes("F"), dimension=4,
    sizes="3 2 3 4" if first else "2 3 4 3",
                kinds=" ".join(kinds), space_directions=" ".join(vectors))  # fmt: skip

    with pytest.raises(BadFile, match="3 volumes"):
        io.read(path)

    assert np.array_equal(io.read(path, volume_index=2).data, DATA + 200)


@pytest.mark.parametrize(
    "kind", ["RGB-color", "RGBA-color", "3-color", "XYZ-color", "3-vector", "complex"]
)
def test_values_of_one_voxel_stay_refused(save, kind):
    data = np.zeros((3, 2, 3, 4), np.uint8).tobytes()

    with pytest.raises(BadFile, match="colour or vectors"):
        io.read(save(data, type="uchar", dimension=4, sizes="3 2 3 4",
        kinds=f"{kind} domain domain domain",
                     space_directions="none (1,0,0) (0,2,0) (0,0,3)"))  # fmt: skip


FOUR = {
    "dimension": 4,
    "sizes": "2 3 4 3",
    "space_directions": "(1,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,0.5)",
    "space_origin": "(10,20,30,7)",
    "kinds": "domain domain domain domain",
}
STACK = np.stack([DATA, DATA + 100, DATA + 200], axis=3).astype("<i2").tobytes("F")


@pytest.mark.parametrize(
    ("space", "flips"),
    [
        ("left-posterior-superior-time", (-1, -1, 1)),
        ("LPST", (-1, -1, 1)),
        ("right-anterior-superior-time", (1, 1, 1)),
        ("last", (-1, 1, 1)),
        (None, (-1, -1, 1)),  # as ITK writes four axes
    ],
)
def test_time_as_a_fourth_axis_of_space_lists_volumes(save, space, flips):
    path = save(STACK, space=space, extra="" if space else "space dimension: 4", **FOUR)

    volume = io.read(path, volume_index=1)

    assert np.array_equal(volume.data, DATA + 100)
    assert np.array_equal(
        volume.affine,
        np.diag([*flips, 1]) @ [[1, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]],
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"space_directions": "(1,0,0,0) (0,2,0,0) (0,0,3,1) (0,0,0,0.5)"}, "mixed with space"),
        ({"space_directions": "(1,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,1,0.5)"}, "mixed with space"),
        ({"space_directions": "(1,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,0)"}, "mixed with space"),
        ({"space_directions": "(1,0,0) (0,2,0) (0,0,3) none"}, "4 numbers"),
        ({"space_origin": "(10,20,30)"}, "4 numbers"),
        ({"space": None}, "in which space"),
        (
            {"space": None, "extra": "space dimension: 4", "kinds": "domain domain domain time"},
            "in which space",
        ),
        ({"space": None, "extra": "space dimension: 4", "kinds": None}, "in which space"),
        ({"space": None, "extra": "space dimension: 3"}, "in which space"),
    ],
)
def test_four_axes_that_are_not_certain_are_refused(save, changed, reason):
    with pytest.raises(BadFile, match=reason):
        io.read(save(STACK, **{**FOUR, "space": "LPST", **changed}), volume_index=0)


def itk_series():
    images = [sitk.GetImageFromArray((DATA + 100 * n).T) for n in range(3)]
    for image in images:
        image.SetSpacing((1, 2, 3))
        image.SetOrigin((10, 20, 30))
        image.SetDirection((0, 1, 0, 0, 0, 1, 1, 0, 0))
    return images


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("join", [sitk.Compose, sitk.JoinSeries], ids=["channels", "4-D"])
@pytest.mark.parametrize("compressed", [True, False])
def test_several_volumes_are_read_in_both_ways_in_which_itk_writes_them(
    tmp_path, suffix, join, compressed
):
    images = itk_series()
    path = tmp_path / f"x{suffix}"
    sitk.WriteImage(join(images), str(path), useCompression=compressed)
    sitk.WriteImage(images[1], str(tmp_path / "one.mha"))

    with pytest.raises(BadFile, match="3 volumes"):
        io.read(path)
    volume = io.read(path, volume_index=1)

    assert np.array_equal(volume.data, DATA + 100)
    assert np.array_equal(volume.affine, io.read(tmp_path / "one.mha").affine)


def test_user_fields_may_have_any_name(save):
    keys = {
        "a:b": "1",
        "a:c": "2",
        "sizes": "3",
        "0008,0060": "CT",
        "x:space": "5",
        "é x": "7 := 8",
    }

    path = save(extra="|".join(f"{name}:={value}" for name, value in keys.items()))

    assert parse_header(path).keys == keys
    assert np.array_equal(io.read(path).data, DATA)
    assert {name: sitk.ReadImage(str(path)).GetMetaData(name) for name in ("a:b", "sizes")} == {
        "a:b": "1",
        "sizes": "3",
    }


@pytest.mark.parametrize("name", ["um.nrrd", "microns.nrrd", "micro_sign.nrrd"])
@pytest.mark.parametrize("assumed", [None, "pixdim"])
def test_the_micro_ct_is_read_in_mm(shared_data, name, assumed):
    folder = shared_data / "cases/files/nrrd-microns"
    expected = nib.load(folder / "expected.nii.gz")

    volume = io.read(folder / name, assume_geometry=assumed)

    assert np.array_equal(volume.data, np.asanyarray(expected.dataobj))
    assert np.allclose(volume.spacing_mm, (0.035, 0.035, 0.07))
    if assumed is None:
        assert np.allclose(volume.affine, expected.affine, atol=1e-6)


def test_an_endless_header_is_refused(tmp_path):
    (tmp_path / "x.nrrd").write_bytes(b"NRRD0004\n" + b"# comment\n" * 500_000)

    with pytest.raises(BadFile, match="does not end"):
        io.read(tmp_path / "x.nrrd")


def test_a_bz2_stream_called_gzip_is_refused(save):
    with pytest.raises(BadFile, match="gzip"):
        io.read(save(bz2.compress(RAW), encoding="gzip"))
