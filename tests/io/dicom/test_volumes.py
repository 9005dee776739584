"""Classic DICOM series: right to the voxel, or refused with the reason."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from making.dicom import CT, MR, NAME, OBLIQUE, PT, content_of, save, series, truth
from making.fuzzing import mutated
from making.strategies import affines
from medseg import io
from medseg.errors import BadFile, DataWarning
from medseg.volume import LPS


def test_a_shuffled_oblique_series_is_exact(tmp_path):
    pieces = series()

    volume = io.read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, truth(pieces).data)
    assert np.allclose(volume.affine, truth(pieces).affine, atol=1e-6)


def test_simpleitk_agrees(tmp_path):
    folder = save(series(), tmp_path / "s")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()

    volume = io.read(folder)

    assert np.array_equal(sitk.GetArrayFromImage(image).T, volume.data)
    place = np.array(image.TransformIndexToPhysicalPoint((2, 3, 4))) * (-1, -1, 1)
    assert np.allclose(place, (volume.affine @ (2, 3, 4, 1))[:3], atol=1e-4)


@given(affine=affines(), sop_class=st.sampled_from([CT, MR, PT]), backwards=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_orientation_is_placed_right(tmp_path_factory, affine, sop_class, backwards):
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    pieces = series()
    for number, piece in enumerate(pieces):
        piece.SOPClassUID = piece.file_meta.MediaStorageSOPClassUID = sop_class
        piece.PixelSpacing = [f"{spacing[1]:.9g}", f"{spacing[0]:.9g}"]
        piece.ImageOrientationPatient = [f"{x:.10f}" for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
        piece.ImagePositionPatient = [f"{x:.9g}" for x in (lps @ (0, 0, number, 1))[:3]]
    marker = 4 if backwards else 0
    values = np.zeros((4, 3), np.int16)
    values[3, 2] = 5000
    pieces[marker].PixelData = values.tobytes()

    volume = io.read(save(pieces, tmp_path_factory.mktemp("s")))

    found = np.argwhere(volume.data == 5000 - 1024)
    assert len(found) == 1
    assert np.allclose(
        (volume.affine @ (*found[0], 1))[:3], (affine @ (2, 3, marker, 1))[:3], atol=1e-3
    )


def test_each_slice_of_pet_has_its_own_scale(tmp_path):
    pieces = series()
    for number, piece in enumerate(pieces):
        piece.SOPClassUID = piece.file_meta.MediaStorageSOPClassUID = PT
        piece.RescaleSlope, piece.RescaleIntercept = f"{0.5 + number}", 0

    volume = io.read(save(pieces, tmp_path / "s"))

    assert volume.data.dtype == np.float32
    for number, piece in enumerate(pieces):
        stored = np.frombuffer(piece.PixelData, np.int16).reshape(4, 3).T
        assert np.allclose(volume.data[..., number], stored * (0.5 + number))


@pytest.mark.parametrize(("bits", "signed"), [(12, 0), (12, 1), (16, 0), (16, 1), (8, 0)])
def test_unused_bits_and_signs_are_read_right(tmp_path, bits, signed):
    pieces = series()
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    values = np.random.default_rng(2).integers(low, high, (5, 4, 3))
    for number, piece in enumerate(pieces):
        piece.BitsStored, piece.HighBit, piece.PixelRepresentation = bits, bits - 1, signed
        piece.BitsAllocated = 8 if bits == 8 else 16
        stored = values[number] & ((1 << bits) - 1)
        if bits == 12:
            # What an old scanner leaves in the unused bits.
            stored = stored | (np.arange(12).reshape(4, 3) << 12)
        piece.PixelData = stored.astype(np.uint8 if bits == 8 else np.uint16).tobytes()
        piece.RescaleIntercept = 0

    volume = io.read(save(pieces, tmp_path / "s"))

    assert np.array_equal(volume.data, values.transpose(2, 1, 0))


def test_subfolders_notes_and_dicomdir_do_not_matter(tmp_path):
    pieces = series()
    save(pieces[:2], tmp_path / "s" / "a")
    save(pieces[2:], tmp_path / "s" / "b")
    (tmp_path / "s" / "notes.txt").write_text("hello")
    (tmp_path / "s" / "README").touch()

    assert np.array_equal(io.read(tmp_path / "s").data, truth(pieces).data)


@pytest.mark.parametrize("suffix", [".dcm", "", ".17"])
@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_a_file_named_like_the_slices_that_is_none_is_warned_about(tmp_path, suffix, content):
    folder = save(series(), tmp_path / "s")
    for file in list(folder.iterdir()):
        file.rename(file.with_suffix(suffix))
    (folder / f"000x{suffix}").write_bytes(content)

    with pytest.warns(DataWarning, match="named like DICOM that are not: 1"):
        io.read(folder)


def test_objects_without_an_image_are_passed_over_with_a_warning(tmp_path):
    pieces = series()
    folder = save(pieces, tmp_path / "s")
    report = Dataset()
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID = generate_uid()
    report.save_as(folder / "struct.dcm", enforce_file_format=True)
    (folder / "fake.dcm").write_text("no dicom at all")

    with pytest.warns(DataWarning) as caught:
        volume = io.read(folder)

    assert np.array_equal(volume.data, truth(pieces).data)
    assert sorted(str(w.message).rsplit(" ", 1)[1] for w in caught) == ["1", "1"]


Change = Callable[[list[Dataset]], object]


def _set(**values: object) -> Change:
    """Change tags of every slice."""
    return lambda pieces: [
        setattr(piece, tag, value) for piece in pieces for tag, value in values.items()
    ]


def _set_one(**values: object) -> Change:
    """Change tags of the third slice."""
    return lambda pieces: [setattr(pieces[2], tag, value) for tag, value in values.items()]


def _drop(*tags: str) -> Change:
    return lambda pieces: [delattr(piece, tag) for piece in pieces for tag in tags]


def _move(number: int, *shift: float) -> Change:
    def move(pieces: list[Dataset]) -> None:
        place = np.array([float(x) for x in pieces[number].ImagePositionPatient]) + shift
        pieces[number].ImagePositionPatient = [f"{x:.6f}" for x in place]

    return move


def _tilt(pieces: list[Dataset]) -> None:
    for number in range(len(pieces)):
        _move(number, 0, number * 0.6, 0)(pieces)


def _twice(pieces: list[Dataset]) -> None:
    copy = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content_of(pieces[2])))
    copy.SOPInstanceUID = generate_uid()
    pieces.append(copy)


def _another(pieces: list[Dataset]) -> None:
    """Another slice at a place where there is one."""
    _twice(pieces)
    pieces[-1].PixelData = bytes(len(pieces[-1].PixelData))


def _all_at_one_place(pieces: list[Dataset]) -> None:
    for piece in pieces:
        piece.ImagePositionPatient = [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pieces: pieces.pop(2), "1 slices are missing.*--repair"),
        (lambda pieces: pieces.__delitem__(slice(1, 3)), "2 slices are missing|distances"),
        (_twice, "same place.*--repair"),
        (_another, "same place.*give one of them$"),
        (_all_at_one_place, "5 slices all lie at the same place"),
        (_move(2, *(0.1 * OBLIQUE[:, 2])), "distances.*--repair"),
        (_move(2, 0, 0.2, 0), "straight line.*--repair"),
        (_tilt, "gantry tilt.*--repair"),
        (lambda pieces: pieces.__delitem__(slice(1, None)), "too few for a volume"),
        (lambda pieces: pieces.__delitem__(slice(2, None)), "too few"),
        (lambda pieces: pieces.clear(), "empty folder"),
        (_set_one(SeriesInstanceUID="1.2.3"), "2 series"),
        (_set_one(FrameOfReferenceUID="1.2.3"), "coordinate systems"),
        (_set_one(SOPClassUID=MR), "kinds of image"),
        (_set_one(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "orientations"),
        (_set_one(PixelSpacing=[0.9, 0.9]), "pixel spacings"),
        (_set_one(Rows=3, Columns=4), "sizes"),
        (_set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
        (_set(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1"), "CT, MR or PET"),
        (_set(SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1"), "where each of its frames"),
        (_set(NumberOfFrames=5), "where each of its frames"),
        (_set(NumberOfFrames=0), "frames|pixels"),
        (_set(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour"),
        (_set(PhotometricInterpretation="PALETTE COLOR"), "colour"),
        (_set(RescaleSlope=0), "scaling"),
        (_set(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "right angles"),
        (_set(ImageOrientationPatient=[2, 0, 0, 0, 1, 0]), "right angles"),
        (_set(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "right angles"),
        (_set(PixelSpacing=[0, 0]), "line|spacing"),
        (_set(PixelSpacing=[-1, 1]), "line|spacing"),
        (_set(BitsStored=0), "stored in a way"),
        (_set(BitsStored=17), "stored in a way"),
        (_set(HighBit=14), "stored in a way"),
        (_set(BitsAllocated=64), "stored in a way"),
        (_set(Rows=0), "axis"),
        (_set_one(PixelData=b"\0\0"), "damaged"),
        (_set(Rows=5), "damaged"),
        (_set(Rows=60000, Columns=60000), "claims"),
        (_drop("ImagePositionPatient"), "where its slice lies"),
        (_drop("ImageOrientationPatient"), "where its slice lies"),
        (_drop("PixelSpacing"), "where its slice lies"),
        (_drop("PixelData"), "damaged"),
        (_drop("RescaleIntercept"), "scaling"),
        (_drop("RescaleSlope", "RescaleIntercept"), "how its stored values are scaled"),
        (_set_one(PixelSpacing=["0.9", "0.9", "0.9"]), "PixelSpacing is not what"),
        (_set_one(Rows=5), "sizes"),
        (_drop("Rows"), "axis"),
        (lambda pieces: pieces[4].__delattr__("Rows"), "axis"),
        (
            lambda pieces: [
                p.__setattr__("SOPClassUID", "1.2.3") or p.__delattr__("Rows") for p in pieces
            ],
            "no DICOM",
        ),
        (_drop("BitsStored"), "stored in a way"),
        (_drop("PhotometricInterpretation"), "colour"),
        (_drop("SOPClassUID"), "CT, MR or PET"),
    ],
)
def test_a_series_that_is_not_sure_is_refused(tmp_path, change, reason):
    pieces = series()
    change(pieces)
    folder = save(pieces, tmp_path / "scan")

    with pytest.raises(BadFile, match=reason) as caught:
        io.read(folder)

    assert str(caught.value).startswith(str(folder))
    assert NAME not in str(caught.value)


@pytest.mark.parametrize("keep", [10, 140, 300, 600, -5])
def test_a_truncated_slice_is_refused(tmp_path, keep):
    folder = save(series(), tmp_path / "s")
    victim = sorted(folder.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:keep])

    with pytest.raises(BadFile), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten bytes are no DICOM any more; then a slice is missing
        io.read(folder)


def test_300_mutations_of_a_slice_raise_only_bad_file_and_never_move_the_scan(tmp_path):
    pieces = series()
    folder = save(pieces, tmp_path / "s")
    expected = io.read(folder)
    victim = sorted(folder.iterdir())[2]
    content = victim.read_bytes()
    chance = random.Random(11)
    refused = 0

    for _ in range(300):
        victim.write_bytes(mutated(content, chance, len(content)))
        with warnings.catch_warnings():
            # Pydicom's warnings quote the header, so none may come through.
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DataWarning)
            try:
                volume = io.read(folder)
            except BadFile as error:
                refused += 1
                assert NAME not in str(error)
            else:
                # The other slices hold the geometry in place; an end slice may be lost, which shows
                # in the shape.
                assert np.allclose(volume.spacing_mm, expected.spacing_mm, rtol=0.02)

    assert refused > 50


def test_missing_pydicom_is_said_with_the_remedy(tmp_path, monkeypatch):
    import sys

    folder = save(series(), tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pydicom", None)

    with pytest.raises(BadFile, match=r'pip install "medseg\[dicom\]"'):
        io.read(folder)
