"""Every tag that is read, removed, emptied, of a wrong type and too many: a clear refusal or the
right volume.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from making.dicom import ENHANCED_MR, MR, NAME, as_mr, change, content_of, enhanced, series, truth
from medseg import io
from medseg.errors import BadFile
from medseg.io.dicom.slices import TAGS

#: Tags inside functional groups: sequence and tag.
NESTED = [
    ("PixelMeasuresSequence", "PixelSpacing"), ("PlaneOrientationSequence",
    "ImageOrientationPatient"),
    ("PlanePositionSequence", "ImagePositionPatient"), ("PixelValueTransformationSequence",
    "RescaleSlope"),
    ("PixelValueTransformationSequence", "RescaleIntercept"), ("FrameContentSequence", "StackID"),
    ("FrameContentSequence", "TemporalPositionIndex"), ("FrameContentSequence",
    "DimensionIndexValues"),
    ("MREchoSequence", "EffectiveEchoTime"), ("MRImageFrameTypeSequence", "FrameType"),
]  # fmt: skip
MADE = {
    "CT": lambda: series(4),
    "MR": lambda: as_mr(series(4)),
    "enhanced": lambda: [enhanced([series(4)], ENHANCED_MR)],
}


def removed(dataset: Dataset, tag: int | str) -> None:
    if Tag(tag) in dataset:
        del dataset[Tag(tag)]


def emptied(dataset: Dataset, tag: int | str) -> None:
    kind = vr_of(tag)
    dataset.add_new(Tag(tag), kind, [] if kind == "SQ" else None)


def of_a_wrong_type(dataset: Dataset, tag: int | str) -> None:
    if vr_of(tag) in ("SH", "LO", "CS", "UI"):
        dataset.add_new(Tag(tag), "US", 7)
    else:
        dataset.add_new(Tag(tag), "SH", "not a number")


def too_many(dataset: Dataset, tag: int | str) -> None:
    kind = vr_of(tag)
    values = {
        "DS": ["1"] * 99,
        "IS": ["1"] * 99,
        "US": [1] * 99,
        "UI": ["1.2.3"] * 9,
        "FD": [1.0] * 99,
        "UL": [1] * 99,
    }
    found = values.get(kind)
    dataset.add_new(Tag(tag), kind if found else "CS", found or ["A"] * 99)


def vr_of(tag: int | str) -> str:
    return dictionary_VR(Tag(tag)).split(" ")[0] if isinstance(tag, str) else "OB"


def outcome(contents: list[bytes], folder, expected) -> str:
    folder.mkdir(exist_ok=True)
    for n, content in enumerate(contents):
        (folder / f"{n}.dcm").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            volume = io.read(folder)
        except BadFile as error:
            assert (
                str(error).startswith(str(folder))
                and NAME not in str(error)
                and len(str(error)) > 40
            )
            return "refused"
    assert volume.shape == expected.shape
    assert np.array_equal(volume.data, expected.data)
    assert np.allclose(volume.affine, expected.affine, atol=1e-6)
    return "right"


def spoilt(
    pieces: list[Dataset], contents: list[bytes], spoil, tag: int | str, every: bool
) -> list[bytes]:
    """The files with a tag of all of them, or of the last slice, spoilt."""
    out = []
    for n, piece in enumerate(pieces):
        if not every and n < len(pieces) - 1:
            out.append(contents[n])
            continue
        piece = copy.deepcopy(piece)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom says that the value does not fit
            spoil(piece, tag)
        if Tag(tag) in (Tag("SOPClassUID"), Tag("SOPInstanceUID")) and spoil is of_a_wrong_type:
            buffer = pydicom.filebase.DicomBytesIO()
            piece.save_as(buffer)
            out.append(buffer.getvalue())
        else:
            out.append(content_of(piece))
    return out


@pytest.mark.parametrize("spoil", [removed, emptied, of_a_wrong_type, too_many])
@pytest.mark.parametrize("kind", MADE)
def test_every_tag(tmp_path, kind, spoil):
    pieces = MADE[kind]()
    contents = [content_of(piece) for piece in pieces]
    expected = truth(as_mr(series(4)) if kind == "MR" else series(4))
    assert outcome(contents, tmp_path / "whole", expected) == "right"
    seen = set()
    for number, tag in enumerate([*TAGS, "PixelData"]):
        for every in (False, True):
            seen.add(
                outcome(
                    spoilt(pieces, contents, spoil, tag, every),
                    tmp_path / f"{number}{every}",
                    expected,
                )
            )
    assert seen == {"right", "refused"}


@pytest.mark.parametrize("spoil", [removed, emptied, of_a_wrong_type, too_many])
@pytest.mark.parametrize("shared", [False, True])
def test_every_tag_of_functional_groups(tmp_path, spoil, shared):
    pieces = [enhanced([series()])]
    for number, (sequence, tag) in enumerate(NESTED):
        piece = copy.deepcopy(pieces[0])
        groups = (
            piece.SharedFunctionalGroupsSequence
            if shared
            else piece.PerFrameFunctionalGroupsSequence[-1:]
        )
        for group in groups:
            if sequence in group:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    spoil(group[sequence][0], tag)
        outcome([content_of(piece)], tmp_path / str(number), truth(series()))


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept"])
def test_scaling_that_only_some_slices_have_is_refused(tmp_path, tag):
    pieces = change(series(), SOPClassUID=MR)
    for name in ("RescaleSlope", "RescaleIntercept"):
        delattr(pieces[2], name)
    for n, piece in enumerate(pieces):
        (tmp_path / f"{n}.dcm").write_bytes(content_of(piece))

    with pytest.raises(BadFile, match="only some of its slices say how their values are scaled"):
        io.read(tmp_path)
