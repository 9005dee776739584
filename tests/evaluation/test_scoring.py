"""Evaluation of folders: matching, geometry, empty masks, files written; and bad input."""

import base64
import csv
import json
import math
import re
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from medseg.cli import evaluate as evaluate_module
from medseg.cli.evaluate import clean, compare
from medseg.errors import BadConfig, BadFile, BadGeometry, DataWarning
from medseg.evaluation.pairs import find_table, on_grid_of, parse_structures
from medseg.evaluation.pictures import COLORS
from medseg.evaluation.scoring import evaluate
from medseg.evaluation.summary import EvaluationOptions, read_scores, summarise
from medseg.io import read_labels, write
from medseg.labels import Label, LabelTable
from medseg.volume import Volume, reorient

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def cube(
    start: int, side: int = 6, value: int = 1, shape: tuple[int, int, int] = (20, 18, 12)
) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[start : start + side, 4 : 4 + side, 3 : 3 + side] = value
    return labels


def save(path, data, affine=AFFINE):
    path.parent.mkdir(exist_ok=True, parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        write(Volume(data, affine), path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """50 cases: two predictions missing, one extra, one on another grid, one in another
    orientation.
    """
    root = tmp_path_factory.mktemp("folders")
    for n in range(50):
        save(root / "reference" / f"case_{n:02d}.nii.gz", cube(4) + cube(12, 4, 2))
        prediction = Volume(cube(4 + n % 2) + cube(12, 4, 2), AFFINE)
        if n in (7, 31):
            continue
        if n == 11:
            prediction = Volume(
                prediction.data,
                np.array([[1.0, 0, 0, 7], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
            )
        if n == 20:
            prediction = reorient(prediction, "LIP")
        save(
            root / "prediction" / f"case_{n:02d}_seg.nii.gz",
            np.ascontiguousarray(prediction.data),
            prediction.affine,
        )
    save(root / "prediction" / "stranger.nii.gz", cube(4))
    return root


def test_a_folder_of_fifty_says_exactly_what_is_wrong(folders, tmp_path):
    result = evaluate(folders / "reference", folders / "prediction", tmp_path)
    cases = result.summary["cases"]
    assert len(cases["scored"]) == 47
    assert cases["without_prediction"] == ["case_07", "case_31"]
    assert cases["without_reference"] == ["stranger"]
    assert list(cases["failed"]) == ["case_11"]
    assert "(0, 0, 0)" in cases["failed"]["case_11"] and "(7, 0, 0)" in cases["failed"]["case_11"]
    assert cases["turned_or_resampled"] == {
        "case_20": "the prediction is stored as LIP; it was turned to RAS without loss"
    }
    assert len(result.problems) == 5
    page = (tmp_path / "report.html").read_text()
    for word in (
        "case_07",
        "case_31",
        "stranger",
        "case_11",
        "case_20",
        "47 cases were scored; 2 have no prediction",
    ):
        assert word in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    rows = read_scores(tmp_path / "scores.csv")
    assert len(rows) == 47 * 2
    turned = next(row for row in rows if row["case"] == "case_20" and row["structure"] == "label 1")
    assert turned["dice"] == 1 and turned["hausdorff_mm"] == 0
    shifted = next(
        row for row in rows if row["case"] == "case_01" and row["structure"] == "label 1"
    )
    assert shifted["dice"] == pytest.approx(5 / 6) and shifted["hausdorff_mm"] == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    dice = summary["structures"]["label 1"]["dice"]
    assert dice["n"] == 47 and dice["n_excluded"] == 0 and dice["n_inf"] == 0
    values = [row["dice"] for row in rows if row["structure"] == "label 1"]
    assert dice["mean"] == pytest.approx(np.mean(values)) and dice["sd"] == pytest.approx(
        np.std(values, ddof=1)
    )
    assert dice["ci95"][0] < dice["mean"] < dice["ci95"][1]


def test_the_same_options_give_the_same_files(folders, tmp_path):
    for name in ("one", "two"):
        evaluate(
            folders / "reference",
            folders / "prediction",
            tmp_path / name,
            EvaluationOptions(bootstrap=200),
        )
    for file in ("scores.csv", "summary.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    pages = [(tmp_path / name / "report.html").read_text("utf-8") for name in ("one", "two")]
    # The minute in which they were scored may be another one.
    one, two = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "then", page) for page in pages)
    assert one == two and "then by medseg" in one


def test_a_missed_structure_is_counted_and_not_dropped(tmp_path):
    for n in range(4):
        save(tmp_path / "r" / f"{n}.nii", cube(4) if n < 3 else np.zeros((20, 18, 12), np.uint8))
        save(
            tmp_path / "p" / f"{n}.nii",
            np.zeros((20, 18, 12), np.uint8) if n in (1, 3) else cube(4),
        )
    for rule, excluded, infinite, mean in (
        ("nan", 1, 1, 0),
        ("best_worst", 0, 1, 0),
        ("diagonal", 0, 0, None),
    ):
        result = evaluate(tmp_path / "r", tmp_path / "p", options=EvaluationOptions(empty=rule))
        one = result.summary["structures"]["label 1"]
        distance = one["hausdorff95_mm"]
        assert (distance["n_excluded"], distance["n_inf"]) == (excluded, infinite)
        diagonal = math.sqrt(20**2 + 18**2 + 24**2)
        assert distance["mean"] == pytest.approx(diagonal / 4 if mean is None else mean)
        assert one["dice"]["mean"] == pytest.approx(2 / 3 if rule == "nan" else 3 / 4)
        assert one["status"] == {"both_empty": 1, "ok": 2, "prediction_empty": 1}


def test_other_grids_are_refused_by_name_and_resampled_on_request(tmp_path):
    save(tmp_path / "r.nii.gz", cube(4))
    save(tmp_path / "p.nii.gz", cube(4), np.diag([1.0, 1.0, 5.0, 1.0]))
    with pytest.raises(BadGeometry, match=r"1 x 1 x 5 mm.*1 x 1 x 2 mm.*--resample"):
        evaluate(tmp_path / "r.nii.gz", tmp_path / "p.nii.gz")
    result = evaluate(
        tmp_path / "r.nii.gz", tmp_path / "p.nii.gz", options=EvaluationOptions(resample=True)
    )
    assert "resampled" in result.problems[0] and result.summary["options"]["resample"] is True
    assert 0 < result.rows[0]["dice"] < 1


def test_every_orientation_is_the_same_grid():
    reference = Volume(cube(4), AFFINE)
    for orientation in ("LPS", "AIR", "SRP", "ILA"):
        turned, note = on_grid_of(reference, reorient(reference, orientation))
        assert (turned.data == reference.data).all() and orientation in note


def test_regions_ignored_labels_and_names(tmp_path):
    reference = cube(2, 4, 1) + cube(6, 4, 2) + cube(10, 4, 9)
    prediction = cube(2, 4, 2) + cube(6, 4, 2) + cube(10, 4, 1)
    save(tmp_path / "a.nii.gz", reference)
    save(tmp_path / "b.nii.gz", prediction)
    table = LabelTable((Label(1, "core", (255, 0, 0)), Label(2, "edema", (0, 255, 0))))
    structures = parse_structures("tumour=core+edema,core,2", table)
    assert structures == {"tumour": (1, 2), "core": (1,), "edema": (2,)}
    options = EvaluationOptions(
        structures=structures, ignore=9, tolerance_mm={"core": 3.0, "": 2.0}
    )
    rows = {
        row["structure"]: row
        for row in evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", options=options).rows
    }
    assert rows["tumour"]["dice"] == 1 and rows["tumour"]["surface_dice"] == 1
    assert rows["core"]["status"] == "prediction_empty" and rows["core"]["n_reference"] == 64
    assert rows["edema"]["dice"] == pytest.approx(2 * 64 / (64 + 128))
    assert rows["core"]["tolerance_mm"] == 3 and rows["edema"]["tolerance_mm"] == 2
    result = evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", table=table)
    assert "labels 9 are in the files but in no structure" in result.problems[0]


def test_what_is_ignored_is_no_structure_of_the_table_and_of_two_of_one_name_both_are_scored(
    tmp_path,
):
    save(tmp_path / "a.nii.gz", cube(2, 4, 1) + cube(6, 4, 2) + cube(12, 4, 9))
    save(tmp_path / "b.nii.gz", cube(3, 3, 1) + cube(6, 4, 2) + cube(10, 4, 9))
    names = {1: "kidney", 2: "kidney", 9: "unsure"}
    table = LabelTable(tuple(Label(value, name, (1, 1, 1)) for value, name in names.items()))
    options = EvaluationOptions(ignore=9)
    plain, named = (
        evaluate(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", options=options, table=one)
        for one in (None, table)
    )
    assert [row["structure"] for row in named.rows] == ["kidney (1)", "kidney (2)"]
    assert [row["dice"] for row in named.rows] == [row["dice"] for row in plain.rows]
    assert named.problems == []
    assert parse_structures("1,2", table) == {"kidney (1)": (1,), "kidney (2)": (2,)}
    with pytest.raises(BadConfig, match="several labels are called 'kidney'"):
        parse_structures("kidney", table)


def test_lesions_of_a_case_without_any_are_none_with_and_without_names(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        save(tmp_path / "r" / f"{name}.nii.gz", cube(4, 4, value))
        save(tmp_path / "p" / f"{name}.nii.gz", cube(5, 4, value))
    for structures in (None, {"label 1": (1,), "label 2": (2,)}):
        options = EvaluationOptions(structures=structures, lesions=("label 1",))
        result = evaluate(tmp_path / "r", tmp_path / "p", options=options)
        lesions = result.summary["structures"]["label 1"]
        assert lesions["lesions_reference"]["mean"] == 0.5
        assert lesions["lesion_f1"]["n_excluded"] == 1


def test_names_come_from_the_table_beside_the_labels(tmp_path):
    table = LabelTable((Label(1, "liver", (255, 0, 0)),))
    for name in ("a", "b"):
        save(tmp_path / "p" / f"{name}_seg.nii.gz", cube(4))
        table.write(tmp_path / "p" / f"{name}_seg.labels.csv")
    assert find_table(None, tmp_path, tmp_path / "p").names == {1: "liver"}
    assert find_table(None, tmp_path / "p" / "a_seg.nii.gz", tmp_path).names == {1: "liver"}
    LabelTable((Label(1, "spleen", (255, 0, 0)),)).write(tmp_path / "p" / "b_seg.labels.csv")
    assert find_table(None, tmp_path, tmp_path / "p") is None
    write(Volume(cube(4), AFFINE), tmp_path / "x.seg.nrrd", table=table)
    assert find_table(None, tmp_path / "x.seg.nrrd", tmp_path).names == {1: "liver"}


def test_bad_structures_are_named():
    for text in ("liver=", "x=y", "a=1,a=2", "70000", ""):
        with pytest.raises(BadConfig):
            parse_structures(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: save(p, np.full((4, 4, 4), 1.5, np.float32)), "whole number"),
        (lambda p: save(p, np.full((4, 4, 4), 70_000, np.int32)), "65535"),
        (lambda p: save_4d(p), "4-D|volumes|dimension"),
        (lambda p: p.write_bytes(b"not a scan"), "bad.nii"),
    ],
)
def test_bad_label_maps_are_one_clear_sentence(tmp_path, make, words):
    save(tmp_path / "good.nii", np.ones((4, 4, 4), np.uint8), np.eye(4))
    make(tmp_path / "bad.nii")
    with pytest.raises(BadFile, match=words) as error:
        evaluate(tmp_path / "good.nii", tmp_path / "bad.nii")
    sentence = str(error.value).replace(f"{tmp_path}/", "")
    assert "bad.nii" in sentence and "\n" not in sentence and len(sentence) < 250


def save_4d(path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4, 3), np.uint8), np.eye(4)), path)


def test_folders_without_a_pair_and_ambiguous_names(tmp_path):
    save(tmp_path / "r" / "a.nii", cube(4))
    save(tmp_path / "p" / "b.nii", cube(4))
    with pytest.raises(BadFile, match="no two files have the same case name"):
        evaluate(tmp_path / "r", tmp_path / "p")
    with pytest.raises(BadFile, match="two files or two folders"):
        evaluate(tmp_path / "r", tmp_path / "p" / "b.nii")
    with pytest.raises(BadFile, match="there is no such"):
        evaluate(tmp_path / "r", tmp_path / "nowhere")
    save(tmp_path / "p" / "a.nii", cube(4))
    save(tmp_path / "p" / "a_seg.nii.gz", cube(4))
    with pytest.raises(BadFile, match=r"a\.nii and a_seg\.nii\.gz could both"):
        evaluate(tmp_path / "r", tmp_path / "p")


def test_statistics_of_hand_made_rows():
    nan, inf = float("nan"), float("inf")
    rows = [
        {"case": str(n), "structure": "x", "status": "ok", "score": value, "n_both": 3}
        for n, value in enumerate((1.0, 2.0, 4.0, nan, inf))
    ]
    summary = summarise(rows, bootstrap=500)
    one = summary["structures"]["x"]["score"]
    assert (one["n"], one["n_excluded"], one["n_inf"], one["median"], one["q1"], one["q3"]) == (
        5,
        1,
        1,
        2,
        1.5,
        3,
    )
    assert (
        one["mean"] == pytest.approx(7 / 3)
        and 1 <= one["ci95"][0] < one["mean"] < one["ci95"][1] <= 4
    )
    assert summary["mean_over_structures"]["score"] == one["mean"]
    assert "n_both" not in summary["structures"]["x"]


@pytest.fixture
def run():
    app = Typer()
    app.command()(evaluate_module.evaluate)
    app.command()(compare)
    app.command()(clean)
    return lambda *words: CliRunner().invoke(
        app, [str(word) for word in words], catch_exceptions=False
    )


def test_commands(folders, tmp_path, run):
    arguments = (
        "evaluate",
        folders / "reference",
        folders / "prediction",
        "--bootstrap",
        100,
        "--lesions",
        "label 1",
    )
    done = run(*arguments, "-o", tmp_path / "a", "--json", "--tolerance", 2)
    assert done.exit_code == 0
    summary = json.loads(done.stdout)
    assert summary["structures"]["label 1"]["lesion_f1"]["mean"] == 1
    assert "case_07: there is no prediction" in done.stderr
    done = run(*arguments, "-o", tmp_path / "b", "--surface", "voxel", "--labels", "label 1=1")
    assert "47 cases scored, 2 without prediction" in done.stdout and "label 1" in done.stdout
    with (tmp_path / "b" / "scores.csv").open() as file:
        assert {row["structure"] for row in csv.DictReader(file)} == {"label 1"}
    done = run(
        "compare",
        tmp_path / "a" / "scores.csv",
        tmp_path / "b" / "scores.csv",
        "--structure",
        "label 1",
        "--json",
    )
    assert json.loads(done.stdout)["n_cases"] == 47
    with pytest.raises(BadConfig, match="'brain' is not one of"):
        run(*arguments, "--labels", "1", "--tolerance", "brain=1")


def test_clean_command(tmp_path, run):
    labels = cube(4)
    labels[6, 6, 5] = 0
    labels[18, 16, 10] = 1
    save(tmp_path / "l.nii.gz", labels)
    out = tmp_path / "clean.nii.gz"
    done = run(
        "clean",
        tmp_path / "l.nii.gz",
        "-o",
        out,
        "--keep-largest",
        "--min-mm3",
        50,
        "--fill-holes",
        "--json",
    )
    assert json.loads(done.stdout)["voxels_changed"] == 2
    assert (read_labels(out).data == cube(4)).all()
    with pytest.raises(BadConfig, match="say what to do"):
        run("clean", tmp_path / "l.nii.gz", "-o", out)


def test_pictures_of_the_worst_case_show_what_differs(tmp_path):
    for n, start in enumerate((4, 5, 7)):
        save(tmp_path / "r" / f"case_{n}.nii.gz", cube(4))
        save(tmp_path / "p" / f"case_{n}.nii.gz", cube(start))
    evaluate(tmp_path / "r", tmp_path / "p", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    pictures = re.findall(
        r'alt="(case_\d): label 1, Dice ([\d.]+), (\w+) slice[^"]*"'
        r' src="data:image/png;base64,([^"]+)"',
        page,
    )
    assert [(case, plane) for case, _, plane, _ in pictures[:3]] == [
        ("case_2", "axial"),
        ("case_2", "coronal"),
        ("case_2", "sagittal"),
    ]
    picture = np.asarray(Image.open(BytesIO(base64.b64decode(pictures[0][3]))))
    height, width = picture.shape[:2]
    colors = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
    assert colors >= {(0, 0, 0), COLORS["both"], COLORS["reference"], COLORS["prediction"]}
    assert COLORS["other"] not in colors
    assert abs(width / height - 20 / 18) < 0.01  # as in mm
