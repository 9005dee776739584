"""The picture: which way round it lies, and what stands beside it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from making import networks as tiny
from medseg.errors import BadOutput
from medseg.labels import Label, LabelTable
from medseg.view.preview import contact_sheet, preview, slices_that_matter, strip, write_preview
from medseg.volume import ORIENTATIONS, Volume, reorient

TILE = 220
RED = LabelTable((Label(7, "corner", (255, 0, 0)),))


def corner_scan(spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)) -> tuple[Volume, Volume]:
    """A scan that runs to RAS with a labelled, bright box at the patient's right, front and top."""
    image = np.random.default_rng(0).normal(100, 5, (20, 24, 28)).astype(np.float32)
    labels = np.zeros(image.shape, np.uint8)
    labels[13:18, 15:22, 18:26] = 7
    image[labels > 0] = 300
    affine = tiny.affine_of(spacing, (-20, -20, -20))
    return Volume(image, affine), Volume(labels, affine)


def middle_of(pixels: np.ndarray) -> tuple[float, float]:
    """Row and column of the middle of the pixels, as shares of the picture."""
    rows, columns = np.nonzero(pixels)
    assert len(rows) > 50
    return float(rows.mean() / pixels.shape[0]), float(columns.mean() / pixels.shape[1])


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    return sheet[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE].astype(int)


@pytest.mark.parametrize("letters", ORIENTATIONS[::5])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.0, 2.0, 4.0)])
def test_right_is_left_in_axial_and_coronal_and_front_is_left_in_sagittal(
    letters: str, spacing: tuple
):
    scan, labels = (reorient(volume, letters) for volume in corner_scan(spacing))
    sheet = contact_sheet(scan, labels, RED)
    assert sheet.shape == (6 * TILE, 5 * TILE, 3)
    assert sheet.dtype == np.uint8
    for row in (1, 3, 5):  # axial, coronal and sagittal with labels
        for column in range(5):
            part = tile(sheet, row, column)
            red = (part[..., 0] - part[..., 2] > 80) & (part[..., 1] < 180)
            down, across = middle_of(red)
            assert across < 0.45, (row, column)  # right, right, front
            assert down < 0.45, (row, column)  # front, top, top


def test_the_plain_rows_show_the_scan_in_grey_with_the_bright_box_at_the_same_place():
    scan, labels = corner_scan()
    sheet = contact_sheet(scan, labels, RED)
    for row in (0, 2, 4):
        plain, over = tile(sheet, row, 2), tile(sheet, row + 1, 2)
        bright = (plain.min(-1) > 200) & (np.ptp(plain, axis=-1) == 0)
        red = (over[..., 0] - over[..., 2] > 80) & (over[..., 1] < 180)
        assert (bright & red).sum() / (bright | red).sum() > 0.95


def test_pixels_are_square_in_mm():
    """A cube in mm is a square in every picture, whatever the voxels."""
    image = np.random.default_rng(0).normal(100, 5, (40, 20, 10)).astype(np.float32)
    labels = np.zeros(image.shape, np.uint8)
    labels[12:28, 6:14, 3:7] = 7  # 16 x 16 x 16 mm
    affine = tiny.affine_of((1.0, 2.0, 4.0))
    sheet = contact_sheet(Volume(image, affine), Volume(labels, affine), RED)
    for row in (1, 3, 5):
        part = tile(sheet, row, 2)
        red = (part[..., 0] - part[..., 2] > 60) & (part[..., 1] < 150)
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert len(rows) == pytest.approx(16 / 40 * TILE, abs=2)
        assert len(columns) == pytest.approx(16 / 40 * TILE, abs=2)


def test_a_result_without_labels_shows_the_whole_scan():
    scan, labels = corner_scan()
    sheet = contact_sheet(scan, labels.with_data(np.zeros_like(labels.data)), RED)
    for row in (0, 2, 4):
        assert np.array_equal(tile(sheet, row, 2), tile(sheet, row + 1, 2))
        assert tile(sheet, row, 2).max() > 20
        assert sheet[row * TILE : (row + 1) * TILE, TILE:].min(-1).max() > 200  # the bright box


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 30, 1), (3, 200, 2)])
def test_thin_scans_are_drawn(shape: tuple):
    image = np.random.default_rng(0).normal(100, 5, shape).astype(np.float32)
    volume = Volume(image, np.eye(4))
    sheet = contact_sheet(volume, volume.with_data((image > 100).astype(np.uint8) * 7), RED)
    assert sheet.shape == (6 * TILE, 5 * TILE, 3)


def test_slices_are_spread_over_the_labels_and_show_most_structures():
    mask = np.zeros((6, 100, 5), np.uint16)
    mask[2, 20:70] = 1  # a long structure of one voxel's breadth
    mask[2:4, 41:49, 2] = 300  # another beside it in a few slices
    mask[3, 33, 1] = 7  # and a single voxel
    chosen = slices_that_matter(mask, 1, 5)
    assert all(20 + 10 * n <= at < 30 + 10 * n for n, at in enumerate(chosen))
    assert chosen[1] == 33
    assert 41 <= chosen[2] < 49
    assert chosen[0] in (24, 25)  # all alike: the middle


def test_slices_of_labels_with_a_gap_are_in_order_and_few_slices_are_repeated():
    mask = np.zeros((30, 4, 4), np.uint8)
    mask[[2, 27]] = 1
    chosen = slices_that_matter(mask, 0, 5)
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (2, 27)
    thin = np.zeros((9, 4, 4), np.uint8)
    thin[4:6] = 1
    assert set(slices_that_matter(thin, 0, 5)) == {4, 5}
    assert len(slices_that_matter(thin, 0, 5)) == 5
    assert slices_that_matter(np.zeros((1, 4, 4), np.uint8), 0, 3) == [0, 0, 0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_written_preview_is_the_contact_sheet_with_the_names_of_its_structures(tmp_path: Path):
    scan, labels = corner_scan()
    write_preview(tmp_path / "p.png", scan, labels, RED)
    picture = pixels(tmp_path / "p.png")
    assert np.array_equal(picture, preview(scan, labels, RED))
    assert np.array_equal(picture[: 6 * TILE], contact_sheet(scan, labels, RED))
    below = picture[6 * TILE :]
    assert 20 < len(below) < 60
    assert ((below == (255, 0, 0)).all(-1)).sum() == 14 * 14  # the field of its colour
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_letters_say_which_side_is_which_and_touch_none_of_each_other():
    scan, labels = corner_scan()
    black, none = (one.with_data(np.zeros_like(one.data)) for one in (scan, labels))
    for picture in (contact_sheet(black, none, RED), strip(black, none, RED)):
        yellow = (picture[..., 0] > 60) & (picture[..., 2] == 0)
        _, count = ndimage.label(ndimage.binary_dilation(yellow, np.ones((3, 3))))
        assert count == 3 * 4  # three planes with four letters each


def test_a_preview_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOutput, match="cannot be written"):
        write_preview(tmp_path / "file" / "p.png", *corner_scan(), RED)


def test_the_command_draws_a_preview(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg("infer", scan, "-m", "otsu", "--preview", tmp_path / "p.png", "-q")
    assert ran.code == 0, ran.err
    assert pixels(tmp_path / "p.png").shape[1:] == (5 * TILE, 3)


def test_a_preview_that_cannot_be_drawn_loses_no_labels(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    with mock.patch("medseg.view.preview.contact_sheet", side_effect=RuntimeError("no ink")):
        ran = tiny.medseg("infer", scan, "-m", "otsu", "--preview", tmp_path / "p.png", "-q")
    assert ran.code == 0
    assert "p.png could not be drawn: RuntimeError: no ink" in ran.err
    assert (tmp_path / "scan_seg.nii.gz").is_file()


def test_labels_that_the_table_does_not_name_are_drawn_without_a_colour():
    scan, labels = corner_scan()
    other = labels.with_data(labels.data.astype(np.uint16) * 100)
    assert strip(scan, other, RED).shape == strip(scan, labels, RED).shape


def test_a_scan_is_not_copied_for_the_slices_that_are_shown():
    scan, labels = corner_scan()
    zoomed = [
        Volume(np.asfortranarray(one.data.repeat(7, 0).repeat(7, 1).repeat(7, 2)), one.affine)
        for one in (scan, labels)
    ]
    strip(*zoomed, RED)  # what is imported is none of the scan
    tracemalloc.start()
    strip(*zoomed, RED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < zoomed[0].data.nbytes / 2
