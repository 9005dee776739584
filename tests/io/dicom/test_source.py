"""Where DICOM comes from: folders, lists, zips, DICOMDIRs and single files; and attacks through
them.
"""

from __future__ import annotations

import io as bytes_io
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from making.dicom import NAME, content_of, empty, enhanced, save, series, truth
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom import source as dicom_source, volumes as dicom


def zipped(path: Path, contents: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return path


def as_contents(pieces: list[Dataset]) -> dict[str, bytes]:
    return {f"{NAME}/{n:02d}.dcm": content_of(piece) for n, piece in enumerate(reversed(pieces))}


def test_a_list_of_files_is_a_series(tmp_path):
    pieces = series()
    files = sorted(save(pieces, tmp_path / "s").iterdir())

    assert np.array_equal(io.read(files).data, truth(pieces).data)
    with pytest.raises(BadFile, match=r"and 3 more: 1 slices are missing"):
        io.read([files[n] for n in (0, 1, 3, 4)])
    with pytest.raises(BadFile, match="list of files is empty"):
        io.read([])
    with pytest.raises(BadFile, match="no such file"):
        io.read([*files, tmp_path / "x.dcm"])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["s.zip", "s.dcm", "s"])
def test_a_zip_is_read_in_place_whatever_its_name(tmp_path, compression, name):
    pieces = series()
    contents = {"notes.txt": b"hello", "empty/": b"", **as_contents(pieces)}
    path = zipped(tmp_path / name, contents, compression)
    if name == "s":  # without a suffix nothing says that it might be DICOM
        with pytest.raises(BadFile, match="does not read this kind"):
            io.read(path)
        return

    volume = io.read(path)

    assert np.array_equal(volume.data, truth(pieces).data)
    assert np.allclose(volume.affine, truth(pieces).affine, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_compressed_deflated_and_multi_frame_files_are_read_from_a_zip(tmp_path):
    pieces = series()
    expected = truth(pieces).data
    many = enhanced([series()])
    for n, piece in enumerate(pieces):
        if n % 2:
            piece.compress(RLELossless, generate_instance_uid=False)
        else:
            piece.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    assert np.array_equal(io.read(zipped(tmp_path / "a.zip", as_contents(pieces))).data, expected)
    assert np.array_equal(io.read(zipped(tmp_path / "b.zip", as_contents([many]))).data, expected)


def test_ordered_slices_of_a_zip_can_be_opened_again(tmp_path):
    pieces = series()
    path = zipped(tmp_path / "s.zip", as_contents(pieces))

    found = dicom.ordered_slices(path)

    assert [piece.sop_instance for piece in found] == [piece.SOPInstanceUID for piece in pieces]
    assert [dicom.read_header(path, piece).InstanceNumber for piece in found] == [
        100,
        99,
        98,
        97,
        96,
    ]


def test_names_in_a_zip_are_not_in_messages(tmp_path):
    contents = as_contents(series())
    first = next(iter(contents))
    contents[first] = contents[first][:-4]

    with pytest.raises(BadFile, match=r"s.zip \(entry 1\): .*too short") as caught:
        io.read(zipped(tmp_path / "s.zip", contents))
    assert NAME not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../out.dcm", "/tmp/out.dcm", "a/../../out.dcm", "C:\\out.dcm", "x" * 300 + ".dcm"]
)
def test_a_zip_cannot_write_anywhere(tmp_path, name):
    pieces = series()
    contents = as_contents(pieces)
    contents[name] = contents.pop(next(iter(contents)))
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(
        lambda event, args: opened.append(str(args)) if watching[0] and event == "open" else None
    )
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "s.zip", contents)
    opened.clear()

    volume = io.read(path)
    watching[0] = False

    assert np.array_equal(volume.data, truth(pieces).data)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.zip"]
    assert not any("out.dcm" in line for line in opened)
    assert not any("'w" in line or "'x" in line for line in opened)


def test_links_in_a_zip_are_not_followed(tmp_path):
    contents = as_contents(series())
    path = zipped(tmp_path / "s.zip", contents)
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")

    with pytest.warns(DataWarning, match="named like DICOM that are not: 1"):
        io.read(path)


def test_a_zip_with_too_many_files_is_refused_before_they_are_looked_at(tmp_path):
    path = zipped(tmp_path / "s.zip", {f"{n}": b"" for n in range(dicom_source.MAX_ENTRIES + 1)})

    with pytest.raises(BadFile, match=r"more than the 10000 files"):
        io.read(path)


def test_a_directory_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    path = zipped(tmp_path / "s.zip", {f"{n:040d}" * 20: b"" for n in range(6000)})
    assert path.stat().st_size > 2 * dicom_source.MAX_DIRECTORY_BYTES

    tracemalloc.start()
    with pytest.raises(BadFile, match=r"more than the 10000 files"):
        io.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def bomb(head: bytes, megabytes: int) -> bytes:
    """A deflated zip whose one member is a file's beginning followed by zeros."""
    buffer = bytes_io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a.dcm", "w") as member,
    ):
        member.write(head)
        for _ in range(megabytes):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


def test_a_member_that_unpacks_to_much_takes_little_memory(tmp_path):
    piece = series()[0]
    length = struct.pack("<I", 160 << 20)
    head = content_of(piece)
    cases = {
        "pixels": head[: -len(piece.PixelData) - 4] + length,  # a Pixel Data element of 160 MB
        "text": head[:-100] + b"\x10\x00\x10\x40UT\0\0" + length,
        "no end": head,
    }
    for name, start in cases.items():
        path = tmp_path / f"{name}.zip"
        path.write_bytes(bomb(start, 160))
        tracemalloc.start()
        with pytest.raises(BadFile):
            io.read(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20, name
        tracemalloc.stop()


def test_what_a_zip_unpacks_to_is_counted_not_believed(tmp_path, monkeypatch):
    path = zipped(tmp_path / "s.zip", as_contents(series(5, 64, 64)))
    monkeypatch.setattr(dicom_source, "MAX_BYTES", 20_000)

    with pytest.raises(BadFile, match="unpacks to more"):
        io.read(path)


def forged(content: bytes, field: int, value: int) -> bytes:
    """A zip in whose directory one field of every entry is another value (APPNOTE 4.3.12)."""
    out = bytearray(content)
    place = out.find(b"PK\x01\x02")
    while place >= 0:
        out[place + field : place + field + 4] = struct.pack("<I", value)
        place = out.find(b"PK\x01\x02", place + 46)
    return bytes(out)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (20, 10),
        (20, 2**32 - 2),
        (24, 10),
        (24, 2**32 - 2),
        (16, 12345),
        (42, 2**31),
        (8, 1),
        (8, 12),
        (10, 99),
    ],
    ids=[
        "packed small",
        "packed huge",
        "size small",
        "size huge",
        "crc",
        "offset",
        "encrypted",
        "flags",
        "method",
    ],
)
def test_forged_sizes_checksums_and_places_do_no_harm(tmp_path, field, value):
    pieces = series(5, 32, 32)
    path = zipped(tmp_path / "s.zip", as_contents(pieces))
    path.write_bytes(forged(path.read_bytes(), field, value))

    tracemalloc.start()
    if value == 2**32 - 2:  # the packed data itself says where it ends, and its checksum is right
        assert np.array_equal(io.read(path).data, truth(pieces).data)
    else:
        with pytest.raises(BadFile):
            io.read(path)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_zips_in_zips_are_left_alone(tmp_path):
    inner = zipped(tmp_path / "inner.zip", as_contents(series())).read_bytes()
    for _ in range(3):
        inner = zipped(tmp_path / "inner.zip", {"a.zip": inner, "b.zip": inner}).read_bytes()

    with pytest.raises(BadFile, match="holds no DICOM images"):
        io.read(tmp_path / "inner.zip")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18), b"text"]
)
def test_what_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "s.zip").write_bytes(content)

    with pytest.raises(BadFile, match=r"s.zip: is (damaged or is no zip|an empty zip)"):
        io.read(tmp_path / "s.zip")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_truncated_zip_is_refused(tmp_path, cut):
    path = zipped(tmp_path / "s.zip", as_contents(series()))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * cut // 12])

    with pytest.raises(BadFile):
        io.read(path)


def with_dicomdir(pieces: list[Dataset], folder: Path) -> Path:
    files = FileSet()
    for piece in pieces:
        piece.StudyDate, piece.StudyTime, piece.StudyID, piece.SeriesNumber = (
            "20200101",
            "101010",
            "1",
            1,
        )
        files.add(piece)
    files.write(folder)
    return folder / "DICOMDIR"


def test_a_dicomdir_names_the_files(tmp_path):
    pieces = series()
    expected = truth(pieces)
    path = with_dicomdir(pieces, tmp_path / "cd")
    save(series(seed=2), tmp_path / "cd" / "other")  # not in the DICOMDIR

    volume = io.read(path)

    assert np.array_equal(volume.data, expected.data)
    assert np.allclose(volume.affine, expected.affine, atol=1e-6)
    assert [piece.sop_instance for piece in dicom.ordered_slices(path)] == [
        piece.SOPInstanceUID for piece in pieces
    ]


def test_a_dicomdir_in_a_folder_is_no_object_to_warn_about(tmp_path):
    pieces = series()
    expected = truth(pieces)
    with_dicomdir(pieces, tmp_path / "cd")

    assert np.array_equal(io.read(tmp_path / "cd").data, expected.data)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize(
    "name", [["..", "secret"], ["/etc/passwd"], ["LINK"], ["MISSING"], ["A", "..", "..", "secret"]]
)
def test_a_dicomdir_cannot_lead_out_of_its_folder(tmp_path, name):
    path = with_dicomdir(series(), tmp_path / "cd")
    (tmp_path / "secret").write_bytes(content_of(series()[0]))
    (tmp_path / "cd" / "LINK").symlink_to(tmp_path / "secret")
    directory = pydicom.dcmread(path)
    for record in directory.DirectoryRecordSequence:
        if record.DirectoryRecordType == "IMAGE":
            record.ReferencedFileID = name
    directory.save_as(path)

    with pytest.raises(BadFile, match="DICOMDIR: refers to a file that is missing or lies outside"):
        io.read(path)


def test_an_empty_dicomdir_is_refused(tmp_path):
    path = with_dicomdir(series(), tmp_path / "cd")
    directory = pydicom.dcmread(path)
    directory.DirectoryRecordSequence = []
    directory.save_as(path)

    with pytest.raises(BadFile, match="refers to no files"):
        io.read(path)


@pytest.mark.parametrize("name", ["x.dcm", "x", "x.ima", "IM_0001"])
def test_one_multi_frame_file_is_a_volume_and_one_classic_slice_is_not(tmp_path, name):
    pieces = series()
    path = tmp_path / name

    enhanced([pieces]).save_as(path, enforce_file_format=True)
    assert np.array_equal(io.read(path).data, truth(pieces).data)

    pieces[0].save_as(path, enforce_file_format=True)
    with pytest.raises(BadFile, match="one DICOM file with one slice; give the folder"):
        io.read(path)


def test_a_file_without_preamble_is_read(tmp_path):
    pieces = series()
    for n, piece in enumerate(pieces):
        del piece.file_meta
        pydicom.dcmwrite(tmp_path / f"{n}", piece, implicit_vr=n % 2 == 0, little_endian=True)

    assert np.array_equal(io.read(tmp_path).data, truth(pieces).data)


def nested(depth: int) -> bytes:
    """A sequence of undefined length within a sequence, `depth` times (PS3.5 7.5)."""
    start = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    return start * depth


def many(count: int) -> bytes:
    """Small elements that nobody asked for."""
    return b"".join(struct.pack("<HH2sHH", 0x4001, n & 0xFFFF, b"US", 2, 7) for n in range(count))


@pytest.mark.parametrize(
    "filling", [nested(5000), nested(100000), many(3000)], ids=["5000 deep", "100000 deep", "many"]
)
def test_headers_without_end_are_refused_quickly(tmp_path, monkeypatch, filling):
    monkeypatch.setattr("medseg.io.dicom.headers.MAX_READS", 2000)
    piece = enhanced([series()])
    del piece.PixelData, piece.PerFrameFunctionalGroupsSequence
    (tmp_path / "x.dcm").write_bytes(content_of(piece) + filling)
    start = time.perf_counter()

    with pytest.raises(BadFile, match=r"x\.dcm"):
        io.read(tmp_path / "x.dcm")

    assert time.perf_counter() - start < 5


def test_one_object_without_an_image_is_refused(tmp_path):
    report = empty("1.2.840.10008.5.1.4.1.1.88.33")
    report.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    with pytest.raises(BadFile, match="holds no DICOM images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io.read(tmp_path / "x.dcm")
