"""Label maps as people have them: masks by structure, several volumes in a file, numbered names,
other values.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny
from medseg.errors import BadConfig, BadFile
from medseg.evaluation.pairs import find_table, match_cases
from medseg.evaluation.scoring import evaluate
from medseg.evaluation.summary import EvaluationOptions
from medseg.labels import Label, LabelTable


def save(data: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)


def labels() -> np.ndarray:
    """Two cubes: 1 of 216 voxels, 2 of 180."""
    data = np.zeros((16, 14, 12), np.uint8)
    data[2:8, 2:8, 2:8] = 1
    data[9:14, 2:8, 3:9] = 2
    return data


def shifted() -> np.ndarray:
    return np.roll(labels(), 1, 0)


#: Dice of a cube against itself moved by a voxel along its first side.
SHIFTED = {"one": 2 * 180 / 432, "two": 2 * 144 / 360}


def save_masks(folder: Path, data: np.ndarray, names: dict[str, int]) -> None:
    for name, value in names.items():
        save((data == value).astype(np.uint8), folder / f"{name}.nii.gz")


def dice_of(reference: Path, prediction: Path, **options: object) -> dict[str, float]:
    result = evaluate(reference, prediction, **options)  # type: ignore[arg-type]
    return {row["structure"]: row["dice"] for row in result.rows}


# Several volumes in a file ------------------------------------------------------------------------


def one_hot(kind: str) -> np.ndarray:
    classes = np.stack([labels() == value for value in range(3)], -1).astype(np.float32)
    if kind == "softmax":
        return np.exp(4 * classes) / np.exp(4 * classes).sum(-1, keepdims=True)
    if kind == "sigmoid without background":
        return 0.02 + 0.9 * classes[..., 1:]
    return classes.astype(np.uint8) if kind == "masks as bytes" else classes


@pytest.mark.parametrize(
    "kind", ["one-hot", "softmax", "sigmoid without background", "masks as bytes"]
)
@pytest.mark.parametrize("side", ["reference", "prediction"])
def test_volumes_of_classes_are_refused_with_a_remedy_that_can_be_followed(
    tmp_path: Path, kind: str, side: str
):
    classes = one_hot(kind)
    save(classes, tmp_path / "classes.nii.gz")
    save(labels(), tmp_path / "labels.nii.gz")
    files = [tmp_path / "labels.nii.gz", tmp_path / "classes.nii.gz"]
    with pytest.raises(
        BadFile, match=f"holds {classes.shape[-1]} volumes.*of each class.*largest value wins"
    ):
        evaluate(*(files if side == "prediction" else files[::-1]))
    best = (
        classes.argmax(-1)
        if kind != "sigmoid without background"
        else (classes.max(-1) > 0.5) * (classes.argmax(-1) + 1)
    )
    save(best.astype(np.uint8), tmp_path / "classes.nii.gz")
    assert set(dice_of(*files).values()) == {1.0}


def test_one_of_several_label_maps_in_a_file_is_chosen_with_the_option_that_is_advised(
    tmp_path: Path,
):
    save(np.stack([labels() * 0, labels() * 3, shifted()], -1), tmp_path / "four.nii.gz")
    save(labels(), tmp_path / "reference.nii.gz")
    command = (
        "evaluate",
        tmp_path / "reference.nii.gz",
        tmp_path / "four.nii.gz",
        "-o",
        tmp_path / "out",
        "--json",
    )
    ran = tiny.medseg(*command)
    assert ran.code == 3 and "choose one with --volume N (0 to 2)" in ran.err
    ran = tiny.medseg(*command, "--volume", "2")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["structures"]["label 1"]["dice"]["mean"] == pytest.approx(SHIFTED["one"])
    assert summary["options"]["volume"] == 2
    assert tiny.medseg(*command, "--volume", "3").code == 3


def test_clean_says_what_a_folder_holds_and_takes_the_volume_that_is_advised(tmp_path: Path):
    save(np.stack([labels(), labels() * 3], -1), tmp_path / "maps" / "four.nii.gz")
    ran = tiny.medseg("clean", tmp_path / "maps", "-o", tmp_path / "x.nii.gz", "--keep-largest")
    assert ran.code == 3 and "is a folder" in ran.err and "1 in the folder itself" in ran.err
    command = (
        "clean",
        tmp_path / "maps" / "four.nii.gz",
        "-o",
        tmp_path / "x.nii.gz",
        "--keep-largest",
    )
    ran = tiny.medseg(*command)
    assert ran.code == 3 and "--volume" in ran.err
    assert tiny.medseg(*command, "--volume", "1").code == 0
    assert np.array_equal(np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj), labels() * 3)
    save(one_hot("softmax"), tmp_path / "maps" / "four.nii.gz")
    assert "largest value wins" in tiny.medseg(*command).err


# Masks by structure -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction", ["segmentations", "masks", "label maps with a table", "results of infer"]
)
def test_folders_of_masks_are_cases_and_their_names_are_structures(tmp_path: Path, prediction: str):
    table = LabelTable((Label(5, "two", (9, 9, 9)), Label(3, "one", (1, 2, 3))))
    for case in ("s1", "s2"):
        save_masks(tmp_path / "data" / case / "segmentations", labels(), {"one": 1, "two": 2})
        save(
            np.random.default_rng(0).normal(0, 1, (16, 14, 12)).astype(np.float32),
            tmp_path / "data" / case / "ct.nii.gz",
        )
        theirs = tmp_path / "theirs"
        if prediction in ("segmentations", "masks"):
            inner = "segmentations" if prediction == "segmentations" else ""
            save_masks(theirs / case / inner, shifted(), {"one": 1, "two": 2})
            continue
        values = np.array([0, 3, 5], np.uint8)[shifted()]
        name = f"{case}_ct_seg" if prediction == "results of infer" else case
        save(values, theirs / f"{name}.nii.gz")
        table.write(
            theirs / (f"{name}.labels.csv" if prediction == "results of infer" else "labels.csv")
        )
    known = find_table(None, tmp_path / "data", tmp_path / "theirs")
    result = evaluate(tmp_path / "data", tmp_path / "theirs", tmp_path / "out", table=known)
    assert result.summary["cases"]["scored"] == ["s1", "s2"]
    assert result.problems == []
    assert {row["structure"]: row["dice"] for row in result.rows} == pytest.approx(SHIFTED)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_single_case_of_masks_is_scored_against_a_folder_or_a_label_map(tmp_path: Path):
    save_masks(tmp_path / "s1" / "segmentations", labels(), {"one": 1, "two": 2})
    save_masks(tmp_path / "theirs", shifted(), {"two": 2, "one": 1})
    assert dice_of(tmp_path / "s1", tmp_path / "theirs") == pytest.approx(SHIFTED)
    save(shifted(), tmp_path / "map.nii.gz")
    table = LabelTable((Label(1, "one", (9, 9, 9)), Label(2, "two", (1, 2, 3))))
    assert dice_of(tmp_path / "s1", tmp_path / "map.nii.gz", table=table) == pytest.approx(SHIFTED)
    save(labels(), tmp_path / "map.nii.gz")
    assert dice_of(tmp_path / "map.nii.gz", tmp_path / "theirs", table=table) == pytest.approx(
        SHIFTED
    )


def test_masks_beside_numbers_that_nothing_names_are_refused(tmp_path: Path):
    save_masks(tmp_path / "data" / "s1" / "segmentations", labels(), {"one": 1, "two": 2})
    save(shifted(), tmp_path / "theirs" / "s1.nii.gz")
    with pytest.raises(
        BadConfig, match=r"nothing names the labels of .*theirs; give a table of them with --table"
    ):
        evaluate(tmp_path / "data", tmp_path / "theirs")


def test_a_structure_without_a_mask_in_a_reference_is_not_scored_there(tmp_path: Path):
    """As in training: what has no mask was not annotated, and a prediction of it is no mistake."""
    save_masks(tmp_path / "data" / "s1" / "segmentations", labels(), {"one": 1, "two": 2})
    save_masks(tmp_path / "data" / "s2" / "segmentations", labels(), {"one": 1})
    for case in ("s1", "s2"):
        save_masks(tmp_path / "theirs" / case, shifted(), {"one": 1, "two": 2})
    result = evaluate(
        tmp_path / "data", tmp_path / "theirs", options=EvaluationOptions(empty="best_worst")
    )
    assert [(row["case"], row["structure"]) for row in result.rows] == [
        ("s1", "one"),
        ("s1", "two"),
        ("s2", "one"),
    ]
    assert result.problems == [
        "two: 1 of 2 references have no mask of it, and it was not scored there"
    ]


def test_a_label_map_among_masks_is_named(tmp_path: Path):
    save_masks(tmp_path / "data" / "s1" / "segmentations", labels(), {"one": 1, "two": 2})
    save(labels(), tmp_path / "data" / "s1" / "segmentations" / "all.nii.gz")
    save_masks(tmp_path / "theirs" / "s1", labels(), {"one": 1, "two": 2})
    with pytest.raises(BadFile, match=r"all.nii.gz: holds several values"):
        evaluate(tmp_path / "data", tmp_path / "theirs")


# Names that differ --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs", "left"),
    [
        (("a", "b"), ("a_0000", "b_0000"), ("a", "b"), ()),
        (("a_0000", "b_0000"), ("a", "b_seg"), ("a", "b"), ()),
        (("case_0000", "case_0001"), ("case_0000", "case_0001"), ("case_0000", "case_0001"), ()),
        (("a", "b"), ("a_0000", "a_0001", "b"), ("b",), ("a", "a_0000", "a_0001")),
        (("a", "b"), ("a", "a_0000", "b"), ("a", "b"), ("a_0000",)),
        (("a", "c"), ("a_0001", "c"), ("c",), ("a", "a_0001")),
    ],
)
def test_a_channels_number_is_left_out_where_that_is_the_only_possibility(
    tmp_path: Path,
    ours: tuple[str, ...],
    theirs: tuple[str, ...],
    pairs: tuple[str, ...],
    left: tuple[str, ...],
):
    for folder, names in (("r", ours), ("p", theirs)):
        for name in names:
            save(labels(), tmp_path / folder / f"{name}.nii.gz")
    found, missing, extra = match_cases(tmp_path / "r", tmp_path / "p")
    assert tuple(found) == pairs
    assert sorted([*missing, *extra]) == sorted(left)


def test_names_without_a_pair_are_told_with_one_of_each_side(tmp_path: Path):
    save(labels(), tmp_path / "r" / "patient 1.nii.gz")
    save(labels(), tmp_path / "p" / "case_7_seg.nii.gz")
    with pytest.raises(
        BadFile, match="1 and 1 label maps were found, such as 'patient 1' and 'case_7'"
    ):
        evaluate(tmp_path / "r", tmp_path / "p")


# Values that differ -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (
            (0, 1, 1),
            (0, 255, 255),
            r"the reference has 1 and the prediction 255; .*--labels name=1\+255",
        ),
        ((0, 1, 2), (0, 17, 53), "the reference has 1, 2 and the prediction 17, 53"),
        ((0, 200, 0), (0, 0, 7), "the reference has 200 and the prediction 7"),
    ],
)
def test_that_no_value_is_in_common_is_told(
    tmp_path: Path, ours: tuple[int, ...], theirs: tuple[int, ...], words: str
):
    for case in ("a", "b"):
        save(np.array(ours, np.uint8)[labels()], tmp_path / "r" / f"{case}.nii.gz")
        save(np.array(theirs, np.uint8)[labels()], tmp_path / "p" / f"{case}.nii.gz")
    result = evaluate(tmp_path / "r", tmp_path / "p")
    (problem,) = result.problems
    assert problem.startswith("2 of 2 cases have no label value in common: in a ")

    assert re.search(words, problem)
    assert result.summary["problems"] == result.problems


def test_nothing_is_told_of_values_that_are_in_common_or_made_so_or_not_there(tmp_path: Path):
    save(labels(), tmp_path / "r.nii.gz")
    save(np.array([0, 9, 2], np.uint8)[labels()], tmp_path / "half.nii.gz")
    save(labels() * 0, tmp_path / "empty.nii.gz")
    save((labels() > 0) * np.uint8(255), tmp_path / "mask.nii.gz")
    for name, options in (
        ("half", EvaluationOptions()),
        ("empty", EvaluationOptions()),
        ("mask", EvaluationOptions(structures={"mask": (1, 2, 255)})),
    ):
        assert (
            evaluate(tmp_path / "r.nii.gz", tmp_path / f"{name}.nii.gz", options=options).problems
            == []
        )


# Cases that were seen -----------------------------------------------------------------------------


def test_the_one_hot_case_is_refused_as_it_should_be(shared_data: Path, tmp_path: Path):
    made = tiny.run_child(shared_data / "cases" / "work" / "evaluate-one-hot" / "make.py", tmp_path)
    assert made.code == 0, made.err
    for command in (("evaluate", "reference", "prediction"), ("clean", "prediction/case.nii.gz")):
        ran = tiny.medseg(
            command[0], *(tmp_path / part for part in command[1:]), "-o", tmp_path / "out.nii.gz",
            *(("--keep-largest",) if command[0] == "clean" else ()),
        )  # fmt: skip
        assert ran.code == 3
        assert "holds 3 volumes that look like a mask or probability of each class" in ran.err
        assert "largest value wins" in ran.err


def test_the_data_set_of_one_channel_infers_and_evaluates(shared_data: Path, tmp_path: Path):
    make = shared_data / "cases" / "work" / "infer-names-0000" / "make.py"
    made = tiny.run_child(make, shared_data, tmp_path)
    assert made.code == 0, made.err
    data = tmp_path / "data"
    ran = tiny.medseg(
        "infer", data / "imagesTr", "-o", tmp_path / "labels", "--model", "otsu", "-q"
    )
    assert ran.code == 0, ran.err
    ran = tiny.medseg(
        "evaluate",
        data / "labelsTr",
        tmp_path / "labels",
        "-o",
        tmp_path / "report",
        "--json",
        "-q",
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["cases"]["scored"] == ["hippo_000", "hippo_001", "hippo_002"]
    made_elsewhere = tmp_path / "elsewhere"
    made_elsewhere.mkdir()
    for file in sorted((data / "labelsTr").iterdir()):
        shutil.copy(file, made_elsewhere / file.name.replace(".nii.gz", "_0000.nii.gz"))
    pairs, missing, extra = match_cases(data / "labelsTr", made_elsewhere)
    assert (len(pairs), missing, extra) == (3, [], [])
