"""Several volumes in one source: how they are found, numbered, listed and chosen; multi-frame files
and mosaics.
"""

from __future__ import annotations

import copy
import gzip
import json
import struct
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import generate_uid

from making.dicom import (
    CT,
    ENHANCED_CT,
    ENHANCED_MR,
    MR,
    NAME,
    another,
    as_mr,
    change,
    empty,
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
from medseg.volume import LPS, Volume, reorient


def read_all(path: Path) -> dict[str, Volume]:
    return {found.number: io.read(path, series=found.number) for found in io.list_volumes(path)}


def equal(volume: Volume, pieces: list[Dataset]) -> bool:
    expected = truth(pieces)
    same_place = np.allclose(volume.affine, expected.affine, atol=1e-6)
    return (
        volume.shape == expected.shape and np.array_equal(volume.data, expected.data) and same_place
    )


def test_several_series_are_listed_and_chosen(tmp_path):
    first, second = (
        change(series(seed=2), SeriesNumber=5),
        change(as_mr(series(6, seed=3)), SeriesNumber=2),
    )
    folder = save(first + second, tmp_path / "s")

    found = io.list_volumes(folder)

    assert [(v.number, v.modality, v.shape) for v in found] == [
        ("1", "MR", (3, 4, 6)),
        ("2", "CT", (3, 4, 5)),
    ]
    assert (
        np.allclose(found[1].spacing_mm, (0.7, 0.9, 2.5))
        and found[1].orientation == io.read(folder, series="2").orientation
    )
    assert equal(io.read(folder, series="1"), second)
    assert equal(io.read(folder, series=2), first)
    assert equal(io.read(folder, series=str(first[0].SeriesInstanceUID)), first)
    with pytest.raises(
        BadFile, match=r"holds 2 volumes of 2 series; choose one with --series \(1, 2;"
    ):
        io.read(folder)
    for wrong in ("3", "0", "1.1", "x", ""):
        with pytest.raises(BadFile, match="no such series" if wrong else "choose one"):
            io.read(folder, series=wrong)


def test_numbers_do_not_depend_on_file_names(tmp_path):
    one = series(seed=2)
    other = change(another(one, 4), ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    for n, piece in enumerate(other):
        piece.ImagePositionPatient, piece.InstanceNumber = [0, 0, n * 2], n + 1
    pieces = change(one + other, SeriesNumber=5) + change(series(seed=3), SeriesNumber=4)

    lists = [io.list_volumes(save(pieces, tmp_path / str(seed), seed)) for seed in range(3)]

    assert lists[0] == lists[1] == lists[2]


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("EchoTime", (10, 80)), ("EchoNumbers", (1, 2)), ("TemporalPositionIdentifier", (1, 2)),
        ("TriggerTime", (0, 300)), ("DiffusionBValue", (0.0, 1000.0)), ("AcquisitionNumber", (1,
        2)),
        ("InversionTime", (100, 900)),
        ("FlipAngle", (5, 20)), ("DiffusionGradientOrientation", ([1.0, 0, 0], [0, 1.0, 0])),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"])),
        ("FrameReferenceTime", (0, 5e3)),
    ],
)  # fmt: skip
def test_volumes_of_a_series_are_told_apart_by(tmp_path, tag, values):
    first = change(as_mr(series()), InstanceNumber=1, **{tag: values[0]})
    second = another(first, 7, **{tag: values[1]}, InstanceNumber=2)
    folder = save(first + second, tmp_path / "s")

    volumes = read_all(folder)

    assert list(volumes) == ["1.1", "1.2"]
    assert equal(volumes["1.1"], first) and equal(volumes["1.2"], second)
    assert equal(io.read(folder, volume_index=1), second)
    with pytest.raises(
        BadFile,
        match=r"holds 2 volumes of different .* in one series; choose one with --series \(1.1",
    ):
        io.read(folder)
    with pytest.raises(BadFile, match="no volume 2"):
        io.read(folder, volume_index=2)


def test_several_tags_together_tell_volumes_apart(tmp_path):
    base = change(as_mr(series()), InstanceNumber=1)
    made = {
        (echo, time): another(
            base, 10 * echo + time, EchoNumbers=echo, TemporalPositionIdentifier=time
        )
        for echo in (1, 2)
        for time in (1, 2, 3)
    }
    folder = save([piece for pieces in made.values() for piece in pieces], tmp_path / "s")

    volumes = read_all(folder)

    assert len(volumes) == 6
    assert all(equal(volume, pieces) for volume, pieces in zip(volumes.values(), made.values()))


@pytest.mark.parametrize("by_place", [False, True])
def test_volumes_are_told_apart_by_the_order_of_their_slices_alone(tmp_path, by_place):
    first = as_mr(series())
    made = [first, another(first, 7), another(first, 8)]
    for time, pieces in enumerate(made):
        for n, piece in enumerate(pieces):
            piece.InstanceNumber = 1 + (3 * n + time if by_place else 40 * time + n)
    folder = save([piece for pieces in made for piece in pieces], tmp_path / "s")

    volumes = read_all(folder)

    assert list(volumes) == ["1.1", "1.2", "1.3"]
    assert all(equal(volume, pieces) for volume, pieces in zip(volumes.values(), made))


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4, 6, 5, 7, 8, 9, 10], [1] * 10, [None] * 10])
def test_volumes_that_nothing_tells_apart_are_refused(tmp_path, numbers):
    first = as_mr(series())
    pieces = [*first, *another(first, 7)]
    for piece, number in zip(pieces, numbers):
        piece.InstanceNumber = number

    with pytest.raises(BadFile, match="several slices lie at the same place") as caught:
        io.read(save(pieces, tmp_path / "s"))
    assert "--repair" not in str(caught.value)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_time_that_was_broken_off_leaves_the_others_whole(tmp_path, left):
    first = series(5)
    second = another(first, 2, TemporalPositionIdentifier=2)
    third = another(first, 3, TemporalPositionIdentifier=3)[:left]
    folder = save([*change(first, TemporalPositionIdentifier=1), *second, *third], tmp_path / "s")

    with pytest.raises(
        BadFile, match=r"different times in one series; choose one with --series \("
    ):
        io.read(folder)
    assert equal(io.read(folder, series="1.1"), first)
    assert equal(io.read(folder, series="1.2"), second)
    assert [found.shape[2] for found in io.list_volumes(folder)] == [5, 5, left]


def test_slices_with_series_of_their_own_are_no_choice(tmp_path):
    pieces = series(6)
    for piece in pieces:
        piece.SeriesInstanceUID = generate_uid()

    with pytest.raises(BadFile, match="each of its 6 images has a Series Instance UID") as caught:
        io.read(save(pieces, tmp_path / "s"))
    assert "--series" not in str(caught.value)


def test_volumes_of_which_none_can_be_read_are_no_choice(tmp_path):
    folder = save(change(series(6), HighBit=14), tmp_path / "s")
    save(series(2), folder / "b")

    with pytest.raises(BadFile, match="none of which can be read") as caught:
        io.read(folder)
    assert "--series" not in str(caught.value)
    assert ["stored in a way" in one.problem for one in io.list_volumes(folder)].count(True) == 1


def test_an_acquisition_number_that_changes_within_a_volume_does_not_part_it(tmp_path):
    pieces = series(6)
    for n, piece in enumerate(pieces):
        piece.AcquisitionNumber, piece.TriggerTime, piece.AcquisitionTime = (
            n // 3,
            n * 10,
            f"1010{n:02d}",
        )

    assert equal(io.read(save(pieces, tmp_path / "s")), pieces)


def test_echoes_at_alternating_places_do_not_become_one_volume(tmp_path):
    pieces = as_mr(series(8))
    for n, piece in enumerate(pieces):
        piece.EchoTime = 10 + 70 * (n % 2)
    folder = save(pieces, tmp_path / "s")

    assert equal(read_all(folder)["1.1"], pieces[::2])
    with pytest.raises(BadFile, match="different echoes"):
        io.read(folder)


def test_localizers_and_screenshots_are_set_aside(tmp_path):
    pieces = series()
    scouts = change(series(2, 6, 6, seed=4), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    same_series = change(another(pieces[:1], 3), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    shots = change(
        series(1, seed=5), SOPClassUID="1.2.840.10008.5.1.4.1.1.7", PhotometricInterpretation="RGB"
    )
    folder = save(pieces + scouts + same_series + shots, tmp_path / "s")

    with pytest.warns(
        DataWarning, match="set aside localizers and images that are no CT, MR or PET: 4"
    ):
        volume = io.read(folder)

    assert equal(volume, pieces)


def test_a_screenshot_in_the_series_itself_is_not_mixed_in(tmp_path):
    pieces = series()
    shot = change(
        another(pieces[:1], 3),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
        PhotometricInterpretation="RGB",
    )
    folder = save(pieces + change(shot, SamplesPerPixel=3), tmp_path / "s")

    with pytest.raises(BadFile, match="different kinds of image in one series"):
        io.read(folder)
    assert sorted(bool(volume.problem) for volume in io.list_volumes(folder)) == [False, True]
    chosen = next(volume.number for volume in io.list_volumes(folder) if not volume.problem)
    assert equal(io.read(folder, series=chosen), pieces)


def test_orientations_and_sizes_of_one_series_are_volumes_of_their_own(tmp_path):
    first = series()
    second = change(another(first, 4), ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    for n, piece in enumerate(second):
        piece.ImagePositionPatient = [0, 0, n * 2]
    folder = save(first + second, tmp_path / "s")

    volumes = read_all(folder)

    assert len(volumes) == 2
    assert sum(equal(volume, first) for volume in volumes.values()) == 1
    assert sum(equal(volume, second) for volume in volumes.values()) == 1
    with pytest.raises(BadFile, match="holds 2 volumes of different orientations in one series"):
        io.read(folder)


def test_a_list_says_what_cannot_be_read_and_nothing_of_the_patient(tmp_path):
    good, bad, odd = series(), series(seed=2), series(seed=3)
    for number, pieces in enumerate((good, bad, odd), 1):
        change(
            pieces,
            SeriesNumber=number,
            SeriesDescription=NAME,
            StudyDescription=NAME,
            ProtocolName=NAME,
        )
    del bad[2]
    odd[0].PhotometricInterpretation = "RGB"
    folder = save(good + bad + odd, tmp_path / "s")

    found = io.list_volumes(folder)

    assert [bool(volume.problem) for volume in found] == [False, True, True]
    assert [volume.repairable for volume in found] == [False, True, False]
    assert found[1].problem.startswith(f"{folder}: 1 slices are missing")
    assert NAME not in repr(found)
    assert "1.2.826" not in repr(found)


def test_a_damaged_file_is_passed_over_in_the_list_and_refused_when_read(tmp_path):
    folder = save(series(seed=1) + series(seed=2), tmp_path / "s")
    (folder / "x.dcm").write_bytes(sorted(folder.iterdir())[0].read_bytes()[:200])

    with pytest.warns(DataWarning, match="passed over damaged files: 1"):
        assert len(io.list_volumes(folder)) == 2
    with pytest.raises(BadFile, match=r"x.dcm: (is damaged|ends early)"):
        io.read(folder, series="1")


def test_options_for_dicom_are_refused_for_other_files(tmp_path):
    path = tmp_path / "x.nii"
    io.write(truth(series()), path)

    for options in ({"series": "1"}, {"repair": True}, {"suv": True}):
        with pytest.raises(BadFile, match=f"is no DICOM, for which alone --{next(iter(options))}"):
            io.read(path, **options)


def test_ordered_slices_follow_the_voxels(tmp_path):
    first = change(as_mr(series()), EchoTime=10)
    second = another(first, 7, EchoTime=20)
    folder = save(first + second, tmp_path / "s")

    for number, pieces in (("1.1", first), ("1.2", second)):
        volume, slices = io.read(folder, series=number), dicom.ordered_slices(folder, series=number)
        assert [piece.sop_instance for piece in slices] == [
            piece.SOPInstanceUID for piece in pieces
        ]
        for k, piece in enumerate(slices):
            assert np.allclose((LPS @ volume.affine)[:3] @ (0, 0, k, 1), piece.position, atol=1e-5)
            assert pydicom.dcmread(piece.path).PixelData == pieces[k].PixelData
    del first[2]
    with pytest.raises(BadFile, match="missing"):
        dicom.ordered_slices(save(first, tmp_path / "t"))


@pytest.mark.parametrize("sop_class", [ENHANCED_CT, ENHANCED_MR, "1.2.840.10008.5.1.4.1.1.4.4"])
@pytest.mark.parametrize("seed", range(3))
def test_an_enhanced_file_is_a_volume_whatever_the_order_of_its_frames(tmp_path, sop_class, seed):
    pieces = series()
    enhanced([pieces], sop_class, seed).save_as(tmp_path / "x.dcm", enforce_file_format=True)

    volume, slices = io.read(tmp_path / "x.dcm"), dicom.ordered_slices(tmp_path / "x.dcm")

    assert equal(volume, pieces)
    frames = np.frombuffer(pydicom.dcmread(tmp_path / "x.dcm").PixelData, np.int16).reshape(5, 4, 3)
    for k, piece in enumerate(slices):
        assert np.array_equal(frames[piece.frame].T - 1024, volume.data[..., k])
    assert equal(io.read(tmp_path), pieces)


def test_several_volumes_in_one_enhanced_file(tmp_path):
    pieces = series()
    made = [pieces, another(pieces, 5), another(pieces, 6)]
    path = tmp_path / "x.dcm"
    enhanced(made).save_as(path, enforce_file_format=True)

    volumes = read_all(path)

    assert list(volumes) == ["1.1", "1.2", "1.3"]
    assert all(equal(volume, truth_) for volume, truth_ in zip(volumes.values(), made))
    with pytest.raises(BadFile, match="holds 3 volumes of different times"):
        io.read(path)


@pytest.mark.parametrize(
    ("sequence", "tag", "values"),
    [
        ("MREchoSequence", "EffectiveEchoTime", (10.0, 80.0)), ("FrameContentSequence", "StackID",
        ("1", "2")),
        ("MRDiffusionSequence", "DiffusionBValue", (0.0, 800.0)),
        ("MRImageFrameTypeSequence", "FrameType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL",
        "PRIMARY", "PHASE"])),
        ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime", (0.0, 400.0)),
        ("FrameContentSequence", "DimensionIndexValues", ([1, 1], [2, 1])),
    ],
)  # fmt: skip
def test_volumes_of_an_enhanced_file_are_told_apart_by(tmp_path, sequence, tag, values):
    pieces = series()
    made = [pieces, another(pieces, 5)]
    whole = enhanced(made)
    for group in whole.PerFrameFunctionalGroupsSequence:
        content = group.FrameContentSequence[0]
        time, n = content.DimensionIndexValues
        del content.TemporalPositionIndex
        value = values[time - 1]
        content.DimensionIndexValues = [value[0] if tag == "DimensionIndexValues" else 1, n]
        if tag != "DimensionIndexValues":
            if sequence in group:
                setattr(group[sequence][0], tag, value)
            else:
                setattr(group, sequence, Sequence([item(**{tag: value})]))
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    volumes = read_all(tmp_path / "x.dcm")

    assert all(equal(volume, truth_) for volume, truth_ in zip(volumes.values(), made, strict=True))


def test_each_frame_has_its_own_scale(tmp_path):
    pieces = series()
    whole = enhanced([pieces], shuffle=0)
    del whole.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for n, group in enumerate(whole.PerFrameFunctionalGroupsSequence):
        group.PixelValueTransformationSequence = Sequence(
            [item(RescaleSlope=f"{n + 0.5}", RescaleIntercept=f"{-n}")]
        )
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    frames = np.frombuffer(whole.PixelData, np.int16).reshape(5, 4, 3)

    volume = io.read(tmp_path / "x.dcm")

    for k, piece in enumerate(dicom.ordered_slices(tmp_path / "x.dcm")):
        assert np.allclose(
            volume.data[..., k], frames[piece.frame].T * (piece.frame + 0.5) - piece.frame
        )


def test_an_enhanced_series_of_one_file_per_volume(tmp_path):
    pieces = series()
    second = another(pieces, 5)
    files = [enhanced([pieces], shuffle=1), enhanced([second], shuffle=2)]
    files[1].SeriesInstanceUID, files[1].InstanceNumber = files[0].SeriesInstanceUID, 2
    for number, file in enumerate(files):
        file.save_as(tmp_path / f"{'ba'[number]}.dcm", enforce_file_format=True)

    volumes = read_all(tmp_path)

    assert equal(volumes["1.1"], pieces) and equal(volumes["1.2"], second)


def _drop_groups(whole: Dataset) -> None:
    del whole.PerFrameFunctionalGroupsSequence


def _drop_last_group(whole: Dataset) -> None:
    whole.PerFrameFunctionalGroupsSequence = whole.PerFrameFunctionalGroupsSequence[:-1]


def _drop_place(whole: Dataset) -> None:
    del whole.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def _empty_shared(whole: Dataset) -> None:
    whole.SharedFunctionalGroupsSequence = Sequence([Dataset()])


def _bad_place(whole: Dataset) -> None:
    whole.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0].ImagePositionPatient = [
        "1",
        "2",
    ]


def _one_more_frame(whole: Dataset) -> None:
    whole.NumberOfFrames = 6


def _less_pixels(whole: Dataset) -> None:
    whole.PixelData = whole.PixelData[:-24]


def _moved_frame(whole: Dataset) -> None:
    whole.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0].ImagePositionPatient = place(
        200
    )


def _tilted(whole: Dataset) -> None:
    for group in whole.PerFrameFunctionalGroupsSequence:
        n = group.FrameContentSequence[0].InStackPositionNumber - 1
        group.PlanePositionSequence[0].ImagePositionPatient = place(2.5 * n, 0, 0.5 * n)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_drop_groups, "where each of its frames"), (_drop_last_group, "where each of its frames"),
        (_drop_place, "where its slice lies"), (_empty_shared, "where its slice lies|scaled"),
        (_bad_place, "ImagePositionPatient is not what"), (_one_more_frame,
        "where each of its frames"),
        (_less_pixels, "too short"), (_moved_frame, "missing|distances"), (_tilted, "gantry tilt"),
    ],
)  # fmt: skip
def test_an_enhanced_file_that_is_not_sure_is_refused(tmp_path, spoil, reason):
    whole = enhanced([series()], ENHANCED_CT)
    spoil(whole)
    whole.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    with pytest.raises(BadFile, match=reason):
        io.read(tmp_path / "x.dcm")


def mosaic(
    count: int = 5, *, header: bool = True, flip: bool = False, step: float = 3.0
) -> tuple[Dataset, Volume]:
    """A Siemens mosaic of `count` tiles of 6 x 8 pixels and the volume that it is, in LPS built
    tile by tile.
    """
    across = int(np.ceil(np.sqrt(count)))
    values = np.random.default_rng(3).integers(0, 4000, (count, 8, 6)).astype(np.uint16)
    along, down, normal = np.array([0.8, 0.6, 0]), np.array([0, 0, -1.0]), np.array([-0.6, 0.8, 0])
    normal = -normal if flip else normal
    start = np.array([-5.0, 7, 11])
    picture = np.zeros((8 * across, 6 * across), np.uint16)
    for n in range(count):
        row, column = divmod(n, across)
        picture[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6] = values[n]
    piece = as_mr([change(series(1), SOPClassUID=MR)[0]])[0]
    piece.Rows, piece.Columns = picture.shape
    piece.PixelRepresentation, piece.ImageType = 0, ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    piece.PixelSpacing, piece.SpacingBetweenSlices = [2.0, 1.5], step
    piece.ImageOrientationPatient = [*along, *down]
    # Siemens writes the corner of a slice as large as the picture around the same centre.
    corner = start - along * 1.5 * (6 * across - 6) / 2 - down * 2.0 * (8 * across - 8) / 2
    piece.ImagePositionPatient = [f"{x:.8f}" for x in corner]
    piece.PixelData = picture.tobytes()
    if header:
        piece.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
        piece.add_new(
            0x00291010, "OB", csa({"NumberOfImagesInMosaic": [count], "SliceNormalVector": normal})
        )
    affine = np.eye(4)
    affine[:3] = np.stack([along * 1.5, down * 2.0, normal * step, start], axis=1)
    return piece, Volume(values.transpose(2, 1, 0), LPS @ affine)


def protocol(piece: Dataset, volume: Volume, *, reverse: bool = False) -> None:
    """Put the slices' places into Siemens' series header instead of the direction into the image
    header.
    """
    del piece[0x00290010], piece[0x00291010]
    middle = (volume.shape[0] / 2, volume.shape[1] / 2)
    count = volume.shape[2]
    lines = [f"sSliceArray.lSize = {count}"]
    for n in range(count):
        centre = (LPS @ volume.affine @ (*middle, count - 1 - n if reverse else n, 1))[:3]
        for name, x in zip(("dSag", "dCor", "dTra"), centre):
            if abs(x) > 1e-9:  # Siemens leaves zeros out
                lines.append(f"sSliceArray.asSlice[{n}].sPosition.{name}\t = \t{x:.8g}")
    piece.add_new(
        0x00291020,
        "OB",
        ("noise\0### ASCCONV BEGIN ###\n" + "\n".join(lines) + "\n### ASCCONV END").encode(),
    )


def csa(elements: dict[str, object]) -> bytes:
    """Siemens' header in its second layout."""
    out = b"SV10\4\3\2\1" + struct.pack("<II", len(elements), 77)
    for name, values in elements.items():
        texts = [f"{value:.8f}".encode() + b"\0" for value in values]
        out += name.encode().ljust(64, b"\0") + struct.pack(
            "<i4siii", len(texts), b"FD\0\0", 4, len(texts), 77
        )
        for text in texts:
            out += struct.pack("<iiii", len(text), len(text), 77, len(text)) + text.ljust(
                (len(text) + 3) // 4 * 4, b"\0"
            )
    return out + bytes(4)


@pytest.mark.parametrize("count", [3, 4, 5, 9, 10])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mosaic_is_cut_into_its_slices(tmp_path, count, flip):
    piece, expected = mosaic(count, flip=flip)
    piece.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    volume = reorient(io.read(tmp_path / "x.dcm"), expected.orientation)

    assert np.array_equal(volume.data, expected.data)
    assert np.allclose(volume.affine, expected.affine, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_a_mosaic_without_its_image_header_is_placed_by_the_protocol(tmp_path, flip, reverse):
    piece, expected = mosaic(7, flip=flip)
    protocol(piece, expected, reverse=reverse)
    piece.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    volume = reorient(io.read(tmp_path / "x.dcm"), expected.orientation)

    assert np.array_equal(volume.data, expected.data)
    assert np.allclose(volume.affine, expected.affine, atol=1e-4)


def test_a_mosaic_whose_protocol_lies_elsewhere_is_refused(tmp_path):
    piece, expected = mosaic(7)
    elsewhere = expected.affine.copy()
    elsewhere[:3, 3] += 3
    protocol(piece, Volume(expected.data, elsewhere))
    piece.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    with pytest.raises(BadFile, match="mosaic"):
        io.read(tmp_path / "x.dcm")


@pytest.mark.parametrize("name", ["siemens_dwi_0", "siemens_dwi_1000"])
def test_both_of_siemens_headers_place_a_real_mosaic_alike(tmp_path, name):
    packed = Path(nib.__file__).parent / "nicom/tests/data" / f"{name}.dcm.gz"
    if not packed.is_file():
        pytest.skip("this nibabel comes without its test files")
    (tmp_path / "x.dcm").write_bytes(gzip.decompress(packed.read_bytes()))
    expected = io.read(tmp_path / "x.dcm")
    piece = pydicom.dcmread(tmp_path / "x.dcm")
    del piece[0x00291010]
    piece.save_as(tmp_path / "x.dcm")

    volume = io.read(tmp_path / "x.dcm")

    assert np.array_equal(volume.data, expected.data)
    assert np.allclose(volume.affine, expected.affine, atol=1e-4)


def test_mosaics_of_a_series_are_its_volumes(tmp_path):
    first, expected = mosaic()
    second = copy.deepcopy(first)
    second.PixelData = (np.frombuffer(first.PixelData, np.uint16) + 1).tobytes()
    second.InstanceNumber, second.SOPInstanceUID = 101, generate_uid()
    first.InstanceNumber = 100

    volumes = read_all(save([second, first], tmp_path / "s"))

    assert np.array_equal(volumes["1.1"].data, expected.data)
    assert np.array_equal(volumes["1.2"].data, expected.data + 1)


def _odd_count(piece: Dataset) -> None:
    piece[0x00291010].value = csa(
        {"NumberOfImagesInMosaic": [50], "SliceNormalVector": [-0.6, 0.8, 0]}
    )


def _odd_normal(piece: Dataset) -> None:
    piece[0x00291010].value = csa({"NumberOfImagesInMosaic": [5], "SliceNormalVector": [0, 0, 1]})


def _no_step(piece: Dataset) -> None:
    del piece.SpacingBetweenSlices


def _cut_header(piece: Dataset) -> None:
    piece[0x00291010].value = piece[0x00291010].value[:150]


def _no_header(piece: Dataset) -> None:
    del piece[0x00291010]


@pytest.mark.parametrize("spoil", [_odd_count, _odd_normal, _no_step, _cut_header, _no_header])
def test_a_mosaic_whose_geometry_is_not_sure_is_refused(tmp_path, spoil):
    piece, _ = mosaic()
    spoil(piece)
    piece.save_as(tmp_path / "x.dcm", enforce_file_format=True)

    with pytest.raises(BadFile, match=r"mosaic.*dcm2niix|damaged"):
        io.read(tmp_path / "x.dcm")


@pytest.mark.filterwarnings("ignore:Unable to find Philips private scale factor")
@pytest.mark.parametrize("name", ["siemens_dwi_0", "siemens_dwi_1000", "philips_mprage"])
def test_real_mosaics_and_multi_frame_files_agree_with_nibabel(tmp_path, name):
    """The files come with nibabel (MIT); philips_mprage holds one frame fewer of pixels than its
    header says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nibabel calls its DICOM readers experimental
        from nibabel.nicom import dicomwrappers
    packed = Path(nib.__file__).parent / "nicom/tests/data" / f"{name}.dcm.gz"
    if not packed.is_file():
        pytest.skip("this nibabel comes without its test files")
    path = tmp_path / "x.dcm"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    wrapper = dicomwrappers.wrapper_from_file(path)
    expected = Volume(np.asanyarray(wrapper.get_data()), LPS @ wrapper.affine)

    volume = io.read(path)

    volume = reorient(volume, expected.orientation)
    assert np.allclose(volume.affine, expected.affine, atol=1e-4)
    assert np.allclose(volume.data, expected.data, rtol=1e-6)


def test_info_lists_and_convert_chooses(tmp_path, capsys, monkeypatch):
    from medseg.cli.app import main

    first, second = (
        change(series(), SeriesNumber=1, SeriesDescription=NAME),
        change(series(seed=2), SeriesNumber=2),
    )
    del second[1]
    folder = save(first + second, tmp_path / "s")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["medseg", *words])
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    code, out, _ = run("info", str(folder))
    assert (
        code == 0
        and "2 volumes; choose one with --series" in out
        and "1 slices are missing (--repair)" in " ".join(out.split())
    )
    assert NAME not in out
    listed = json.loads(run("info", "--json", str(folder))[1])["volumes"]
    assert [(v["number"], v["shape"], v["repairable"]) for v in listed] == [
        ("1", [3, 4, 5], False), ("2", [3, 4, 4], True),
    ]  # fmt: skip
    code, _, err = run("convert", str(folder), str(tmp_path / "x.nii"))
    assert code == 3 and "--series (1; medseg info" in err
    assert run("convert", str(folder), str(tmp_path / "x.nii"), "--series", "1")[0] == 0
    assert equal(io.read(tmp_path / "x.nii"), first)
    assert json.loads(run("info", "--json", str(folder), "--series", "1")[1])["shape"] == [3, 4, 5]
    code, _, err = run("convert", str(folder), str(tmp_path / "y.nii"), "--series", "2")
    assert code == 3 and "--repair" in err and not (tmp_path / "y.nii").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        code, _, err = run(
            "convert", str(folder), str(tmp_path / "y.nii"), "--series", "2", "--repair"
        )
    assert code == 0 and "1 of 5 slices were missing" in err
    assert io.read(tmp_path / "y.nii").shape == (3, 4, 5)
    code, _, err = run("convert", str(tmp_path / "x.nii"), str(tmp_path / "z.nii"), "--suv")
    assert code == 3 and "is no DICOM" in err


def test_info_tells_series_apart_and_describes_them_to_eyes_alone(tmp_path, capsys, monkeypatch):
    """Two MR of one grid: by folder and number everywhere, by description where a person reads it
    and nowhere else.
    """
    from medseg import cli

    told = f"T1 {NAME}\x1b[31m"
    first = change(as_mr(series()), SeriesNumber=4, SeriesDescription=told)
    second = change(as_mr(series(seed=2)), SeriesNumber=7, SeriesDescription="FLAIR")
    save(first, tmp_path / "s" / "anat")
    save(second[:2], tmp_path / "s" / "b" / "one")
    save(second[2:], tmp_path / "s" / "b" / "two")
    folder = tmp_path / "s"

    def info(*words: str, terminal: bool) -> str:
        monkeypatch.setattr("sys.argv", ["medseg", "info", str(folder), *words])
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    found = io.list_volumes(folder)
    assert [(one.series_number, one.folder) for one in found] == [(4, "anat"), (7, "b")]
    # Without what steers a terminal.
    assert [one.description for one in found] == [
        f"T1 {NAME}[31m",
        "FLAIR",
    ]
    assert NAME not in repr(found)
    shown, piped = info(terminal=True), info(terminal=False)
    assert all(word in shown for word in ("anat", "FLAIR", f"T1 {NAME}", "description"))
    assert all(word in piped for word in ("anat", " 4 ", " 7 "))
    assert not any(word in piped for word in ("FLAIR", NAME, "description"))
    for terminal in (True, False):
        content = info("--json", terminal=terminal)
        assert "FLAIR" not in content and NAME not in content
        listed = json.loads(content)["volumes"]
        assert [(one["series_number"], one["folder"]) for one in listed] == [(4, "anat"), (7, "b")]


def test_a_single_localizer_is_named(tmp_path):
    scout = change(series(1), SOPClassUID=CT, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])

    with pytest.raises(BadFile, match="localizer"):
        io.read(save(scout, tmp_path / "s"))


def test_a_source_of_other_images_alone_is_refused(tmp_path):
    other = empty("1.2.840.10008.5.1.4.1.1.6.1")
    other.Rows, other.Columns = 4, 4

    with pytest.raises(BadFile, match=r"colour|not a CT, MR or PET"):
        io.read(save([other], tmp_path / "s"))


def test_what_repair_did_is_in_the_record_without_names(tmp_path):
    from medseg.inference.jobs import Extras, list_jobs
    from medseg.inference.run import infer
    from medseg.inference.settings import Settings

    pieces = series(9, 20, 24)
    del pieces[4]
    folder = save(pieces, tmp_path / NAME)
    job = list_jobs([folder], tmp_path / "out.nii.gz")[0]

    with pytest.raises(BadFile, match="--repair"):
        infer(job, "otsu", Settings(), Extras())
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME]
    record = infer(job, "otsu", Settings(), Extras(repair=True))

    assert record["warnings"] == [
        "the scan: was repaired: 1 of 9 slices were missing and were interpolated"
    ]
    assert record["settings"]["repair"] is True
    assert NAME not in (tmp_path / "out.json").read_text()
    assert io.read(tmp_path / "out.nii.gz").shape == (24, 20, 9)


def test_nothing_of_the_patient_is_in_what_is_printed_or_written(tmp_path, capsys, monkeypatch):
    """A sentinel in every text field of the header, standard and private."""
    from medseg.cli.app import main

    pieces = series(5, 20, 24)
    sentinels = []
    for piece in pieces:
        for number, (tag, (kind, count, *_)) in enumerate(
            sorted(pydicom.datadict.DicomDictionary.items())
        ):
            if (
                kind in ("LO", "SH", "LT", "ST", "UT", "PN", "UC")
                and 0x00080000 < tag < 0x00400000
                and count == "1"
            ):
                sentinel = f"SENTINEL{number}"
                sentinels.append(sentinel)
                piece.add_new(tag, kind, sentinel)
        piece.add_new(0x00091001, "LO", "SENTINEL9009")
    assert len(set(sentinels)) > 60
    folder = save(pieces, tmp_path / "s")
    broken = save([*pieces, series(1)[0]], tmp_path / "t")

    runs = [
        ["info", folder],
        ["info", "--json", folder],
        ["convert", folder, tmp_path / "x.nrrd"],
        ["info", broken],
    ]
    runs.append(["infer", folder, "-o", tmp_path / "y.nii.gz", "-m", "otsu", "--json"])
    for words in runs:
        monkeypatch.setattr("sys.argv", ["medseg", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
    out = capsys.readouterr()

    assert "SENTINEL" not in out.out + out.err
    for path in tmp_path.iterdir():
        if path.is_file():
            assert b"SENTINEL" not in path.read_bytes()


def test_info_says_once_what_was_passed_over(tmp_path, capsys, monkeypatch):
    from medseg.cli.app import main

    report = empty("1.2.840.10008.5.1.4.1.1.481.3")
    one, two = (
        save([*series(), report], tmp_path / "s"),
        save([*series(), *series(), report], tmp_path / "t"),
    )

    for folder in (one, two):
        monkeypatch.setattr("sys.argv", ["medseg", "info", str(folder)])
        with warnings.catch_warnings(), pytest.raises(SystemExit):
            warnings.simplefilter("always", DataWarning)
            main()
        assert capsys.readouterr().err.count("passed over DICOM files that hold no image: 1") == 1
