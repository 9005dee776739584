"""Cohorts from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from medseg.api.segmenting import Changes, ModelLike, model_of, named_values, settings_of
from medseg.errors import BadConfig
from medseg.inference import Extras, Settings, channel_names, check_also, identity_of, label_table
from medseg.io import as_path, is_path, what_is
from medseg.logs import Progress, silent
from medseg.text import as_mapping, as_names, as_number, as_whole

if TYPE_CHECKING:
    from medseg.cohort import Cohort, Result, Wanted


def batch(
    cohort: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: ModelLike = "brain",
    settings: Settings | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    on: str | None = None,
    retry: Sequence[str] = (),
    keep_others: bool = False,
    verify: bool = False,
    max_failed: int | Fraction | None = None,
    case_time_s: float = 0.0,
    case_memory_bytes: int | None = None,
    total_memory_bytes: int | None = None,
    layout: Literal["auto", "cases", "bids"] = "auto",
    suffixes: Sequence[str] = (),
    filters: Mapping[str, str] | None = None,
    every_series: bool = False,
    pictures: bool = True,
    extras: Extras | None = None,
    progress: Progress = silent,
    **changes: Unpack[Changes],
) -> Result:
    """Segment a cohort in several processes, as `medseg batch` does; called again it goes on.

    cohort: a list (.csv, .tsv, .jsonl, .parquet), a BIDS data set or a folder tree. output: a
    folder, or a place in a store such as 's3://bucket/out'. settings, changes: as of `segment`.
    part: i of n, from 0. workers: 0 for what measurement says. on: 'host:port' of a Ray cluster, ''
    for one started here. retry: 'failed', 'lost', 'timeout', 'memory', 'all'. max_failed: stop
    early when more have failed; a share as `Fraction(5, 100)`. suffixes, filters: of BIDS.
    every_series: each volume of DICOM. extras: what is written beside the labels. Raises
    `BadFile`, `BadConfig`, `BadModel`, `BadOutput`, `Interrupted`.
    """
    from medseg.cohort import RETRIES, Choice, Limits, Request, Wanted, run_part

    plain, extras = settings_of(settings, changes), _checked(extras or Extras())
    choice = Choice(
        part=part_of(part), retry=as_names(retry, "retry", allowed=RETRIES), keep_others=keep_others
    )
    memory = {"total_memory_bytes": total_memory_bytes, "case_memory_bytes": case_memory_bytes}
    limits = Limits(**_limits(workers, case_time_s, max_failed, memory=memory))
    names = _names(model)
    loaded = model_of(list(names))
    asked = named_values(plain, changes, loaded)
    check_also(loaded, extras.also)
    wanted = Wanted(
        channels=tuple(channel_names(loaded)), suffixes=as_names(suffixes, "suffixes"),
        filters=as_mapping(filters, "filters"), every_series=every_series,
    )  # fmt: skip
    cases, form = _cases(cohort, wanted, layout)
    request = Request(
        models=names, model=identity_of(loaded), settings=asked, extras=extras, layout=form,
        pictures=pictures, verify=verify, several=len(suffixes) > 1,
    )  # fmt: skip
    return run_part(
        cases, _place(output), request=request, choice=choice, limits=limits,
        table=label_table(loaded), progress=progress, on=on,
    )  # fmt: skip


def _checked(extras: object) -> Extras:
    if not isinstance(extras, Extras):
        raise BadConfig(f"extras are a medseg.inference.Extras, and this is {what_is(extras)}")
    return extras


def _place(output: str | os.PathLike[str]) -> Path | str:
    """A folder, or the address of a place in a store."""
    from medseg.cohort import is_store

    return output if isinstance(output, str) and is_store(output) else as_path(output, "output")


def _names(model: Any) -> tuple[str, ...]:
    """Names and folders of models, which each process loads for itself; folders by their whole
    path. Raises `BadConfig`.
    """
    several = model if isinstance(model, list | tuple) else [model]
    if not several or not all(is_path(one) for one in several):
        raise BadConfig(
            "each process of a cohort loads its model itself, so give names or folders;"
            f" this is {what_is(model)}"
        )
    names = [os.fspath(one) for one in several]
    return tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in names)


def _cases(cohort: str | os.PathLike[str], wanted: Wanted, layout: str) -> tuple[Cohort, str]:
    """The cases, and the form of the output. Raises `BadFile`, `BadConfig`."""
    from medseg.cohort import read_any

    if layout not in ("auto", "cases", "bids"):
        raise BadConfig(f"there is no layout '{layout}'; use auto, cases or bids")
    cases = read_any(as_path(cohort, "a cohort"), wanted)
    if layout == "bids" and cases.kind != "bids":
        raise BadConfig("layout 'bids' is for a BIDS data set, whose names say where results lie")
    return cases, "bids" if layout != "cases" and cases.kind == "bids" else "cases"


def part_of(part: object) -> tuple[int, int]:
    """Part i of n, 0 <= i < n. Raises `BadConfig` for what is none."""
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise BadConfig(f"a part is two numbers, (i, n) from 0 on, and this is {what_is(part)}")
    number, count = (as_whole(one, "each number of a part") for one in part)
    if number >= count:
        raise BadConfig(f"part {number} of {count}: parts are numbered from 0")
    return number, count


def _limits(
    workers: object,
    case_time_s: object,
    max_failed: int | Fraction | None,
    *,
    memory: Mapping[str, object],
) -> dict[str, Any]:
    """What a part may use. Raises `BadConfig`."""
    most_bytes = {
        name.removeprefix("total_"): None if one is None else int(as_number(one, name, least=1))
        for name, one in memory.items()
    }
    return (
        _most(max_failed)
        | most_bytes
        | {
            "workers": as_whole(workers, "workers", most=1024),
            "case_time_s": as_number(case_time_s, "case_time_s"),
        }
    )


def _most(max_failed: int | Fraction | None) -> dict[str, Any]:
    if max_failed is None:
        return {}
    if isinstance(max_failed, Integral):
        return {"max_failed": as_whole(max_failed, "max_failed")}
    return {"max_failed_share": as_number(max_failed, "max_failed as a share", most=1)}
