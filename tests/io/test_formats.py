"""`read`, `read_labels` and `write`: choosing by suffix, and the checks that all formats share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import medseg
from medseg import io
from medseg.errors import BadFile, BadOutput, DataWarning
from medseg.volume import Volume

FLOAT_SUFFIXES = [suffix for suffix in io.WRITERS if not suffix.endswith((".seg.nrrd", ".dcm"))]


def floats(*values: float) -> Volume:
    data = np.linspace(-5, 9, 60, dtype=np.float32).reshape(3, 4, 5)
    data.ravel()[10 : 10 + len(values)] = values
    return Volume(data, np.eye(4))


@pytest.mark.parametrize("suffix", FLOAT_SUFFIXES)
def test_voxels_that_are_not_finite_are_counted_and_replaced(tmp_path, suffix):
    volume = floats(np.nan, np.inf, -np.inf, np.nan)
    path = tmp_path / f"x{suffix}"
    io.write(volume, path)

    with pytest.warns(DataWarning, match="4 of 60"):
        found = io.read(path)

    assert found.data.ravel()[10:14].tolist() == [0, 9, -5, 0]
    rest = np.isfinite(volume.data)
    assert np.array_equal(found.data[rest], volume.data[rest])


@pytest.mark.parametrize("suffix", FLOAT_SUFFIXES)
def test_a_scan_that_is_mostly_not_numbers_is_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    io.write(floats(*[np.nan] * 31), path)

    with pytest.raises(BadFile, match="31 of 60"):
        io.read(path)


def test_half_of_the_voxels_may_be_nan(tmp_path):
    io.write(floats(*[np.nan] * 30), tmp_path / "x.nii")

    with pytest.warns(DataWarning, match="30 of 60"):
        io.read(tmp_path / "x.nii")


def test_huge_finite_values_are_no_infinities(tmp_path):
    volume = floats(*[3e38] * 8)
    io.write(volume, tmp_path / "x.nii")

    assert np.array_equal(io.read(tmp_path / "x.nii").data, volume.data)


@pytest.mark.parametrize("suffix", FLOAT_SUFFIXES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.nan, "not numbers"),
        (np.inf, "not numbers"),
        (1.5, "whole"),
        (-1, "negative"),
        (65536, "65535"),
    ],
)
def test_what_is_no_label_map_is_refused(tmp_path, suffix, value, reason):
    data = np.zeros((3, 4, 5), np.float32)
    data[1, 2, 3] = value
    path = tmp_path / f"x{suffix}"
    io.write(Volume(data, np.eye(4)), path)

    with pytest.raises(BadFile, match=reason):
        io.read_labels(path)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)]
)
@pytest.mark.parametrize("stored", [np.float32, np.float64, np.int32, np.uint64])
def test_label_maps_become_the_smallest_type_that_holds_them(tmp_path, largest, dtype, stored):
    data = np.zeros((3, 4, 5), stored)
    data[1, 2, 3] = largest
    io.write(Volume(data, np.eye(4)), tmp_path / "x.nii.gz")

    labels = io.read_labels(tmp_path / "x.nii.gz")

    assert labels.data.dtype == dtype
    assert np.array_equal(labels.data, data)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("scan.nii.gz", "scan"),
        ("a/b.c/scan.v2.nii", "scan.v2"),
        ("SCAN.NII.GZ", "SCAN"),
        ("x.seg.nrrd", "x"),
        ("x.nrrd", "x"),
        ("x.mgz", "x"),
        ("folder", "folder"),
        ("notes.txt", "notes.txt"),
        (".nii", ".nii"),
    ],
)
def test_strip_suffix(name, stem):
    assert io.strip_suffix(name) == stem
    assert io.strip_suffix(Path(name)) == stem


def test_names_with_a_reader_are_known():
    assert io.is_readable_name("A.NII.GZ")
    assert io.is_readable_name("a.mhd")
    assert not io.is_readable_name("a.png")
    assert not io.is_readable_name("a.zip")  # readable, but no scan of its own among others
    assert not io.is_readable_name("a.gz")
    assert not io.is_readable_name(".nii.gz")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
        ("x.JPG", b"\xff\xd8" + bytes(50), "picture"),
        ("x.txt", b"hello", "does not read"),
        ("x", b"hello", "does not read"),
        ("x", bytes(128) + b"DICM" + bytes(50), "early|folder"),
        ("x.dcm", bytes(128) + b"DICM" + bytes(50), "early|folder"),
        *[(f"x{suffix}", b"", "empty") for suffix in (*io.READERS, ".txt")],
        *[(f"x{suffix}", b"just some text\n" * 50, "x") for suffix in io.READERS],
        *[(f"x{suffix}", None, "no such file") for suffix in (*io.READERS, ".txt", "")],
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence_that_names_it(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)

    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) - len(str(path)) < 250


def test_the_path_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(BadFile) as caught:
        io.read("nowhere.nii.gz")

    assert str(caught.value).startswith("nowhere.nii.gz: ")


@pytest.mark.parametrize("name", ["x.png", "x", "x.nii.bz2"])
def test_an_unknown_format_is_not_written(tmp_path, name):
    with pytest.raises(BadOutput, match=r"\.nii\.gz"):
        io.write(floats(), tmp_path / name)

    assert not list(tmp_path.iterdir())


def test_reading_and_writing_need_no_heavy_library_at_import():
    code = (
        "import sys, medseg.io; print([m for m in ('torch', 'SimpleITK', 'pydicom', 'nibabel') if m"
        " in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(medseg.__file__).parents[1])}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def test_what_is_not_a_number_is_air_where_there_is_air(tmp_path):
    """NaN fills what lies outside of a CT; 0 would be water there."""
    volume = floats(-1000, np.nan, np.nan)
    io.write(volume, tmp_path / "ct.nii")

    with pytest.warns(DataWarning, match="NaN was read as -1000"):
        found = io.read(tmp_path / "ct.nii")

    assert found.data.ravel()[10:13].tolist() == [-1000, -1000, -1000]
