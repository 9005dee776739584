"""Where things lie in the repository."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "medseg" / "bundled"
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"
SAMPLES = ROOT / "sample_volumes"


def python_path() -> str:
    """Where child processes find medseg and what tests make, and where the system that is tested is
    another one than that of this machine (`pytest --system`), what shows them that.
    """
    shims = [ROOT / "tests" / "making" / "elsewhere"] if os.environ.get("TESTED_SYSTEM") else []
    return os.pathsep.join(map(str, (*shims, ROOT, ROOT / "tests")))
