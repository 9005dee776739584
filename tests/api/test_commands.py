"""The commands from Python: one call each, with what the command line gives."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg
from making import configs, datasets, networks as tiny
from medseg.errors import BadConfig, BadFile, BadOutput

COMMANDS = (
    "batch", "check", "clean", "compare", "convert", "evaluate", "prepare", "train", "view"
)  # fmt: skip


def labels_of(shape: tuple[int, int, int] = (12, 13, 14)) -> medseg.Volume:
    data = np.zeros(shape, np.uint8)
    data[2:7, 2:8, 2:9] = 1
    data[8:11, 8:11, 8:12] = 2
    data[0, 0, 0] = 1  # a stray
    return medseg.Volume(data, tiny.affine_of())


TABLE = medseg.LabelTable((medseg.Label(1, "liver", (9, 8, 7)), medseg.Label(2, "cyst", (1, 2, 3))))


def test_the_calls_are_called_like_the_commands():
    from typer.main import get_command

    from medseg.cli.app import make_app

    names = set(get_command(make_app()).commands)  # type: ignore[attr-defined]
    assert set(COMMANDS) <= names and set(COMMANDS) <= set(dir(medseg))
    for name in COMMANDS:
        assert callable(getattr(medseg, name))


def test_the_package_of_pictures_can_be_called_and_is_still_a_package(tmp_path: Path):
    import medseg.view as package
    from medseg.view import write_page

    assert inspect.ismodule(package) and package is medseg.view and callable(write_page)
    assert list(inspect.signature(medseg.view).parameters)[:3] == ["scan", "labels", "output"]
    with pytest.raises(BadOutput, match=r"ends in \.html, \.mrb \(3D Slicer\) or \.png"):
        medseg.view(labels_of(), labels_of(), tmp_path / "view.pdf")


def test_evaluate_gives_the_scores_of_the_command_for_files_and_for_what_is_in_memory(
    tmp_path: Path,
):
    truth, found = labels_of(), labels_of()
    found.data[3, 3] = 0
    medseg.write(truth, tmp_path / "truth.nii.gz")
    medseg.write(found, tmp_path / "found.nii.gz")
    files = (tmp_path / "truth.nii.gz", tmp_path / "found.nii.gz")
    assert tiny.medseg("evaluate", *files, "-o", tmp_path / "cli", "-q").code == 0
    with (tmp_path / "cli" / "scores.csv").open() as file:
        expected = [float(row["dice"]) for row in csv.DictReader(file)]

    of_files = medseg.evaluate(*files, tmp_path / "out", bootstrap=0)
    of_volumes = medseg.evaluate(truth, found, labels={"liver": [1], "cyst": [2]}, table=TABLE)
    mixed = medseg.evaluate(files[0], (found.data, found.affine), labels="1,2")
    for one in (of_files, of_volumes, mixed):
        assert np.allclose([row["dice"] for row in one.rows], expected)
    assert (tmp_path / "out" / "report.html").is_file()
    assert [row["structure"] for row in of_volumes.rows] == ["liver", "cyst"]
    assert repr(of_volumes).startswith("<Evaluation of 1 case, 2 structures, mean Dice 0.9")
    with pytest.raises(TypeError, match="no option 'tolerance'; there are bootstrap, empty"):
        medseg.evaluate(*files, tolerance=2)  # type: ignore[call-arg]
    with pytest.raises(BadConfig, match="3 is a number; give a path"):
        medseg.evaluate(truth, 3)  # type: ignore[arg-type]


def test_compare_ranks_methods(tmp_path: Path):
    for name, dice in (("good", 0.9), ("poor", 0.5)):
        rows = [f"case{n},liver,{dice + n / 100}" for n in range(6)]
        text = "\n".join(["case,structure,dice", *rows])
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    result = medseg.compare([tmp_path / "poor.csv", tmp_path / "good.csv"], bootstrap=50)
    assert repr(result) == "<Comparison by dice over 6 cases: good > poor>"
    with pytest.raises(BadConfig, match="a list of two files or more, and this is a text"):
        medseg.compare("good.csv")  # type: ignore[arg-type]


def test_clean_is_what_the_command_does_to_files_and_to_what_is_in_memory(tmp_path: Path):
    medseg.write(labels_of(), tmp_path / "in.nii.gz")
    options = ("--keep-largest", "--labels", "1")
    out = tmp_path / "cli.nii.gz"
    assert tiny.medseg("clean", tmp_path / "in.nii.gz", "-o", out, *options).code == 0
    for one in (labels_of(), tmp_path / "in.nii.gz", (labels_of().data, labels_of().affine)):
        cleaned = medseg.clean(one, tmp_path / "out.nii.gz", keep_largest=True, only=[1])
        assert np.array_equal(cleaned.data, medseg.read_labels(out).data)
        assert np.array_equal(medseg.read_labels(tmp_path / "out.nii.gz").data, cleaned.data)
    assert cleaned.data[0, 0, 0] == 0
    with pytest.raises(BadConfig, match="say what to do: keep_largest"):
        medseg.clean(labels_of())


def test_check_finds_what_the_command_finds(tmp_path: Path):
    data = datasets.decathlon(tmp_path / "data", count=3)
    (data / "labelsTr" / "case_1.nii.gz").write_bytes(b"damaged")
    found = medseg.check(data)
    told = json.loads(tiny.medseg("check", data, "--json", "-q").out)
    assert len(found.errors) == told["errors"] > 0
    assert repr(found) == "<Check of 3 cases: 1 error, 0 warnings>"
    with pytest.raises(BadConfig, match="a data set is a path, and this is a list of 1 path"):
        medseg.check([tmp_path / "a.nii"])  # type: ignore[arg-type]


def test_convert_writes_what_the_command_writes(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    assert tiny.medseg("convert", scan, tmp_path / "cli.mha").code == 0
    for one in (scan, medseg.read(scan), (medseg.read(scan).data, medseg.read(scan).affine)):
        written = medseg.convert(one, tmp_path / "python.mha")
        assert written.read_bytes() == (tmp_path / "cli.mha").read_bytes()
    medseg.write(labels_of(), tmp_path / "labels.nii.gz")
    named = medseg.convert(tmp_path / "labels.nii.gz", tmp_path / "a.seg.nrrd", labels=TABLE)
    assert medseg.evaluate(named, named).rows[0]["structure"] == "liver"
    with pytest.raises(BadConfig, match="are about files"):
        medseg.convert(labels_of(), tmp_path / "b.nii.gz", repair=True)


@pytest.mark.parametrize("suffix", [".html", ".mrb", ".png"])
def test_view_writes_a_page_a_scene_or_a_picture(suffix: str, tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    result = medseg.segment(scan, "otsu")
    saved = result.save(tmp_path / "labels.nii.gz")
    whole = medseg.view(result, output=tmp_path / f"result{suffix}")
    parts = medseg.view(scan, saved, tmp_path / f"parts{suffix}")
    assert whole.stat().st_size > 1000 and parts.stat().st_size > 1000
    if suffix == ".png":
        assert whole.read_bytes() == parts.read_bytes()


def test_view_says_what_it_needs(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    with pytest.raises(BadConfig, match="give the labels too"):
        medseg.view(scan)
    with pytest.raises(BadConfig, match="open_page shows a page"):
        medseg.view(scan, scan, "a.png", open_page=True)


def test_train_trains_in_any_thread_and_load_takes_what_comes_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """From a config of label maps; training on scans is the same call of `medseg.training`."""
    caplog.set_level(logging.INFO, logger="medseg")
    path = configs.make_config(tmp_path)
    outcomes: list[Any] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(
            medseg.train(path, tmp_path / "run", changes={"train.steps": 2}, seed=3)
        )
    )
    thread.start()
    thread.join()
    (outcome,) = outcomes
    told = [one.getMessage() for one in caplog.records if one.name == "medseg.training.step"]
    assert any("'step': 2, 'loss': " in text for text in told)
    assert outcome.models == (tmp_path / "run" / "model",) and outcome.evaluation is None
    assert medseg.load(outcome.run).model == medseg.load(outcome.models[0]).model
    for wrong, says in (
        ({"fold": 1}, "fold goes with a data set"),
        ({"model": "unet"}, "model goe"),
    ):
        with pytest.raises(BadConfig, match=says):
            medseg.train(path, tmp_path / "other", **wrong)
    with pytest.raises(BadConfig, match="choose another output"):
        medseg.train(path, tmp_path / "run", resume=False)
    with pytest.raises(BadFile):
        medseg.train(tmp_path / "nothing")


def test_batch_does_a_cohort_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="medseg")
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    text = f"case,image_0\none,{scan}\ntwo,{scan}\nthree,{tmp_path / 'none.nii'}\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    result = medseg.batch(
        tmp_path / "list.csv", tmp_path / "out", "otsu", workers=1, pictures=False
    )
    assert (result.counts["done"], result.total) == (2, 3)
    assert [name for name, _, _ in result.failures] == ["three"]
    told = [one.getMessage() for one in caplog.records if one.name == "medseg.cohort.course"]
    assert [text.split(": ")[0] for text in told] == ["case 1", "case 2", "case 3"]
    again = medseg.batch(tmp_path / "list.csv", tmp_path / "out", "otsu", workers=1, pictures=False)
    assert again.counts == result.counts
    with pytest.raises(BadConfig, match="loads its model itself"):
        medseg.batch(tmp_path / "list.csv", tmp_path / "out", medseg.load("brain"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": -1}, "workers is a whole number from 0 to 1024, and -1"),
        ({"workers": "2"}, "workers is a whole number"),
        ({"part": (5, 2)}, "part 5 of 2: parts are numbered from 0"),
        ({"part": (0, 0)}, "part 0 of 0"),
        ({"part": "1/2"}, "a part is two numbers"),
        ({"retry": "failed"}, r"retry is a list of texts; give \['failed'\]"),
        ({"retry": ["foo"]}, "of failed, lost, timeout, memory, all"),
        ({"suffixes": "T1w"}, "suffixes is a list of texts"),
        ({"filters": 5}, "filters are a mapping"),
        ({"max_failed": "5%"}, "max_failed as a share is a number from 0 to 1"),
        ({"max_failed": -1}, "max_failed is a whole number"),
        ({"case_time_s": "1m"}, "case_time_s is a number"),
        ({"case_memory_bytes": "1GB"}, "case_memory_bytes is a number from 1 on"),
        ({"extras": 5}, "extras are a medseg.inference.Extras"),
    ],
)
def test_batch_refuses_what_it_cannot_do_before_it_begins(
    settings: dict[str, Any], says: str, tmp_path: Path
):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    (tmp_path / "list.csv").write_text(f"image\n{scan}\n", encoding="utf-8")
    with pytest.raises(BadConfig, match=says):
        medseg.batch(tmp_path / "list.csv", tmp_path / "out", "otsu", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bootstrap": -1}, "bootstrap is a whole number from 0 to 1000000"),
        ({"bootstrap": 10**9}, "bootstrap is a whole number"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"percentiles": (101,)}, "a percentile is a number from 0 to 100"),
        ({"percentiles": ("a",)}, "a percentile is a number"),
        ({"tolerance_mm": None}, "a tolerance in mm is a number"),
        ({"tolerance_mm": {"spleen": 1}}, "'spleen' is not one of the structures label 1, label 2"),
        ({"lesions": ("spleen",)}, "'spleen' is not one of the structures label 1, label 2"),
        ({"lesions": "label 1"}, r"lesions is a list of texts; give \['label 1'\]"),
        ({"lesion_options": {}}, "lesion_options are a"),
        ({"ignore": "cyst"}, "ignore is a whole number"),
        ({"resample": "no"}, "resample is True or False"),
        ({"labels": {"liver": ["a"]}}, "each label of 'liver' is a whole number"),
        ({"labels": {}}, "labels are a text such as '1,2' or a mapping"),
        ({"table": {1: "liver"}}, "a table is a medseg.LabelTable or its file, and this is a dict"),
        ({"scans": labels_of()}, "scans is a path, and this is a volume"),
        ({"output": 5}, "output is a path, and this is a number"),
    ],
)
def test_evaluate_names_what_is_no_option(options: dict[str, Any], says: str):
    with pytest.raises(BadConfig, match=says):
        medseg.evaluate(labels_of(), labels_of(), **options)


def test_evaluate_takes_numbers_as_programs_have_them():
    plain = medseg.evaluate(labels_of(), labels_of(), labels={"liver": [1]}, bootstrap=10)
    other = medseg.evaluate(
        labels_of(),
        labels_of(),
        labels={"liver": 1},
        bootstrap=np.int64(10),
        percentiles=95,  # type: ignore[arg-type]
        tolerance_mm=np.float32(1),
    )
    assert plain.rows == other.rows and plain.summary["options"] == other.summary["options"]


def test_convert_takes_structures_and_tables_as_the_command_does(tmp_path: Path):
    path = tmp_path / "labels.nii.gz"
    medseg.write(labels_of(), path)
    TABLE.write(tmp_path / "labels.labels.csv")
    for one in ("cyst", "2"):
        cli, python = tmp_path / "cli.nii.gz", tmp_path / "python.nii.gz"
        assert tiny.medseg("convert", path, cli, "--segment", one).code == 0
        medseg.convert(path, python, segment=[one])
        assert python.read_bytes() == cli.read_bytes()
        assert set(np.unique(medseg.read_labels(python).data)) == {0, 2}
    with pytest.raises(BadConfig, match=r"give \['cyst'\] for one"):
        medseg.convert(path, tmp_path / "a.nii.gz", segment="cyst")
    with pytest.raises(BadConfig, match="segment: there is no structure 'spleen'"):
        medseg.convert(path, tmp_path / "a.nii.gz", segment=["spleen"])
    for source in (path, tmp_path / "labels.labels.csv"):
        medseg.convert(source, tmp_path / "lut.txt")
        assert medseg.LabelTable.read(tmp_path / "lut.txt").names == TABLE.names


def test_clean_and_view_take_names_and_name_what_is_no_table(tmp_path: Path):
    path = tmp_path / "labels.nii.gz"
    medseg.write(labels_of(), path)
    TABLE.write(tmp_path / "labels.labels.csv")
    by_name = medseg.clean(path, keep_largest=True, only=["liver"])
    assert np.array_equal(by_name.data, medseg.clean(path, keep_largest=True, only=[1]).data)
    for only in (1, "liver"):
        with pytest.raises(BadConfig, match="only is a list of names or values"):
            medseg.clean(path, keep_largest=True, only=only)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match=r"a table is a medseg\.LabelTable or its file"):
        medseg.view(labels_of(), labels_of(), tmp_path / "a.png", table={1: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"time_s": "30m"}, "time_s is a number from 0 on"),
        ({"fold": "a"}, "a fold is a whole number"),
        ({"changes": 5}, "changes are a mapping"),
        ({"changes": {"train.batch": "x"}}, "train.batch: Input should be a valid integer"),
        ({"changes": {"model.spacing_mm": 0}}, "model.spacing_mm.*greater than 0.05, not 0"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"finetune": 5}, "finetune is a path, and this is a number"),
        ({"track": "wandb"}, r"track is a list of texts; give \['wandb'\]"),
        ({"max_memory_bytes": "4GB"}, "max_memory_bytes is a number"),
        ({"events": 5}, "events are a medseg.training.Events"),
    ],
)
def test_train_refuses_settings_before_it_reads_a_scan(
    settings: dict[str, Any], says: str, tmp_path: Path
):
    data = datasets.decathlon(tmp_path / "data", count=3)
    with pytest.raises(BadConfig, match=says):
        medseg.train(data, tmp_path / "run", **({"time_s": 60} | settings))
    assert not (tmp_path / "run").exists()
    if isinstance(settings.get("changes"), dict):
        words = [f"{key}={value}" for key, value in settings["changes"].items()]
        ran = tiny.medseg("train", data, "-o", tmp_path / "run", "--set", *words, "--time", "1m")
        assert ran.code == 5 and "Input should be" in ran.err
