"""How cases are split for training and validation: every structure on both sides of every split,
where cases allow.

Cases are dealt out rarest structure first, each to the part that has fewest of it: the iterative
stratification of Sechidis et al. 2011, "On the stratification of multi-label data" (ECML PKDD),
with groups in place of samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

from medseg.dataset.cases import Case, Dataset
from medseg.errors import BadConfig

#: (names for training, names for validation).
Split: TypeAlias = tuple[list[str], list[str]]
#: Case -> the structures that it holds.
Holdings: TypeAlias = Mapping[str, Collection[str]]

#: Of more groups than this none are exchanged afterwards: a structure that so many hold is on all
#: sides anyway.
_EXCHANGED = 400


def usual_folds(cases: int) -> int:
    """Into how many parts cases are split if nobody says: a fifth validates, of many cases less,
    down to a tenth.

    Twenty scans tell how good a model is; each one more that is held out is one that it cannot
    learn from.
    """
    return min(max(cases // 20, 5), 10)


def split_cases(
    dataset: Dataset, folds: int = 5, seed: int = 0, *, holdings: Holdings | None = None
) -> list[Split]:
    """(names for training, names for validation) of every fold; the dataset's own splits where it
    has some.

    Else `folds` parts of nearly equal size, all cases of a group in one part, and of the structures
    that cases hold (`holdings`) as many on both sides as can be; without, cases count as alike.
    Which part a group lands in depends on the names, the structures and the seed alone. Cases that
    the dataset sets aside for testing are in neither. Raises `BadConfig` if there are fewer groups
    than folds.
    """
    if dataset.splits:
        return [(list(training), list(validation)) for training, validation in dataset.splits]
    groups = _groups(dataset)
    every = sorted(name for names in groups.values() for name in names)
    if folds < 2 or len(groups) < folds:
        what = "cases" if len(groups) == len(every) else "patients"
        count = f"{len(groups)} {what} cannot be split into {folds} folds"
        raise BadConfig(f"{dataset.folder}: {count}; use --folds 2 to {len(groups)}")
    deal = _Deal(
        order=_order(groups, seed),
        held={group: _held(names, holdings or {}) for group, names in groups.items()},
        sizes={group: len(names) for group, names in groups.items()},
        folds=folds,
    )
    return [_split(every, part, groups) for part in deal.parts()]


def _groups(dataset: Dataset) -> dict[str, list[str]]:
    """The names of every group's cases, but for those set aside for testing."""
    groups: dict[str, list[str]] = {}
    for case in dataset.cases:
        if case.split != "test":
            groups.setdefault(_group(case), []).append(case.name)
    return groups


def _order(groups: Mapping[str, Sequence[str]], seed: int) -> list[str]:
    """Groups at random, but large ones first, so that the small ones can even things out."""

    def rank(group: str) -> tuple[int, str]:
        return -len(groups[group]), hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()

    return sorted(groups, key=rank)


def _held(names: Iterable[str], holdings: Holdings) -> frozenset[str]:
    """The structures that any of the named cases holds."""
    return frozenset(structure for name in names for structure in holdings.get(name, ()))


def _split(every: Sequence[str], part: Iterable[str], groups: Mapping[str, Sequence[str]]) -> Split:
    """The split in which the groups of a part validate and all other cases train."""
    validation = sorted(name for group in part for name in groups[group])
    held_out = set(validation)
    return [name for name in every if name not in held_out], validation


def _group(case: Case) -> str:
    return f"group {case.group}" if case.group is not None else f"case {case.name}"


class _Deal:
    """Groups being dealt out to parts. Where all hold the same, each goes to the smallest part."""

    def __init__(
        self,
        *,
        order: Sequence[str],
        held: Mapping[str, frozenset[str]],
        sizes: Mapping[str, int],
        folds: int,
    ) -> None:
        self.held, self.sizes = held, sizes
        self.dealt: list[list[str]] = [[] for _ in range(folds)]
        # Cases of each structure's groups.
        self.counts: list[Counter[str]] = [Counter() for _ in range(folds)]
        self.filled = [0] * folds
        self.left = dict.fromkeys(order)
        self.holders = Counter(structure for group in order for structure in held[group])
        # So many parts may be larger by one case.
        self.room, self.larger = divmod(sum(sizes.values()), folds)

    def parts(self) -> list[list[str]]:
        """The groups of every part."""
        # What one group alone holds can be learnt in every fold but the one that it validates: the
        # last.
        for group in [g for g in self.left if any(self.holders[one] == 1 for one in self.held[g])]:
            self._give(
                group,
                min(range(len(self.dealt)), key=lambda part: (self._is_full(part, group), -part)),
            )
        waiting = Counter(structure for group in self.left for structure in self.held[group])
        while waiting:
            rarest = min(waiting, key=lambda one: (waiting[one], one))
            group = next(group for group in self.left if rarest in self.held[group])
            waiting -= Counter(self.held[group])
            self._give(group, self._part_for(group, rarest))
        for group in list(self.left):
            self._give(
                group, min(range(len(self.dealt)), key=lambda part: (self.filled[part], part))
            )
        self._exchange()
        return self.dealt

    def _is_full(self, part: int, group: str) -> bool:
        after = self.filled[part] + self.sizes[group] - self.room
        larger = sum(count > self.room for count in self.filled)
        return after > (1 if larger < self.larger else 0)

    def _part_for(self, group: str, rarest: str) -> int:
        """The part that has fewest of a structure; of one that not every part can have, the first
        ones have it.
        """
        scarce = self.holders[rarest] < len(self.dealt)

        def rank(part: int) -> tuple[int, ...]:
            counts = self.counts[part]
            lacking = sum(not counts[structure] for structure in self.held[group])
            first = part if scarce else 0
            return (
                self._is_full(part, group),
                counts[rarest],
                first,
                -lacking,
                self.filled[part],
                part,
            )

        return min(range(len(self.dealt)), key=rank)

    def _give(self, group: str, part: int) -> None:
        self.left.pop(group, None)
        self.dealt[part].append(group)
        self.counts[part].update(dict.fromkeys(self.held[group], self.sizes[group]))
        self.filled[part] += self.sizes[group]

    def _take(self, group: str, part: int) -> None:
        self.dealt[part].remove(group)
        self.counts[part] -= Counter(dict.fromkeys(self.held[group], self.sizes[group]))
        self.filled[part] -= self.sizes[group]

    def _lacks(self) -> int:
        """How often a structure of several groups is on one side only, or one group's is not
        trained with.

        In the first fold, the usual one, it is worse than in all others.
        """
        lacks = 0
        for structure, count in self.holders.items():
            by_part = [counts[structure] for counts in self.counts]
            first = by_part[0] in (0, sum(by_part)) if count > 1 else by_part[0] > 0
            others = sum(one in (0, sum(by_part)) for one in by_part[1:]) if count > 1 else 0
            lacks += len(self.dealt) * first + others
        return lacks

    def _exchange(self) -> None:
        """Exchange groups of one size between parts while that puts more structures on both
        sides.
        """
        several = [count for count in self.holders.values() if count > 1]
        # Not every part can have what few hold.
        least = sum(max(0, len(self.dealt) - count) for count in several)
        if sum(map(len, self.dealt)) > _EXCHANGED:
            return
        lacks = self._lacks()
        while lacks > least and self._exchange_once(lacks):
            lacks = self._lacks()

    def _exchange_once(self, lacks: int) -> bool:
        places = [(group, part) for part, groups in enumerate(self.dealt) for group in groups]
        for number, (one, here) in enumerate(places):
            for other, there in places[number + 1 :]:
                same = self.held[one] == self.held[other] or self.sizes[one] != self.sizes[other]
                if here == there or same:
                    continue
                self._move(one, here, there)
                self._move(other, there, here)
                if self._lacks() < lacks:
                    return True
                self._move(one, there, here)
                self._move(other, here, there)
        return False

    def _move(self, group: str, start: int, end: int) -> None:
        self._take(group, start)
        self._give(group, end)


def lacking(structures: Iterable[str], names: Iterable[str], holdings: Holdings) -> list[str]:
    """The structures that none of the named cases holds."""
    present = _held(names, holdings)
    return [one for one in structures if one not in present]


def covering(names: Sequence[str], count: int, holdings: Holdings) -> list[str]:
    """So many of the names, the first ones if they hold all that the names hold, else chosen so
    that they hold most.
    """
    selection = list(names[:count])
    if _held(names, holdings) == _held(selection, holdings):
        return selection
    selection, present = [], set[str]()
    for _ in range(min(count, len(names))):
        rest = [name for name in names if name not in selection]
        best = max(rest, key=lambda name: len(set(holdings.get(name, ())) - present))
        selection.append(best)
        present |= set(holdings.get(best, ()))
    return sorted(selection, key=list(names).index)
