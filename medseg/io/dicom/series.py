"""Slices become volumes: which belong together, in which order, and where they lie.

A volume is found by what all its slices share (series, kind, size, orientation, spacing); where
several slices then lie at one place, by what tells them apart (echo, time, diffusion, acquisition
...), and only if that does so for all. Source: PS3.3 C.7.6.2 and C.7.6.16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile
from medseg.io.dicom.lines import SPLITS, alike, entwined, why_mixed
from medseg.io.dicom.slices import CAPTURES, SEG_CLASSES, SOP_CLASSES, Slice, plain_dtype
from medseg.io.dicom.source import Source
from medseg.io.dicom.stack import stacked
from medseg.io.dicom.traits import untangled, why_mixed_types


@dataclass(frozen=True, kw_only=True)
class Found:
    """A volume in a source. `slices` are in k order if there is no `problem`."""

    number: str  # N for a series, N.M for a volume of a series that holds several
    slices: tuple[Slice, ...]
    # Voxel index to RAS+ mm; None where the slices do not say.
    affine: NDArray[np.float64] | None = None
    problem: str = ""  # why it cannot be read as it is: a sentence after the name of the source
    differs: str = ""  # in what it differs from the others of its series
    # Whether the problem lies in the slices, not in how they lie together.
    problem_of_slice: bool = False
    remarks: tuple[str, ...] = ()  # what its headers disagree in without consequence
    assumed: str = ""  # what `repair` takes for granted, in words

    @property
    def series(self) -> str:
        """The Series Instance UID."""
        return self.slices[0].series

    @property
    def modality(self) -> str:
        """CT, MR, PT, XA, DX, MG, OT for secondary captures, or '' for images that are no scans."""
        return (SOP_CLASSES | CAPTURES).get(self.slices[0].sop_class, "")


def find_volumes(source: Source, slices: Sequence[Slice]) -> tuple[list[Found], int]:
    """The volumes that slices make up, and how many images were set aside (localizers, pictures of
    other kinds).

    Series are numbered by Series Number, then by UID: the numbers do not depend on the names of
    files.
    """
    by_series: dict[str, list[Slice]] = {}
    for piece in sorted(
        slices, key=lambda piece: (piece.instance_number or 0, piece.sop_instance, piece.frame)
    ):
        by_series.setdefault(piece.series, []).append(piece)
    series = _scans(by_series.values(), _is_scan) or _scans(by_series.values(), _is_placed_capture)
    if not series:  # nothing else is there: say what it is
        series = list(by_series.values())
    aside = len(slices) - sum(map(len, series))
    series.sort(key=lambda pieces: (pieces[0].series_number, pieces[0].series))
    volumes: list[Found] = []
    for n, pieces in enumerate(series, start=1):
        parts = _volumes_of(source, pieces)
        for m, part in enumerate(parts, start=1):
            number = f"{n}.{m}" if len(parts) > 1 else str(n)
            volumes.append(_arranged(source, number, part))
    return volumes, aside


def _scans(series: Iterable[list[Slice]], wanted: Callable[[Slice], bool]) -> list[list[Slice]]:
    """Of the series that hold a wanted slice, all slices but the localizers."""
    scans = [[piece for piece in pieces if not piece.localizer] for pieces in series]
    return [pieces for pieces in scans if any(wanted(piece) for piece in pieces)]


def _is_scan(piece: Slice) -> bool:
    return piece.sop_class in SOP_CLASSES


def _is_placed_capture(piece: Slice) -> bool:
    return piece.sop_class in CAPTURES and piece.placed


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Slices that may be a volume, in what they differ from others of their series, and why they
    are none.
    """

    pieces: list[Slice]
    differs: str = ""
    problem: str = ""


def _volumes_of(source: Source, pieces: list[Slice]) -> list[_Part]:
    """A series' slices volume by volume."""
    kinds = alike(pieces, lambda piece: (piece.sop_class, piece.samples))
    differs = "kinds of image" if len(kinds) > 1 else ""
    # The rest can only be compared if every slice says it.
    defective = [any(_defect(source, piece) for piece in part) for part in kinds]
    volumes = [_Part(pieces=part) for part in compress(kinds, defective)]
    parts, reason = _parted([part for part, bad in zip(kinds, defective) if not bad])
    reasons = [differs, reason]
    for members in entwined(parts):
        if len(members) > 1:
            together = list(chain.from_iterable(members))
            volumes.append(_Part(pieces=together, problem=why_mixed(members)))
            continue
        alone, reason = untangled(members[0])
        reasons.append(reason)
        volumes += [_Part(pieces=part, problem=why_mixed_types(part)) for part in alone]
    first = next(filter(None, reasons), "")
    return [replace(part, differs=first) for part in volumes]


def _parted(parts: list[list[Slice]]) -> tuple[list[list[Slice]], str]:
    """Slices parted by what all of a volume share, and what parted them first; '' if nothing
    did.
    """
    reason = ""
    for what, split in SPLITS:
        finer = [group for part in parts for group in split(part)]
        if len(finer) > len(parts):
            reason = reason or what
        parts = finer
    return parts, reason


def _arranged(source: Source, number: str, part: _Part) -> Found:
    """The volume of slices that belong together, or the reason why they are none."""
    volume = Found(
        number=number, slices=tuple(part.pieces), differs=part.differs, problem_of_slice=True
    )
    problem = (
        next(filter(None, (_defect(source, piece) for piece in part.pieces)), "") or part.problem
    )
    if problem:
        return replace(volume, problem=problem)
    try:
        stack = stacked(part.pieces)
    except BadFile as error:
        return replace(volume, problem=str(error))
    return replace(
        volume,
        slices=tuple(stack.slices),
        affine=None if stack.conflict else stack.affine,
        problem=stack.conflict or stack.problem,
        problem_of_slice=False,
        remarks=stack.remarks,
        assumed="its coordinate systems were taken to be one" if stack.conflict else "",
    )


def _defect(source: Source, piece: Slice) -> str:
    """What is wrong with one slice, as a sentence that begins with its file; '' if nothing is."""
    reason = (
        _no_scan(piece)
        or piece.problem
        or _odd_picture(piece)
        or _odd_geometry(piece)
        or _odd_scale(piece)
    )
    return f"{source.where(piece.entry)}: {reason}" if reason else ""


def _no_scan(piece: Slice) -> str:
    if not piece.photometric:
        return "does not say whether it is in grey values or colour; export it again"
    if piece.samples != 1 or not piece.photometric.startswith("MONOCHROME"):
        return "is a colour image; give the original series in grey values"
    if piece.sop_class in SEG_CLASSES:
        return (
            "is a segmentation, whose labels are read if this file itself is given; as a scan give"
            " the original series"
        )
    if not _is_scan(piece) and not (
        piece.sop_class in CAPTURES and (piece.placed or piece.problem)
    ):
        return (
            "is not a CT, MR or PET image, nor one that says where it lies; give the original"
            " series"
        )
    if piece.localizer:
        return "is a localizer, not a slice of a volume; give the series that was planned on it"
    return ""


def _odd_picture(piece: Slice) -> str:
    if piece.rows < 1 or piece.columns < 1:
        return "its header gives an axis a length that no scan has; the file is damaged"
    if plain_dtype(piece) is None:
        return "its pixels are stored in a way that medseg does not read; export it again"
    if piece.has_lookup:
        return "its values need a lookup table, which medseg does not apply; export it again"
    return ""


def _odd_geometry(piece: Slice) -> str:
    if not piece.placed:
        return "does not say where its slice lies or how large its pixels are; export it again"
    along, down = np.reshape(piece.orientation or (), (2, 3))
    products = np.array([along @ along, down @ down, along @ down])
    if np.abs(products - (1, 1, 0)).max() > 2e-3:
        return "the directions of its rows and columns are not at right angles; export it again"
    return ""


def _odd_scale(piece: Slice) -> str:
    if (piece.slope is None) != (piece.intercept is None) or piece.slope == 0:
        return "the scaling of its values is impossible; export it again"
    if piece.slope is None and SOP_CLASSES.get(piece.sop_class) in ("CT", "PT"):
        return "does not say how its stored values are scaled, as CT and PET must; export it again"
    return ""


def differences(found: Sequence[Found]) -> str:
    """How several volumes come about, for a message: series, and in what volumes of one series
    differ.
    """
    series = Counter(volume.series for volume in found)
    if len(series) > 1:
        return f"holds {len(found)} volumes of {len(series)} series"
    return f"holds {len(found)} volumes of different {found[0].differs or 'kinds'} in one series"
