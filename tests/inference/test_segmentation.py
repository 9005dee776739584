"""From a scan to labels on its own grid, with networks whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from making import networks as tiny
from making.strategies import affines, rotation
from medseg.errors import BadConfig, BadFile, BadModel, DataWarning, NotEnoughMemory
from medseg.inference.backends.pytorch import _Torch
from medseg.inference.forecast import plan
from medseg.inference.preprocess import model_grid, normalise, to_model_grid
from medseg.inference.segmentation import check_image, region_of, segment
from medseg.inference.settings import Settings, mirror_axes
from medseg.models.folder import Checkpoint, load_checkpoint
from medseg.postprocess.volumes import structure_volumes
from medseg.volume import ORIENTATIONS, Volume, reorient

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")

EXACT = Settings(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_known(tmp_path_factory.mktemp("models") / "known")))


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_two_channels(tmp_path_factory.mktemp("models") / "two")))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_unet(tmp_path_factory.mktemp("models") / "unet")))


def scan_of(affine: np.ndarray | None = None, **arguments) -> Volume:
    return Volume(tiny.phantom(**arguments), tiny.affine_of() if affine is None else affine)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_scan_on_the_models_spacing_gets_the_class_of_each_voxel(known: Checkpoint):
    """On the model's own spacing nothing is interpolated, so the answer is that of the network,
    voxel by voxel.
    """
    scan = scan_of()
    labels = segment(scan, known, EXACT).labels.data
    scaled = np.clip(
        (scan.data - np.percentile(scan.data, 0.5)) / np.ptp(np.percentile(scan.data, (0.5, 99.5))),
        0,
        1,
    )
    expected = np.array(tiny.CLASSES)[np.abs(scaled[..., None] - (0, 0.5, 1)).argmin(-1)]
    assert (labels == expected).mean() > 0.999
    assert set(np.unique(labels)) == set(tiny.CLASSES)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_the_result_lies_on_the_scans_own_grid(known: Checkpoint, dtype: str):
    affine = tiny.affine_of((1.5, 2.0, 3.1), (-20.5, 3.25, 7.0))
    affine[:3, :3] = rotation((1, 0.05, -0.1, 0.02)) @ affine[:3, :3]
    image = np.clip(tiny.phantom() / 5, 0, 250).astype(dtype)
    scan = Volume(image, affine)
    result = segment(scan, known, EXACT)
    assert result.labels.shape == scan.shape
    assert np.array_equal(result.labels.affine, scan.affine)
    assert result.labels.data.dtype == np.uint8
    assert result.table == tiny.TABLE
    assert result.seconds.keys() >= {"resample", "load", "network", "paint"}


def test_the_scan_is_not_changed(known: Checkpoint):
    scan = scan_of()
    before = scan.data.copy()
    segment(scan, known, EXACT)
    assert np.array_equal(scan.data, before)


@pytest.mark.parametrize("network", ["known", "unet"])
def test_all_48_ways_of_storing_a_scan_give_the_same_labels(
    network: str, request: pytest.FixtureRequest
):
    model = request.getfixturevalue(network)
    affine = tiny.affine_of((2.0, 1.7, 2.6), (-18.0, 5.5, 40.0))
    affine[:3, :3] = rotation((1, 0.04, 0.08, -0.06)) @ affine[:3, :3]
    scan = scan_of(affine)
    expected = segment(scan, model, EXACT).labels
    assert len(np.unique(expected.data)) == 3
    for letters in ORIENTATIONS:
        turned = reorient(scan, letters)
        stored = Volume(np.ascontiguousarray(turned.data), turned.affine)
        back = reorient(segment(stored, model, EXACT).labels, scan.orientation)
        assert np.allclose(back.affine, scan.affine, atol=1e-9)
        assert (back.data == expected.data).mean() >= 0.999, letters


@given(affine=affines(), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_a_body_is_found_where_it_lies_however_the_scan_cuts_it(
    known: Checkpoint, affine: np.ndarray, seed: int
):
    """A bright ellipsoid in world space, sampled on any grid of fine spacing, is labelled where it
    is.
    """
    grid = np.array(affine)
    grid[:3, :3] /= np.linalg.norm(affine[:3, :3], axis=0)
    grid[:3, :3] *= np.random.default_rng(seed).uniform(1.5, 3.0, 3)
    shape = (26, 24, 25)
    centre = np.array([5.0, -3.0, 11.0])
    grid[:3, 3] = centre - grid[:3, :3] @ ((np.array(shape) - 1) / 2)
    at = nib.affines.apply_affine(grid, np.moveaxis(np.indices(shape), 0, -1))
    truth = (((at - centre - (2, 0, -1)) / (14, 11, 9)) ** 2).sum(-1) <= 1
    image = 1000.0 * truth + np.random.default_rng(seed).normal(10, 3, shape)
    labels = segment(Volume(image.astype(np.float32), grid), known, EXACT).labels.data
    assert dice(labels > 0, truth) > 0.85
    assert dice(labels == 41, truth) > 0.7


def test_anisotropic_and_fine_scans_agree_with_the_truth(known: Checkpoint):
    for spacing in ((0.7, 0.7, 3.5), (1.0, 1.0, 1.0), (4.0, 1.2, 1.2)):
        shape = tuple(int(50 / s) for s in spacing)
        image = tiny.phantom(shape)
        labels = segment(Volume(image, tiny.affine_of(spacing)), known, EXACT).labels.data
        assert dice(labels > 0, image > 250) > 0.9, spacing
        assert dice(labels == 41, image > 750) > 0.8, spacing


def test_the_same_scan_gives_the_same_labels_again(unet: Checkpoint):
    one, two = (segment(scan_of(), unet, Settings(device="cpu")).labels.data for _ in range(2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 30, 1), (2, 2, 2), (40, 1, 3), (1, 20, 20)])
def test_scans_of_a_few_voxels_are_segmented(known: Checkpoint, unet: Checkpoint, shape: tuple):
    image = np.random.default_rng(0).normal(100, 30, shape).astype(np.float32)
    for model in (known, unet):
        assert segment(Volume(image, tiny.affine_of((1, 2, 4))), model, EXACT).labels.shape == shape


def test_a_scan_on_a_voxel_of_one_intensity_is_refused(known: Checkpoint):
    for data in (np.zeros((9, 9, 9)), np.full((20, 20, 20), 7, np.int16), np.ones((1, 1, 1))):
        with pytest.raises(BadFile, match="one intensity"):
            segment(Volume(data, np.eye(4)), known, EXACT)


@pytest.mark.parametrize("dtype", ["u2", "u1", "i4", "f4"])
def test_a_label_map_given_as_a_scan_is_refused(dtype: str):
    labels = tiny.head((40, 44, 36)).astype(dtype)
    with pytest.raises(BadFile, match="label map"):
        check_image(Volume(labels, np.eye(4)))
    with pytest.raises(BadFile, match="label map"):
        check_image(Volume((labels > 0).astype(dtype), np.eye(4)))


@pytest.mark.parametrize("levels", [20, 200, 4000])
def test_a_scan_of_whole_numbers_is_not_taken_for_a_label_map(levels: int):
    image = tiny.bumps((40, 40, 40)) + np.random.default_rng(0).normal(0, 30, (40, 40, 40))
    whole = np.round((image - image.min()) / np.ptp(image) * levels).astype(np.int16)
    check_image(Volume(whole, np.eye(4)))
    check_image(Volume(np.where(whole < levels / 4, 0, whole), np.eye(4)))  # background removed


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path):
    model = load_checkpoint(str(tiny.save_known(tmp_path / "m", "not_a_number")))
    for precision in ("fp32", "bf16"):
        with pytest.raises(BadModel, match="not finite"):
            segment(scan_of(), model, Settings(device="cpu", precision=precision))


def test_logits_that_overflow_in_half_precision_are_computed_again(
    known: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    expected = segment(scan_of(), known, EXACT).labels.data
    forward = tiny.Nearest.forward

    def overflowing(self: tiny.Nearest, x: torch.Tensor) -> torch.Tensor:
        logits = forward(self, x)
        return logits / 0 * 0 if torch.is_autocast_enabled("cpu") else logits

    monkeypatch.setattr(tiny.Nearest, "forward", overflowing)
    with pytest.warns(DataWarning, match="float32 goes on"):
        result = segment(scan_of(), known, Settings("cpu", "bf16"))
    assert np.array_equal(result.labels.data, expected)


def test_cleanup_runs_as_the_model_says_unless_it_is_switched_off(tmp_path: Path):
    steps = ({"step": "drop_small", "min_mm3": 100.0},)
    model = load_checkpoint(str(tiny.save_known(tmp_path / "m", cleanup=steps)))
    image = tiny.phantom()
    image[1, 1, 1] = 1000  # one voxel of 8 mm3
    scan = Volume(image, tiny.affine_of())
    with_cleanup = segment(scan, model, EXACT).labels.data
    without = segment(scan, model, Settings("cpu", "fp32", cleanup=False)).labels.data
    assert without[1, 1, 1] == 41
    assert with_cleanup[1, 1, 1] == 0
    assert np.array_equal(with_cleanup[2:], without[2:])


@pytest.mark.parametrize("name", ["otsu", "kmeans", "gmm"])
def test_intensity_models_go_through_the_same_call(name: str):
    scan = scan_of()
    result = segment(scan, name)
    assert np.array_equal(result.labels.affine, scan.affine)
    assert (
        dice(
            result.labels.data == result.labels.data.max(),
            scan.data > (250 if name == "otsu" else 750),
        )
        > 0.98
    )
    assert result.plan.windows == 0


def test_progress_is_told_what_is_done(known: Checkpoint):
    told: list[tuple[str, int, int]] = []
    segment(scan_of(), known, EXACT, progress=lambda *step: told.append(step))
    done = [(a, b) for what, a, b in told if what == "segmenting"]
    assert done[-1][0] == done[-1][1] == plan(scan_of(), known, EXACT).windows


@given(affine=affines(), shape=st.tuples(*[st.integers(1, 12)] * 3), spacing=st.floats(0.5, 5))
@settings(max_examples=100, deadline=None)
def test_the_models_grid_holds_every_voxel_and_no_more_than_it_must(affine, shape, spacing):
    volume = Volume(np.zeros(shape), affine)
    grid = model_grid(volume, spacing)
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape])).reshape(3, -1).T
    world = nib.affines.apply_affine(affine, ends)
    at = nib.affines.apply_affine(np.linalg.inv(grid.affine), world)
    assert (at >= -0.5 - 0.01).all()
    assert (at <= np.array(grid.shape) - 0.5 + 0.01).all()
    assert (
        np.array(grid.shape) * spacing
        <= np.maximum(np.ptp(world, axis=0) + spacing, spacing) + 1e-6
    ).all()
    assert nib.aff2axcodes(grid.affine) == ("R", "A", "S")


@given(affine=affines(), slope=st.tuples(*[st.floats(-2, 2)] * 3))
@settings(max_examples=40, deadline=None)
def test_the_scan_on_the_models_grid_has_the_values_of_its_places(affine: np.ndarray, slope: tuple):
    """A linear ramp is kept by trilinear interpolation and by averaging, where the grid lies well
    inside the scan.
    """
    shape = (12, 11, 13)
    ramp = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) @ slope
    volume = Volume(ramp.astype(np.float32), affine)
    spacing = float(np.mean(volume.spacing_mm))
    grid = model_grid(volume, spacing)
    image = to_model_grid(volume, grid)
    places = nib.affines.apply_affine(grid.affine, np.moveaxis(np.indices(grid.shape), 0, -1))
    at = nib.affines.apply_affine(np.linalg.inv(affine), places)
    # Points averaged lie within.
    reach = 0.5 * np.abs(np.linalg.inv(affine[:3, :3]) @ grid.affine[:3, :3]).sum(1)
    inside = ((at > reach) & (at < np.array(shape) - 1 - reach)).all(-1)
    assert np.allclose(
        image[inside], (places @ slope)[inside], atol=1e-4 * max(1, float(np.abs(ramp).max()))
    )


def test_normalise_ignores_units_and_a_constant_added_to_every_voxel():
    image = tiny.phantom().astype(np.float32)
    expected = normalise(image)
    assert expected.shape == (1, *image.shape)
    assert float(expected.min()) == 0
    assert float(expected.max()) == 1
    for other in (image * 3, image + 200, image - 1000):
        assert torch.allclose(normalise(other.astype(np.float32)), expected, rtol=0, atol=2e-3)


def test_memory_that_is_not_there_is_refused_before_anything_is_done(known: Checkpoint):
    with pytest.raises(NotEnoughMemory, match=r"needs about .* GB .* raise --max-memory"):
        segment(scan_of(), known, Settings("cpu", "fp32", max_memory_bytes=10**6))
    with pytest.raises(NotEnoughMemory, match="GB"):
        segment(scan_of(), "otsu", Settings(max_memory_bytes=10**6))
    with (
        mock.patch("medseg.inference.forecast.free_bytes", return_value=0),
        pytest.raises(NotEnoughMemory, match="are free"),
    ):
        segment(scan_of(), known, EXACT)


def test_the_plan_says_what_will_be_done(known: Checkpoint, unet: Checkpoint):
    scan = scan_of()
    made = plan(scan, known, EXACT)
    assert (made.model, made.device, made.precision) == ("known", "cpu", "float32")
    assert made.windows == 2 * 2 * 2  # 20 x 22 x 18 voxels in windows of 16
    assert plan(scan, known, Settings("cpu", "fp32", overlap=0.0)).windows == 8
    assert plan(scan, unet, Settings("cpu", "fp32", overlap=0.9)).windows > made.windows
    assert made.memory_bytes > scan.data.nbytes


def test_structure_volumes_count_voxels_and_ml_and_list_absent_structures():
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:2, :5, :5] = 2
    rows = structure_volumes(Volume(labels, tiny.affine_of((2.0, 1.5, 1.0))), tiny.TABLE)
    assert rows == [
        {"value": 2, "name": "left body", "voxels": 50, "ml": 0.15},
        {"value": 41, "name": "right body", "voxels": 0, "ml": 0.0},
    ]


def test_less_memory_gives_the_same_labels_in_parts(unet: Checkpoint):
    scan = scan_of(shape=(40, 44, 36))
    whole = segment(scan, unet, EXACT)
    sizes = iter([10**12, 10**12, 10**7])  # what one, two and three parts need
    with mock.patch("medseg.inference.forecast.memory_needed", lambda *_, **__: next(sizes)):
        parts = segment(scan, unet, Settings("cpu", "fp32", max_memory_bytes=10**8))
    assert (whole.plan.stripes, parts.plan.stripes) == (1, 3)
    assert parts.plan.windows > whole.plan.windows
    assert np.array_equal(parts.labels.data, whole.labels.data)


def test_the_forecast_falls_with_the_parts_and_grows_with_the_scan(unet: Checkpoint):
    from medseg.inference.forecast import Laid, memory_needed
    from medseg.inference.window import plan_windows

    def forecast(shape: tuple, stripes: int) -> int:
        scan = Volume(np.zeros(shape, np.float32), tiny.affine_of())
        grid = model_grid(scan, 2.0)
        windows = plan_windows(grid.shape, (64, 64, 64), 0.5)
        laid = Laid(grid=grid, windows=windows, precision="float32", mirror=())
        return memory_needed(scan, laid, [unet], EXACT, "cpu", stripes)

    with mock.patch("medseg.inference.forecast.resident_bytes", return_value=0):
        assert forecast((80, 200, 80), 4) < forecast((80, 200, 80), 1) < forecast((80, 400, 80), 1)


def test_probabilities_and_uncertainty_lie_on_the_scans_grid_and_fit_the_labels(unet: Checkpoint):
    scan = scan_of(tiny.affine_of((1.5, 2.0, 3.1)))
    asked = Settings("cpu", "fp32", probabilities=(41, 2), uncertainty=True, cleanup=False)
    result = segment(scan, unet, asked)
    assert list(result.maps) == ["probability_41", "probability_2", "uncertainty"]
    for one in result.maps.values():
        assert one.shape == scan.shape
        assert np.array_equal(one.affine, scan.affine)
        assert 0 <= one.data.min() <= one.data.max() <= 1
    of_41, of_2 = result.maps["probability_41"].data, result.maps["probability_2"].data
    assert (of_41 + of_2 <= 1 + 1e-5).all()
    sure = result.maps["uncertainty"].data < 0.5
    # The label is that of the mean logits, the map the mean of the probabilities: they differ at
    # some borders.
    assert (
        of_41[sure & (result.labels.data == 41)] > of_2[sure & (result.labels.data == 41)]
    ).mean() > 0.95
    with pytest.raises(BadConfig, match="no label 7"):
        segment(scan, unet, Settings("cpu", probabilities=(7,)))


def test_several_models_of_one_task_are_averaged_and_others_refused(
    tmp_path: Path, known: Checkpoint, unet: Checkpoint
):
    scan = scan_of()
    alone = segment(scan, known, EXACT).labels.data
    assert np.array_equal(segment(scan, [known, known], EXACT).labels.data, alone)
    other = load_checkpoint(str(tiny.save_known(tmp_path / "other", spacing_mm=3.0)))
    with pytest.raises(BadModel, match="differ in their spacing_mm"):
        segment(scan, [known, other], EXACT)


def test_mirroring_follows_training_and_never_swaps_sides(tmp_path: Path):
    scan = scan_of()
    mirrored = load_checkpoint(str(tiny.save_unet(tmp_path / "mirrored", mirror=(0, 1))))
    assert mirror_axes([mirrored]) == (1,)  # its labels are left and right
    with_tta = segment(scan, mirrored, Settings("cpu", "fp32", tta=True)).labels.data
    turned = Volume(np.ascontiguousarray(scan.data[:, ::-1]), scan.affine)
    back = segment(turned, mirrored, Settings("cpu", "fp32", tta=True)).labels.data[:, ::-1]
    assert (
        with_tta == back
    ).mean() > 0.99  # the mean over both mirrorings does not change when the scan is mirrored
    with pytest.raises(BadConfig, match="must not be mirrored"):
        segment(
            scan,
            load_checkpoint(str(tiny.save_unet(tmp_path / "plain"))),
            Settings("cpu", tta=True),
        )


def test_windows_of_air_are_left_out_where_the_model_allows_it(tmp_path: Path):
    image = np.zeros((24, 60, 24), np.float32)
    image[4:20, :16, 4:20] = tiny.phantom((16, 16, 16)) + 500
    image[4:20, 44:, 4:20] = tiny.phantom((16, 16, 16)) + 500
    scan = Volume(image, tiny.affine_of())
    for save, kind in ((tiny.save_unet, "unet"), (tiny.save_known, "known")):
        skipping = load_checkpoint(str(save(tmp_path / f"{kind}_skip", skip_empty=True)))
        full = load_checkpoint(str(save(tmp_path / f"{kind}_full")))
        told: list = []
        tell = partial(lambda told, *step: told.append(step), told)
        with mock.patch.object(
            _Torch, "__call__", autospec=True, side_effect=_Torch.__call__
        ) as ran:
            labels = segment(scan, skipping, EXACT, progress=tell).labels.data
        assert 0 < ran.call_count < skipping_windows(told)
        assert not labels[:, 26:34].any()
        if kind == "known":
            assert np.array_equal(labels, segment(scan, full, EXACT).labels.data)


def skipping_windows(told: list) -> int:
    done = [total for what, _, total in told if what == "segmenting"]
    return int(done[-1])


def test_a_model_may_look_only_where_a_coarse_one_finds_something(tmp_path: Path):
    scan = scan_of(shape=(40, 44, 36))
    folder = tiny.save_known(tmp_path / "fine", locate={"labels": [41], "margin_mm": 4.0})
    tiny.save_known(folder / "coarse", spacing_mm=4.0)
    located = load_checkpoint(str(folder))
    plans: list = []
    result = segment(
        scan, located, Settings("cpu", "fp32", uncertainty=True), announce=plans.append
    )
    assert result.labels.shape == result.maps["uncertainty"].shape == scan.shape
    everything = segment(scan, load_checkpoint(str(tiny.save_known(tmp_path / "whole"))), EXACT)
    whole = everything.labels.data
    assert [plan.windows < everything.plan.windows for plan in plans] == [True]
    bright = whole == 41
    assert (result.labels.data[bright] == 41).mean() > 0.99
    box = region_of(Volume(whole, scan.affine), [41], 12.0)
    outside = np.ones(scan.shape, bool)
    outside[box] = False
    assert not result.labels.data[outside].any()


def test_region_of_is_the_box_around_labels_with_a_margin():
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[4, 5, 6] = 3
    volume = Volume(labels, tiny.affine_of((2.0, 1.0, 4.0)))
    assert region_of(volume, [3], 3.0) == (slice(2, 7), slice(2, 9), slice(5, 8))
    assert region_of(volume, [3], 100.0) == region_of(volume, [9], 3.0) == (slice(0, 10),) * 3


def two_scans(affine: np.ndarray | None = None) -> tuple[list[Volume], np.ndarray]:
    """Two scans of one grid, each bright in another ellipsoid, and the labels a model of two
    channels gives them.
    """
    shape = (24, 22, 26)
    bright = [tiny.ellipsoid(shape, centre, (6, 5, 7)) for centre in ((8, 10, 10), (14, 12, 15))]
    noise = np.random.default_rng(3).normal(0, 4, (2, *shape))
    scans = [(1000.0 * one + n).astype(np.float32) for one, n in zip(bright, noise)]
    affine = tiny.affine_of() if affine is None else affine
    return [Volume(scan, affine) for scan in scans], np.where(
        bright[1], 41, np.where(bright[0], 2, 0)
    )


def test_each_channel_reaches_the_network_in_its_place(two_channels: Checkpoint):
    scans, expected = two_scans()
    result = segment(scans, two_channels, EXACT)
    assert np.array_equal(result.labels.data, expected)
    assert np.array_equal(result.labels.affine, scans[0].affine)
    swapped = segment(scans[::-1], two_channels, EXACT).labels.data
    assert (swapped == 41).sum() == (scans[0].data > 500).sum()
    mapped = segment(
        scans, two_channels, Settings("cpu", "fp32", probabilities=(2,), uncertainty=True)
    )
    assert (
        mapped.maps["probability_2"].data[expected == 2].min()
        > mapped.maps["probability_2"].data[expected != 2].max()
    )


def test_channels_stored_in_other_orientations_are_turned(two_channels: Checkpoint):
    scans, expected = two_scans()
    turned = reorient(scans[1], "PSR")
    assert np.array_equal(segment([scans[0], turned], two_channels, EXACT).labels.data, expected)


def test_another_number_of_scans_is_refused_and_the_channels_named(
    two_channels: Checkpoint, known: Checkpoint
):
    scans, _ = two_scans()
    for some in (scans[0], scans[:1], [*scans, scans[0]]):
        with pytest.raises(BadConfig, match=r"takes 2 scans \(T1, FLAIR\) in this order"):
            segment(some, two_channels, EXACT)
    with pytest.raises(BadConfig, match="takes 1 scan and 2 are given"):
        segment(scans, known, EXACT)
    with pytest.raises(BadConfig, match="otsu takes 1 scan"):
        segment(scans, "otsu", EXACT)


def test_a_channel_that_is_no_image_or_lies_elsewhere_is_named(two_channels: Checkpoint):
    scans, _ = two_scans()
    with pytest.raises(BadFile, match="FLAIR: has one intensity everywhere"):
        segment([scans[0], scans[0].with_data(np.zeros(scans[0].shape))], two_channels, EXACT)
    with pytest.raises(BadFile, match="FLAIR lies on another grid than T1"):
        segment([scans[0], Volume(scans[1].data, tiny.affine_of((2, 2, 2.1)))], two_channels, EXACT)


def test_ensembles_mirroring_parts_and_batches_take_several_channels(
    tmp_path: Path, two_channels: Checkpoint
):
    scans, expected = two_scans()
    assert np.array_equal(segment(scans, [two_channels, two_channels], EXACT).labels.data, expected)
    mirrored = load_checkpoint(str(tiny.save_two_channels(tmp_path / "mirrored", mirror=(1, 2))))
    assert np.array_equal(
        segment(scans, mirrored, Settings("cpu", "fp32", tta=True)).labels.data, expected
    )
    with mock.patch("medseg.inference.forecast._STRIPES", (3,)):
        parts = segment(scans, two_channels, Settings("cpu", "fp32", batch=3))
    assert parts.plan.stripes == 3
    assert np.array_equal(parts.labels.data, expected)
    named = load_checkpoint(
        str(tiny.save_two_channels(tmp_path / "other", channel_names=("T1", "T2")))
    )
    with pytest.raises(BadModel, match="differ in their channel_names"):
        segment(scans, [two_channels, named], EXACT)


def test_a_model_of_several_channels_may_look_where_a_coarse_one_of_one_finds_something(
    tmp_path: Path,
):
    scans, expected = two_scans()
    folder = tiny.save_two_channels(tmp_path / "fine", locate={"margin_mm": 30.0})
    for save in (tiny.save_known, tiny.save_two_channels):
        save(folder / "coarse", spacing_mm=4.0)
        assert np.array_equal(
            segment(scans, load_checkpoint(str(folder)), EXACT).labels.data, expected
        )


def test_the_forecast_counts_every_channel(known: Checkpoint):
    from medseg.inference.forecast import Laid, memory_needed
    from medseg.inference.window import plan_windows

    scan = Volume(np.zeros((300, 300, 300), np.uint8), tiny.affine_of())
    grid = model_grid(scan, 2.0)
    windows = plan_windows(grid.shape, (16, 16, 16), 0.5)
    laid = Laid(grid=grid, windows=windows, precision="float32", mirror=())
    with mock.patch("medseg.inference.forecast.resident_bytes", return_value=0):
        one, eight = (
            memory_needed(scan, laid, [replace(known, spec=spec)], EXACT, "cpu", 1)
            for spec in (known.spec, known.spec.model_copy(update={"channels": 8}))
        )
    image = 4 * 300**3
    assert 0.99 * 7 * image < eight - one < 1.05 * 7 * image


SCHEMES = {
    "percentiles": {"scheme": "percentiles"},
    "zscore": {"scheme": "zscore"},
    "nonzero": {"scheme": "zscore", "nonzero": True},
    "ct": {"scheme": "ct", "low": 0.0, "high": 900.0, "mean": 50.0, "sd": 900.0},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", ["world", "scan"])
def test_every_scheme_and_grid_finds_what_is_bright(tmp_path: Path, scheme: str, grid: str):
    """Thick oblique slices; on the scan's own axes and spacing the answer is that of each voxel."""
    affine = tiny.affine_of((2.0, 2.0, 5.0), (4.0, -9.0, 3.0))
    affine[:3, :3] = rotation((1, 0.05, -0.1, 0.08)) @ affine[:3, :3]
    scans, expected = two_scans(affine)
    folder = tiny.save_two_channels(
        tmp_path / "m", spacing_mm=(2.0, 2.0, 5.0), grid=grid, intensity=[SCHEMES[scheme]] * 2
    )
    labels = segment(scans, load_checkpoint(str(folder)), EXACT).labels.data
    if grid == "scan":
        assert np.array_equal(labels, expected)
    for value in (2, 41):
        assert dice(labels == value, expected == value) > 0.7


def test_on_the_scans_own_axes_all_48_ways_of_storing_it_give_the_same_labels(tmp_path: Path):
    folder = tiny.save_unet(
        tmp_path / "m",
        spacing_mm=(2.0, 1.7, 1.3),
        grid="scan",
        intensity=[{"scheme": "zscore"}],
        patch=(16, 32, 16),
    )
    model = load_checkpoint(str(folder))
    affine = tiny.affine_of((2.0, 1.5, 2.6), (-18.0, 5.5, 40.0))
    affine[:3, :3] = rotation((1, 0.04, 0.08, -0.06)) @ affine[:3, :3]
    scan = scan_of(affine)
    expected = segment(scan, model, EXACT).labels
    assert len(np.unique(expected.data)) == 3
    for letters in ORIENTATIONS:
        turned = reorient(scan, letters)
        stored = Volume(np.ascontiguousarray(turned.data), turned.affine)
        back = reorient(segment(stored, model, EXACT).labels, scan.orientation)
        assert np.allclose(back.affine, scan.affine, atol=1e-9)
        assert (back.data == expected.data).mean() >= 0.999, letters


def test_where_air_is_not_0_windows_cover_the_whole_scan(tmp_path: Path):
    """The air around a body would else be background unseen, whatever it means to the network."""
    image = np.zeros((60, 20, 20), np.float32)
    image[2:18] = tiny.phantom((16, 20, 20)) + 300
    scan = Volume(image, tiny.affine_of())
    for name, some in (("percentiles", True), ("zscore", False)):
        model = load_checkpoint(str(tiny.save_known(tmp_path / name, intensity=[SCHEMES[name]])))
        told: list = []
        segment(scan, model, EXACT, progress=partial(lambda told, *step: told.append(step), told))
        assert (skipping_windows(told) < plan(scan, model, EXACT).windows) is some
