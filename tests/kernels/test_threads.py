"""Work shared out over threads."""

from __future__ import annotations

import threading

import pytest

from medseg.kernels.threads import in_parallel


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("units", [0, 1, 7, 100])
def test_every_unit_is_worked_on_once(units, workers):
    done = []
    in_parallel(done.append, units, workers)
    assert sorted(done) == list(range(units))


def test_units_are_worked_on_at_the_same_time():
    both = threading.Barrier(2, timeout=20)
    in_parallel(lambda unit: both.wait(), 2, 2)
    assert not both.broken


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_an_error_reaches_the_caller_and_nothing_goes_on_after_it(bad):
    def work(unit: int) -> None:
        if unit == bad:
            raise ValueError(f"unit {unit}")
        working.append(unit)

    working: list[int] = []
    with pytest.raises(ValueError, match=f"unit {bad}"):
        in_parallel(work, 10, 3)
    count = len(working)
    assert bad not in working
    in_parallel(lambda unit: None, 3, 3)
    assert len(working) == count


def test_several_threads_may_share_out_work_at_once():
    results: dict[int, list[int]] = {n: [] for n in range(6)}
    callers = [
        threading.Thread(target=in_parallel, args=(results[n].append, 50, 3)) for n in results
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert all(sorted(done) == list(range(50)) for done in results.values())
