"""Only the region around what is asked for is computed where a coarse model of the task says where
that is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from making import nnunet as making
from medseg.errors import BadModel
from medseg.inference import Settings, labels_named, segment
from medseg.inference.forecast import Plan
from medseg.inference.frame import lay_frame, prepare_frame
from medseg.models import load_models, write_models
from medseg.models.recipe import ChannelScale, Recipe, Resampling
from medseg.volume import Volume, reorient

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
BOTH = {"background": 0, "liver": 1, "spleen": 2}


def write(folder: Path, spacing: float, labels: dict[str, int] = BOTH, **options: object) -> Path:
    """A model that finds what is bright, as its first label."""
    plan = making.plans(spacing=[spacing] * 3, normalization_schemes=["CTNormalization"])
    data = making.dataset(labels, channels=("CT",))
    return making.write_model(
        folder, plan=plan, data=data, make_weights=making.bright_weights, **options
    )


def a_set(root: Path) -> Path:
    write(root / "Dataset291_T_part1_a" / FULL, 3.0)
    write(root / "Dataset292_T_part2_b" / FULL, 3.0, {"background": 0, "kidney": 1})
    return root


def a_coarse_one(root: Path) -> Path:
    names = {"background": 0, "liver": 1, "spleen": 2, "Kidney": 3}
    return write(root / "Dataset298_T_total_6mm" / FULL, 9.0, names)


def scan() -> Volume:
    """A bright ball near a corner of a large dark block."""
    at = np.indices((60, 48, 54))
    ball = sum((x - c) ** 2 for x, c in zip(at, (47, 12, 38))) < 5**2
    data = np.where(ball, 200, 20 + at[0] % 3).astype(np.int16)
    return Volume(np.asfortranarray(data), np.diag([-3.0, -3.0, 3.0, 1.0]))


def run(models: object, names: list[str], **settings: object) -> tuple[np.ndarray, list[Plan]]:
    told: list[Plan] = []
    asked = Settings(roi=labels_named(models, names), **settings)
    found = segment(scan(), models, asked, announce=told.append)
    return found.labels.data, told


def test_a_set_looks_only_around_what_its_coarse_model_finds(tmp_path):
    root = a_set(tmp_path / "results")
    whole, plans = run(load_models([str(root)]), ["liver"])
    assert (whole == 1).sum() > 300 and not any("only" in fact for fact in plans[0].taken)
    a_coarse_one(root)
    models = load_models([str(root)])
    part, fewer = run(models, ["liver"])
    assert any(fact.startswith("only ") for fact in fewer[0].taken)
    assert fewer[0].windows * 4 < plans[0].windows
    np.testing.assert_array_equal(part, whole)
    part, _ = run(models, ["kidney"])
    assert (part == 3).sum() > 300


def test_nothing_is_left_out_where_that_is_not_sure(tmp_path):
    root = a_set(tmp_path / "results")
    a_coarse_one(root)
    models = load_models([str(root)])
    for names, settings in ((["liver", "spleen"], {}), (["liver"], {"exact": True})):
        _, plans = run(models, names, **settings)  # the coarse model finds no spleen
        assert not any("only" in fact for fact in plans[0].taken)


def test_a_model_finds_the_coarse_one_of_its_dataset_or_beside_it(tmp_path):
    top = tmp_path / "Dataset300_Made"
    plan = making.plans(spacing=[3.0] * 3, normalization_schemes=["CTNormalization"])
    configurations = plan["configurations"]
    configurations["3d_lowres"] = configurations["3d_fullres"] | {"spacing": [9.0] * 3}
    for name in ("3d_fullres", "3d_lowres"):
        making.write_model(
            top / f"nnUNetTrainer__nnUNetPlans__{name}",
            plan=plan,
            data=making.dataset(BOTH, channels=("CT",)),
            saved={"init_args": {"configuration": name}},
            make_weights=making.bright_weights,
        )
    models = load_models([str(top / FULL)])
    part, plans = run(models, ["liver"])
    assert any(fact.startswith("only ") for fact in plans[0].taken)
    assert (part == 1).sum() > 300
    assert not load_models([str(top / "nnUNetTrainer__nnUNetPlans__3d_lowres")])[0].coarse()
    fine = write(tmp_path / "two" / "Dataset001_Fine" / FULL, 3.0)
    write(tmp_path / "two" / "Dataset002_Other" / FULL, 9.0, {"background": 0, "liver": 1})
    assert not load_models([str(fine)])[0].coarse()  # it knows no spleen
    write(tmp_path / "two" / "Dataset003_Coarse" / FULL, 9.0)
    assert load_models([str(fine)])[0].coarse()[0].spec.spacing == (9.0,) * 3
    for file in tmp_path.rglob("checkpoint_final.pth"):
        if fine not in file.parents:
            file.write_bytes(b"damaged")
    assert not load_models([str(fine)])[0].coarse()  # a run is only longer without


def test_a_converted_set_keeps_its_coarse_model(tmp_path):
    root = a_set(tmp_path / "results")
    a_coarse_one(root)
    write_models(load_models([str(root)]), tmp_path / "own")
    shutil.rmtree(root)
    part, plans = run(load_models([str(tmp_path / "own")]), ["liver"])
    assert any(fact.startswith("only ") for fact in plans[0].taken)
    assert (part == 1).sum() > 300


def test_models_of_other_tasks_beside_a_set_are_named_and_none_is_chosen(tmp_path):
    root = a_set(tmp_path / "results")
    write(root / "Dataset300_Lungs" / FULL, 9.0, {"background": 0, "lung": 1})
    with pytest.raises(BadModel, match="Dataset300_Lungs"):
        load_models([str(root)])


@pytest.mark.parametrize("orientation", ["stored", "RAS", "LAS"])
def test_intensities_are_those_of_the_whole_scan(orientation):
    recipe = Recipe(
        axes=(2, 0, 1),
        spacing_mm=(1.5, 1.5, 1.5),
        crop="nonzero",
        channels=(ChannelScale(scheme="zscore"),),
        image=Resampling(),
    )
    random = np.random.default_rng(0)
    volume = reorient(
        Volume(random.normal(50, 9, (40, 30, 36)).astype(np.float32), np.diag([1.5] * 3 + [1.0])),
        "SAR",
    )
    region = (slice(5, 12), slice(20, 26), slice(9, 11))
    whole = lay_frame([volume], recipe, orientation)
    part = lay_frame([volume], recipe, orientation, region=region, patch=(8, 6, 10))
    assert all(size >= least for size, least in zip(part.shape, (8, 6, 10)))
    marked = np.zeros(volume.shape, np.uint8)
    marked[region] = 1
    assert part.seen(volume.with_data(marked)).sum() == marked.sum()
    all_of_it = prepare_frame([volume], recipe, whole, exact=True)
    cut = prepare_frame([volume], recipe, part, exact=True)
    np.testing.assert_array_equal(cut, all_of_it[(slice(None), *part.inner)])
    back = part.back(np.ones(part.cropped, np.uint8))
    assert back[region].all() and back.sum() == np.prod(part.cropped)
