"""A cohort in whatever form it is given: a list, a BIDS data set, a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.cohort.cases import Cohort
from medseg.cohort.folders import is_bids, read_bids, read_folder
from medseg.cohort.lists import LIST_SUFFIXES, read_list
from medseg.errors import BadConfig, BadFile


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is wanted of a cohort.

    channels: the model's, '' where it does not name them. suffixes, filters: of a BIDS data set.
    every_series: of folders of DICOM each volume.
    """

    channels: tuple[str, ...] = ("",)
    suffixes: tuple[str, ...] = ()
    filters: Mapping[str, str] = field(default_factory=dict)
    every_series: bool = False


def read_any(path: Path, wanted: Wanted) -> Cohort:
    """The cohort that a path stands for. Raises `BadFile` and `BadConfig`."""
    if not path.exists():
        raise BadFile(f"{path}: there is no such list or folder; check the name")
    if not path.is_dir():
        if path.suffix.lower() in LIST_SUFFIXES:
            _check_unused(path, wanted, "a list says itself which files are cases")
            return read_list(path, wanted.channels)
        endings = ", ".join(LIST_SUFFIXES)
        raise BadFile(
            f"{path}: is no list of cases ({endings}) and no folder; a scan is for medseg infer"
        )
    if is_bids(path):
        together = len(wanted.channels) > 1
        return read_bids(path, _suffixes(wanted), wanted.filters, together=together)
    if wanted.suffixes or wanted.filters:
        raise BadConfig(f"{path}: --suffix and --filter are for a BIDS data set, which this is not")
    if len(wanted.channels) > 1:
        raise BadConfig(
            f"{path}: the model takes {len(wanted.channels)} channels; give a list with a "
            "column for each (case,image_0,image_1), or a BIDS data set"
        )
    return read_folder(path, every_series=wanted.every_series)


def _suffixes(wanted: Wanted) -> Sequence[str]:
    """Which images of a BIDS data set are the channels."""
    if len(wanted.channels) == 1:
        return wanted.suffixes
    if not wanted.suffixes and all(wanted.channels):
        return wanted.channels
    if len(wanted.suffixes) != len(wanted.channels):
        count = len(wanted.channels)
        raise BadConfig(
            f"the model takes {count} channels; say which images they are: --suffix T1w,FLAIR"
        )
    return wanted.suffixes


def _check_unused(path: Path, wanted: Wanted, why: str) -> None:
    if wanted.suffixes or wanted.filters or wanted.every_series:
        raise BadConfig(f"{path}: {why}; leave out --suffix, --filter and --series")
