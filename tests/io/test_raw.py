"""Voxels behind bytes to pass over, at the end of a file, or in several files: as SimpleITK reads
them, or refused.
"""

from __future__ import annotations

import gzip
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from making.attacks import ATTACKS
from medseg import io
from medseg.errors import BadFile
from medseg.volume import Volume

DATA = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
RAW = DATA.astype("<i2").tobytes("F")
SLICES = [DATA[..., k].astype("<i2").tobytes("F") for k in range(6)]
LINES = [DATA[:, j, k].astype("<i2").tobytes("F") for k in range(6) for j in range(5)]
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 5 6",
    "space directions": "(1,0,0) (0,2,0) (0,0,3)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "1 2 3",
    "DimSize": "4 5 6",
    "ElementType": "MET_SHORT",
}


@pytest.fixture
def nhdr(tmp_path):
    """Save a NRRD header, with what follows its fields: `nhdr(files={name: bytes},
    data_file="x.raw", ...)`.
    """

    def save(*, files=None, tail=b"", name="x.nhdr", **changed):
        for file, content in (files or {}).items():
            (tmp_path / file).write_bytes(content)
        # Where LIST has to be.
        last = {"data_file": changed.pop("data_file")} if "data_file" in changed else {}
        fields = {
            **NRRD,
            **{field.replace("_", " "): value for field, value in (changed | last).items()},
        }
        text = "".join(f"{field}: {value}\n" for field, value in fields.items())
        (tmp_path / name).write_bytes(b"NRRD0005\n" + text.encode() + tail)
        return tmp_path / name

    return save


@pytest.fixture
def mhd(tmp_path):
    """Save a MetaImage header whose data is elsewhere."""

    def save(*, files=None, tail=b"", last="x.raw", name="x.mhd", **changed):
        for file, content in (files or {}).items():
            (tmp_path / file).write_bytes(content)
        text = "".join(
            f"{field} = {value}\n"
            for field, value in {**META, **changed, "ElementDataFile": last}.items()
        )
        (tmp_path / name).write_bytes(text.encode() + tail)
        return tmp_path / name

    return save


def check(path, data=DATA):
    """A file holds `data` for medseg and for SimpleITK alike, at one place in space."""
    volume, image = io.read(path), sitk.ReadImage(str(path))
    assert np.array_equal(volume.data, data)
    assert np.array_equal(sitk.GetArrayFromImage(image).T, data)
    assert np.allclose(volume.affine[:3, 3] * (-1, -1, 1), image.GetOrigin())
    assert np.allclose(volume.spacing_mm, image.GetSpacing())


@pytest.mark.parametrize("before", [b"x", b"a header\nof two lines\n", bytes(range(256)) * 3])
def test_bytes_before_the_voxels_are_passed_over(nhdr, mhd, before):
    files = {"x.raw": before + RAW}

    check(nhdr(files=files, data_file="x.raw", byte_skip=len(before)))
    check(nhdr(files=files, data_file="x.raw", byte_skip=-1))
    check(nhdr(tail=b"\n" + before + RAW, byte_skip=len(before), name="y.nrrd"))
    check(nhdr(tail=b"\n" + before + RAW, byte_skip=-1, name="y.nrrd"))
    check(mhd(files=files, HeaderSize=len(before)))
    check(mhd(files=files, HeaderSize=-1))
    check(mhd(last="LOCAL", tail=before + RAW, HeaderSize=-1, name="y.mha"))


def test_nothing_to_pass_over_is_no_special_case(nhdr, mhd):
    for skip in (0, -1):
        check(nhdr(files={"x.raw": RAW}, data_file="x.raw", byte_skip=skip))
        check(mhd(files={"x.raw": RAW}, HeaderSize=skip))


def test_lines_are_passed_over_before_unpacking_and_bytes_after_it(nhdr):
    check(
        nhdr(files={"x.raw": b"one\ntwo\nabc" + RAW}, data_file="x.raw", line_skip=2, byte_skip=3)
    )
    check(
        nhdr(
            files={"x.raw": b"P5\n" + b"#" * 700_000 + b"\n" + RAW}, data_file="x.raw", line_skip=2
        )
    )
    packed = b"one\n" + gzip.compress(b"abc" + RAW)
    check(nhdr(files={"x.gz": packed}, data_file="x.gz", line_skip=1, byte_skip=3, encoding="gzip"))


def test_packed_voxels_behind_a_header_are_read(mhd):
    packed = zlib.compress(RAW)

    check(
        mhd(
            files={"x.raw": b"junk" + packed},
            HeaderSize=4,
            CompressedData=True,
            CompressedDataSize=len(packed),
        )
    )


def test_a_header_size_counts_from_the_beginning_of_the_file(mhd):
    length = len(mhd(last="LOCAL", HeaderSize=1000, name="y.mha").read_bytes()) + 4

    check(mhd(last="LOCAL", tail=b"junk" + RAW, HeaderSize=f"{length:04d}", name="y.mha"))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"byte_skip": 7}, "too short"),
        ({"byte_skip": 5}, "more data"),
        ({"byte_skip": 10**12}, "claims"),
        ({"byte_skip": -2}, "skip"),
        ({"byte_skip": "some"}, "numbers"),
        ({"byte_skip": "1 2"}, "1 numbers"),
        ({"byte_skip": -1, "encoding": "gzip"}, "skip"),
        ({"byte_skip": -1, "sizes": "4 5 7"}, "too short"),
        ({"line_skip": -1}, "skip"),
        ({"line_skip": 2}, "fewer lines"),
        ({"line_skip": 10**9}, "fewer lines"),
    ],
)
def test_what_is_not_there_to_be_skipped_is_refused(nhdr, changed, reason):
    path = nhdr(
        files={"x.raw": b"12345\n" + RAW.replace(b"\n", b"?")}, data_file="x.raw", **changed
    )

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(f"{path}: ") or reason == "fewer lines"


def test_the_last_bytes_of_an_attached_file_are_not_its_header(nhdr, mhd):
    for path in (nhdr(tail=b"\n" + RAW[:-1], byte_skip=-1, name="y.nrrd"),
                 mhd(last="LOCAL", tail=RAW[:-1], HeaderSize=-1, name="y.mha")):  # fmt: skip
        with pytest.raises(BadFile, match="too short"):
            io.read(path)


def listing(names):
    return "".join(f"{name}\n" for name in names).encode()


@pytest.mark.parametrize(
    "parts",
    [SLICES, [RAW[: len(RAW) // 2], RAW[len(RAW) // 2 :]], LINES],
    ids=["2-D", "3-D", "1-D"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_of_files_is_read_in_its_order(nhdr, parts, packed):
    names = [f"part {number}.bin" for number in range(len(parts))]
    files = dict(zip(names, map(gzip.compress, parts) if packed else parts))
    dimension = {6: "", 2: " 3", 30: " 1"}[len(parts)]

    check(
        nhdr(
            files=files,
            data_file=f"LIST{dimension}",
            tail=listing(names),
            encoding="gzip" if packed else "raw",
        )
    )


@pytest.mark.parametrize("words", ["LIST", "LIST 2", "LIST 2D"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_list_of_a_metaimage_is_read_in_its_order(mhd, words, packed):
    names = [f"{number}.bin" for number in range(6)]
    files = dict(zip(names, map(zlib.compress, SLICES) if packed else SLICES))

    check(mhd(files=files, last=words, tail=listing(names), CompressedData=packed))


@pytest.mark.parametrize(
    ("pattern", "numbers", "named"),
    [
        ("s%03d.raw", range(1, 7), "1 6 1"),
        ("s%d.raw", range(8, 14), "8 13 1"),
        ("s%02d.raw", range(0, 60, 10), "0 50 10"),
        ("s%4d.raw", range(12, 0, -2), "12 2 -2"),
    ],
)
def test_numbered_files_are_read_in_their_order(nhdr, mhd, pattern, numbers, named):
    files = {pattern % number: content for number, content in zip(numbers, SLICES, strict=True)}

    check(nhdr(files=files, data_file=f"{pattern} {named}"))
    check(nhdr(files=files, data_file=f"{pattern} {named} 2"))
    if "%4d" not in pattern and "-" not in named:
        check(mhd(last=f"{pattern} {named}"))


def test_each_of_several_files_may_have_a_header_of_its_own(nhdr, mhd):
    files = {f"{k}.dcm": b"DICOM header" + bytes(k) + content for k, content in enumerate(SLICES)}
    check(nhdr(files=files, data_file="%d.dcm 0 5 1", byte_skip=-1))
    check(mhd(last="%d.dcm 0 5 1", HeaderSize=-1))
    files = {f"{k}.pgm": b"P5\n4 5\n" + content for k, content in enumerate(SLICES)}
    check(nhdr(files=files, data_file="LIST", tail=listing(files), line_skip=2))
    check(mhd(last="LIST", tail=listing(files), HeaderSize=7))


@pytest.mark.parametrize("order", ["little", "big"])
def test_several_volumes_in_several_files_are_chosen_from(nhdr, mhd, order):
    mark = "<i2" if order == "little" else ">i2"
    files = {f"v{n}.raw": (DATA + 100 * n).astype(mark).tobytes("F") for n in range(3)}
    path = nhdr(files=files, data_file="v%d.raw 0 2 1", dimension=4, sizes="4 5 6 3",
    kinds="domain domain domain list",
                space_directions="(1,0,0) (0,2,0) (0,0,3) none", endian=order)  # fmt: skip
    other = mhd(last="LIST", tail=listing(files), NDims=4, DimSize="4 5 6 3",
    ElementSpacing="1 2 3 1",
                Offset="10 20 30 0", TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
                BinaryDataByteOrderMSB=order == "big")  # fmt: skip

    for one in (path, other):
        with pytest.raises(BadFile, match="3 volumes"):
            io.read(one)
        assert np.array_equal(io.read(one, volume_index=2).data, DATA + 200)


def test_channels_in_several_files_are_chosen_from(mhd):
    stack = np.stack([DATA, DATA + 500])
    files = {f"c{k}.raw": stack[..., k].astype("<i2").tobytes("F") for k in range(6)}

    path = mhd(files=files, last="c%d.raw 0 5 1", ElementNumberOfChannels=2)

    assert np.array_equal(io.read(path, volume_index=1).data, DATA + 500)


@pytest.mark.parametrize(
    ("named", "tail", "reason"),
    [
        ("LIST", b"", "lists no data file"),
        ("LIST", listing([f"{k}.raw" for k in range(5)]), "cannot be divided"),
        ("LIST", listing([f"{k}.raw" for k in range(5)] + ["0.raw"]), "twice"),
        ("LIST", listing([f"{k}.raw" for k in range(7)]), "cannot be divided"),
        ("LIST", listing([f"{k}.raw" for k in (0, 1, 2, 3, 4, 9)]), "missing"),
        ("LIST 1", listing([f"{k}.raw" for k in range(6)]), "cannot be divided"),
        ("LIST 4", listing([f"{k}.raw" for k in range(6)]), "dimensions"),
        ("LIST 0", listing([f"{k}.raw" for k in range(6)]), "dimensions"),
        ("LIST x", listing([f"{k}.raw" for k in range(6)]), "correct the header"),
        ("LIST 2 2", listing([f"{k}.raw" for k in range(6)]), "correct the header"),
        ("%d.raw 0 4 1", b"", "cannot be divided"),
        ("%d.raw 0 999999999 1", b"", "numbers 1000000000 data files"),
        ("%d.raw 0 5 0", b"", "list their names"),
        ("%d.raw 0 5 -1", b"", "correct the first"),
        ("%d.raw 0 x 1", b"", "list their names"),
        ("%d%d.raw 0 5 1", b"", "list their names"),
        ("%s.raw 0 5 1", b"", "list their names"),
        ("%f.raw 0 5 1", b"", "list their names"),
        ("%100000000d.raw 0 5 1", b"", "list their names"),
        ("%d.raw 4 9 1", b"", "missing"),
    ],
)
def test_files_that_do_not_make_the_volume_are_refused(nhdr, named, tail, reason):
    files = {f"{k}.raw": SLICES[k % 6] for k in range(9)}
    path = nhdr(files=files, data_file=named, tail=tail)

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "reason"), [(SLICES[0] + b"x", "more data"), (SLICES[0][:-1], "too short")]
)
def test_one_wrong_file_of_several_is_named(nhdr, mhd, content, reason):
    files = {f"{k}.raw": SLICES[k] for k in range(6)} | {"3.raw": content}

    for path in (nhdr(files=files, data_file="%d.raw 0 5 1"), mhd(last="%d.raw 0 5 1")):
        with pytest.raises(BadFile, match=rf"its data file 3\.raw.*{reason}") as caught:
            io.read(path)
        assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name", [name for name in ATTACKS if name.strip() not in ("", ".", "missing.raw", "a\0b")]
)
def test_a_list_opens_nothing_outside_its_folder(nhdr, mhd, tmp_path, name):
    (tmp_path.parent / "secret.raw").write_bytes(SLICES[5])
    (tmp_path / "link.raw").symlink_to(tmp_path.parent / "secret.raw")
    files = {f"{k}.raw": SLICES[k] for k in range(5)}
    tail = listing([*files, name])

    for path in (nhdr(files=files, data_file="LIST", tail=tail), mhd(last="LIST", tail=tail)):
        with pytest.raises(BadFile, match="data file"):
            io.read(path)


def test_a_pattern_opens_nothing_outside_its_folder(nhdr, mhd, tmp_path):
    for k in range(6):
        (tmp_path.parent / f"{k}.raw").write_bytes(SLICES[k])

    for pattern in ("../%d.raw 0 5 1", f"{tmp_path.parent}/%d.raw 0 5 1"):
        for path in (nhdr(data_file=pattern), mhd(last=pattern)):
            with pytest.raises(BadFile, match="outside its folder"):
                io.read(path)


def test_a_header_that_claims_too_much_of_several_files_is_refused_before_memory_is_taken(nhdr):
    files = {f"{k}.raw": SLICES[k] for k in range(6)}

    with pytest.raises(BadFile, match="claims"):
        io.read(nhdr(files=files, data_file="%d.raw 0 5 1", sizes="40000 50000 6"))
    with pytest.raises(BadFile, match=r"0\.raw: the file is too short"):
        io.read(nhdr(files=files, data_file="%d.raw 0 5 1", sizes="10000 20000 6"))


@pytest.mark.parametrize("name", ["scan.nhdr", "scan_504.nhdr", "scan.mhd"])
def test_the_raw_file_with_a_header_of_its_own_holds_what_is_expected(shared_data, name):
    folder = shared_data / "cases/files/raw-behind-a-header"
    expected = nib.load(folder / "expected.nii.gz")

    volume = io.read(folder / name)

    assert np.array_equal(volume.data, np.asanyarray(expected.dataobj))
    assert np.allclose(volume.affine, expected.affine, atol=1e-6)


@pytest.mark.parametrize("stem", ["a b", "50% dose a b", "50%d 1 2 3", "LIST of a", " a", "tab\ta"])
@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_of_any_name_leads_to_its_data(tmp_path, stem, suffix):
    volume = Volume(DATA, np.eye(4))
    path = tmp_path / f"{stem}{suffix}"

    io.write(volume, path)

    assert np.array_equal(io.read(path).data, DATA)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(path)).T, DATA)
