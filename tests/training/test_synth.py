"""Images made from label maps: what is drawn follows the labels, the sides, and the generator
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from making import networks as tiny
from medseg.config import SynthConfig
from medseg.errors import BadConfig
from medseg.inference import preprocess
from medseg.inference.preprocess import percentile_range, scale_to_percentiles
from medseg.training import synth
from medseg.training.synth import Heads, load_heads, lookup, render
from medseg.volume import Volume, reorient

pytestmark = pytest.mark.usefixtures("one_thread")

#: Left -> right of the phantom head; classes 1.. of the networks here.
MIRROR = {2: 41, 3: 42}
CLASSES = (0, 24, 3, 42, 2, 41)
EVERYTHING = (*CLASSES, 511, 515)
ODD = (25, 27, 23)  # the middle of the head is a voxel
STILL: dict[str, Any] = {
    "rotation_degrees": 0,
    "scaling": (1.0, 1.0),
    "anisotropic_scaling": 0,
    "shearing": 0,
    "flip": 0,
    "deformation_mm": (),
    "anywhere": 0,
    "offset_mm": 0,
    "noise_within": 0,
    "dark_background": 1,
    "skull_stripped": 0,
    "bias": 0,
    "blurred": 0,
    "coarse": 0,
    "noise": 0,
    "gamma": 0,
    "cut": 0,
    "outside": (511, 515),
    "t1_like": {2: (0.9, 0), 3: (0.58, 0), 24: (0.2, 0), 511: (0.8, 0), 515: (0.1, 0)},
}


def heads_of(*maps: np.ndarray, spacing: float = 2.0) -> Heads:
    volumes = [Volume(labels, tiny.affine_of((spacing,) * 3)) for labels in maps]
    return load_heads(volumes, [value for value in CLASSES if value])


def draw(
    seed: int,
    heads: Heads | None = None,
    classes: Sequence[int] = CLASSES,
    shape: tuple = ODD,
    t1: float = 0,
    **changes,
) -> tuple[Tensor, Tensor]:
    heads = heads or heads_of(tiny.head(ODD))
    config = SynthConfig(**changes)
    table = lookup(heads.values, classes, MIRROR, config)
    return render(heads, table, shape, 2.0, config, torch.Generator().manual_seed(seed), t1_like=t1)


def test_render_is_a_function_of_the_generator():
    heads = heads_of(tiny.head(seed=1), tiny.head(seed=2))
    first, again, other = (draw(seed, heads, outside=(511, 515)) for seed in (7, 7, 8))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("seed", range(30))
def test_render_gives_an_image_in_0_to_1_and_known_classes(seed: int):
    shape = (16, 24, 20)
    image, classes = draw(seed, shape=shape, outside=(511, 515), t1=0.5)
    assert image.shape == classes.shape == shape
    assert image.dtype == torch.float32
    assert classes.dtype == torch.uint8
    assert torch.isfinite(image).all()
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert set(classes.unique().tolist()) <= set(range(len(CLASSES)))


def test_render_without_any_randomness_of_shape_gives_the_label_map_itself():
    labels = tiny.head(ODD)
    _, classes = draw(0, classes=EVERYTHING, **STILL)
    assert np.array_equal(np.array(EVERYTHING)[classes.numpy()], labels)


def test_render_on_a_larger_grid_is_background_around_the_head():
    labels = tiny.head(ODD)
    image, classes = draw(0, classes=EVERYTHING, shape=(31, 33, 29), **STILL)
    padded = np.pad(labels, 3)
    assert np.array_equal(np.array(EVERYTHING)[classes.numpy()], padded)
    assert float(image[torch.from_numpy(padded == 0)].abs().max()) == 0


def test_heads_stored_in_other_orientations_give_the_same_drawing():
    labels = Volume(tiny.head(ODD), tiny.affine_of())
    expected = draw(3, heads_of(tiny.head(ODD)))
    for letters in ("LPS", "SAR", "AIL"):
        turned = load_heads([reorient(labels, letters)], [value for value in CLASSES if value])
        image, classes = draw(3, turned)
        assert torch.equal(classes, expected[1])
        assert torch.equal(image, expected[0])


def test_a_flipped_head_has_left_and_right_swapped_and_is_mirrored():
    _, straight = draw(0, **STILL)
    _, flipped = draw(0, **(STILL | {"flip": 1}))
    swap = [
        CLASSES.index({**MIRROR, **{b: a for a, b in MIRROR.items()}}.get(value, value))
        for value in CLASSES
    ]
    expected = torch.tensor(swap, dtype=torch.uint8)[straight.long()].flip(0)
    assert torch.equal(flipped, expected)
    # Left stays on the left: low indices of an image that runs to RAS.
    for classes in (straight, flipped):
        at = [
            np.argwhere((classes == CLASSES.index(value)).numpy())[:, 0].mean() for value in (2, 41)
        ]
        assert at[0] < (ODD[0] - 1) / 2 < at[1]


def test_both_sides_of_a_structure_have_one_intensity():
    image, classes = draw(5, **STILL)
    for left, right in MIRROR.items():
        values = [image[classes == CLASSES.index(value)] for value in (left, right)]
        assert torch.equal(values[0].unique(), values[1].unique())


@pytest.mark.parametrize("seed", range(10))
def test_t1_like_images_have_white_matter_above_cortex_above_fluid(seed: int):
    image, classes = draw(seed, t1=1, **STILL)
    means = [float(image[classes == CLASSES.index(value)].mean()) for value in (2, 3, 24)]
    # Without noise the darkest two may both be the bottom of the range.
    assert means[0] > means[1] >= means[2]


def test_random_contrast_puts_tissues_in_any_order():
    orders = set()
    for seed in range(30):
        image, classes = draw(seed, **STILL)
        means = [float(image[classes == CLASSES.index(value)].mean()) for value in (2, 3, 24)]
        orders.add(tuple(np.argsort(means).tolist()))
    assert len(orders) >= 5


def test_curves_give_tissues_of_one_t1_intensity_one_intensity_and_others_any_order():
    alike = STILL | {"curved": 1, "t1_like": {2: (0.9, 0), 41: (0.9, 0), 3: (0.9, 0), 24: (0.3, 0)}}
    orders = set()
    for seed in range(30):
        image, classes = draw(seed, **alike)
        white, grey, fluid = (
            image[classes == CLASSES.index(value)].unique() for value in (2, 3, 24)
        )
        assert len(white) == 1 and torch.equal(white, grey)
        orders.add(bool(white > fluid.max()))
    assert orders == {True, False}


def test_mixtures_are_two_intensities_outside_and_never_inside():
    seen = set()
    for seed in range(20):
        image, _ = draw(seed, t1=1, classes=EVERYTHING, **(STILL | {"mixed": 1}))
        labels = torch.from_numpy(tiny.head(ODD).astype(np.int64))
        for value in (2, 3, 511):
            seen.add((value, len(image[labels == value].unique()) > 1))
        assert float(image[labels == 0].max()) == 0  # dark air stays dark
    assert seen >= {(2, False), (3, False), (511, True)}
    assert (2, True) not in seen and (3, True) not in seen


def test_ghosts_repeat_the_head_elsewhere():
    labels = torch.from_numpy(tiny.head(ODD).astype(np.int64))
    plain, _ = draw(1, t1=1, **STILL)
    assert float(plain[labels == 0].max()) == 0
    haunted = [draw(seed, t1=1, **(STILL | {"ghosts": 1}))[0] for seed in range(8)]
    assert all(float(image[labels == 0].max()) > 0 for image in haunted)


def test_a_drawing_is_what_its_definition_says():
    """Nearest labels at four points of a voxel, their mean intensity; the label of its middle, in a
    turned head.
    """
    labels = tiny.head(ODD)
    heads = heads_of(labels)
    still = STILL | {"rotation_degrees": 15, "scaling": (0.9, 0.9)}
    config = SynthConfig(**still)
    table = lookup(heads.values, EVERYTHING, MIRROR, config)
    rng = synth._Random(torch.Generator().manual_seed(3))
    rng.integer(1)
    matrix, centre, _ = synth._pose(heads, 0, ODD, 2.0, config, rng)
    _, classes = render(heads, table, ODD, 2.0, config, torch.Generator().manual_seed(3))
    padded, at = heads.maps[0].numpy(), np.indices(ODD).reshape(3, -1).astype(np.float64)
    mm = (at - (np.array(ODD)[:, None] - 1) / 2) * 2.0
    place = (matrix.numpy() @ mm) / 2.0 + centre.numpy()[:, None] + 1
    nearest = np.floor(place + 0.5).clip(0, np.array(padded.shape)[:, None] - 1).astype(int)
    expected = table.target.numpy()[padded[tuple(nearest)]].reshape(ODD)
    assert (expected == classes.numpy()).mean() > 0.999  # rounding may move a point over a border


def test_borders_have_partial_volume_and_the_inside_has_not():
    fine = heads_of(tiny.head((49, 53, 45)), spacing=1.0)
    image, classes = draw(2, fine, t1=1, **STILL)
    white = torch.isin(classes, torch.tensor([4, 5], dtype=torch.uint8))
    inside = ~torch.nn.functional.max_pool3d((~white)[None].float(), 5, 1, 2)[0].bool()
    plateau = image[inside].unique()
    assert len(plateau) == 1
    grey = torch.isin(classes, torch.tensor([2, 3], dtype=torch.uint8))
    level = image[grey].median()
    between = (image > level + 0.05) & (image < plateau[0] - 0.05)
    assert int(between.sum()) > 20


@pytest.mark.parametrize("seed", range(8))
def test_skull_stripping_empties_what_lies_outside(seed: int):
    image, classes = draw(seed, classes=EVERYTHING, **(STILL | {"skull_stripped": 1}))
    labels = torch.from_numpy(tiny.head(ODD).astype(np.int64))
    outside = torch.isin(labels, torch.tensor([0, 511, 515]))
    assert float(image[outside].abs().max()) == 0
    kept = torch.isin(labels, torch.tensor([2, 41, 3, 42]))
    assert float((image[kept] > 0).float().mean()) > 0.3
    fluid = labels == 24
    if (image[fluid] == 0).all():
        stripped = classes[fluid]
        assert (stripped == 0).all() or (stripped == EVERYTHING.index(24)).all()


def test_skull_stripping_takes_the_fluid_half_of_the_time_and_its_label_with_it():
    gone = []
    fluid = torch.from_numpy(tiny.head(ODD) == 24)
    for seed in range(24):
        image, classes = draw(
            seed,
            t1=1,
            **(STILL | {"skull_stripped": 1, "t1_like": STILL["t1_like"] | {24: (1.2, 0)}}),
        )
        gone.append(bool((classes[fluid] == 0).all()))
        assert gone[-1] == bool((image[fluid] == 0).all())
    assert 4 < sum(gone) < 20


def test_a_cut_field_of_view_has_neither_image_nor_labels_there():
    cuts = 0
    for seed in range(12):
        image, classes = draw(seed, classes=EVERYTHING, t1=1, **(STILL | {"cut": 1}))
        whole = torch.from_numpy(tiny.head(ODD) > 0)
        lost = whole & (classes == 0)
        assert float(image[lost].abs().sum()) == 0
        cuts += bool(lost.any())
    assert cuts > 3


def test_the_deformation_is_no_larger_than_asked():
    """Each coarse point moves by a normal number times at most the size given; labels stay near
    where they were.
    """
    _, still = draw(1, **STILL)
    _, moved = draw(1, **(STILL | {"deformation_mm": ((24.0, 2.0),)}))
    brain, other = still > 0, moved > 0
    dice = 2 * float((brain & other).sum()) / float(brain.sum() + other.sum())
    assert 0.7 < dice < 1


def test_lookup_knows_merging_mirrors_and_priors():
    config = SynthConfig(
        merge={25: 2, 57: 41},
        mirror={25: 57},
        outside=(511,),
        t1_like={2: (0.9, 0.1), 25: (0.5, 0)},
    )
    values = (0, 2, 25, 41, 57, 511)
    table = lookup(values, (0, 2, 41), {2: 41}, config)
    at = {value: n for n, value in enumerate(values)}
    assert table.target.tolist() == [0, 1, 1, 2, 2, 0]
    assert table.mirrored.tolist() == [0, 2, 2, 1, 1, 0]
    assert table.inside.tolist() == [False, True, True, True, True, False]
    assert table.group[at[2]] == table.group[at[41]]
    assert table.group[at[2]] != table.group[at[25]]
    assert table.prior[at[41]].tolist() == pytest.approx([0.9, 0.1])
    assert table.prior[at[511]][0] < 0


def test_load_heads_cuts_to_the_content_and_keeps_a_border():
    labels = np.zeros((12, 14, 16), np.uint16)
    labels[3:8, 4:9, 5:13] = 2
    heads = heads_of(labels)
    assert heads.values == (0, 2)
    assert heads.maps[0].shape == (7, 7, 10)
    assert int(heads.maps[0].sum()) == 5 * 5 * 8
    assert heads.centres[0].tolist() == pytest.approx([2, 2, 3.5])  # within the cut content
    assert heads.spacings_mm[0].tolist() == pytest.approx([2, 2, 2])


def test_load_heads_of_more_than_255_values_is_refused():
    with pytest.raises(BadConfig, match="255"):
        heads_of(np.arange(512, dtype=np.uint16).reshape(8, 8, 8))


@pytest.mark.parametrize("value", [0, 99])
def test_load_heads_of_a_map_without_any_structure_to_predict_is_refused(value: int):
    with pytest.raises(BadConfig, match="label map 2 of 2"):
        heads_of(tiny.head(), np.full((6, 6, 6), value, np.uint16))


def test_scale_to_percentiles_maps_two_percentiles_of_the_filled_voxels_to_0_and_1():
    image = torch.zeros(20, 20, 30)
    filled = torch.linspace(100, 300, 6000)
    image.view(-1)[6000:] = filled[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
    scaled = scale_to_percentiles(image.clone())
    low, high = np.percentile(filled.numpy(), (0.5, 99.5))
    expected = np.clip((image.numpy() - low) / (high - low), 0, 1)
    assert np.allclose(scaled.numpy(), expected, atol=1e-3)


def test_scale_to_percentiles_does_not_depend_on_units():
    image = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        scale_to_percentiles(image * 1500), scale_to_percentiles(image), rtol=0, atol=1e-5
    )


def test_percentiles_are_of_every_step_th_filled_voxel():
    random = np.random.default_rng(0)
    image = random.random((60, 61, 59), np.float32) * (random.random((60, 61, 59)) > 0.4)
    filled = image[image > 0]
    values = np.sort(filled[:: len(filled) // 50_000])
    expected = [float(values[round(p / 100 * (len(values) - 1))]) for p in (0.5, 99.5)]
    assert percentile_range(torch.from_numpy(image)) == tuple(expected)
    assert percentile_range(torch.from_numpy(image)[None]) == tuple(expected)


def test_scale_to_percentiles_of_an_empty_image_is_empty():
    assert float(scale_to_percentiles(torch.zeros(8, 8, 8)).abs().sum()) == 0


def banks() -> np.ndarray:
    """Two banks of cortex along the first axis: fluid of one voxel between them, of three voxels
    beside them.
    """
    labels = np.zeros(ODD, np.int32)
    labels[3:20, 3:20, 3:20] = 24
    labels[6:11, 3:20, 3:20] = labels[12:17, 3:20, 3:20] = 3
    return labels


@pytest.mark.parametrize("stripped", [False, True])
def test_fluid_at_a_border_is_partly_tissue_for_each_side_it_touches(
    stripped: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(synth, "scale_to_percentiles", lambda image: image)
    heads = load_heads([Volume(banks(), tiny.affine_of((2.0,) * 3))], CLASSES[1:], {24: (3, 42)})
    options = STILL | {"skull_stripped": float(stripped), "border_share": (0.3, 0.3)}
    without_fluid = 0
    for seed in range(8):
        image, classes = draw(seed, heads, shape=(17, 17, 17), t1=1, **options)
        plain, same = draw(seed, heads_of(banks()), shape=(17, 17, 17), t1=1, **options)
        assert torch.equal(classes, same)
        fluid, cortex = float(plain[0, 8, 8]), float(plain[5, 8, 8])
        one, both = ((1 - share) * fluid + share * cortex for share in (0.3, 0.6))
        expected = [fluid, fluid, one, *[cortex] * 5, both, *[cortex] * 5, one, fluid, fluid]
        assert image[:, 8, 8].tolist() == pytest.approx(expected, abs=1e-6)
        without_fluid += int(not (classes == CLASSES.index(24)).any())
    assert (0 < without_fluid < 8) == stripped


def test_only_voxels_that_touch_a_named_tissue_have_an_index_of_their_own():
    assert heads_of(banks()).values == (0, 3, 24)
    heads = load_heads([Volume(banks(), tiny.affine_of())], (3,), {24: (3, 42), 3: (2,)})
    assert heads.values == (0, 3, 24, 24, 24)
    assert heads.tissue.tolist() == [0, 1, 2, 1, 1]
    assert heads.sides.tolist() == [0, 0, 0, 1, 2]
    plain = heads_of(banks()).maps[0]
    assert np.array_equal(np.array(heads.values)[heads.maps[0]], np.array((0, 3, 24))[plain])
    assert int((heads.maps[0] == 3).sum()) == 2 * 17 * 17
    assert int((heads.maps[0] == 4).sum()) == 17 * 17


@pytest.mark.parametrize("seed", range(3))
def test_on_a_card_the_same_images_are_drawn(seed: int, monkeypatch: pytest.MonkeyPatch):
    """By operations of torch, of the same random numbers; rounding decides at a few borders."""
    image, labels = draw(seed, coarse=1, blurred=1, mixed=1, ghosts=1, skull_stripped=0.5)
    monkeypatch.setattr(synth, "_uses_kernels", lambda device: False)
    there, truth = draw(seed, coarse=1, blurred=1, mixed=1, ghosts=1, skull_stripped=0.5)
    assert float((truth == labels).float().mean()) > 0.999
    assert float((there - image).abs().mean()) < 1e-3
    assert truth.dtype == labels.dtype


def test_percentiles_are_found_on_a_card_as_on_a_cpu():
    random = torch.Generator().manual_seed(0)
    for count in (0, 9, 10, 300, 120_000):
        image = torch.randn(1, 60, 60, 60, generator=random)
        image.view(-1)[torch.randperm(image.numel(), generator=random)[count:]] = 0
        image.abs_()
        one, other = preprocess._sample_of_filled(image), preprocess._sample_in_torch(image)
        if count < 10:
            assert one is other is None
        else:
            assert np.array_equal(one, other)
