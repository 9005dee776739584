"""Parts of a cohort, by hand and as schedulers number them."""

from __future__ import annotations

import pytest

from medseg.cohort.cases import Case, part_of
from medseg.cohort.shards import parse_shard
from medseg.errors import BadConfig


def test_parts_are_disjoint_and_together_everything():
    cases = [Case(name=f"{n:03}", images=()) for n in range(23)]
    parts = [part_of(cases, (number, 5)) for number in range(5)]
    assert sorted((case for part in parts for case in part), key=lambda case: case.name) == cases
    assert {len(part) for part in parts} == {4, 5}


@pytest.mark.parametrize("part", [(-1, 3), (3, 3), (0, 0)])
def test_a_part_that_is_none_is_refused(part: tuple[int, int]):
    with pytest.raises(BadConfig, match="numbered from 0"):
        part_of([Case(name="a", images=())], part)


def array(task: int, first: int, last: int, count: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": first, "MAX": last, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        (array(3, 0, 9, 10), (3, 10)),
        (array(1, 1, 10, 10), (0, 10)),
        (array(14, 0, 14, 3), (2, 3)),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "4"}, (0, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
    ],
)
def test_auto_is_what_the_scheduler_says(monkeypatch: pytest.MonkeyPatch, variables, part):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parse_shard("auto") == part


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JOB_COMPLETION_INDEX": "3"},
        {"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "4"},
        array(5, 0, 9, 3),
        array(1, 1, 4, 3),  # 1, 2 and 4: the first must not begin what the last refuses
        {"SLURM_ARRAY_TASK_ID": "5"},
    ],
)
def test_auto_never_guesses(monkeypatch: pytest.MonkeyPatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadConfig, match="--shard auto"):
        parse_shard("auto")


@pytest.mark.parametrize("text", ["", "1", "a/b", "-1/3", "3/3", "1/0", "1/2/3", "1.0/2"])
def test_other_texts_are_refused(text: str):
    with pytest.raises(BadConfig, match="--shard"):
        parse_shard(text)
