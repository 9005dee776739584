"""A folder of scans becomes a data set, and nothing in it moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from making import dicom_series, networks as tiny
from making.serving import save_scans
from medseg.annotation import LIST, Store, open_studies
from medseg.errors import BadFile


def ids(store: Store) -> list[str]:
    return [case.id for case in store.cases()]


def test_scans_are_listed_where_they_lie_and_new_ones_later(tmp_path: Path):
    place = save_scans(tmp_path / "scans", "b", "a")
    save_scans(place / "images", "a", "c")
    before = sorted(path for path in place.rglob("*.nii.gz"))
    store = open_studies(place)
    assert ids(store) == ["a", "b", "a_2", "c"]
    assert store.case("a_2").images == (place / "images" / "a.nii.gz",)
    assert sorted(path for path in place.rglob("*.nii.gz")) == before
    save_scans(place, "d")
    assert ids(open_studies(place)) == ["a", "b", "a_2", "c", "d"]
    assert ids(open_studies(place)) == ["a", "b", "a_2", "c", "d"]


def test_a_data_set_that_is_one_stays_as_it_is(tmp_path: Path):
    store = Store.create(tmp_path / "set")
    tiny.save_scan(tmp_path / "x.nii.gz")
    store.add_scan("x", [tmp_path / "x.nii.gz"])
    before = (tmp_path / "set" / LIST).read_bytes()
    assert ids(open_studies(tmp_path / "set")) == ["x"]
    assert (tmp_path / "set" / LIST).read_bytes() == before


def test_an_empty_folder_is_a_beginning_and_others_are_not(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert ids(open_studies(tmp_path / "empty")) == []
    with pytest.raises(BadFile, match="is no folder"):
        open_studies(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear all")
    with pytest.raises(BadFile, match="holds no scans"):
        open_studies(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]


def test_results_and_odd_names_are_no_scans_and_no_paths(tmp_path: Path):
    place = save_scans(tmp_path / "scans", "-odd (name)@", "ok")
    tiny.save_scan(place / "ok_seg.nii.gz")
    store = open_studies(place)
    assert ids(store) == ["odd _name_", "ok"]


def test_folders_of_dicom_are_scans(tmp_path: Path):
    place = tmp_path / "scans"
    for number, piece in enumerate(dicom_series.series()):
        (place / "head").mkdir(parents=True, exist_ok=True)
        piece.save_as(place / "head" / f"{number}.dcm", enforce_file_format=True)
    store = open_studies(place)
    assert ids(store) == ["head"]
    assert store.read_scan("head")[0].shape[2] == len(dicom_series.series())


def test_channels_of_a_case_are_one_scan(tmp_path: Path):
    place = save_scans(tmp_path / "scans", "a_0000", "a_0001", "b_0000", "b_0001")
    store = open_studies(place, ["T1", "FLAIR"])
    assert store.channels == ("T1", "FLAIR") and ids(store) == ["a", "b"]
    assert [path.name for path in store.case("a").images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
