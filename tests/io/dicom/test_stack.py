"""One stack is one volume: what may differ from slice to slice, what may not, and what is a volume
of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from making.dicom import (
    CT,
    ENHANCED_MR,
    MR,
    OBLIQUE,
    another,
    as_mr,
    change,
    enhanced,
    item,
    place,
    save,
    series,
    truth,
)  # fmt: skip
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.io.dicom import volumes as dicom
from medseg.io.dicom.result import open_origin
from medseg.volume import LPS, Volume, grid_distance_mm, reorient

CAPTURE, CAPTURES = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.3"
XRAY_3D = [f"1.2.840.10008.5.1.4.1.1.13.1.{n}" for n in (1, 2, 3)]


def read(path: Path, **options: object) -> tuple[Volume, list[str]]:
    """A volume, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        volume = io.read(path, **options)
    return volume, [str(warning.message) for warning in caught]


def read_all(path: Path) -> list[Volume]:
    """All volumes that are offered as readable."""
    return [read(path, series=one.number)[0] for one in io.list_volumes(path) if not one.problem]


def is_near(volume: Volume, pieces: list[Dataset], voxels: float = 0.1) -> bool:
    """Whether the voxels are those of slices, and no corner lies further off than a part of a
    voxel.
    """
    slices = [
        np.frombuffer(piece.PixelData, np.int16).reshape(piece.Rows, piece.Columns).T
        for piece in pieces
    ]
    expected = np.stack(slices, axis=2) + int(pieces[0].get("RescaleIntercept", 0))
    if not np.array_equal(volume.data, expected):
        return False
    return corners_off(volume, pieces) < voxels


def corners_off(volume: Volume, pieces: list[Dataset]) -> float:
    """How many voxels the corners of slices lie off those of a volume, by what each header itself
    says.
    """
    to_voxels = np.linalg.inv(LPS @ volume.affine)
    worst = 0.0
    for k, piece in enumerate(pieces):
        along, down = np.reshape([float(x) for x in piece.ImageOrientationPatient], (2, 3))
        start = np.array([float(x) for x in piece.ImagePositionPatient])
        for i in (0, piece.Columns - 1):
            for j in (0, piece.Rows - 1):
                there = (
                    start
                    + along * float(piece.PixelSpacing[1]) * i
                    + down * float(piece.PixelSpacing[0]) * j
                )
                worst = max(worst, float(np.abs((to_voxels @ (*there, 1))[:3] - (i, j, k)).max()))
    return worst


def turned(piece: Dataset, axis: int, radians: float, about_centre: bool = False) -> None:
    """Turn a slice of `series` about an axis of its own: 0 its rows, 1 its columns, 2 its
    normal.
    """
    one, two = (axis + 1) % 3, (axis + 2) % 3
    turn = np.eye(3)
    turn[[one, two], [one, two]] = np.cos(radians)
    turn[one, two], turn[two, one] = -np.sin(radians), np.sin(radians)
    spans = np.array([(piece.Columns - 1) * 0.7, (piece.Rows - 1) * 0.9, 0]) / 2
    if about_centre:
        start = np.array([float(x) for x in piece.ImagePositionPatient])
        start = start + OBLIQUE @ (spans - turn @ spans)
        piece.ImagePositionPatient = [f"{x:.9f}" for x in start]
    piece.ImageOrientationPatient = [f"{x:.9f}" for x in (OBLIQUE @ turn)[:, :2].T.ravel()]


def every_second(**values: tuple[object, object]) -> Callable[[list[Dataset]], None]:
    """Tags whose values take turns from slice to slice."""

    def spoil(pieces: list[Dataset]) -> None:
        for tag, two in values.items():
            for n, piece in enumerate(pieces):
                setattr(piece, tag, two[n % 2])

    return spoil


# --- How the numbers are packed


def packed(piece: Dataset, bits: int, stored: int, signed: bool) -> None:
    """Store the same values in another format."""
    values = np.frombuffer(piece.PixelData, np.int16)
    piece.PixelData = values.astype(f"{'i' if signed else 'u'}{bits // 8}").tobytes()
    piece.BitsAllocated, piece.BitsStored, piece.HighBit = bits, stored, stored - 1
    piece.PixelRepresentation = int(signed)


FORMATS = {
    "bits stored": [(16, 12, False), (16, 16, False), (16, 11, False)],
    "signs": [(16, 16, True), (16, 12, False)],
    "bytes": [(16, 12, False), (8, 8, False), (32, 32, True)],
    "all of them": [(8, 8, False), (16, 9, True), (32, 32, False), (16, 16, True), (16, 8, False)],
}


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("order", ["turns", "blocks", "ends"])
def test_slices_stored_in_different_formats_are_one_volume(tmp_path, formats, order):
    pieces = series(10)
    for n, piece in enumerate(pieces):
        values = np.random.default_rng(n).integers(0, 200, (4, 3)).astype(np.int16)
        piece.PixelData = values.tobytes()
    expected = truth(pieces)
    for n, piece in enumerate(pieces):
        which = {"turns": n, "blocks": n * len(formats) // 10, "ends": int(n in (0, 9))}[order]
        packed(piece, *formats[which % len(formats)])

    volume, said = read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, expected.data) and said == []
    assert np.allclose(volume.affine, expected.affine, atol=1e-6)
    assert len(io.list_volumes(tmp_path / "s")) == 1


def test_values_of_different_signs_and_the_largest_ones_survive_each_other(tmp_path):
    pieces = change(series(5), RescaleIntercept=0)
    stored = [np.array([[-32768, 32767, -1]] * 4), np.array([[0, 65535, 40000]] * 4)] * 2 + [
        np.array([[1, 2, 3]] * 4)
    ]
    for n, (piece, values) in enumerate(zip(pieces, stored)):
        piece.PixelRepresentation = int(n % 2 == 0)
        piece.PixelData = values.astype(np.int16 if n % 2 == 0 else np.uint16).tobytes()

    volume, _ = read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, np.stack([values.T for values in stored], axis=2))


def test_scales_and_padding_of_each_format_are_its_own(tmp_path):
    pieces = series(6)
    for n, piece in enumerate(pieces):
        values = np.random.default_rng(n).integers(1, 200, (4, 3))
        values[0, 0] = 255 if n % 2 else -2000
        piece.PixelData = values.astype(np.int16).tobytes()
        packed(piece, *((8, 8, False) if n % 2 else (16, 16, True)))
        piece.RescaleSlope, piece.RescaleIntercept = (2, -100) if n % 2 else (1, 0)
        piece.add_new("PixelPaddingValue", "US" if n % 2 else "SS", 255 if n % 2 else -2000)

    volume, _ = read(save(pieces, tmp_path / "s"))

    for n in range(6):
        values = np.random.default_rng(n).integers(1, 200, (4, 3)).T * (2 if n % 2 else 1) - (
            100 if n % 2 else 0
        )
        inside = np.ones((3, 4), bool)
        inside[0, 0] = False
        assert np.array_equal(volume.data[..., n][inside], values[inside])
    assert volume.data.min() > -200  # padding is the lowest value of the others


def test_inverted_values_in_different_formats_are_refused_by_name(tmp_path):
    pieces = change(series(8), PhotometricInterpretation="MONOCHROME1")
    every_second(BitsStored=(12, 13), HighBit=(11, 12))(pieces)

    with pytest.raises(BadFile, match=r"MONOCHROME1.*different pixel formats"):
        io.read(save(pieces, tmp_path / "s"))
    assert read_all(tmp_path / "s") == []


def test_two_complete_volumes_that_only_their_formats_tell_apart_stay_two(tmp_path):
    first = series(6)
    second = change(another(first, 3), BitsStored=15, HighBit=14)
    for one in (*first, *second):
        del one.InstanceNumber
    folder = save(first + second, tmp_path / "s")

    volumes = read_all(folder)

    assert len(volumes) == 2 and sum(is_near(volume, first) for volume in volumes) == 1
    with pytest.raises(BadFile, match="2 volumes of different pixel formats"):
        io.read(folder)


# --- Frames of reference


def test_a_frame_of_reference_that_some_slices_lack_is_that_of_all(tmp_path):
    for name, lacking in {
        "first": [0],
        "last": [9],
        "block": [0, 1, 2, 3, 4],
        "odd": [1, 3, 5, 7, 9],
    }.items():
        pieces = series(10)
        for n in lacking:
            pieces[n].FrameOfReferenceUID = ""
        if name == "last":
            del pieces[9].FrameOfReferenceUID
        pieces[0].Modality = "CT"

        volume, said = read(save(pieces, tmp_path / name))

        assert is_near(volume, pieces) and said == []  # an empty UID contradicts nothing
        origin = open_origin(tmp_path / name)
        named = next(
            piece.FrameOfReferenceUID for n, piece in enumerate(pieces) if n not in lacking
        )
        assert origin.frame_of_reference == named
        assert origin.has_frame_of_reference


def test_frames_of_reference_of_every_slice_are_passed_over_with_a_warning(tmp_path):
    pieces = as_mr(series(7))
    for piece in pieces:
        piece.FrameOfReferenceUID = generate_uid()
    pieces[3].FrameOfReferenceUID = ""

    volume, said = read(save(pieces, tmp_path / "s"))

    assert is_near(volume, pieces)
    assert (
        len(said) == 1
        and "Frame of Reference UID of its own" in said[0]
        and said[0].endswith(": 6")
    )
    with pytest.warns(DataWarning, match="has no frame of reference"):
        assert not open_origin(tmp_path / "s").has_frame_of_reference


SHARED = {
    "turns": [0, 1] * 5,
    "halves": [0] * 5 + [1] * 5,
    "one": [0] * 4 + [1] + [0] * 5,
    "pairs": [0, 0, 1, 1, 2] * 2,
}


@pytest.mark.parametrize("numbers", SHARED.values(), ids=SHARED)
def test_several_frames_of_reference_in_one_stack_are_refused_by_name_unless_repaired(
    tmp_path, numbers
):
    pieces = series(10)
    for piece, number in zip(pieces, numbers):
        piece.FrameOfReferenceUID = f"1.2.3.{number}"
    folder = save(pieces, tmp_path / "s")

    with pytest.raises(
        BadFile, match=r"different coordinate systems by their Frame of Reference UIDs.*--repair"
    ):
        io.read(folder)
    assert read_all(folder) == [] and len(io.list_volumes(folder)) == 1

    volume, said = read(folder, repair=True)
    assert is_near(volume, pieces)
    assert said == [f"{folder}: was repaired: its coordinate systems were taken to be one"]


def test_stacks_with_frames_of_reference_of_their_own_stay_two(tmp_path):
    first = series(6)
    for name, shift in {"the same places": 0.0, "overlapping": 7.5, "far away": 100.0}.items():
        second = change(another(first, 4), FrameOfReferenceUID="1.2.3.4")
        for n, piece in enumerate(second):
            piece.ImagePositionPatient = place(shift + 2.5 * n)

        volumes = read_all(save(first + second, tmp_path / name))

        assert len(volumes) == 2, name
        assert sum(is_near(volume, first) for volume in volumes) == 1
        assert sum(is_near(volume, second) for volume in volumes) == 1


# --- Orientations and pixel spacings that wobble


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("about_centre", [False, True])
@pytest.mark.parametrize("pattern", ["turns", "random", "drift"])
def test_orientations_that_wobble_by_less_than_a_pixel_sees_are_one_volume(
    tmp_path, axis, about_centre, pattern
):
    pieces = series(9, 40, 60)
    chance = np.random.default_rng(5)
    for n, piece in enumerate(pieces):
        size = {"turns": (0, 1, -1)[n % 3], "random": chance.uniform(-1, 1), "drift": n / 4 - 1}[
            pattern
        ]
        turned(piece, axis, 8e-4 * size, about_centre)

    volume, said = read(save(pieces, tmp_path / "s"))

    assert is_near(volume, pieces)
    assert len(said) == 1 and "orientations of its slices wobble by up to" in said[0]
    assert [piece.sop_instance for piece in dicom.ordered_slices(tmp_path / "s")] == [
        p.SOPInstanceUID for p in pieces
    ]


@pytest.mark.parametrize("spacings", [([0.9, 0.7], [0.9, 0.7004]), ([0.9, 0.7], [0.9003, 0.7003])])
def test_pixel_spacings_that_wobble_by_less_than_a_pixel_sees_are_one_volume(tmp_path, spacings):
    pieces = series(9, 40, 60)
    every_second(PixelSpacing=spacings)(pieces)

    volume, said = read(save(pieces, tmp_path / "s"))

    assert is_near(volume, pieces)
    assert len(said) == 1 and "pixel spacings of its slices wobble" in said[0]


@pytest.mark.parametrize("radians", [0.004, 0.02, 0.1])
@pytest.mark.parametrize("pattern", [[0, 1], [0, 1, -1], [0, 0, 0, 0, 1]])
def test_orientations_that_wobble_by_more_are_refused_by_name(tmp_path, radians, pattern):
    """How far a pixel moves decides: the same angle that is nothing in a small slice is much in a
    large one.
    """
    pieces = series(9, 150, 150)
    for n, piece in enumerate(pieces):
        turned(piece, 2, radians * pattern[n % len(pattern)], about_centre=True)

    with pytest.raises(BadFile, match=r"one line as one stack but.*different orientations"):
        io.read(save(pieces, tmp_path / "s"))
    assert read_all(tmp_path / "s") == []


def test_a_slowly_turning_stack_is_not_cut_into_pieces(tmp_path):
    pieces = series(60, 100, 100)
    for n, piece in enumerate(pieces):
        turned(piece, 2, 3e-4 * n, about_centre=True)

    with pytest.raises(BadFile, match="different orientations, which move pixels by up to"):
        io.read(save(pieces, tmp_path / "s"))
    assert read_all(tmp_path / "s") == []


def test_echoes_of_a_wobbling_stack_stay_two_whole_volumes(tmp_path):
    chance = np.random.default_rng(3)
    first = change(as_mr(series(9, 30, 30)), EchoTime=10)
    second = another(first, 8, EchoTime=80)
    for echo in (first, second):
        for piece in echo:
            turned(piece, 2, 4e-4 * int(chance.integers(0, 3)))
            piece.FrameOfReferenceUID = "1.2.3.4" if chance.random() < 0.5 else ""
            piece.BitsStored = 16
    folder = save(first + second, tmp_path / "s")

    volumes = read_all(folder)

    assert len(volumes) == 2
    assert is_near(volumes[0], first) and is_near(volumes[1], second)


def test_a_wobbling_stack_with_a_missing_slice_is_repaired_as_any_other(tmp_path):
    pieces = series(9, 30, 30)
    for n, piece in enumerate(pieces):
        turned(piece, 2, 5e-4 * (n % 2))
    kept = pieces[:4] + pieces[5:]
    folder = save(kept, tmp_path / "s")

    with pytest.raises(BadFile, match=r"1 slices are missing.*--repair"):
        io.read(folder)
    assert read_all(folder) == []
    volume, said = read(folder, repair=True)

    assert volume.shape[2] == 9
    assert np.array_equal(volume.data[..., [0, 1, 2, 3, 5, 6, 7, 8]], truth(kept).data)
    assert "1 of 9 slices were missing" in said[-1]


# --- Slices that cannot be one volume, and lie between one another


def _sizes(piece: Dataset) -> None:
    piece.Columns = 2
    piece.PixelData = piece.PixelData[:16]


def _spacing(piece: Dataset) -> None:
    piece.PixelSpacing = [1.8, 1.4]


def _kind(piece: Dataset) -> None:
    change([piece], SOPClassUID=MR)


def _grey(piece: Dataset) -> None:
    piece.PhotometricInterpretation = "MONOCHROME1"


HARD = {"sizes": _sizes, "pixel spacings": _spacing, "kinds of image": _kind, "grey scales": _grey}


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("odd", [[1, 3, 5, 7, 9], [2, 3, 6, 7], [4], [9], [8, 9], [0]])
def test_slices_that_differ_and_lie_between_one_another_are_no_volumes(tmp_path, what, odd):
    pieces = series(10, 4, 4)
    for n in odd:
        HARD[what](pieces[n])
    folder = save(pieces, tmp_path / "s")

    with pytest.raises(
        BadFile, match=f"(one stack but|which move pixels).*{what}|{what}.*(take the slices|pixels)"
    ):
        io.read(folder)
    assert read_all(folder) == []
    assert not any(one.repairable for one in io.list_volumes(folder))


def test_a_missing_slice_does_not_hide_that_parts_are_one_stack(tmp_path):
    pieces = series(12, 4, 4)
    for piece in pieces[1::2]:
        _sizes(piece)
    del pieces[6]

    assert read_all(save(pieces, tmp_path / "s")) == []


def test_image_types_that_take_turns_are_no_volumes_of_their_own(tmp_path):
    pieces = as_mr(series(10))
    every_second(
        ImageType=(["ORIGINAL", "PRIMARY", "M", "ND"], ["ORIGINAL", "PRIMARY", "M", "NORM"])
    )(pieces)

    with pytest.raises(BadFile, match="one stack but are of different image types"):
        io.read(save(pieces, tmp_path / "s"))
    assert read_all(tmp_path / "s") == []


@pytest.mark.parametrize("times", [(10.004, 10.006), (10.0, 10.04), (80.0, 80.5)])
def test_echo_times_that_differ_by_rounding_are_one_echo(tmp_path, times):
    pieces = as_mr(series(10))
    every_second(EchoTime=times)(pieces)

    assert is_near(read(save(pieces, tmp_path / "s"))[0], pieces)


@pytest.mark.parametrize(
    "values",
    [
        {"WindowCenter": (40, 400), "WindowWidth": (80, 1500)}, {"RescaleIntercept": (-1024,
        -1023)},
        {"AcquisitionNumber": (1, 2)}, {"InstanceNumber": (1, 2)}, {"TriggerTime": (0, 500)},
        {"SliceThickness": ("2.5", "2.6")}, {"KVP": (100, 120)}, {"ImageType": (["ORIGINAL"],
        ["DERIVED"])},
        {"SmallestImagePixelValue": (0, 1)}, {"Modality": ("CT", "")},
        {"AcquisitionTime": ("101010", "101011")},
    ],
)  # fmt: skip
def test_what_may_differ_from_slice_to_slice_parts_nothing(tmp_path, values):
    pieces = series(10)
    every_second(**values)(pieces)
    expected = truth(pieces).data.astype(float)
    if "RescaleIntercept" in values:
        expected[..., 1::2] += 1

    volume, _ = read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, expected)


# --- Volumes that lie on one line and are their own


def test_a_thin_and_a_thick_stack_of_the_same_body_stay_two(tmp_path):
    for name, shift in {"at shared places": 0.0, "between": 0.4}.items():
        thin = series(26, 8, 6, step_mm=1.0)
        thick = change(
            another(series(6, 4, 3, step_mm=5.0), 3), SeriesInstanceUID=thin[0].SeriesInstanceUID
        )
        for n, piece in enumerate(thick):
            piece.ImagePositionPatient = place(shift + 5.0 * n)

        volumes = read_all(save(thin + thick, tmp_path / name))

        assert len(volumes) == 2
        assert {volume.shape for volume in volumes} == {(6, 8, 26), (3, 4, 6)}


def test_stacks_one_behind_the_other_with_pixels_of_their_own_stay_two(tmp_path):
    first, second = series(5), series(5, 8, 6, seed=3)
    for n, piece in enumerate(
        change(second, SeriesInstanceUID=first[0].SeriesInstanceUID, PixelSpacing=[0.5, 0.4])
    ):
        piece.ImagePositionPatient = place(2.5 * (n + 5))

    volumes = read_all(save(first + second, tmp_path / "s"))

    assert sum(is_near(volume, first) for volume in volumes) == 1
    assert sum(is_near(volume, second) for volume in volumes) == 1


def test_acquisitions_that_share_some_places_stay_two(tmp_path):
    first = change(series(6), AcquisitionNumber=1)
    second = change(another(first, 4), AcquisitionNumber=2)
    for n, piece in enumerate(second):
        piece.ImagePositionPatient = place(2.5 * (n + 3))

    volumes = read_all(save(first + second, tmp_path / "s"))

    assert len(volumes) == 2 and is_near(volumes[0], first) and is_near(volumes[1], second)


def test_stacks_side_by_side_stay_two(tmp_path):
    """Two knees: the same places along the normal, pictures of other sizes next to each other."""
    left, right = series(6), series(6, 6, 5, seed=3)
    for n, piece in enumerate(change(right, SeriesInstanceUID=left[0].SeriesInstanceUID)):
        piece.ImagePositionPatient = place(2.5 * n + 1.25, 40)

    assert len(read_all(save(left + right, tmp_path / "s"))) == 2


# --- Files that hold many slices, under whatever class


def in_one_file(
    pieces: list[Dataset], sop_class: str, *, top_level: bool = False, seed: int = 2
) -> Dataset:
    """All slices as frames of one file; what they share in the shared groups, or at the top
    level.
    """
    whole = enhanced([pieces], sop_class, seed)
    for group in whole.PerFrameFunctionalGroupsSequence:
        del group.FrameContentSequence
    del whole.DimensionIndexSequence
    if top_level:
        del whole.SharedFunctionalGroupsSequence
        for tag in ("PixelSpacing", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
            if tag in pieces[0]:
                setattr(whole, tag, pieces[0].get(tag))
    return whole


@pytest.mark.parametrize("sop_class", [CT, MR, *XRAY_3D, CAPTURES])
@pytest.mark.parametrize("top_level", [False, True])
def test_frames_with_places_of_their_own_are_a_volume_under_every_class(
    tmp_path, sop_class, top_level
):
    pieces = series(7)
    path = tmp_path / "x.dcm"
    in_one_file(pieces, sop_class, top_level=top_level).save_as(path, enforce_file_format=True)

    volume, said = read(path)

    assert is_near(volume, pieces, 1e-5) and said == []
    assert is_near(read(tmp_path)[0], pieces, 1e-5)


def _no_groups(whole: Dataset) -> None:
    del whole.PerFrameFunctionalGroupsSequence
    whole.SpacingBetweenSlices, whole.ImagePositionPatient = 2.5, place(0)
    whole.ImageOrientationPatient = [float(x) for x in OBLIQUE[:, :2].T.ravel()]
    whole.PixelSpacing = [0.9, 0.7]


def _one_without_a_place(whole: Dataset) -> None:
    whole.ImagePositionPatient = (
        whole.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient
    )
    del whole.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence


def _no_turn(whole: Dataset) -> None:
    del whole.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence


def _frame_twice(whole: Dataset) -> None:
    groups = whole.PerFrameFunctionalGroupsSequence
    groups[2].PlanePositionSequence = groups[3].PlanePositionSequence


@pytest.mark.parametrize("sop_class", [CT, XRAY_3D[0], CAPTURES])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_no_groups, "where each of its frames"), (_one_without_a_place, "where"), (_no_turn,
        "where"),
        (_frame_twice, "same place"),
    ],
)  # fmt: skip
def test_frames_without_places_stay_refused(tmp_path, sop_class, spoil, reason):
    whole = in_one_file(series(7), sop_class)
    spoil(whole)
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    with pytest.raises(BadFile, match=reason):
        io.read(tmp_path / "x.dcm")


def test_secondary_captures_with_full_geometry_are_a_volume(tmp_path):
    pieces = change(series(6), SOPClassUID=CAPTURE)

    assert is_near(read(save(pieces, tmp_path / "s"))[0], pieces)
    assert [one.modality for one in io.list_volumes(tmp_path / "s")] == ["OT"]

    without = change(series(6), SOPClassUID=CAPTURE)
    for piece in without:
        del piece.RescaleSlope, piece.RescaleIntercept
    assert is_near(read(save(without, tmp_path / "t"))[0], without)


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_secondary_captures_without_full_geometry_stay_refused(tmp_path, tag):
    pieces = change(series(6), SOPClassUID=CAPTURE)
    for piece in pieces:
        delattr(piece, tag)

    with pytest.raises(BadFile, match="CT, MR or PET"):
        io.read(save(pieces, tmp_path / "s"))


def test_secondary_captures_beside_a_scan_are_set_aside_as_before(tmp_path):
    pieces = series(6)
    folder = save(pieces + change(series(6, seed=4), SOPClassUID=CAPTURE), tmp_path / "s")

    volume, said = read(folder)

    assert is_near(volume, pieces)
    assert len(said) == 1 and "set aside" in said[0] and said[0].endswith(": 6")


# --- One and two slices


def _pair(step: str | None, thickness: str | None, apart: float = 2.5) -> list[Dataset]:
    pieces = series(2, step_mm=apart)
    for piece in pieces:
        if step:
            piece.SpacingBetweenSlices = step
        if thickness:
            piece.SliceThickness = thickness
    return pieces


@pytest.mark.parametrize(
    ("step", "thickness"), [("2.5", None), ("2.5", "2"), (None, "2.5"), ("2.51", "9")]
)
def test_two_slices_whose_distance_the_headers_confirm_are_a_volume(tmp_path, step, thickness):
    pieces = _pair(step, thickness)

    volume, _ = read(save(pieces, tmp_path / "s"))

    assert is_near(volume, pieces, 1e-5) and np.isclose(volume.spacing_mm[2], 2.5)


@pytest.mark.parametrize(
    ("step", "thickness"),
    [(None, None), ("1.25", None), ("1.25", "2.5"), (None, "1.25"), (None, "5"), ("0", None)],
)
def test_two_slices_whose_distance_nothing_confirms_stay_refused(tmp_path, step, thickness):
    with pytest.raises(BadFile, match="2 slices, too few"):
        io.read(save(_pair(step, thickness), tmp_path / "s"))


def test_one_slice_is_a_volume_only_where_its_step_is_known(tmp_path):
    for n, (step, thickness, right) in enumerate(
        [
            ("3", "2.5", True),
            ("2.5", "2.5", True),
            (None, "2.5", False),
            ("0.3", "2.5", False),
            ("3", None, False),
        ]
    ):
        pieces = _pair(step, thickness)[:1]
        folder = save(pieces, tmp_path / str(n))
        if not right:
            with pytest.raises(BadFile, match="1 slices, too few"):
                io.read(folder)
            continue
        volume, _ = read(folder)
        assert volume.shape == (3, 4, 1) and np.isclose(volume.spacing_mm[2], float(step))
        assert np.allclose((LPS @ volume.affine)[:3, 2], OBLIQUE[:, 2] * float(step))
        assert open_origin(folder).shape == volume.shape


def test_an_enhanced_file_of_two_frames_whose_distance_is_known_is_a_volume(tmp_path):
    pieces = series(2)
    whole = enhanced([pieces], ENHANCED_MR)
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)  # Slice Thickness is 2.5
    assert is_near(read(tmp_path / "x.dcm")[0], pieces, 1e-5)

    whole.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = Sequence(
        [
            item(
                PixelSpacing=pieces[0].PixelSpacing,
                SliceThickness="2.5",
                SpacingBetweenSlices="1.25",
            )
        ]
    )
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    with pytest.raises(BadFile, match="too few"):
        io.read(tmp_path / "x.dcm")


# --- The cases that were seen


CASES = {
    "dicom-bits-per-slice": ["ct", "ct_8_and_16_bit"],
    "dicom-frame-of-reference-per-slice": ["each_its_own", "every_second_empty"],
    "dicom-orientation-jitter": ["ct", "ct_pixel_spacing"],
    "cbct-frames-in-ct-class": ["shared_groups.dcm", "top_level.dcm"],
}


@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case, names in CASES.items() for name in names]
)
def test_cases_of_one_stack_are_one_volume(shared_data, case, name):
    folder = shared_data / "cases/files" / case
    expected = io.read(folder / "expected.nii.gz")

    volume, _ = read(folder / name)

    volume = reorient(volume, expected.orientation)
    assert np.array_equal(volume.data, expected.data)
    assert grid_distance_mm(volume, expected) < 0.1
    assert len(io.list_volumes(folder / name)) == 1
