"""The page without a browser: what is in it, what is not, and what is said of it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from making import heads
from medseg.errors import BadGeometry, BadOutput
from medseg.labels import Label, LabelTable
from medseg.view import page
from medseg.volume import Volume, reorient

FOLDER = Path(page.__file__).parent


class Parts(HTMLParser):
    """The elements of a page that matter here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict, str]] = []
        self.tags: list[tuple[str, dict]] = []
        self.meta: dict[str, str] = {}
        self.title = ""
        self.styles: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self._open = tag
        if tag == "script":
            self.scripts.append((found, ""))
        if tag == "meta" and "http-equiv" in found:
            self.meta[found["http-equiv"]] = found["content"]

    def handle_data(self, data):
        if self._open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        if self._open == "style":
            self.styles.append(data)
        if self._open == "title":
            self.title += data

    def handle_endtag(self, tag):
        self._open = ""

    def script(self, identifier: str) -> str:
        return next(text for attributes, text in self.scripts if attributes.get("id") == identifier)


@pytest.fixture(scope="module")
def contents() -> page.Contents:
    return page.prepare(*heads.head(), heads.TABLE, title="A <b>title</b> & more")


@pytest.fixture(scope="module")
def parts(contents) -> Parts:
    return Parts(page.page_html(contents))


def image_of(data: bytes) -> Volume:
    """What nibabel reads of the bytes of a NIfTI file, gzipped or not."""
    image = nib.Nifti1Image.from_bytes(
        gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    )
    return Volume(np.asanyarray(image.dataobj), image.affine)


def unpacked(about: dict, packed: bytes) -> dict[int, np.ndarray]:
    """The triangles (n, 3, 3) of each structure in a page, in mm, outwards."""
    data = np.frombuffer(gzip.decompress(packed), np.uint8).astype(np.int64)
    count, corners = about["points"], 3 * about["triangles"]
    assert len(data) == 6 * count + 3 * corners
    steps = (data[: 3 * count] + (data[3 * count : 6 * count] << 8)).reshape(3, count)
    places = np.cumsum(steps, axis=1) & 65535
    points = (places.T * about["step"]) + about["low"]
    low, middle, high = data[6 * count :].reshape(3, corners)
    numbers, following = [], 0
    for code in (low + (middle << 8) + (high << 16)).tolist():
        numbers.append(following - code)
        following += code == 0
    triangles = points[np.array(numbers).reshape(-1, 3)]
    walls: dict[int, list[np.ndarray]] = {}
    start = 0
    for first, second, size in about["walls"]:
        part = triangles[start : start + size]
        walls.setdefault(first, []).append(part)
        walls.setdefault(second, []).append(part[:, ::-1])
        start += size
    assert start == about["triangles"]
    return {number: np.concatenate(parts) for number, parts in walls.items()}


def rows(contents: page.Contents) -> dict[int, dict]:
    return {row["value"]: row for row in contents.facts["structures"]}


def test_the_volumes_in_the_page_are_the_scan_and_the_labels(parts, contents):
    scan, labels = heads.head("RAS")
    shown, numbers = (
        image_of(base64.b64decode(parts.script(f"{name}-data"))) for name in ("scan", "labels")
    )
    assert np.array_equal(shown.data, scan.data)
    assert np.allclose(shown.affine, scan.affine, atol=1e-5)
    assert np.allclose(numbers.affine, scan.affine, atol=1e-5)
    for value, row in rows(contents).items():
        assert np.array_equal(numbers.data == (row["index"] or 99), labels.data == value), row[
            "name"
        ]
    assert numbers.data.dtype == np.uint8  # though a value is 300


def test_the_facts_are_those_of_the_labels(parts):
    facts = json.loads(parts.script("facts"))
    _, labels = heads.head()
    assert [row["value"] for row in facts["structures"]] == [
        heads.ABSENT,
        heads.RIGHT,
        heads.FRONT,
        heads.LEFT,
    ]
    for row in facts["structures"]:
        assert row["name"] == heads.TABLE[row["value"]].name
        assert tuple(row["color"]) == heads.PURE[row["value"]]
        assert row["ml"] == pytest.approx(
            (labels.data == row["value"]).sum() * 4.5 / 1000, abs=5e-4
        )
    assert facts["structures"][0] | {"index": 0, "centre": None, "ml": 0} == facts["structures"][0]
    right = facts["structures"][1]
    assert np.abs(np.array(right["centre"]) - heads.centre_mm(labels, heads.RIGHT)).max() <= 1.0
    assert facts["notes"] == []


def test_the_surfaces_in_the_page_are_those_of_the_structures(parts):
    _, labels = heads.head()
    about = json.loads(parts.script("facts"))["surfaces"]
    walls = unpacked(about, base64.b64decode(parts.script("surfaces-data")))
    for number, value in enumerate((heads.RIGHT, heads.FRONT, heads.LEFT), 1):
        corners = walls[number]
        a, b, c = np.moveaxis(corners, 1, 0)
        enclosed = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
        assert enclosed == pytest.approx((labels.data == value).sum() * 4.5, rel=0.01)
        middle = corners.reshape(-1, 3).min(axis=0) + np.ptp(corners.reshape(-1, 3), axis=0) / 2
        assert np.abs(middle - heads.centre_mm(labels, value)).max() < 0.5


def test_surfaces_are_those_of_labels_in_full_even_where_the_scan_is_a_preview():
    scan, labels = heads.head("RAS")
    whole = page.prepare(scan, labels, heads.TABLE)
    small = page.prepare(scan, labels, heads.TABLE, max_voxels=6000)
    assert small.surfaces == whole.surfaces
    assert small.facts["surfaces"] == whole.facts["surfaces"]


def test_a_large_label_map_has_surfaces_of_every_second_voxel(monkeypatch):
    scan, labels = heads.head("RAS")
    monkeypatch.setattr(page, "MAX_SURFACE_VOXELS", labels.data.size // 4)
    contents = page.prepare(scan, labels, heads.TABLE)
    walls = unpacked(contents.facts["surfaces"], contents.surfaces)
    for number, value in enumerate((heads.RIGHT, heads.FRONT, heads.LEFT), 1):
        points = walls[number].reshape(-1, 3)
        middle = points.min(axis=0) + np.ptp(points, axis=0) / 2
        assert np.abs(middle - heads.centre_mm(labels, value)).max() < 3


def test_the_page_stays_small_however_many_triangles_there_could_be(monkeypatch):
    monkeypatch.setattr(page, "MAX_TRIANGLES", 300)
    contents = page.prepare(*heads.head(), heads.TABLE)
    assert contents.facts["surfaces"]["triangles"] <= 300
    assert len(contents.surfaces) < 4000


def test_fluid_is_told_apart():
    facts = page.prepare(*heads.head(), heads.TABLE).facts
    assert [row["fluid"] for row in facts["structures"]] == [False] * 4
    table = LabelTable((Label(heads.RIGHT, "CSF", (1, 2, 3)),))
    facts = page.prepare(*heads.head(), table).facts
    assert {row["value"]: row["fluid"] for row in facts["structures"]} == {
        heads.RIGHT: True,
        heads.FRONT: False,
        heads.LEFT: False,
    }


def test_the_centre_of_a_structure_lies_inside_it():
    data = np.zeros((21, 21, 5), np.uint8)
    data[2:19, 2:19] = 3
    data[5:16, 5:16] = 0  # a ring, whose middle is outside
    facts = page.prepare(Volume(data * 10, np.eye(4)), Volume(data, np.eye(4))).facts
    for place in (facts["structures"][0]["centre"], facts["start"]):
        assert data[tuple(int(x) for x in place)] == 3


def test_only_the_two_scripts_of_the_page_may_run_and_nothing_may_be_loaded(parts):
    policy = dict(
        part.strip().split(" ", 1) for part in parts.meta["Content-Security-Policy"].split(";")
    )
    run = [text for attributes, text in parts.scripts if not attributes]
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in run
    }
    assert len(run) == 2
    assert set(policy["script-src"].split()) == hashes
    style = next(text for text in parts.styles)
    assert (
        policy["style-src"]
        == f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'"
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'none'"
    assert not [
        tag for tag, attributes in parts.tags if {"src", "srcset", "action"} & set(attributes)
    ]
    assert [a["href"] for tag, a in parts.tags if "href" in a] == ["#structures"]
    assert not [
        name for _, attributes in parts.tags for name in attributes if name.startswith("on")
    ]


def test_a_title_and_names_are_text_not_code(parts, contents):
    assert parts.title == "A <b>title</b> & more"
    text = page.page_html(contents)
    assert "<b>title" not in text
    assert "Größe <b>" not in text
    assert "front Gr" in parts.script("facts")


def test_a_name_cannot_end_its_element_or_fill_a_place_of_the_page():
    scan, labels = heads.head()
    label = heads.TABLE[heads.RIGHT]
    for name in ("</script><script>alert(1)</script>", "<!--", "{{niivue}}", "a{}b"):
        table = LabelTable((type(label)(label.value, name, label.color),))
        found = Parts(page.page_html(page.prepare(scan, labels, table, title=name)))
        assert len(found.scripts) == 6
        row = json.loads(found.script("facts"))["structures"][0]
        assert row["name"] == name


def test_the_page_names_no_file_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    page.write_page(tmp_path / "SENTINEL.html", page.prepare(*heads.head(), heads.TABLE))
    text = (tmp_path / "SENTINEL.html").read_text(encoding="utf-8")
    assert "SENTINEL" not in text
    assert str(tmp_path) not in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["SENTINEL.html", "temporary"]


def test_equal_input_gives_equal_pages(contents):
    again = page.prepare(*heads.head(), heads.TABLE, title="A <b>title</b> & more")
    assert page.page_html(again) == page.page_html(contents)


def test_a_served_page_holds_no_voxels(contents):
    found = Parts(page.page_html(contents, served=True))
    for name in ("scan", "labels", "surfaces"):
        assert found.script(f"{name}-data") == ""
    assert "connect-src 'self'" in found.meta["Content-Security-Policy"]
    assert json.loads(found.script("facts"))["served"] is True


def test_values_without_a_name_are_listed(contents):
    found = rows(page.prepare(*heads.head()))
    assert {value: row["name"] for value, row in found.items()} == {
        7: "label 7",
        12: "label 12",
        300: "label 300",
    }


def test_real_numbers_come_back_from_the_page():
    scan, labels = heads.head()
    precise = scan.with_data(scan.data / 1000 - 0.1)
    contents = page.prepare(precise, labels)
    stored, facts = image_of(contents.scan), contents.facts
    back = stored.data * facts["slope"] + facts["intercept"]
    assert stored.data.dtype == np.int16
    assert np.abs(back - heads.head("RAS")[0].data / 1000 + 0.1).max() < 1e-4


def test_a_large_scan_becomes_a_preview_that_says_so():
    scan, labels = heads.head("RAS")
    limit = 6000
    contents = page.prepare(scan, labels, heads.TABLE, max_voxels=limit)
    shown, numbers, facts = image_of(contents.scan), image_of(contents.labels), contents.facts
    assert shown.data.dtype == np.uint8
    assert shown.data.size <= limit
    assert shown.data.shape == numbers.data.shape
    assert facts["slope"] > 0
    assert any("preview" in note and "voxel along each axis" in note for note in facts["notes"])
    assert any("--serve" in note for note in facts["notes"])
    whole = page.prepare(scan, labels, heads.TABLE)
    assert rows(contents) == rows(whole)  # volumes are of the whole labels
    # Every voxel shown is one of the scan, at its place.
    for voxel in np.argwhere(shown.data >= 0)[::97]:
        place = shown.affine @ (*voxel, 1)
        i, j, k = np.rint(np.linalg.inv(scan.affine) @ place)[:3].astype(int)
        grey = np.clip(scan.data[i, j, k], facts["window"]["min"], facts["window"]["max"])
        assert (
            abs(shown.data[tuple(voxel)] * facts["slope"] + facts["intercept"] - grey)
            <= facts["slope"]
        )
        row = next(
            (r for r in facts["structures"] if r["value"] == labels.data[i, j, k]), {"index": 0}
        )
        assert numbers.data[tuple(voxel)] == row["index"]


def test_an_axis_too_long_for_graphics_cards_becomes_a_preview():
    data = np.zeros((4, 5000, 3), np.int16)
    data[1, ::2] = 100
    contents = page.prepare(Volume(data, np.eye(4)), Volume((data > 0).astype(np.uint8), np.eye(4)))
    assert max(image_of(contents.scan).data.shape) <= page.MAX_EMBEDDED_AXIS
    assert any("every third voxel" in note for note in contents.facts["notes"])


def test_a_preview_is_cropped_before_it_is_thinned():
    image = np.zeros((64, 64, 64), np.int16)
    image[20:40, 22:38, 24:36] = 900
    labels = np.zeros(image.shape, np.uint8)
    labels[25:30, 25:30, 25:30] = 1
    contents = page.prepare(Volume(image, np.eye(4)), Volume(labels, np.eye(4)), max_voxels=70_000)
    shown = image_of(contents.scan)
    assert np.allclose(np.diag(shown.affine), 1)  # every voxel is there
    assert shown.data.shape == (40, 36, 32)  # the content and 10 mm on every side
    assert (shown.data > 200).sum() == 20 * 16 * 12


def test_a_scan_in_full_keeps_its_voxels():
    scan, labels = heads.head("RAS")
    for dtype in (np.int16, np.uint8, np.float32):
        contents = page.prepare(scan.with_data(scan.data.astype(dtype)), labels, max_voxels=None)
        assert np.array_equal(image_of(contents.scan).data, scan.data.astype(dtype))
        assert contents.facts["slope"] == 1


def test_labels_that_are_stored_another_way_are_on_the_same_grid():
    scan, labels = heads.head("RAS")
    contents = page.prepare(scan, reorient(labels, "PSL"), heads.TABLE)
    assert contents.facts["notes"] == []
    assert contents.labels == page.prepare(scan, labels, heads.TABLE).labels


def test_labels_on_another_grid_are_drawn_at_their_place():
    scan, labels = heads.head("RAS")
    coarse = Volume(labels.data[::2, ::2, ::2], labels.affine @ np.diag([2, 2, 2, 1.0]))
    contents = page.prepare(scan, coarse, heads.TABLE)
    shown = image_of(contents.labels)
    assert shown.data.shape == scan.shape
    assert any("another grid" in note for note in contents.facts["notes"])
    for value, row in rows(contents).items():
        if row["index"]:
            assert (
                np.abs(heads.centre_mm(shown, row["index"]) - heads.centre_mm(coarse, value)).max()
                < 1.5
            )


def test_labels_of_another_place_are_refused():
    scan, labels = heads.head()
    away = labels.affine.copy()
    away[0, 3] += 5000
    with pytest.raises(BadGeometry, match="no label lies in the scan"):
        page.prepare(scan, Volume(labels.data, away))


def test_a_label_map_without_labels_is_shown():
    scan, labels = heads.head()
    contents = page.prepare(scan, labels.with_data(np.zeros_like(labels.data)), heads.TABLE)
    assert {row["index"] for row in contents.facts["structures"]} == {0}
    assert Parts(page.page_html(contents)).title == "medseg view"


def test_more_structures_than_a_page_can_show_are_refused():
    data = np.arange(13**3, dtype=np.uint16).reshape(13, 13, 13)
    with pytest.raises(BadGeometry, match="at most"):
        page.prepare(Volume(data, np.eye(4)), Volume(data, np.eye(4)))


def test_a_page_that_cannot_be_written_is_refused(tmp_path, contents):
    with pytest.raises(BadOutput, match="cannot be written"):
        page.write_page(tmp_path / "missing" / "x.html", contents)


def test_the_viewer_library_is_the_one_its_record_names():
    record = json.loads((FOLDER / "niivue/origin.json").read_text())
    library = (FOLDER / "niivue" / record["file"]).read_bytes()
    assert hashlib.sha256(library).hexdigest() == record["sha256"]
    assert record["license"] == "BSD-2-Clause"
    licence = (FOLDER / "niivue/LICENSE.txt").read_text()
    assert "Copyright (c) 2021, Niivue" in licence
    assert record["version"] in licence.splitlines()[0]


def test_every_control_of_the_page_has_a_name():
    text = (FOLDER / "web/page.html").read_text(encoding="utf-8")
    for kind, attributes in re.findall(r"<(input|canvas|dialog|aside|button)\b([^>]*)>", text):
        labelled = "aria-label" in attributes
        # Words in or right after it.
        inside = re.search(rf"<{kind}{re.escape(attributes)}>\s*[\w]", text)
        assert labelled or inside, (kind, attributes)
