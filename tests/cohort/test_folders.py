"""Cohorts as they lie: BIDS by suffix and filters, trees of scans, folders of DICOM."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import generate_uid

from making.dicom import another, change, save, series
from medseg.cohort.folders import entities_of, is_bids, read_bids, read_folder
from medseg.cohort.places import Places
from medseg.cohort.reading import Wanted, read_any
from medseg.errors import BadConfig, BadFile, DataWarning


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def names_of(cohort) -> list[str]:
    return [case.name for case in cohort.cases]


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        "dataset_description.json",
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-02/anat/sub-02_run-1_T1w.nii",
        "sub-02/anat/sub-02_part-phase_T1w.nii",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
        "derivatives/x/sub-01/anat/sub-01_space-orig_T1w.nii.gz",
        "sourcedata/sub-01/sub-01_T1w.nii.gz",
    )
    text = "participant_id\tage\tsite\nsub-01\t30\tUlm\nsub-03\t4\tKiel\n"
    (tmp_path / "participants.tsv").write_text(text)
    return tmp_path


def test_the_raw_images_of_a_suffix_are_cases_called_by_their_entities(bids: Path):
    assert is_bids(bids)
    cohort = read_bids(bids)
    assert names_of(cohort) == ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_run-1_T1w"]
    assert [case.group for case in cohort.cases] == ["sub-01", "sub-01", "sub-02"]
    assert cohort.columns == ("age", "site")
    assert cohort.cases[0].carried == ("30", "Ulm")
    assert cohort.cases[2].carried == ("", "")


def test_filters_choose_among_the_images_of_a_data_set(bids: Path):
    assert names_of(read_bids(bids, ["T1w"], {"ses": "2"})) == ["sub-01_ses-2_T1w"]
    with pytest.raises(BadConfig, match="FLAIR, T1w, bold"):
        read_bids(bids, ["T2w"])


def test_suffixes_are_cases_each_or_the_channels_of_one(bids: Path):
    each = read_any(bids, Wanted(suffixes=("T1w", "FLAIR")))
    assert len(each.cases) == 4
    together = read_any(bids, Wanted(channels=("T1w", "FLAIR")))
    one = together.cases[0]
    assert one.name == "sub-01_ses-1_T1w-FLAIR"
    assert [Path(name).name.split("_")[-1] for name in one.images] == ["T1w.nii.gz", "FLAIR.nii.gz"]
    assert "no FLAIR" in together.cases[1].problem


def test_entities_of_a_name():
    assert entities_of("sub-1_ses-a_T1w.nii.gz") == ({"sub": "1", "ses": "a"}, "T1w")


def test_scans_of_a_tree_are_called_by_their_path(tmp_path: Path):
    root = touch(
        tmp_path / "tree", "p1/T1.nii.gz", "p2/T1.nii.gz", "x.mha", "p1/T1_seg.nii.gz", ".h/y.nii",
        "notes.txt",
    )  # fmt: skip
    cohort = read_folder(root)
    assert names_of(cohort) == ["p1_T1", "p2_T1", "x"]
    assert [case.group for case in cohort.cases] == ["p1", "p2", ""]


def test_names_that_paths_would_share_are_told_apart_whatever_else_is_there(tmp_path: Path):
    root = touch(tmp_path / "tree", "a/b.nii", "a_b.nii", "a/b.nii.gz")
    names = names_of(read_folder(root))
    assert len(set(names)) == 3
    touch(root, "c.nii")
    assert set(names) < set(names_of(read_folder(root)))
    root.rename(tmp_path / "elsewhere")  # as another machine has it
    assert set(names) < set(names_of(read_folder(tmp_path / "elsewhere")))


def test_folders_of_dicom_are_cases_and_with_all_series_each_volume(tmp_path: Path):
    root = tmp_path / "dicom"
    first = series()
    for patient in ("p1", "p2"):
        save(first, root / patient / "T1")
    assert names_of(read_folder(root)) == ["p1_T1", "p2_T1"]
    save(another(first, 1, SeriesInstanceUID=generate_uid()), tmp_path / "other")
    for path in sorted((tmp_path / "other").iterdir()):
        path.rename(root / "p1" / "T1" / f"other_{path.name}")
    cohort = read_folder(root, every_series=True)
    assert names_of(cohort) == ["p1_T1_1", "p1_T1_2", "p2_T1"]
    assert [case.series for case in cohort.cases] == ["1", "2", ""]


def test_what_is_no_cohort_is_refused_in_a_sentence(tmp_path: Path):
    touch(tmp_path, "scan.nii", "empty/notes.txt")
    with pytest.raises(BadFile, match="medseg infer"):
        read_any(tmp_path / "scan.nii", Wanted())
    with pytest.raises(BadFile, match="no such"):
        read_any(tmp_path / "none.csv", Wanted())
    with pytest.raises(BadConfig, match="holds no case"):
        read_any(tmp_path / "empty", Wanted())
    with pytest.raises(BadConfig, match="BIDS"):
        read_any(tmp_path, Wanted(suffixes=("T1w",)))
    with pytest.raises(BadConfig, match="column for each"):
        read_any(tmp_path, Wanted(channels=("T1", "T2")))


def test_an_image_that_another_is_called_like_is_named_and_none_takes_its_place(tmp_path: Path):
    root = touch(
        tmp_path / "raw",
        "dataset_description.json",
        "sub-1/ses-1/anat/sub-1_T1w.nii.gz",
        "sub-1/ses-2/anat/sub-1_T1w.nii.gz",
        "sub-2/anat/sub-2_T1w.nii",
        "sub-2/anat/sub-2_T1w.nii.gz",
        "sub-3/anat/sub-3_T1w.nii.gz",
        "sub-3/anat/sub-3_old_T1w.nii.gz",
        "sub-4/anat/sub-4_acq-1.5T_T1w.nii.gz",
    )
    cases = {case.name: case for case in read_bids(root).cases}
    assert list(cases) == [
        "sub-1_T1w", "sub-2_T1w", "sub-3_T1w", "sub-3_old_T1w", "sub-4_acq-1.5T_T1w",
    ]  # fmt: skip
    assert "ses-1/anat/sub-1_T1w.nii.gz and sub-1/ses-2/anat" in cases["sub-1_T1w"].problem
    assert "sub-2_T1w.nii and" in cases["sub-2_T1w"].problem
    assert cases["sub-3_T1w"].images[0].endswith("sub-3_T1w.nii.gz")
    assert not cases["sub-3_T1w"].problem


def test_every_image_of_a_data_set_has_a_segmentation_of_its_own_name(tmp_path: Path):
    names = [
        "desc-preproc", "space-MNI_desc-preproc", "space-MNI_res-2_desc-preproc", "foo-1", "foo-2",
        "old", "acq-1.5T", "run-1_echo-2",
    ]  # fmt: skip
    root = touch(tmp_path, *(f"sub-1/anat/sub-1_{name}_T1w.nii.gz" for name in names))
    places = Places(out=tmp_path / "out", bids="brain")
    segmentations = {places.labels_below(case) for case in read_bids(root).cases}
    assert len(segmentations) == len(names)
    assert "sub-1/anat/sub-1_space-MNI_res-2_desc-brainpreproc_dseg.nii.gz" in segmentations
    assert "sub-1/anat/sub-1_run-1_echo-2_desc-brain_dseg.nii.gz" in segmentations


def test_participants_are_known_with_and_without_the_beginning_of_their_folders(bids: Path):
    text = "age\tparticipant_id\r\n30\t01\r\n4\tsub-02\r\n"
    (bids / "participants.tsv").write_text(f"\ufeff{text}", encoding="utf-8", newline="")
    assert [case.carried for case in read_bids(bids).cases] == [("30",), ("30",), ("4",)]


def test_links_to_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path):
    touch(tmp_path / "disk", "sub-2/anat/sub-2_T1w.nii.gz", "p9/T2.nii")
    raw = touch(tmp_path / "raw", "dataset_description.json", "sub-1/anat/sub-1_T1w.nii.gz")
    tree = touch(tmp_path / "tree", "p1/T1.nii")
    try:
        (raw / "sub-2").symlink_to(tmp_path / "disk" / "sub-2")
        (raw / "sub-1" / "again").symlink_to(raw)
        (tree / "a").symlink_to(tree / "p1")  # reached under its own name
        (tree / "p9").symlink_to(tmp_path / "disk" / "p9")
        (tmp_path / "disk" / "p9" / "circle").symlink_to(tree)
    except OSError:
        pytest.skip("this system makes no links")
    assert names_of(read_bids(raw)) == ["sub-1_T1w", "sub-2_T1w"]
    assert names_of(read_folder(tree)) == ["p1_T1", "p9_T2"]


def test_a_folder_that_cannot_be_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = touch(tmp_path / "tree", "p1/T1.nii", "p2/T1.nii")
    scandir = os.scandir

    def refuse(place: Any = ".") -> Any:
        if str(place).endswith("p2"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(DataWarning, match="p2: cannot be read and is left out: Permission denied"):
        assert names_of(read_folder(root)) == ["p1_T1"]


def test_slices_in_folders_below_are_no_second_case(tmp_path: Path):
    root, first = tmp_path / "dicom", change(series(), SeriesInstanceUID="1.2.3.1")
    save(first, root / "p1")
    save(another(first, 1, SeriesInstanceUID="1.2.3.2"), root / "p1" / "late")
    cohort = read_folder(root, every_series=True)
    assert names_of(cohort) == ["p1_1", "p1_late"]
    assert [case.series for case in cohort.cases] == ["1", ""]
    (root / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")  # an index, and no scan
    assert names_of(read_folder(root)) == ["p1", "p1_late"]
