"""Structures that few cases hold accuse nobody of mirroring, and cases that are mirrored are found
beside them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from making.datasets import make_case, put, put_json
from making.places import ROOT
from medseg.dataset.cases import Finding
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.reading import read_dataset
from medseg.volume import Volume

COUNT = 20


def third(labels: NDArray, seed: int) -> NDArray:
    """A large structure on one side, beside the two that all cases have."""
    random = np.random.default_rng(seed)
    labels = labels.copy()
    i, j, k = (int(n * part) for n, part in zip(labels.shape, random.uniform(0.6, 0.75, 3)))
    labels[i - 4 : i + 4, j - 5 : j + 5, k - 4 : k + 4] = 3
    return labels


def dataset(folder: Path, change: Callable[[int, NDArray], NDArray]) -> list[Finding]:
    """What is found of mirroring in a set of changed label maps."""
    for number in range(COUNT):
        image, labels = make_case(number)
        put(image, folder / f"imagesTr/c{number:02d}_0000.nii.gz")
        changed = np.asfortranarray(change(number, labels.data))
        put(Volume(changed, labels.affine), folder / f"labelsTr/c{number:02d}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "front": 1, "back": 2, "third": 3},
        "numTraining": COUNT,
        "file_ending": ".nii.gz",
    }
    put_json(content, folder / "dataset.json")
    return [one for one in check_dataset(read_dataset(folder)).findings if one.kind == "mirrored"]


@pytest.mark.parametrize("holders", [(3,), (0, 7, 11), (2, 5, 9, 13, 17)])
def test_a_large_structure_of_few_accuses_nobody(holders: tuple[int, ...], tmp_path: Path):
    assert dataset(tmp_path, lambda n, labels: third(labels, n) if n in holders else labels) == []


@pytest.mark.parametrize("lacking", [1, 2])
@pytest.mark.parametrize("holders", [(1, 6), (0, 4, 8, 12), tuple(range(0, 20, 2))])
def test_one_of_two_structures_in_few_accuses_nobody(
    lacking: int, holders: tuple[int, ...], tmp_path: Path
):
    def change(number: int, labels: NDArray) -> NDArray:
        return labels if number in holders else np.where(labels == lacking, 0, labels)

    assert dataset(tmp_path, change) == []


@pytest.mark.parametrize("mirrored", [4, 7, 16])
def test_labels_that_are_mirrored_are_found_where_some_cases_lack_a_structure(
    mirrored: int, tmp_path: Path
):
    holders = (0, 7, 11)

    def change(number: int, labels: NDArray) -> NDArray:
        labels = third(labels, number) if number in holders else labels
        return labels[::-1] if number == mirrored else labels

    found = dataset(tmp_path, change)
    assert {one.case for one in found} == {f"c{mirrored:02d}"}
    assert all(one.severity == "error" for one in found)


@pytest.mark.parametrize("name", ["few_second", "few_first", "control"])
def test_the_case_of_a_partial_class(name: str, shared_data: Path, tmp_path: Path):
    make = shared_data / "cases/work/partial-class-mirrored/make.py"
    subprocess.run([sys.executable, make, shared_data, tmp_path], check=True, cwd=ROOT, timeout=600)
    check = check_dataset(read_dataset(tmp_path / name))
    assert [one for one in check.findings if one.kind == "mirrored"] == []
    assert check.errors == ()
