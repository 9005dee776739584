"""What medseg writes and prints is what its JSON Schemas say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from making import networks as tiny, phantoms
from medseg.cli.schema import descriptions, schema_of
from medseg.models.folder import BUNDLED

pytestmark = pytest.mark.usefixtures("known_networks")


def check(kind: str, content: Any) -> None:
    """Raises unless the schema allows it."""
    jsonschema.Draft202012Validator(schema_of(kind)).validate(content)


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def printed(*words: object) -> Any:
    ran = tiny.medseg(*words)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans with their results, a model, a data set and a run."""
    folder = tmp_path_factory.mktemp("place")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("scans/a", "scans/b", "c_0000", "c_0001"):
        (folder / name).parent.mkdir(exist_ok=True)
        tiny.save_scan(folder / f"{name}.nii.gz")
    tiny.save_known(folder / "model")
    tiny.save_two_channels(folder / "two")
    done = tiny.medseg(
        "infer", folder / "scans", "-o", folder / "labels", "-m", folder / "model",
        "--device", "cpu", "--progress", "json",
    )  # fmt: skip
    assert done.code == 0, done.err
    (folder / "events.jsonl").write_text(done.err)
    changes = {
        "train.steps": 4, "train.warmup": 2, "train.log_every": 2, "train.validate_every": 4,
        "train.validate_samples": 1, "train.precision": "fp32", "model.patch": [16, 16, 16],
        "model.options": {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]},
    }  # fmt: skip
    settings = [
        word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    data = phantoms.dataset(folder / "data")
    run = tiny.medseg("train", data, "-o", folder / "run", "--quiet", *settings)
    assert run.code == 0, run.err
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("kind", sorted(descriptions()))
def test_every_schema_is_one_and_is_printed(kind: str):
    schema = printed("schema", kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] and schema["description"]
    with pytest.raises(jsonschema.ValidationError):
        check(kind, {"something": "else"} if kind != "models" else [{}])


def test_the_list_names_every_schema():
    out = tiny.medseg("schema").out
    assert all(
        any(line.split()[:1] == [kind] for line in out.splitlines()) for kind in descriptions()
    )
    ran = tiny.medseg("schema", "records")
    assert ran.code == 2
    assert "record" in ran.err


@pytest.mark.parametrize(
    "words",
    [
        ("scans/a.nii.gz", "-m", "model", "--instances", "--uncertainty", "--at=10,20"),
        ("scans/a.nii.gz", "-m", "model", "--roi", "left body", "--probabilities", "2,right-body"),
        ("scans/a.nii.gz", "-m", "otsu", "--also", "lut,itksnap", "--table", "names.label"),
        ("c_0000.nii.gz", "--channel", "c_0001.nii.gz", "-m", "two"),
    ],
)
def test_records(words: tuple[str, ...], place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(place)
    Path("names.label").write_text('1 1 2 3 1 1 1 "the bright part"\n')
    content = printed("infer", *words, "-o", tmp_path / "l.nii.gz", "--device", "cpu", "--json")
    check("record", content)
    check("record", read(tmp_path / "l.json"))


def test_events_while_scans_are_segmented(place: Path):
    events = lines((place / "events.jsonl").read_text())
    for event in events:
        check("progress", event)
    assert {event["event"] for event in events} == {"progress", "announcement", "scans"}


def test_what_a_training_run_holds(place: Path):
    for name in ("plan", "splits", "data", "summary"):
        check(name, read(place / "run" / f"{name}.json"))
    check("model", read(place / "run" / "model" / "model.json"))
    for row in lines((place / "run" / "metrics.jsonl").read_text()):
        check("metrics", row)


@pytest.mark.parametrize("name", sorted(path.name for path in BUNDLED.iterdir() if path.is_dir()))
def test_bundled_models(name: str):
    if (BUNDLED / name / "model.json").is_file():
        check("model", read(BUNDLED / name / "model.json"))


COMMANDS: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    "evaluate": (lambda p: ("evaluate", p / "labels", p / "labels", "-o", p / "e"), "summary"),
    "lesions": (
        lambda p: (
            "evaluate", p / "labels", p / "labels", "-o", p / "e2", "--lesions", "left body",
            "--tolerance", "2=3", "--ignore", "41",
        ),
        "summary",
    ),
    "check": (lambda p: ("check", p / "data"), "check"),
    "info of a scan": (lambda p: ("info", p / "scans" / "a.nii.gz"), "info"),
    "info of a model": (lambda p: ("info", p / "model"), "info"),
    "info of a model by name": (lambda p: ("info", "brain-fast"), "info"),
    "info of a model that is not trained": (lambda p: ("info", "kmeans"), "info"),
    "models": (lambda p: ("models",), "models"),
    "models of a folder": (lambda p: ("models", p), "models"),
    "volumes": (
        lambda p: (
            "volumes", p / "labels" / "a_seg.nii.gz", "--scan", p / "scans" / "a.nii.gz"
        ),
        "volumes",
    ),
    "clean": (
        lambda p: (
            "clean", p / "labels" / "a_seg.nii.gz", "-o", p / "clean.nii.gz", "--keep-largest",
            "--labels", "LEFT body",
        ),
        "clean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMANDS)
def test_what_commands_print(what: str, place: Path):
    words, kind = COMMANDS[what]
    check(kind, printed(*words(place), "--json"))


def test_a_comparison(place: Path, tmp_path: Path):
    for name in ("a", "b"):
        ran = tiny.medseg("evaluate", place / "labels", place / "labels", "-o", tmp_path / name)
        assert ran.code == 0
    files = [tmp_path / name / "scores.csv" for name in ("a", "b")]
    check("comparison", printed("compare", *files, "--structure", "Left_Body", "--json"))


def test_labels_with_names(place: Path, tmp_path: Path):
    labels = tmp_path / "a.seg.nrrd"
    assert tiny.medseg("convert", place / "labels" / "a_seg.nii.gz", labels).code == 0
    check("info", printed("info", labels, "--json"))


@pytest.mark.usefixtures("one_thread")
def test_a_cohort(place: Path, tmp_path: Path):
    scans = tmp_path / "scans"
    scans.mkdir()
    tiny.save_scan(scans / "good.nii.gz")
    (scans / "bad.nii.gz").write_text("no scan")
    words = ("batch", scans, "-o", tmp_path / "out", "-m", "otsu", "--workers", "1", "--json")
    check("batch-plan", printed(*words, "--dry-run"))
    ran = tiny.medseg(*words, "--quiet")
    assert ran.code == 3
    check("batch", json.loads(ran.out))
    check("cohort", read(tmp_path / "out" / "cohort.json"))
    records = list((tmp_path / "out" / "records").rglob("*.json"))
    assert len(records) == 2
    for path in records:
        check("case", read(path))
    for path in (tmp_path / "out" / "log").iterdir():
        for row in lines(path.read_text()):
            check("cohort-log", row)
    check("gather", printed("gather", tmp_path / "out", "--json"))


def test_an_exported_network(place: Path, tmp_path: Path):
    pytest.importorskip("onnxscript")
    content = printed("export", place / "model", "-o", tmp_path / "n.onnx", "--json")
    check("exported", content)
    check("export", read(tmp_path / "n.json"))


def test_exported_surfaces(tmp_path: Path):
    data = np.zeros((6, 6, 6), np.uint8)
    data[1:5, 1:5, 1:5] = 1
    tiny.save_nifti(tmp_path / "a.nii.gz", data, np.eye(4))
    content = printed("export", tmp_path / "a.nii.gz", "--gltf", tmp_path / "a.glb", "--json")
    check("exported", content)
