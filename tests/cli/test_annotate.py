"""`medseg add`, `next` and `rounds`: the loop from a few labelled scans to a better model, as a
person types it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from making import networks as tiny
from making.datasets import make_case, put
from medseg.annotation import Store
from medseg.cli.schema import schema_of
from medseg.io import embedded_table, read_labels, write
from medseg.labels import Code, Label, LabelTable
from medseg.volume import crop

pytestmark = pytest.mark.usefixtures("one_thread")

BALL = Code("SCT", "123037004", "Anatomical Structure")
TABLE = LabelTable(
    (
        Label(1, "front ball", (10, 20, 30), BALL, Code("SCT", "1", "Front")),
        Label(2, "back ball", (200, 30, 40)),
    )
)
SMALL = {
    "train.steps": 30,
    "train.warmup": 2,
    "train.learning_rate": 0.01,
    "train.log_every": 10,
    "train.validate_every": 15,
    "train.validate_samples": 1,
    "train.precision": "fp32",
    "model.patch": [16, 16, 16],
    "model.options": {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]},
}


#: Command -> the schema of what it prints.
KINDS = {"add": "added", "next": "next", "rounds": "rounds", "check": "check"}


def train(data: Path, run: Path, *words: object) -> tiny.Ran:
    pairs = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    changes = [word for pair in pairs for word in ("--set", pair)]
    return tiny.medseg("train", data, "-o", run, "--progress", "json", *changes, *words)


def told(*words: object) -> Any:
    """What a command prints as JSON."""
    ran = tiny.medseg(*words, "--json", "-q")
    assert ran.code == 0, ran.err
    content, kind = json.loads(ran.out), KINDS[str(words[0])]
    jsonschema.Draft202012Validator(schema_of(kind)).validate(content)
    return content


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Scans case_0 ... case_5 and their true segmentations, as 3D Slicer has them."""
    for number in range(6):
        image, labels = make_case(number)
        put(image, tmp_path / "scans" / f"case_{number}.nii.gz")
        (tmp_path / "truth").mkdir(exist_ok=True)
        write(labels, tmp_path / "truth" / f"case_{number}.seg.nrrd", table=TABLE)
    return tmp_path


def test_the_loop_from_four_scans_to_a_second_model(files: Path):
    data = files / "set"
    for number in range(4):
        scan = files / "scans" / f"case_{number}.nii.gz"
        ran = tiny.medseg("add", data, scan, "-l", files / "truth" / f"case_{number}.seg.nrrd")
        assert ran.code == 0, ran.err
    assert ran.out == "case_3: final, front ball, back ball, to train with\n"
    ran = train(data, data / "runs" / "1")
    assert ran.code == 0, ran.err
    events = [json.loads(line) for line in ran.err.splitlines() if line.startswith("{")]
    assert {"progress", "training", "validation"} <= {one["event"] for one in events}
    for one in events:
        jsonschema.Draft202012Validator(schema_of("progress")).validate(one)

    choice = told("next", data, "--from", files / "scans")
    assert choice["case"] in ("case_4", "case_5") and choice["without_label"] == 2
    assert 0 <= choice["score"] <= 1 and choice["disagreement"] is None
    proposal = Path(choice["proposal"])
    table = embedded_table(proposal)
    assert table is not None and table.names == TABLE.names
    assert read_labels(proposal).shape == make_case(int(choice["case"][-1]))[0].shape
    assert Store.open(data).case(choice["case"]).state == "proposed"

    truth = files / "truth" / f"{choice['case']}.seg.nrrd"
    added = told("add", data, "--id", choice["case"], "--labels", truth)
    (case,) = added["cases"]
    assert (case["state"], case["structures"]) == ("final", ["front ball", "back ball"])
    ran = train(data, data / "runs" / "2", "--finetune", data / "runs" / "1")
    assert ran.code == 0, ran.err
    compared = told("rounds", data)
    assert compared["cases"] == ["case_1"]  # which validates for good
    first, second = compared["rounds"]
    assert (first["from"], second["from"]) == (None, "1")
    assert choice["case"] in second["training"] and choice["case"] not in first["training"]
    for one in (first, second):
        assert set(one["structures"]) == {"front ball", "back ball"}
        assert one["mean_dice"] == pytest.approx(
            np.mean(list(one["structures"].values())), abs=1e-3
        )
    assert told("rounds", data) == compared
    again = told("next", data, "--from", files / "scans", "-o", files / "p.seg.nrrd")
    assert again["case"] != choice["case"]
    # So short a training may find nothing in a scan, and then there is nothing to disagree about.
    assert again["disagreement"] is not None or "finds nothing" in again["why"]
    check = told("check", data)
    assert check["findings"] == [] and len(check["cases"]) == 5
    assert Store.open(data).table == TABLE


def test_findings_of_check_name_the_cases_of_the_data_set(files: Path):
    data = files / "set"
    for number in range(4):
        scan = files / "scans" / f"case_{number % 3}.nii.gz"
        labels = files / "truth" / f"case_{number % 3}.seg.nrrd"
        ran = tiny.medseg("add", data, scan, "-l", labels, "--id", f"scan {number}")
        assert ran.code == 0, ran.err
    ran = tiny.medseg("check", data, "--json", "-q")
    findings = json.loads(ran.out)["findings"]
    assert findings and {one["case"] for one in findings} <= {"scan 0", "scan 3"}


def test_scans_are_added_by_the_folder_and_several_channels_as_one(files: Path):
    ran = tiny.medseg("add", files / "set", files / "scans")
    assert ran.code == 0 and ran.out.splitlines()[0] == "case_0: unlabelled"
    assert [one.id for one in Store.open(files / "set").cases()] == [f"case_{n}" for n in range(6)]
    one, other = files / "scans" / "case_0.nii.gz", files / "scans" / "case_0.nii.gz"
    words = ("--channel", other, "--modalities", "T1,FLAIR", "--split", "val", "--group", "anna")
    (case,) = told("add", files / "two", one, *words)["cases"]
    assert len(case["files"]) == 2 and case["split"] == "val"
    assert Store.open(files / "two").channels == ("T1", "FLAIR")


def test_names_and_values_come_from_tables_and_models(files: Path):
    labels = make_case(0)[1]
    put(labels, files / "plain.nii.gz")
    sides = LabelTable((Label(1, "Left body", (0, 0, 0)), Label(2, "right-body", (0, 0, 0))))
    sides.write(files / "names.csv")
    scan, data = files / "scans" / "case_0.nii.gz", files / "set"
    model = tiny.save_known(files / "model")
    words = ("-l", files / "plain.nii.gz", "--table", files / "names.csv", "-m", model)
    assert tiny.medseg("add", data, scan, *words).code == 0
    assert Store.open(data).table.names == {2: "Left body", 41: "right-body"}
    stored = Store.open(data).read_label("case_0")[0].data
    assert np.array_equal(stored == 2, labels.data == 1)
    other = ("-l", files / "truth" / "case_1.seg.nrrd", "--segment", "front ball")
    ran = tiny.medseg("add", data, files / "scans" / "case_1.nii.gz", *other)
    assert ran.code == 0 and "does not name Left body, right-body" in ran.err


def refused(*words: object) -> str:
    """The sentence with which a command ends."""
    ran = tiny.medseg(*words)
    assert ran.code in (2, 3, 4, 5) and ran.out == "", ran
    return ran.err


def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_left(files: Path):
    data, scan, truth = files / "set", files / "scans" / "case_0.nii.gz", files / "truth"
    write(crop(make_case(0)[1], (0, 0, 0), (9, 9, 9)), files / "small.nii.gz")
    TABLE.write(files / "small.labels.csv")
    put(make_case(0)[1], files / "nameless.nii.gz")
    cases = [
        (("add", data, scan, "-l", files / "small.nii.gz"), "small.nii.gz: has 9 x 9 x 9"),
        (("add", data, scan, "-l", files / "nameless.nii.gz"), "names no structures"),
        (("add", data, scan, "--id", "../x"), "'../x' is no id"),
        (("add", data, files / "nothing.nii.gz"), "nothing.nii.gz"),
        (("add", data, files / "scans", "-l", truth / "case_0.seg.nrrd"), "goes with one scan"),
        (("add", data, "--id", "a", "-l", truth / "case_0.seg.nrrd"), "does not exist"),
        (("add", data), "give scans, or the id"),
        (("add", data, scan, "--split", "some"), "'some' is not one of auto, train, val, test"),
        (("add", files / "scans", scan), "is not empty"),
        (("next", data), "does not exist"),
        (("rounds", files / "scans"), "holds no cases.csv"),
    ]
    for words, text in cases:
        assert text in refused(*words)
        assert not data.exists()
    assert tiny.medseg("add", data, scan).code == 0
    assert "is there already" in refused("add", data, scan)
    assert "has no trained model yet" in refused("next", data)
    assert "give one that was trained" in refused("next", data, "-m", "otsu")
    ran = tiny.medseg("rounds", data)
    assert ran.code == 0 and "nothing was trained yet" in ran.err
