"""Which model of nnU-Net a path means, and what is said where it means none or several."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import pytest

from making import nnunet as making
from medseg.errors import BadConfig, BadModel
from medseg.models.loading import list_models
from medseg.models.nnunet import read_foreign
from medseg.models.nnunet_folder import (
    find_model,
    fold_files,
    is_nnunet,
    postprocessing_file,
    read_postprocessing,
)

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def test_a_model_folder_a_dataset_folder_and_a_folder_of_one_are_the_same(tmp_path):
    model = making.write_model(tmp_path / "results" / "Dataset900_Made" / NAME)
    for path in (model, model.parent, tmp_path / "results"):
        assert is_nnunet(path)
        assert find_model(path).parts[0].folder == model


def test_a_flat_folder_is_a_model_whatever_its_name(tmp_path):
    model = making.write_model(tmp_path / "hd-bet", folds=("all",))
    assert [part.folder for part in find_model(model).parts] == [model]


def test_several_models_are_listed_and_one_is_asked_for(tmp_path):
    for name in (NAME, "nnUNetTrainer__nnUNetPlans__2d"):
        making.write_model(tmp_path / "Dataset900_Made" / name)
    with pytest.raises(BadModel) as caught:
        find_model(tmp_path / "Dataset900_Made")
    assert NAME in str(caught.value)
    assert "nnUNetPlans__2d" in str(caught.value)


def test_plans_beside_predictions_and_ensembles_are_no_model(tmp_path):
    data = tmp_path / "Dataset900_Made"
    model = making.write_model(data / NAME)
    for name in ("ensembles/ensemble___a___b___0", "predictions"):
        (data / name).mkdir(parents=True)
        for file in ("plans.json", "dataset.json"):
            (data / name / file).write_text((model / file).read_text())
    (data / "predictions" / "predict_from_raw_data_args.json").write_text("{}")
    assert [part.folder for part in find_model(data).parts] == [model]
    assert [row["path"] for row in list_models(tmp_path)] == [f"Dataset900_Made/{NAME}"]


def test_of_several_models_in_a_zip_none_can_be_named_before_it_is_unpacked(tmp_path):
    for name in (NAME, "nnUNetTrainer__nnUNetPlans__2d"):
        making.write_model(tmp_path / "in" / "Dataset900_Made" / name)
    with pytest.raises(BadModel, match="2 models of nnU-Net; unpack it and name one"):
        find_model(zipped(tmp_path / "in", tmp_path / "model.zip"))


@pytest.mark.parametrize("top", ["", "Dataset900_Made/" + NAME, NAME])
def test_a_zip_is_read_as_its_folder_is(tmp_path, top):
    folder = making.write_model(tmp_path / "in" / top if top else tmp_path / "in", folds=("0", "2"))
    archive = zipped(tmp_path / "in", tmp_path / "model.zip")
    found = find_model(archive).parts[0].folder
    assert [file.parent.name for file in fold_files(found)] == ["fold_0", "fold_2"]
    assert (found / "plans.json").read_text() == (folder / "plans.json").read_text()


def test_of_a_zip_nothing_but_plans_and_weights_is_unpacked(tmp_path):
    folder = making.write_model(tmp_path / "in")
    (folder / "postprocessing.pkl").write_bytes(b"cos\nsystem\n")
    (folder / "run.py").write_text("raise SystemExit")
    found = find_model(zipped(folder, tmp_path / "model.zip")).parts[0].folder
    assert {file.suffix for file in found.rglob("*") if file.is_file()} == {".json", ".pth"}


@pytest.mark.parametrize("name", ["../OUT", "/tmp/OUT", "a/../../OUT", "..\\OUT", "C:/OUT"])
def test_a_zip_that_leaves_its_folder_is_refused_and_writes_nothing(tmp_path, name):
    folder = making.write_model(tmp_path / "in")
    archive = zipped(folder, tmp_path / "model.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(name, "x")
    with pytest.raises(BadModel, match="OUT"):
        find_model(archive)
    assert not list(tmp_path.rglob("OUT"))


def test_a_zip_with_a_link_is_refused(tmp_path):
    archive = zipped(making.write_model(tmp_path / "in"), tmp_path / "model.zip")
    entry = zipfile.ZipInfo("fold_0/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(entry, "/etc/passwd")
    with pytest.raises(BadModel, match="link"):
        find_model(archive)


@pytest.mark.parametrize("name", [".", "./", ""])
def test_entries_of_a_zip_without_a_name_are_left_where_they_are(tmp_path, name):
    making.write_model(tmp_path / "in" / NAME)
    archive = zipped(tmp_path / "in", tmp_path / "model.zip")
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr(zipfile.ZipInfo(name), b"x")
    assert find_model(archive).parts[0].folder.name == NAME


def test_a_zip_in_a_zip_a_damaged_zip_and_an_empty_one_are_refused(tmp_path):
    inner = zipped(making.write_model(tmp_path / "in"), tmp_path / "inner.zip")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as opened:
        opened.write(inner, "inner.zip")
    with pytest.raises(BadModel, match=r"inner\.zip"):
        find_model(tmp_path / "outer.zip")
    (tmp_path / "cut.zip").write_bytes(inner.read_bytes()[:-400])
    with pytest.raises(BadModel, match="damaged"):
        find_model(tmp_path / "cut.zip")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    with pytest.raises(BadModel, match="no model"):
        find_model(tmp_path / "empty.zip")


def test_version_one_is_named_and_its_pickles_stay_closed(tmp_path):
    folder = tmp_path / "Task001_Brain" / "nnUNetTrainerV2__nnUNetPlansv2.1"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.pkl").write_bytes(b"cos\nmkdir\n(S'RAN'\ntR.")
    (folder / "fold_0" / "model_final_checkpoint.model").write_bytes(b"x")
    for path in (folder, folder.parent, zipped(folder, tmp_path / "old.zip")):
        assert is_nnunet(path)
        with pytest.raises(BadModel, match="v1"):
            find_model(path)


def test_a_missing_part_of_a_model_is_named(tmp_path):
    model = making.write_model(tmp_path / "a")
    (model / "dataset.json").unlink()
    with pytest.raises(BadModel, match=r"no dataset\.json"):
        find_model(model)
    (model / "plans.json").unlink()
    with pytest.raises(BadModel, match=r"no plans\.json"):
        find_model(model)
    empty = tmp_path / "b"
    empty.mkdir()
    with pytest.raises(BadModel, match="no model"):
        find_model(empty)
    assert not is_nnunet(empty)


def test_every_numbered_fold_is_taken_and_fold_all_only_alone(tmp_path):
    model = making.write_model(tmp_path / "a", folds=("10", "2", "all"))
    assert [file.parent.name for file in fold_files(model)] == ["fold_2", "fold_10"]
    assert [file.parent.name for file in fold_files(model, folds=("all",))] == ["fold_all"]
    alone = making.write_model(tmp_path / "b", folds=("all",))
    assert [file.parent.name for file in fold_files(alone)] == ["fold_all"]


def test_a_fold_or_checkpoint_that_is_missing_is_said(tmp_path):
    model = making.write_model(tmp_path / "a", name="checkpoint_best.pth")
    with pytest.raises(BadModel, match=r"checkpoint_best\.pth.*--checkpoint best"):
        fold_files(model)
    assert len(fold_files(model, checkpoint="best")) == 1
    with pytest.raises(BadModel, match="no fold 4"):
        fold_files(model, folds=("4",), checkpoint="best")
    with pytest.raises(BadConfig):
        fold_files(model, checkpoint="../x")
    (model / "fold_0" / "checkpoint_best.pth").unlink()
    with pytest.raises(BadModel, match="no weights"):
        fold_files(model)


def parts(root: Path, *names: str) -> Path:
    for name in names:
        making.write_model(root / name / NAME)
    return root


def test_a_set_of_parts_is_known_by_its_folders_names(tmp_path):
    root = parts(
        tmp_path, "Dataset292_TotalSegmentator_part2_b", "Dataset291_TotalSegmentator_part1_a"
    )
    found = find_model(root)
    assert found.several
    assert [part.folder.parent.name[:10] for part in found.parts] == ["Dataset291", "Dataset292"]
    assert (found.overlap, found.mirrored, found.folds) == (pytest.approx(0.2), False, ("0",))


def test_parts_that_are_not_all_there_are_refused(tmp_path):
    with pytest.raises(BadModel, match="not complete"):
        find_model(parts(tmp_path, "Dataset291_T_part1_a", "Dataset293_T_part3_a"))


def test_a_set_beside_other_tasks_is_named_by_what_its_folders_share(tmp_path):
    total = [f"Dataset29{n}_TotalSegmentator_part{n}_x" for n in (1, 2, 3)]
    root = parts(tmp_path / "results", *total, "Dataset850_TotalSegMRI_part1_x")
    parts(root, "Dataset851_TotalSegMRI_part2_x", "Dataset297_TotalSegmentator_total_3mm")
    other = making.dataset({"background": 0, "vein": 1})
    making.write_model(root / "Dataset258_vessels" / NAME, data=other)
    for name in ("TotalSegmentator", "totalsegmentator"):
        found = find_model(root / name)
        assert [part.folder.parent.name for part in found.parts] == total
        assert found.several
        assert [one.parent.name[:10] for one in found.others] == [
            "Dataset297", "Dataset850", "Dataset851"
        ]  # fmt: skip
    assert len(find_model(root / "TotalSegMRI").parts) == 2
    with pytest.raises(BadModel, match="TotalSegmentator; TotalSegMRI; Dataset258"):
        find_model(root)
    paths = [row["path"] for row in list_models(root)]
    assert {"TotalSegmentator", "TotalSegMRI"} <= set(paths)
    assert not is_nnunet(root / "TotalSegment")
    making.write_model(root / "Dataset295_TotalSegmentator_part5_x" / NAME)
    with pytest.raises(BadModel, match="not complete"):
        find_model(root / "TotalSegmentator")


def test_sets_of_which_none_is_named_are_listed(tmp_path):
    root = parts(tmp_path, "Dataset1_A_part1", "Dataset2_A_part2", "Dataset3_B_part1")
    with pytest.raises(BadModel, match=r"holds 2 sets of models; name one of them: .*A; .*B"):
        find_model(root)


def test_a_table_of_parts_gives_the_labels(tmp_path):
    root = parts(tmp_path / "results", "Dataset1_a", "Dataset2_b")
    table = {
        "parts": [
            {"model": "Dataset2_b", "labels": {"1": "liver", "2": "spleen"}},
            {"model": "Dataset1_a", "labels": {"1": "x", "2": "y"}},
        ],
        "labels": {"x": 7, "y": 8, "liver": 1, "spleen": 2},
        "step_size": 0.5,
    }
    (tmp_path / "parts.json").write_text(json.dumps(table))
    found = find_model(root)
    assert [part.labels for part in found.parts] == [{1: 1, 2: 2}, {1: 7, 2: 8}]
    assert found.names == {7: "x", 8: "y", 1: "liver", 2: "spleen"}
    assert found.overlap == 0.5
    for change in (
        {"folds": 3},
        {"labels": {"x": "seven"}},
        {"parts": [{"model": ["Dataset2_b"]}]},
        {"parts": None},
    ):
        (tmp_path / "parts.json").write_text(json.dumps(table | change))
        with pytest.raises(BadModel):
            find_model(root)
    table["parts"][0]["labels"]["2"] = "nothing"
    (tmp_path / "parts.json").write_text(json.dumps(table))
    with pytest.raises(BadModel, match=r"parts\.json"):
        find_model(root)


def test_postprocessing_is_read_as_groups_of_labels(tmp_path):
    known = "remove_all_but_largest_component_from_segmentation"
    path = tmp_path / "postprocessing.json"
    path.write_text(
        json.dumps(
            {
                "postprocessing_fns": [known, known, known],
                "postprocessing_kwargs": [
                    {"labels_or_regions": 2}, {"labels_or_regions": [1, 2]},
                    {"labels_or_regions": [[2, 3], 1]},
                ],
            }
        )
    )  # fmt: skip
    assert read_postprocessing(path) == [[2], [1, 2], [1, 2, 3]]
    for content in (
        {"postprocessing_fns": ["open"], "postprocessing_kwargs": [{}]},
        {"postprocessing_fns": [known], "postprocessing_kwargs": [{"labels_or_regions": "all"}]},
        {"postprocessing_fns": [known]},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(BadModel, match=r"postprocessing\.json"):
            read_postprocessing(path)


def test_the_advice_of_the_same_folds_is_taken_or_that_of_the_most(tmp_path):
    for name in ("folds_0", "folds_0_1_2_3_4", "folds_all"):
        (tmp_path / f"crossval_results_{name}").mkdir()
        (tmp_path / f"crossval_results_{name}" / "postprocessing.json").touch()
    for folds, name in (
        ((), "folds_0_1_2_3_4"),
        (("0",), "folds_0"),
        (("all",), "folds_all"),
        (("0", "1", "2", "3", "4"), "folds_0_1_2_3_4"),
        (("3",), "folds_0_1_2_3_4"),
    ):
        file = postprocessing_file(tmp_path, folds)
        assert file is not None and file.parent.name == f"crossval_results_{name}"
    assert postprocessing_file(tmp_path / "crossval_results_folds_0") is None


@pytest.mark.parametrize(
    ("folder", "name", "orientation"),
    [
        ("Dataset291_TotalSegmentator_part1_organs_1559subj", "", "RAS"),
        ("Dataset258_lung_vessels_248subj", "", "RAS"),
        ("model", "Dataset299_body_1559subj", "RAS"),
        (
            ".totalsegmentator/nnunet/results/Dataset8_HepaticVessel",
            "Dataset8_HepaticVessel",
            "RAS",
        ),
        ("Dataset900_Made", "Dataset900_Made", "auto"),
        ("Dataset900_subject_12", "Dataset900_12subjects_made", "auto"),
        ("Dataset900_Made_9subj", "Dataset900_Made_9subj", "auto"),
    ],
)
def test_every_task_of_totalsegmentator_sees_scans_turned_to_ras(
    tmp_path, folder, name, orientation
):
    plan = making.plans() | {"dataset_name": name}
    model = making.write_model(tmp_path / folder / NAME, plan=plan)
    assert read_foreign(model).recipe.orientation == orientation
