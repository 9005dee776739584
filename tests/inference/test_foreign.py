"""Models of nnU-Net from end to end: the same labels as nnU-Net's, with every option other models
have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from making import nnunet as making
from making.nnunet_slow import slow_labels, slow_mean
from medseg.errors import BadConfig, BadModel
from medseg.inference import Settings, labels_named, segment
from medseg.io import read
from medseg.models import load_models
from medseg.postprocess import keep_largest_together
from medseg.volume import Volume, reorient

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = Settings(exact=True)


def write_scan(
    path: Path, shape: tuple[int, int, int] = (25, 22, 27), spacing: Any = (1.1, 0.9, 1.3)
) -> Path:
    """Smooth noise with a border of zeros."""
    random = np.random.default_rng(5)
    data = np.zeros(shape, np.float32)
    inner = random.normal(size=[n - 3 for n in shape]).astype(np.float32)
    for axis in range(3):
        inner = (np.roll(inner, 1, axis) + inner + np.roll(inner, -1, axis)) / 1.7
    data[1:-2, 2:-1, 1:-2] = 80 + 60 * inner
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nib.Nifti1Image(data.astype(np.int16), affine).to_filename(path)
    return path


def found(folder: Path, scan: Path, settings: Settings = EXACT, **options: Any) -> np.ndarray:
    return np.asarray(
        segment(read(scan), load_models([str(folder)], **options), settings).labels.data
    )


MADE: dict[str, dict[str, Any]] = {
    "one fold": {},
    "mirrored": {"saved": {"inference_allowed_mirroring_axes": (0, 2)}},
    "three folds": {"folds": ("0", "1", "4")},
    "ct": {"plan": making.plans(normalization_schemes=["CTNormalization"])},
    "the scan's spacing": {
        "plan": making.plans(spacing=[float(np.float32(s)) for s in (1.3, 0.9, 1.1)])
    },
    "transposed": {
        "plan": making.plans() | {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}
    },
    "regions": {
        "data": making.dataset(
            {"background": 0, "all": [1, 2], "some": [2]}, regions_class_order=[1, 2]
        ),
    },
}


@pytest.mark.parametrize("case", MADE)
def test_labels_are_those_of_a_plain_predictor_to_the_voxel(tmp_path, case):
    folder = making.write_model(tmp_path / "model", **MADE[case])
    scan = write_scan(tmp_path / "scan.nii.gz")
    mirror = MADE[case].get("saved", {}).get("inference_allowed_mirroring_axes", ())
    want = slow_labels(folder, scan, mirror=mirror)
    assert len(np.unique(want)) >= 2
    np.testing.assert_array_equal(found(folder, scan), want)
    fast = found(folder, scan, Settings(tta=bool(mirror)))
    assert (fast != want).mean() < 1e-3  # weights are random, so logits are nearly tied everywhere


def test_a_residual_and_a_flat_network_and_stripes_give_one_answer(tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz")
    for name, arguments in (("residual", making.RESIDUAL), ("flat", making.FLAT)):
        folder = making.write_model(tmp_path / name, plan=making.plans(arguments))
        whole = found(folder, scan)
        assert len(np.unique(whole)) >= 2
        assert (found(folder, scan, Settings()) != whole).mean() < 1e-3


def test_a_scan_smaller_than_the_patch_is_padded(tmp_path):
    folder = making.write_model(tmp_path / "model")
    scan = write_scan(tmp_path / "scan.nii.gz", (11, 8, 12))
    labels = found(folder, scan)
    assert labels.shape == (11, 8, 12)
    assert not labels[0].any()


def test_the_result_lies_as_the_scan_does_and_turning_it_changes_nothing_for_ras_readers(tmp_path):
    plan = making.plans() | {"image_reader_writer": "NibabelIOWithReorient"}
    folder = making.write_model(tmp_path / "model", plan=plan)
    model = load_models([str(folder)])
    scan = read(write_scan(tmp_path / "scan.nii.gz"))
    first = segment(scan, model, EXACT).labels
    turned = segment(reorient(scan, "SAL"), model, EXACT).labels
    np.testing.assert_allclose(turned.affine, reorient(scan, "SAL").affine)
    np.testing.assert_array_equal(reorient(turned, "LPS").data, reorient(first, "LPS").data)


def test_what_was_taken_is_said(tmp_path):
    folder = making.write_model(
        tmp_path / "model", folds=("0", "3"), saved={"inference_allowed_mirroring_axes": (0,)}
    )
    scan = read(write_scan(tmp_path / "scan.nii.gz"))
    told: list[str] = []
    segment(scan, load_models([str(folder)]), EXACT, announce=lambda made: told.extend(made.taken))
    for word in (
        "nnUNetTrainer",
        "nnUNetPlans",
        "3d_fullres",
        "folds 0, 3",
        "checkpoint_final",
        "mirrored",
        "stored",
    ):
        assert any(word in fact for fact in told), word
    told.clear()
    settings = Settings(orientation="RAS")
    segment(
        scan, load_models([str(folder)]), settings, announce=lambda made: told.extend(made.taken)
    )
    assert any("--tta" in fact and "2 times" in fact for fact in told)
    assert "scan turned to RAS" in told


def test_a_cascade_runs_both_stages_and_misses_a_first_one_by_name(tmp_path):
    plan = making.plans()
    plan["configurations"]["3d_lowres"] = plan["configurations"]["3d_fullres"] | {
        "spacing": [2.0, 2.0, 2.0]
    }
    plan["configurations"]["3d_cascade_fullres"] = {
        "inherits_from": "3d_fullres",
        "previous_stage": "3d_lowres",
    }
    top = tmp_path / "Dataset900_Made"
    cascade = making.write_model(
        top / "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
        plan=plan,
        saved={"init_args": {"configuration": "3d_cascade_fullres"}},
        previous=2,
    )
    scan = write_scan(tmp_path / "scan.nii.gz", (40, 36, 44))
    with pytest.raises(BadModel, match="nnUNetTrainer__nnUNetPlans__3d_lowres"):
        found(cascade, scan)
    making.write_model(
        top / "nnUNetTrainer__nnUNetPlans__3d_lowres",
        plan=plan,
        saved={"init_args": {"configuration": "3d_lowres"}},
    )
    result = segment(read(scan), load_models([str(cascade)]), EXACT)
    assert "first stage" in result.seconds
    assert len(np.unique(result.labels.data)) >= 2
    for file in top.glob("*/fold_0/checkpoint_final.pth"):
        file.rename(file.with_name("checkpoint_best.pth"))
    best = found(cascade, scan, checkpoint="best")  # of both stages
    np.testing.assert_array_equal(best, result.labels.data)


def a_set(folder: Path) -> Path:
    making.write_model(folder / "Dataset291_T_part1_a" / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    making.write_model(
        folder / "Dataset292_T_part2_b" / "nnUNetTrainer__nnUNetPlans__3d_fullres",
        data=making.dataset({"background": 0, "kidney_left": 1}),
    )
    return folder


def test_a_set_of_parts_is_laid_over_each_other_in_one_table(tmp_path):
    root, scan = a_set(tmp_path / "results"), write_scan(tmp_path / "scan.nii.gz")
    models = load_models([str(root)])
    result = segment(read(scan), models, EXACT)
    assert result.table.names == {1: "liver", 2: "spleen", 3: "kidney_left"}
    own = Settings(exact=True, overlap=1 - 0.8)
    one, two = (found(folder, scan, own) for folder in sorted(root.iterdir()))
    want = np.where(two > 0, 3, one)
    np.testing.assert_array_equal(result.labels.data, want)


def test_only_what_is_asked_for_is_run_and_kept(tmp_path):
    root, scan = a_set(tmp_path / "results"), read(write_scan(tmp_path / "scan.nii.gz"))
    models = load_models([str(root)])
    ran: list[str] = []
    values = labels_named(models, ["Kidney left"])
    result = segment(
        scan, models, Settings(roi=values), announce=lambda made: ran.append(made.model)
    )
    assert len(ran) == 1
    assert result.table.names == {3: "kidney_left"}
    assert set(np.unique(result.labels.data)) <= {0, 3}
    single = load_models([str(next(root.iterdir()))])
    with pytest.raises(BadConfig, match="pancreas"):
        labels_named(single, ["pancreas"])


MEANS: dict[str, list[dict[str, Any]]] = {
    "plans": [
        {},
        {"plan": making.plans(spacing=[1.4, 1.0, 1.2], patch_size=[12, 16, 12]), "folds": ("1",)},
    ],
    "folds": [{"folds": ("0", "1")}, {"folds": ("2",)}],
    "regions": [
        {
            "data": making.dataset(
                {"background": 0, "all": [1, 2], "some": [2]}, regions_class_order=[1, 2]
            ),
            "plan": making.plans(spacing=spacing),
            "folds": (fold,),
        }
        for fold, spacing in (("0", [1.0, 1.0, 1.0]), ("1", [1.3, 0.9, 1.1]))
    ],
}


@pytest.mark.parametrize("case", MEANS)
def test_models_of_several_plans_are_averaged_as_probabilities_to_the_voxel(tmp_path, case):
    folders = [making.write_model(tmp_path / f"m{n}", **one) for n, one in enumerate(MEANS[case])]
    scan = write_scan(tmp_path / "scan.nii.gz")
    want = slow_mean(folders, scan)
    alone = [slow_labels(folder, scan) for folder in folders]
    assert all((one != want).mean() > 0.01 for one in alone)
    models = load_models([str(folder) for folder in folders])
    told: list[str] = []
    settings = Settings(exact=True, probabilities=(1, 2), uncertainty=True)
    result = segment(read(scan), models, settings, announce=lambda made: told.append(made.model))
    np.testing.assert_array_equal(result.labels.data, want)
    assert len(told) == 2
    assert set(result.maps) == {"probability_1", "probability_2", "uncertainty"}
    sure = result.maps["probability_2"].data > 0.55
    assert sure.any() and (result.labels.data[sure] == 2).all()
    assert result.maps["uncertainty"].data.max() <= 1.001
    fast = segment(read(scan), models).labels.data
    assert (fast != want).mean() < 1e-3


def test_means_of_what_does_not_belong_together_are_refused(tmp_path):
    first = making.write_model(tmp_path / "first")
    other = making.write_model(tmp_path / "other", data=making.dataset({"background": 0, "a": 1}))
    named = making.write_model(
        tmp_path / "named", data=making.dataset({"background": 0, "liver": 1, "lung": 2})
    )
    scan = read(write_scan(tmp_path / "scan.nii.gz"))
    for one, word in ((other, "classes"), (named, "name")):
        with pytest.raises(BadModel, match=word):
            segment(scan, load_models([str(first), str(one)]))
    again = making.write_model(tmp_path / "again", folds=("1",))
    models = load_models([str(first), str(again)])
    for changes in ({"precision": "bf16"}, {"postprocess": True}, {"probabilities": (9,)}):
        with pytest.raises(BadConfig):
            segment(scan, models, Settings(**changes))


def test_probabilities_and_uncertainty_come_on_the_scans_grid(tmp_path):
    folder, scan = (
        making.write_model(tmp_path / "model"),
        read(write_scan(tmp_path / "scan.nii.gz")),
    )
    for exact in (True, False):
        settings = Settings(exact=exact, probabilities=(1, 2), uncertainty=True)
        result = segment(scan, load_models([str(folder)]), settings)
        assert set(result.maps) == {"probability_1", "probability_2", "uncertainty"}
        sure = result.maps["probability_1"].data > 0.6
        assert sure.any()
        assert (result.labels.data[sure] == 1).all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"precision": "bf16"}, "--exact"),
        ({"backend": "openvino"}, "--exact"),
        ({"tta": True}, "--tta"),
        ({"probabilities": (9,)}, "label 9"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, word):
    folder, scan = (
        making.write_model(tmp_path / "model"),
        read(write_scan(tmp_path / "scan.nii.gz")),
    )
    with pytest.raises(BadConfig, match=word):
        segment(scan, load_models([str(folder)]), Settings(exact=True, **changes))


def test_a_wrong_number_of_scans_names_the_channels(tmp_path):
    plan = making.plans(
        normalization_schemes=["NoNormalization"] * 2, use_mask_for_norm=[False] * 2
    )
    folder = making.write_model(
        tmp_path / "model", plan=plan, data=making.dataset(channels=("T1", "FLAIR"))
    )
    with pytest.raises(BadConfig, match="T1, FLAIR"):
        segment(read(write_scan(tmp_path / "scan.nii.gz")), load_models([str(folder)]), EXACT)


# NnU-Net's own labels -----------------------------------------------------------------------------


def scans_of(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted((folder / "scans").glob("*.nii.gz")):
        files.setdefault(file.name[:-12], []).append(file)
    return files


#: Expectation -> model below its folder, options of loading, settings, and how many of its scans
#: are also computed by default: each trained network once, and none whose weights are random.
KNOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "aniso_separate_z/expected": ("model/*/*", {}, {"tta": False}, 4),
    "cascade/expected_lowres": ("model/*/*lowres", {}, {}, 1),
    "cascade/expected": ("model/*/*cascade_fullres", {}, {}, 1),
    "config_2d/expected": ("model", {}, {}, 2),
    "exported_zip/expected": ("model.zip", {}, {}, 1),
    "plain_old/expected": ("model/Dataset901_Plain", {}, {}, 2),
    "refuse/expected": ("good", {}, {}, 0),
    "regions_2ch/expected": ("model/*/*", {}, {}, 1),
    "reorienting_reader/expected": ("model/*/*", {}, {}, 2),
    "resenc_fold_all/expected": ("model/*/*", {}, {}, 0),
    "resenc_fold_all/expected_no_tta": ("model/*/*", {}, {"tta": False}, 2),
    "resenc_fold_all/expected_checkpoint_best": ("model/*/*", {"checkpoint": "best"}, {}, 0),
    "three_to_one/expected": ("model/*/*", {}, {}, 2),
    "total_parts/expected": ("results", {}, {}, 2),
    "transposed_2folds/expected": ("model/*/*", {}, {}, 1),
    "transposed_2folds/expected_fold_3": ("model/*/*", {"folds": ("3",)}, {}, 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_voxel_is_nnunets_own_exactly_and_nearly_all_by_default(shared_data, name):
    place, expected = name.split("/")
    root = shared_data / "interop_nnunet" / place
    pattern, loading, settings, by_default = KNOWN[name]
    models = load_models([str(next(root.glob(pattern)))], **loading)
    mirrored = not hasattr(models, "models") and bool(models[0].spec.mirror)
    cases = {
        case: files
        for case, files in scans_of(root).items()
        if (root / expected / f"{case}.nii.gz").exists()
    }
    assert cases
    also_fast = list(cases)[-by_default:] if by_default else []  # the last are the smaller ones
    for case, files in cases.items():
        want = np.asarray(nib.load(root / expected / f"{case}.nii.gz").dataobj)
        volumes = [read(file) for file in files]
        exact = segment(volumes, models, Settings(exact=True, **settings)).labels
        assert (exact.data != want).sum() <= want.size // 50_000
        cleaned = root / f"{expected}_postprocessed" / f"{case}.nii.gz"
        if cleaned.exists():
            for group in models[0].postprocessing():
                exact = keep_largest_together(exact, group)
            wanted = np.asarray(nib.load(cleaned).dataobj)
            assert (exact.data != wanted).sum() <= want.size // 50_000
        if case not in also_fast:
            continue
        fast = Settings(**({"tta": mirrored} | settings))
        default = np.asarray(segment(volumes, models, fast).labels.data)
        assert (default != want).mean() <= 1e-4
        assert min(dices(default, want)) >= 0.995


def dices(one: np.ndarray, other: np.ndarray) -> list[float]:
    values = [value for value in np.unique(other) if value]
    return [
        float(2 * ((one == v) & (other == v)).sum() / ((one == v).sum() + (other == v).sum()))
        for v in values
    ]


@pytest.mark.parametrize("kind", ["plain", "mirrored"])
def test_the_hippocampus_is_nnunets_to_the_voxel(shared_data, kind):
    models = load_models([str(shared_data / "nnunet_model" / "model")])
    settings = Settings(exact=True, tta=kind == "mirrored")
    cases = sorted((shared_data / "nnunet_model" / "cases" / kind).glob("*.nii.gz"))
    for expected in cases[: 2 if kind == "mirrored" else 4]:  # eight networks a window
        scan = read(shared_data / "hippocampus" / "imagesTr" / expected.name)
        want = np.asarray(nib.load(expected).dataobj)
        assert (segment(scan, models, settings).labels.data != want).sum() <= want.size // 50_000


def test_probabilities_are_nnunets(shared_data):
    root = shared_data / "interop_nnunet" / "plain_old"
    models = load_models([str(root / "model" / "Dataset901_Plain")])
    scan = read(root / "scans" / "scan_b_0000.nii.gz")
    result = segment(scan, models, Settings(exact=True, probabilities=(1, 2, 3)))
    want = np.load(root / "expected_with_probabilities" / "scan_b.npz")["probabilities"]
    for value in (1, 2, 3):
        got = result.maps[f"probability_{value}"].data.transpose(2, 1, 0)
        np.testing.assert_allclose(got, want[value], atol=1e-3)


def test_what_must_be_refused_is_refused_in_one_sentence(shared_data, tmp_path, monkeypatch):
    root = shared_data / "interop_nnunet" / "refuse"
    monkeypatch.chdir(tmp_path)
    good = {"good", "scans", "expected", "unknown_trainer_same_network"}
    names = sorted(
        entry.name for entry in root.iterdir() if entry.name not in good and entry.suffix != ".md"
    )
    assert len(names) >= 15
    for name in names:
        with pytest.raises(BadModel) as caught:
            for one in load_models([str(root / name)]):
                one.network()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    models = load_models([str(root / "unknown_trainer_same_network")])
    assert models[0].spec.card["notes"]


def test_postprocessing_that_is_asked_for_keeps_the_largest_part(tmp_path):
    folder = making.write_model(tmp_path / "model")
    advice = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": 2}],
    }
    (folder / "crossval_results_folds_0").mkdir()
    (folder / "crossval_results_folds_0" / "postprocessing.json").write_text(json.dumps(advice))
    scan = write_scan(tmp_path / "scan.nii.gz")
    plain, kept = (found(folder, scan, replace(EXACT, postprocess=one)) for one in (False, True))
    parts, count = ndimage.label(plain == 2, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    largest = 1 + np.flatnonzero(sizes[1:] == sizes[1:].max())  # of equal ones all, as nnU-Net does
    assert count > len(largest)
    wanted = np.where((plain == 2) & ~np.isin(parts, largest), 0, plain)
    np.testing.assert_array_equal(kept, wanted)


def test_a_volume_made_in_memory_is_taken_as_it_is_stored(tmp_path):
    folder = making.write_model(tmp_path / "model")
    scan = read(write_scan(tmp_path / "scan.nii.gz"))
    bare = Volume(scan.data, scan.affine)
    first, second = (
        segment(one, load_models([str(folder)]), EXACT).labels.data for one in (scan, bare)
    )
    assert (first != second).mean() < 1e-3


def test_the_record_says_what_ran(tmp_path):
    from medseg.inference import Extras, infer, list_jobs, load_model

    folder = making.write_model(tmp_path / "model", folds=("0", "1"))
    scan = write_scan(tmp_path / "scan.nii.gz")
    (job,) = list_jobs([scan], tmp_path / "out")
    infer(job, load_model(str(folder)), Settings(exact=True), Extras())
    record = json.loads((tmp_path / "out" / "scan_seg.json").read_text())
    assert len(record["model"]["weights_sha256"]) == 2
    assert record["settings"]["exact"] is True
    assert any("folds 0, 1" in fact for fact in record["settings"]["taken"])
