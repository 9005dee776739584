"""Cohorts for tests: made-up scans, a worker that needs no network, and cases that are trouble."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from making.places import ROOT, python_path
from medseg.cohort.cases import Case, Cohort, make_cohort
from medseg.cohort.request import Request
from medseg.labels import Label, LabelTable

TABLE = LabelTable((Label(1, "a", (200, 30, 30)),))
#: A worker that does what the name of a file says, and else writes a record; see `stand_in`.
_BEGIN = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
COMMAND = (sys.executable, "-c", f"{_BEGIN}from making.cohort import stand_in; stand_in()")
#: The same where folders of this machine count as a store, too.
LOCAL_COMMAND = (*COMMAND[:2], COMMAND[2].replace("stand_in()", "stand_in(local=True)"))


def make_list(folder: Path, names: list[str]) -> Cohort:
    """Cases of which each has a small file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / f"{name}.nii"
        if not path.exists():  # else it would be another scan
            path.write_text(name)
    cases = [Case(name=name, images=(str(folder / f"{name}.nii"),)) for name in names]
    return make_cohort(folder, "list", cases)


def a_request(**changes: Any) -> Request:
    """A request to a model by intensity, whose arithmetic is settled from the start."""
    from medseg.inference import Settings

    settings = Settings(device="cpu", precision="fp32")
    values: dict[str, Any] = {"models": ("otsu",), "model": {"name": "otsu"}, "settings": settings}
    return Request(**(values | changes))


def stand_in(local: bool = False) -> None:
    """A worker whose work is made up, by the name of the case. local: folders of this machine count
    as a store, too.

    At kills... the process dies, at once... the first time; at slow... it sleeps, at nap... for a
    moment, at large... it takes memory; heavy... is put off, bad... fails, and of full... nothing
    can be written.
    """
    from unittest import mock

    from medseg.cohort import work, worker

    with (
        local_stores() if local else nullcontext(),
        mock.patch.object(work, "_do", _made_up),
        mock.patch("medseg.inference.load_model", lambda *names, **rest: "otsu"),
        mock.patch("medseg.inference.limit_threads", lambda count: None),
        mock.patch("medseg.inference.use_settled", lambda settled: None),
    ):
        worker.main()


@contextmanager
def local_stores() -> Iterator[None]:
    """Let folders of this machine be stores, as local:///tmp/out."""
    from unittest import mock

    from medseg.cohort import stores

    def options(kind: str) -> dict[str, Any]:
        return {"auto_mkdir": True} if kind == "local" else {}

    with (
        mock.patch.dict(stores.PACKAGES, {"local": "fsspec"}),
        mock.patch.object(stores, "_options", options),
    ):
        yield


def _made_up(task: Any, own: Any, wait_s: float = 0.0) -> Any:
    from medseg.cohort.records import write_failure
    from medseg.cohort.work import Ended

    name, places = task.case.name, own.request.places(own.out)
    if name.startswith("kills") or (name.startswith("once") and task.attempt == 1):
        (places.labels(task.case).parent).mkdir(parents=True, exist_ok=True)
        (places.labels(task.case).parent / f".medseg-{'0' * 24}").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("nap"):
        time.sleep(0.5)
    if name.startswith("slow"):
        time.sleep(600)
    if name.startswith("large"):
        held = np.ones(40_000_000)
        time.sleep(600 + held[0])
    if name.startswith("heavy") and not task.is_alone:
        return Ended(status="put off", seconds=0.1)
    if name.startswith("full"):
        return Ended(status="stop", error="the disk is full", exit_code=4)
    about = {"case": name, "key": task.key, "attempt": task.attempt, "alone": task.is_alone}
    about |= {"pid": os.getpid(), "settings_sha256": own.request.settings_sha256}
    status, error = ("failed", "it is bad") if name.startswith("bad") else ("done", "")
    places.labels(task.case).parent.mkdir(parents=True, exist_ok=True)
    places.labels(task.case).write_bytes(name.encode())
    write_failure(places.record(name), about, status=status, error=error)
    return Ended(status=status, error=error, seconds=0.01, windows=8, memory_bytes=1000)


def environment() -> dict[str, str]:
    """Variables with which another process finds medseg and what tests make."""
    return os.environ | {"PYTHONPATH": python_path()}


def write_records(out: Path, listed: Path, count: int, outliers: int = 0) -> list[str]:
    """The output of a cohort of made-up heads, as if all were done; returns the names of outliers.

    Volumes of 32 structures vary together by 10 % and each by 6 %, confidence by 1 %. An outlier
    has a structure of a third or three times its volume, or none of one, or one that is not
    confident.
    """
    import json

    from medseg.cohort.cases import Case, make_cohort
    from medseg.cohort.places import Places
    from medseg.cohort.request import write_cohort
    from medseg.inference import FORMAT

    names = [f"{side} part{n:02d}" for n in range(16) for side in ("left", "right")]
    table = LabelTable(tuple(Label(n + 1, name, (9, 9, 9)) for n, name in enumerate(names)))
    request, places = a_request(), Places(out=out)
    cases = [
        Case(name=f"c{n:06d}", images=(f"/data/c{n:06d}.nii.gz",), carried=(str(n % 7),))
        for n in range(count)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_cohort(places, make_cohort(listed, "list", cases, ("site",)), request)
    table.write(places.table)
    chance = np.random.default_rng(0)
    usual = chance.uniform(0.5, 200, 16).repeat(2)
    spread = np.exp(chance.normal(0, 0.1, (count, 1)) + chance.normal(0, 0.06, (count, 32)))
    volumes, sure = usual * spread, chance.normal(0.9, 0.01, (count, 32))
    planted = np.sort(chance.permutation(count)[:outliers])
    for number, row in enumerate(planted):
        part = int(chance.integers(32))
        volumes[row, part] *= (3.0, 1 / 3, 0.0, 1.0)[number % 4]
        sure[row, part] -= 0.3 * (number % 4 == 3)
    key = request.key(cases[0], "cpu float32 exact torch")
    about = {
        "key": key, "attempt": 1, "part": "0/1", "worker": "00", "device_name": "a processor",
        "settings_sha256": request.settings_sha256, "started": "2026-01-01T00:00:00+00:00",
        "status": "done", "versions": {"medseg": "0.1.0", "torch": "2.10"},
    }  # fmt: skip
    scan = {"voxels_sha256": "0" * 64, "shape": [256, 256, 180], "spacing_mm": [1.0, 1.0, 1.0]}
    rest = {
        "settings": {"precision": "float32", "backend": "torch"}, "warnings": [], "notes": [],
        "seconds": {"read": 0.1, "network": 1.5, "write": 0.1}, "peak_memory_bytes": 10**9,
        "finished": "2026-01-01T00:00:02+00:00", "model": {"name": "otsu"},
        "input": scan | {"orientation": "RAS"},
    }  # fmt: skip
    intensities = {"mean": 100.0, "sd": 10.0, "median": 100.0}
    for n, case in enumerate(cases):
        structures = [
            {"value": v + 1, "name": names[v], "voxels": int(1000 * ml), "ml": round(float(ml), 3)}
            | {"confidence": round(float(sure[n, v]), 3)}
            | intensities
            for v, ml in enumerate(volumes[n])
        ]
        record = {"format": FORMAT, "case": case.name} | about | rest | {"structures": structures}
        path = places.record(case.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    return [cases[row].name for row in planted]
