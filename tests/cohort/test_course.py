"""What follows when cases kill their process, hang, eat memory, fail or cannot be written.

Workers are real processes here, and what they do is made up (`making.cohort.stand_in`).
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from making.cohort import COMMAND, TABLE, a_request, make_list
from medseg.cohort import course, staff
from medseg.cohort.attempts import begin, history
from medseg.cohort.cases import Case, make_cohort
from medseg.cohort.course import Came, Limits
from medseg.cohort.part import Choice, Result, plan_part, run_part
from medseg.cohort.records import Outcome, read_outcome, write_failure
from medseg.cohort.resources import Measured, choose_workers
from medseg.errors import BadConfig, BadOutput, Interrupted, MedsegError
from medseg.inference import Settings
from medseg.labels import Label, LabelTable

ALL = Choice()


def run(folder: Path, names: list[str], *, choice: Choice = ALL, **limits: Any) -> Result:
    """One run of the stand-ins over cases of these names, in `folder/out`."""
    cohort = make_list(folder / "scans", names)
    limits = {"workers": 1, "case_time_s": 600.0} | limits
    return run_part(
        cohort, folder / "out", a_request(), choice, Limits(**limits), TABLE, command=COMMAND
    )


def record(folder: Path, name: str) -> dict[str, Any]:
    (path,) = (folder / "out" / "records").glob(f"*/{name}.json")
    return json.loads(path.read_text())


def begun(folder: Path, name: str) -> int:
    (path,) = (folder / "out" / "attempts").glob(f"*/{name}")
    return sum("begun" in json.loads(line) for line in path.read_text().splitlines())


def test_only_the_case_that_kills_its_process_is_lost_and_no_neighbour(tmp_path: Path):
    names = [f"c{n}" for n in range(8)] + ["kills", "once", "bad"]
    result = run(tmp_path, names, workers=2)
    assert result.counts == {"done": 9, "lost": 1, "failed": 1, "waiting": 0}
    assert result.exit_code == 3
    assert {name: status for name, status, _ in result.failures} == {
        "bad": "failed",
        "kills": "lost",
    }
    assert "by signal 9" in record(tmp_path, "kills")["error"]
    assert (begun(tmp_path, "kills"), begun(tmp_path, "once"), begun(tmp_path, "c3")) == (2, 2, 1)
    assert record(tmp_path, "once")["alone"]
    pids = [record(tmp_path, name).get("pid") for name in names]
    assert pids.count(record(tmp_path, "once")["pid"]) == 1  # in a fresh process
    assert not list(tmp_path.rglob(".medseg-*"))


def test_the_next_run_has_nothing_to_do_and_retries_only_what_is_asked(tmp_path: Path):
    names = ["a", "bad", "kills"]
    first = run(tmp_path, names)
    with mock.patch.object(
        course.Staff, "hire", side_effect=AssertionError("nothing is to be done")
    ):
        again = run(tmp_path, names)
    assert again.counts == first.counts
    assert again.failures == first.failures
    with mock.patch("medseg.cohort.part.Course.run", return_value=Came()) as doing:
        run(tmp_path, names, choice=Choice(retry=("failed",)))
    assert [item.case.name for item in doing.call_args.args[0]] == ["bad"]
    run(tmp_path, names, choice=Choice(retry=("all",)))
    assert (begun(tmp_path, "a"), begun(tmp_path, "bad"), begun(tmp_path, "kills")) == (1, 2, 4)
    assert record(tmp_path, "kills")["status"] == "lost"


def test_time_and_memory_of_a_case_are_limits_that_the_parent_holds(tmp_path: Path):
    slow = run(tmp_path / "slow", ["a", "slow"], case_time_s=1.0)
    assert slow.counts["timeout"] == slow.counts["done"] == 1
    assert "--case-time" in record(tmp_path / "slow", "slow")["error"]
    large = run(tmp_path / "large", ["a", "large"], case_memory_bytes=300_000_000)
    assert large.counts["memory"] == large.counts["done"] == 1
    assert begun(tmp_path / "slow", "slow") == 1  # nothing is to be learnt from the same limit


def test_what_needs_the_machine_for_itself_is_done_at_the_end(tmp_path: Path):
    result = run(tmp_path, ["heavy", "a", "b"])
    assert result.counts["done"] == 3
    assert record(tmp_path, "heavy")["alone"]
    assert not record(tmp_path, "a")["alone"]
    assert begun(tmp_path, "heavy") == 2


def test_a_place_that_cannot_be_written_stops_the_run_and_the_same_call_goes_on(tmp_path: Path):
    with pytest.raises(BadOutput, match="disk is full"):
        run(tmp_path, ["a", "b", "full"])
    assert begun(tmp_path, "full") == 1
    assert record(tmp_path, "a")["status"] == "done"
    with pytest.raises(BadOutput):
        run(tmp_path, ["a", "b", "full"])
    assert begun(tmp_path, "a") == 1
    known = history(
        next((tmp_path / "out" / "attempts").glob("*/full")), record(tmp_path, "a")["key"]
    )
    assert not known.is_suspect


def test_a_run_stops_early_where_too_many_fail(tmp_path: Path):
    names = [f"bad{n:02}" for n in range(30)]
    result = run(tmp_path, names, max_failed=3)
    assert result.counts["failed"] == 4
    assert result.counts["waiting"] == 26
    assert "--max-failed" in result.stopped
    share = run(tmp_path / "share", names, max_failed_share=0.5)
    assert share.counts["failed"] == 20


def test_workers_that_cannot_start_are_told_of_with_their_last_words(tmp_path: Path):
    command = (COMMAND[0], "-c", "import sys; sys.exit('no such library')")
    cohort = make_list(tmp_path, ["a"])
    with pytest.raises(Exception, match="no such library"):
        run_part(cohort, tmp_path / "out", a_request(), Choice(), Limits(), TABLE, command=command)


def test_a_stop_gives_up_what_is_in_hand_and_charges_nobody(tmp_path: Path):
    cohort = make_list(tmp_path, ["a", "b", "slow"])

    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append(done)
        if seen.count(2) > 2:  # the third case is in hand by then
            raise Interrupted(15)

    limits = Limits(workers=1, grace_s=0.2)
    with pytest.raises(Interrupted):
        run_part(
            cohort, tmp_path / "out", a_request(), Choice(), limits, TABLE,
            progress=progress, command=COMMAND,
        )  # fmt: skip
    (path,) = (tmp_path / "out" / "attempts").glob("*/slow")
    assert not history(path, record(tmp_path, "a")["key"]).is_suspect


def test_attempts_of_whose_end_nobody_knows_are_few(tmp_path: Path):
    """As where the memory of a whole job runs out, and takes the supervisor along."""
    names = ["a", "gone"]
    run(tmp_path, ["a"])
    key = run_keys(tmp_path, names)["gone"]
    path = tmp_path / "out" / "attempts"
    places = a_request().places(tmp_path / "out")
    for number in (1, 2, 3):
        begin(places.attempts("gone"), number=number, key=key, part="0/1", worker="x", at="")
    result = run(tmp_path, names)
    assert path.is_dir()
    assert result.counts == {"done": 1, "lost": 1, "waiting": 0}
    assert record(tmp_path, "gone")["status"] == "lost"


def run_keys(folder: Path, names: list[str]) -> dict[str, str]:
    request = a_request()
    cohort = make_list(folder / "scans", names)
    return {case.name: request.key(case, request.arithmetic({}) or "") for case in cohort.cases}


def test_another_scan_model_or_setting_is_done_anew_or_kept(tmp_path: Path):
    run(tmp_path, ["a", "b"])
    (tmp_path / "scans" / "a.nii").write_text("another scan")
    kept = run(tmp_path, ["a", "b"], choice=Choice(keep_others=True))
    assert kept.counts == {"done": 1, "skipped": 1, "waiting": 0}
    assert kept.exit_code == 0
    run(tmp_path, ["a", "b"])
    assert (begun(tmp_path, "a"), begun(tmp_path, "b")) == (2, 1)
    cohort = make_list(tmp_path / "scans", ["a", "b"])
    other = a_request(model={"name": "other"})
    run_part(cohort, tmp_path / "out", other, Choice(), Limits(workers=1), TABLE, command=COMMAND)
    assert (begun(tmp_path, "a"), begun(tmp_path, "b")) == (3, 2)


def test_parts_share_the_cases_out_and_know_of_each_other(tmp_path: Path):
    names = [f"c{n}" for n in range(7)]
    for number in range(2):
        result = run(tmp_path, names, choice=Choice(part=(number, 2)))
        assert result.exit_code == 0
    assert all(begun(tmp_path, name) == 1 for name in names)
    assert run(tmp_path, names).counts["done"] == 7


def test_workers_are_chosen_by_the_first_cases_and_all_are_done(tmp_path: Path):
    names = [f"c{n:02}" for n in range(9)] + ["kills"]
    chosen = mock.patch.object(staff, "choose_workers", return_value=(2, 1))
    hire = mock.patch.object(course.Staff, "hire", autospec=True, side_effect=course.Staff.hire)
    cores = mock.patch.object(staff, "cores_here", return_value=2)
    with chosen as choosing, cores, hire as hiring:
        result = run(tmp_path, names, workers=0)
    assert result.counts == {"done": 9, "lost": 1, "waiting": 0}
    (measured,) = choosing.call_args.args
    assert measured.all_threads_s > 0
    assert measured.memory_bytes == 1000
    assert choosing.call_args.kwargs["cases_left"] == 7
    threads = [call.args[1] for call in hiring.call_args_list]
    assert threads[:2] == [2, 1]


def test_a_first_worker_that_dies_is_replaced_until_it_is_clear_that_none_starts(tmp_path: Path):
    command = (COMMAND[0], "-c", "import sys; sys.exit('no such library')")
    cohort = make_list(tmp_path, ["a"])
    request = a_request(settings=Settings())  # so that a worker has to settle what 'auto' means
    with pytest.raises(MedsegError, match="no such library"):
        run_part(cohort, tmp_path / "out", request, Choice(), Limits(), TABLE, command=command)


@pytest.mark.parametrize("settings", [Settings(), a_request().settings])
def test_a_worker_that_hangs_at_its_start_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    monkeypatch.setattr(course.Staff, "start_limit_s", 0.5)
    command = (COMMAND[0], "-c", "import time; time.sleep(600)")
    cohort, request = make_list(tmp_path, ["a"]), a_request(settings=settings)
    with pytest.raises(MedsegError, match="do not start within 0 seconds"):
        run_part(
            cohort, tmp_path / "out", request, ALL, Limits(workers=1), TABLE, command=command
        )  # fmt: skip


def test_results_never_lie_among_the_scans(tmp_path: Path):
    cohort = make_list(tmp_path / "out" / "scans", ["a"])
    with pytest.raises(Exception, match="output folder"):
        run_part(cohort, tmp_path / "out", a_request(), Choice(), Limits(), TABLE, command=COMMAND)


@pytest.mark.parametrize(
    ("one_s", "all_s", "cores", "memory", "left", "expected"),
    [
        (10.0, 10.0, 4, 100, 400, (4, 1)),  # threads gain nothing
        (10.0, 2.5, 4, 100, 400, (1, 4)),  # threads gain all there is
        (10.0, 10.0, 4, 25, 400, (2, 2)),  # memory for two
        (10.0, 10.0, 4, 100, 1, (1, 4)),  # one case is left
        (10.0, 10.0, 1, 100, 400, (1, 1)),
        (1.0, 1.0, 4, 100, 6, (1, 4)),  # starting takes longer
    ],
)
def test_workers_are_as_many_as_promise_to_end_soonest(one_s, all_s, cores, memory, left, expected):
    measured = Measured(all_threads_s=all_s, one_thread_s=one_s, start_s=5, memory_bytes=10)
    chosen = choose_workers(measured, cores=cores, memory_bytes=memory, cases_left=left)
    assert chosen == expected


def test_another_file_of_the_same_size_and_time_is_another_scan(tmp_path: Path):
    images = [tmp_path / name for name in ("one.nii", "two.nii")]
    for path in images:
        path.write_text(path.stem)
        os.utime(path, ns=(10**18, 10**18))  # as an archive leaves them
    (tmp_path / "moved").mkdir()
    request = a_request()
    keys = [request.key(Case(name="a", images=(str(path),)), "") for path in images]
    assert keys[0] != keys[1]
    moved = images[0].rename(tmp_path / "moved" / "one.nii")
    assert request.key(Case(name="a", images=(str(moved),)), "") == keys[0]
    unsolved = Case(name="a", images=(str(moved),), problem="two images are called so")
    assert request.key(unsolved, "") != keys[0]


def test_what_values_mean_is_what_the_model_says_that_ran_last(tmp_path: Path):
    run(tmp_path, ["a"])
    assert LabelTable.read(tmp_path / "out" / "labels.csv") == TABLE
    table = LabelTable((Label(1, "spleen", (9, 9, 9)),))
    cohort, request = make_list(tmp_path / "scans", ["a"]), a_request(model={"name": "other"})
    run_part(
        cohort, tmp_path / "out", request, ALL, Limits(workers=1), table, command=COMMAND
    )  # fmt: skip
    assert LabelTable.read(tmp_path / "out" / "labels.csv") == table


def test_results_never_lie_inside_of_a_scan(tmp_path: Path):
    (tmp_path / "slices").mkdir()
    cohort = make_cohort(tmp_path, "folder", [Case(name="a", images=(str(tmp_path / "slices"),))])
    for out in (tmp_path / "slices" / "deep" / "out", tmp_path / "slices"):
        with pytest.raises(BadConfig, match="all of which is one scan"):
            run_part(cohort, out, a_request(), ALL, Limits(), TABLE, command=COMMAND)
    assert not list((tmp_path / "slices").iterdir())


def test_label_maps_that_would_be_one_file_are_refused(tmp_path: Path):
    images = [str(tmp_path / f"sub-1_{name}_T1w.nii.gz") for name in ("foo-1_bar-2", "foo-1b_ar-2")]
    cases = [Case(name=f"c{n}", images=(image,)) for n, image in enumerate(images)]
    cohort = make_cohort(tmp_path, "bids", cases)
    request = a_request(layout="bids")
    for do in (plan_part, partial(run_part, limits=Limits(), table=TABLE, command=COMMAND)):
        with pytest.raises(BadConfig, match="c0 and c1 would be one file"):
            do(cohort, tmp_path / "out", request, choice=ALL)


def test_a_record_that_a_power_cut_left_is_none(tmp_path: Path):
    path = tmp_path / "a.json"
    write_failure(path, {"case": "a", "key": "0" * 64, "attempt": 1}, status="done", notes="x" * 99)
    assert read_outcome(path) == Outcome(status="done", key="0" * 64, attempt=1)
    content = path.read_bytes()
    at = content.index(b"xxx")
    path.write_bytes(content[:at] + bytes(50) + content[at + 50 :])
    assert read_outcome(path) is None


def test_a_record_whose_folder_cannot_be_made_stops_with_a_sentence(tmp_path: Path):
    (tmp_path / "records").write_text("a file where a folder should be")
    with pytest.raises(BadOutput, match="cannot be written"):
        write_failure(tmp_path / "records" / "ab" / "a.json", {"case": "a"}, status="failed")
