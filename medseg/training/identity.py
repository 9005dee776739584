"""What a run was begun with, so that what goes on is the same run: labels, cases and their voxels,
split, and model.

It is kept in data.json of the run folder. Voxels are known by hashes, and files that nobody has
touched since are not read again. Runs of older versions have no data.json; of them is compared what
their other files say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from medseg.dataset import Case, Dataset, Digests, digest_case
from medseg.errors import BadConfig
from medseg.files import atomic_write
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.text import parse_json, read_json

if TYPE_CHECKING:
    from medseg.training.rendered import RenderedSource

NAME = "data.json"
#: Size, time of change and time of any change of each file of a case.
Stamps: TypeAlias = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class CaseIdentity:
    """A case: hashes of its images' and its labels' voxels, the structures it holds, and the stamps
    of its files.

    labelled: the values annotated in it, if not all. Stamps are () where a file is a folder, which
    has none.
    """

    image: str
    labels: str
    holds: tuple[str, ...] = ()
    labelled: tuple[int, ...] | None = None
    stamps: Stamps = ()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run was begun with.

    labels: (value, name), in the order of the network's outputs. folds, fold: how many parts, and
    which validates; given: whether the data set itself gives the splits. start: the hash of the
    weights that the run began from.
    """

    channels: tuple[str, ...]
    labels: tuple[tuple[int, str], ...]
    regions: tuple[tuple[int, ...], ...] = ()
    ignore: int | None = None
    folds: int | None = None
    fold: int = 0
    given: bool = False
    start: str | None = None
    cases: Mapping[str, CaseIdentity] = field(default_factory=dict)


def identity_of(
    dataset: Dataset,
    *,
    digests: Mapping[str, Digests],
    holdings: Mapping[str, Sequence[str]],
    folds: int | None,
    fold: int,
    start: str | None,
) -> Identity:
    """Of a data set whose voxels have just been read."""
    cases = {
        case.name: CaseIdentity(
            image=digests[case.name].image if case.name in digests else "",
            labels=digests[case.name].labels if case.name in digests else "",
            holds=tuple(holdings.get(case.name, ())),
            labelled=case.labelled,
            stamps=_stamps(case),
        )
        for case in used_cases(dataset)
    }
    return Identity(
        channels=dataset.channels,
        labels=_labels(dataset.table),
        regions=dataset.regions,
        ignore=dataset.ignore,
        folds=folds,
        fold=fold,
        given=bool(dataset.splits),
        start=start,
        cases=cases,
    )


def used_cases(dataset: Dataset) -> list[Case]:
    """The cases that are not set aside for testing."""
    return [case for case in dataset.cases if case.split != "test"]


def _labels(table: LabelTable) -> tuple[tuple[int, str], ...]:
    return tuple((label.value, label.name) for label in table.labels)


def _stamps(case: Case) -> Stamps:
    paths = [*case.images, *([case.label] if case.label else []), *(mask for _, mask in case.masks)]
    if any(path.is_dir() for path in paths):
        return ()
    return tuple(
        (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for stat in (path.stat() for path in paths)
    )


# On disk ------------------------------------------------------------------------------------------


def write_identity(run: Path, identity: Identity) -> None:
    """Write data.json of a run folder."""
    with atomic_write(run / NAME) as handle:
        handle.write((json.dumps(asdict(identity), indent=1) + "\n").encode())


def read_identity(run: Path) -> Identity | None:
    """What data.json of a run folder says; None where an older version began the run. Raises
    `BadConfig`.
    """
    path = run / NAME
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        cases = {name: CaseIdentity(**_frozen(one)) for name, one in content.pop("cases").items()}
        return Identity(**_frozen(content), cases=cases)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadConfig(f"{path} is damaged; choose another -o") from None


def _frozen(content: Mapping[str, Any]) -> dict[str, Any]:
    def freeze(value: Any) -> Any:
        return tuple(freeze(one) for one in value) if isinstance(value, list) else value

    return {str(key): freeze(value) for key, value in content.items()}


# Compared -----------------------------------------------------------------------------------------


def check_same_data(run: Path, dataset: Dataset, progress: Progress = silent) -> None:
    """Raises `BadConfig` naming the first difference between a data set and what the run was begun
    with.
    """
    before = read_identity(run)
    differences = (
        _old_differences(run, dataset)
        if before is None
        else _differences(before, dataset, progress)
    )
    for difference in differences:
        raise BadConfig(f"{run} {difference}; choose another -o")


def _differences(before: Identity, dataset: Dataset, progress: Progress) -> Iterator[str]:
    if before.channels != dataset.channels:
        yield (
            f"was begun with {_list(before.channels)}, and the data now have"
            f" {_list(dataset.channels)}"
        )
    yield from _other_labels(before.labels, _labels(dataset.table))
    if before.regions != dataset.regions:
        yield "was begun with regions made of other labels than now"
    if before.ignore != dataset.ignore:
        was, now = (
            "no label" if value is None else f"the label {value}"
            for value in (before.ignore, dataset.ignore)
        )
        yield f"was begun with {was} to ignore, and the data now have {now}"
    cases = {case.name: case for case in used_cases(dataset)}
    yield from _other_cases(list(before.cases), list(cases))
    for name, case in cases.items():
        if before.cases[name].labelled != case.labelled:
            yield f"was begun with other structures annotated in case {name}"
    for number, (name, case) in enumerate(cases.items(), 1):
        yield from _other_voxels(before.cases[name], dataset, case)
        progress(name, number, len(cases))


def _list(names: Sequence[str]) -> str:
    return ("the channel " if len(names) == 1 else "the channels ") + ", ".join(names)


def _other_labels(
    before: Sequence[tuple[int, str]], now: Sequence[tuple[int, str]]
) -> Iterator[str]:
    if tuple(before) == tuple(now):
        return
    texts = [", ".join(f"{value} {name}" for value, name in labels[:8]) for labels in (before, now)]
    if texts[0] == texts[1]:  # the difference lies further on
        texts = [", ".join(f"{value} {name}" for value, name in labels if (value,
        name) not in others)
                 for labels, others in ((before, now), (now, before))]  # fmt: skip
    yield f"was begun with the labels {texts[0]}, and the data now have {texts[1]}"


def _other_cases(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    if gone := [name for name in before if name not in set(now)]:
        yield f"was begun with case {gone[0]}, which is gone"
    if new := [name for name in now if name not in set(before)]:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        yield f"was begun without case {new[0]}{more}, which would not be used"


def _other_voxels(before: CaseIdentity, dataset: Dataset, case: Case) -> Iterator[str]:
    stamps = _stamps(case)
    if stamps and stamps == before.stamps:
        return
    now = digest_case(dataset, case)
    parts = [("image", before.image, now.image), ("labels", before.labels, now.labels)]
    differences = [what for what, was, is_now in parts if was != is_now]
    if differences:
        yield f"was begun with other voxels in {' and '.join(differences)} of case {case.name}"


def _old_differences(run: Path, dataset: Dataset) -> Iterator[str]:
    """Of a run without data.json: its split names its cases, and its model, if it is there, labels
    and channels.
    """
    split = read_json(run / "splits.json")
    names = [name for side in split.values() for name in side]
    case_names = [case.name for case in used_cases(dataset)]
    yield from _other_cases(
        names, [name for name in case_names if name in names] if dataset.splits else case_names
    )
    table = run / "model" / "labels.csv"
    if table.exists():
        yield from _other_labels(_labels(LabelTable.read(table)), _labels(dataset.table))


def check_same_split(
    run: Path,
    dataset: Dataset,
    *,
    folds: int | None,
    fold: int | None,
    split_of: Callable[[int], Sequence[str]],
) -> None:
    """Raises `BadConfig` where the parts, the fold or the given splits are not those that the run
    was begun with.

    folds, fold: as they are asked for now, None where nobody asks. split_of: the names that a fold
    would hold out; only asked of a run that does not say what it was begun with.
    """
    before = read_identity(run)
    held_out = set(read_json(run / "splits.json")["validation"])
    if before is not None:
        difference = _other_split(before, dataset, folds=folds, fold=fold, held_out=held_out)
    elif _may_hold_out(held_out, dataset, folds=folds, fold=fold, split_of=split_of):
        return
    else:
        difference = "with another fold or other splits"
    if difference:
        raise BadConfig(f"{run} was begun {difference}; choose another -o")


def _other_split(
    before: Identity,
    dataset: Dataset,
    *,
    folds: int | None,
    fold: int | None,
    held_out: set[str],
) -> str:
    """What a run was begun with that is different now, '' if nothing is; held_out: the names that
    validate.
    """
    if before.given and not dataset.splits:
        return "with splits that the data set gave"
    if not before.given and dataset.splits:
        return "when the data set gave no splits"
    if not before.given and folds not in (None, before.folds):
        return f"with {before.folds} folds, not {folds}"
    if fold not in (None, before.fold):
        return f"with fold {before.fold}, not {fold}"
    is_gone = before.fold >= len(dataset.splits)
    if before.given and (is_gone or set(dataset.splits[before.fold][1]) != held_out):
        return "with other splits than the data set now gives"
    return ""


def _may_hold_out(
    held_out: set[str],
    dataset: Dataset,
    *,
    folds: int | None,
    fold: int | None,
    split_of: Callable[[int], Sequence[str]],
) -> bool:
    """Whether a run that does not say what it was begun with may be of the fold that is asked
    for.
    """
    is_same = (folds is None and fold is None) or set(split_of(fold or 0)) == held_out
    if dataset.splits:
        return any(held_out == set(validation) for _, validation in dataset.splits)
    return is_same


def check_same_start(run: Path, start: str | None, *, has_state: bool) -> None:
    """Raises `BadConfig` where a run would go on from other weights; start: their hash, None where
    none are named.
    """
    before = read_identity(run)
    if before is None or (start is None and has_state) or before.start == start:
        return
    if start is None:
        raise BadConfig(
            f"{run} was begun with --finetune and has not begun to train; name the model again"
        )
    what = "from no other model" if before.start is None else "from another model"
    raise BadConfig(f"{run} was begun {what}; choose another -o")


def check_same_maps(run: Path, source: RenderedSource) -> None:
    """Record label maps and labels that a run renders from, or raise `BadConfig` naming the first
    difference.
    """
    before = read_identity(run)
    cases = {name: CaseIdentity(image="", labels=digest) for name, digest in source.digests.items()}
    now = Identity(channels=("rendered",), labels=_labels(source.table), cases=cases)
    if before is None:
        if not (run / "state.safetensors").exists():
            write_identity(run, now)
        return
    differences = [
        *_other_labels(before.labels, now.labels),
        *_other_cases(list(before.cases), list(cases)),
    ]
    if not differences:
        names = [name for name, case in before.cases.items() if case.labels != cases[name].labels]
        differences = [f"was begun with other voxels in {name}" for name in names]
    if differences:
        raise BadConfig(f"{run} {differences[0]}; choose another -o")
