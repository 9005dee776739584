"""Limits on reading, whole-or-nothing writing, and data files that a header may not reach."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import medseg
from making import writing
from making.attacks import ATTACKS
from medseg import files, io
from medseg.errors import BadFile, BadOutput
from medseg.volume import Volume

SMALL = Volume(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))


def run(*arguments: object) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}
    command = [sys.executable, writing.__file__, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(params=["isal", "zlib"])
def decompressor(request, monkeypatch):
    """Both ways to unpack: with the fast library and without."""
    if request.param == "isal":
        pytest.importorskip("isal")
    else:
        monkeypatch.setitem(sys.modules, "isal", None)
    return request.param


@pytest.mark.parametrize("packing", ["gzip", "zlib"])
def test_what_is_packed_is_unpacked_by_zlib_and_tells_neither_time_nor_name(
    tmp_path, decompressor, packing
):
    content = np.random.default_rng(3).integers(0, 5, 700_000, np.uint8).tobytes() + bytes(300_000)
    packed = []
    for _ in range(2):
        packer = files.compressor(packing)
        pieces = [
            packer.compress(memoryview(content)[n : n + 99_991])
            for n in range(0, len(content), 99_991)
        ]
        packed.append(b"".join(pieces) + packer.flush())

    assert packed[0] == packed[1]
    assert zlib.decompress(packed[0], 31 if packing == "gzip" else 15) == content
    assert len(packed[0]) < 0.5 * len(content)
    if packing == "gzip":
        flags, time = packed[0][3], packed[0][4:8]
        assert (flags, time) == (0, bytes(4))


def test_gzip_writer_writes_what_gzip_reads(tmp_path, decompressor):
    content = np.random.default_rng(4).integers(-9, 9, 200_000, np.int16).tobytes()
    with files.atomic_write(tmp_path / "named.gz") as file:
        write, finish = files.gzip_writer(file)
        write(content[:1])
        write(memoryview(content)[1:])
        finish()
    packed = (tmp_path / "named.gz").read_bytes()

    assert gzip.decompress(packed) == content
    assert b"named" not in packed[:64]


def test_gunzip_returns_the_content_of_several_members_with_padding(tmp_path, decompressor):
    content = os.urandom(300_000) + bytes(100_000)
    path = tmp_path / "x.gz"
    path.write_bytes(
        gzip.compress(content[:1000])
        + gzip.compress(b"")
        + gzip.compress(content[1000:])
        + bytes(700)
    )

    assert files.gunzip(path) == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:-8],
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],  # checksum
        lambda packed: packed[:-4] + bytes([packed[-4] ^ 1]) + packed[-3:],  # length
        lambda packed: packed[:500] + bytes([packed[500] ^ 4]) + packed[501:],
        lambda packed: packed + b"x",
        lambda packed: packed + b"\x1f\x8b",
        lambda packed: packed + b"\x1f",
        lambda packed: b"just text, not packed",
    ],
)
def test_gunzip_refuses_damage(tmp_path, decompressor, damage):
    path = tmp_path / "x.gz"
    path.write_bytes(damage(gzip.compress(np.random.default_rng(0).bytes(5000))))

    with pytest.raises(BadFile, match=r"x\.gz"):
        files.gunzip(path)


def test_gunzip_stops_at_the_limit(tmp_path, decompressor):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))

    with pytest.raises(BadFile, match="more than"):
        files.gunzip(path, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("packing", "pack"), [("gzip", gzip.compress), ("zlib", zlib.compress), (None, bytes)]
)
def test_a_stream_gives_exactly_the_bytes_asked_for(tmp_path, decompressor, packing, pack):
    content = np.random.default_rng(1).integers(0, 4, 1_000_000, np.uint8).tobytes()
    path = tmp_path / "x"
    path.write_bytes(b"head" + pack(content))

    with files.ByteStream(path, packing=packing, start=4) as stream:
        first = stream.read(7)
        stream.skip(300_000)
        second = stream.read(len(content) - 300_007)
        stream.finish()

    assert first == content[:7]
    assert second == content[300_007:]


def test_a_stream_that_is_not_read_to_its_end_is_refused_at_finish(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(b"12345"))

    with (
        files.ByteStream(path, packing="gzip") as stream,
        pytest.raises(BadFile, match="more data"),
    ):
        stream.read(4)
        stream.finish()


def test_more_than_the_limit_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(2000))

    with files.ByteStream(path, max_bytes=1000) as stream, pytest.raises(BadFile, match="allowed"):
        stream.read(1001)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "pipe"])
def test_what_is_no_ordinary_file_is_refused(tmp_path, kind):
    path = tmp_path / "x.nii"
    {
        "missing": lambda: None,
        "folder": path.mkdir,
        "empty": path.touch,
        "pipe": lambda: os.mkfifo(path),
    }[kind]()

    with pytest.raises(BadFile, match=r"x\.nii"):
        files.open_file(path)


@pytest.fixture
def trap(tmp_path):
    """A folder with links that lead out of it, beside a file worth reading."""
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "secret.raw").write_bytes(bytes(48))
    (home / "good.raw").write_bytes(bytes(48))
    (home / "sub" / "good.raw").write_bytes(bytes(48))
    (home / "link.raw").symlink_to(tmp_path / "secret.raw")
    (home / "linked").symlink_to(tmp_path)
    (home / "self.raw").symlink_to(home / "self.raw")
    os.mkfifo(home / "pipe.raw")
    return home


@pytest.mark.parametrize("name", ATTACKS)
def test_inside_refuses_what_leads_out_of_the_folder(trap, name):
    with pytest.raises(BadFile):
        files.inside(trap, name)


@pytest.mark.parametrize("name", ["good.raw", "sub/good.raw", "./good.raw"])
def test_inside_allows_files_in_the_folder(trap, name):
    assert files.inside(trap, name).read_bytes() == bytes(48)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("", "missing.raw")])
@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_detached_headers_open_nothing_outside_their_folder(trap, suffix, name):
    io.write(SMALL, trap / f"x{suffix}")
    header = (trap / f"x{suffix}").read_text()
    own = next(
        line.split()[-1]
        for line in header.splitlines()
        if line.lower().startswith(("data file", "elementd"))
    )
    header = header.replace("gzip", "raw").replace(
        "CompressedData = True", "CompressedData = False"
    )
    (trap / f"x{suffix}").write_text(header.replace(own, name))
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(
        lambda event, details: (
            opened.append(str(details[0])) if watching and event == "open" else None
        )
    )

    with pytest.raises(BadFile, match=rf"x\{suffix}"):
        io.read(trap / f"x{suffix}")
    watching.clear()

    # Numbers are descriptors of files opened by name.
    named = {name for name in opened if not name.isdigit()}
    assert named == {str(trap / f"x{suffix}")}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nhdr", ".mha"])
def test_a_writer_killed_50_times_leaves_no_broken_file(tmp_path, suffix):
    report = run("kill", suffix, 50 if suffix == ".nii.gz" else 15, tmp_path)

    assert report["broken"] == 0
    assert report["whole"] >= 15
    # .mha packs before it opens the file, so kills rarely hit the writing itself.
    if suffix == ".nii.gz":
        assert report["leftovers"] > 0
    assert files.sweep(tmp_path, min_age_s=0) == report["leftovers"]
    assert not list(tmp_path.glob(".medseg-*"))


def test_sweep_leaves_files_that_are_being_written_or_are_not_ours(tmp_path):
    (tmp_path / ".medseg-notes.txt").write_text("mine")

    with files.atomic_write(tmp_path / "x.bin") as file:
        file.write(b"abc")
        removed = files.sweep(tmp_path, min_age_s=0)

    assert removed == 0
    assert (tmp_path / "x.bin").read_bytes() == b"abc"
    assert (tmp_path / ".medseg-notes.txt").exists()


def test_on_a_full_disk_the_old_file_stays(tmp_path):
    report = run("full", tmp_path)

    assert "disk is full" in report["message"]
    assert "x.nii.gz" in report["message"]
    assert report["old file stays"]
    assert report["leftovers"] == 0


def test_in_a_protected_folder_the_old_file_stays(tmp_path):
    folder = tmp_path / "protected"
    folder.mkdir()

    report = run("forbidden", folder)

    assert "write-protected" in report["message"]
    assert report["old file stays"]
    assert [path.name for path in folder.iterdir()] == ["x.nii.gz"]


@pytest.mark.parametrize("name", ["nowhere/x.nii", "file/x.nii", "folder.nii", "x" * 300 + ".nii"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder.nii").mkdir()

    with pytest.raises(BadOutput, match=r"\.nii"):
        io.write(SMALL, tmp_path / name)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.nii"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")

    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "x.bin") as file:
        file.write(b"new")
        raise KeyboardInterrupt

    assert (tmp_path / "x.bin").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_that_cannot_be_written_leaves_no_data_file(tmp_path, suffix):
    (tmp_path / f"x{suffix}").mkdir()

    with pytest.raises(BadOutput, match="not an ordinary file"):
        io.write(SMALL, tmp_path / f"x{suffix}")

    assert [file.name for file in tmp_path.iterdir()] == [f"x{suffix}"]


def test_the_temporary_name_tells_nothing_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to(tmp_path / "real.bin")

    with files.atomic_write(tmp_path / "link.bin") as file:
        names = {path.name for path in tmp_path.iterdir()} - {"real.bin", "link.bin"}
        file.write(b"new")

    assert len(names) == 1
    assert "link" not in names.pop()
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


def test_a_written_file_gets_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()

    io.write(SMALL, tmp_path / "x.nii")

    assert (tmp_path / "x.nii").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o440])
def test_what_takes_the_place_of_a_file_keeps_its_permissions(tmp_path, mode):
    names = ["x.nii", "y.nii", "z.nii"]
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)

    io.write(SMALL, tmp_path / "x.nii")
    with files.written_together() as stage:
        for name in names[1:]:
            io.write(SMALL, stage(tmp_path / name))

    for name in names:
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
        assert np.array_equal(io.read(tmp_path / name).data, SMALL.data)


def test_of_several_who_write_a_file_once_the_first_stays_whole(tmp_path, monkeypatch):
    contents = [bytes([number]) * 100_000 for number in range(12)]

    def write(content: bytes) -> bytes:
        files.write_once(tmp_path / "plan.json", content)
        return (tmp_path / "plan.json").read_bytes()

    with ThreadPoolExecutor(6) as pool:
        seen = set(pool.map(write, contents))
    assert len(seen) == 1 and seen <= set(contents)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(BadOutput, match=r"none/plan\.json: cannot be written: its folder does not"):
        files.write_once(tmp_path / "none" / "plan.json", b"")

    def no_links(*arguments: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    files.write_once(tmp_path / "other.json", b"1")
    files.write_once(tmp_path / "other.json", b"2")
    assert (tmp_path / "other.json").read_bytes() == b"1"


def test_the_state_of_a_folder_is_that_of_all_in_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "slice.dcm").write_bytes(b"123")
    before, hashes = files.file_state(tmp_path), files.file_state(tmp_path, verify=True)
    assert files.file_state(tmp_path / "missing") is None
    os.utime(tmp_path / "a" / "b" / "slice.dcm", ns=(1, 1))
    assert files.file_state(tmp_path) == [["a", [["b", [["slice.dcm", [3, 1]]]]]]] != before
    assert files.file_state(tmp_path, verify=True) == hashes
