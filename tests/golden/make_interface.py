"""Writes interface.json: what people and their scripts rely on. Run it where the interface is meant
to change.

python tests/golden/make_interface.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("interface.json")
HEAD = ROOT / "sample_volumes" / "head_t1.nii.gz"


def run(*arguments: object) -> str:
    """What a command prints on stdout, in a terminal of 100 columns without colours."""
    environment = os.environ | {
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "medseg", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def commands() -> list[str]:
    """The names of all commands."""
    from typer.main import get_command

    from medseg.cli.app import make_app

    return sorted(get_command(make_app()).commands)  # type: ignore[attr-defined]


def keys(content: Any) -> Any:
    """The keys of a JSON object, nested ones too; of a list, or of a table by names, those of its
    first object.
    """
    if isinstance(content, dict):
        nested = {key: keys(value) for key, value in sorted(content.items())}
        tables = list(nested.values())
        alike = (
            len(tables) > 2
            and isinstance(tables[0], dict)
            and all(table == tables[0] for table in tables)
        )
        return {"*": tables[0]} if alike else nested
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [keys(content[0])]
    return None


def read(path: Path) -> Any:
    """The keys of a JSON file."""
    return keys(json.loads(path.read_text(encoding="utf-8")))


def interface() -> dict[str, Any]:
    """Help texts, public names, and the keys of the files of JSON that medseg writes."""
    import medseg
    from medseg.inference.exports import describe
    from medseg.models.folder import BUNDLED, load_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "scan.nii.gz"
        truth = folder / "truth.nii.gz"
        run("convert", HEAD, scan)
        run("infer", scan, "-m", "otsu", "-o", truth, "-q")
        run("infer", scan, "-m", "brain-fast", "-q")
        run(
            "evaluate",
            folder / "scan_seg.nii.gz",
            folder / "scan_seg.nii.gz",
            "-o",
            folder / "report",
            "-q",
        )
        result = {
            "help": {"": run("--help"), **{name: run(name, "--help") for name in commands()}},
            "public": sorted(medseg.__all__),
            "record": read(folder / "scan_seg.json"),
            "record of an intensity model": read(folder / "truth.json"),
            "model": read(BUNDLED / "brain" / "model.json"),
            "export": keys(describe(load_checkpoint("brain"))),
            "summary": read(folder / "report" / "summary.json"),
        }
    return result


if __name__ == "__main__":
    FILE.write_text(json.dumps(interface(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
