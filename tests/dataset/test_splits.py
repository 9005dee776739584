"""Splits keep every structure on both sides where cases allow, and are what they were where all
cases are alike.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from medseg.dataset.cases import Case, Dataset
from medseg.dataset.splits import covering, lacking, split_cases
from medseg.labels import LabelTable


def dataset_of(count: int, groups: list[str | None] | None = None) -> Dataset:
    groups = groups or [None] * count
    cases = [
        Case(name=f"c{n:03d}", images=(Path("x"),), label=Path("y"), group=group)
        for n, group in enumerate(groups)
    ]
    return Dataset(
        folder=Path(),
        layout="folders",
        name="x",
        cases=tuple(cases),
        channels=("image",),
        table=LabelTable.from_values([1]),
    )


def held_by(**holders: list[int]) -> dict[str, set[str]]:
    """Case -> structures, of structure -> numbers of cases."""
    held: dict[str, set[str]] = {}
    for structure, numbers in holders.items():
        for number in numbers:
            held.setdefault(f"c{number:03d}", set()).add(structure)
    return held


@pytest.mark.parametrize("seed", range(6))
def test_alike_cases_are_split_by_names_alone(seed: int):
    """Each group, the largest first, goes to the smallest part, in an order that a hash draws."""
    random = np.random.default_rng(seed)
    groups = [None if random.random() < 0.6 else f"p{random.integers(9)}" for _ in range(40)]
    dataset = dataset_of(40, groups)
    members: dict[str, list[str]] = {}
    for case in dataset.cases:
        members.setdefault(f"group {case.group}" if case.group else f"case {case.name}", []).append(
            case.name
        )
    parts: list[list[str]] = [[], [], [], []]
    for group in sorted(
        members,
        key=lambda g: (-len(members[g]), hashlib.sha256(f"{seed}:{g}".encode()).hexdigest()),
    ):
        min(parts, key=len).extend(members[group])
    expected = [sorted(part) for part in parts]
    for holdings in (None, {case.name: {"a", "b"} for case in dataset.cases}):
        assert [val for _, val in split_cases(dataset, 4, seed, holdings=holdings)] == expected


RARE = {
    "one structure in a few": held_by(a=range(20), b=[3, 4, 8, 9, 11]),
    "most cases are empty": held_by(a=[1, 5, 9, 13, 17], b=[1, 5, 9, 13, 17]),
    "two that exclude each other": held_by(a=[0, 1, 2, 3, 4, 5], b=[6, 7, 8, 9, 10, 11]),
    "five lesions": held_by(
        **{f"l{k}": [k, k + 5, k + 10, k + 15, (k + 1) % 20] for k in range(5)}
    ),
}


@pytest.mark.parametrize("held", RARE.values(), ids=RARE)
def test_a_structure_that_as_many_cases_hold_as_there_are_folds_is_on_both_sides_of_all(
    held: dict[str, set[str]],
):
    dataset = dataset_of(20)
    structures = sorted({one for held_here in held.values() for one in held_here})
    splits = split_cases(dataset, 5, holdings=held)
    for training, validation in splits:
        assert lacking(structures, training, held) == lacking(structures, validation, held) == []
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(name for _, validation in splits for name in validation) == [
        c.name for c in dataset.cases
    ]


@pytest.mark.parametrize(("first", "second"), [(3, 4), (0, 19), (7, 12)])
def test_what_two_cases_hold_is_on_both_sides_of_the_usual_fold(first: int, second: int):
    held = held_by(a=[first, second])
    training, validation = split_cases(dataset_of(20), 5, holdings=held)[0]
    assert lacking(["a"], training, held) == lacking(["a"], validation, held) == []


@pytest.mark.parametrize("only", [2, 9, 15])
def test_what_one_case_holds_is_trained_with_in_the_usual_fold(only: int):
    held = held_by(a=[only], b=range(20))
    splits = split_cases(dataset_of(20), 5, holdings=held)
    for number, (training, validation) in enumerate(splits):
        assert lacking(["a"], training, held) == (["a"] if number == 4 else [])
        assert (f"c{only:03d}" in validation) == (number == 4)


def test_groups_are_kept_together_and_count_once():
    """Two patients hold the structure, with three scans each: one patient is on each side."""
    groups: list[str | None] = [f"p{n // 3}" for n in range(18)]
    held = held_by(a=[0, 1, 2, 15, 16, 17])
    for training, validation in split_cases(dataset_of(18, groups), 2, holdings=held):
        assert lacking(["a"], training, held) == lacking(["a"], validation, held) == []
        assert len(validation) == 9
        patients = [{int(name[1:]) // 3 for name in side} for side in (training, validation)]
        assert not patients[0] & patients[1]


@pytest.mark.parametrize("seed", range(20))
def test_no_part_is_empty_however_structures_lie(seed: int):
    random = np.random.default_rng(seed)
    count, folds = int(random.integers(6, 40)), int(random.integers(2, 6))
    held = held_by(**{f"s{k}": list(np.flatnonzero(random.random(count) < 0.2)) for k in range(8)})
    sizes = [
        len(validation) for _, validation in split_cases(dataset_of(count), folds, holdings=held)
    ]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_scans_looked_at_in_between_hold_what_can_be_seen():
    names = [f"c{n:03d}" for n in range(6)]
    held = held_by(a=[0, 1, 2], b=[4], c=[5])
    assert covering(names, 2, held_by(a=range(6))) == names[:2]
    assert lacking(["a", "b", "c"], covering(names, 3, held), held) == []
    assert covering(names, 9, held) == names
    assert covering(names, 3, {}) == names[:3]
