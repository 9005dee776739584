"""A list that people wrote becomes a data set that grows, and nothing of what they had means
anything else afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from making import networks as tiny
from making.datasets import make_case, put
from making.serving import save_nearest, served
from medseg.annotation import (
    FINAL,
    LIST,
    ORIGINAL,
    Candidate,
    Store,
    choose,
    in_order,
    open_studies,
)
from medseg.dataset import load_case, read_dataset
from medseg.inference import Settings, load_model
from medseg.io import embedded_table, read, read_labels, write
from medseg.labels import Label, LabelTable
from medseg.machine import HAS_MODES
from medseg.text import is_reserved
from medseg.volume import Volume, reorient

OLD = LabelTable((Label(1, "liver", (1, 2, 3)), Label(2, "spleen", (4, 5, 6))))
NEW = LabelTable((Label(1, "tumor", (7, 8, 9)), Label(2, "vein", (9, 8, 7))))
IMAGE, LABELS = make_case(0)


def written(folder: Path, *lines: str, head: str = "case,image,label") -> Store:
    """The data set of a list, whose first scan lies there as a.nii.gz."""
    put(IMAGE, folder / "a.nii.gz")
    (folder / LIST).write_text("\n".join((head, *lines)) + "\n", encoding="utf-8")
    return Store.open(folder)


def sizes(store: Store, case_id: str) -> dict[str, int]:
    """Voxels of each structure of a case, as training reads it."""
    dataset = read_dataset(store.folder)
    labels = load_case(dataset, dataset[case_id])[1].data
    counts = {name: int((labels == value).sum()) for value, name in dataset.table.names.items()}
    return {name: count for name, count in counts.items() if count}


def test_segmentations_without_a_table_stay_what_they_name(tmp_path: Path):
    store = written(tmp_path, "a,a.nii.gz,a.seg.nrrd")
    write(LABELS, tmp_path / "a.seg.nrrd", table=OLD)
    before = sizes(store, "a")
    assert set(before) == {"liver", "spleen"}
    assert store.table.names == OLD.names
    store.add_volumes("b", [IMAGE], labels=LABELS, table=NEW)
    assert sizes(store, "a") == before
    assert sizes(store, "b") == {"tumor": before["liver"], "vein": before["spleen"]}
    # Nobody looked for a tumor in a before there was a word for it.
    assert read_dataset(tmp_path)["a"].labelled == (1, 2)
    assert store.case("a").holds == (1, 2)


def test_segmentations_that_number_otherwise_are_read_by_name(tmp_path: Path):
    store = written(tmp_path, "a,a.nii.gz,a.seg.nrrd", "b,a.nii.gz,b.seg.nrrd")
    turned = LabelTable((Label(1, "spleen", (4, 5, 6)), Label(2, "liver", (1, 2, 3))))
    write(LABELS, tmp_path / "a.seg.nrrd", table=OLD)
    write(LABELS, tmp_path / "b.seg.nrrd", table=turned)
    for case in ("a", "b"):
        labels, table = store.read_label(case)
        counts = {name: int((labels.data == value).sum()) for value, name in table.names.items()}
        assert counts == sizes(store, case)
    assert sizes(store, "a")["liver"] == sizes(store, "b")["spleen"] != sizes(store, "b")["liver"]


def test_label_maps_without_names_do_not_get_those_of_others(tmp_path: Path):
    store = written(tmp_path, "a,a.nii.gz,a_seg.nii.gz")
    put(LABELS, tmp_path / "a_seg.nii.gz")
    store.add_volumes("b", [IMAGE], labels=LABELS, table=NEW)
    assert set(sizes(store, "a")) == {"label 1", "label 2"}
    assert set(sizes(store, "b")) == {"tumor", "vein"}


@pytest.mark.parametrize("looked_for", ["1 2", '"1,2"', "1;2"])
def test_what_was_looked_for_is_kept_and_so_are_its_names(tmp_path: Path, looked_for: str):
    store = written(
        tmp_path, f"a,a.nii.gz,a_seg.nii.gz,{looked_for}", head="case,image,label,labelled"
    )
    put(LABELS, tmp_path / "a_seg.nii.gz")
    third = Label(3, "kidney", (3, 3, 3))
    LabelTable((*OLD.labels, third)).write(tmp_path / "labels.csv")
    only = LABELS.with_data((LABELS.data == 1).astype(np.uint8) * 3)
    store.add_volumes("b", [IMAGE], labels=only, table=LabelTable((third,)))
    assert store.table.names == {1: "liver", 2: "spleen", 3: "kidney"}
    assert read_dataset(tmp_path)["a"].labelled == (1, 2)


@pytest.mark.parametrize(("tag", "head"), [(FINAL, "label"), (ORIGINAL, "label,label_original")])
def test_what_people_have_elsewhere_is_not_written_over(tmp_path: Path, tag: str, head: str):
    mine = tmp_path / "mine" / "a.seg.nrrd"
    mine.parent.mkdir()
    write(LABELS, mine, table=OLD)
    (tmp_path / "set").mkdir()
    OLD.write(tmp_path / "set" / "labels.csv")
    cells = f"{mine}" if tag == FINAL else f",{mine}"
    store = written(tmp_path / "set", f"a,a.nii.gz,{cells}", head=f"case,image,{head}")
    less = LABELS.with_data(np.where(LABELS.data == 1, 0, LABELS.data).astype(np.uint8))
    case = store.put_label("a", less, OLD, tag=tag)
    assert np.array_equal(read_labels(mine).data, LABELS.data)
    assert embedded_table(mine).names == OLD.names
    assert case.labels[tag].is_relative_to(store.folder / "labels" / tag)
    assert np.array_equal(store.read_label("a", tag)[0].data, less.data)


def test_a_label_in_another_format_gives_way_to_one_that_is_read_as_it_was_meant(tmp_path: Path):
    store = written(tmp_path, "a,a.nii.gz,a.seg.nrrd")
    write(LABELS, tmp_path / "a.seg.nrrd", table=OLD)
    less = LABELS.with_data(np.where(LABELS.data == 1, 0, LABELS.data).astype(np.uint8))
    store.put_label("a", less, OLD)
    assert set(sizes(store, "a")) == {"spleen"}
    assert not (tmp_path / "a.seg.nrrd").exists()  # it was in the data set, and is replaced


def test_a_label_whose_axes_lie_otherwise_is_compared_where_it_lies(tmp_path: Path):
    store = written(tmp_path, "a,a.nii.gz,a_seg.nii.gz")
    put(reorient(LABELS, "PIR"), tmp_path / "a_seg.nii.gz")
    OLD.write(tmp_path / "labels.csv")
    assert np.array_equal(store.read_label("a")[0].data, LABELS.data)


def test_lines_that_say_nothing_and_splits_in_other_words_are_understood(tmp_path: Path):
    line = "a, a.nii.gz, a_seg.nii.gz, Validation"
    store = written(tmp_path, line, "", ",,,", head="case,image,label,split")
    put(LABELS, tmp_path / "a_seg.nii.gz")
    (case,) = store.cases()
    assert case.split == "val" and case.images[0].is_file() and case.labels[FINAL].is_file()


def test_ids_that_name_no_file_are_labelled_all_the_same(tmp_path: Path):
    lines = ("sub-1/ses-1,a.nii.gz,,test", "../x,a.nii.gz,,test", "aux,a.nii.gz,,test")
    store = written(tmp_path / "set", *lines, head="case,image,label,split")
    for name in ("sub-1/ses-1", "../x", "aux"):
        case = store.put_label(name, LABELS, OLD)
        assert case.labels[FINAL].parent == tmp_path / "set" / "labels" / FINAL
        assert not is_reserved(case.labels[FINAL].name)
        assert np.array_equal(store.read_label(name)[0].data, LABELS.data)
    assert [one.name for one in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(not HAS_MODES, reason="Windows holds no such file")
def test_scans_called_as_devices_of_windows_get_another_id(tmp_path: Path):
    put(IMAGE, tmp_path / "con.nii.gz")
    assert [case.id for case in open_studies(tmp_path).cases()] == ["con_2"]


def test_labels_beside_scans_are_no_scans(tmp_path: Path):
    written(tmp_path, "a,a.nii.gz,a_label.nii.gz")
    put(LABELS, tmp_path / "a_label.nii.gz")
    assert [case.id for case in open_studies(tmp_path).cases()] == ["a"]


@pytest.mark.parametrize(
    ("channels", "wanted", "order"),
    [
        (("T1", "FLAIR"), ("T1", "FLAIR"), "ab"),
        (("FLAIR", "T1"), ("T1", "FLAIR"), "ba"),
        (("flair", "t1"), ("T1", "FLAIR"), "ba"),
        (("1", "2"), ("T1", "FLAIR"), "ab"),
        (("FLAIR", "T1"), ("", ""), "ab"),
    ],
)
def test_channels_come_in_the_order_of_who_wants_them(
    channels: Sequence[str], wanted: Sequence[str], order: str
):
    assert "".join(in_order("ab", channels, wanted)) == order


@pytest.mark.usefixtures("known_networks", "one_thread")
def test_a_model_gets_the_channels_that_it_was_trained_with(tmp_path: Path):
    model = load_model(str(tiny.save_two_channels(tmp_path / "model")))  # of T1 and FLAIR
    store = Store.create(tmp_path / "set", ("FLAIR", "T1"))
    data = np.random.default_rng(0).normal(0, 1, (2, 20, 20, 20)).astype(np.float32)
    data[0, 4:9, 4:16, 4:16] += 100
    data[1, 11:16, 4:16, 4:16] += 100
    flair, t1 = (Volume(one, np.diag([2.0, 2, 2, 1])) for one in data)
    store.add_volumes("a", [flair, t1])
    (scan,) = (Candidate(id="a", files=store.case("a").images, stored=True),)
    labels = choose(store, [scan], model, settings=Settings(device="cpu")).result.labels.data
    assert labels[6, 10, 10] == 41 and labels[13, 10, 10] == 2  # FLAIR is the second one's


@pytest.mark.usefixtures("known_networks", "one_thread")
@pytest.mark.parametrize("suffix", [".mhd", ".nhdr", ".hdr"])
def test_a_scan_in_two_files_is_sent_whole(tmp_path: Path, suffix: str):
    (tmp_path / "studies").mkdir()
    tiny.save_scan(tmp_path / "scan.nii.gz", seed=1)
    scan = read(tmp_path / "scan.nii.gz")
    if suffix == ".hdr":
        nib.save(nib.Nifti1Pair(scan.data, scan.affine), tmp_path / "studies" / "a.hdr")
    else:
        write(scan, tmp_path / "studies" / f"a{suffix}")
    with served(tmp_path, save_nearest(tmp_path / "hippo")) as here:
        answer = here.client.get("/datastore/image?image=a")
        assert 'filename="scan.nii.gz"' in answer.headers["content-disposition"]
        (tmp_path / "sent.nii.gz").write_bytes(answer.content)
        assert np.array_equal(read(tmp_path / "sent.nii.gz").data, scan.data)
        found = here.client.post("/activelearning/first", json={"client_id": "x"}).json()
        assert found["name"] == "a.nii.gz"
