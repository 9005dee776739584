"""Workers on a Ray cluster: two nodes on this machine, of which workers, one node and the head are
killed. What needs no Ray is tested without it.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from making.cohort import COMMAND, TABLE, a_request, environment, make_list
from medseg.cohort import on_ray
from medseg.cohort.cluster import Cluster, Member, check_answers
from medseg.cohort.course import Limits
from medseg.cohort.part import Choice, Result, run_part
from medseg.cohort.resources import Measured
from medseg.errors import BadConfig, MedsegError

NODE = {"cpus": 8, "gpus": 0, "memory_bytes": 40}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """What starts a cluster of two nodes of one core; all are gone when the test ends."""
    pytest.importorskip("ray", reason='pip install "medseg[ray]"')
    from ray import cluster_utils

    variables = {
        "PYTHONPATH": environment()["PYTHONPATH"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # a minute else
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    clusters = []

    def begin() -> Any:
        of_node = {"num_cpus": 1, "object_store_memory": 80_000_000}
        head = of_node | {"include_dashboard": False}
        clusters.append(cluster_utils.Cluster(initialize_head=True, head_node_args=head))
        clusters[-1].other = clusters[-1].add_node(**of_node)
        return clusters[-1]

    yield begin
    for cluster in clusters:
        cluster.shutdown()


def run(folder: Path, names: list[str], on: str, **limits: Any) -> Result:
    """One run of the stand-ins over cases of these names, in `folder/out`."""
    cohort = make_list(folder / "scans", names)
    own = Limits(**({"workers": 2, "case_time_s": 600.0} | limits))
    return run_part(cohort, folder / "out", a_request(), Choice(), own, TABLE, on=on,
                    command=COMMAND)  # fmt: skip


def begun(folder: Path) -> dict[str, int]:
    """How many attempts at each case began."""
    return {
        path.name: sum("begun" in json.loads(line) for line in path.read_text().splitlines())
        for path in (folder / "out" / "attempts").glob("*/*")
    }


def once_some_are_done(folder: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something when the fifth case is done."""

    def wait() -> None:
        until = time.monotonic() + 600
        while len(list((folder / "out" / "records").glob("*/*.json"))) < 5:
            assert time.monotonic() < until
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_same_under_ray(start: Callable[[], Any], tmp_path: Path):
    """Of 100 scans one kills its process, one does so once, one is bad, and one each takes too much
    time, memory and windows; no other is touched.
    """
    names = [f"c{n:02}" for n in range(94)] + ["kills", "once", "bad", "slow", "large", "heavy"]
    limits = {"case_time_s": 15.0, "case_memory_bytes": 300_000_000}
    result = run(tmp_path, names, start().address, **limits)
    assert {name: status for name, status, _ in result.failures} == {
        "bad": "failed", "kills": "lost", "slow": "timeout", "large": "memory",
    }  # fmt: skip
    assert result.counts["done"] == 96
    several = {name: count for name, count in begun(tmp_path).items() if count > 1}
    assert several == {"kills": 2, "once": 2, "heavy": 2}
    assert not list(tmp_path.rglob(".medseg-*"))
    records = (tmp_path / "out" / "records").glob("*/*.json")
    pids = {json.loads(path.read_text()).get("pid") for path in records}
    assert len(pids - {None}) >= 4  # two at first, and fresh ones


def test_a_worker_and_then_a_node_that_are_killed_cost_no_case(
    start: Callable[[], Any], tmp_path: Path
):
    cluster = start()

    killed: list[int] = []

    def kill() -> None:
        import psutil

        for process in psutil.process_iter(["cmdline"]):
            name = (process.info["cmdline"] or [""])[0]
            ours = name.startswith("ray::Post") and process.parent()
            if ours and str(cluster.address) in " ".join(ours.cmdline()):
                process.kill()
                killed.append(process.pid)
                break
        cluster.remove_node(cluster.other, allow_graceful=False)

    acting = once_some_are_done(tmp_path, kill)
    names = [f"nap{n:02}" for n in range(30)]
    assert run(tmp_path, names, cluster.address).counts == {"done": 30, "waiting": 0}
    acting.join()
    assert killed
    attempts = begun(tmp_path)
    assert sum(attempts.values()) <= 32  # what two workers had in hand
    assert max(attempts.values()) <= 2


def test_a_head_that_is_gone_is_told_of_and_the_same_call_goes_on(
    start: Callable[[], Any], tmp_path: Path
):
    cluster = start()
    once_some_are_done(tmp_path, cluster.head_node.kill_gcs_server)
    names = [f"nap{n:02}" for n in range(60)]
    with pytest.raises(MedsegError, match="its head does not answer"):
        run(tmp_path, names, cluster.address, workers=1)
    done = set(begun(tmp_path))
    assert 5 <= len(done) < 60
    cluster.shutdown()
    assert run(tmp_path, names, start().address).counts == {"done": 60, "waiting": 0}
    several = [name for name, count in begun(tmp_path).items() if count > 1]
    assert len(several) <= 1


def test_without_ray_nothing_is_written(tmp_path: Path):
    with (
        mock.patch("medseg.cohort.cluster.find_spec", return_value=None),
        pytest.raises(BadConfig, match=r"pip install \"medseg\[ray\]"),
    ):
        run(tmp_path, ["a"], on="")
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_said_what_to_install():
    with (
        mock.patch.dict(sys.modules, {"ray": None}),
        pytest.raises(BadConfig, match=r'pip install "medseg\[ray\]"'),
    ):
        on_ray._join("")


def test_a_cluster_that_does_not_answer_is_refused_in_a_sentence(tmp_path: Path):
    command = (sys.executable, "-c", "pass")
    with (
        socket.create_server(("127.0.0.1", 0)) as other,  # listens, and is no cluster
        mock.patch("medseg.cohort.cluster.check_ray"),
        mock.patch("medseg.cohort.cluster.command_of", return_value=command),
        pytest.raises(BadConfig, match=r"no Ray cluster answers at 127\.0\.0\.1:\d+; start it"),
    ):
        run(tmp_path, ["a"], f"127.0.0.1:{other.getsockname()[1]}")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_where_nobody_listens_nothing_is_started(tmp_path: Path, scheme: str):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with (
        mock.patch("medseg.cohort.cluster.check_ray"),
        mock.patch("medseg.cohort.cluster.Cluster", side_effect=AssertionError),
        pytest.raises(BadConfig, match=f"no Ray cluster answers at {scheme}127.0.0.1:{port}"),
    ):
        run(tmp_path, ["a"], f"{scheme}127.0.0.1:{port}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["", "auto", "local", "host:port", "host:²"])
def test_what_ray_alone_understands_is_left_to_it(address: str):
    check_answers(address)


def test_a_node_that_is_not_like_this_one_is_refused(tmp_path: Path):
    (tmp_path / "cohort.json").write_text("{}")
    mark = (str(tmp_path / "cohort.json"), "0" * 64)
    assert "does not see the output folder" in on_ray._why_not(on_ray.__version__, mark)
    assert "install the same everywhere" in on_ray._why_not("0.0.0", None)
    assert on_ray._why_not(on_ray.__version__, None) == ""


def stand_in_cluster(*nodes: dict[str, int]) -> Cluster:
    cluster = Cluster.__new__(Cluster)
    cluster._nodes = list(nodes)
    cluster._need_bytes = 0
    cluster.hands = []
    return cluster


@pytest.mark.parametrize(
    ("one_s", "all_s", "left", "expected"),
    [
        (10.0, 10.0, 400, (12, 1)),  # eight cores, and memory for four of eight
        (10.0, 10.0, 3, (3, 1)),
        (10.0, 0.5, 400, (1, 8)),  # threads gain more than workers
        (1.0, 1.0, 2, (1, 8)),  # starting takes longer
    ],
)
def test_workers_are_as_many_as_cores_and_memory_of_all_nodes_allow(one_s, all_s, left, expected):
    cluster = stand_in_cluster(NODE | {"memory_bytes": 100}, NODE)
    costs = Measured(all_threads_s=all_s, one_thread_s=one_s, start_s=5, memory_bytes=10)
    limits = {"cases_left": left, "limit_bytes": None}
    assert cluster.choose(costs, **limits, on_gpu=False) == expected
    assert cluster._need_bytes == (10 if expected[1] == 1 else 0)


def test_each_gpu_of_a_cluster_gets_a_worker():
    cluster = stand_in_cluster(NODE | {"gpus": 2}, NODE | {"gpus": 1})
    costs = Measured(all_threads_s=1, one_thread_s=1, start_s=5, memory_bytes=10)
    assert cluster.choose(costs, cases_left=9, limit_bytes=None, on_gpu=True) == (3, 4)
    assert (cluster.cores, cluster.threads_of(4), cluster.threads_of(40)) == (8, 4, 1)


def test_workers_of_one_node_share_its_memory():
    cluster = stand_in_cluster(NODE)
    for node in "aab":
        member = Member(cluster, mock.Mock())
        member.note({"resident_bytes": 10, "usable_bytes": 80, "node": node, "gone": None})
        cluster.hands.append(member)
    assert [cluster.share_bytes(one, 3, None) for one in cluster.hands] == [50, 50, 90]
    assert [cluster.share_bytes(one, 3, 40) for one in cluster.hands] == [20, 20, 40]


def test_files_are_named_in_whole_for_workers_elsewhere(tmp_path: Path, monkeypatch: Any):
    from medseg.cohort.cases import Case, located

    monkeypatch.chdir(tmp_path)
    case = located(Case(name="a", images=("scans/a.nii", "s3://bucket/a.nii")))
    assert case.images == (str(tmp_path / "scans" / "a.nii"), "s3://bucket/a.nii")
