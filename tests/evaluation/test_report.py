"""The page of an evaluation: what people read in it, what it shows under errors, and what it never
asks for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from making import networks as tiny
from making.browser import chromium
from medseg.errors import BadFile
from medseg.evaluation import EvaluationOptions, evaluate
from medseg.evaluation.backgrounds import match_scans
from medseg.evaluation.metrics import METRICS, main_columns, title_of
from medseg.evaluation.pictures import LINES
from medseg.io import write
from medseg.labels import Label, LabelTable
from medseg.volume import Volume, reorient

TABLE = LabelTable((Label(1, "liver", (255, 0, 0)), Label(2, "<b>tumour</b>", (0, 255, 0))))
SHAPE = (30, 26, 22)
AFFINE = tiny.affine_of((1.5, 1.5, 2.0), (-20, -20, -20))


def box(value: int, start: int, size: int = 8) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[start : start + size, 8:16, 6:14] = value
    return labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases, of which the second is the worst: its tumour is shifted to the left."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("truth", "labels", "scans"):
        (root / folder).mkdir()
    for number, shift in enumerate((0, 5, 1)):
        name = f"case_{number}"
        truth = np.maximum(box(1, 2, 4), box(2, 10))
        result = np.maximum(box(1, 2, 4), box(2, 10 + shift))
        write(Volume(truth, AFFINE), root / "truth" / f"{name}.nii.gz")
        write(Volume(result, AFFINE), root / "labels" / f"{name}_seg.nii.gz")
        # A finer grid, stored another way round, bright where the reference is.
        grey = np.where(truth.repeat(2, 0) > 0, 200, 100).astype(np.int16)
        fine = AFFINE @ np.diag([0.5, 1, 1, 1])
        fine[:3, 3] -= AFFINE[:3, 0] / 4
        scan = reorient(Volume(grey, fine), "LIP")
        write(scan, root / "scans" / f"{name}_0000.nii.gz")
    TABLE.write(root / "truth" / "labels.csv")
    return root


def page_of(data: Path, out: Path, **options: object) -> str:
    evaluate(data / "truth", data / "labels", out, table=TABLE, **options)
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(data, tmp_path_factory.mktemp("page"), scans=data / "scans")


def pictures_of(page: str) -> dict[str, np.ndarray]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
    return {
        alt: np.asarray(Image.open(BytesIO(base64.b64decode(data)))).astype(int)
        for alt, data in found
    }


def share_of(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """The places of a colour as shares of the picture, (rows, columns)."""
    places = np.argwhere((picture == color).all(-1))
    return places / np.array(picture.shape[:2])


def test_outlines_of_reference_and_result_lie_over_the_scan(page: str):
    pictures = pictures_of(page)
    assert len(pictures) == 9
    axial = pictures["case_1: &lt;b&gt;tumour&lt;/b&gt;, Dice 0.375, axial slice at S -8.0 mm"]
    ours, theirs = (share_of(axial, LINES[kind]) for kind in ("reference", "prediction"))
    # Right is on the left: the result, further along +x, is further left.
    assert theirs[:, 1].min() < ours[:, 1].min() - 0.1
    assert ours[:, 0].min() == pytest.approx(theirs[:, 0].min(), abs=0.02)
    # The line of the reference is where the scan becomes bright.
    top, left = (ours.min(0) * axial.shape[:2]).astype(int)
    bottom, right = (ours.max(0) * axial.shape[:2]).astype(int)
    inside = axial[top + 6 : bottom - 6, (left + right) // 2 : right - 6]
    assert (np.ptp(inside, axis=-1) == 0).all() and inside.mean() > 200
    assert axial[bottom + 6 : bottom + 12, left:right].mean() < 80
    assert len(share_of(axial, (255, 255, 255))) > 50  # the bar


def test_without_scans_areas_are_shown_and_a_missing_scan_is_told(data: Path, tmp_path: Path):
    page = page_of(data, tmp_path / "one")
    assert "result only" in page and "outline of" not in page
    some = tmp_path / "scans"
    some.mkdir()
    (some / "case_2.nii.gz").write_bytes((data / "scans" / "case_2_0000.nii.gz").read_bytes())
    (some / "case_0.nii.gz").write_bytes(b"no scan")
    page = page_of(data, tmp_path / "two", scans=some)
    assert "case_1: there is no scan of it" in page
    assert "case_0: its scan cannot be shown" in page and str(some) not in page
    assert "result only" in page and "outline of the result" in page


def test_a_scan_that_lies_elsewhere_is_not_shown(data: Path, tmp_path: Path):
    (tmp_path / "scans").mkdir()
    far = AFFINE.copy()
    far[0, 3] += 500
    write(Volume(np.zeros(SHAPE, np.int16), far), tmp_path / "scans" / "case_1.nii.gz")
    page = page_of(data, tmp_path / "out", scans=tmp_path / "scans")
    assert "case_1: its scan does not lie where its labels are" in page
    assert "outline of" not in page


def test_pictures_show_errors_that_are_scored_and_structures_that_are_there(tmp_path: Path):
    truth, result = box(1, 2), box(1, 3)
    truth[:, :, 18:], result[:20, :20, 18:] = 9, 1  # far more, where nobody knows
    for folder, some in (("truth", truth), ("labels", result), ("scans", truth.astype(np.int16))):
        (tmp_path / folder).mkdir()
        write(Volume(some, AFFINE), tmp_path / folder / "a.nii.gz")
    table = LabelTable((Label(3, "spleen", (255, 0, 0)), Label(1, "liver", (255, 0, 0))))
    evaluate(
        tmp_path / "truth",
        tmp_path / "labels",
        tmp_path / "out",
        EvaluationOptions(ignore=9, empty="best_worst"),
        table,
        scans=tmp_path / "scans",
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "does not lie where" not in page
    titles = list(pictures_of(page))
    assert len(titles) == 3 and all(title.startswith("a: liver, Dice 0.875") for title in titles)
    assert "axial slice at S -8.0 mm" in titles[0]  # of the errors that count


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)


def test_people_read_names_of_scores_and_nothing_of_the_computer(page: str, data: Path):
    parser = _Parser()
    parser.feed(page)
    text = " ".join(parser.text)
    assert "95 % Hausdorff distance (mm)" in text and "surface Dice at 1 mm" in text
    assert "average symmetric surface distance (mm)" in text
    assert not re.search(r"\b(hausdorff|assd|masd|surface_dice|volume)_?\w*_mm", text)
    assert "both_empty" not in text and not re.search(r"\bnan\b", text)
    assert str(data) not in page and ".nii.gz" not in page
    assert "<b>tumour</b>" in text and "<b>tumour" not in page


def test_the_page_says_what_made_it_of_which_files(page: str, data: Path, tmp_path: Path):
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC by medseg [\d.]+, python", page)
    for path in (data / "truth" / "case_1.nii.gz", data / "scans" / "case_1_0000.nii.gz"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in page
    assert "without a run record (3 cases)" in page
    record = {
        "format": "medseg-record-1",
        "model": {"name": "<i>liver</i>", "weights_sha256": "ab" * 32},
        "versions": {"medseg": "0.1.0"},
        "files_sha256": {},
    }
    labels = tmp_path / "labels"
    labels.mkdir()
    for number in range(3):
        content = (data / "labels" / f"case_{number}_seg.nii.gz").read_bytes()
        (labels / f"case_{number}_seg.nii.gz").write_bytes(content)
        record["files_sha256"] = {".nii.gz": hashlib.sha256(content).hexdigest() if number else ""}
        (labels / f"case_{number}_seg.json").write_text(json.dumps(record))
    evaluate(data / "truth", labels, tmp_path / "out", table=TABLE)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"&lt;i&gt;liver&lt;/i&gt; (weights {'ab' * 8}), by medseg 0.1.0 (2 cases)" in page
    assert "beside a run record that is not about them (1 case)" in page


def test_a_picture_that_cannot_be_drawn_loses_no_scores(data: Path, tmp_path: Path):
    with (
        mock.patch("medseg.evaluation.report.box_plot", side_effect=RuntimeError("no ink")),
        mock.patch("medseg.evaluation.report.error_pictures", side_effect=ValueError("<no>")),
    ):
        page = page_of(data, tmp_path)
    assert page.count("A picture could not be drawn: RuntimeError: no ink") == 4
    assert "ValueError: &lt;no&gt;" in page
    assert (tmp_path / "scores.csv").is_file() and "case_1" in page


def test_numbers_of_cases_hide_their_names_also_under_pictures(data: Path, tmp_path: Path):
    options = EvaluationOptions(number_cases=True)
    page = page_of(data, tmp_path, options=options, scans=data / "scans")
    assert "case_1" not in page and "case 2: &lt;b&gt;tumour" in page
    assert "outline of the reference" in page


def test_every_percentile_has_a_title_a_plot_and_a_column(data: Path, tmp_path: Path):
    page = page_of(data, tmp_path, options=EvaluationOptions(percentiles=(90, 99.5)))
    assert page.count("Box plot: ") == 5
    for percentile in ("90", "99.5"):
        assert f"{percentile} % Hausdorff distance (mm)" in page
    assert all("_" not in title_of(name) for name in METRICS)
    assert title_of("others_score") == "others score"
    assert main_columns(["dice", "iou", "hausdorff7_mm", "x"]) == ["dice", "hausdorff7_mm"]


@pytest.mark.parametrize(
    "file, case",
    [
        ("a.nii.gz", "a"), ("a_seg.nii.gz", "a"), ("a_0000.nii.gz", "a"), ("a_T1w.nii.gz", "a"),
        ("ab.nii.gz", "ab"), ("ab_c.nii.gz", "ab"), ("a/image.nii.gz", "a"), ("b.nii.gz", ""),
        ("a/slice.dcm", "a"),
    ],
)  # fmt: skip
def test_scans_belong_to_the_cases_they_are_called_after(tmp_path: Path, file: str, case: str):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 8)
    if not case:
        with pytest.raises(BadFile, match="no file or folder in it is called as a case, such as"):
            match_scans(tmp_path, ["a", "ab"])
        return
    expected = path.parent if path.suffix == ".dcm" else path
    assert match_scans(tmp_path, ["a", "ab"]) == {case: expected}


def test_in_a_folder_of_a_case_masks_are_no_scan(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a/liver.nii.gz", "a/ct.nii.gz", "a/spleen.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    for name in ("b/liver.nii.gz", "b/spleen.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    assert match_scans(tmp_path, ["a", "b"]) == {"a": tmp_path / "a" / "ct.nii.gz"}


def test_a_single_case_takes_a_scan_of_any_name_and_several_take_none(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "whatever.nii.gz")
    assert match_scans(scan, ["a"]) == {"a": scan}
    with pytest.raises(BadFile, match="is one file, and there are 2 cases"):
        match_scans(scan, ["a", "b"])
    with pytest.raises(BadFile, match="no such file or folder"):
        match_scans(tmp_path / "nowhere", ["a"])


def test_channels_are_shown_by_the_first(tmp_path: Path):
    for name in ("a_0001.nii.gz", "a_0000.nii.gz", "b_T1w.nii.gz", "b_FLAIR.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    names = {case: path.name for case, path in match_scans(tmp_path, ["a", "b"]).items()}
    assert names == {"a": "a_0000.nii.gz", "b": "b_FLAIR.nii.gz"}


def test_the_command_takes_scans(data: Path, tmp_path: Path):
    folders = (data / "truth", data / "labels")
    scans = ("--scans", data / "scans")
    ran = tiny.medseg("evaluate", *folders, "-o", tmp_path / "out", *scans, "-q")
    assert ran.code == 0, ran.err
    assert "Hausdorff" in ran.out and "hausdorff95_mm" not in ran.out
    assert "outline of" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    ran = tiny.medseg("evaluate", *folders, "-o", tmp_path / "no", "--scans", tmp_path / "gone")
    assert ran.code != 0 and "gone: there is no such file or folder" in ran.err
    assert not (tmp_path / "no").exists()


@pytest.mark.browser
def test_in_a_browser_tables_sort_and_search_and_a_phone_need_not_scroll_sideways(
    page: str, tmp_path: Path
):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    with chromium(tmp_path) as browser:
        browser.open(file.as_uri(), state=None)
        cases = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows]"
        order = f"return {cases}.map(row => row.cells[0].textContent)"
        heads = "document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells"
        assert browser.run(order) == ["case_1", "case_2", "case_0"]
        browser.run(f"{heads}[0].firstChild.click()")
        assert browser.run(order) == ["case_0", "case_1", "case_2"]
        browser.run(f"{heads}[1].firstChild.click(); {heads}[1].firstChild.click()")
        assert browser.run(order) == ["case_0", "case_2", "case_1"]
        assert browser.run(f"return {heads}[1].getAttribute('aria-sort')") == "descending"
        browser.run(
            "const box = document.querySelector('input'); box.value = 'TUMOUR';"
            "box.dispatchEvent(new Event('input'))"
        )
        rows = "[...document.querySelectorAll('table.sortable')[1].tBodies[0].rows]"
        assert browser.run(f"return {rows}.filter(row => !row.hidden).length") == 3
        browser.device(390, 800)
        assert browser.run("return document.documentElement.scrollWidth") == 390
        ground = "return getComputedStyle(document.body).backgroundColor"
        assert browser.run(ground) == "rgb(255, 255, 255)"
        browser.device(390, 800, scheme="dark")
        assert browser.run(ground) == "rgb(21, 24, 28)"
        assert browser.messages() == []
        inside = ("file:", "data:", "chrome")
        assert [url for url in browser.requested() if not url.startswith(inside)] == []


def test_maps_without_any_structure_have_a_page_that_says_so(tmp_path: Path):
    """Nobody has a lesion, and no table says that there could be one."""
    write(Volume(np.zeros(SHAPE, np.uint8), AFFINE), tmp_path / "empty.nii.gz")
    result = evaluate(tmp_path / "empty.nii.gz", tmp_path / "empty.nii.gz", tmp_path / "out")
    assert result.rows == [] and result.summary["cases"]["scored"] == ["empty"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 case was scored" in page and "No label map holds a structure." in page
    assert (tmp_path / "out" / "scores.csv").is_file()
