"""Datasets in every layout are found as they are, and split by patients."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from making import datasets as made
from making.datasets import make_case, put, put_json
from making.dicom_labels import source
from medseg.dataset.cases import Case, Dataset, load_case
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.reading import LAYOUTS, read_dataset
from medseg.dataset.splits import split_cases, usual_folds
from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.io import write
from medseg.labels import Label, LabelTable
from medseg.volume import Volume, crop, reorient, resample


def check_loads(dataset: Dataset) -> None:
    """Every case loads, with one volume per channel and labels on the first one's grid, holding
    known values only.
    """
    for case in dataset.cases:
        images, labels = load_case(dataset, case)
        assert len(images) == len(dataset.channels)
        assert {volume.shape for volume in (*images, labels)} == {images[0].shape}
        assert labels.data.dtype.kind == "u"
        assert set(np.unique(labels.data)) - {0, dataset.ignore} <= set(dataset.values)


def test_decathlon(tmp_path: Path):
    folder = made.decathlon(tmp_path)
    put(make_case(9)[0], folder / "imagesTs" / "case_9.nii.gz")
    content = json.loads((folder / "dataset.json").read_text())
    content["test"] = ["./imagesTs/case_9.nii.gz"]
    put_json(content, folder / "dataset.json")
    for inner in ("imagesTr", "labelsTr"):  # what macOS leaves behind
        (folder / inner / "._case_0.nii.gz").write_bytes(b"\0")
    dataset = read_dataset(folder)
    assert (dataset.layout, dataset.name, dataset.channels) == ("decathlon", "Balls", ("MRI",))
    assert dataset.table.names == {1: "front", 2: "back"}
    assert [case.name for case in dataset.cases] == [f"case_{n}" for n in range(4)]
    assert [case.name for case in dataset.unlabelled] == ["case_9"]
    assert dataset.findings == ()
    check_loads(dataset)
    image, labels = make_case(2)
    (loaded,), loaded_labels = load_case(dataset, dataset["case_2"])
    assert np.array_equal(loaded.data, image.data) and np.array_equal(
        loaded_labels.data, labels.data
    )
    assert read_dataset(folder / "dataset.json").cases == dataset.cases


def test_decathlon_with_channels_in_one_file(tmp_path: Path):
    nibabel = pytest.importorskip("nibabel")
    folder = made.decathlon(tmp_path, 2)
    for name in ("case_0", "case_1"):
        path = folder / "imagesTr" / f"{name}.nii.gz"
        data = nibabel.load(path).get_fdata().astype(np.float32)
        nibabel.save(
            nibabel.Nifti1Image(np.stack([data, 2 * data], -1), np.diag([1, 1.2, 1.5, 1])), path
        )
    content = json.loads((folder / "dataset.json").read_text())
    put_json({**content, "modality": {"0": "T1", "1": "FLAIR"}}, folder / "dataset.json")
    dataset = read_dataset(folder)
    assert dataset.channels == ("T1", "FLAIR")
    (first, second), _ = load_case(dataset, dataset.cases[0])
    assert np.array_equal(second.data, 2 * first.data) and first.data.any()


def test_what_is_listed_and_missing_is_told_and_left_out(tmp_path: Path):
    folder = made.decathlon(tmp_path)
    (folder / "labelsTr" / "case_1.nii.gz").unlink()
    put(make_case(8)[1], folder / "labelsTr" / "extra.nii.gz")
    put(make_case(8)[0], folder / "imagesTr" / "bare.nii.gz")
    dataset = read_dataset(folder)
    assert [case.name for case in dataset.cases] == ["case_0", "case_2", "case_3"]
    told = {finding.case: (finding.kind, finding.severity) for finding in dataset.findings}
    assert told == {
        "case_1": ("missing", "error"),
        "extra": ("unpaired", "warning"),
        "bare": ("unpaired", "warning"),
    }
    assert "labelsTr/case_1.nii.gz" in next(
        f.message for f in dataset.findings if f.case == "case_1"
    )


def nnunet(
    folder: Path, labels: dict, channels: dict, *, ending: str = ".nii.gz", **more: object
) -> Path:
    for number in range(4):
        image, seg = make_case(number)
        for channel in range(len(channels)):
            put(
                image.with_data(image.data + channel),
                folder / "imagesTr" / f"c_{number}_{channel:04d}{ending}",
            )
        put(seg, folder / "labelsTr" / f"c_{number}{ending}")
    put_json(
        {"channel_names": channels, "labels": labels, "file_ending": ending, **more},
        folder / "dataset.json",
    )
    return folder


def test_nnunet_with_channels_splits_and_another_ending(tmp_path: Path):
    folder = nnunet(
        tmp_path, {"background": 0, "a": 1, "b": 2}, {"0": "CT", "1": "PET"}, ending=".mha"
    )
    splits = [{"train": ["c_0", "c_1", "c_2"], "val": ["c_3"]}, {"train": ["c_3"], "val": ["c_0"]}]
    put_json(splits, folder / "splits_final.json")
    dataset = read_dataset(folder)
    assert (dataset.layout, dataset.channels, dataset.ignore) == ("nnunet", ("CT", "PET"), None)
    assert dataset.table.names == {1: "a", 2: "b"}
    assert split_cases(dataset, folds=3) == [(["c_0", "c_1", "c_2"], ["c_3"]), (["c_3"], ["c_0"])]
    check_loads(dataset)
    (first, second), _ = load_case(dataset, dataset.cases[1])
    assert np.allclose(second.data, first.data + 1)
    put_json([{"train": ["c_0"], "val": ["nobody"]}], folder / "splits_final.json")
    with pytest.raises(BadFile, match="nobody"):
        read_dataset(folder)


def test_nnunet_splits_where_nnunet_keeps_them(tmp_path: Path):
    folder = nnunet(
        tmp_path / "nnUNet_raw" / "Dataset007_X", {"background": 0, "a": 1, "b": 2}, {"0": "CT"}
    )
    place = tmp_path / "nnUNet_preprocessed" / "Dataset007_X" / "splits_final.json"
    put_json([{"train": ["c_0", "c_1"], "val": ["c_3"]}], place)
    assert split_cases(read_dataset(folder)) == [(["c_0", "c_1"], ["c_3"])]


def test_nnunet_regions_and_ignore_label(tmp_path: Path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset = read_dataset(nnunet(tmp_path, labels, {"0": "T1"}, regions_class_order=[1, 2]))
    assert dataset.table.names == {1: "whole", 2: "core"}
    assert (dataset.regions, dataset.ignore, dataset.values) == (((1, 2), (2,)), 3, (1, 2))
    check_loads(dataset)


def test_regions_without_an_order_are_refused(tmp_path: Path):
    folder = nnunet(tmp_path, {"background": 0, "whole": [1, 2], "core": [2]}, {"0": "T1"})
    with pytest.raises(BadFile, match="regions_class_order"):
        read_dataset(folder)


def test_nnunet_missing_channel_and_labels(tmp_path: Path):
    folder = nnunet(tmp_path, {"background": 0, "a": 1, "b": 2}, {"0": "CT", "1": "PET"})
    (folder / "imagesTr" / "c_1_0001.nii.gz").unlink()
    (folder / "labelsTr" / "c_2.nii.gz").unlink()
    dataset = read_dataset(folder)
    assert [case.name for case in dataset.cases] == ["c_0", "c_3"]
    assert {finding.case: finding.kind for finding in dataset.findings} == {
        "c_1": "missing",
        "c_2": "unpaired",
    }


def test_datalist_of_monai(tmp_path: Path):
    entries = []
    for number in range(6):
        image, labels = make_case(number)
        put(image, tmp_path / "scans" / f"p{number}.nii.gz")
        put(labels, tmp_path / "truth" / f"p{number}.nii.gz")
        entry = {
            "image": f"scans/p{number}.nii.gz",
            "label": f"truth/p{number}.nii.gz",
            "fold": number % 3,
        }
        entries.append(entry)
    put_json(
        {"training": entries, "testing": [{"image": "scans/p0.nii.gz"}]}, tmp_path / "list.json"
    )
    for path in (tmp_path, tmp_path / "list.json"):
        dataset = read_dataset(path)
        assert dataset.layout == "datalist"
        assert [case.fold for case in dataset.cases] == [0, 1, 2, 0, 1, 2]
        assert [validation for _, validation in split_cases(dataset)] == [
            ["p0", "p3"],
            ["p1", "p4"],
            ["p2", "p5"],
        ]
        assert dataset.table.names == {1: "label 1", 2: "label 2"}
        assert len(dataset.unlabelled) == 1
    check_loads(dataset)
    put_json({"training": entries[:4], "validation": entries[4:]}, tmp_path / "list.json")
    dataset = read_dataset(tmp_path)
    assert split_cases(dataset) == [(["p0", "p1", "p2", "p3"], ["p4", "p5"])]


@pytest.mark.parametrize("form", ["csv", "semicolons", "tsv", "jsonl"])
def test_manifests(tmp_path: Path, form: str):
    rows = []
    for number in range(6):
        image, labels = make_case(number)
        put(image, tmp_path / "data" / f"{number}_t1.nrrd")
        put(image.with_data(image.data * 3), tmp_path / "data" / f"{number}_flair.nrrd")
        put(labels, tmp_path / "data" / f"{number}_truth.mha")
        rows.append(
            {
                "case": f"p{number}",
                "image_T1": f"data/{number}_t1.nrrd",
                "image_FLAIR": f"data/{number}_flair.nrrd",
                "label": f"data/{number}_truth.mha",
                "split": "test" if number == 5 else "val" if number == 4 else "train",
                "patient": f"person {number // 2}",
                "labelled": "1" if number == 0 else "",
            }
        )
    if form == "jsonl":
        file = tmp_path / "cases.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        mark = {"csv": ",", "semicolons": ";", "tsv": "\t"}[form]
        file = tmp_path / ("cases.tsv" if form == "tsv" else "cases.csv")
        lines = [mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]
        file.write_text("\n".join(lines))
    dataset = read_dataset(file)
    assert (dataset.layout, dataset.channels) == ("manifest", ("T1", "FLAIR"))
    assert read_dataset(tmp_path).cases == dataset.cases
    assert dataset["p0"].labelled == (1,) and dataset["p1"].labelled is None
    assert dataset["p3"].group == "person 1"
    assert split_cases(dataset) == [(["p0", "p1", "p2", "p3"], ["p4"])]
    check_loads(dataset)
    (first, second), _ = load_case(dataset, dataset["p2"])
    assert np.allclose(second.data, 3 * first.data)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("case,image,label,fold\na,i.nii,l.nii,first", "not a whole number"),
        ("case,image,label,split\na,i.nii,l.nii,holdout", "holdout"),
        ("case,image,label\na,i.nii,", "no label"),
        ("case,image,label\na,,l.nii", "no image"),
        ("case,image,label\na,i.nii,l.nii", "i.nii: is missing"),
        ("case,image,label\na,i.nii", "not a dataset"),
    ],
)
def test_manifests_that_are_wrong_say_so(tmp_path: Path, text: str, what: str):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(BadFile, match=what):
        read_dataset(tmp_path / "cases.csv")


def bids(folder: Path) -> Path:
    put_json({"Name": "x", "BIDSVersion": "1.9.0"}, folder / "dataset_description.json")
    made_by = folder / "derivatives" / "manual"
    for subject in ("01", "02"):
        for session in ("a", "b"):
            image, labels = make_case(int(subject) * 2 + (session == "b"))
            start, inner = (
                f"sub-{subject}_ses-{session}",
                Path(f"sub-{subject}", f"ses-{session}", "anat"),
            )
            put(image, folder / inner / f"{start}_T1w.nii.gz")
            coarse = resample(image, image.affine @ np.diag([2, 2, 2, 1]), (10, 9, 7))
            put(coarse, folder / inner / f"{start}_FLAIR.nii.gz")  # on a grid of its own
            put(labels, made_by / inner / f"{start}_space-orig_dseg.nii.gz")
    (made_by / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tfront\n2\tback\n")
    return folder


def test_bids_with_derivatives_and_inherited_names(tmp_path: Path):
    dataset = read_dataset(bids(tmp_path))
    assert (dataset.layout, dataset.channels) == ("bids", ("T1w",))
    assert dataset.table.names == {1: "front", 2: "back"}
    assert [case.name for case in dataset.cases] == [
        f"sub-{s}_ses-{t}" for s in ("01", "02") for t in "ab"
    ]
    assert [case.group for case in dataset.cases] == ["sub-01", "sub-01", "sub-02", "sub-02"]
    check_loads(dataset)
    for training, validation in split_cases(dataset, folds=2):
        assert len({name[:6] for name in training}) == len({name[:6] for name in validation}) == 1


def test_bids_names_nearer_to_the_file_win(tmp_path: Path):
    bids(tmp_path)
    for number, tsv in enumerate((tmp_path / "derivatives" / "manual").rglob("*_dseg.nii.gz")):
        text = "index\tname\n1\tnear\n2\tback\n"
        (tsv.parent / tsv.name.replace(".nii.gz", ".tsv")).write_text(text)
        if number == 0:
            with pytest.raises(BadFile, match=r"'near'.*'front'|'front'.*'near'"):
                read_dataset(tmp_path)
    assert read_dataset(tmp_path).table.names == {1: "near", 2: "back"}


def test_bids_with_two_kinds_of_segmentations_asks_which(tmp_path: Path):
    bids(tmp_path)
    put(
        make_case(2)[1],
        tmp_path / "derivatives" / "auto" / "sub-01" / "anat" / "sub-01_ses-a_dseg.nii.gz",
    )
    with pytest.raises(BadConfig, match=r"auto.*manual"):
        read_dataset(tmp_path)
    assert len(read_dataset(tmp_path / "derivatives" / "manual").cases) == 4


def test_totalsegmentator_folders(tmp_path: Path):
    for number in range(4):
        image, labels = make_case(number)
        folder = tmp_path / f"s{number:04d}"
        put(image, folder / "ct.nii.gz")
        names = {"liver": 1, "spleen": 2} if number else {"liver": 1}
        for name, value in names.items():
            mask = labels.with_data((labels.data == value).astype(np.uint8))
            put(mask, folder / "segmentations" / f"{name}.nii.gz")
    (tmp_path / "meta.csv").write_text(
        "image_id;age;split\ns0000;1;train\ns0001;2;train\ns0002;3;val\ns0003;4;test\n"
    )
    dataset = read_dataset(tmp_path)
    assert (dataset.layout, dataset.channels) == ("totalsegmentator", ("CT",))
    assert dataset.table.names == {1: "liver", 2: "spleen"}
    assert dataset["s0000"].labelled == (1,) and dataset["s0001"].labelled is None
    assert split_cases(dataset) == [(["s0000", "s0001"], ["s0002"])]
    check_loads(dataset)
    assert np.array_equal(load_case(dataset, dataset["s0002"])[1].data, make_case(2)[1].data)
    spleen = tmp_path / "s0001" / "segmentations" / "spleen.nii.gz"
    put(make_case(1)[1].with_data((make_case(1)[1].data > 0).astype(np.uint8)), spleen)
    with pytest.warns(DataWarning, match="overlap"):
        load_case(dataset, dataset["s0001"])


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images/{}", "labels/{}"), ("imagesTr/{}", "labelsTr/{}"), ("img/{}", "seg/{}_seg"),
     ("Images/{}", "masks/{}_mask"), ("images/{}_0000", "labels/{}"), ("{}", "{}_seg"),
     ("{}", "{}-label"), ("{0}/image", "{0}/mask"), ("{0}/{0}-t1n", "{0}/{0}-seg")],
)  # fmt: skip
def test_plain_folders(tmp_path: Path, images: str, labels: str):
    for number in range(3):
        image, seg = make_case(number)
        put(image, tmp_path / f"{images.format(f'c{number}')}.nii.gz")
        put(seg, tmp_path / f"{labels.format(f'c{number}')}.nrrd")
    LabelTable.from_values([1, 2, 7]).write(tmp_path / "labels.csv")
    dataset = read_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["c0", "c1", "c2"]
    assert len(dataset.channels) == 1 and dataset.findings == ()
    assert dataset.table.values == (1, 2, 7)
    check_loads(dataset)


def test_plain_folders_with_parts(tmp_path: Path):
    for number, part in enumerate(("train", "train", "val", "test")):
        image, labels = make_case(number)
        for place in (tmp_path / "a" / part / "images", tmp_path / "b" / "images" / part):
            put(image, place / f"c{number}.nii.gz")
        for place in (tmp_path / "a" / part / "labels", tmp_path / "b" / "labels" / part):
            put(labels, place / f"c{number}.nii.gz")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert split_cases(read_dataset(folder)) == [(["c0", "c1"], ["c2"])]


def test_names_inside_slicer_segmentations_are_used(tmp_path: Path):
    table = LabelTable.from_values([1, 2])
    for number in range(2):
        image, labels = make_case(number)
        put(image, tmp_path / f"c{number}.nrrd")
        write(labels, tmp_path / f"c{number}_seg.seg.nrrd", table=table)
    dataset = read_dataset(tmp_path)
    assert dataset.table.names == table.names
    check_loads(dataset)


def slicer_case(
    folder: Path, number: int, names: dict[str, int], ending: str = "_seg.seg.nrrd"
) -> tuple[Volume, Volume]:
    """A case whose segmentation numbers 'front' (1 in what is returned) and 'back' (2) as `names`
    says.
    """
    image, labels = make_case(number)
    put(image, folder / f"c{number}.nii.gz")
    new_value = np.zeros(3, np.uint16)
    for name, value in names.items():
        new_value[{"front": 1, "back": 2}.get(name.lower(), 0)] = value
    new_value[0] = 0
    table = LabelTable(
        tuple(Label(value, name, (value % 256, 0, 0)) for name, value in names.items())
    )
    written = folder / f"c{number}_seg.seg.nrrd"
    write(labels.with_data(new_value[labels.data]), written, table=table)
    written.rename(folder / f"c{number}{ending}")
    return image, labels


NUMBERED = [
    [{"front": 1, "back": 2}, {"back": 1, "front": 2}],
    [{"back": 7, "front": 300}, {"front": 1, "back": 2}, {"front": 2, "back": 1}],
    [{"front": 1, "back": 2}, {"front": 2, "back": 5}],
    [{"front": 3, "back": 4}, {"front": 3, "back": 4}],
]


@pytest.mark.parametrize("numbered", NUMBERED)
@pytest.mark.parametrize("ending", ["_seg.seg.nrrd", "_seg.nrrd"])
def test_structures_of_slicer_segmentations_are_matched_by_name(
    tmp_path: Path, numbered: list, ending: str
):
    expected = [
        slicer_case(tmp_path, number, names, ending)[1].data
        for number, names in enumerate(numbered)
    ]

    dataset = read_dataset(tmp_path)

    values = {name: value for value, name in dataset.table.names.items()}
    assert set(values) == {"front", "back"}
    if len({tuple(sorted(names.items())) for names in numbered}) == 1:
        assert values == numbered[0]  # where all agree, nothing changes
    assert dataset.findings == ()
    check_loads(dataset)
    for number, labels in enumerate(expected):
        found = load_case(dataset, dataset[f"c{number}"])[1].data
        assert np.array_equal(found, np.array([0, values["front"], values["back"]])[labels])
    assert not check_dataset(dataset).errors


def test_a_table_beside_the_data_says_which_value_each_name_has(tmp_path: Path):
    for number, names in enumerate(
        ({"front": 1, "back": 2}, {"Back": 1, "front": 2}, {"Segment_1": 1})
    ):
        slicer_case(tmp_path, number, names)
    LabelTable((Label(4, "back", (1, 2, 3)), Label(1, "front", (3, 2, 1)))).write(
        tmp_path / "labels.csv"
    )

    dataset = read_dataset(tmp_path)

    assert dataset.table.names == {4: "back", 1: "front"}
    for number in range(2):
        found = load_case(dataset, dataset[f"c{number}"])[1].data
        assert np.array_equal(found, np.array([0, 1, 4])[make_case(number)[1].data])
    # Names nothing that is known, so its values count as they are.
    assert dataset["c2"].numbers == ()
    warned = {
        finding.case: finding.message for finding in dataset.findings if finding.kind == "names"
    }
    assert set(warned) == {"c2"} and "names no 'back'" in warned["c2"]


@pytest.mark.parametrize(
    ("numbered", "reason"),
    [
        (
            [{"front": 1, "back": 2}, {"front": 1, "bakc": 2}],
            "label 2 is 'back' in one case and 'bakc' in another",
        ),
        ([{"front": 1}, {"back": 1}], "label 1 is 'front' in one case and 'back' in another"),
        ([{"front": 1, "back": 2}, {"back": 1, "Front": 2}], "'front' and 'Front'"),
        (
            [{"front": 1, "left back": 2}, {"front": 2, "left_back": 1}],
            "'left back' and 'left_back'",
        ),
    ],
)
def test_names_that_may_be_misspelt_are_refused(tmp_path: Path, numbered: list, reason: str):
    for number, names in enumerate(numbered):
        slicer_case(tmp_path, number, names)

    with pytest.raises(BadFile, match=reason):
        read_dataset(tmp_path)


def test_two_segments_of_one_name_are_refused_only_where_names_have_to_tell_them(tmp_path: Path):
    for number in range(2):
        slicer_case(tmp_path, number, {"front": 1, "back": 2})
    for path in tmp_path.glob("*.nrrd"):
        path.write_bytes(path.read_bytes().replace(b"Name:=back", b"Name:=front"))
    assert read_dataset(tmp_path).table.names == {1: "front", 2: "front"}
    slicer_case(tmp_path, 2, {"front": 2, "back": 1})

    with pytest.raises(BadFile, match=r"c0_seg\.seg\.nrrd: calls two segments 'front'"):
        read_dataset(tmp_path)


def test_a_name_that_the_table_lacks_is_refused_where_numbers_differ(tmp_path: Path):
    slicer_case(tmp_path, 0, {"front": 1, "back": 2})
    slicer_case(tmp_path, 1, {"front": 2, "unheard of": 1})
    LabelTable((Label(1, "front", (1, 2, 3)), Label(2, "back", (3, 2, 1)))).write(
        tmp_path / "labels.csv"
    )

    with pytest.raises(BadFile, match=r"c1_seg\.seg\.nrrd: names 'unheard of'"):
        read_dataset(tmp_path)


def test_names_cannot_be_matched_with_a_label_map_that_has_none(tmp_path: Path):
    slicer_case(tmp_path, 0, {"front": 1, "back": 2})
    slicer_case(tmp_path, 1, {"front": 2, "back": 1})
    image, labels = make_case(2)
    put(image, tmp_path / "c2.nii.gz")
    put(labels, tmp_path / "c2_seg.nii.gz")

    with pytest.raises(
        BadFile, match=r"number their structures differently, and c2_seg\.nii\.gz names none"
    ):
        read_dataset(tmp_path)


def test_a_structure_that_a_file_does_not_name_is_warned_of_where_names_were_matched(
    tmp_path: Path,
):
    slicer_case(tmp_path, 0, {"front": 1, "back": 2})
    slicer_case(tmp_path, 1, {"back": 1})

    dataset = read_dataset(tmp_path)

    assert dataset.table.names == {1: "front", 2: "back"}
    assert [(one.case, one.kind, one.severity) for one in dataset.findings] == [
        ("c1", "names", "warning")
    ]
    assert np.array_equal(
        load_case(dataset, dataset["c1"])[1].data, 2 * (make_case(1)[1].data == 2)
    )


def boxed(labels: Volume, more: int = 0) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Start and shape of the box around all labels, some voxels wider on every side."""
    places = np.argwhere(labels.data)
    low, high = places.min(axis=0) - more, places.max(axis=0) + 1 + more
    return tuple(low.tolist()), tuple((high - low).tolist())


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAL"])
# The last reaches beyond the image, with background only.
@pytest.mark.parametrize("more", [0, 1, 9])
def test_a_cropped_slicer_segmentation_is_padded_onto_its_scan(
    tmp_path: Path, orientation: str, more: int
):
    turn = np.eye(4)
    turn[:3, :3] = np.linalg.qr(np.array([[1, 0.2, 0.1], [-0.3, 1, 0.4], [0.1, -0.5, 1]]))[0] * (
        1,
        1.2,
        1.5,
    )
    turn[:3, 3] = 10, -200.5, 33
    for number, affine in enumerate((np.diag([1.0, 1.2, 1.5, 1.0]), turn)):
        image, labels = make_case(number, affine=affine)
        start, shape = boxed(labels, more)
        around = Volume(
            np.pad(labels.data, 10),
            affine @ [[1, 0, 0, -10], [0, 1, 0, -10], [0, 0, 1, -10], [0, 0, 0, 1]],
        )
        cropped = crop(around, tuple(at + 10 for at in start), shape)
        put(image, tmp_path / f"c{number}.nii.gz")
        write(
            reorient(cropped, orientation),
            tmp_path / f"c{number}_seg.seg.nrrd",
            table=LabelTable.from_values([1, 2]),
        )
    dataset = read_dataset(tmp_path)

    for number in range(2):
        (image,), labels = load_case(dataset, dataset[f"c{number}"])
        assert np.array_equal(labels.data, make_case(number)[1].data)
        assert np.array_equal(labels.affine, image.affine)
    assert not check_dataset(dataset).errors


def cropped_case(
    folder: Path, *, ending: str = "_seg.seg.nrrd", shift: float = 0, scale: float = 1, cut: int = 0
) -> Dataset:
    image, labels = make_case(0)
    cropped = crop(labels, *boxed(labels))
    affine = cropped.affine @ np.diag([scale, 1, 1, 1])
    affine[0, 3] += shift
    put(Volume(image.data[cut:], crop(image, (cut, 0, 0), (1, 1, 1)).affine), folder / "c0.nii.gz")
    write(
        Volume(cropped.data, affine), folder / f"c0{ending}", table=LabelTable.from_values([1, 2])
    )
    return read_dataset(folder)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        # Another format does not say what was cut off.
        (
            {"ending": "_seg.nii.gz"},
            "put both on one grid",
        ),
        ({"ending": "_seg.nrrd"}, "put both on one grid"),
        ({"shift": 0.4}, "put both on one grid"),
        ({"scale": 1.02}, "put both on one grid"),
        ({"cut": 6}, "voxels of its labels lie outside its image"),
    ],
)
def test_what_is_not_a_part_of_the_scan_stays_refused(tmp_path: Path, changed: dict, reason: str):
    dataset = cropped_case(tmp_path, **changed)

    with pytest.raises(BadFile, match=reason):
        load_case(dataset, dataset["c0"])
    assert [one.kind for one in check_dataset(dataset).errors] in (["grid"], ["labels"])


def test_a_shift_of_rounding_is_none(tmp_path: Path):
    dataset = cropped_case(tmp_path, shift=0.004)

    assert np.array_equal(load_case(dataset, dataset["c0"])[1].data, make_case(0)[1].data)


def test_a_table_that_is_none_is_told_and_passed_over(tmp_path: Path):
    for number in range(2):
        image, labels = make_case(number)
        put(image, tmp_path / "images" / f"c{number}.nii.gz")
        put(labels, tmp_path / "labels" / f"c{number}.nii.gz")
    (tmp_path / "labels.csv").write_text("patient,diagnosis\n1,well\n")
    dataset = read_dataset(tmp_path)
    assert dataset.table.names == {1: "label 1", 2: "label 2"}
    assert [(finding.kind, finding.severity) for finding in dataset.findings] == [
        ("table", "warning")
    ]


def test_nnunet_cases_listed_in_its_json(tmp_path: Path):
    image, labels = make_case(0)
    put(image, tmp_path / "far" / "i.nii.gz")
    put(labels, tmp_path / "far" / "l.nii.gz")
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
    }
    listed = {"one": {"images": ["far/i.nii.gz"], "label": "far/l.nii.gz"}}
    put_json({**content, "dataset": listed}, tmp_path / "dataset.json")
    assert [case.name for case in read_dataset(tmp_path).cases] == ["one"]
    put_json({**content, "dataset": {"one": {"images": "far/i.nii.gz"}}}, tmp_path / "dataset.json")
    with pytest.raises(BadFile, match="'images', a list"):
        read_dataset(tmp_path)


def test_what_is_no_dataset_says_what_was_looked_for(tmp_path: Path):
    put(make_case(0)[0], tmp_path / "a.nii.gz")
    with pytest.raises(BadFile, match=r"dataset\.json.*images/ beside labels/"):
        read_dataset(tmp_path)
    with pytest.raises(BadFile, match="does not exist"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(BadFile, match="not valid JSON"):
        read_dataset(tmp_path)


def test_names_used_twice_are_refused(tmp_path: Path):
    image, labels = make_case(0)
    put(image, tmp_path / "i.nii.gz")
    put(labels, tmp_path / "l.nii.gz")
    (tmp_path / "cases.csv").write_text(
        "case,image,label\na,i.nii.gz,l.nii.gz\na,i.nii.gz,l.nii.gz\n"
    )
    with pytest.raises(BadFile, match="'a' is used twice"):
        read_dataset(tmp_path)


def test_grids_must_agree_and_turning_is_no_disagreement(tmp_path: Path):
    folder = made.decathlon(tmp_path)
    dataset = read_dataset(folder)
    _, labels = make_case(0)
    path = folder / "labelsTr" / "case_0.nii.gz"
    put(reorient(labels, "LPI"), path)
    assert np.array_equal(load_case(dataset, dataset["case_0"])[1].data, labels.data)
    shift = np.eye(4)
    shift[0, 3] = 0.5
    put(Volume(labels.data, shift @ labels.affine), path)
    with pytest.raises(BadFile, match=r"case_0\.nii\.gz: has .* voxels"):
        load_case(dataset, dataset["case_0"])
    put(Volume(labels.data[1:], labels.affine), path)
    with pytest.raises(BadFile, match="grid"):
        load_case(dataset, dataset["case_0"])


def dataset_of(groups: list[str | None]) -> Dataset:
    cases = tuple(
        Case(name=f"c{n}", images=(Path("x"),), label=Path("y"), group=group)
        for n, group in enumerate(groups)
    )
    return Dataset(
        folder=Path(),
        layout="folders",
        name="x",
        cases=cases,
        channels=("image",),
        table=LabelTable.from_values([1]),
    )


def test_folds_hold_every_case_once_and_no_group_twice():
    groups = [f"p{n % 13}" for n in range(40)] + [None] * 11
    dataset = dataset_of(groups)
    splits = split_cases(dataset, folds=4, seed=3)
    held_out = Counter(name for _, validation in splits for name in validation)
    assert held_out == Counter(case.name for case in dataset.cases)
    sizes = [len(validation) for _, validation in splits]
    assert max(sizes) - min(sizes) <= 1
    for training, validation in splits:
        assert set(training) | set(validation) == set(held_out) and not set(training) & set(
            validation
        )
        known = {dataset[name].group for name in training} - {None}
        assert not known & {dataset[name].group for name in validation}
    shuffled = Dataset(
        folder=Path(),
        layout="folders",
        name="x",
        cases=dataset.cases[::-1],
        channels=("image",),
        table=dataset.table,
    )
    assert split_cases(shuffled, folds=4, seed=3) == splits
    assert split_cases(dataset, folds=4, seed=4) != splits


@pytest.mark.parametrize(
    ("cases", "parts"), [(2, 5), (40, 5), (119, 5), (120, 6), (208, 10), (5000, 10)]
)
def test_of_many_cases_a_smaller_share_is_held_out(cases: int, parts: int):
    assert usual_folds(cases) == parts


def test_more_folds_than_patients_are_refused():
    with pytest.raises(BadConfig, match="2 patients"):
        split_cases(dataset_of(["a", "a", "b"]), folds=3)


def test_every_layout_has_a_test():
    """The names above; a new layout fails here until it has one."""
    known = {
        "nnunet", "decathlon", "datalist", "manifest", "bids", "totalsegmentator", "folders",
        "side by side"
    }  # fmt: skip
    assert set(LAYOUTS) == known


def test_the_hippocampus_set(shared_data: Path):
    dataset = read_dataset(shared_data / "hippocampus")
    assert (dataset.layout, len(dataset.cases)) == ("decathlon", 208)
    assert dataset.table.names == {1: "Anterior", 2: "Posterior"}
    splits = split_cases(dataset)
    assert sorted(name for _, validation in splits for name in validation) == sorted(
        c.name for c in dataset.cases
    )


def test_names_with_raised_digits_are_names(tmp_path: Path):
    for number, name in enumerate(("case1²", "²", "case٣")):
        image, labels = make_case(number)
        put(image, tmp_path / "images" / f"{name}.nii.gz")
        put(labels, tmp_path / "labels" / f"{name}.nii.gz")
    assert len(read_dataset(tmp_path).cases) == 3


def manifest_of(folder: Path, header: str, rows: list[str]) -> Path:
    """A list of cases beside `a.nii.gz`, `b.nii.gz` and their labels `l.nii.gz`."""
    image, labels = make_case(0)
    put(image, folder / "a.nii.gz")
    put(image.with_data(2 * image.data), folder / "b.nii.gz")
    put(labels, folder / "l.nii.gz")
    (folder / "cases.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_cases_said_to_validate_do_so_where_the_others_say_nothing(tmp_path: Path):
    rows = [f"c{n},a.nii.gz,l.nii.gz,{'val' if n == 2 else ''}" for n in range(4)]
    dataset = read_dataset(manifest_of(tmp_path, "case,image,label,split", rows))
    assert dataset.splits == ((("c0", "c1", "c3"), ("c2",)),)


def test_a_case_of_a_list_that_lacks_a_channel_is_named_with_its_column(tmp_path: Path):
    rows = [f"c{n},a.nii.gz,{'' if n == 1 else 'b.nii.gz'},l.nii.gz" for n in range(3)]
    dataset = read_dataset(manifest_of(tmp_path, "case,image_T1,image_FLAIR,label", rows))
    (finding,) = dataset.findings
    assert (finding.case, finding.severity, finding.fixable) == ("c1", "error", True)
    assert "c1 has no file in the column image_FLAIR" in finding.message
    assert [case.name for case in dataset.cases] == ["c0", "c2"]
    check_loads(dataset)


def test_scans_of_a_subject_are_a_group_in_every_layout(tmp_path: Path):
    names = [f"sub-{subject}_ses-{session}" for subject in "123" for session in "ab"]
    folder = made.decathlon(tmp_path, len(names))
    content = json.loads((folder / "dataset.json").read_text())
    for number, name in enumerate(names):
        (folder / "labelsTr" / f"case_{number}.nii.gz").rename(
            folder / "labelsTr" / f"{name}.nii.gz"
        )
        content["training"][number]["label"] = f"./labelsTr/{name}.nii.gz"
    put_json(content, folder / "dataset.json")
    dataset = read_dataset(folder)
    assert [case.group for case in dataset.cases] == [name[:5] for name in names]
    put_json([{"train": names[1:], "val": names[:1]}], folder / "splits_final.json")
    assert "leak" in {one.kind for one in check_dataset(read_dataset(folder)).errors}


def test_bids_says_of_a_channel_that_few_cases_take_from_all(tmp_path: Path):
    (tmp_path / "dataset_description.json").write_text("{}")
    for number in range(4):
        image, labels = make_case(number)
        subject = f"sub-{number}"
        anatomy = Path(subject, "anat")
        put(image, tmp_path / anatomy / f"{subject}_T1w.nii.gz")
        if number != 3:
            put(image, tmp_path / anatomy / f"{subject}_FLAIR.nii.gz")
        if number == 1:  # of few, and not the point of such a data set
            put(image, tmp_path / anatomy / f"{subject}_PDw.nii.gz")
        put(crop(image, (0, 0, 0), (4, 4, 4)), tmp_path / anatomy / f"{subject}_rest_bold.nii.gz")
        put(labels, tmp_path / "derivatives" / "own" / anatomy / f"{subject}_dseg.nii.gz")
    (tmp_path / "sub-2" / "anat" / "sub-2_rest_bold.nii.gz").unlink()
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("T1w",)
    (finding,) = dataset.findings
    assert finding.message.startswith("FLAIR is no channel, for 1 of 4 segmentations")
    assert "sub-3" in finding.message


@pytest.mark.parametrize("suffix", ["dcm", "rtstruct.dcm"])
def test_structures_of_dicom_label_maps_are_what_their_names_say(tmp_path: Path, suffix: str):
    """Segments and contours are numbered by each file for itself, and lie on the grid of their
    series.
    """
    rows = ["case,image_CT,label"]
    for case, names in (("a", ("liver", "spleen")), ("b", ("spleen", "liver"))):
        folder, grid = source(tmp_path / case)
        data = np.zeros(grid.shape, np.uint8)
        boxes = {"liver": np.s_[2:9, 3:9, 1:3], "spleen": np.s_[2:5, 10:12, 1:3]}
        for name, box in boxes.items():
            data[box] = names.index(name) + 1
        table = LabelTable(tuple(Label(n, name, (9, 9, n)) for n, name in enumerate(names, 1)))
        file = f"{case}.{suffix}"
        write(grid.with_data(data), tmp_path / file, table=table, source=folder)
        rows.append(f"{case},{folder.relative_to(tmp_path)},{file}")
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    dataset = read_dataset(tmp_path)
    assert dataset.table.names == {1: "liver", 2: "spleen"}
    errors = check_dataset(dataset).errors
    assert not [one for one in errors if not one.kind.startswith("duplicate")]
    for case in dataset.cases:
        (image,), labels = load_case(dataset, case)
        assert labels.shape == image.shape
        large, small = ((labels.data == value).sum() for value in (1, 2))
        assert large > small > 0
