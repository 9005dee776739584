"""What a GPU computes is what the CPU computes: parts 1 to 6 of the check, where there is a card;
and the whole check in small without one, so that it runs on the day there is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = Path(__file__).parent / "benchmarks" / "check_gpu.py"


def check(*options: str) -> list[dict[str, object]]:
    """The lines of a check."""
    command = [sys.executable, str(CHECK), *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("part", range(1, 7))
def test_a_gpu_computes_what_the_cpu_computes(part: int):
    (row,) = check("--device", "cuda", "--parts", str(part))
    assert row.get("passes"), row


def test_the_check_runs_from_end_to_end_in_small():
    """Of each part but those that start several programs (5, 6, 9), which other tests do."""
    parts = (0, 1, 2, 3, 4, 7, 8, 10, 11)
    rows = check("--device", "cpu", "--tiny", "--parts", *map(str, parts))
    assert [row["part"] for row in rows] == list(parts)
    assert not [row for row in rows if "error" in row or row.get("passes") is False]
