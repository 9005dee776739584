"""DICOM segmentations of others: right to the voxel, or refused with the reason."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from making import dicom as make
from making.dicom_labels import TABLE, phantom, source
from making.fuzzing import mutated
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom import result
from medseg.io.dicom.result import DicomOptions
from medseg.io.dicom.seg import read_segments
from medseg.volume import Volume, grid_distance_mm, reorient, same_grid


def by_highdicom(
    folder: Path, path: Path, pixels: np.ndarray, kind: str = "BINARY", **options: Any
) -> Path:
    """A segmentation of stacked masks (slices, rows, columns, segments) as highdicom writes it by
    itself.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    images = [pydicom.dcmread(file) for file in folder.iterdir()]
    images.sort(
        key=lambda image: float(make.OBLIQUE[:, 2] @ np.array(image.ImagePositionPatient, float))
    )
    descriptions = [
        hd.seg.SegmentDescription(
            n + 1, f"segment {n + 1}", codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL"
        )
        for n in range(pixels.shape[3])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = hd.seg.Segmentation(
            images, pixels, kind, descriptions, pydicom.uid.generate_uid(), 1,
            pydicom.uid.generate_uid(), 1, "m", "m",
            "1", "1", **options,
        )  # fmt: skip
    made.save_as(path)
    return path


def masks(grid: Volume, *values: tuple[slice, slice, slice]) -> np.ndarray:
    out = np.zeros((*grid.shape[::-1], len(values)), np.uint8)
    for n, place in enumerate(values):
        out[(*place, n)] = 1
    return out


BOXES = (slice(1, 5), slice(2, 9), slice(3, 7)), (slice(2, 4), slice(5, 12), slice(6, 10))


def test_segments_that_overlap_are_refused_with_their_count_unless_chosen(tmp_path):
    folder, grid = source(tmp_path / "scan")
    stacked = masks(grid, *BOXES)
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)
    shared = int((stacked.sum(axis=3) > 1).sum())

    with pytest.raises(BadFile, match=f"{shared} voxels belong to more than one"):
        io.read(path)

    for n, (label, mask) in enumerate(read_segments(path)):
        assert (label.value, label.name) == (n + 1, f"segment {n + 1}")
        whole = np.zeros(grid.shape, np.uint8)
        whole[..., 1:5] = mask.data  # the slices without a frame at the ends are not in the file
        assert np.array_equal(whole, stacked[..., n].T)
    first = io.read_labels(path, segments=["segment 2", "1"]).data
    assert np.array_equal(first, np.where(stacked[1:5, ..., 0], 1, 2 * stacked[1:5, ..., 1]).T)
    last = io.read_labels(path, segments=["1", "2"], source=folder)
    assert np.array_equal(last.data, np.where(stacked[..., 1], 2, stacked[..., 0]).T)
    assert same_grid(last, grid)
    with pytest.raises(BadFile, match="no segment 'liver'"):
        io.read(path, segments=["liver"])


def test_slices_without_frames_are_background_and_the_rest_keeps_its_place(tmp_path):
    folder, grid = source(tmp_path / "scan", count=9)
    stacked = np.zeros((9, 13, 11, 1), np.uint8)
    # Three slices, three apart: only the spacing that the file gives tells.
    stacked[[1, 4, 7], 5, 6] = 1

    found = io.read_labels(by_highdicom(folder, tmp_path / "x.dcm", stacked))

    assert np.argwhere(found.data).tolist() == [[6, 5, 0], [6, 5, 3], [6, 5, 6]]
    for k, kk in ((0, 1), (3, 4), (6, 7)):
        place = (found.affine @ (6, 5, k, 1))[:3]
        assert np.allclose(place, (grid.affine @ (6, 5, kk, 1))[:3], atol=1e-4)


def test_without_a_spacing_that_fits_the_frames_give_it(tmp_path):
    folder, grid = source(tmp_path / "scan")
    stacked = masks(grid, BOXES[0])
    for value in ("", "0.7", "-1"):
        dataset = pydicom.dcmread(by_highdicom(folder, tmp_path / "x.dcm", stacked))
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[
            0
        ].SpacingBetweenSlices = value
        dataset.save_as(tmp_path / "x.dcm")

        found = io.read(tmp_path / "x.dcm")

        assert np.array_equal(found.data, stacked[1:5, ..., 0].T)
        assert found.spacing_mm == pytest.approx(grid.spacing_mm, abs=1e-4)


def without(path: Path, *tags: str, **values: object) -> Path:
    """A segmentation without some of its pixel measures, and with others."""
    dataset = pydicom.dcmread(path)
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    for tag in tags:
        if tag in measures:
            delattr(measures, tag)
    for tag, value in values.items():
        setattr(measures, tag, value)
    dataset.save_as(path)
    return path


#: Slices with a frame, of a scan with 2.5 mm between slices that are 2.5 mm thick.
SPARSE = {
    "two far apart": [2, 6],
    "every second": [1, 3, 5, 7],
    "uneven": [0, 3, 8],
    "two pairs": [1, 2, 7, 8],
}


@pytest.mark.parametrize("here", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize(
    "lacking", [(), ("SpacingBetweenSlices",), ("SpacingBetweenSlices", "SliceThickness")]
)
def test_frames_on_distant_slices_lie_where_they_are_or_ask_for_the_images(tmp_path, here, lacking):
    """The gap between two frames is one slice or several; with the images nothing has to be known
    of it.
    """
    folder, grid = source(tmp_path / "scan", count=9)
    stacked = np.zeros((9, 13, 11, 1), np.uint8)
    stacked[here, 5:8, 6:9] = 1
    path = without(by_highdicom(folder, tmp_path / "x.dcm", stacked), *lacking)

    on_images = io.read(path, source=folder)

    assert np.array_equal(on_images.data, stacked[..., 0].T) and same_grid(on_images, grid)
    neighbours = 1 in np.diff(here)
    if not lacking or (neighbours and len(lacking) == 1):
        found = io.read(path)
        assert found.spacing_mm == pytest.approx(grid.spacing_mm, abs=1e-4)
        assert np.array_equal(found.data, stacked[here[0] : here[-1] + 1, ..., 0].T)
    else:
        with pytest.raises(BadFile, match="--source"):
            io.read(path)
        with pytest.raises(BadFile, match="--source"):
            read_segments(path)


@pytest.mark.parametrize(
    ("thickness", "right"),
    [("2.5", True), ("2.3", True), ("5", True), ("2", False), ("1.25", False)],
)
def test_neighbouring_frames_give_the_distance_only_where_they_touch(tmp_path, thickness, right):
    folder, grid = source(tmp_path / "scan", count=9)
    stacked = masks(grid, BOXES[0])
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)
    without(path, "SpacingBetweenSlices", SliceThickness=thickness)

    if not right:
        with pytest.raises(BadFile, match=r"does not say how far its slices lie apart.*--source"):
            io.read(path)
        return
    assert io.read(path).spacing_mm == pytest.approx(grid.spacing_mm, abs=1e-4)


def test_a_rounded_distance_that_adds_up_is_confirmed_by_the_frames(tmp_path):
    folder, grid = source(tmp_path / "scan", count=60)
    stacked = masks(grid, (slice(0, 60), slice(2, 9), slice(3, 7)))
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)

    found = io.read(without(path, "SliceThickness", SpacingBetweenSlices="2.51"))

    assert (
        found.spacing_mm == pytest.approx(grid.spacing_mm, abs=1e-4) and found.shape == grid.shape
    )
    with pytest.raises(BadFile, match="--source"):
        io.read(without(path, "SliceThickness", SpacingBetweenSlices="2.56"))


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_frames_beyond_the_images_are_left_out_with_a_warning(tmp_path, seg_type):
    folder, grid = source(tmp_path / "scan", count=9)
    labels = phantom(grid)
    io.write(
        labels,
        tmp_path / "x.dcm",
        table=TABLE,
        source=folder,
        options=DicomOptions(seg_type=seg_type),
    )
    fewer = cropped(folder, tmp_path / "fewer", 2, 7)

    with pytest.warns(DataWarning, match="labelled pixels beyond the images, left out") as caught:
        found = io.read(tmp_path / "x.dcm", source=fewer)

    assert np.array_equal(found.data, labels.data[..., 2:7])
    lost = np.count_nonzero(labels.data) - np.count_nonzero(found.data)
    assert str(caught[0].message).endswith(f": {lost}")
    assert np.allclose(found.affine[:3, 3], (grid.affine @ (0, 0, 2, 1))[:3], atol=1e-4)


def cropped(folder: Path, target: Path, start: int, stop: int) -> Path:
    """Some slices of a series, in order along the normal."""
    target.mkdir()
    files = sorted(folder.iterdir(), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))
    for file in files[start:stop]:
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_segmentation_wholly_beyond_the_images_or_between_their_slices_is_refused(tmp_path):
    folder, _ = source(tmp_path / "scan", count=9)
    stacked = np.zeros((9, 13, 11, 1), np.uint8)
    stacked[[0, 1], 5, 6] = 1
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)
    with pytest.raises(BadFile, match="beyond the images given with --source"):
        io.read(path, source=cropped(folder, tmp_path / "fewer", 4, 9))

    dataset = pydicom.dcmread(path)
    for n, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        frame.PlanePositionSequence[0].ImagePositionPatient = make.place(2.5 * (n + 1.4))
    dataset.save_as(path)
    with pytest.raises(BadFile, match=r"another grid|do not lie on slices"):
        io.read(path, source=folder)


@pytest.mark.parametrize("flips", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("swap", [False, True])
def test_frames_turned_against_the_images_are_put_on_them(tmp_path, flips, swap):
    """Frames may begin at another corner and run along the other axis; sparse ones and without a
    distance as well.
    """
    folder, grid = source(tmp_path / "scan", count=9, rows=13, columns=11)
    stacked = np.random.default_rng(1).integers(0, 2, (9, 13, 11, 1)).astype(np.uint8)
    stacked[[2, 3, 5, 6, 7]] = 0
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array
    along, down = make.OBLIQUE[:, 0] * 0.7, make.OBLIQUE[:, 1] * 0.9
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = np.array([float(x) for x in frame.PlanePositionSequence[0].ImagePositionPatient])
        position = position + along * 10 * flips[0] + down * 12 * flips[1]
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{x:.6f}" for x in position]
    axes = [
        make.OBLIQUE[:, 0] * (-1 if flips[0] else 1),
        make.OBLIQUE[:, 1] * (-1 if flips[1] else 1),
    ]
    pixels = pixels[:, :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    shared = dataset.SharedFunctionalGroupsSequence[0]
    if swap:
        axes, pixels = axes[::-1], pixels.transpose(0, 2, 1)
        dataset.Rows, dataset.Columns = dataset.Columns, dataset.Rows
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.7, 0.9]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [
        f"{x:.9f}" for axis in axes for x in axis
    ]
    dataset.PixelData = pydicom.pixels.pack_bits(np.ascontiguousarray(pixels), pad=True)
    dataset.save_as(path)
    without(path, "SpacingBetweenSlices")

    found = io.read(path, source=folder)

    assert np.array_equal(found.data, stacked[..., 0].T) and same_grid(found, grid)


def test_a_part_of_each_frame_is_put_where_it_was_cut_out(tmp_path):
    folder, grid = source(tmp_path / "scan", count=9, rows=13, columns=11)
    stacked = np.random.default_rng(1).integers(0, 2, (9, 13, 11, 1)).astype(np.uint8)
    path = by_highdicom(folder, tmp_path / "x.dcm", stacked)
    dataset = pydicom.dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = np.array([float(x) for x in frame.PlanePositionSequence[0].ImagePositionPatient])
        position = position + make.OBLIQUE @ (2 * 0.7, 3 * 0.9, 0)
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{x:.6f}" for x in position]
    pixels = np.ascontiguousarray(dataset.pixel_array[:, 3:10, 2:9])
    dataset.Rows, dataset.Columns = pixels.shape[1:]
    dataset.PixelData = pydicom.pixels.pack_bits(pixels, pad=True)
    dataset.save_as(path)

    found = io.read(path, source=folder)

    expected = np.zeros((9, 13, 11), np.uint8)
    expected[:, 3:10, 2:9] = stacked[:, 3:10, 2:9, 0]
    assert np.array_equal(found.data, expected.T) and same_grid(found, grid)


def test_the_source_of_a_segmentation_may_need_a_choice_or_a_repair(tmp_path):
    folder, grid = source(tmp_path / "scan", count=9)
    stacked = np.zeros((9, 13, 11, 1), np.uint8)
    stacked[[2, 7], 5, 6] = 1
    path = without(by_highdicom(folder, tmp_path / "x.dcm", stacked), "SpacingBetweenSlices")
    gap = cropped(folder, tmp_path / "gap", 0, 9)
    sorted(gap.iterdir(), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))[4].unlink()

    with pytest.raises(BadFile, match=r"1 slices are missing.*--repair"):
        io.read(path, source=gap)
    with pytest.warns(DataWarning, match="was repaired"):
        found = io.read(path, source=gap, repair=True)
    assert np.array_equal(found.data, stacked[..., 0].T) and same_grid(found, grid)

    source(tmp_path / "both" / "other", SeriesNumber=1)
    (tmp_path / "both" / "scan").symlink_to(folder)
    for file in folder.iterdir():
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadFile, match="choose one with --series"):
        io.read(path, source=tmp_path / "both")
    assert same_grid(io.read(path, source=tmp_path / "both", series="2"), grid)


def test_a_segmentation_of_another_frame_of_reference_is_warned_about(tmp_path):
    folder, grid = source(tmp_path / "scan", FrameOfReferenceUID="1.2.3.4")
    other, _ = source(tmp_path / "other", FrameOfReferenceUID="1.2.3.5")
    io.write(phantom(grid), tmp_path / "x.dcm", table=TABLE, source=folder)

    with pytest.warns(DataWarning, match="another frame of reference"):
        assert np.array_equal(io.read(tmp_path / "x.dcm", source=other).data, phantom(grid).data)


def test_a_segmentation_of_a_source_with_slices_stored_twice_can_be_written(tmp_path):
    folder, grid = source(tmp_path / "scan", count=8)
    labels = phantom(grid)
    files = sorted(folder.iterdir(), key=lambda f: -int(pydicom.dcmread(f).InstanceNumber))
    gap = cropped(folder, tmp_path / "gap", 0, 8)
    (gap / files[4].name).unlink()
    (folder / "again.dcm").write_bytes(files[2].read_bytes())

    with pytest.raises(BadFile, match="same place"):
        io.write(labels, tmp_path / "y.dcm", source=folder)
    io.write(labels, tmp_path / "y.dcm", source=folder, options=DicomOptions(repair=True))

    with pytest.warns(DataWarning, match="was repaired: 1 slices stored twice"):
        found = io.read(tmp_path / "y.dcm", source=folder, repair=True)
    assert np.array_equal(found.data, labels.data)
    with pytest.raises(BadFile, match="none of its images'"):
        io.write(labels, tmp_path / "z.dcm", source=gap, options=DicomOptions(repair=True))
    assert not (tmp_path / "z.dcm").exists()


def test_a_segmentation_can_refer_to_frames_of_one_file_of_a_classic_class(tmp_path):
    whole = make.enhanced([make.series(6, 8, 8)], make.CT)
    whole.StudyInstanceUID, whole.Modality = "1.2.3.4", "CT"
    path = tmp_path / "x.dcm"
    whole.save_as(path, enforce_file_format=True)
    scan = io.read(path)
    labels = scan.with_data((scan.data > 200).astype(np.uint8))

    io.write(labels, tmp_path / "y.seg.dcm", source=path)

    assert np.array_equal(io.read_labels(tmp_path / "y.seg.dcm", source=path).data, labels.data)


def test_the_case_of_a_sparse_segmentation(shared_data):
    folder = shared_data / "cases/files/seg-sparse-no-spacing"
    expected = io.read_labels(folder / "expected_on_source.nii.gz")

    found = io.read(folder / "seg.dcm", source=folder / "ct")

    found = reorient(found, expected.orientation)
    assert np.array_equal(found.data, expected.data) and grid_distance_mm(found, expected) < 1e-3
    with pytest.raises(BadFile, match="--source"):
        io.read(folder / "seg.dcm")


def test_fractions_of_at_least_one_half_become_labels_with_a_warning(tmp_path):
    folder, grid = source(tmp_path / "scan")
    fractions = np.linspace(0, 1, 6 * 13 * 11).reshape(6, 13, 11, 1).astype(np.float32)
    path = by_highdicom(
        folder, tmp_path / "x.dcm", fractions, "FRACTIONAL", max_fractional_value=200
    )

    with pytest.warns(DataWarning, match="fractional"):
        found = io.read(path)

    expected = np.rint(fractions[..., 0] * 200).T >= 100
    whole = np.zeros(grid.shape, bool)
    whole[..., -found.shape[2] :] = found.data > 0
    assert np.array_equal(whole, expected)


def test_frames_in_any_order_and_a_compressed_label_map(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    for seg_type in ("binary", "labelmap"):
        path = tmp_path / "x.dcm"
        io.write(labels, path, table=TABLE, source=folder, options=DicomOptions(seg_type=seg_type))
        dataset = pydicom.dcmread(path)
        frames = list(dataset.PerFrameFunctionalGroupsSequence)
        order = random.Random(5).sample(range(len(frames)), len(frames))
        pixels = dataset.pixel_array[order]
        dataset.PerFrameFunctionalGroupsSequence = [frames[n] for n in order]
        if seg_type == "binary":
            dataset.PixelData = pydicom.pixels.pack_bits(pixels, pad=True)
        else:
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            dataset.PixelData = pixels.tobytes()
            dataset["PixelData"].VR = "OW"
            dataset["PixelData"].is_undefined_length = False
        dataset.save_as(path)

        assert np.array_equal(io.read(path).data, labels.data)


Change = Any


def changed(**tags: object) -> Change:
    def change(dataset: pydicom.Dataset) -> None:
        for name, value in tags.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return change


def in_frame(n: int, group: str, **tags: object) -> Change:
    def change(dataset: pydicom.Dataset) -> None:
        for name, value in tags.items():
            setattr(dataset.PerFrameFunctionalGroupsSequence[n][group].value[0], name, value)

    return change


def in_segment(n: int, **tags: object) -> Change:
    def change(dataset: pydicom.Dataset) -> None:
        for name, value in tags.items():
            setattr(dataset.SegmentSequence[n], name, value)

    return change


@pytest.mark.parametrize(
    ("seg_type", "change", "reason"),
    [
        ("binary", changed(NumberOfFrames=99), "where its frames lie"),
        ("binary", changed(PerFrameFunctionalGroupsSequence=None), "where its frames lie"),
        ("binary", changed(SharedFunctionalGroupsSequence=None), "damaged"),
        ("binary", changed(SegmentSequence=None), "damaged"),
        ("binary", changed(SegmentSequence=[]), "same number|it has none"),
        ("binary", changed(Rows=60000, Columns=60000), "too short|claims|too far"),
        ("binary", changed(PixelData=b"\0\0"), "too short"),
        ("binary", changed(PixelData=None), "damaged"),
        ("binary", changed(BitsAllocated=32), "stored in a way"),
        ("binary", changed(SegmentationType="PAINTED"), "does not know"),
        ("binary", changed(Rows=0), "axis"),
        (
            "binary",
            in_frame(0, "PlanePositionSequence", ImagePositionPatient=[0, 0, 1e9]),
            "apart|distances|straight",
        ),
        (
            "binary",
            in_frame(1, "PlanePositionSequence", ImagePositionPatient=[5, 5, 5]),
            "distances|straight",
        ),
        (
            "binary",
            in_frame(1, "PlanePositionSequence", ImagePositionPatient=[]),
            "patient's space",
        ),
        (
            "binary",
            in_frame(0, "SegmentIdentificationSequence", ReferencedSegmentNumber=9),
            "does not describe",
        ),
        ("binary", in_segment(1, SegmentNumber=1), "same number"),
        ("binary", in_segment(0, SegmentNumber=0, SegmentDescription=""), "not describe|between 1"),
        ("labelmap", in_segment(1, SegmentNumber=77), "does not name"),
        ("labelmap", changed(PixelPaddingValue=5), None),
        ("labelmap", changed(PerFrameFunctionalGroupsSequence=None), "where its frames lie"),
        ("labelmap", changed(Rows=14), "damaged|too short"),
        ("labelmap", in_segment(0, SegmentedPropertyTypeCodeSequence=[]), None),
    ],
)
def test_a_segmentation_that_is_not_sure_is_refused(tmp_path, seg_type, change, reason):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.dcm"
    labels = phantom(grid)
    io.write(labels, path, table=TABLE, source=folder, options=DicomOptions(seg_type=seg_type))
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)

    # 5 then is the background, or the background has no code: both are no structure.
    if reason is None:
        found = io.read(path).data
        assert np.array_equal(found, labels.data) or np.array_equal(
            found, np.where(labels.data == 5, 0, labels.data)
        )
        return
    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert make.NAME not in str(caught.value)


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_mutations_raise_only_bad_file(tmp_path, seg_type):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.dcm"
    io.write(
        phantom(grid), path, table=TABLE, source=folder, options=DicomOptions(seg_type=seg_type)
    )
    if seg_type == "labelmap":  # decoded, so that not every case waits for a decoder
        dataset = pydicom.dcmread(path)
        dataset.decompress()
        dataset.save_as(path)
    content, chance, refused = path.read_bytes(), random.Random(7), 0

    for _ in range(120):
        path.write_bytes(mutated(content, chance, len(content)))
        with warnings.catch_warnings():
            # Pydicom's warnings quote the header, so none may come through.
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DataWarning)
            try:
                io.read(path)
                io.embedded_table(path)
            except BadFile as error:
                refused += 1
                assert make.NAME not in str(error)

    assert refused > 10


def test_a_truncated_file_is_refused(tmp_path):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.dcm"
    io.write(phantom(grid), path, table=TABLE, source=folder)
    content = path.read_bytes()
    for keep in (140, 400, 2000, len(content) // 2, len(content) - 8):
        path.write_bytes(content[:keep])
        with pytest.raises(BadFile):
            io.read(path)


def test_other_names_and_other_objects(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    io.write(labels, tmp_path / "x.dcm", table=TABLE, source=folder)
    (tmp_path / "label.seg").write_bytes((tmp_path / "x.dcm").read_bytes())
    (tmp_path / "NONAME").write_bytes((tmp_path / "x.dcm").read_bytes())
    (tmp_path / "old.img").write_bytes((tmp_path / "x.dcm").read_bytes())

    for name in ("label.seg", "NONAME", "old.img"):
        assert io.label_kind(tmp_path / name) == "SEG"
        assert np.array_equal(io.read_labels(tmp_path / name).data, labels.data)
    assert io.label_kind(folder) == io.label_kind(next(folder.iterdir())) == ""
    with pytest.raises(BadFile, match="--segment"):
        io.read(folder, segments=["1"])


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_native_transfer_syntaxes(tmp_path, syntax, seg_type):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    path = tmp_path / "x.dcm"
    io.write(labels, path, source=folder, options=DicomOptions(seg_type=seg_type))
    dataset = pydicom.dcmread(path)
    if seg_type == "labelmap":
        dataset.decompress()
    path.write_bytes(make.rewritten(dataset, syntax))

    assert np.array_equal(io.read_labels(path, source=folder).data, labels.data)


def test_deflated_contours_are_read_within_a_limit(tmp_path, monkeypatch):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.rtstruct.dcm"
    io.write(phantom(grid), path, source=folder)
    right = io.read_labels(path, source=folder).data
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)

    assert np.array_equal(io.read_labels(path, source=folder).data, right)
    monkeypatch.setattr(result, "MAX_OBJECT_BYTES", 1000)
    with pytest.raises(BadFile, match="unpacks to more"):
        io.read_labels(path, source=folder)


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
@pytest.mark.parametrize("cut", ["no preamble", "no header", "no class"])
def test_labels_without_what_should_stand_before_them_are_read(tmp_path, suffix, cut):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    path = tmp_path / f"x{suffix}"
    io.write(labels, path, table=TABLE, source=folder)
    if cut == "no class":
        dataset = pydicom.dcmread(path)
        del dataset.file_meta.MediaStorageSOPClassUID
        dataset.save_as(path)
    else:
        length = int(pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength)
        path.write_bytes(path.read_bytes()[132 if cut == "no preamble" else 144 + length :])

    assert io.label_kind(path)
    assert np.array_equal(io.read_labels(path, source=folder).data, labels.data)


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
def test_a_folder_of_labels_alone_is_told_from_one_of_images(tmp_path, suffix):
    folder, grid = source(tmp_path / "scan")
    (tmp_path / "results").mkdir()
    io.write(phantom(grid), tmp_path / "results" / f"x{suffix}", source=folder)

    with pytest.raises(BadFile, match=r"if this file itself is given|name of its own file"):
        io.read(tmp_path / "results")


PAIRS = {
    "liver.dcm": "liver_seg.nrrd",
    "sparse-labelmap-noppv.dcm": "sparse_labelmap_noppv_seg.nrrd",
    "sparse-labelmap-ppv5.dcm": "sparse_labelmap_ppv5_seg.nrrd",
    "23x38x3/seg/label.seg": "23x38x3/nrrd/label.nrrd",
    "24x38x3/seg/label.seg": "24x38x3/nrrd/label.nrrd",
}


@pytest.mark.parametrize("name", PAIRS)
def test_real_segmentations_equal_the_volumes_beside_them(shared_data, name):
    expected = io.read_labels(shared_data / "dicom_seg" / PAIRS[name])
    # dcmqi shows the padding value, 5, where there is no frame; PS3.3 C.8.20.2.4: it is background
    if "ppv5" in name:
        expected = expected.with_data(
            np.where(expected.data == 5, 0, expected.data).astype(np.uint8)
        )

    found = io.read(shared_data / "dicom_seg" / name)

    assert np.array_equal(found.data, reorient(expected, found.orientation).data)
    assert grid_distance_mm(found, reorient(expected, found.orientation)) < 1e-4


def test_real_segments_that_overlap_equal_the_volumes_beside_them(shared_data):
    found = {
        label.value: mask
        for label, mask in read_segments(shared_data / "dicom_seg/partial_overlaps.dcm")
    }
    for number in (1, 2, 3):
        layer = io.read_labels(shared_data / f"dicom_seg/partial_overlaps-{number}.nrrd")
        for value in set(np.unique(layer.data).tolist()) - {0}:
            assert np.array_equal(found.pop(value).data > 0, layer.data == value)
    assert not found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("partial_overlaps.dcm", "more than one"),
        ("highdicom/seg_image_ct_binary_overlap.dcm", "more than one"),
        ("highdicom/seg_image_cr_binary.dcm", "patient's space"),
        ("highdicom/seg_image_sm_dots.dcm", "patient's space"),
        ("highdicom/seg_image_sm_dots_tiled_full.dcm", "tiled"),
        ("highdicom/seg_image_sm_control_labelmap_palette_color.dcm", "patient's space"),
    ],
)
def test_real_segmentations_that_are_no_label_map_are_refused(shared_data, name, reason):
    with pytest.raises(BadFile, match=reason):
        io.read(shared_data / "dicom_seg" / name)
