"""Damaged files of every format: nothing but `BadFile` may come out, and never other voxels where a
checksum exists.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

import medseg
from making import fuzzing
from medseg import io
from medseg.errors import BadFile
from medseg.volume import Volume

# Those need a source.
SUFFIXES = tuple(suffix for suffix in io.WRITERS if not suffix.endswith(".dcm"))
HARMLESS = {"same", "refused"}


def run(suffix: str, count: int, folder: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}
    command = [sys.executable, fuzzing.__file__, suffix, str(count), "20", str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
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

    # Only a whole-file checksum finds every change; without one, a changed number is a valid other
    # number.
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
def test_a_header_that_claims_too_much_is_refused_at_once_and_in_little_memory(
    tmp_path, suffix, side
):
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


def several_files(folder: Path) -> Path:
    """A NRRD header of a slice in each of several files, behind headers of their own."""
    data = fuzzing.scan(".nrrd").data
    for k in range(data.shape[2]):
        (folder / f"s{k:02d}.raw").write_bytes(b"another program's" + data[..., k].tobytes("F"))
    sizes = " ".join(map(str, data.shape))
    (folder / "x.nhdr").write_text(
        f'NRRD0005\ntype: short\ndimension: 3\nspace: RAS\nsizes: {sizes}\nspace units: "um" "um"'
        ' "um"\nspace directions: (900,0,0) (0,1000,0) (0,0,2000)\nspace origin: (1,2,3)\nendian:'
        " little\nencoding: raw\nbyte skip: 17\nkey: with:=text\ndata file: s%02d.raw 0"
        f" {data.shape[2] - 1} 1\n\n"
    )
    return folder / "x.nhdr"


def listed_files(folder: Path) -> Path:
    """A MetaImage header that lists its files, with channels and fields of a user."""
    data = np.stack([fuzzing.scan(".mha").data] * 2)
    names = [f"s{k}.raw" for k in range(data.shape[3])]
    for k, name in enumerate(names):
        (folder / name).write_bytes(data[..., k].tobytes("F"))
    sizes = " ".join(map(str, data.shape[1:]))
    (folder / "x.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = "
        f"{sizes}\nElementNumberOfChannels = 2\n"
        "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 900 1000 "
        "2000\nDistanceUnits = um\n"
        "0008|0060 = CT\nNote = one\ntwo\nHeaderSize = -1\nElementType = "
        "MET_SHORT\nElementDataFile = LIST 2\n" + "\n".join(names)
    )
    return folder / "x.mhd"


def header_of_a_pair(folder: Path) -> Path:
    io.write(fuzzing.scan(".nii"), folder / "x.nii")
    content = (folder / "x.nii").read_bytes()
    header = bytearray(content[:352])
    struct.pack_into("<f", header, 108, 0)
    header[344:348] = b"ni1\0"
    (folder / "x.hdr").write_bytes(header)
    (folder / "x.img").write_bytes(content[352:])
    return folder / "x.hdr"


def old_segmentation(folder: Path) -> Path:
    """Two segments as Slicer 4.10 wrote them, under a plain name."""
    data = np.zeros((2, 12, 13, 14), np.uint8)
    data[0, 2:5, 3:7, 1:9] = data[1, 6:9, 1:5, 10:13] = 1
    lines = [
        f"Segment{n}_{key}:={value}"
        for n in range(2)
        for key, value in (("ID", f"s{n}"), ("Name", f"name {n}"))
    ]
    head = (
        "NRRD0004\ntype: uchar\ndimension: 4\nspace: LPS\nsizes: 2 12 13 14\nkinds: list domain"
        " domain domain\n"
    )
    head += "space directions: none (1,0,0) (0,1,0) (0,0,2)\nspace origin: (5,6,7)\nencoding: raw\n"
    (folder / "x.nrrd").write_bytes((head + "\n".join(lines) + "\n\n").encode() + data.tobytes("F"))
    return folder / "x.nrrd"


MAKERS = [several_files, listed_files, header_of_a_pair, old_segmentation]


@pytest.mark.parametrize("make", MAKERS)
def test_mutations_of_headers_whose_voxels_are_elsewhere_raise_only_bad_file(tmp_path, make):
    path = make(tmp_path)
    index = 0 if make is listed_files else None
    content, chance = path.read_bytes(), random.Random(11)
    truth = io.read(path, volume_index=index)
    counts: dict[str, int] = {}

    for _ in range(600):
        path.write_bytes(fuzzing.mutated(content, chance, 800))
        what = fuzzing.outcome(path, truth, volume_index=index)
        counts[what] = counts.get(what, 0) + 1

    assert set(counts) <= HARMLESS | {"other voxels", "other geometry"}
    assert counts["refused"] > 100


@pytest.mark.parametrize("make", MAKERS)
def test_voxels_elsewhere_that_are_cut_or_too_long_are_refused(tmp_path, make):
    path = make(tmp_path)
    index = 0 if make is listed_files else None
    victims = [file for file in sorted(tmp_path.iterdir()) if file.suffix in (".raw", ".img")][
        ::7
    ] or [path]

    for victim in victims:
        content = victim.read_bytes()
        at_end = make is listed_files  # there, whatever comes before the voxels does not count
        for changed in (
            content[:-1],
            content[: len(content) // 2],
            *(() if at_end else (content + b"x",)),
        ):
            victim.write_bytes(changed)
            with pytest.raises(BadFile):
                io.read(path, volume_index=index)
        victim.write_bytes(content)


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_no_inserted_bytes_are_passed_over_in_silence(tmp_path, suffix):
    """Bytes inserted among voxels that end in zeros move all that follow: refused, or at the least
    warned of.
    """
    path = tmp_path / f"x{suffix}"
    scan = fuzzing.scan(suffix)
    data = scan.data.copy()
    data[..., -4:] = 0
    if suffix == ".nii":
        io.write(scan.with_data(data), path)
    else:
        image = sitk.GetImageFromArray(data.T)
        sitk.WriteImage(image, str(path), useCompression=False)
    content, chance = path.read_bytes(), random.Random(12)
    told = 0

    for _ in range(300):
        place = chance.randrange(len(content) - data.nbytes, len(content))
        path.write_bytes(
            content[:place] + chance.randbytes(chance.randint(1, 16)) + content[place:]
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                io.read(path)
            except BadFile:
                told += 1
                continue
        told += any("zeros follow" in str(one.message) for one in caught)

    assert told == 300
