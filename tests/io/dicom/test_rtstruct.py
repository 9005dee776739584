"""Structure sets: outlines with every kind of hole, and contours of others read as the standard
says.
"""

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
    """How often a closed polygon goes around every pixel's centre, by the angles its corners are
    seen under.
    """
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


def structure_set(
    folder: Path, path: Path, *contours: np.ndarray, kind: str = "CLOSED_PLANAR"
) -> Path:
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
        folder,
        tmp_path / "x.rtstruct.dcm",
        box(1.6, 8.4),
        box(3.4, 6.6),
        box(4.6, 5.4),
        box(1, 3, k=4),
        kind=kind,
    )

    found = io.read_labels(path, source=folder).data

    expected = np.zeros(grid.shape, int)
    expected[2:9, 2:9, 2] = 1
    expected[4:7, 4:7, 2] = 0
    expected[5, 5, 2] = 1
    # A centre on a contour counts where the inside is right of it or below.
    expected[1:3, 1:3, 4] = 1
    assert np.array_equal(found, expected)


def test_a_contour_that_is_stored_twice_counts_once_with_a_warning(tmp_path):
    folder, grid = source(tmp_path / "scan")
    outer = box(1.6, 8.4)
    copies = outer[::-1], np.roll(outer, 1, axis=0)
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", outer, box(3.4, 6.6), *copies)

    with pytest.warns(DataWarning, match="stored twice, counted once: 2"):
        found = io.read_labels(path, source=folder).data

    expected = np.zeros(grid.shape, int)
    expected[2:9, 2:9, 2] = 1
    expected[4:7, 4:7, 2] = 0
    assert np.array_equal(found, expected)


def test_contours_of_one_structure_in_several_items_are_all_filled(tmp_path):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(2, 5), box(2, 5, k=3))
    whole = io.read_labels(path, source=folder).data
    dataset = pydicom.dcmread(path)
    (roi,) = dataset.ROIContourSequence
    second = pydicom.Dataset()
    second.ReferencedROINumber = roi.ReferencedROINumber
    second.ContourSequence = [roi.ContourSequence.pop()]
    dataset.ROIContourSequence.append(second)
    dataset.save_as(path)

    assert np.array_equal(io.read_labels(path, source=folder).data, whole)


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


BEYOND = {
    "after": [6, 7, 8.3],
    "before": [-1, -2.5],
    "on both sides": [-1, 6, 1e4],
    "just beyond": [5.6],
}


@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND)
def test_contours_beyond_the_first_or_last_slice_are_left_out_with_a_warning(tmp_path, beyond):
    folder, grid = source(tmp_path / "scan")
    contours = [box(1.6, 4.4, k) for k in (0, 5, *beyond)]
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", *contours)

    with pytest.warns(
        DataWarning, match=f"beyond the first or the last image, left out: {len(beyond)}$"
    ):
        found = io.read_labels(path, source=folder).data
    with pytest.warns(DataWarning, match="left out"):
        ((_, mask),) = read_structures(path, source=folder)

    expected = np.zeros(grid.shape, int)
    expected[2:5, 2:5, [0, 5]] = 1
    assert np.array_equal(found, expected) and np.array_equal(mask.data, expected)


@pytest.mark.parametrize("k", [2.3, 5.4, -0.4])
def test_contours_between_slices_stay_refused_beside_others_that_lie_on_them(tmp_path, k):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(
        folder, tmp_path / "x.rtstruct.dcm", box(2, 4, 1), box(2, 4, 7), box(2, 4, k)
    )

    with pytest.raises(BadFile, match="do not lie on slices"):
        io.read_labels(path, source=folder)


def test_a_contour_that_leads_out_of_the_images_at_a_slant_is_refused(tmp_path):
    folder, _ = source(tmp_path / "scan")
    slanted = np.array([(2, 2, 5), (4, 2, 5), (4, 4, 7), (2, 4, 7)])
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(2, 4, 1), slanted)

    with pytest.raises(BadFile, match="do not lie on slices"):
        io.read_labels(path, source=folder)


@pytest.mark.parametrize("value", [None, ""])
def test_a_structure_that_names_no_frame_of_reference_is_not_of_another(tmp_path, value):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4))
    dataset = pydicom.dcmread(path)
    (roi,) = dataset.StructureSetROISequence
    if value is None:
        del roi.ReferencedFrameOfReferenceUID
    else:
        roi.ReferencedFrameOfReferenceUID = value
    dataset.save_as(path)

    assert io.read_labels(path, source=folder).data.sum() == 49


@pytest.mark.parametrize(("whole", "right"), [("1.2.3.4", False), ("", True), (None, True)])
def test_a_structure_that_names_no_frame_of_reference_is_in_that_of_the_set(tmp_path, whole, right):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4))
    dataset = pydicom.dcmread(path)
    del dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID
    if whole is None:
        del dataset.ReferencedFrameOfReferenceSequence
    else:
        dataset.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = whole
    dataset.save_as(path)

    if right:
        assert io.read_labels(path, source=folder).data.sum() == 49
        return
    with pytest.raises(BadFile, match="drawn in another frame of reference"):
        io.read_labels(path, source=folder)


def two_structures(path: Path, frame: str) -> None:
    """Add a structure of another frame of reference with the same contours to a set of one."""
    dataset = pydicom.dcmread(path)
    for name in ("StructureSetROISequence", "ROIContourSequence", "RTROIObservationsSequence"):
        items = dataset[name].value
        items.append(pydicom.dcmread(path)[name].value[0])
    dataset.StructureSetROISequence[1].ROINumber = 2
    dataset.StructureSetROISequence[1].ROIName = "other"
    dataset.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = frame
    dataset.ROIContourSequence[1].ReferencedROINumber = 2
    dataset.RTROIObservationsSequence[1].ReferencedROINumber = 2
    dataset.save_as(path)


def test_structures_of_another_frame_of_reference_are_not_put_on_these_images(tmp_path):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4))
    two_structures(path, "1.2.3.4")

    with pytest.raises(
        BadFile,
        match=r"in another frame of reference than the others.*--segment \(all but number 2\)",
    ):
        io.read_labels(path, source=folder)
    assert io.read_labels(path, source=folder, segments=["1"]).data.sum() == 49
    with pytest.raises(BadFile, match="was drawn in another frame of reference"):
        io.read_labels(path, source=folder, segments=["other"])


def test_the_images_of_a_structure_set_may_need_a_choice_or_a_repair(tmp_path):
    folder, grid = source(tmp_path / "scan", count=8)
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4), box(1.6, 8.4, 4))
    gap = tmp_path / "gap"
    gap.mkdir()
    files = sorted(folder.iterdir(), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))
    for file in files[:4] + files[5:]:
        (gap / file.name).write_bytes(file.read_bytes())

    with pytest.raises(BadFile, match=r"1 slices are missing.*--repair"):
        io.read(path, source=gap)
    with pytest.warns(DataWarning, match="was repaired"):
        found = io.read(path, source=gap, repair=True)
    expected = np.zeros(grid.shape, int)
    expected[2:9, 2:9, [2, 4]] = 1
    assert np.array_equal(found.data, expected) and grid_distance_mm(found, grid) < 1e-3

    both = tmp_path / "both"
    source(both, SeriesNumber=1, FrameOfReferenceUID="1.2.3.5")
    for n, file in enumerate(files):
        (both / f"a{n}.dcm").write_bytes(file.read_bytes())
    with pytest.raises(BadFile, match="choose one with --series"):
        io.read(path, source=both)
    assert np.array_equal(io.read(path, source=both, series="2").data, expected)


def test_the_images_of_a_structure_set_need_no_study(tmp_path):
    folder, _ = source(tmp_path / "scan")
    path = structure_set(folder, tmp_path / "x.rtstruct.dcm", box(1.6, 8.4))
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        del dataset.StudyInstanceUID
        dataset.save_as(file)

    assert io.read_labels(path, source=folder).data.sum() == 49


def test_the_case_of_contours_beyond_the_last_slice(shared_data):
    folder = shared_data / "cases/files/rtstruct-longer-than-scan"
    expected = io.read_labels(folder / "expected.nii.gz")

    with pytest.warns(DataWarning, match="left out: 3$"):
        found = io.read_labels(folder / "structures.dcm", source=folder / "ct")

    found = reorient(found, expected.orientation)
    assert np.array_equal(found.data, expected.data) and grid_distance_mm(found, expected) < 1e-3


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
    assert np.unique(
        io.read_labels(path, source=folder, segments=["1", "other"]).data
    ).tolist() == [0, 2]
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

    found = io.read_labels(
        folder / "dicom" / kind / "mask/RS.dcm", source=folder / "dicom" / kind / "image"
    )

    expected = reorient(expected, found.orientation)
    assert np.array_equal(found.data > 0, expected.data > 0)
    assert grid_distance_mm(found, expected) < 1e-3
