"""Run as a program: mutate a file many times, read each with medseg, and print as JSON what
happened.

python fuzzing.py SUFFIX COUNT SEED FOLDER
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from medseg import io
from medseg.errors import BadFile
from medseg.volume import Volume


def mutated(content: bytes, chance: random.Random, header: int) -> bytes:
    """One to eight bytes overwritten (70 %), a part cut off (15 %) or bytes inserted (15 %), mostly
    in the header.
    """
    out = bytearray(content)
    where = min(header, len(out)) if chance.random() < 0.6 else len(out)
    kind = chance.random()
    if kind < 0.7:
        for _ in range(chance.randint(1, 8)):
            out[chance.randrange(where)] = chance.randrange(256)
    elif kind < 0.85:
        del out[chance.randrange(len(out)) :]
    else:
        place = chance.randrange(where)
        out[place:place] = chance.randbytes(chance.randint(1, 16))
    return bytes(out)


def scan(suffix: str) -> Volume:
    """A volume of about 40 kB whose voxels and geometry are all different from each other's."""
    values = (
        np.random.default_rng(7)
        .integers(0, 200, (20, 24, 28))
        .astype(np.uint8 if "seg" in suffix else np.int16)
    )
    affine = np.array(
        [[0.1, -1.9, 0.3, -40], [-0.9, -0.2, 0.5, 25], [-0.28, -0.58, -3.6, 70], [0, 0, 0, 1.0]]
    )
    left, _, right = np.linalg.svd(affine[:3, :3] / (1, 2, 3.5))
    affine[:3, :3] = (left @ right) * (1, 2, 3.5)
    return Volume(values, affine)


def outcome(path: Path, truth: Volume, *, volume_index: int | None = None) -> str:
    """'same', 'refused', 'other voxels', 'other geometry', or the name of an exception that should
    not escape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = io.read(path, volume_index=volume_index)
    except BadFile as error:
        return "refused" if path.name in str(error) else "message without the file's name"
    except Exception as error:
        return f"escaped: {type(error).__name__}: {error}"
    if volume.data.shape != truth.data.shape or not np.array_equal(volume.data, truth.data):
        return "other voxels"
    return "same" if np.array_equal(volume.affine, truth.affine) else "other geometry"


def peak_memory_mb() -> float:
    """Largest resident size of this program; `ru_maxrss` would also count what the process was
    before it began it.
    """
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )


def main(suffix: str, count: int, seed: int, folder: Path) -> dict[str, object]:
    """Counts of outcomes, the slowest read in seconds, and the largest memory of this process in
    MB.
    """
    chance = random.Random(seed)
    path = folder / f"x{suffix}"
    io.write(scan(suffix), path)
    truth, content = io.read(path), path.read_bytes()
    counts: dict[str, int] = {}
    slowest = 0.0
    for _ in range(count):
        path.write_bytes(mutated(content, chance, 800))
        start = time.perf_counter()
        what = outcome(path, truth)
        slowest = max(slowest, time.perf_counter() - start)
        counts[what] = counts.get(what, 0) + 1
    peak_mb = peak_memory_mb()
    return {"counts": counts, "slowest_s": slowest, "peak_mb": peak_mb}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
