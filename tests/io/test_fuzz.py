"""Damaged files of every format: nothing but `BadFile` may come out, and never other voxels where a checksum exists."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

import medseg
from making import fuzzing
from medseg import io
from medseg.errors import BadFile
from medseg.volume import Volume

SUFFIXES = tuple(suffix for suffix in io.WRITERS if not suffix.endswith(".dcm"))  # those need a source
HARMLESS = {"same", "refused"}


def run(suffix: str, count: int, folder: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}
    command = [sys.executable, fuzzing.__file__, suffix, str(count), "20", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


def test_2000_mutations_of_nii_gz_never_load_wrong(tmp_path):
    report = run(".nii.gz", 2000, tmp_path)

    assert set(report["counts"]) <= HARMLESS
    assert sum(report["counts"].values()) == 2000
    assert report["counts"]["refused"] > 1900
    assert report["peak_mb"] < 300
    assert report["slowest_s"] < 1


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".nii.gz"])
def test_mutations_of_other_formats_raise_only_bad_file(tmp_path, suffix):
    report = run(suffix, 300, tmp_path)

    # Only a whole-file checksum finds every change; without one, a changed number is a valid other number.
    allowed = HARMLESS if suffix == ".mgz" else HARMLESS | {"other voxels", "other geometry"}
    assert set(report["counts"]) <= allowed
    assert report["counts"]["refused"] > 50
    assert report["peak_mb"] < 300


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    io.write(fuzzing.scan(suffix), path)
    # Of a pair, the data file is cut: it is the one that takes long to copy.
    victim = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    content = victim.read_bytes()
    random = np.random.default_rng(3)
    cuts = {0, 1, 2, 10, 347, 348, 351, 352, len(content) - 1, len(content) - 4, len(content) - 8}
    cuts |= {int(cut) for cut in random.integers(0, len(content), 90)}

    for cut in sorted(cuts):
        victim.write_bytes(content[:cut])
        with pytest.raises(BadFile):
            io.read(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
def test_each_flipped_bit_of_a_gzip_file_is_found(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    io.write(fuzzing.scan(suffix), path)
    truth, content = io.read(path), path.read_bytes()
    random = np.random.default_rng(4)

    for _ in range(300):
        damaged = bytearray(content)
        damaged[random.integers(10, len(content))] ^= 1 << random.integers(0, 8)
        path.write_bytes(damaged)
        assert fuzzing.outcome(path, truth) in HARMLESS


def claiming(suffix: str, side: int, folder: Path) -> bytes:
    """A file of eight voxels whose header claims `side` voxels along each axis."""
    plain = {".nii.gz": ".nii", ".mgz": ".mgh"}.get(suffix, suffix)
    io.write(Volume(np.ones((2, 2, 2), np.int16), np.eye(4)), folder / f"small{plain}")
    content = (folder / f"small{plain}").read_bytes()
    two, many = b" ".join([b"2"] * 3), b" ".join([str(side).encode()] * 3)
    changed = {
        ".nii": content[:42] + struct.pack("<3h", side, side, side) + content[48:],
        ".mgh": content[:4] + struct.pack(">3i", side, side, side) + content[16:],
        ".nrrd": content.replace(b"sizes: " + two, b"sizes: " + many),
        ".mha": content.replace(b"DimSize = " + two, b"DimSize = " + many),
    }[plain]
    assert changed != content
    return changed if plain == suffix else gzip.compress(changed)


@pytest.mark.parametrize("side", [1500, 32767])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz", ".nrrd", ".mha", ".nii", ".mgh"])
def test_a_header_that_claims_too_much_is_refused_at_once_and_in_little_memory(tmp_path, suffix, side):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(claiming(suffix, side, tmp_path))

    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(BadFile, match="claims"):
        io.read(path)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert seconds < 0.1
    assert peak < 50e6


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
def test_a_gzip_bomb_behind_good_voxels_is_refused_without_unpacking_it(tmp_path, suffix):
    plain = {".nii.gz": ".nii", ".mgz": ".mgh"}[suffix]
    io.write(Volume(np.ones((2, 2, 2), np.int16), np.eye(4)), tmp_path / f"small{plain}")
    path = tmp_path / f"x{suffix}"
    with gzip.open(path, "wb", compresslevel=9) as packed:
        packed.write((tmp_path / f"small{plain}").read_bytes())
        for _ in range(200):
            packed.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 19

    tracemalloc.start()
    with pytest.raises(BadFile, match="more data"):
        io.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 50e6


def test_only_data_warnings_are_given_and_none_for_a_good_file(tmp_path):
    io.write(fuzzing.scan(".nii.gz"), tmp_path / "x.nii.gz")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.read(tmp_path / "x.nii.gz")
