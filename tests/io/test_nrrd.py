"""NRRD: odd headers are refused or read exactly."""

from __future__ import annotations

import bz2
import gzip

import numpy as np
import pytest

from medseg import io
from medseg.errors import BadFile

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
    expected = np.diag([*flips, 1.0]) @ np.array([[1.0, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])

    volume = io.read(save(space=space))

    assert np.array_equal(volume.affine, expected)
    assert np.array_equal(volume.data, DATA)


def test_big_endian_gzip_crlf_comments_and_keys_are_read(save):
    packed = gzip.compress(DATA.astype(">i2").tobytes("F"))

    volume = io.read(save(packed, endian="big", encoding="gz", newline="\r\n", extra="# comment|key:=a: value := x"))

    assert np.array_equal(volume.data, DATA)
    assert volume.data.dtype.isnative
    assert np.array_equal(volume.affine, RAS)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_list_axis_is_dropped_or_chosen_from(save, first, count):
    stack = np.stack([DATA + 100 * n for n in range(count)], axis=0 if first else 3)
    vectors = ["none", FIELDS["space directions"]] if first else [FIELDS["space directions"], "none"]
    sizes = f"{count} 2 3 4" if first else f"2 3 4 {count}"
    kinds = "list domain domain domain" if first else "domain domain domain list"
    path = save(
        stack.astype("<i2").tobytes("F"), dimension=4, sizes=sizes, kinds=kinds, space_directions=" ".join(vectors)
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
        ({"space_units": '"m" "m" "m"'}, "mm"),
        ({"byte_skip": "2"}, "skip"),
        ({"line_skip": "1"}, "skip"),
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

    path = save(data, type="uchar", dimension=4, sizes="3 2 3 4", kinds="RGB-color domain domain domain",
                space_directions=vectors)  # fmt: skip

    with pytest.raises(BadFile, match="colour"):
        io.read(path)


def test_spacings_alone_are_enough_only_when_told(save):
    path = save(space=None, space_directions=None, space_origin=None, extra="spacings: 1 2 3")
    with pytest.raises(BadFile, match="assume-geometry"):
        io.read(path)

    assert np.array_equal(io.read(path, assume_geometry="pixdim").affine, np.diag([1.0, 2, 3, 1]))


@pytest.mark.parametrize("name", ["LIST", "LIST 2", "slice%03d.raw 1 4 1"])
def test_data_in_many_files_is_refused(save, name):
    with pytest.raises(BadFile, match="several files"):
        io.read(save(data_file=name))


def test_an_endless_header_is_refused(tmp_path):
    (tmp_path / "x.nrrd").write_bytes(b"NRRD0004\n" + b"# comment\n" * 500_000)

    with pytest.raises(BadFile, match="does not end"):
        io.read(tmp_path / "x.nrrd")


def test_a_bz2_stream_called_gzip_is_refused(save):
    with pytest.raises(BadFile, match="gzip"):
        io.read(save(bz2.compress(RAW), encoding="gzip"))
