"""Structure sets: outlines with every kind of hole, and contours of others read as the standard says."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from scipy import ndimage

from making import dicom as make
from making.dicom_labels import TABLE, phantom, source
from making.fuzzing import mutated
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom.rtstruct import outlines, read_structures
from medseg.volume import grid_distance_mm, reorient


def filled(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a polygon, as matplotlib sees it (non-zero winding)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    points = np.stack([rows.ravel(), columns.ravel()], axis=1)
    return Polygon(np.concatenate([outline, outline[:1]])).contains_points(points).reshape(shape)


def winding(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often a closed polygon goes around every pixel's centre, by the angles its corners are seen under."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    seen = np.arctan2(outline[:, 0] - rows[..., None], outline[:, 1] - columns[..., None])
    turns = np.diff(np.concatenate([seen, seen[..., :1]], axis=-1), axis=-1)
    return np.rint(((turns + np.pi) % (2 * np.pi) - np.pi).sum(axis=-1) / (2 * np.pi)).astype(int)


def test_outlines_of_random_masks_hold_exactly_their_pixels_by_every_rule():
    chance = np.random.default_rng(0)
    holes = 0
    for number in range(250):
        shape = tuple(chance.integers(1, 16, 2))
        mask = chance.random(shape) < chance.choice([0.2, 0.5, 0.7, 0.9])
        if number % 3 == 0:
            mask = ndimage.gaussian_filter(chance.random((30, 25)), 2) > 0.5
        found = outlines(mask)

        assert len(found) == ndimage.label(mask)[1]
        union, parity = np.zeros(mask.shape, bool), np.zeros(mask.shape, int)
        for outline in found:
            around = winding(outline, mask.shape)
            assert set(np.unique(around)) <= {0, 1} or set(np.unique(around)) <= {0, -1}
            union |= filled(outline, mask.shape)
            parity += around
        assert np.array_equal(union, mask)  # union of filled polygons
        assert np.array_equal(parity % 2 == 1, mask)  # even-odd
        holes += ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))[1] - 1
    assert holes > 150


def test_the_outline_of_one_pixel_is_halfway_to_its_neighbours():
    (found,) = outlines(np.ones((1, 1), bool))

    assert {tuple(point) for point in found.tolist()} == {(0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5)}
    assert outlines(np.zeros((3, 3), bool)) == []


def structure_set(folder: Path, path: Path, *contours: np.ndarray, kind: str = "CLOSED_PLANAR") -> Path:
    """A structure set of one structure with contours given as (P, 3) voxels of the series."""
    grid = io.read(folder)
    data = np.zeros(grid.shape, np.uint8)
    data[4:6, 4:6, 2] = 1
    io.write(grid.with_data(data), path, source=folder)
    dataset = pydicom.dcmread(path)
    (roi,) = dataset.ROIContourSequence
    pattern, made = roi.ContourSequence[0], []
    for voxels in contours:
        points = np.array(voxels, float) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        contour = pydicom.Dataset()
        contour.ContourImageSequence = pattern.ContourImageSequence
        contour.ContourGeometricType = kind
        contour.NumberOfContourPoints = len(points)
        contour.ContourData = [f"{x:.6f}" for x in (points * (-1, -1, 1)).ravel()]
        made.append(contour)
    roi.ContourSequence = made
    dataset.save_as(path)
    return path


def box(low: float, high: float, k: float = 2) -> np.ndarray:
    return np.array([(low, low, k), (high, low, k), (high, high, k), (low, high, k)])


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_contours_inside_contours_are_holes_and_centres_decide(tmp_path, kind):
    folder, grid = source(tmp_path / "scan")
    path = structure_set(
        folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4), box(3.4, 6.6), box(4.6, 5.4), box(1, 3, k=4), kind=kind
    )

    found = io.read_labels(path, source=folder).data

    expected = np.zeros(grid.shape, int)
    expected[2:9, 2:9, 2] = 1
    expected[4:7, 4:7, 2] = 0
    expected[5, 5, 2] = 1
    expected[1:3, 1:3, 4] = 1  # a centre on a contour counts where the inside is right of it or below
    assert np.array_equal(found, expected)


def test_contours_beyond_the_images_are_cut_off_with_a_warning(tmp_path):
    folder, grid = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(-30, 4.4), box(-30, 400, k=3))

    with pytest.warns(DataWarning, match="beyond the images.*: 2"):
        found = io.read_labels(path, source=folder).data

    expected = np.zeros(grid.shape, int)
    expected[:5, :5, 2] = 1
    expected[..., 3] = 1
    assert np.array_equal(found, expected)


def test_open_contours_and_points_are_passed_over_with_a_warning(tmp_path):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(2, 4), kind="OPEN_PLANAR")

    with pytest.warns(DataWarning, match="enclose nothing: 1"):
        assert not io.read_labels(path, source=folder).data.any()


@pytest.mark.parametrize("k", [2.3, -1, 6, 1e5])
def test_contours_off_the_slices_are_refused(tmp_path, k):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(2, 4, k))

    with pytest.raises(BadFile, match="do not lie on slices"):
        io.read_labels(path, source=folder)


def test_a_structure_set_needs_the_series_it_was_drawn_on(tmp_path):
    folder, grid = source(tmp_path / "scan")
    other, _ = source(tmp_path / "other", FrameOfReferenceUID="1.2.3.4.5")
    io.write(phantom(grid), tmp_path / "x.rtstruct.dcm", table=TABLE, source=folder)

    with pytest.raises(BadFile, match="--source"):
        io.read_labels(tmp_path / "x.rtstruct.dcm")
    with pytest.raises(BadFile, match="another frame of reference"):
        io.read_labels(tmp_path / "x.rtstruct.dcm", source=other)
    with pytest.raises(BadFile, match=r"no such|empty"):
        io.read_labels(tmp_path / "x.rtstruct.dcm", source=tmp_path / "nowhere")


def test_structures_that_overlap_are_refused_unless_chosen(tmp_path):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.5, 6.5))
    dataset = pydicom.dcmread(path)
    for name in ("StructureSetROISequence", "ROIContourSequence", "RTROIObservationsSequence"):
        items = dataset[name].value
        items.append(pydicom.dcmread(path)[name].value[0])
    dataset.StructureSetROISequence[1].ROINumber = 70000
    dataset.StructureSetROISequence[1].ROIName = "other"
    dataset.ROIContourSequence[1].ReferencedROINumber = 70000
    dataset.RTROIObservationsSequence[1].ReferencedROINumber = 70000
    dataset.save_as(path)

    with pytest.raises(BadFile, match="25 voxels belong to more than one"):
        io.read_labels(path, source=folder)

    assert io.embedded_table(path).names == {1: "label 1", 2: "other"}  # no label can be 70000
    assert np.unique(io.read_labels(path, source=folder, segments=["1", "other"]).data).tolist() == [0, 2]
    assert [mask.data.sum() for _, mask in read_structures(path, source=folder)] == [25, 25]


def test_mutations_raise_only_bad_file(tmp_path):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.rtstruct.dcm"
    io.write(phantom(grid), path, table=TABLE, source=folder)
    content, chance, refused = path.read_bytes(), random.Random(8), 0

    for _ in range(120):
        path.write_bytes(mutated(content, chance, len(content)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DataWarning)
            try:
                io.read_labels(path, source=folder)
                io.embedded_table(path)
            except BadFile as error:
                refused += 1
                assert make.NAME not in str(error)

    assert refused > 10


@pytest.mark.parametrize("patient", ["STS_002", "STS_012"])
@pytest.mark.parametrize("kind", ["CT", "PET", "MR_T1"])
def test_real_structure_sets_equal_the_masks_beside_them(shared_data, patient, kind):
    folder = shared_data / "rtstruct" / patient
    expected = io.read_labels(folder / "nifti" / f"{kind}_mask.nii.gz")

    found = io.read_labels(folder / "dicom" / kind / "mask/RS.dcm", source=folder / "dicom" / kind / "image")

    expected = reorient(expected, found.orientation)
    assert np.array_equal(found.data > 0, expected.data > 0)
    assert grid_distance_mm(found, expected) < 1e-3
