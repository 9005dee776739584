"""DICOM segmentations of others: right to the voxel, or refused with the reason."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from making import dicom as make
from making.dicom_labels import TABLE, phantom, source
from making.fuzzing import mutated
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom.result import DicomOptions
from medseg.io.dicom.seg import read_segments
from medseg.volume import Volume, grid_distance_mm, reorient, same_grid


def by_highdicom(folder: Path, path: Path, pixels: np.ndarray, kind: str = "BINARY", **options: Any) -> Path:
    """A segmentation of stacked masks (slices, rows, columns, segments) as highdicom writes it by itself."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    images = [pydicom.dcmread(file) for file in folder.iterdir()]
    images.sort(key=lambda image: float(make.OBLIQUE[:, 2] @ np.array(image.ImagePositionPatient, float)))
    descriptions = [
        hd.seg.SegmentDescription(n + 1, f"segment {n + 1}", codes.SCT.Tissue, codes.SCT.Tissue, "MANUAL")
        for n in range(pixels.shape[3])
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = hd.seg.Segmentation(
            images, pixels, kind, descriptions, pydicom.uid.generate_uid(), 1, pydicom.uid.generate_uid(), 1, "m", "m",
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
    stacked[[1, 4, 7], 5, 6] = 1  # three slices, three apart: only the spacing that the file gives tells

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
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = value
        dataset.save_as(tmp_path / "x.dcm")

        found = io.read(tmp_path / "x.dcm")

        assert np.array_equal(found.data, stacked[1:5, ..., 0].T)
        assert found.spacing_mm == pytest.approx(grid.spacing_mm, abs=1e-4)


def test_fractions_of_at_least_one_half_become_labels_with_a_warning(tmp_path):
    folder, grid = source(tmp_path / "scan")
    fractions = np.linspace(0, 1, 6 * 13 * 11).reshape(6, 13, 11, 1).astype(np.float32)
    path = by_highdicom(folder, tmp_path / "x.dcm", fractions, "FRACTIONAL", max_fractional_value=200)

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
        ("binary", in_frame(0, "PlanePositionSequence", ImagePositionPatient=[0, 0, 1e9]), "apart|distances|straight"),
        ("binary", in_frame(1, "PlanePositionSequence", ImagePositionPatient=[5, 5, 5]), "distances|straight"),
        ("binary", in_frame(1, "PlanePositionSequence", ImagePositionPatient=[]), "patient's space"),
        ("binary", in_frame(0, "SegmentIdentificationSequence", ReferencedSegmentNumber=9), "does not describe"),
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

    if reason is None:  # 5 then is the background, or the background has no code: both are no structure
        found = io.read(path).data
        assert np.array_equal(found, labels.data) or np.array_equal(found, np.where(labels.data == 5, 0, labels.data))
        return
    with pytest.raises(BadFile, match=reason) as caught:
        io.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert make.NAME not in str(caught.value)


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_mutations_raise_only_bad_file(tmp_path, seg_type):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / "x.dcm"
    io.write(phantom(grid), path, table=TABLE, source=folder, options=DicomOptions(seg_type=seg_type))
    if seg_type == "labelmap":  # decoded, so that not every case waits for a decoder
        dataset = pydicom.dcmread(path)
        dataset.decompress()
        dataset.save_as(path)
    content, chance, refused = path.read_bytes(), random.Random(7), 0

    for _ in range(120):
        path.write_bytes(mutated(content, chance, len(content)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydicom's warnings quote the header, so none may come through
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

    for name in ("label.seg", "NONAME"):
        assert io.label_kind(tmp_path / name) == "SEG"
        assert np.array_equal(io.read_labels(tmp_path / name).data, labels.data)
    assert io.label_kind(folder) == io.label_kind(next(folder.iterdir())) == ""
    with pytest.raises(BadFile, match="--segment"):
        io.read(folder, segments=["1"])


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
    if "ppv5" in name:  # dcmqi shows the padding value, 5, where there is no frame; PS3.3 C.8.20.2.4: it is background
        expected = expected.with_data(np.where(expected.data == 5, 0, expected.data).astype(np.uint8))

    found = io.read(shared_data / "dicom_seg" / name)

    assert np.array_equal(found.data, reorient(expected, found.orientation).data)
    assert grid_distance_mm(found, reorient(expected, found.orientation)) < 1e-4


def test_real_segments_that_overlap_equal_the_volumes_beside_them(shared_data):
    found = {label.value: mask for label, mask in read_segments(shared_data / "dicom_seg/partial_overlaps.dcm")}
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
