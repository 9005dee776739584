"""Structures that are absent, tiny or in pieces where others have them whole, and cases on both
sides of a split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from medseg.dataset.cases import Dataset, Finding
from medseg.dataset.check.measures import CaseFacts

#: Structures of fewer voxels than this are suspicious where the other cases have ten times as much.
TINY_VOXELS = 10


def absent_structures(
    dataset: Dataset, facts: Sequence[CaseFacts], unreadable: Sequence[Finding] = ()
) -> list[Finding]:
    """Label maps and structures that are empty or tiny where nearly all other cases have them, and
    values of few.
    """
    findings = _empty_maps(facts, {finding.case for finding in unreadable})
    if len(facts) < 5:
        return findings
    with_labels = [one for one in facts if one.voxels]
    values_of = {case.name: case.labelled for case in dataset.cases}
    rare = _most_of_rare(dataset, len(facts))
    for value in dataset.values:
        annotated = [one for one in with_labels if _is_annotated(value, values_of[one.case])]
        having = [one for one in annotated if value in one.voxels]
        if 0 < len(having) <= rare:
            findings += _rare_value(value, having, cases=len(facts))
        else:
            name = dataset.table.names.get(value, str(value))
            findings += _absent_or_tiny(value, name, annotated=annotated, having=having)
    return findings


def _empty_maps(facts: Sequence[CaseFacts], unreadable: Collection[str]) -> list[Finding]:
    """Label maps of nothing but background, but for the cases whose labels cannot be read."""
    count = sum(bool(one.voxels) for one in facts)
    # Scans without a lesion are good examples; one lone scan without the organ that all others have
    # is not.
    alone = len(facts) >= 5 and count >= 0.98 * (len(facts) - 1)
    rest = f", while {count} of {len(facts)} cases have labels" if alone else ""
    message = f"holds nothing but background{rest}"
    severity = "error" if alone else "warning"
    empty = [one.case for one in facts if not one.voxels and one.case not in unreadable]
    return [Finding(case=case, kind="empty", severity=severity, message=message) for case in empty]


def _is_annotated(value: int, labelled: Sequence[int] | None) -> bool:
    """Whether a case would hold a structure if it were there; labelled: the values annotated in it,
    if not all.
    """
    return labelled is None or value in labelled


def _most_of_rare(dataset: Dataset, cases: int) -> float:
    """In so many cases at most, a value without a name may be a slip; 0 where that cannot be
    told.
    """
    unnamed = all(label.name == f"label {label.value}" for label in dataset.table.labels)
    return max(1, 0.02 * cases) if unnamed and cases >= 10 else 0


def _rare_value(value: int, having: Sequence[CaseFacts], cases: int) -> list[Finding]:
    """A value without a name that next to no case holds."""
    message = f"label value {value} occurs in {len(having)} of {cases} cases only; is it meant?"
    return [
        Finding(case=one.case, kind="value", severity="warning", message=message) for one in having
    ]


def _absent_or_tiny(
    value: int, name: str, *, annotated: Sequence[CaseFacts], having: Sequence[CaseFacts]
) -> Iterator[Finding]:
    """Cases without a structure that nearly all have, or with next to nothing of it."""
    usual_mm3 = float(np.median([_volume_mm3(one, value) for one in having])) if having else 0.0
    is_usual = len(having) >= 0.9 * len(annotated)
    share = f"{len(having)} of {len(annotated)} cases"
    for one in annotated:
        voxels = one.voxels.get(value, 0)
        if not voxels and is_usual:
            message = f"has no {name} (label {value}), which {share} have"
            yield Finding(case=one.case, kind="absent", severity="warning", message=message)
        elif 0 < voxels < TINY_VOXELS and _volume_mm3(one, value) < 0.1 * usual_mm3:
            usual = f"others have about {usual_mm3:.4g} mm³"
            message = f"has {voxels} voxels of {name} (label {value}), {usual}"
            yield Finding(case=one.case, kind="tiny", severity="warning", message=message)


def _volume_mm3(facts: CaseFacts, value: int) -> float:
    return facts.voxels[value] * float(np.prod(facts.spacing_mm))


def separate_parts(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Small separate parts of structures that are in one piece in nearly all cases."""
    findings = []
    for value in dataset.values:
        having = [one for one in facts if value in one.parts]
        whole = [one for one in having if len(one.parts[value]) == 1]
        if len(having) < 5 or len(whole) < 0.8 * len(having):
            continue
        name = dataset.table.names.get(value, str(value))
        for one in having:
            if rest := one.parts[value][1:]:
                message = (
                    f"{name} (label {value}) has {len(rest)} separate"
                    f" part{'s' if len(rest) > 1 else ''} of {', '.join(map(str, rest[:5]))}"
                    f" voxels; in {len(whole)} of {len(having)} cases it is one piece"
                )
                findings.append(
                    Finding(case=one.case, kind="island", severity="warning", message=message)
                )
    return findings


def shared_names(dataset: Dataset) -> list[Finding]:
    """Cases and groups that lie on both sides of a split of the dataset's own."""
    groups = {case.name: case.group for case in dataset.cases}
    findings = []
    for number, (training, validation) in enumerate(dataset.splits):
        both = set(training) & set(validation)
        place = f"is in training and in validation of split {number}"
        findings += [_leak(name, place) for name in sorted(both)]
        training_groups = {groups.get(name) for name in training} - {None}
        shared = [
            name for name in validation if groups.get(name) in training_groups and name not in both
        ]
        findings += [_leak(name, f"{groups[name]} {place}") for name in shared]
    return findings + _tested_groups(dataset)


def _tested_groups(dataset: Dataset) -> list[Finding]:
    """Cases to train with whose group is also set aside for testing."""
    test_groups = {case.group for case in dataset.cases if case.split == "test"} - {None, ""}
    shared = [case for case in dataset.cases if case.split != "test" and case.group in test_groups]
    place = "is also among the cases set aside for testing"
    return [_leak(case.name, f"{case.group} {place}") for case in shared]


def _leak(case: str, message: str) -> Finding:
    return Finding(case=case, kind="leak", severity="error", message=message)
