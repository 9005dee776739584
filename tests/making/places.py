"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "medseg" / "bundled"
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden"
SAMPLES = ROOT / "sample_volumes"
