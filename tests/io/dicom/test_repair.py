"""Uneven stacks made even: against scenes whose values are known everywhere."""

from __future__ import annotations

import copy

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from making.dicom import OBLIQUE, PT, another, change, enhanced, place, save, series, truth
from making.notices import notices
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.volume import LPS, Volume, reorient

#: HU per mm of a scene that is linear in space, so that linear interpolation is exact: along rows,
#: columns, normal.
SLOPES = (3.0, -5.0, 8.0)


def scene(offsets: list[float], sideways: list[tuple[float, float]] | None = None) -> list[Dataset]:
    """Slices of 20 x 24 pixels at places in mm along the normal, shifted in their plane, of the
    linear scene.
    """
    pieces = series(len(offsets), 20, 24)
    shifts = sideways or [(0.0, 0.0)] * len(offsets)
    for piece, offset, (right, down) in zip(pieces, offsets, shifts, strict=True):
        piece.ImagePositionPatient = place(offset, right, down)
        along, across = np.meshgrid(np.arange(24) * 0.7 + right, np.arange(20) * 0.9 + down)
        values = SLOPES[0] * along + SLOPES[1] * across + SLOPES[2] * offset
        piece.PixelData = np.rint(values + 1024).astype(np.int16).tobytes()
    return pieces


def expected_at(volume: Volume) -> np.ndarray:
    """The scene at every voxel of a volume."""
    i, j, k = np.indices(volume.shape)
    world = np.tensordot((LPS @ volume.affine)[:3, :3], np.stack([i, j, k]), 1)
    world = world + (LPS @ volume.affine)[:3, 3][:, None, None, None]
    local = np.tensordot(OBLIQUE.T, world - np.array([-10.0, 20, 30])[:, None, None, None], 1)
    return np.tensordot(np.array(SLOPES), local, 1)


def repaired(pieces: list[Dataset], folder, what: str) -> Volume:
    save(pieces, folder)
    with pytest.raises(BadFile, match="let --repair resample it"):
        io.read(folder)
    with pytest.warns(DataWarning, match=f"was repaired: .*{what}") as caught:
        volume = io.read(folder, repair=True)
    assert len(notices(caught)) == 1
    return volume


@pytest.mark.parametrize("gone", [[2], [3, 4], [1, 6]])
def test_missing_slices_are_interpolated_and_the_others_stay_exact(tmp_path, gone):
    whole = scene([2.5 * n for n in range(9)])
    expected = truth(whole)
    pieces = [piece for n, piece in enumerate(whole) if n not in gone]

    volume = repaired(
        pieces, tmp_path / "s", f"{len(gone)} of 9 slices were missing and were interpolated"
    )

    assert volume.data.dtype == expected.data.dtype
    assert np.allclose(volume.affine, expected.affine, atol=1e-5)
    kept = [n for n in range(9) if n not in gone]
    assert np.array_equal(volume.data[..., kept], expected.data[..., kept])
    assert np.abs(volume.data[..., gone] - expected.data[..., gone]).max() <= 1


def test_slices_stored_twice_are_dropped(tmp_path):
    pieces = series()
    copies = copy.deepcopy([pieces[1], pieces[3]])
    for piece in copies:
        piece.SOPInstanceUID = generate_uid()

    volume = repaired([*pieces, *copies], tmp_path / "s", "2 slices stored twice were dropped")

    assert np.array_equal(volume.data, truth(pieces).data)
    assert np.allclose(volume.affine, truth(pieces).affine, atol=1e-6)


def test_different_slices_at_one_place_are_not_repaired(tmp_path):
    pieces = series()
    folder = save([*pieces, another(pieces[2:3], 9)[0]], tmp_path / "s")

    for repair in (False, True):
        with pytest.raises(BadFile, match="same place") as caught:
            io.read(folder, repair=repair)
        assert "--repair" not in str(caught.value)


def test_uneven_distances_are_resampled_along_the_normal(tmp_path):
    offsets = [0, 2.0, 4.5, 6.5, 9.0, 12.0, 13.5, 16.0]

    volume = repaired(scene(offsets), tmp_path / "s", "uneven distances")

    spacing = volume.spacing_mm
    assert np.isclose(spacing[2] * (volume.shape[2] - 1), 16) and np.allclose(
        spacing[:2], (0.7, 0.9)
    )
    assert np.abs(volume.data - expected_at(volume)).max() <= 1
    step = np.rint(volume.spacing_mm[2] * 1e6)
    assert abs(step - 2.25e6) < 0.1e6


@pytest.mark.parametrize("per_slice", [(0, 0.6), (0.5, 0), (-0.4, 0.9), (0, -1.3), (0.7, 0.9)])
def test_a_slanted_stack_is_made_straight(tmp_path, per_slice):
    count = 7
    sideways = [(per_slice[0] * n, per_slice[1] * n) for n in range(count)]
    pieces = scene([2.5 * n for n in range(count)], sideways)

    volume = repaired(pieces, tmp_path / "s", r"a slant of \d+\.\d degrees")

    assert np.isclose(volume.spacing_mm[2], 2.5)
    lowest = volume.data.min()
    inside = volume.data > lowest
    assert inside.mean() > 0.6
    assert np.abs(volume.data - expected_at(volume))[inside].max() <= 1
    # Every pixel that lies wholly inside is kept: at most a pixel at each edge of a slice is lost.
    assert inside.sum() >= (24 - 1) * (20 - 1) * count


def test_slices_off_the_straight_line_are_moved_back(tmp_path):
    sideways = [(0.0, 0.0), (0.3, 0.0), (-0.2, 0.4), (0.1, 0.1), (0.0, 0.0)]

    volume = repaired(
        scene([0, 2.5, 5, 7.5, 10], sideways), tmp_path / "s", "a slant of 0.0 degrees"
    )

    inside = volume.data > volume.data.min()
    assert np.abs(volume.data - expected_at(volume))[inside].max() <= 1


def test_everything_at_once(tmp_path):
    pieces = scene([2.5 * n for n in range(9)], [(0.2 * n, -0.5 * n) for n in range(9)])
    del pieces[4]
    pieces.append(copy.deepcopy(pieces[1]))
    pieces[-1].SOPInstanceUID = generate_uid()

    volume = repaired(
        pieces, tmp_path / "s", "1 slices stored twice.*1 of 9 slices were missing.*slant"
    )

    inside = volume.data > volume.data.min()
    assert np.abs(volume.data - expected_at(volume))[inside].max() <= 1


def test_pet_and_multi_frame_files_are_repaired_too(tmp_path):
    pieces = scene([2.5 * n for n in range(7)])
    del pieces[3]
    volume = repaired([enhanced([pieces])], tmp_path / "e", "1 of 7")
    assert np.abs(volume.data - expected_at(volume)).max() <= 1

    change(pieces, SOPClassUID=PT)
    for n, piece in enumerate(pieces):
        piece.RescaleSlope, piece.RescaleIntercept = f"{1 / (n + 1):.8f}", 0
        values = np.frombuffer(piece.PixelData, np.int16).astype(np.int32) - 1024
        piece.PixelData = (values * (n + 1)).astype(np.int16).tobytes()
    volume = repaired(pieces, tmp_path / "p", "1 of 7")
    assert volume.data.dtype == np.float32
    assert np.abs(volume.data - expected_at(volume)).max() <= 1.5


def _too_few(pieces: list[Dataset]) -> None:
    del pieces[2:]


def _half_missing(pieces: list[Dataset]) -> None:
    del pieces[2:8]


def _far_away(pieces: list[Dataset]) -> None:
    pieces[-1].ImagePositionPatient = place(500)


def _nearly_the_same_place(pieces: list[Dataset]) -> None:
    pieces[3].ImagePositionPatient = place(2 * 2.5 + 0.1)


def _far_aside(pieces: list[Dataset]) -> None:
    pieces[3].ImagePositionPatient = place(3 * 2.5, 8)


def _colour(pieces: list[Dataset]) -> None:
    change(pieces, PhotometricInterpretation="RGB")


def _no_place(pieces: list[Dataset]) -> None:
    del pieces[3].ImagePositionPatient


@pytest.mark.parametrize(
    "spoil",
    [_too_few, _half_missing, _far_away, _nearly_the_same_place, _far_aside, _colour, _no_place],
)
def test_what_is_not_well_defined_is_refused_with_repair_too(tmp_path, spoil):
    pieces = scene([2.5 * n for n in range(9)])
    spoil(pieces)
    folder = save(pieces, tmp_path / "s")

    for repair in (False, True):
        with pytest.raises(BadFile) as caught:
            io.read(folder, repair=repair)
        assert "--repair" not in str(caught.value)
        assert str(caught.value).startswith(str(folder))


def test_an_even_stack_is_not_touched(tmp_path):
    pieces = series()

    assert np.array_equal(
        io.read(save(pieces, tmp_path / "s"), repair=True).data, truth(pieces).data
    )


@pytest.mark.parametrize("name", ["gantrytilting/001", "sliceincrement/001", "sliceincrement/002"])
def test_real_uneven_series_are_repaired(shared_data, name):
    """Where slices lie is taken from the headers: each slice's centre voxel is found again where it
    was.
    """
    import pydicom

    folder = shared_data / "dicom/failing" / name

    with pytest.warns(DataWarning, match="was repaired"):
        volume = io.read(folder, repair=True)

    to_voxel = np.linalg.inv(LPS @ volume.affine)
    for file in folder.iterdir():
        piece = pydicom.dcmread(file)
        along, down = np.reshape([float(x) for x in piece.ImageOrientationPatient], (2, 3))
        spacing = [float(x) for x in piece.PixelSpacing]
        values = piece.pixel_array.astype(float) * float(piece.RescaleSlope) + float(
            piece.RescaleIntercept
        )
        origin = np.array([float(x) for x in piece.ImagePositionPatient])
        index = []
        for row, column in ((200, 256), (256, 200), (300, 300)):
            world = origin + along * spacing[1] * column + down * spacing[0] * row
            index.append((to_voxel @ (*world, 1))[:3])
        places = np.array(index)
        k = places[:, 2]
        # The slices that are there lie on slices of the new grid.
        assert np.abs(k - np.rint(k)).max() < 2e-3
        for (row, column), (x, y, z) in zip(((200, 256), (256, 200), (300, 300)), places):
            block = values[row - 2 : row + 3, column - 2 : column + 3]
            i, j = round(x), round(y)
            found = volume.data[i - 1 : i + 2, j - 1 : j + 2, round(z)].astype(float)
            assert block.min() - 1 <= found.mean() <= block.max() + 1


def test_a_missing_slice_of_a_tilted_series_agrees_with_another_program(shared_data):
    """dicom2nifti resampled sliceincrement/002 itself, on a grid of its own; compared where both
    know the scan.
    """
    path = shared_data / "dicom/failing/sliceincrement/002_ground_truth.nii.gz"
    image = nib.load(path)
    other = reorient(Volume(np.asanyarray(image.dataobj), image.affine))

    with pytest.warns(DataWarning):
        volume = reorient(io.read(shared_data / "dicom/failing/sliceincrement/002", repair=True))

    assert np.allclose(volume.spacing_mm[:2], other.spacing_mm[:2], atol=1e-3)
