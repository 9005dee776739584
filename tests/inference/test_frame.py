"""How a foreign model's array lies in a scan: turned, its axes in another order, cropped, and the
way back."""

from __future__ import annotations

from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medseg.errors import BadFile
from medseg.inference.frame import content_mask, lay_frame, orientation_for, prepare_frame
from medseg.models import ChannelScale, Recipe, Resampling
from medseg.volume import ORIENTATIONS, Volume, reorient


def recipe(**changes: object) -> Recipe:
    return Recipe(
        **{
            "axes": (2, 1, 0),
            "spacing_mm": (1.0, 1.0, 1.0),
            "crop": "nonzero",
            "channels": (ChannelScale(scheme="none"),),
            "image": Resampling(),
        }
        | changes
    )


def scan(
    shape: tuple[int, int, int] = (7, 9, 11), spacing: tuple[float, float, float] = (1, 1, 1)
) -> Volume:
    data = np.random.default_rng(0).integers(1, 100, shape).astype(np.int16)
    return Volume(data, np.diag([*spacing, 1.0]))


@pytest.mark.parametrize("axes", list(permutations(range(3))))
@pytest.mark.parametrize("turned", ["stored", "RAS", "LPS"])
def test_what_is_painted_comes_back_to_its_voxel(axes, turned):
    for stored in ORIENTATIONS[::7]:
        volume = reorient(scan(), stored)
        volume.data[:2] = 0  # so that there is something to crop
        frame = lay_frame([volume], recipe(axes=axes), turned)
        seen = frame.seen(volume)
        back = frame.back(np.ascontiguousarray(seen))
        np.testing.assert_array_equal(back, volume.data)


def test_a_frame_turned_to_ras_is_the_same_however_the_scan_is_stored():
    first = prepare_frame([scan()], recipe(), lay_frame([scan()], recipe(), "RAS"), exact=True)
    for stored in ORIENTATIONS[::5]:
        volume = reorient(scan(), stored)
        found = prepare_frame([volume], recipe(), lay_frame([volume], recipe(), "RAS"), exact=True)
        np.testing.assert_array_equal(found, first)


def test_a_very_oblique_scan_is_turned_as_nibabel_turns_it():
    random, others = np.random.default_rng(0), 0
    for _ in range(60):
        volume = scan()
        affine = volume.affine.copy()
        affine[:3, :3] = np.linalg.qr(random.normal(size=(3, 3)))[0] @ np.diag([0.9, 1.0, 2.6])
        volume = Volume(volume.data, affine)
        one = recipe(axes=(0, 1, 2), crop="none")
        frame = lay_frame([volume], one, "RAS")
        want = nib.as_closest_canonical(nib.Nifti1Image(volume.data, affine))
        np.testing.assert_array_equal(frame.seen(volume), np.asarray(want.dataobj))
        np.testing.assert_array_equal(frame.back(frame.seen(volume)), volume.data)
        others += reorient(volume, "RAS").affine.tolist() != want.affine.tolist()
    assert others


def test_sizes_are_rounded_halves_to_even():
    for size, spacing, want in ((5, 0.5, 2), (7, 0.5, 4), (9, 1.5, 14)):
        volume = scan((size, 8, 8), (spacing, 1, 1))
        frame = lay_frame([volume], recipe(axes=(0, 1, 2)), "stored")
        assert frame.shape == (want, 8, 8)


def test_spacing_is_the_headers_and_not_the_columns():
    columns = np.diag([3.0000002, 1.0, 1.0, 1.0])
    data = scan().data
    for header, wanted in ((None, 3.0000002), ((2.9999999, 1.0, 1.0), 2.9999999)):
        volume = Volume(data, columns, header_spacing_mm=header)
        assert lay_frame([volume], recipe(axes=(0, 1, 2)), "stored").spacing_mm[0] == pytest.approx(
            wanted, abs=1e-9
        )
    turned = reorient(Volume(data, columns, header_spacing_mm=(2.5, 1.0, 0.5)), "SAR")
    assert turned.stated_spacing_mm == (0.5, 1.0, 2.5)


def test_the_crop_is_what_is_not_0_in_any_channel():
    one, two = scan().data * 0, scan().data * 0
    one[2, 3, 4], two[5, 3, 6] = 7, -1
    volumes = [Volume(one, np.eye(4)), Volume(two, np.eye(4))]
    channels = (ChannelScale(scheme="none"),) * 2
    frame = lay_frame(volumes, recipe(axes=(0, 1, 2), channels=channels), "stored")
    assert [(side.start, side.stop) for side in frame.box] == [(2, 6), (3, 4), (4, 7)]
    whole = lay_frame([scan()], recipe(crop="none"), "stored")
    assert whole.cropped == (11, 9, 7)


def test_holes_of_the_mask_are_filled_over_faces():
    random = np.random.default_rng(3)
    for _ in range(5):
        channels = [
            random.integers(0, 2, (9, 8, 7)) * random.integers(0, 2, (9, 8, 7)) for _ in range(2)
        ]
        channels[0][2:7, 2:7, 2:6] = 1
        channels[0][4, 4, 4] = channels[1][4, 4, 4] = 0
        want = ndimage.binary_fill_holes((channels[0] != 0) | (channels[1] != 0))
        np.testing.assert_array_equal(content_mask(channels), want)


def test_intensities_are_scaled_before_they_are_resampled():
    volume = scan((8, 8, 8))
    values = volume.data.astype(np.float32)
    scales = {
        ChannelScale(scheme="fixed", low=20, high=60, mean=40, sd=8): (
            (np.clip(values, 20, 60) - 40) / 8
        ),
        ChannelScale(scheme="zscore"): (values - values.mean()) / values.std(),
        ChannelScale(scheme="range"): (values - values.min()) / (values.max() - values.min()),
        ChannelScale(scheme="bytes"): values / 255,
        ChannelScale(scheme="none"): values,
    }
    for channel, want in scales.items():
        one = recipe(axes=(0, 1, 2), channels=(channel,))
        found = prepare_frame([volume], one, lay_frame([volume], one, "stored"), exact=True)
        np.testing.assert_allclose(found[0], want, rtol=1e-5, atol=1e-5)
    assert volume.data.dtype == np.int16


def test_masked_scores_leave_what_is_outside_as_it_is():
    volume = scan((10, 10, 10))
    volume.data[:, :, :4] = 0
    volume.data[0, 0, 0] = 50
    one = recipe(axes=(0, 1, 2), channels=(ChannelScale(scheme="zscore", masked=True),))
    found = prepare_frame([volume], one, lay_frame([volume], one, "stored"), exact=True)[0]
    inside = volume.data != 0
    assert not found[~inside].any()
    assert abs(float(found[inside].mean())) < 1e-5
    assert float(found[inside].std()) == pytest.approx(1, abs=1e-4)


def test_what_a_first_stage_found_outside_of_the_content_is_scaled_with_it():
    volume = scan((10, 10, 10))
    volume.data[:, :, :4] = 0
    volume.data[0, 0, 0] = 50
    labels = np.zeros(volume.shape, np.uint8)
    labels[4:6, 3:7, 2:8] = 1
    one = recipe(axes=(0, 1, 2), channels=(ChannelScale(scheme="zscore", masked=True),))
    image = prepare_frame(
        [volume],
        one,
        lay_frame([volume], one, "stored"),
        exact=True,
        previous=volume.with_data(labels),
    )[0]
    inside = (volume.data != 0) | (labels > 0)
    values = volume.data[inside].astype(np.float32)
    np.testing.assert_allclose(image[inside], (values - values.mean()) / values.std(), rtol=1e-4)
    assert not image[~inside].any()
    assert (image[(volume.data == 0) & (labels > 0)] < 0).all()


def test_a_scan_that_is_not_finite_is_refused():
    volume = Volume(scan().data.astype(np.float32), np.eye(4))
    volume.data[3, 3, 3] = np.nan
    with pytest.raises(BadFile, match="finite"):
        prepare_frame([volume], recipe(), lay_frame([volume], recipe(), "stored"), exact=True)


def test_dicom_is_turned_and_files_are_not_unless_the_model_or_the_user_says_so():
    assert orientation_for(recipe(), dicom=True) == "LPS"
    assert orientation_for(recipe(), dicom=False) == "stored"
    assert orientation_for(recipe(orientation="RAS"), dicom=True) == "RAS"
    assert orientation_for(recipe(orientation="RAS"), "LAS", dicom=False) == "LAS"


def test_logits_of_thick_slices_are_brought_back_plane_by_plane():
    volume = scan((20, 20, 6), (1, 1, 6))
    frame = lay_frame([volume], recipe(spacing_mm=(4.0, 1.5, 1.5)), "stored")
    painted = frame.painted()
    # Painted on the model's planes, then the nearest is taken.
    assert painted.shape == (
        frame.shape[0],
        20,
        20,
    )
    assert painted.places[1] is None
    labels = np.arange(frame.shape[0], dtype=np.uint8)[:, None, None] * np.ones(
        (1, 20, 20), np.uint8
    )
    back = frame.back(labels)
    at = (np.arange(6) + 0.5) * frame.shape[0] / 6 - 0.5
    np.testing.assert_array_equal(back[0, 0], np.floor(at + 0.5).clip(0))
