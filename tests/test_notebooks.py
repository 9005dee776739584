"""The notebooks run from top to bottom, in a kernel of this Python, and show what they are stored
with.
"""

from pathlib import Path

import pytest

from making.notebooks import FOLDER, executed, shown

nbformat = pytest.importorskip(
    "nbformat", reason="notebooks need nbformat: pip install medseg[dev]"
)
pytest.importorskip("nbclient", reason="notebooks need nbclient: pip install medseg[dev]")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_stored_with(path: Path):
    stored = nbformat.read(path, as_version=4)

    again = executed(path)

    code = [cell for cell in stored.cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert any("image/png" in kinds for kinds, _ in shown(stored))
    assert shown(again) == shown(stored), "python tests/making/notebooks.py keeps what is shown now"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_stored_notebook_names_no_place_of_the_machine_it_ran_on(path: Path):
    text = "".join(text for _, text in shown(nbformat.read(path, as_version=4)))
    assert not [
        name for name in ("/home", "/tmp", "/root", "/usr", "site-packages") if name in text
    ]
