"""The models that a growing data set has brought forth, round by round, scored on the same cases.

Only cases that none of them was trained with can compare them. A data set keeps such cases: one of
five labelled scans validates for good (`medseg.annotation.listing.settled_split`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg.annotation.listing import FINAL, StoredCase, in_order
from medseg.annotation.names import dice_by_name
from medseg.annotation.store import Store
from medseg.annotation.teaching import is_finished, runs_of, stamp_of
from medseg.errors import BadFile, BadOutput
from medseg.files import atomic_write
from medseg.inference import Model, Settings, channel_names, load_model, segment
from medseg.labels import LabelTable
from medseg.logs import Progress, silent
from medseg.text import parse_json, read_json
from medseg.volume import Volume

#: Scores of models on cases, so that who asks again need not wait again.
_KEPT = ".scores.json"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A run of training and its model.

    name: of its folder. finished: whether it has a model. training: the cases it was trained with.
    start: the round whose model it went on from, '' for another model or none. dice: case to mean
    Dice over its structures, of the cases that all rounds are compared on. structures: structure
    to mean Dice over these cases.
    """

    run: Path
    name: str
    finished: bool
    training: tuple[str, ...] = ()
    start: str = ""
    dice: Mapping[str, float] = field(default_factory=dict)
    structures: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The mean Dice over cases; None where nothing was scored."""
        return float(np.mean(list(self.dice.values()))) if self.dice else None


def rounds_of(
    store: Store, settings: Settings | None = None, progress: Progress = silent
) -> tuple[list[Round], list[str]]:
    """Every round of a data set, the first one first, and the cases on which they are compared.

    These are the labelled cases that validate, and where there are none all others, without those
    that any finished round was trained with; there may be none. What was scored before is kept in
    the data set. Raises `BadFile`, `BadModel`.
    """
    runs = runs_of(store)
    facts = {run: _facts(run) for run in runs}
    finished = [run for run in runs if is_finished(run)]
    seen = {name for run in finished for name in facts[run]["training"]}
    cases = [one for one in store.cases() if FINAL in one.labels and one.id not in seen]
    held_out = [one for one in cases if one.split == "val"] or cases
    hashes = {facts[run]["weights"]: run.name for run in finished}
    kept, scores = _kept(store), dict[str, Any]()
    rounds = []
    for number, run in enumerate(runs, 1):
        about = facts[run]
        round_scores: dict[str, dict[str, float]] = {}
        if run in finished and held_out:
            scores[about["weights"]] = _scored(store, run, held_out, kept, settings)
            round_scores = {name: one["dice"] for name, one in scores[about["weights"]].items()}
        rounds.append(
            Round(
                run=run,
                name=run.name,
                finished=run in finished,
                training=tuple(about["training"]),
                start=hashes.get(about["start"], ""),
                dice={name: _mean(one.values()) for name, one in round_scores.items() if one},
                structures=_by_structure(list(round_scores.values())),
            )
        )
        progress(run.name, number, len(runs))
    if scores != kept:
        # Where nothing may be written, who asks again waits again.
        with suppress(BadOutput), atomic_write(store.folder / _KEPT) as file:
            file.write(json.dumps(scores).encode())
    return rounds, [one.id for one in held_out] if finished else []


def _scored(
    store: Store,
    run: Path,
    cases: Sequence[StoredCase],
    kept: Mapping[str, Any],
    settings: Settings | None,
) -> dict[str, Any]:
    """Case to its stamp and the Dice of its structures, by the model of a run."""
    model: Model | None = None
    before = kept.get(_weights(run) or "", {})
    scores: dict[str, Any] = {}
    for case in cases:
        stamp = stamp_of(case)
        if before.get(case.id, {}).get("stamp") == stamp:
            scores[case.id] = before[case.id]
            continue
        model = model or load_model(str(run))
        names = channel_names(model)
        volumes: list[Volume] = in_order(store.read_scan(case.id), store.channels, names)
        result = segment(volumes, model, settings or Settings())
        truth, table = store.read_label(case.id)
        asked = LabelTable(tuple(one for one in table.labels if _is_annotated(one.value, case)))
        dice = dice_by_name(result.labels.data, result.table, truth.data, asked)
        scores[case.id] = {"stamp": stamp, "dice": dice}
    return scores


def _is_annotated(value: int, case: StoredCase) -> bool:
    return not case.annotated or value in case.annotated


def _by_structure(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in scores for name in one)
    return {name: _mean(one[name] for one in scores if name in one) for name in names}


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)


def _facts(run: Path) -> dict[str, Any]:
    """What a run's files say: cases trained with, hashes of the start's weights and its own."""
    try:
        split = read_json(run / "splits.json")
        data = read_json(run / "data.json") if (run / "data.json").is_file() else {}
        training = [str(name) for name in split["training"]]
        start = data.get("start")
        start = start if isinstance(start, str) else None
        return {"training": training, "start": start, "weights": _weights(run)}
    except (KeyError, TypeError, AttributeError):
        raise BadFile(f"{run}: its splits.json or data.json is damaged; remove the run") from None


def _weights(run: Path) -> str | None:
    """The hash of a finished run's weights."""
    if not is_finished(run):
        return None
    content = read_json(run / "model" / "model.json")
    return str(content.get("sha256")) if isinstance(content, dict) else None


def _kept(store: Store) -> dict[str, Any]:
    """What was scored before; nothing if there is nothing, or it is damaged."""
    try:
        content = parse_json((store.folder / _KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    runs = content.items() if isinstance(content, dict) else ()
    return {
        run: {name: one for name, one in scores.items() if _is_score(one)}
        for run, scores in runs
        if isinstance(scores, dict)
    }


def _is_score(content: object) -> bool:
    """Whether something that was kept is the Dice of structures, and of which files."""
    dice = content.get("dice") if isinstance(content, dict) else None
    return isinstance(dice, dict) and all(isinstance(one, int | float) for one in dice.values())
