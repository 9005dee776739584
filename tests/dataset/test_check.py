"""`medseg check` finds every planted defect in cases drawn by chance, and is silent about one that
is in order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from making import datasets as made
from making.datasets import make_case, put, put_json
from medseg.cli.app import make_app
from medseg.dataset.cases import load_case
from medseg.dataset.check.cases import check_dataset
from medseg.dataset.check.duplicates import _same_values
from medseg.dataset.check.fix import write_fixed
from medseg.dataset.check.group import _isolation
from medseg.dataset.reading import read_dataset
from medseg.errors import BadConfig, BadOutput
from medseg.io import read, read_labels
from medseg.volume import Volume, reorient

COUNT = 24


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in order."""
    return made.decathlon(tmp_path_factory.mktemp("sound"), COUNT)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


class Spoilt:
    """One case of a dataset on disk, to be spoilt."""

    def __init__(self, folder: Path, number: int, other: int, rng: np.random.Generator):
        self.folder, self.name, self.other, self.rng = (
            folder,
            f"case_{number}",
            f"case_{other}",
            rng,
        )
        self.image_path = folder / "imagesTr" / f"{self.name}.nii.gz"
        self.label_path = folder / "labelsTr" / f"{self.name}.nii.gz"
        self.image, self.labels = read(self.image_path), read_labels(self.label_path)

    def put(
        self, image: NDArray | Volume | None = None, labels: NDArray | Volume | None = None
    ) -> None:
        for new, old, path in (
            (image, self.image, self.image_path),
            (labels, self.labels, self.label_path),
        ):
            if new is not None:
                put(
                    new if isinstance(new, Volume) else Volume(np.asfortranarray(new), old.affine),
                    path,
                )

    def of_other(self) -> tuple[Volume, Volume]:
        return (
            read(self.folder / "imagesTr" / f"{self.other}.nii.gz"),
            read_labels(self.folder / "labelsTr" / f"{self.other}.nii.gz"),
        )


def moved(volume: Volume, *mm: float) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] += mm
    return Volume(volume.data, affine)


def scaled(volume: Volume, factor: float) -> Volume:
    return Volume(volume.data, volume.affine @ np.diag([factor] * 3 + [1]))


def dotted(labels: NDArray, value: int) -> NDArray:
    labels = labels.copy()
    labels[1, 1, 1] = value
    return labels


def with_nan(case: Spoilt, inside: bool) -> NDArray:
    data = case.image.data.copy()
    places = np.argwhere((case.labels.data > 0) == inside)
    data[tuple(places[case.rng.integers(len(places))])] = np.nan
    return data


def brightened(case: Spoilt) -> NDArray:
    data = case.image.data.copy()
    data[tuple(case.rng.integers(s) for s in data.shape)] = 100 * data.max()
    return data


def stored_as_4d(path: Path, copies: int) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = read(path)
    nibabel.save(nibabel.Nifti1Image(np.stack([volume.data] * copies, -1), volume.affine), path)


def duplicate(change: Callable[[Volume], Volume]) -> Callable[[Spoilt], None]:
    def spoil(case: Spoilt) -> None:
        image, labels = case.of_other()
        case.put(change(image), Volume(labels.data, change(image).affine))

    return spoil


def turned_duplicate(case: Spoilt) -> None:
    image, labels = case.of_other()
    case.put(reorient(image, "PIR"), reorient(labels, "PIR"))


def flipped_header(volume: Volume) -> Volume:
    return Volume(volume.data, np.diag([-1.0, 1, 1, 1]) @ volume.affine)


def as_bytes(volume: Volume) -> Volume:
    low, high = volume.data.min(), volume.data.max()
    return Volume(np.rint((volume.data - low) / (high - low) * 255).astype(np.uint8), volume.affine)


def other_grid(case: Spoilt) -> Volume:
    return Volume(
        np.asfortranarray(case.labels.data[::2]), case.labels.affine @ np.diag([2.0, 1, 1, 1])
    )


def swapped(labels: NDArray) -> NDArray:
    return np.array([0, 2, 1], labels.dtype)[labels]


#: Name to (kind of finding, what is done to the case).
DEFECTS: dict[str, tuple[str, Callable[[Spoilt], Any]]] = {
    "label shifted": ("geometry", lambda c: c.put(labels=moved(c.labels, *c.rng.uniform(1, 9, 3)))),
    "label a little shifted": ("geometry", lambda c: c.put(labels=moved(c.labels, 0, 0.05, 0))),
    "both shifted": (
        "outlier",
        lambda c: c.put(moved(c.image, 30, 0, 0), moved(c.labels, 30, 0, 0)),
    ),
    "label on another grid": ("grid", lambda c: c.put(labels=other_grid(c))),
    "unknown value": (
        "value",
        lambda c: c.put(labels=dotted(c.labels.data, int(c.rng.integers(3, 200)))),
    ),
    "structures swapped": ("outlier", lambda c: c.put(labels=swapped(c.labels.data))),
    "structure lost": ("absent", lambda c: c.put(labels=np.minimum(c.labels.data, 1))),
    "empty": ("empty", lambda c: c.put(labels=c.labels.data * 0)),
    "tiny": (
        "tiny",
        lambda c: c.put(labels=dotted(np.where(c.labels.data == 2, 0, c.labels.data), 2)),
    ),
    "island": ("island", lambda c: c.put(labels=dotted(c.labels.data, 1))),
    "label no whole numbers": ("labels", lambda c: c.put(labels=c.labels.data * np.float32(0.5))),
    "nan": ("nan", lambda c: c.put(with_nan(c, inside=False))),
    "nan in labels": ("nan", lambda c: c.put(with_nan(c, inside=True))),
    "constant": ("constant", lambda c: c.put(np.full_like(c.image.data, 7))),
    "four volumes": ("4-D", lambda c: stored_as_4d(c.image_path, 4)),
    "one volume in 4-D": ("4-D", lambda c: stored_as_4d(c.image_path, 1)),
    "labels in 4-D": ("4-D", lambda c: stored_as_4d(c.label_path, 2)),
    "cut off": ("unreadable", lambda c: c.image_path.write_bytes(c.image_path.read_bytes()[:900])),
    "same case": ("duplicate", duplicate(lambda volume: volume)),
    "same case elsewhere": ("duplicate", duplicate(lambda volume: moved(volume, 5, 5, 5))),
    "same case rescaled": (
        "duplicate",
        duplicate(lambda volume: volume.with_data(volume.data * 0.37 + 12)),
    ),
    "same case in bytes": ("duplicate", duplicate(as_bytes)),
    "same case, other header": ("duplicate", duplicate(flipped_header)),
    "same case turned": ("duplicate", turned_duplicate),
    "same labels": ("duplicate labels", lambda c: put(c.of_other()[1], c.label_path)),
    "mirrored": ("mirrored", lambda c: c.put(c.image.data[::-1], c.labels.data[::-1])),
    "labels mirrored": ("mirrored", lambda c: c.put(labels=c.labels.data[::-1])),
    "image mirrored": ("mirrored", lambda c: c.put(c.image.data[::-1])),
    "header mirrored": (
        "mirrored",
        lambda c: c.put(flipped_header(c.image), flipped_header(c.labels)),
    ),
    "upside down": (
        "mirrored",
        lambda c: c.put(c.image.data[:, :, ::-1], c.labels.data[:, :, ::-1]),
    ),
    "scale": ("outlier", lambda c: c.put(c.image.data * 10 ** np.float32(c.rng.uniform(1, 4)))),
    "offset": (
        "outlier",
        lambda c: c.put(c.image.data + np.ptp(c.image.data) * c.rng.uniform(2, 9)),
    ),
    "bright voxel": ("outlier", lambda c: c.put(brightened(c))),
    "larger voxels": (
        "outlier",
        lambda c: c.put(*(scaled(volume, 2.5) for volume in (c.image, c.labels))),
    ),
    "noise": ("outlier", lambda c: c.put(c.rng.normal(20, 15, c.image.shape))),
}


def spoil(folder: Path, defect: str, seed: int) -> Spoilt:
    rng = np.random.default_rng([seed, *defect.encode()])
    number, other = rng.choice(COUNT, 2, replace=False)
    case = Spoilt(folder, number, other, rng)
    if defect == "same labels":  # grids of equal shape, so that only the labels are what is wrong
        image, _ = case.of_other()
        fresh = make_case(1000 + seed)[0].data
        room = [(0, max(0, n - m)) for n, m in zip(image.shape, fresh.shape)]
        i, j, k = image.shape
        case.put(Volume(np.pad(fresh, room, mode="edge")[:i, :j, :k], image.affine))
    DEFECTS[defect][1](case)
    return case


def test_a_sound_dataset_gives_no_finding(sound: Path):
    check = check_dataset(read_dataset(sound))
    assert check.findings == ()
    assert [facts.case for facts in check.facts] == [f"case_{n}" for n in range(COUNT)]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found_and_only_there(folder: Path, defect: str, seed: int):
    kind, _ = DEFECTS[defect]
    case = spoil(folder, defect, seed)
    findings = check_dataset(read_dataset(folder)).findings
    pair = {case.name, case.other} if "same" in defect else {case.name}
    assert any(finding.kind == kind and finding.case in pair for finding in findings), findings
    assert {finding.case for finding in findings} <= pair


def test_what_is_mirrored_is_said(folder: Path):
    for defect, words in (
        ("mirrored", "image and labels are mirrored"),
        ("labels mirrored", "the image is not"),
    ):
        case = spoil(folder, defect, 5)
        found = [f for f in check_dataset(read_dataset(folder)).findings if f.case == case.name]
        assert any(
            words in finding.message and "left-right" in finding.message for finding in found
        )


def test_symmetric_anatomy_has_no_handedness(tmp_path: Path):
    """Where left and right look the same, nothing can be known and nothing is said."""
    folder = made.decathlon(tmp_path, 12)
    for number in range(12):
        case = Spoilt(folder, number, 0, np.random.default_rng(number))
        image, labels = case.image.data, np.maximum(case.labels.data, case.labels.data[::-1])
        image = (image + image[::-1])[:, :, ::-1] if number == 3 else image + image[::-1]
        case.put(
            image + case.rng.normal(0, 1, image.shape),
            labels[:, :, ::-1] if number == 3 else labels,
        )
    found = [f for f in check_dataset(read_dataset(folder)).findings if f.kind == "mirrored"]
    assert [finding.case for finding in found] == ["case_3"]
    assert "upside down" in found[0].message and "left-right" not in found[0].message


def test_facts_are_those_of_the_files(sound: Path):
    dataset = read_dataset(sound)
    check = check_dataset(dataset)
    for facts in check.facts[:3]:
        (image,), labels = load_case(dataset, dataset[facts.case])
        assert facts.shape == image.shape and facts.orientation == "RAS"
        assert facts.spacing_mm == pytest.approx((1.0, 1.2, 1.5))
        assert facts.voxels == {value: int((labels.data == value).sum()) for value in (1, 2)}
        assert facts.parts == {value: (voxels,) for value, voxels in facts.voxels.items()}
        places = np.argwhere(labels.data > 0)
        assert facts.label_shape == tuple(np.ptp(places, axis=0) + 1)
        (channel,) = facts.channels
        assert (channel.minimum, channel.maximum) == (image.data.min(), image.data.max())
        assert channel.mean == pytest.approx(image.data.mean(), rel=1e-5)
        assert channel.deviation == pytest.approx(image.data.std(), rel=1e-5)
        assert channel.percentiles[3] == pytest.approx(np.median(image.data))
        inside = np.sort(image.data[labels.data > 0])
        assert np.isin(channel.foreground, inside).all()
        assert np.median(channel.foreground) == pytest.approx(np.median(inside), abs=2)
    assert json.loads(json.dumps(check.as_dict()))["cases"][0]["case"] == "case_0"


def test_leaks_between_given_splits(folder: Path):
    spoiled = spoil(folder, "same case", 3)
    names = [f"case_{n}" for n in range(COUNT)]
    rest = [name for name in names if name != spoiled.name]
    splits = [
        {"train": rest, "val": [spoiled.name]},
        {"train": [*names[:5], "case_9"], "val": names[9:12]},
    ]
    put_json(splits, folder / "splits_final.json")
    leaks = [f for f in check_dataset(read_dataset(folder)).findings if f.kind == "leak"]
    assert {"split 0" in finding.message for finding in leaks} == {True, False}
    assert any(finding.case == "case_9" and "split 1" in finding.message for finding in leaks)
    assert all(finding.severity == "error" for finding in leaks)


def test_a_patient_on_both_sides_is_a_leak(sound: Path):
    lines = ["case,image,label,split,patient"]
    for number, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        patient = {3: "p", 4: "p", 5: "q", 6: "q"}.get(number, f"x{number}")
        name = f"case_{number}.nii.gz"
        lines.append(f"c{number},{sound}/imagesTr/{name},{sound}/labelsTr/{name},{split},{patient}")
    file = sound.parent / "list.csv"
    file.write_text("\n".join(lines))
    findings = check_dataset(read_dataset(file)).findings
    assert {(f.case, f.kind) for f in findings} == {("c4", "leak"), ("c5", "leak")}


def test_partial_labels_are_held_to_what_is_said(sound: Path, tmp_path: Path):
    start = f"{sound}/imagesTr/case_0.nii.gz,{sound}/labelsTr/case_0.nii.gz"
    (tmp_path / "list.csv").write_text(f"case,image,label,labelled\na,{start},1\nb,{start},1 2\n")
    findings = check_dataset(read_dataset(tmp_path)).findings
    assert ("a", "value") in {(f.case, f.kind) for f in findings}
    assert ("b", "value") not in {(f.case, f.kind) for f in findings}


def test_many_cases_without_labels_are_examples_of_their_own(folder: Path):
    for number in range(6):
        case = Spoilt(folder, number, 0, np.random.default_rng(0))
        case.put(labels=case.labels.data * 0)
    findings = check_dataset(read_dataset(folder)).findings
    assert {(f.case, f.kind, f.severity) for f in findings} == {
        (f"case_{n}", "empty", "warning") for n in range(6)
    }


def test_a_lone_case_without_labels_is_an_error(folder: Path):
    case = spoil(folder, "empty", 1)
    findings = check_dataset(read_dataset(folder)).findings
    assert [(f.case, f.kind, f.severity) for f in findings] == [(case.name, "empty", "error")]


def test_a_rare_value_without_a_name_is_asked_about(folder: Path):
    (folder / "dataset.json").unlink()
    case = spoil(folder, "unknown value", 1)
    findings = [f for f in check_dataset(read_dataset(folder)).findings if f.kind == "value"]
    assert [finding.case for finding in findings] == [case.name]
    assert f"1 of {COUNT} cases" in findings[0].message


def test_masks_that_overlap_and_channels_on_other_grids(tmp_path: Path):
    for number in range(2):
        image, labels = make_case(number)
        folder = tmp_path / "total" / f"s{number}"
        put(image, folder / "ct.nii.gz")
        for value, name in ((1, "liver"), (2, "spleen")):
            mask = (labels.data == value) | ((labels.data > 0) & (number == 1))
            put(
                labels.with_data(mask.astype(np.uint8)), folder / "segmentations" / f"{name}.nii.gz"
            )
        for channel in range(2):
            placed = moved(image, 3, 0, 0) if number == channel == 1 else image
            put(placed, tmp_path / "two" / "images" / f"c{number}_{channel:04d}.nii.gz")
        put(labels, tmp_path / "two" / "labels" / f"c{number}.nii.gz")
    found = check_dataset(read_dataset(tmp_path / "total")).findings
    assert ("s1", "overlap") in {(f.case, f.kind) for f in found}
    assert ("s0", "overlap") not in {(f.case, f.kind) for f in found}
    assert {(f.case, f.kind) for f in check_dataset(read_dataset(tmp_path / "two")).findings} == {
        ("c1", "geometry")
    }


def test_same_values_tells_rescaled_from_alike():
    rng = np.random.default_rng(0)
    data = rng.normal(100, 20, (9, 8, 7)).astype(np.float32)
    assert _same_values(data, data.copy()) == "equal"
    assert _same_values(data, data * 2 - 50) == "rescaled"
    assert _same_values(data, np.rint(data).astype(np.int16)) == "rescaled"
    assert _same_values(data, data + rng.normal(0, 0.2, data.shape)) == "alike"
    assert _same_values(data, rng.permutation(data.ravel()).reshape(data.shape)) == ""
    assert _same_values(data, -data) == ""


@pytest.mark.parametrize("count", [8, 12, 30])
def test_isolation_is_the_distance_to_a_near_neighbour(count: int):
    values = np.random.default_rng(count).normal(size=count)
    rank = 3 if count >= 20 else 2 if count >= 12 else 1
    expected = np.sort(np.abs(values[:, None] - values[None]), axis=1)[:, rank]
    assert np.allclose(_isolation(values), expected)


# Corrected copies ---------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        state.update(str(path.relative_to(folder)).encode())
        state.update(path.read_bytes() if path.is_file() else b"")
    return state.hexdigest()


def test_fix_corrects_what_is_certain_and_keeps_the_rest(folder: Path, tmp_path: Path):
    cases = [Spoilt(folder, n, 20 + n, np.random.default_rng(n)) for n in range(6)]
    for defect, case in zip(
        (
            "same case",
            "label a little shifted",
            "one volume in 4-D",
            "nan",
            "label shifted",
            "nan in labels",
        ),
        cases,
    ):
        DEFECTS[defect][1](case)
    names = [f"case_{n}" for n in range(COUNT)]
    put_json([{"train": names[:20], "val": names[20:]}], folder / "splits_final.json")
    (folder / "README.txt").write_text("about")
    before = digest_of(folder)
    dataset = read_dataset(folder)
    check = check_dataset(dataset)
    done = write_fixed(dataset, check, tmp_path / "fixed")
    assert digest_of(folder) == before
    assert len(done) == 4
    fixed = read_dataset(tmp_path / "fixed")
    left_out = {"case_0", "case_20"} - {case.name for case in fixed.cases}
    assert len(left_out) == 1 and len(fixed.cases) == COUNT - 1
    assert left_out.isdisjoint(name for split in fixed.splits for side in split for name in side)
    assert json.loads((tmp_path / "fixed" / "dataset.json").read_text())["numTraining"] == COUNT - 1
    assert (tmp_path / "fixed" / "README.txt").read_text() == "about"
    after = {(finding.case, finding.kind) for finding in check_dataset(fixed).findings}
    assert after == {("case_4", "geometry"), ("case_5", "nan")}
    (image,), labels = load_case(fixed, fixed["case_1"])
    assert np.array_equal(image.data, cases[1].image.data) and np.array_equal(
        labels.data, cases[1].labels.data
    )
    (image,), _ = load_case(fixed, fixed["case_3"])
    assert np.isfinite(image.data).all() and (image.data != cases[3].image.data).sum() == 1
    untouched = Path("labelsTr/case_9.nii.gz")
    assert (tmp_path / "fixed" / untouched).read_bytes() == (folder / untouched).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_fix_copies_voxels_beside_their_headers_whole_however_large_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And neither those of what is left out, nor those of what is written anew."""
    monkeypatch.setattr("medseg.dataset.check.fix._MAX_TEXT_BYTES", 100)
    folder, out = tmp_path / "data", tmp_path / "out"
    expected: dict[str, NDArray] = {}
    for number, kind in enumerate(("nhdr", "mhd", "hdr", "nhdr", "mhd")):
        image, labels = make_case(0 if number == 3 else number)
        values = image.data.astype(np.float32)
        expected[f"c{number}"] = values.copy()
        values[0, 0, 0] = np.nan if number == 4 else values[0, 0, 0]
        put_detached(image.with_data(values), folder / "images" / f"c{number}.{kind}")
        put(labels, folder / "labels" / f"c{number}.nii.gz")
    dataset = read_dataset(folder)
    done = write_fixed(dataset, check_dataset(dataset), out)
    assert len(done) == 2 and any("c4.mhd" in line for line in done)
    left_out = next(name for name in ("c0", "c3") if f"{name}: left out (duplicate)" in done)
    fixed = read_dataset(out)
    kept = {"c0", "c1", "c2", "c3", "c4"} - {left_out}
    assert {case.name for case in fixed.cases} == kept
    for case in fixed.cases:
        (image,), _ = load_case(fixed, case)
        values = expected[case.name]
        values[0, 0, 0] = 0 if case.name == "c4" else values[0, 0, 0]
        assert np.array_equal(image.data, values)
    there = {path.name for path in (out / "images").iterdir()}
    assert {"voxels of c1", "c2.img"} < there
    assert {f"voxels of {left_out}", "voxels of c4"}.isdisjoint(there)


def put_detached(volume: Volume, path: Path) -> None:
    """Write a header, and float32 voxels into a file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes, beside = " ".join(map(str, volume.shape)), f"voxels of {path.stem}"
    columns = volume.affine[:3].T.tolist()
    words = ["(" + ",".join(map(str, column)) + ")" for column in columns]
    if path.suffix == ".hdr":
        nib.save(nib.Nifti1Pair(volume.data, volume.affine), path)
        return
    (path.parent / beside).write_bytes(volume.data.tobytes(order="F"))
    if path.suffix == ".nhdr":
        text = (
            "NRRD0004\ntype: float\ndimension: 3\nspace: right-anterior-superior\n"
            f"sizes: {sizes}\nspace directions: {' '.join(words[:3])}\nspace origin: {words[3]}\n"
            f"endian: little\nencoding: raw\ndata file: {beside}\n"
        )
    else:
        assert np.array_equal(volume.affine[:3, :3], np.diag(np.diag(volume.affine)[:3]))
        spacing = np.diag(volume.affine)[:3]
        offset = " ".join(str(value) for value in (np.array([-1, -1, 1]) * volume.affine[:3, 3]))
        text = (
            f"ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_FLOAT\n"
            f"ElementSpacing = {' '.join(map(str, spacing))}\nOffset = {offset}\n"
            "TransformMatrix = -1 0 0 0 -1 0 0 0 1\n"
            f"ElementDataFile = {beside}\n"
        )
    path.write_text(text, encoding="ascii", newline="\n")


@pytest.mark.parametrize("layout", ["nnunet", "datalist", "csv", "jsonl", "folders"])
def test_fix_leaves_a_duplicate_out_of_what_lists_it(tmp_path: Path, layout: str):
    folder, out = tmp_path / "data", tmp_path / "out"
    entries = []
    for number in range(4):
        image, labels = make_case(number if number < 3 else 0)
        put(image, folder / "imagesTr" / f"c{number}_0000.nii.gz")
        put(labels, folder / "labelsTr" / f"c{number}.nii.gz")
        entries.append(
            {"image": f"imagesTr/c{number}_0000.nii.gz", "label": f"labelsTr/c{number}.nii.gz"}
        )
    source = folder
    if layout == "nnunet":
        labels_named = {"background": 0, "a": 1, "b": 2}
        content = {
            "channel_names": {"0": "CT"},
            "labels": labels_named,
            "file_ending": ".nii.gz",
            "numTraining": 4,
        }
        put_json(content, folder / "dataset.json")
    elif layout == "datalist":
        source = put_json({"training": entries}, folder / "list.json")
    elif layout == "csv":
        source = folder / "list.csv"
        source.write_text(
            "\n".join(["image,label", *(",".join(entry.values()) for entry in entries)])
        )
    elif layout == "jsonl":
        source = folder / "list.jsonl"
        source.write_text("\n".join(json.dumps(entry) for entry in entries))
    dataset = read_dataset(source)
    done = write_fixed(dataset, check_dataset(dataset), out)
    assert done == ["c3: left out (duplicate)"]
    fixed = read_dataset(out)
    assert fixed.layout == dataset.layout
    assert [case.name for case in fixed.cases] == ["c0", "c1", "c2"]
    assert fixed.findings == ()
    assert not (out / "imagesTr" / "c3_0000.nii.gz").exists()


def test_fix_drops_entries_whose_files_are_missing(folder: Path, tmp_path: Path):
    (folder / "imagesTr" / "case_7.nii.gz").unlink()
    dataset = read_dataset(folder)
    done = write_fixed(dataset, check_dataset(dataset), tmp_path / "out")
    assert done == ["case_7: left out (missing)"]
    fixed = read_dataset(tmp_path / "out")
    assert len(fixed.cases) == COUNT - 1 and not [
        f for f in fixed.findings if f.severity == "error"
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_fix_takes_a_row_out_of_a_list_by_its_name_and_no_other(tmp_path: Path, suffix: str):
    """A missing case is called '1', and so are a fold and a group."""
    rows = []
    for number in range(4):
        image, labels = make_case(number)
        if number != 1:
            put(image, tmp_path / "data" / f"image_{number}.nii.gz")
        put(labels, tmp_path / "data" / f"labels_{number}.nii.gz")
        row = {
            "case": number,
            "image": f"image_{number}.nii.gz",
            "label": f"labels_{number}.nii.gz",
        }
        rows.append({key: str(value) for key, value in row.items()} | {"fold": "1", "group": "1"})
    lines = [json.dumps(row) for row in rows]
    if suffix == "csv":
        lines = [",".join(part) for part in (rows[0], "", *(row.values() for row in rows))]
    (tmp_path / "data" / f"cases.{suffix}").write_text("\n".join(lines) + "\n")
    dataset = read_dataset(tmp_path / "data")
    done = write_fixed(dataset, check_dataset(dataset), tmp_path / "out")
    assert done == ["1: left out (missing)"]
    assert [case.name for case in read_dataset(tmp_path / "out").cases] == ["0", "2", "3"]


def test_intensities_of_structures_are_measured_without_what_is_to_be_ignored(tmp_path: Path):
    image, labels = make_case(0)
    data = np.array(labels.data)
    ct = image.with_data(np.where(data > 0, 60, -1000).astype(np.int16, order="F"))
    data[:, :6] = 3
    put(ct, tmp_path / "imagesTr" / "a_0000.nii.gz")
    put(labels.with_data(data), tmp_path / "labelsTr" / "a.nii.gz")
    names = {"background": 0, "one": 1, "two": 2, "ignore": 3}
    description = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
    put_json(description, tmp_path / "dataset.json")
    (facts,) = check_dataset(read_dataset(tmp_path)).facts
    assert set(facts.channels[0].foreground.tolist()) == {60.0}


def test_fix_refuses_places_that_are_taken_or_inside(folder: Path, tmp_path: Path):
    dataset = read_dataset(folder)
    check = check_dataset(dataset)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for place, why in (
        (tmp_path / "taken", "not an empty folder"),
        (folder / "out", "within the dataset"),
    ):
        with pytest.raises(BadOutput, match=why):
            write_fixed(dataset, check, place)
    with pytest.raises(BadOutput, match="does not exist"):
        write_fixed(dataset, check, tmp_path / "no" / "out")
    lines = f"image,label\n{folder}/imagesTr/case_1.nii.gz,{folder}/labelsTr/case_1.nii.gz\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.csv").write_text(lines)
    dataset = read_dataset(tmp_path / "lists")
    with pytest.raises(BadConfig, match="lies outside"):
        write_fixed(dataset, check_dataset(dataset), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(sound: Path, folder: Path, tmp_path: Path):
    run = CliRunner().invoke
    clean = run(make_app(), ["check", str(sound), "--quiet"])
    assert clean.exit_code == 0 and "nothing found" in clean.stdout and "case_23" in clean.stdout
    case = spoil(folder, "label a little shifted", 1)
    found = run(
        make_app(), ["check", str(folder), "--json", "--quiet", "--fix", str(tmp_path / "out")]
    )
    assert found.exit_code == 3
    content = json.loads(found.stdout)
    assert (
        content["errors"] == 1
        and content["layout"] == "decathlon"
        and len(content["cases"]) == COUNT
    )
    assert content["findings"][0]["case"] == case.name and content["findings"][0]["fixable"]
    assert len(content["fixed"]) == 1
    assert run(make_app(), ["check", str(tmp_path / "out"), "--quiet"]).exit_code == 0
    shown = run(make_app(), ["check", str(folder), "--quiet"])
    assert shown.exit_code == 3 and "1 errors, 0 warnings" in shown.stdout


def test_defects_planted_in_the_hippocampus_set(shared_data: Path, tmp_path: Path):
    """Fourteen cases drawn by chance are spoilt in fourteen ways; nothing is said of the others but
    of one island.
    """
    source = shared_data / "hippocampus"
    folder = tmp_path / "data"
    for inner in ("imagesTr", "labelsTr"):
        (folder / inner).mkdir(parents=True)
        for path in (source / inner).glob("[!.]*.nii.gz"):
            (folder / inner / path.name).symlink_to(path)
    shutil.copyfile(source / "dataset.json", folder / "dataset.json")
    names = sorted(path.name.removesuffix(".nii.gz") for path in (folder / "imagesTr").iterdir())
    defects = [
        "label shifted", "unknown value", "label on another grid", "same case",
        "same case in bytes", "empty", "nan",
        "mirrored", "labels mirrored", "header mirrored", "four volumes", "offset", "bright voxel",
        "structures swapped",
    ]  # fmt: skip
    rng = np.random.default_rng(20)
    drawn = rng.choice(names, 2 * len(defects), replace=False)
    expected: dict[str, str] = {}
    for defect, name, other in zip(defects, drawn, drawn[len(defects) :]):
        case = Spoilt.__new__(Spoilt)
        case.folder, case.name, case.other, case.rng = folder, name, other, rng
        case.image_path, case.label_path = (
            folder / d / f"{name}.nii.gz" for d in ("imagesTr", "labelsTr")
        )
        case.image, case.labels = read(case.image_path), read_labels(case.label_path)
        case.image_path.unlink(), case.label_path.unlink()
        case.put(case.image, case.labels)
        DEFECTS[defect][1](case)
        expected[max(name, other) if "same" in defect else name] = DEFECTS[defect][0]
    findings = check_dataset(read_dataset(folder)).findings
    kinds: dict[str, set[str]] = {}
    for finding in findings:
        kinds.setdefault(finding.case, set()).add(finding.kind)
    assert {
        name: kind for name, kind in expected.items() if kind not in kinds.get(name, set())
    } == {}
    assert {name: found for name, found in kinds.items() if name not in drawn} in (
        {},
        {"hippocampus_156": {"island"}},
    )
