"""Random patches: against scipy, against what is known by construction, and the same whatever
surrounds them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage

from medseg.config import NO_AUGMENTATION, AugmentConfig
from medseg.training import augment
from medseg.training.augment import augment_intensity, draw_patches

ISO = (1.0, 1.0, 1.0)
EVERYTHING = AugmentConfig(
    mirror=(0, 1, 2),
    elastic_share=1,
    inversion_share=0.5,
    **{
        f"{name}_share": 1
        for name in ("rotation", "scaling", "noise", "blur", "brightness", "contrast")
    },
    **{f"{name}_share": 1 for name in ("low_resolution", "inverted_gamma", "gamma")},
)


def only(**settings) -> AugmentConfig:
    return AugmentConfig(**{**NO_AUGMENTATION.model_dump(), **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_case(shape, channels=1, seed=0):
    """A smooth image and labels 0..3 cut from it."""
    rng = np.random.default_rng(seed)
    image = np.stack(
        [ndimage.gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(channels)]
    ).astype(np.float32)
    labels = np.digitize(image[0], np.quantile(image[0], (0.5, 0.7, 0.9))).astype(np.uint8)
    return torch.from_numpy(image), torch.from_numpy(labels)


def ramp(shape, spacing_mm=ISO):
    """Three channels that say where each voxel is, in mm."""
    axes = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing_mm)), indexing="ij")
    return torch.from_numpy(np.stack(axes).astype(np.float32))


def crop(image, labels, centre, patch, settings=NO_AUGMENTATION, spacing_mm=ISO, seed=0, **more):
    images, classes = draw_patches(
        [image], [labels], torch.tensor([centre]), patch, spacing_mm, settings, seeded(seed), **more
    )
    return images[0], classes[0]


def padded_crop(array, centre, patch, fill):
    """The same with numpy: pad far, then cut."""
    far = 120
    padded = np.pad(array, far, constant_values=fill)
    return padded[
        tuple(slice(far + c - n // 2, far + c - n // 2 + n) for c, n in zip(centre, patch))
    ]


@pytest.mark.parametrize(
    "centre", [(15, 16, 12), (0, 31, 3), (40, 12, 12), (-9, 12, 12), (1, 1, 90)]
)
def test_without_augmentation_a_patch_is_the_crop(centre):
    image, labels = smooth_case((30, 32, 25), channels=2)

    got, classes = crop(image, labels, centre, (12, 9, 16))

    for channel in range(2):
        whole = image[channel].numpy()
        assert np.array_equal(got[channel], padded_crop(whole, centre, (12, 9, 16), whole.min()))
    assert np.array_equal(classes, padded_crop(labels.numpy(), centre, (12, 9, 16), 0))
    assert got.dtype == torch.float32 and classes.dtype == torch.uint8


def test_the_background_can_be_given():
    image, labels = smooth_case((10, 10, 10), channels=2)
    fill = [torch.tensor([-7.0, 3.0])]

    for settings in (NO_AUGMENTATION, only(rotation_share=1)):
        got, classes = crop(image, labels, (0, 5, 5), (20, 4, 4), settings, background=fill)
        assert (got[0, 0] == -7).all() and (got[1, 0] == 3).all() and not classes[0].any()


def test_a_patch_is_interpolated_as_scipy_does():
    image, labels = smooth_case((40, 44, 36))
    patch, spacing_mm, centre = (20, 24, 18), (1.0, 0.8, 2.0), (21, 20, 17)
    settings = only(rotation_share=1, scaling_share=1, anisotropic_share=1)

    got, _ = crop(
        image, labels, centre, patch, settings, spacing_mm, background=[torch.tensor([0.0])]
    )

    draw = augment._draws(1, seeded())[0]
    matrix = augment._matrix(settings, draw).numpy()
    voxels = np.diag(1 / np.array(spacing_mm)) @ matrix @ np.diag(spacing_mm)
    middle = (np.array(patch) - 1) / 2
    start = np.array(centre) - np.array(patch) // 2
    expected = ndimage.affine_transform(
        image[0].numpy(), voxels, start + middle - voxels @ middle, patch, order=1, mode="nearest"
    )
    inside = ndimage.affine_transform(
        np.ones(image.shape[1:]),
        voxels,
        start + middle - voxels @ middle,
        patch,
        order=0,
        mode="constant",
    )
    assert inside.mean() > 0.6
    assert np.abs(got[0].numpy() - expected)[inside > 0].max() < 1e-5
    assert not np.allclose(matrix, np.eye(3), atol=0.02)


def test_a_ramp_says_where_each_voxel_came_from():
    """A rotation keeps distances in mm, also where voxels are not cubes, and the middle stays where
    it is.
    """
    shape, spacing_mm, patch = (60, 60, 40), (0.7, 0.7, 2.5), (21, 21, 7)

    places, _ = crop(
        ramp(shape, spacing_mm), torch.zeros(shape, dtype=torch.uint8), (30, 30, 20), patch,
        only(rotation_share=1),
        spacing_mm, seed=3,
    )  # fmt: skip

    places = places.double()
    assert torch.allclose(places[:, 10, 10, 3], torch.tensor([21.0, 21, 50]).double(), atol=1e-4)
    steps = [places.diff(dim=axis + 1).reshape(3, -1) for axis in range(3)]
    for step, mm in zip(steps, spacing_mm):
        assert torch.allclose(step.norm(dim=0), torch.tensor(mm).double(), atol=1e-4)
        assert torch.allclose(step, step[:, :1], atol=1e-4)  # a ramp stays a ramp
    unit = torch.stack([step[:, 0] / mm for step, mm in zip(steps, spacing_mm)], 1)
    assert torch.allclose(unit.T @ unit, torch.eye(3).double(), atol=1e-3)
    assert abs(float(torch.det(unit)) - 1) < 1e-3  # turned, not mirrored


def test_scaling_above_one_makes_anatomy_larger():
    shape, settings = (60, 60, 60), only(scaling_share=1, scaling=(1.25, 1.25))

    places, _ = crop(
        ramp(shape), torch.zeros(shape, dtype=torch.uint8), (30, 30, 30), (16, 16, 16), settings
    )

    for axis in range(3):
        assert torch.allclose(places[axis].diff(dim=axis), torch.tensor(1 / 1.25), atol=1e-4)


def test_a_quarter_turn_is_exact(monkeypatch):
    image, labels = smooth_case((31, 31, 31))
    plain, plain_classes = crop(image, labels, (15, 15, 15), (15, 15, 15))
    monkeypatch.setattr(
        augment, "_matrix", lambda settings, draw: augment._rotation(2, math.pi / 2)
    )

    got, classes = crop(image, labels, (15, 15, 15), (15, 15, 15))

    # What lies at (x, y) from the middle of the patch is at (-y, x) in the case.
    assert torch.allclose(got[0], plain[0].rot90(-1, (0, 1)), atol=1e-5)
    assert torch.equal(classes, plain_classes.rot90(-1, (0, 1)))


def test_mirroring_turns_the_patch_over_and_swaps_sides():
    image, labels = smooth_case((20, 21, 22))
    labels[0, 0, 0] = 9  # not in the table of sides
    swap = torch.tensor([0, 2, 1, 3])
    plain, plain_classes = crop(image, labels, (10, 10, 10), (20, 20, 20))
    seen = set()
    for seed in range(40):
        got, classes = crop(
            image,
            labels,
            (10, 10, 10),
            (20, 20, 20),
            only(mirror=(0, 2)),
            seed=seed,
            lateral_swap=swap,
        )
        for axes in ((), (0,), (2,), (0, 2)):
            if torch.equal(got, plain.flip([axis + 1 for axis in axes])):
                seen.add(axes)
                swapped = (
                    torch.cat((swap, torch.arange(4, 10)))[plain_classes.long()]
                    if 0 in axes
                    else plain_classes
                )
                assert torch.equal(classes.long(), swapped.flip(axes).long())
                break
        else:
            raise AssertionError("neither the patch nor a mirror image of it")
    assert len(seen) == 4


def test_axes_that_are_not_named_are_not_mirrored():
    assert AugmentConfig().mirror == ()
    places = ramp((20, 20, 20))
    for seed in range(20):
        got, _ = crop(
            places, places[0].byte(), (10, 10, 10), (8, 8, 8), AugmentConfig(mirror=(1,)), seed=seed
        )
        assert (
            got[0, -1].mean() > got[0, 0].mean() and got[2, ..., -1].mean() > got[2, ..., 0].mean()
        )


@pytest.mark.parametrize("name", ["_sample_on_cpu", "_sample"])
def test_image_and_labels_move_together(name, monkeypatch):
    """The centres of a blob in the image and of its label agree, in mm, under every transform at
    once.
    """
    monkeypatch.setattr(augment, "_sample_on_cpu", getattr(augment, name))
    shape, spacing_mm, patch = (60, 60, 30), (1.0, 1.0, 2.0), (44, 44, 22)
    far = np.stack(
        np.meshgrid(*(np.arange(n) * mm for n, mm in zip(shape, spacing_mm)), indexing="ij")
    )
    distance = np.linalg.norm(far - np.array([33.0, 26.0, 32.0]).reshape(3, 1, 1, 1), axis=0)
    image = torch.from_numpy(np.clip(9 - distance, 0, 2)[None].astype(np.float32))
    labels = torch.from_numpy((distance < 8).astype(np.int16))
    settings = only(
        rotation_share=1, scaling_share=1, elastic_share=1, mirror=(0, 1, 2), scaling=(0.8, 1.2)
    )
    moved = 0
    for seed in range(6):
        got, classes = crop(image, labels, (30, 30, 15), patch, settings, spacing_mm, seed=seed)

        grey = np.array(ndimage.center_of_mass(got[0].numpy())) * spacing_mm
        blob = np.array(ndimage.center_of_mass(classes.numpy())) * spacing_mm
        assert np.linalg.norm(grey - blob) < 0.35  # half a voxel is 0.5 or 1
        moved += np.linalg.norm(blob - np.array([25.0, 18.0, 22.0])) > 1
        # Half of the image's height is where the label ends.
        assert (
            (got[0] > 1) != (classes > 0)
        ).float().sum() < 0.12 * classes.sum()  # a shift by 1 mm makes 0.19
    assert moved >= 4


def test_both_ways_to_look_a_patch_up_agree():
    image, labels = smooth_case((30, 26, 34), channels=2)
    patch = (20, 22, 24)
    rows = augment._rows(
        augment._rotation(0, 0.4) @ augment._rotation(2, 0.3), torch.tensor([8, 6, 14]), patch, ISO
    )
    shift = augment._bend(
        patch, ISO, only(elastic_share=1), augment._draws(1, seeded())[0], torch.device("cpu")
    )
    outside = torch.tensor([-3.0, -4.0])
    results = []
    for sample in (augment._sample_on_cpu, augment._sample):
        out, classes = torch.empty(2, *patch), torch.empty(patch, dtype=torch.uint8)
        sample(image, labels, rows, shift, outside, out, classes)
        results.append((out, classes))
    (one, one_classes), (other, other_classes) = results
    apart = ((one - other).abs() > 1e-4).any(0)
    assert apart.float().mean() < 1e-3  # rounding at the border of the case
    assert (one_classes != other_classes).float().mean() < 2e-3  # and of ties
    assert (one[0] == -3).any() and (one[0] != -3).float().mean() > 0.3


def test_a_label_is_the_class_of_most_weight():
    """Not the nearest voxel's: between three voxels of one class and the nearest of another the
    three win.
    """
    labels = torch.zeros((2, 2, 1), dtype=torch.uint8)
    labels[0, 0, 0] = 1
    rows = torch.tensor([[1.0, 0, 0, 0.4], [0, 1, 0, 0.4], [0, 0, 1, 0]], dtype=torch.float64)
    for sample in (augment._sample_on_cpu, augment._sample):
        out, classes = torch.empty(1, 1, 1, 1), torch.empty((1, 1, 1), dtype=torch.uint8)
        sample(
            torch.zeros(1, 2, 2, 1),
            labels,
            rows,
            torch.empty(3, 0, 0, 0),
            torch.zeros(1),
            out,
            classes,
        )
        assert classes.item() == 0


def test_elastic_displacements_have_the_size_asked_for():
    spacing_mm = (0.5, 1.0, 2.0)
    settings = only(elastic_share=1, elastic_mm=(2.0, 2.0), elastic_spacing_mm=4.0)

    field = augment._bend(
        (64, 64, 32), spacing_mm, settings, augment._draws(1, seeded())[0], torch.device("cpu")
    )

    in_mm = field * torch.tensor(spacing_mm).view(3, 1, 1, 1)
    # Trilinear interpolation between independent points keeps (2/3)³ of the variance.
    assert torch.allclose(in_mm.flatten(1).std(1), torch.tensor(2 * (2 / 3) ** 1.5), rtol=0.1)


def changed(image, seed=0, **settings):
    return augment_intensity(image.clone()[None], only(**settings), seeded(seed))[0]


def test_noise_has_the_variance_asked_for_relative_to_the_image():
    for scale in (1.0, 200.0):
        image = smooth_case((40, 40, 40))[0] * scale
        noise = changed(image, noise_share=1, noise_variance=(0.09, 0.09)) - image
        assert float(noise.std()) == pytest.approx(float(0.3 * image.std()), rel=0.02)
        assert abs(float(noise.mean())) < 0.01 * image.std()


def first_changed(image, **settings):
    """With the first seed that does anything: blur and resolution are drawn for half of the
    channels.
    """
    return next(
        got for seed in range(20) if not torch.equal(got := changed(image, seed, **settings), image)
    )


def test_blur_is_scipy_s_gaussian():
    image = smooth_case((24, 30, 26))[0] + torch.randn(1, 24, 30, 26, generator=seeded())
    blurred = first_changed(image, blur_share=1, blur_voxels=(1.0, 1.0))
    expected = ndimage.gaussian_filter(image[0].numpy(), 1.0, truncate=6)
    inner = (slice(6, -6),) * 3
    assert np.abs(blurred[0].numpy() - expected)[inner].max() < 1e-4


def test_brightness_and_contrast_do_what_their_factors_say():
    image = smooth_case((20, 20, 20))[0] + 1
    assert torch.allclose(changed(image, brightness_share=1, brightness=(1.2, 1.2)), image * 1.2)

    flatter = changed(image, contrast_share=1, contrast=(0.8, 0.8))
    assert float(flatter.mean()) == pytest.approx(float(image.mean()), abs=1e-5)
    assert float(flatter.std()) == pytest.approx(float(0.8 * image.std()), rel=1e-4)
    steeper = changed(image, contrast_share=1, contrast=(1.2, 1.2))
    assert steeper.std() > 1.1 * image.std()
    assert steeper.min() >= image.min() and steeper.max() <= image.max()


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma"])
@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_gamma_keeps_mean_sd_and_order(name, factor):
    image = smooth_case((20, 20, 20))[0]
    got = changed(image, **{f"{name}_share": 1}, gamma=(factor, factor))
    assert float(got.mean()) == pytest.approx(float(image.mean()), abs=1e-5)
    assert float(got.std()) == pytest.approx(float(image.std()), rel=1e-4)
    order = image.flatten().argsort()
    assert (got.flatten()[order].diff() >= -1e-6).all()
    # Above 1 dark regions get flatter, or bright ones where the image is inverted.
    thirds = got.flatten()[order][torch.tensor([0, len(order) // 2, -1])].diff()
    plain = image.flatten()[order][torch.tensor([0, len(order) // 2, -1])].diff()
    assert ((thirds[0] / thirds[1]) < (plain[0] / plain[1])) == ((factor > 1) == (name == "gamma"))


def test_low_resolution_keeps_means_and_takes_detail():
    image = torch.randn(1, 24, 24, 24, generator=seeded())
    got = first_changed(image, low_resolution_share=1, low_resolution=(0.5, 0.5))
    assert got.diff(dim=1).abs().mean() < 0.5 * image.diff(dim=1).abs().mean()
    smooth = ramp((24, 24, 24))[:1]
    coarse = first_changed(smooth, low_resolution_share=1, low_resolution=(0.5, 0.5))
    assert (coarse - smooth).abs().max() <= 1.0 + 1e-5  # within half a coarse voxel
    assert torch.allclose(augment._coarsening(17, 1.0), torch.eye(17))
    for size in (1, 2, 5, 40):
        for zoom in (0.1, 0.5, 0.8):
            assert torch.allclose(augment._coarsening(size, zoom).sum(1), torch.ones(size))
            assert torch.allclose(augment._blurring(size, zoom).sum(1), torch.ones(size))


def test_inversion_makes_bright_dark():
    image = smooth_case((12, 12, 12))[0]
    got = changed(image, inversion_share=1)
    assert torch.allclose(got.min(), image.min()) and torch.allclose(got.max(), image.max())
    assert torch.allclose(got + image, (image.min() + image.max()).expand_as(image), atol=1e-6)


def test_the_same_state_gives_the_same_bits_on_any_number_of_threads():
    cases = [smooth_case((48, 60, 44), channels=2, seed=seed) for seed in range(2)]
    images, labels = ([case[n] for case in cases] for n in range(2))
    centres = torch.tensor([[24, 30, 22], [20, 28, 25]])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            generator = seeded(11)
            got = draw_patches(images, labels, centres, (40, 56, 40), ISO, EVERYTHING, generator)
            results.append((*got, generator.get_state()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    again = draw_patches(images, labels, centres, (40, 56, 40), ISO, EVERYTHING, seeded(12))
    assert not torch.equal(again[0], results[0][0])


def test_a_sample_does_not_depend_on_its_neighbours():
    cases = [smooth_case((20, 20, 20), seed=seed) for seed in range(4)]
    centres = torch.tensor([[10, 10, 10]] * 3)
    batches = [
        draw_patches(*zip(*chosen), centres, (12, 12, 12), ISO, EVERYTHING, seeded())
        for chosen in ([cases[0], cases[1], cases[2]], [cases[3], cases[1], cases[0]])
    ]
    (one, one_classes), (other, other_classes) = batches
    assert torch.equal(one[1], other[1]) and torch.equal(one_classes[1], other_classes[1])
    assert not torch.equal(one[0], other[0])
    two = draw_patches(
        [cases[1][0]] * 2, [cases[1][1]] * 2, centres[:2], (12, 12, 12), ISO, EVERYTHING, seeded()
    )[0]
    assert not torch.equal(two[0], two[1])  # each has numbers of its own


def test_constant_images_and_single_planes_stay_finite():
    for image in (
        torch.zeros(1, 9, 9, 9),
        torch.full((2, 12, 12, 1), 3e4),
        torch.full((1, 1, 1, 1), -1e-30),
    ):
        labels = torch.ones(image.shape[1:], dtype=torch.uint8)
        patch = tuple(min(n, 8) for n in labels.shape)
        for seed in range(12):
            got, _ = crop(
                image, labels, tuple(n // 2 for n in labels.shape), patch, EVERYTHING, seed=seed
            )
            assert torch.isfinite(got).all()
            far, classes = crop(image, labels, (500, 500, 500), (4, 4, 4), EVERYTHING, seed=seed)
            assert torch.isfinite(far).all() and not classes.any()


def test_cases_are_not_changed_and_nothing_is_differentiated():
    image, labels = smooth_case((16, 16, 16))
    image.requires_grad_()
    before, before_labels = image.detach().clone(), labels.clone()

    got, _ = crop(image, labels, (8, 8, 8), (16, 16, 16), EVERYTHING)

    assert not got.requires_grad and not torch.equal(got, before)
    assert torch.equal(image.detach(), before) and torch.equal(labels, before_labels)


def test_shares_are_probabilities():
    image, labels = smooth_case((6, 6, 6))
    count = 400
    for name in ("rotation", "noise", "gamma"):
        settings = only(**{f"{name}_share": 0.25})
        got, _ = draw_patches(
            [image] * count,
            [labels] * count,
            torch.full((count, 3), 3),
            (6, 6, 6),
            ISO,
            settings,
            seeded(),
        )
        share = float((got != image).flatten(1).any(1).float().mean())
        assert 0.25 - 0.07 < share < 0.25 + 0.07  # three standard deviations


def test_settings_are_checked():
    with pytest.raises(ValidationError, match="rotation_shar"):
        AugmentConfig(rotation_shar=1)
    with pytest.raises(ValidationError, match="not below the second"):
        AugmentConfig(gamma=(1.5, 0.7))
    with pytest.raises(ValidationError):
        AugmentConfig(mirror=(3,))
    with pytest.raises(ValidationError):
        AugmentConfig(noise_share=1.5)


@pytest.mark.parametrize("centre", [(15, 16, 12), (0, 31, 3), (40, 12, 12), (-30, 12, 12)])
def test_a_card_is_sent_what_a_patch_shows_and_its_voxels_are_the_cpu_s(centre, monkeypatch):
    """Turned, scaled and bent patches within, across and beyond the border of a case."""
    image, labels = smooth_case((30, 32, 25), channels=2)
    patch, sent = (12, 9, 16), []

    def send(part):
        sent.append(part.numel())
        return part.clone()

    for seed in range(6):
        expected, classes = crop(image, labels, centre, patch, EVERYTHING_MOVES, seed=seed)
        with monkeypatch.context() as on_card:
            on_card.setattr(augment, "_uses_kernels", lambda device: False)
            got, truth = crop(image, labels, centre, patch, EVERYTHING_MOVES, seed=seed, send=send)
        assert torch.allclose(got, expected, atol=1e-4)
        assert float((truth == classes).float().mean()) > 0.995
    if centre == (15, 16, 12):
        assert min(sent) < labels.numel() / 3


EVERYTHING_MOVES = only(
    rotation_share=1, scaling_share=1, elastic_share=1, scaling=(0.8, 1.2), elastic_mm=(0, 2)
)
