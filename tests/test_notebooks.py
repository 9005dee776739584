"""The notebooks run from top to bottom, in a kernel of this Python."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip(
    "nbformat", reason="notebooks need nbformat: pip install medseg[dev]"
)
nbclient = pytest.importorskip(
    "nbclient", reason="notebooks need nbclient: pip install medseg[dev]"
)

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)

    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()

    assert all(cell["execution_count"] for cell in notebook.cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)

    assert not [cell for cell in notebook.cells if cell.get("outputs")]
