"""Run as a program: what happens to files when their writer is killed or the disk is full; prints
JSON.

python writing.py kill SUFFIX COUNT FOLDER | python writing.py full FOLDER |
python writing.py forbidden FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from medseg import io
from medseg.errors import BadOutput
from medseg.volume import Volume


def volume(value: int) -> Volume:
    """A volume of 2 MB of noise, so that writing takes long enough to be interrupted."""
    return Volume(
        np.random.default_rng(value).integers(0, 255, (100, 100, 200)).astype(np.uint8), np.eye(4)
    )


def kill(suffix: str, count: int, folder: Path) -> dict[str, int]:
    """Kill a writer `count` times at random moments: how often the file was whole or broken;
    leftovers.
    """
    path = folder / f"x{suffix}"
    volumes = [volume(0), volume(1)]
    chance = random.Random(5)
    counts = {"whole": 0, "broken": 0}
    io.write(volumes[0], path)
    for _ in range(count):
        child = os.fork()
        if child == 0:
            while True:
                for each in volumes:
                    io.write(each, path)
        time.sleep(chance.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with contextlib.suppress(Exception):
            found = io.read(path).data
            counts["whole"] += any(np.array_equal(found, each.data) for each in volumes)
    counts["broken"] = count - counts["whole"]
    counts["leftovers"] = len(list(folder.glob(".medseg-*")))
    return counts


def full(folder: Path) -> dict[str, object]:
    """Write over a good file while files may only be 100 kB large."""
    path = folder / "x.nii.gz"
    io.write(volume(0), path)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return _attempt(path, before)


def forbidden(folder: Path) -> dict[str, object]:
    """Write over a good file in a folder where nothing may be changed, as an ordinary user."""
    path = folder / "x.nii.gz"
    io.write(volume(0), path)
    before = path.read_bytes()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    report = _attempt(path, None)
    with contextlib.suppress(PermissionError):
        os.seteuid(0)
    folder.chmod(0o755)
    return {**report, "old file stays": path.read_bytes() == before}


def _attempt(path: Path, before: bytes | None) -> dict[str, object]:
    message = ""
    try:
        io.write(volume(1), path)
    except BadOutput as error:
        message = str(error)
    leftovers = [] if before is None else list(path.parent.glob(".medseg-*"))
    return {
        "message": message,
        "old file stays": before is None or path.read_bytes() == before,
        "leftovers": len(leftovers),
    }


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        print(json.dumps(kill(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        print(json.dumps({"full": full, "forbidden": forbidden}[sys.argv[1]](Path(sys.argv[2]))))
