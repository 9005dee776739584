"""What a cohort costs beside its segmentations: CPU and memory of lists, records and tiny scans.

python tests/benchmarks/bench_cohort.py records 40000    a list, a dry run, and gather twice
python tests/benchmarks/bench_cohort.py scans 3000       scans of 16^3, a worker at work
python tests/benchmarks/bench_cohort.py outliers 5000    where planted outliers stand in the report,
                                                         and how long Chromium takes to open it
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from making.browser import chromium  # noqa: E402
from making.cohort import environment, write_records  # noqa: E402
from making.networks import affine_of, save_nifti, save_unet  # noqa: E402


def medseg(*arguments: object) -> dict[str, Any]:
    """Run a command; CPU seconds, its largest memory, its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "medseg", *map(str, arguments)]
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as out_file,
        tempfile.TemporaryFile("w+") as err_file,
        subprocess.Popen(command, env=environment(), stdout=out_file, stderr=err_file) as process,
    ):
        largest_mb = 0
        while process.poll() is None:
            largest_mb = max(largest_mb, _peak_mb(process.pid))
            time.sleep(0.05)
        out_file.seek(0)
        err_file.seek(0)
        out, err = out_file.read(), err_file.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(time.perf_counter() - began, 2),
        "largest_mb": largest_mb,
        "exit": process.returncode,
        "lines": len(out.splitlines()),
        "out": out[-300:],
        "err": err[-300:],
    }


def _peak_mb(pid: int) -> int:
    """Largest resident memory of a process so far; getrusage counts what started it, too."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    return 0


def show(name: str, measured: dict[str, Any]) -> None:
    print(name, json.dumps(measured), "load", os.getloadavg()[0], flush=True)


def records(folder: Path, count: int) -> None:
    rows = "".join(f"c{n:06d},/data/c{n:06d}.nii.gz,{n % 7}\n" for n in range(count))
    (folder / "list.csv").write_text("case,image,site\n" + rows)
    batch = ("batch", folder / "list.csv", "-o", folder / "out", "-m", "brain-fast", "--dry-run")
    show("dry run of nothing", medseg(*batch))
    write_records(folder / "out", folder / "list.csv", count)
    show("dry run of records", medseg(*batch))
    digests = []
    for _ in range(2):
        show("gather", medseg("gather", folder / "out"))
        digest = hashlib.sha256()
        for path in sorted((folder / "out").glob("*.*")):
            digest.update(path.read_bytes())
        digests.append(digest.hexdigest())
    print("the same bytes twice:", digests[0] == digests[1])


def scans(folder: Path, count: int) -> None:
    save_unet(folder / "model")
    (folder / "scans").mkdir()
    chance = np.random.default_rng(0)
    for n in range(count):
        data = chance.normal(100, 20, (16, 16, 16)).astype(np.float32)
        save_nifti(folder / "scans" / f"s{n:05d}.nii.gz", data, affine_of())
    batch = ("batch", folder / "scans", "-m", folder / "model", "--workers", 1)
    show("begin (compiles)", medseg(*batch, "-o", folder / "warm", "--shard", f"0/{count}"))
    start = medseg(*batch, "-o", folder / "start", "--shard", f"0/{count}")
    show("one case", start)
    whole = medseg(*batch, "-o", folder / "out")
    show("all cases", whole)
    print("CPU ms a case:", 1000 * (whole["cpu_s"] - start["cpu_s"]) / (count - 1))
    names = sorted((folder / "out" / "records").glob("*/*.json"), key=lambda path: path.name)
    contents = [json.loads(path.read_text()) for path in names]
    inside = sum(sum(one["seconds"].values()) for one in contents[1:]) / (count - 1)
    print("of these in the segmentation, wall ms:", 1000 * inside)
    peaks = [one["peak_memory_bytes"] / 1e6 for one in contents]
    print("peak memory of the 100th and the last, MB:", peaks[min(99, count - 1)], peaks[-1])


def outliers(folder: Path, count: int) -> None:
    planted = write_records(folder / "out", folder / "list.csv", count, outliers=20)
    show("gather", medseg("gather", folder / "out"))
    text = (folder / "out" / "report.html").read_text()
    rows = json.loads(text.split('id="rows">')[1].split("</script>")[0])
    order = [row[0] for row in rows]
    print("ranks of the planted:", sorted(order.index(name) + 1 for name in planted))
    with chromium(folder) as browser:
        began = time.perf_counter()
        browser.open((folder / "out" / "report.html").as_uri(), state=None)
        browser.png()
        print("s until Chromium has drawn the index:", round(time.perf_counter() - began, 2))


def kills(folder: Path, count: int) -> None:
    save_unet(folder / "model")
    (folder / "scans").mkdir()
    chance = np.random.default_rng()
    for n in range(count):
        data = chance.normal(100, 20, (16, 16, 16)).astype(np.float32)
        save_nifti(folder / "scans" / f"s{n:03d}.nii.gz", data, affine_of())
    batch = ("batch", folder / "scans", "-m", folder / "model", "--workers", "1")
    show("plain", medseg(*batch, "-o", folder / "plain"))
    killed = 0
    for turn in range(8):
        parts = [_start(*batch, "-o", folder / "out", "--shard", f"{n}/4") for n in range(4)]
        while any(part.poll() is None for part in parts):
            time.sleep(float(chance.uniform(0.2, 2.0)))
            begun = len(list((folder / "out").glob("attempts/*/*")))
            alive = [part for part in parts if part.poll() is None]
            if killed < 5 and alive and begun > killed * count // 6:
                _kill_one(alive[int(chance.integers(len(alive)))], worker=bool(chance.integers(2)))
                killed += 1
        codes = [part.returncode for part in parts]
        print("turn", turn, "exits", codes, "kills so far", killed, flush=True)
        if killed == 5 and codes == [0] * 4:
            break
    again = [
        path.name
        for path in sorted((folder / "out").glob("attempts/*/*"))
        if path.read_text().count('"begun"') > 1
    ]
    labels = sorted((folder / "out" / "cases").glob("*/*/*_seg.nii.gz"))
    plain = sorted((folder / "plain" / "cases").glob("*/*/*_seg.nii.gz"))
    equal = [a.read_bytes() == b.read_bytes() for a, b in zip(labels, plain)]
    print(
        "records:", len(list((folder / "out").glob("records/*/*.json"))), "done twice:", len(again)
    )
    print("labels equal to the bit:", sum(equal), "of", len(plain))
    print("temporary files:", len(list((folder / "out").rglob(".medseg-*"))))


def _start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medseg", *map(str, arguments)]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment(), stdout=null, stderr=null)


def _kill_one(part: subprocess.Popen[bytes], *, worker: bool) -> None:
    """Kill a part, or its worker."""
    place = Path(f"/proc/{part.pid}/task/{part.pid}/children")
    pids = [int(one) for one in place.read_text().split()] if worker else []
    with suppress(OSError):
        os.kill((pids or [part.pid])[0], signal.SIGKILL)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        {"records": records, "scans": scans, "outliers": outliers, "kills": kills}[sys.argv[1]](
            Path(place), int(sys.argv[2])
        )
