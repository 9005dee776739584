"""Prepared scans as training takes them from a store: nothing is measured or written again, and
what is not as it was prepared is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from medseg.dataset import Case, Check, Dataset, Finding
from medseg.errors import BadConfig, BadFile
from medseg.training.prepared.arrays import SETTINGS, Preparation
from medseg.training.prepared.formats import Stored
from medseg.training.prepared.store import (
    Store,
    check_same_data,
    facts_key,
    open_store,
    read_content,
    sizes_of,
)


@dataclass(frozen=True, kw_only=True)
class PreparedScans:
    """A store with a plan. settings: the dotted settings by which its arrays were made. facts: a
    hash of what they follow from. findings: what `medseg check` says of the data.
    """

    store: Store
    settings: Mapping[str, Any]
    facts: str
    findings: tuple[Finding, ...]

    def agreed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted settings with those of the store. Raises `BadConfig` where they contradict it."""
        for key in SETTINGS:
            value = self.settings[key]
            if key in settings and _comparable(settings[key]) != _comparable(value):
                raise BadConfig(
                    f"{self.store.folder} is prepared with {key}={json.dumps(value)}, not"
                    f" {json.dumps(settings[key], default=str)}; leave that out, or prepare with it"
                    " into another folder"
                )
        return {**settings, **self.settings}

    def check(self, dataset: Dataset) -> Check:
        """What `check_dataset` says of a data set, from what is kept. Raises `BadConfig` for other
        data, `BadFile` for cases that were not checked as they are now.
        """
        check_same_data(self.store, dataset)
        kept = {case.name: self.store.measurement(case) for case in dataset.cases}
        self._refuse([name for name, one in kept.items() if one is None], dataset)
        measurements = {name: one for name, one in kept.items() if one is not None}
        if self.facts != facts_key(dataset, list(measurements.values())):
            raise BadFile(
                f"{self.store.folder}: was planned for other cases than {dataset.folder} holds now;"
                f" run {_command(self.store)}"
            )
        return Check(
            findings=self.findings,
            facts=tuple(one.facts for one in measurements.values() if one.facts is not None),
            digests={
                name: one.digests for name, one in measurements.items() if one.digests is not None
            },
        )

    def check_arrays(self, preparation: Preparation, cases: Sequence[Case]) -> None:
        """Raise `BadFile` where the arrays of cases are not there, whole and of the files as they
        are now.
        """
        dataset, store = preparation.dataset, self.store
        check_same_data(store, dataset)
        records = {case.name: store.record(case) for case in cases}
        missing = [name for name, record in records.items() if record is None]
        self._refuse(missing, dataset)
        stale, damaged = [], []
        for case in cases:
            record = records[case.name]
            assert record is not None
            if record.key != preparation.key(case):
                stale.append(case.name)
            elif record.error:
                raise BadFile(
                    f"{store.folder}: case {case.name} could not be prepared: {record.error};"
                    f" correct it or take it out of the data set, and run {_command(store)}"
                )
            elif record.sizes != sizes_of(store.files(case)):
                damaged.append(case.name)
        self._refuse(stale, dataset)
        self._refuse(damaged, dataset, "is damaged in it")

    def open(self, case: Case, name: str) -> Tensor | Stored:
        """An array of a case, of which nothing is read yet. Raises `BadFile`."""
        return self.store.form.open(self.store.place(case), name)

    def _refuse(self, names: Sequence[str], dataset: Dataset, why: str = "") -> None:
        """Raise `BadFile` where there are such cases; why: other than that they are not there."""
        if not names:
            return
        is_new = not (self.store.place(dataset[names[0]]) / "record.json").exists()
        why = why or ("is not prepared yet" if is_new else "has changed since it was prepared")
        more = f" (and {len(names) - 1} more of {len(dataset.cases)})" if len(names) > 1 else ""
        raise BadFile(
            f"{self.store.folder}: case {names[0]}{more} {why}; run {_command(self.store)}"
        )


def open_prepared(folder: Path) -> PreparedScans:
    """The prepared scans in a folder. Raises `BadConfig` where there are none or no plan yet,
    `BadFile` for what is damaged.
    """
    store = open_store(folder)
    if not store.plan.exists():
        raise BadConfig(
            f"{folder}: is not prepared yet, some cases were not even checked; run the parts of"
            " medseg prepare that are missing, and then all of them again"
        )
    content = read_content(store.plan)
    try:
        settings = {key: content["settings"][key] for key in SETTINGS}
        facts = str(content["facts"])
        findings = tuple(Finding(**one) for one in content["findings"])
    except (KeyError, TypeError):
        raise BadFile(f"{store.plan}: is damaged; remove it, and prepare again") from None
    return PreparedScans(store=store, settings=settings, facts=facts, findings=findings)


def _command(store: Store) -> str:
    return f"medseg prepare DATASET -o {store.folder} again"


def _comparable(value: Any) -> Any:
    """A setting's value as JSON has it; one spacing for all axes as three."""
    if isinstance(value, int | float):
        return [float(value)] * 3
    return json.loads(json.dumps(value))
