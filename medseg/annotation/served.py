"""The models of a server, and one thread in which a scan at a time is segmented."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg import logs
from medseg.annotation.protocol import MAX_LABELS, Naming, Refused, naming_of
from medseg.errors import BadConfig, DataWarning, MedsegError
from medseg.inference import (
    UNTRAINED,
    Extras,
    Job,
    Model,
    Segmentation,
    Settings,
    as_list,
    channel_names,
    in_python,
    is_set,
    label_table,
    load_model,
    models_kept_open,
    read_scans,
    segment_scan,
    without_names,
)
from medseg.labels import LabelTable

#: Without models of its own, a server has these.
USUAL = ("brain", "ct-tissues")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as clients know it.

    word: what names it on the command line. score: its mean Dice when it was trained, None where
    nobody knows.
    """

    name: str
    word: str
    model: Model
    score: float | None = None

    @property
    def table(self) -> LabelTable:
        """What its labels mean."""
        return label_table(self.model)

    @property
    def channels(self) -> list[str]:
        """What each scan is that it takes, '' where it does not say."""
        return channel_names(self.model)

    @property
    def naming(self) -> Naming:
        """How its labels are called on the way."""
        return naming_of(self.table)

    @property
    def can_go_on(self) -> bool:
        """Whether `medseg train --finetune` takes it: one network."""
        return not isinstance(self.model, str) and not is_set(self.model) and self._is_single

    @property
    def _is_single(self) -> bool:
        return len(as_list(self.model)) == 1  # type: ignore[arg-type]

    @property
    def about(self) -> str:
        """A line for people."""
        if isinstance(self.model, str):
            text = UNTRAINED[self.model].about
        elif is_set(self.model):
            text = f"{len(self.model.models)} models"
        else:
            text = as_list(self.model)[0].spec.description
        score = "" if self.score is None else f"Dice {self.score:.3f} when it was trained. "
        return score + text


def serve_models(words: Sequence[str]) -> dict[str, Served]:
    """Models by the names that clients see, in the order given. Raises `BadModel`, and `BadConfig`
    for one with too many labels.
    """
    models: dict[str, Served] = {}
    for word in words or USUAL:
        add_model(models, word)
    return models


def add_model(
    models: dict[str, Served], word: str, name: str = "", score: float | None = None
) -> Served:
    """Load one more model, under a name that no other has. Raises as `serve_models`."""
    place = str(Path(word).resolve()) if Path(word).exists() else word
    model = load_model(place)
    table = label_table(model)
    if len(table) > MAX_LABELS:
        raise BadConfig(
            f"the model {word} has {len(table)} labels, and clients take {MAX_LABELS} at most; use"
            " medseg infer for it"
        )
    plain = re.sub(r"[^\w.-]+", "-", name or _title(model)).strip("-.") or "model"
    unique, number = plain, 1
    while unique in models:
        number += 1
        unique = f"{plain}-{number}"
    models[unique] = Served(name=unique, word=place, model=model, score=score)
    return models[unique]


def _title(model: Model) -> str:
    if isinstance(model, str):
        return model
    return model.name if is_set(model) else as_list(model)[0].spec.name


def devices() -> list[str]:
    """Where networks can run here; the first is chosen unless somebody chooses."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["auto", "cpu", *(name for name, is_there in there.items() if is_there)]


class Segmenting:
    """Runs models on scans; for one thread, which keeps the latest network open."""

    def __init__(self) -> None:
        self._open: dict[Any, Any] = {}

    def __call__(
        self,
        served: Served,
        files: Sequence[Path],
        *,
        settings: Settings,
        force: bool,
        is_over: Callable[[], bool],
    ) -> tuple[Segmentation, list[str]]:
        """Labels of a scan, and what was said about it while it was read.

        files: one for each channel. is_over: asked while it computes; once it is true, it ends with
        `Refused`. Raises what `medseg.inference.segment_scan` does, without names of files.
        """

        def progress(what: str, done: int, total: int) -> None:
            if is_over():
                raise Refused(503, "this was given up, for nobody waits for it any more")

        job = Job(scan=files[0], labels=files[0], channels=tuple(files[1:]))
        try:
            with models_kept_open(self._open), warnings.catch_warnings(record=True) as notices:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", DataWarning)
                volumes = read_scans(job, channel_names(served.model), Extras())
                result = segment_scan(
                    volumes, served.model, settings,
                    source=files[0], force=force, progress=progress,
                )  # fmt: skip
        except Refused:
            raise
        except MedsegError as error:
            raise _about_the_scan(error, job) from None
        texts = [str(one.message) for one in notices if issubclass(one.category, DataWarning)]
        return result, without_names(texts, job)


def _about_the_scan(error: MedsegError, job: Job) -> MedsegError:
    """The error with other words for the files of a job."""
    text = str(in_python(error) if isinstance(error, BadConfig) else error)
    for path in sorted(map(str, job.files), key=len, reverse=True):
        text = text.replace(path, "the scan")
    return type(error)(text.replace("give force=True", "set force in the options"))


def settings_in(params: Mapping[str, Any], *, may_use_gpu: bool) -> tuple[Settings, bool]:
    """What a request says of how a model runs, and whether it runs by force. Raises `Refused`,
    `BadConfig`.

    may_use_gpu: False while something else does.
    """
    device = params.get("device", "auto")
    flags = {name: params.get(name, usual) for name, usual in (("cleanup", True), ("force", False))}
    if not isinstance(device, str):
        raise Refused(400, "device is a text such as cpu")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(400, f"{name} is true or false")
    settings = Settings(device=device, cleanup=flags["cleanup"])
    if not may_use_gpu and settings.device != "cpu":
        if settings.device != "auto":
            raise Refused(429, "a model is being trained on the GPU; try again later, or with cpu")
        logs.info(__name__, "on the CPU, for a model is being trained")
        settings = replace(settings, device="cpu")
    return settings, flags["force"]
