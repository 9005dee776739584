"""A notebook shows a picture and a table, and short texts."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

CELLS = (
    "from pathlib import Path\nimport medseg\nfolder = Path({folder!r})",
    "result = medseg.segment(folder / 'scan.nii.gz', folder / 'model')\nresult",
    "print(repr(result), repr(result.labels), repr(result.table), sep='\\n')",
    "result.plot()",
)


def main(folder: Path) -> None:
    notebook: Any = nbformat.v4.new_notebook()  # type: ignore[no-untyped-call,unused-ignore]
    for cell in CELLS:
        source = cell.format(folder=str(folder))
        made: Any = nbformat.v4.new_code_cell(source)  # type: ignore[no-untyped-call,unused-ignore]
        notebook.cells.append(made)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown: Any = notebook.cells[1].outputs[0]["data"]
    assert "data:image/png;base64," in shown["text/html"] and "left body" in shown["text/html"]
    lines = notebook.cells[2].outputs[0]["text"].splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 200
    assert "image/png" in notebook.cells[3].outputs[0]["data"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
