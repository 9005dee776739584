"""Random patches: against scipy, against what is known by construction, and the same whatever surrounds them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg import augment
from medseg.augment import draw_patches
from medseg.augment_config import NO_AUGMENTATION, AugmentConfig

ISO = (1.0, 1.0, 1.0)
EVERYTHING = AugmentConfig(
    mirror=(0, 1, 2),
    elastic_share=1,
    inversion_share=0.5,
    **{f"{name}_share": 1 for name in ("rotation", "scaling", "noise", "blur", "brightness", "contrast")},
    **{f"{name}_share": 1 for name in ("low_resolution", "inverted_gamma", "gamma")},
)


def only(**settings) -> AugmentConfig:
    return AugmentConfig(**{**NO_AUGMENTATION.model_dump(), **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_case(shape, channels=1, seed=0):
    """A smooth image and labels 0..3 cut from it."""
    rng = np.random.default_rng(seed)
    image = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(channels)]).astype(np.float32)
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
    return padded[tuple(slice(far + c - n // 2, far + c - n // 2 + n) for c, n in zip(centre, patch))]


@pytest.mark.parametrize("centre", [(15, 16, 12), (0, 31, 3), (40, 12, 12), (-9, 12, 12), (1, 1, 90)])
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

    got, _ = crop(image, labels, centre, patch, settings, spacing_mm, background=[torch.tensor([0.0])])

    draw = augment._draws(1, seeded())[0]
    matrix = augment._matrix(settings, draw).numpy()
    voxels = np.diag(1 / np.array(spacing_mm)) @ matrix @ np.diag(spacing_mm)
    middle = (np.array(patch) - 1) / 2
    start = np.array(centre) - np.array(patch) // 2
    expected = ndimage.affine_transform(
        image[0].numpy(), voxels, start + middle - voxels @ middle, patch, order=1, mode="nearest"
    )
    inside = ndimage.affine_transform(
        np.ones(image.shape[1:]), voxels, start + middle - voxels @ middle, patch, order=0, mode="constant"
    )
    assert inside.mean() > 0.6
    assert np.abs(got[0].numpy() - expected)[inside > 0].max() < 1e-5
    assert not np.allclose(matrix, np.eye(3), atol=0.02)


def test_a_ramp_says_where_each_voxel_came_from():
    """A rotation keeps distances in mm, also where voxels are not cubes, and the middle stays where it is."""
    shape, spacing_mm, patch = (60, 60, 40), (0.7, 0.7, 2.5), (21, 21, 7)

    places, _ = crop(
        ramp(shape, spacing_mm), torch.zeros(shape, dtype=torch.uint8), (30, 30, 20), patch, only(rotation_share=1),
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

    places, _ = crop(ramp(shape), torch.zeros(shape, dtype=torch.uint8), (30, 30, 30), (16, 16, 16), settings)

    for axis in range(3):
        assert torch.allclose(places[axis].diff(dim=axis), torch.tensor(1 / 1.25), atol=1e-4)


def test_a_quarter_turn_is_exact(monkeypatch):
    image, labels = smooth_case((31, 31, 31))
    plain, plain_classes = crop(image, labels, (15, 15, 15), (15, 15, 15))
    monkeypatch.setattr(augment, "_matrix", lambda settings, draw: augment._rotation(2, math.pi / 2))

    got, classes = crop(image, labels, (15, 15, 15), (15, 15, 15))

    # What lies at (x, y) from the middle of the patch is at (-y, x) in the case.
    assert torch.allclose(got[0], plain[0].rot90(-1, (0, 1)), atol=1e-5)
    assert torch.equal(classes, plain_classes.rot90(-1, (0, 1)))
