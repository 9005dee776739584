"""The notebooks run in a kernel of this Python; `python tests/making/notebooks.py` keeps what they
show.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "notebooks"


def executed(path: Path) -> Any:
    """A notebook with what its cells show when it is run from top to bottom."""
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, resources=place, record_timing=False).execute()
    return notebook


def shown(notebook: Any) -> list[tuple[str, str]]:
    """The kind and the text of all that the cells show; numbers, which differ a little from one
    processor to the next, are left out.
    """
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            kinds = "+".join(sorted(output.get("data", {output.get("name", "error"): ""})))
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            parts.append((kinds, re.sub(r"-?\d+(\.\d+)?", "N", text)))
    return parts


def main() -> None:
    """Run all notebooks and write them with what they show."""
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = executed(path)
        notebook.metadata["language_info"] = {"name": "python"}  # not of which version
        content = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
        path.write_text(content + "\n", encoding="utf-8", newline="\n")
        print(path.name, path.stat().st_size // 1024, "kB")


if __name__ == "__main__":
    main()
