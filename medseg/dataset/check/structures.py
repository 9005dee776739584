"""Structures that are absent, tiny or in pieces where others have them whole, and cases on both sides of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.dataset.cases import Dataset, Finding
from medseg.dataset.check.measures import CaseFacts

#: Structures of fewer voxels than this are suspicious where the other cases have ten times as much.
TINY_VOXELS = 10


def absent_structures(
    dataset: Dataset, facts: Sequence[CaseFacts], unreadable: Sequence[Finding] = ()
) -> list[Finding]:
    """Label maps and structures that are empty or tiny where nearly all other cases have them, and values of few."""
    filled = [one for one in facts if one.voxels]
    findings = []
    for one in facts:
        if not one.voxels and not any(finding.case == one.case for finding in unreadable):
            # Scans without a lesion are good examples; one lone scan without the organ that all others have is not.
            alone = len(facts) >= 5 and len(filled) >= 0.98 * (len(facts) - 1)
            rest = f", while {len(filled)} of {len(facts)} cases have labels" if alone else ""
            message = f"holds nothing but background{rest}"
            findings.append(
                Finding(
                    case=one.case,
                    kind="empty",
                    severity="error" if alone else "warning",
                    message=message,
                )
            )
    if len(facts) < 5:
        return findings
    labelled = {case.name: case.labelled for case in dataset.cases}
    unnamed = all(label.name == f"label {label.value}" for label in dataset.table.labels)
    for value in dataset.values:
        said = [one for one in filled if labelled[one.case] is None or value in (labelled[one.case] or ())]
        having = [one.voxels[value] * float(np.prod(one.spacing_mm)) for one in said if value in one.voxels]
        name = dataset.table.names.get(value, str(value))
        usual_mm3 = float(np.median(having)) if having else 0.0
        if unnamed and len(facts) >= 10 and 0 < len(having) <= max(1, 0.02 * len(facts)):
            message = f"label value {value} occurs in {len(having)} of {len(facts)} cases only; is it meant?"
            findings += [
                Finding(case=one.case, kind="value", severity="warning", message=message)
                for one in said
                if value in one.voxels
            ]
            continue
        for one in said:
            voxels = one.voxels.get(value, 0)
            if not voxels and len(having) >= 0.9 * len(said):
                message = f"has no {name} (label {value}), which {len(having)} of {len(said)} cases have"
                findings.append(Finding(case=one.case, kind="absent", severity="warning", message=message))
            elif 0 < voxels < TINY_VOXELS and voxels * float(np.prod(one.spacing_mm)) < 0.1 * usual_mm3:
                message = f"has {voxels} voxels of {name} (label {value}), others have about {usual_mm3:.4g} mm³"
                findings.append(Finding(case=one.case, kind="tiny", severity="warning", message=message))
    return findings


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
                    f"{name} (label {value}) has {len(rest)} separate part{'s' if len(rest) > 1 else ''} of "
                    f"{', '.join(map(str, rest[:5]))} voxels; in {len(whole)} of {len(having)} cases it is one piece"
                )
                findings.append(Finding(case=one.case, kind="island", severity="warning", message=message))
    return findings


def shared_names(dataset: Dataset) -> list[Finding]:
    """Cases and groups that lie on both sides of a split of the dataset's own."""
    groups = {case.name: case.group for case in dataset.cases}
    findings = []
    for number, (training, validation) in enumerate(dataset.splits):
        both = set(training) & set(validation)
        findings += [
            Finding(
                case=name,
                kind="leak",
                severity="error",
                message=f"is in training and in validation of split {number}",
            )
            for name in sorted(both)
        ]
        known = {groups.get(name) for name in training} - {None}
        findings += [
            Finding(
                case=name,
                kind="leak",
                severity="error",
                message=f"{groups[name]} is in training and in validation of split {number}",
            )
            for name in validation
            if groups.get(name) in known and name not in both
        ]
    tested = {case.group for case in dataset.cases if case.split == "test" and case.group}
    findings += [
        Finding(
            case=case.name,
            kind="leak",
            severity="error",
            message=f"{case.group} is also among the cases set aside for testing",
        )
        for case in dataset.cases
        if case.split != "test" and case.group in tested
    ]
    return findings
