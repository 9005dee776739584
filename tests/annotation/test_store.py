"""A data set that grows stays one that `check` and `train` read, whoever changes it, whatever
breaks.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from making.datasets import make_case, put
from medseg.annotation import FINAL, LIST, ORIGINAL, Store, check_id, read_segmentation
from medseg.dataset import check_dataset, load_case, read_dataset
from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.io import read_labels, write
from medseg.labels import Code, Label, LabelTable
from medseg.volume import Volume, crop, reorient

ORGAN = Code("SCT", "123037004", "Anatomical Structure")
LIVER = Label(2, "Liver", (200, 30, 40), ORGAN, Code("SCT", "10200004", "Liver"))
TABLE = LabelTable((Label(1, "front", (10, 20, 30)), LIVER))


def grown(folder: Path, count: int, *, labelled: int | None = None) -> Store:
    """A data set of so many cases, the first of them labelled."""
    store = Store.create(folder)
    for number in range(count):
        image, labels = make_case(number)
        done = labels if number < (count if labelled is None else labelled) else None
        store.add_volumes(f"case_{number}", [image], labels=done, table=TABLE)
    return store


def files_of(store: Store) -> set[str]:
    """Every file of a data set but its lock."""
    files = (path for path in store.folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(store.folder).as_posix() for path in files}


def test_what_was_added_is_read_and_checked_without_a_finding(tmp_path: Path):
    store = grown(tmp_path / "balls", 5, labelled=4)
    dataset = read_dataset(store.folder)
    assert (dataset.name, dataset.layout, dataset.channels) == ("balls", "manifest", ("image",))
    assert [case.name for case in dataset.cases] == [f"case_{n}" for n in range(4)]
    assert [case.name for case in dataset.unlabelled] == ["case_4"]
    assert dataset.table == TABLE
    assert check_dataset(dataset).findings == ()
    image, labels = make_case(2)
    (loaded,), loaded_labels = load_case(dataset, dataset["case_2"])
    assert np.array_equal(loaded.data, image.data)
    assert np.array_equal(loaded_labels.data, labels.data)


def test_states_go_from_unlabelled_by_proposed_to_final_and_back(tmp_path: Path):
    store = grown(tmp_path / "set", 2, labelled=1)
    _image, labels = make_case(1)
    assert [one.state for one in store.cases()] == ["final", "unlabelled"]
    own = LabelTable((Label(1, "guess", (1, 2, 3)), Label(2, "other", (4, 5, 6))))
    store.put_label("case_1", labels, own, tag=ORIGINAL)
    assert store.case("case_1").state == "proposed"
    assert store.table == TABLE  # what a model proposes names nothing that is trained
    read, table = store.read_label("case_1", ORIGINAL)
    assert table.names == own.names and np.array_equal(read.data, labels.data)
    assert store.put_label("case_1", labels, TABLE).state == "final"
    assert len(read_dataset(store.folder).cases) == 2
    store.remove_label("case_1")
    assert store.case("case_1").state == "proposed"
    store.remove_label("case_1", ORIGINAL)
    assert store.case("case_1").state == "unlabelled"
    store.remove_scan("case_1")
    assert {name for name in files_of(store) if "case_1" in name} == set()
    with pytest.raises(BadConfig, match="no case 'case_1'"):
        store.case("case_1")


def test_structures_are_known_by_name_and_not_by_value(tmp_path: Path):
    store = grown(tmp_path / "set", 1)
    image, labels = make_case(1)
    turned = LabelTable((Label(1, "liver", (0, 0, 0)), Label(2, "FRONT", (0, 0, 0))))
    store.add_volumes("turned", [image], labels=labels, table=turned)
    stored, table = store.read_label("turned")
    assert table == TABLE
    assert np.array_equal(stored.data == 2, labels.data == 1)
    assert np.array_equal(stored.data == 1, labels.data == 2)


def test_a_new_name_takes_its_own_value_a_models_or_the_next_free_one(tmp_path: Path):
    store = grown(tmp_path / "set", 1)
    image, labels = make_case(1)
    new = LabelTable((Label(1, "spleen", (1, 1, 1)), Label(2, "left lung", (2, 2, 2))))
    model = LabelTable((Label(17, "Left-Lung", (9, 9, 9)),))
    case = store.add_volumes("new", [image], labels=labels, table=new, like=model)
    assert store.table.names == {1: "front", 2: "Liver", 3: "spleen", 17: "left lung"}
    assert case.annotated == case.holds == (3, 17)
    labels.data[labels.data == 1] = 9
    far = LabelTable((Label(9, "kidney", (1, 1, 1)), Label(2, "liver", (2, 2, 2))))
    store.add_volumes("far", [image], labels=labels, table=far)
    assert store.table.names[9] == "kidney"


def test_what_is_not_named_is_not_looked_for_and_what_is_named_and_empty_is_absent(tmp_path: Path):
    store = grown(tmp_path / "set", 2)
    image, labels = make_case(2)
    only = labels.with_data((labels.data == 2).astype(np.uint8) * 2)
    store.add_volumes("unknown", [image], labels=only, table=LabelTable((LIVER,)))
    store.add_volumes("absent", [image], labels=only, table=TABLE)
    dataset = read_dataset(store.folder)
    assert dataset["unknown"].labelled == (2,)
    assert dataset["absent"].labelled is None
    extra = LabelTable((LIVER, Label(7, "nowhere", (0, 0, 0))))
    store.put_label("absent", only, extra)
    assert "nowhere" not in store.table.names.values()


def test_a_name_whose_last_voxels_go_is_named_no_more(tmp_path: Path):
    store = grown(tmp_path / "set", 2)
    image, labels = make_case(2)
    odd = LabelTable((LIVER, Label(1, "typo", (0, 0, 0))))
    store.add_volumes("odd", [image], labels=labels, table=odd)
    assert store.table.names == {1: "front", 2: "Liver", 3: "typo"}
    store.put_label("odd", labels, TABLE)
    assert store.table == TABLE
    store.remove_scan("case_0"), store.remove_scan("case_1"), store.remove_scan("odd")
    assert len(store.table) == 0 and files_of(store) == {LIST}


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (LabelTable((LIVER,)), "holds the value 1, which has no name"),
        (
            LabelTable((Label(1, "Liver", (0, 0, 0)), Label(2, "liver", (0, 0, 0)))),
            "called 'liver'",
        ),
        (LabelTable(()), "has no name"),
    ],
)
def test_values_without_a_name_of_their_own_are_refused(
    tmp_path: Path, table: LabelTable, text: str
):
    store = grown(tmp_path / "set", 2, labelled=1)
    before = files_of(store), (store.folder / LIST).read_bytes(), store.table
    with pytest.raises(BadFile, match=text):
        store.put_label("case_1", make_case(1)[1], table)
    image, labels = make_case(3)
    with pytest.raises(BadFile, match=text):
        store.add_volumes("case_3", [image], labels=labels, table=table)
    assert (files_of(store), (store.folder / LIST).read_bytes(), store.table) == before


def test_another_grid_is_refused_and_other_axes_are_turned(tmp_path: Path):
    store = grown(tmp_path / "set", 2, labelled=1)
    image, labels = make_case(1)
    store.put_label("case_1", reorient(labels, "LPS"), TABLE)
    assert np.array_equal(store.read_label("case_1")[0].data, labels.data)
    smaller = crop(labels, (1, 0, 0), (10, 10, 10))
    with pytest.raises(BadFile, match=r"case_1 \(final\): has 10 x 10 x 10"):
        store.put_label("case_1", smaller, TABLE)
    before = files_of(store)
    with pytest.raises(BadFile, match=r"new \(final\): has 10 x 10 x 10"):
        store.add_volumes("new", [image], labels=smaller, table=TABLE)
    assert files_of(store) == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "-o",
        "=1+1",
        "a\n",
        "a ",
        "a.",
        "x" * 151,
        "con:",
        "a\0",
        "con",
        "NUL",
        "com1.left",
    ],
)
def test_an_id_is_never_a_path(text: str, tmp_path: Path):
    with pytest.raises(BadConfig, match="is no id"):
        check_id(text)
    store = Store.create(tmp_path / "set")
    with pytest.raises(BadConfig, match="is no id"):
        store.add_volumes(text, [make_case(0)[0]])
    assert files_of(store) == {LIST}


def test_ids_of_people_are_taken_in_one_spelling(tmp_path: Path):
    assert check_id("Mu\u0308ller 3_a+b-1.2") == "M\u00fcller 3_a+b-1.2"
    store = grown(tmp_path / "set", 1)
    with pytest.raises(BadOutput, match="differ only in case"):
        store.add_volumes("CASE_0", [make_case(0)[0]])


def test_a_scan_that_is_there_stays_unless_it_is_replaced_with_its_labels(tmp_path: Path):
    store = grown(tmp_path / "set", 2)
    image, _labels = make_case(5)
    with pytest.raises(BadOutput, match="is there already"):
        store.add_volumes("case_0", [image])
    assert np.array_equal(store.read_scan("case_0")[0].data, make_case(0)[0].data)
    store.put_label("case_0", make_case(0)[1], TABLE, tag=ORIGINAL)
    store.add_volumes("case_0", [image], replace=True)
    assert store.case("case_0").state == "unlabelled"
    assert np.array_equal(store.read_scan("case_0")[0].data, image.data)
    assert len([name for name in files_of(store) if "case_0" in name]) == 1


def broken_list() -> Any:
    """The list cannot be replaced."""
    return mock.patch.object(Store, "_write_list", side_effect=BadOutput("the disk is full"))


@pytest.mark.parametrize("breaks_at", [1, 2, 3])
def test_a_disk_that_fills_leaves_the_data_set_as_it_was(tmp_path: Path, breaks_at: int):
    store = grown(tmp_path / "set", 2)
    before = {name: (store.folder / name).read_bytes() for name in files_of(store)}
    image, labels = make_case(5)
    new = LabelTable((LIVER, Label(1, "new", (0, 0, 0))))
    calls = iter(range(1, 9))

    def write_or_break(*arguments, **named) -> None:
        if next(calls) == breaks_at:
            raise BadOutput("the disk is full")
        write(*arguments, **named)

    broken_write = mock.patch("medseg.annotation.store.write", write_or_break)
    with (
        broken_list() if breaks_at == 3 else broken_write,
        pytest.raises(BadOutput, match="disk is full"),
    ):
        store.add_volumes("case_0", [image], labels=labels, table=new, replace=True)
    after = {name: (store.folder / name).read_bytes() for name in files_of(store)}
    assert after == before
    with broken_list(), pytest.raises(BadOutput, match="disk is full"):
        store.put_label("case_0", make_case(0)[1], new)
    assert {name: (store.folder / name).read_bytes() for name in files_of(store)} == before


def test_threads_and_processes_add_at_once_and_nothing_is_lost(tmp_path: Path):
    folder = tmp_path / "set"
    Store.create(folder)
    code = (
        "import sys, numpy as np\n"
        "from medseg.annotation import Store\n"
        "from medseg.volume import Volume\n"
        "store = Store.open(sys.argv[1])\n"
        "for n in range(8):\n"
        "    data = np.arange(60.0).reshape(3, 4, 5) + n\n"
        "    store.add_volumes(f'{sys.argv[2]}{n}', [Volume(data, np.eye(4))])\n"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, folder, name]) for name in "ab"]

    def add(number: int) -> None:
        image, labels = make_case(number)
        Store.open(folder).add_volumes(f"c{number}", [image], labels=labels, table=TABLE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(8)))
    assert [other.wait(600) for other in others] == [0, 0]
    assert {one.id for one in Store.open(folder).cases()} == {
        f"{name}{n}" for name in "abc" for n in range(8)
    }
    assert len(read_dataset(folder).cases) == 8


def test_several_channels_in_files_of_any_format_or_in_one(tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    image, labels = make_case(0)
    other = image.with_data(image.data[::-1].copy())
    store = Store.create(tmp_path / "set", ("T1", "FLAIR"))
    files = [put(image, tmp_path / "a.mha"), put(reorient(other, "LSA"), tmp_path / "b.nrrd")]
    store.add_scan("one", files)
    both = np.stack([image.data, other.data], -1)
    nibabel.save(nibabel.Nifti1Image(both, image.affine), tmp_path / "both.nii.gz")
    store.add_scan("two", [tmp_path / "both.nii.gz"])
    for name in ("one", "two"):
        store.put_label(name, labels, TABLE)
        volumes = store.read_scan(name)
        assert np.array_equal(volumes[0].data, image.data)
        assert np.array_equal(volumes[1].data, other.data)
    dataset = read_dataset(store.folder)
    assert dataset.channels == ("T1", "FLAIR")
    assert len(load_case(dataset, dataset["two"])[0]) == 2
    with pytest.raises(BadConfig, match="consists of 2 files here, and 3 are given"):
        store.add_scan("three", [*files, files[0]])
    with pytest.raises(BadFile, match="does not hold 2 volumes"):
        store.add_scan("three", [store.case("one").images[0]])
    with pytest.raises(BadConfig, match="consist of T1, FLAIR, not of image"):
        Store.create(store.folder)


def test_who_validates_and_who_is_of_one_patient_is_kept(tmp_path: Path):
    store = grown(tmp_path / "set", 3)
    image, labels = make_case(3)
    store.add_volumes("held out", [image], split="val", group="anna")
    assert store.case("held out").split == "val"
    store.put_label("held out", labels, TABLE)
    dataset = read_dataset(store.folder)
    assert dataset.splits == ((("case_0", "case_2"), ("case_1", "held out")),)
    assert dataset["held out"].group == "anna"
    store.remove_label("held out")
    store.put_label("held out", labels, TABLE)
    assert store.case("held out").split == "val"
    with pytest.raises(BadConfig, match="'valid' is no split"):
        store.put_label("held out", labels, TABLE, split="valid")


def test_one_of_five_validates_for_good_where_the_others_hold_what_it_holds(tmp_path: Path):
    store = grown(tmp_path / "set", 1)
    image, labels = make_case(0)
    new = LabelTable((Label(1, "rare", (0, 0, 0)), LIVER))
    store.add_volumes("rare", [image], labels=labels, table=new)
    for number in range(9):
        table, group = (new, "") if number == 3 else (TABLE, "anna" if number < 3 else "")
        store.add_volumes(f"{number}", [image], labels=labels, table=table, group=group)
    splits = {one.id: one.split for one in store.cases()}
    held_out = [name for name, split in splits.items() if split == "val"]
    assert held_out == ["0", "1", "2"]  # of one patient
    assert set(splits.values()) == {"train", "val"}
    for number in range(9, 12):
        store.add_volumes(f"{number}", [image], labels=labels, table=TABLE)
    assert [one.id for one in store.cases() if one.split == "val"] == held_out
    for number in range(12, 20):
        store.add_volumes(f"{number}", [image], labels=labels, table=TABLE)
    assert sum(one.split == "val" for one in store.cases()) == 22 // 5


def test_folders_with_something_else_are_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadOutput, match="is not empty"):
        Store.create(tmp_path)
    with pytest.raises(BadFile, match="does not exist"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(BadFile, match=r"holds no cases\.csv"):
        Store.open(tmp_path)
    (tmp_path / LIST).write_text("name,age\nanna,3\n")
    with pytest.raises(BadFile, match="first line must name"):
        Store.open(tmp_path)
    (tmp_path / LIST).write_text("case,image,label\na,a.nii.gz\n")
    with pytest.raises(BadFile, match="line 2 is not complete"):
        Store.open(tmp_path).cases()


def test_a_list_written_by_hand_keeps_its_files_and_its_names(tmp_path: Path):
    folder, elsewhere = tmp_path / "set", tmp_path / "mine"
    image, labels = make_case(0)
    put(image, elsewhere / "a.nii.gz"), put(labels, elsewhere / "a_seg.nii.gz")
    folder.mkdir()
    TABLE.write(folder / "labels.csv")
    line = f"a,../mine/a.nii.gz,{elsewhere / 'a_seg.nii.gz'}"
    (folder / LIST).write_text(f"case,image,label,scanner\n{line},=old\n")
    store = Store.open(folder)
    store.add_volumes("b", [image], labels=labels, table=TABLE)
    assert [one.name for one in read_dataset(folder).cases] == ["a", "b"]
    assert store.case("a").more == {"scanner": "=old"} and store.case("b").more == {"scanner": ""}
    store.remove_scan("b")
    assert store.table == TABLE
    store.remove_scan("a")
    assert (elsewhere / "a.nii.gz").exists() and (elsewhere / "a_seg.nii.gz").exists()


def test_segmentations_of_any_format_come_with_their_names(tmp_path: Path):
    image, labels = make_case(0)
    scan = put(image, tmp_path / "scan.nii.gz")
    write(labels, tmp_path / "a.seg.nrrd", table=TABLE)
    read, table = read_segmentation(tmp_path / "a.seg.nrrd", image, scan)
    assert table == TABLE and np.array_equal(read.data, labels.data)
    plain = put(labels, tmp_path / "b.nii.gz")
    with pytest.raises(BadFile, match="names no structures"):
        read_segmentation(plain, image, scan)
    TABLE.write(tmp_path / "b.labels.csv")
    assert read_segmentation(plain, image, scan)[1] == TABLE
    TABLE.write(tmp_path / "names.ctbl")
    names = read_segmentation(plain, image, scan, table=tmp_path / "names.ctbl")[1].names
    assert names == TABLE.names
    some, table = read_segmentation(tmp_path / "a.seg.nrrd", image, scan, segments=["liver"])
    assert table.names == {2: "Liver"} and set(np.unique(some.data)) == {0, 2}
    part = crop(labels, (2, 2, 2), (18, 14, 10))
    write(part, tmp_path / "part.nii.gz")
    with pytest.raises(BadFile, match=r"part.nii.gz: has 18 x 14 x 10"):
        read_segmentation(tmp_path / "part.nii.gz", image, scan, table=tmp_path / "b.labels.csv")


def test_a_segmentation_that_slicer_cropped_gets_its_background_back(tmp_path: Path):
    store = grown(tmp_path / "set", 1, labelled=0)
    image, labels = make_case(0)
    low = np.argwhere(labels.data).min(0)
    shape = np.argwhere(labels.data).max(0) + 1 - low
    write(crop(labels, tuple(low), tuple(shape)), tmp_path / "a.seg.nrrd", table=TABLE)
    read, table = read_segmentation(tmp_path / "a.seg.nrrd", image, store.case("case_0").images[0])
    store.put_label("case_0", read, table)
    assert np.array_equal(read_labels(store.case("case_0").labels[FINAL]).data, labels.data)


def test_a_scan_keeps_its_place_and_nothing_of_its_header(tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(make_case(0)[0].data, np.diag([-1.0, 1.2, 1.5, 1.0]))
    image.header["descrip"] = b"Anna Muster"
    nibabel.save(image, tmp_path / "scan.nii")
    case = Store.create(tmp_path / "set").add_scan("x", [tmp_path / "scan.nii"])
    image, kept = nibabel.load(tmp_path / "scan.nii"), nibabel.load(case.images[0])
    assert np.array_equal(kept.affine, image.affine) and kept.header["descrip"].item() == b""
    assert np.array_equal(np.asarray(kept.dataobj), np.asarray(image.dataobj))
    assert isinstance(Store.open(tmp_path / "set").read_scan("x")[0], Volume)
