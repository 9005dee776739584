"""What a person asks of training, who is told what happens, and what comes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medseg.config import Config, check_given, read_settings
from medseg.dataset import Dataset, Finding
from medseg.errors import BadConfig
from medseg.evaluation import Evaluation
from medseg.logs import Progress, Report, silent
from medseg.training.plan import Choice
from medseg.training.prepared.reading import PreparedScans, open_prepared


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for.

    data: the data set. run: the folder of the run. config: a YAML file with some of the settings of
    `Config`. overrides: dotted settings, which go over the file's. folds, fold: how many parts the
    cases are split into (None: `usual_folds`), and which of them validates (None: the first, or
    with every_fold each in turn). finetune: a model or run to go on from. memory_bytes: not to be
    exceeded. anyway: train although the check found errors. prepared: a store that `medseg prepare`
    made of the data. began: when the command began
    (`time.monotonic`), from which the time counts; None: when training is called.
    """

    data: Path
    run: Path | None = None
    config: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    time_s: float | None = None
    folds: int | None = None
    fold: int | None = None
    every_fold: bool = False
    finetune: str | None = None
    memory_bytes: int | None = None
    track: tuple[str, ...] = ()
    resume: bool = True
    anyway: bool = False
    prepared: Path | None = None
    began: float | None = None

    def folder(self, dataset: Dataset) -> Path:
        """The run folder, named after the data set where nobody named it."""
        return self.run or Path("runs") / slug(dataset.name)

    def fixed(self) -> dict[str, Any]:
        """The settings that a person made, dotted: file first, then options, then overrides; and
        those of a store of prepared scans. Raises `BadConfig` where they contradict each other.
        """
        settings: dict[str, Any] = {}
        for key, value in (read_settings(self.config) if self.config else {}).items():
            if key in ("model", "train", "augment") and isinstance(value, dict):
                settings |= {f"{key}.{name}": one for name, one in value.items()}
            else:
                settings[key] = value
        if self.architecture:
            if settings.get("model.name", self.architecture) != self.architecture:
                raise BadConfig(
                    f"{self.config} is for {settings['model.name']}, not {self.architecture}"
                )
            settings["model.name"] = self.architecture
        if self.time_s is not None:
            settings["train.time_s"] = self.time_s
        settings |= dict(self.overrides)
        check_given(settings, str(self.data))
        prepared = self.prepared_scans
        return settings if prepared is None else prepared.agreed(settings)

    @cached_property
    def prepared_scans(self) -> PreparedScans | None:
        """The store of prepared scans, if one is named. Raises `BadConfig`."""
        return None if self.prepared is None else open_prepared(self.prepared)


def slug(name: str) -> str:
    """A name as the config takes it: lower case letters, digits, _ and -."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_") or "model"


def _nothing(*arguments: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Events:
    """Who is told what happens; each is called with what its name says."""

    found: Callable[[Dataset, Sequence[Finding]], None] = _nothing
    reading: Progress = silent  # what is done, cases done, all cases
    planned: Callable[[Sequence[Choice], Config], None] = _nothing
    training: Report = _nothing
    scored: Callable[[Evaluation], None] = _nothing
    say: Callable[[str], None] = _nothing


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome:
    """Finished training: the run folder, the models in it, their scores (None if nothing was held
    out), and for each scored case the files of its true and its found labels."""

    run: Path
    models: tuple[Path, ...]
    evaluation: Evaluation | None
    pairs: Mapping[str, tuple[Path, Path]] = field(default_factory=dict)

    def __repr__(self) -> str:
        models = f"{len(self.models)} models" if len(self.models) > 1 else "a model"
        scored = f", {self.evaluation!r}" if self.evaluation is not None else ""
        return f"<Outcome in {str(self.run)!r}: {models}{scored}>"
