"""What dataset.json says twice or otherwise than the files: doubled keys, counts, endings."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from making import datasets as made
from making.datasets import make_case, put, put_json
from making.places import ROOT
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.reading import read_dataset
from medseg.io import write


def nnunet(folder: Path, count: int = 4, **more: object) -> Path:
    for number in range(count):
        image, labels = make_case(number)
        put(image, folder / f"imagesTr/c{number}_0000.nii.gz")
        put(labels, folder / f"labelsTr/c{number}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "front": 1, "back": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    put_json(content | more, folder / "dataset.json")
    return folder


def unpack(path: Path) -> Path:
    plain = path.with_suffix("")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return plain


def found(folder: Path, kind: str) -> list[tuple[str, str, str]]:
    findings = read_dataset(folder).findings
    return [(one.case, one.severity, one.message) for one in findings if one.kind == kind]


def test_what_is_in_order_gives_no_finding(tmp_path: Path):
    assert read_dataset(nnunet(tmp_path / "a")).findings == ()
    assert read_dataset(made.decathlon(tmp_path / "b")).findings == ()


@pytest.mark.parametrize("which", ["images", "labels", "both"])
def test_files_of_another_ending_are_used_and_said(which: str, tmp_path: Path):
    folder = nnunet(tmp_path)
    for part, name in (("images", "c2_0000.nii.gz"), ("labels", "c2.nii.gz")):
        if which in (part, "both"):
            unpack(folder / f"{part}Tr" / name)
    dataset = read_dataset(folder)
    assert [case.name for case in dataset.cases] == ["c0", "c1", "c2", "c3"]
    ((case, severity, message),) = found(folder, "ending")
    assert (case, severity) == ("", "warning")
    assert "1 of 4 cases" in message and "c2" in message and ".nii.gz" in message
    assert {one.case for one in check_dataset(dataset).facts} == {"c0", "c1", "c2", "c3"}


def test_another_format_is_used_too(tmp_path: Path):
    folder = nnunet(tmp_path)
    image, labels = make_case(1)
    (folder / "imagesTr/c1_0000.nii.gz").unlink()
    (folder / "labelsTr/c1.nii.gz").unlink()
    write(image, folder / "imagesTr/c1_0000.nrrd")
    write(labels, folder / "labelsTr/c1.mha")
    dataset = read_dataset(folder)
    assert [path.name for path in dataset["c1"].images] == ["c1_0000.nrrd"]
    assert len(found(folder, "ending")) == 1


def test_of_two_files_of_one_name_the_described_one_is_used_and_the_other_is_said(tmp_path: Path):
    folder = nnunet(tmp_path)
    plain = folder / "imagesTr/c3_0000.nii"
    plain.write_bytes(gzip.decompress((folder / "imagesTr/c3_0000.nii.gz").read_bytes()))
    dataset = read_dataset(folder)
    assert [path.name for path in dataset["c3"].images] == ["c3_0000.nii.gz"]
    assert [message for *_, message in found(folder, "unpaired") if str(plain) in message]


def test_a_channel_of_another_ending_keeps_its_place(tmp_path: Path):
    folder = nnunet(tmp_path, channel_names={"0": "T1", "1": "T2"})
    for number in range(4):
        put(make_case(10 + number)[0], folder / f"imagesTr/c{number}_0001.nii.gz")
    unpack(folder / "imagesTr/c0_0000.nii.gz")
    assert [path.name for path in read_dataset(folder)["c0"].images] == [
        "c0_0000.nii",
        "c0_0001.nii.gz",
    ]


@pytest.mark.parametrize("said", [3, 5, 0])
@pytest.mark.parametrize("layout", ["nnunet", "decathlon"])
def test_a_count_that_is_not_that_of_the_cases_is_said(said: int, layout: str, tmp_path: Path):
    folder = nnunet(tmp_path) if layout == "nnunet" else made.decathlon(tmp_path)
    content = json.loads((folder / "dataset.json").read_text())
    put_json(content | {"numTraining": said}, folder / "dataset.json")
    ((_, severity, message),) = found(folder, "count")
    assert severity == "warning" and f"numTraining {said}" in message and "4 cases" in message


DOUBLED = {
    "a structure": ('"front": 1', '"front": 1, "front": 5', "front", "error"),
    "all labels": ('"labels":', '"labels": {"other": 1}, "labels":', "labels", "error"),
    "a value": (
        '"channel_names":',
        '"file_ending": ".nii", "channel_names":',
        "file_ending",
        "error",
    ),
    "the same twice": (
        '"channel_names":',
        '"file_ending": ".nii.gz", "channel_names":',
        "file_ending",
        "warning",
    ),
}


@pytest.mark.parametrize("where", DOUBLED)
def test_a_key_that_is_there_twice_is_found(where: str, tmp_path: Path):
    old, new, key, severity = DOUBLED[where]
    folder = nnunet(tmp_path)
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace(old, new, 1))
    ((_, told, message),) = found(folder, "doubled key")
    assert told == severity and f"'{key}' 2 times" in message and str(path) in message


def test_doubled_keys_of_splits_and_lists_are_found(tmp_path: Path):
    folder = nnunet(tmp_path)
    (folder / "splits_final.json").write_text(
        '[{"train": ["c0"], "train": ["c1", "c2"], "val": ["c3"]}]'
    )
    assert [severity for _, severity, _ in found(folder, "doubled key")] == ["error"]
    lists = tmp_path / "lists"
    for number in range(2):
        for volume, name in zip(make_case(number), ("i", "l")):
            put(volume, lists / f"{name}{number}.nii.gz")
    (lists / "list.csv").write_text("case,image,label,mask\na,i0.nii.gz,l0.nii.gz,l1.nii.gz\n")
    assert len(found(lists / "list.csv", "doubled key")) == 1
    lines = ['{"case": "a", "image": "i0.nii.gz", "label": "l1.nii.gz", "label": "l0.nii.gz"}']
    (lists / "list.jsonl").write_text("\n".join(lines))
    assert len(found(lists / "list.jsonl", "doubled key")) == 1


def test_the_case_of_mixed_endings(shared_data: Path, tmp_path: Path):
    make = shared_data / "cases/work/mixed-endings/make.py"
    subprocess.run([sys.executable, make, shared_data, tmp_path], check=True, cwd=ROOT, timeout=600)
    dataset = read_dataset(tmp_path / "data")
    assert len(dataset.cases) == 6
    assert [one.kind for one in dataset.findings] == ["ending"]
