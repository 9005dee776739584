"""The site of the documentation is built strictly and without a network, and its pages of reference
say what the program does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from making.places import ROOT
from medseg.cli.schema import descriptions
from medseg.io.formats import READERS, WRITERS

CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
HTTP = re.compile(rb"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(https?:)?//""")


def table_rows(page: str, columns: int) -> list[list[str]]:
    """The rows of a page's tables of so many columns, without backquotes."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if len(row) == columns]


def test_the_page_of_formats_names_what_is_read_written_and_described():
    rows = [row for row in table_rows("formats.md", 4) if row[0].startswith(".")]
    assert {row[0] for row in rows if row[2] == "yes"} == set(READERS)
    assert {row[0] for row in rows if row[3].startswith("yes")} == set(WRITERS)
    kinds = {row[0].strip(" `"): row[1] for row in table_rows("formats.md", 2)[1:]}
    assert {kind: kinds[kind].rstrip(" |") for kind in descriptions()} == descriptions()


def test_the_conformance_statement_is_that_of_the_program():
    pytest.importorskip("pydicom", reason="needs pydicom: pip install medseg[dicom]")
    pytest.importorskip("pynetdicom", reason="needs pynetdicom: pip install medseg[pacs]")
    from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS

    from medseg.io.dicom import headers, rtstruct, segments, slices
    from medseg.pacs import inbox, node

    rows = table_rows("dicom-conformance.md", 4)
    said = {row[1]: row[3].rstrip(" |") for row in rows if row[1].startswith("1.2.840")}
    syntaxes = {row[1]: row for row in rows if row[1].startswith("1.2.840.10008.1.2")}
    classes = said.keys() - syntaxes.keys()
    images = {*slices.SOP_CLASSES, *slices.CAPTURES}
    assert {uid for uid in classes if "received" in said[uid]} == set(node.STORAGE_CLASSES)
    read = {*images, *segments.SEG_CLASSES, rtstruct.RTSTRUCT_CLASS, headers.DICOMDIR}
    assert {uid for uid in classes if "read" in said[uid]} == read
    assert {uid for uid, row in syntaxes.items() if row[3].startswith("yes")} == set(
        node.TRANSFER_SYNTAXES
    )
    assert {uid for uid, row in syntaxes.items() if row[2] == "yes"} == {
        *headers.NATIVE, "1.2.840.10008.1.2.5",
    }  # fmt: skip
    assert set(syntaxes) == {str(uid) for uid in _PIXEL_DATA_DECODERS}
    text = (ROOT / "docs" / "dicom-conformance.md").read_text(encoding="utf-8")
    answers = (inbox.STORED, inbox.NO_ROOM, inbox.NOT_UNDERSTOOD)
    assert re.findall(r"\b([0-9A-F]{4})H\b", text) == [f"{answer:04X}" for answer in answers]
    options = inbox.NodeOptions(port=11112)
    assert f"is called {options.title} and listens on port 11112" in text
    assert f"takes {options.associations} associations at a time" in text
    assert node.MAX_PDU_BYTES == 2**20 and "at most 1 MiB" in text


def test_no_page_has_two_places_in_the_site():
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    pages = [page for part in content["nav"] for page in _pages(part)]
    assert len(pages) == len(set(pages)) > 20


def _pages(part: object) -> list[str]:
    if isinstance(part, dict):
        return [page for inner in part.values() for page in _pages(inner)]
    return [page for inner in part for page in _pages(inner)] if isinstance(part, list) else [part]  # type: ignore[list-item]


def test_the_site_is_built_strictly_and_fetches_nothing(tmp_path: Path):
    if find_spec("material") is None:
        pytest.skip("the site is built by mkdocs-material: pip install medseg[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", CONFIG]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    ran = subprocess.run(
        [*map(str, command), "-d", str(tmp_path)], env=os.environ | nowhere,
        capture_output=True, encoding="utf-8", timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for path in tmp_path.rglob("*.html"):
        assert not HTTP.search(path.read_bytes()), path
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    options = (tmp_path / "options.html").read_text(encoding="utf-8")
    assert "--probabilities" in options
