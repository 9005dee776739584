"""Channels that are not what they are called: CT that is not in Hounsfield units, padding that is
no intensity.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from making import datasets as made
from making.datasets import put, put_json
from making.places import ROOT
from medseg.dataset.cases import Finding
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.check.levels import levels_of
from medseg.dataset.reading import read_dataset
from medseg.volume import Volume


def head(seed: int, noise: float = 15.0) -> tuple[NDArray, NDArray]:
    """A CT head in air, in Hounsfield units: brain in a skull, with a ventricle; and labels of the
    two.
    """
    random = np.random.default_rng(seed)
    shape = (40, 44, 36)
    at = np.indices(shape).astype(float)
    middle = np.array(shape) / 2 + random.uniform(-1, 1, 3)
    far = np.sqrt(sum(((x - m) / r) ** 2 for x, m, r in zip(at, middle, (15, 18, 14))))
    hu = np.full(shape, -1000.0)
    hu[far < 1.15], hu[far < 1.05], hu[far < 0.92], hu[far < 0.25] = 30, 900, 35, 5
    hu += random.normal(0, noise, shape)
    return hu, ((far < 0.92).astype(np.uint8) + (far < 0.25)).astype(np.uint8)


def chest(seed: int, noise: float = 25.0) -> tuple[NDArray, NDArray]:
    """A CT body with two lungs that fills its field of view, so that lungs are all the air there
    is.
    """
    random = np.random.default_rng(seed)
    shape = (48, 36, 30)
    at = np.indices(shape).astype(float)
    hu, labels = np.full(shape, 45.0), np.zeros(shape, np.uint8)
    for value, x in ((1, 14), (2, 34)):
        where = (
            sum(
                ((a - c) / r) ** 2
                for a, c, r in zip(at, (x + random.uniform(-1, 1), 18, 15), (8, 11, 12))
            )
            < 1
        )
        hu[where], labels[where] = -820, value
    hu[22:26, 28:34] = 700
    hu[:, :4] = -100
    return hu + random.normal(0, noise, shape), labels


def cropped(seed: int) -> tuple[NDArray, NDArray]:
    """A piece of soft tissue and bone without any air, in Hounsfield units."""
    random = np.random.default_rng(seed)
    hu = np.full((30, 32, 28), 50.0)
    hu[:8], hu[20:25, 10:20] = -95, 1100
    labels = np.zeros(hu.shape, np.uint8)
    labels[20:25, 10:20], labels[12:16, 5:9] = 1, 2
    return hu + random.normal(0, 12, hu.shape), labels


def dataset(
    folder: Path,
    scan: Callable[[int], tuple[NDArray, NDArray]],
    change: Callable[[int, NDArray], NDArray],
    *,
    channel: str = "CT",
    count: int = 6,
) -> list[Finding]:
    """What is found of units and padding in a set of changed scans."""
    for number in range(count):
        image, labels = scan(number)
        put(
            Volume(np.asfortranarray(change(number, image)), np.eye(4)),
            folder / f"imagesTr/c{number}_0000.nii.gz",
        )
        put(Volume(np.asfortranarray(labels), np.eye(4)), folder / f"labelsTr/c{number}.nii.gz")
    content = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    put_json(content, folder / "dataset.json")
    findings = check_dataset(read_dataset(folder)).findings
    return [one for one in findings if one.kind in ("units", "padding")]


def stored(image: NDArray) -> NDArray:
    return np.rint(image).astype(np.int16)


SCANS = {"head": head, "chest": chest}


@pytest.mark.parametrize("scan", [*SCANS.values(), cropped], ids=[*SCANS, "cropped"])
def test_hounsfield_units_are_no_finding(scan: Callable, tmp_path: Path):
    assert dataset(tmp_path, scan, lambda n, image: stored(image)) == []


@pytest.mark.parametrize("padding", [-2000, -3024])
def test_padding_of_ct_is_no_finding(padding: int, tmp_path: Path):
    def pad(number: int, image: NDArray) -> NDArray:
        image = stored(image)
        if number % 2:
            image[:3], image[-3:], image[:, :3] = padding, padding, padding
        return image

    assert dataset(tmp_path, head, pad) == []


@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
@pytest.mark.parametrize(("offset", "high"), [(1024, (1, 4)), (1000, (0,)), (1024, (0, 1, 2, 3))])
def test_scans_that_lie_higher_are_named(
    scan: Callable, offset: int, high: tuple[int, ...], tmp_path: Path
):
    found = dataset(tmp_path, scan, lambda n, image: stored(image + offset * (n in high)))
    assert {one.case for one in found} == {f"c{n}" for n in high}
    for one in found:
        assert (one.kind, one.severity, one.fixable) == ("units", "warning", False)
        about = int(one.message.split("about ")[1].split()[0])
        assert abs(about - offset) < 60


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("higher", lambda image: stored(image + 1024)),
        (
            "scaled to one",
            lambda image: ((np.clip(image, -1000, 1000) + 1000) / 2000).astype(np.float32),
        ),
        (
            "in bytes",
            lambda image: np.rint((np.clip(image, -1000, 1000) + 1000) / 2000 * 255).astype(
                np.uint8
            ),
        ),
    ],
)
def test_sets_of_which_no_scan_is_in_hounsfield_units_get_one_warning(
    name: str, change: Callable, tmp_path: Path
):
    found = dataset(tmp_path, head, lambda n, image: change(image))
    assert [(one.case, one.kind, one.severity) for one in found] == [("", "units", "warning")]


def test_an_intercept_that_was_applied_twice_is_named(tmp_path: Path):
    found = dataset(tmp_path, head, lambda n, image: stored(image - 1024 * (n == 3)))
    assert [one.case for one in found] == ["c3"]
    assert "lower" in found[0].message


@pytest.mark.parametrize("name", ["MRI", "CBCT", "PET"])
def test_only_what_is_called_ct_is_held_to_hounsfield_units(name: str, tmp_path: Path):
    found = dataset(tmp_path, head, lambda n, image: stored(image + 1024 * (n == 2)), channel=name)
    assert [one for one in found if one.kind == "units"] == []


def framed(value: float) -> Callable[[NDArray], NDArray]:
    def frame(image: NDArray) -> NDArray:
        image = image.copy()
        image[:4], image[:, -4:] = value, value
        return image

    return frame


def mr(seed: int) -> tuple[NDArray, NDArray]:
    hu, labels = head(seed)
    random = np.random.default_rng(seed)
    image = np.interp(hu, (-1000, 0, 1000), (0, 300, 700)) * random.uniform(0.7, 1.4)
    return np.abs(image + random.normal(0, 9, hu.shape)) + 1, labels


@pytest.mark.parametrize("value", [-1024.0, 5000.0, 333.0, -1.5e4])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_a_constant_around_mr_is_padding_unless_it_is_0(value: float, kind: type, tmp_path: Path):
    def pad(number: int, image: NDArray) -> NDArray:
        return (
            framed(value)(image) if number in (1, 5) else framed(0)(image) if number == 2 else image
        ).astype(kind)

    found = dataset(tmp_path, mr, pad, channel="MRI")
    assert {(one.case, one.kind, one.severity) for one in found} == {
        ("c1", "padding", "warning"), ("c5", "padding", "warning"),
    }  # fmt: skip
    assert all(f"{value:g}" in one.message for one in found)


def test_padding_of_all_scans_is_one_line(tmp_path: Path):
    found = dataset(
        tmp_path, mr, lambda n, image: framed(-7.0)(image).astype(np.float32), channel="T1"
    )
    assert [(one.case, one.kind) for one in found] == [("", "padding")]
    assert "6 of 6" in found[0].message


@pytest.mark.parametrize(
    "data",
    [
        np.random.default_rng(0)
        .integers(0, 30, (20, 20, 20))
        .astype(np.uint8),  # few values, each of them often
        np.random.default_rng(1).normal(0, 1, (20, 20, 20)).astype(np.float32),
        (np.random.default_rng(2).random((20, 20, 20)) * 900).astype(np.int16)
        * (np.indices((20,) * 3)[0] > 8),
        np.zeros((8, 8, 8), np.float32),
        np.full((8, 8, 8), np.nan, np.float32),
        (np.indices((9, 9, 9))[0] % 3).astype(np.float32),
    ],
    ids=["dark bytes", "noise", "zeros around", "empty", "no numbers", "three values"],
)
def test_images_as_they_are_have_no_padding(data: NDArray):
    assert levels_of("c", "MRI", data).padding is None


@pytest.mark.parametrize(
    ("name", "cases"), [("some", {"ct_002", "ct_005"}), ("all", {""}), ("none", set())]
)
def test_the_case_of_ct_that_is_no_hu(
    name: str, cases: set[str], shared_data: Path, tmp_path: Path
):
    make = shared_data / "cases/work/ct-not-hu/make.py"
    subprocess.run([sys.executable, make, tmp_path], check=True, cwd=ROOT, timeout=600)
    findings = check_dataset(read_dataset(tmp_path / name)).findings
    assert {one.case for one in findings} == cases
    assert all(one.severity == "warning" and not one.fixable for one in findings)


def test_the_sound_set_of_other_tests_has_neither(tmp_path: Path):
    folder = made.decathlon(tmp_path, 8)
    assert json.loads((folder / "dataset.json").read_text())["modality"] == {"0": "MRI"}
    assert check_dataset(read_dataset(folder)).findings == ()
