"""The table and the report of a cohort: a row for every case, equal bytes, outliers first."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from making import networks as tiny
from making.browser import chromium
from making.cohort import write_records
from medseg.cohort.gather import gather_cohort
from medseg.cohort.measures import structure_intensities
from medseg.cohort.records import write_failure
from medseg.cohort.request import read_cohort, write_cohort
from medseg.cohort.volumes import list_label_maps, long_rows, measure_all
from medseg.errors import BadConfig, BadFile
from medseg.io import write
from medseg.labels import Label, LabelTable
from medseg.volume import Volume, reorient


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 made-up heads with 8 outliers, of which one case failed and two wait."""
    folder = tmp_path_factory.mktemp("gathered")
    planted = write_records(folder / "out", folder / "list.csv", 200, outliers=8)
    cohort, request = read_cohort(folder / "out")
    usual = [case for case in cohort.cases if case.name not in planted]
    places = request.places(folder / "out")
    about = {"case": usual[0].name, "key": "0", "attempt": 2}
    path = places.record(usual[0].name)
    write_failure(path, about, status="failed", error="<b>it is cut off</b>", error_kind="BadFile")
    for case in usual[1:3]:
        places.record(case.name).unlink()
    (folder / "planted.json").write_text(json.dumps(planted))
    gather_cohort(folder / "out")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_case_of_the_list_has_a_row_whatever_became_of_it(gathered: Path):
    rows = rows_of(gathered / "out" / "table.csv")
    assert len(rows) == 200
    statuses = [row["status"] for row in rows]
    assert {one: statuses.count(one) for one in set(statuses)} == {
        "done": 197, "failed": 1, "waiting": 2,
    }  # fmt: skip
    failed = next(row for row in rows if row["status"] == "failed")
    assert (failed["error"], failed["attempts"]) == ("<b>it is cut off</b>", "2")
    assert failed["ml_1"] == ""
    assert {f"{what}_{n}" for what in ("ml", "confidence") for n in range(1, 33)} <= set(rows[0])
    assert rows[3]["site"] == str(3 % 7)


def test_the_long_table_has_the_same_numbers(gathered: Path):
    wide = {row["case"]: row for row in rows_of(gathered / "out" / "table.csv")}
    long = rows_of(gathered / "out" / "table_long.csv")
    assert len(long) == 197 * 32
    for row in long[::61]:
        assert wide[row["case"]][f"ml_{row['value']}"] == row["ml"]
    assert {row["name"] for row in long} >= {"left part00", "right part15"}


def test_gathered_twice_the_bytes_are_the_same(gathered: Path):
    def digest() -> str:
        files = sorted(gathered.glob("out/table*")) + sorted(gathered.glob("out/**/*.html"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    first = digest()
    gather_cohort(gathered / "out")
    assert digest() == first


def test_planted_outliers_come_first_and_the_report_says_why(gathered: Path):
    planted = json.loads((gathered / "planted.json").read_text())
    text = (gathered / "out" / "report.html").read_text()
    rows = json.loads(text.split('id="rows">')[1].split("</script>")[0])
    assert len(rows) == 200
    assert {row[0] for row in rows[:12]} >= set(planted)
    whys = " ".join(row[3] for row in rows[:12])
    assert "volume of" in whys
    assert "no " in whys
    assert "confidence of" in whys
    assert [row[1] for row in rows[-3:]] == ["failed", "waiting", "waiting"]


def test_pages_hold_fifty_cases_each_and_nothing_of_a_record_is_markup(gathered: Path):
    pages = sorted((gathered / "out" / "pages").glob("*.html"), key=lambda path: int(path.stem))
    counts = [page.read_text().count("<section") for page in pages]
    assert counts == [50, 50, 50, 50]
    whole = "".join(path.read_text() for path in (*pages, gathered / "out" / "report.html"))
    assert "<b>it is cut off" not in whole
    assert "&lt;b&gt;it is cut off" in whole
    assert "http://" not in whole.replace("http://www.w3.org", "")
    assert "https://" not in whole


def test_cases_that_were_computed_otherwise_are_told_of_at_the_top(gathered: Path, tmp_path: Path):
    write_records(tmp_path / "out", tmp_path / "list.csv", 12)
    assert "Not all cases were computed alike" not in report(tmp_path)
    path = next((tmp_path / "out" / "records").rglob("*.json"))
    content = json.loads(path.read_text())
    content["settings"]["precision"] = "bfloat16"
    content["settings_sha256"] = "another"
    path.write_text(json.dumps(content))
    text = report(tmp_path)
    assert "precision: float32 (11), bfloat16 (1)" in text
    statuses = [row["status"] for row in rows_of(tmp_path / "out" / "table.csv")]
    assert statuses.count("skipped") == 1


def test_the_report_names_what_differs_draws_volumes_and_outlives_a_plot(tmp_path: Path):
    write_records(tmp_path / "out", tmp_path / "list.csv", 12)
    path = next((tmp_path / "out" / "records").rglob("*.json"))
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "another"
    path.write_text(json.dumps(content))
    text = report(tmp_path)
    assert "version of PyTorch: " in text
    assert text.count("<svg") == 32 and "prefers-color-scheme:dark" in text
    with mock.patch("medseg.cohort.report.histogram", side_effect=RuntimeError("<no ink>")):
        text = report(tmp_path)
    assert "could not be drawn: RuntimeError: &lt;no ink&gt;" in text and "median" in text


@pytest.mark.browser
def test_the_report_fits_a_phone_and_is_searched(gathered: Path, tmp_path: Path):
    with chromium(tmp_path) as browser:
        browser.open((gathered / "out" / "report.html").as_uri(), state=None)
        browser.device(390, 800, scheme="dark")
        assert browser.run("return document.documentElement.scrollWidth") == 390
        ground = "return getComputedStyle(document.body).backgroundColor"
        assert browser.run(ground) == "rgb(21, 24, 28)"
        browser.run(
            "const box = document.querySelector('#word'); box.value = 'c000007'; box.oninput()"
        )
        assert browser.run("return document.querySelectorAll('#found tr').length") == 1
        browser.open((gathered / "out" / "pages" / "1.html").as_uri(), state=None)
        assert browser.run("return document.documentElement.scrollWidth") == 390
        assert browser.messages() == []


def test_structures_in_another_order_and_of_other_names_stand_in_their_columns(tmp_path: Path):
    write_records(tmp_path / "out", tmp_path / "list.csv", 3)
    gather_cohort(tmp_path / "out")
    before = rows_of(tmp_path / "out" / "table.csv")
    path = next((tmp_path / "out" / "records").rglob("c000001.json"))
    content = json.loads(path.read_text())
    content["structures"].reverse()
    path.write_text(json.dumps(content))
    gather_cohort(tmp_path / "out")
    assert rows_of(tmp_path / "out" / "table.csv") == before
    content["structures"].append({"value": 99, "name": "new", "ml": 1.5})
    path.write_text(json.dumps(content))
    gather_cohort(tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "table.csv")
    assert [row["ml_99"] for row in rows] == ["", "1.5", ""]
    assert [{k: v for k, v in row.items() if k in before[0]} for row in rows] == before


def test_a_viewer_page_that_is_there_is_linked(tmp_path: Path):
    write_records(tmp_path / "out", tmp_path / "list.csv", 2)
    pages = tmp_path / "out" / "pages" / "viewer"
    pages.mkdir(parents=True)
    (pages / "c000001.html").write_text("a page of the viewer")
    gather_cohort(tmp_path / "out")
    text = (tmp_path / "out" / "pages" / "1.html").read_text()
    assert text.count('href="viewer/') == 1
    assert 'href="viewer/c000001.html"' in text
    assert text.count("medseg view") == 1


def report(folder: Path) -> str:
    gather_cohort(folder / "out")
    return (folder / "out" / "report.html").read_text()


def test_parquet_has_the_same_rows(gathered: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason='pip install "medseg[parquet]"')
    table = parquet.read_table(gathered / "out" / "table.parquet")
    rows = rows_of(gathered / "out" / "table.csv")
    assert table.column_names == list(rows[0])
    assert [str(v) for v in table["case"].to_pylist()] == [row["case"] for row in rows]
    assert table["ml_1"].to_pylist()[5] == float(rows[5]["ml_1"])


def test_what_is_no_output_of_a_cohort_is_refused(gathered: Path, tmp_path: Path):
    with pytest.raises(BadFile, match=r"no cohort\.json"):
        gather_cohort(tmp_path)
    with pytest.raises(BadConfig, match="it carries site"):
        gather_cohort(gathered / "out", by="age")
    gather_cohort(gathered / "out", by="site")
    (tmp_path / "cohort.json").write_text('{"format": "medseg-cohort-1", "cases": 3}')
    with pytest.raises(BadFile, match="is not what"):
        gather_cohort(tmp_path)


def test_intensities_are_those_that_masks_give():
    chance = np.random.default_rng(3)
    data = chance.normal(0, 100, (7, 8, 9)).astype(np.float32)
    labels = chance.integers(0, 5, data.shape).astype(np.uint8)
    found = structure_intensities(
        Volume(data, np.eye(4)), Volume(labels, np.eye(4)), values=(1, 2, 4, 9)
    )
    assert set(found) == {1, 2, 4}
    for value, row in found.items():
        inside = data[labels == value].astype(np.float64)
        expected = (inside.mean(), inside.std(), np.median(inside))
        assert (row["mean"], row["sd"], row["median"]) == pytest.approx(expected, rel=1e-5)
    assert structure_intensities(Volume(data, np.eye(4)), Volume(labels * 0, np.eye(4)), (1,)) == {}


def test_volumes_of_label_maps_that_exist_are_the_rows_of_a_cohort(tmp_path: Path):
    chance = np.random.default_rng(1)
    (tmp_path / "labels").mkdir()
    for name in ("a", "b"):
        data = chance.integers(0, 3, (9, 8, 7)).astype(np.uint8)
        tiny.save_nifti(tmp_path / "labels" / f"{name}_seg.nii.gz", data, tiny.affine_of())
        scan = chance.normal(9, 2, data.shape).astype(np.float32)
        tiny.save_nifti(tmp_path / "labels" / f"{name}.nii.gz", scan, tiny.affine_of())
    ran = tiny.medseg("volumes", tmp_path / "labels", "-o", tmp_path / "volumes.csv")
    assert ran.code == 0
    rows = rows_of(tmp_path / "volumes.csv")
    assert [row["case"] for row in rows] == ["a_seg", "b_seg"]
    labels = Volume(data, tiny.affine_of())
    for value in (1, 2):
        ml = (data == value).sum() * labels.voxel_mm3 / 1000
        assert float(rows[1][f"ml_{value}"]) == pytest.approx(ml, abs=1e-3)
    one = tmp_path / "labels" / "b_seg.nii.gz"
    ran = tiny.medseg("volumes", one, "--scan", tmp_path / "labels" / "b.nii.gz", "--json")
    structures = json.loads(ran.out)[0]["structures"]
    assert structures[0]["mean"] == pytest.approx(scan[data == 1].mean(), rel=1e-4)


def test_volumes_take_a_scan_that_is_stored_another_way_and_tell_of_labels_without_a_name(
    tmp_path: Path,
):
    chance = np.random.default_rng(1)
    labels = Volume(chance.integers(0, 4, (9, 8, 7)).astype(np.uint8), tiny.affine_of())
    scan = labels.with_data(chance.normal(9, 2, labels.shape).astype(np.float32))
    write(labels, tmp_path / "a_seg.nii.gz")
    write(reorient(scan, "PSR"), tmp_path / "a.nii.gz")
    names = ((1, "liver"), (3, "spleen"))
    table = LabelTable(tuple(Label(value, name, (1, 2, 3)) for value, name in names))
    table.write(tmp_path / "labels.csv")
    ran = tiny.medseg(
        "volumes", tmp_path / "a_seg.nii.gz", "--scan", tmp_path / "a.nii.gz", "--json"
    )
    structures = json.loads(ran.out)[0]["structures"]
    assert [one["name"] for one in structures] == ["liver", "spleen"]
    for one in structures:
        inside = scan.data[labels.data == one["value"]]
        assert one["median"] == pytest.approx(np.median(inside), rel=1e-4)
    assert "its label table does not name 2, which were not measured" in ran.err


def test_a_label_map_that_cannot_be_read_stops_no_other(tmp_path: Path):
    data = np.ones((4, 4, 4), np.uint8)
    tiny.save_nifti(tmp_path / "a_seg.nii.gz", data, tiny.affine_of())
    (tmp_path / "b_seg.nii.gz").write_bytes(b"no")
    ran = tiny.medseg("volumes", tmp_path, "-o", tmp_path / "v.csv")
    assert ran.code == 3
    assert "b_seg.nii.gz" in ran.err
    assert len(rows_of(tmp_path / "v.csv")) == 1
    assert tiny.medseg("volumes", tmp_path / "none").code == 3
    assert tiny.medseg("volumes", tmp_path / "a_seg.nii.gz", "-o", tmp_path / "v.doc").code == 5


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without plots, which are not what is asked about."""
    monkeypatch.setattr("medseg.cohort.report.histogram", lambda numbers, caption: "")


def with_carried(out: Path, columns: dict[str, str]) -> None:
    """Let every case of an output carry these columns."""
    cohort, request = read_cohort(out)
    cases = tuple(replace(case, carried=tuple(columns.values())) for case in cohort.cases)
    changed = replace(cohort, cases=cases, columns=tuple(columns))
    write_cohort(request.places(out), changed, request)


def test_columns_of_a_list_never_share_a_name_with_those_of_the_table(
    tmp_path: Path, undrawn: None
):
    out = tmp_path / "out"
    write_records(out, tmp_path / "list.csv", 6)
    gather_cohort(out)
    before = rows_of(out / "table.csv")[0]
    carried = {"ml_1": "9", "Total_x": "8", "status": "mine", "list_status": "too", "why": "-"}
    with_carried(out, carried)
    gather_cohort(out, by="list_list_status")
    header = (out / "table.csv").read_text().splitlines()[0].split(",")
    assert len(set(header)) == len(header)
    row = rows_of(out / "table.csv")[0]
    names = ("list_ml_1", "list_Total_x", "list_status", "list_list_status")
    assert [row[name] for name in names] == ["9", "8", "mine", "too"]
    assert (row["ml_1"], row["status"]) == (before["ml_1"], "done")


def test_numbers_of_a_list_stay_numbers_and_formulas_do_not(tmp_path: Path, undrawn: None):
    out = tmp_path / "out"
    write_records(out, tmp_path / "list.csv", 1)
    with_carried(out, {"z": "-0.5", "y": "+1e-3", "x": "-1+cmd()", "w": "=1"})
    gather_cohort(out)
    (row,) = rows_of(out / "table.csv")
    assert (row["z"], row["y"], row["x"], row["w"]) == ("-0.5", "+1e-3", "'-1+cmd()", "'=1")


def test_what_is_no_record_is_told_of_and_costs_no_other_row(tmp_path: Path, undrawn: None):
    out = tmp_path / "out"
    changes = [
        {"structures": "none"}, {"structures": [3]}, {"structures": [{"value": 1, "ml": "x"}]},
        {"warnings": 5}, {"seconds": {"read": "x"}}, {"totals": [1]}, {"peak_memory_bytes": "a"},
    ]  # fmt: skip
    write_records(out, tmp_path / "list.csv", len(changes) + 2)
    paths = [next((out / "records").rglob(f"c00000{n}.json")) for n in range(len(changes) + 1)]
    for path, change in zip(paths, changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    paths[-1].write_bytes(paths[-1].read_bytes()[:700])
    gather_cohort(out)
    *rows, last = rows_of(out / "table.csv")
    for row, path in zip(rows, paths, strict=True):
        assert (row["status"], row["ml_1"]) == ("waiting", "")
        assert row["error"].startswith(path.relative_to(out).as_posix())
        assert "remove it" in row["error"]
    assert last["status"] == "done"
    assert last["ml_1"]


def test_a_case_of_another_model_hides_no_outlier(tmp_path: Path, undrawn: None):
    out = tmp_path / "out"
    (planted,) = write_records(out, tmp_path / "list.csv", 40, outliers=1)
    gather_cohort(out)
    before = {row["case"]: row["suspicion"] for row in rows_of(out / "table.csv")}
    path = next((out / "records").rglob("c000001.json" if planted != "c000001" else "c000002.json"))
    record = json.loads(path.read_text())
    record["structures"].append({"value": 99, "name": "new", "ml": 1.5})
    path.write_text(json.dumps(record))
    gather_cohort(out)
    after = {row["case"]: row["suspicion"] for row in rows_of(out / "table.csv")}
    assert after[planted] == before[planted] == max(after.values(), key=float)


def test_a_value_that_meant_something_else_to_another_model_is_in_no_column(
    tmp_path: Path, undrawn: None
):
    out = tmp_path / "out"
    write_records(out, tmp_path / "list.csv", 3)
    path = next((out / "records").rglob("c000001.json"))
    record = json.loads(path.read_text()) | {"settings_sha256": "0" * 64}
    record["structures"][0]["name"] = "spleen"
    path.write_text(json.dumps(record))
    gather_cohort(out)
    rows = rows_of(out / "table.csv")
    assert rows[1]["status"] == "skipped"
    assert rows[1]["ml_1"] == ""
    assert rows[1]["ml_2"] == str(record["structures"][1]["ml"])


def test_label_maps_are_found_wherever_their_folder_lies(tmp_path: Path, monkeypatch: Any):
    for name in (".hidden/labels/a_seg.nii.gz", ".hidden/labels/.trash/b_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path / ".hidden" / "labels")
    for folder in (tmp_path / ".hidden" / "labels", Path("../labels"), Path()):
        assert [one.name for one in list_label_maps([folder])] == ["a_seg.nii.gz"]


def test_label_maps_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    paths = [tmp_path / name for name in ("p1/T1_seg.nii.gz", "p2/T1_seg.nii.gz", "p2/b_seg.nii")]
    for number, path in enumerate(paths, start=1):
        path.parent.mkdir(exist_ok=True)
        data = np.zeros((3, 3, 3), np.uint8)
        data[:number] = 1
        tiny.save_nifti(path, data, tiny.affine_of())
    records = [one for _, one in measure_all(list_label_maps([tmp_path]), (), None, brain=None)]
    rows = long_rows([one for one in records if isinstance(one, dict)])
    assert [(row["case"], row["voxels"]) for row in rows] == [
        ("p1_T1_seg", 9), ("p2_T1_seg", 18), ("b_seg", 27),
    ]  # fmt: skip
