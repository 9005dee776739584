"""The training loop, read top to bottom. Every random number is a function of (seed, step, sample),
so a run that was interrupted ends with the same weights, bit for bit on a CPU, as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from medseg.config import Config
from medseg.errors import Interrupted
from medseg.inference import in_sentences
from medseg.logs import Report
from medseg.training.clock import learning_rate
from medseg.training.processes import Processes, joined
from medseg.training.source import Source
from medseg.training.state import locked, stoppable
from medseg.training.step import Run


def train(
    config: Config,
    run: Path,
    source: Source | None = None,
    *,
    processes: Processes | None = None,
    began: float | None = None,
    reserve: Callable[[], float] = lambda: 0.0,
    progress: Report = lambda share, facts: None,
    track: Callable[[int, Mapping[str, float]], None] = lambda step, facts: None,
) -> Path:
    """Train `config` in the folder `run`, going on from where it was left; returns the model folder
    `run/model`.

    The folder holds config.yaml, metrics.jsonl, progress.png, state.safetensors (and the one
    before) and the model; and data.json where the source is the config's own. began: when the
    command began (`time.monotonic`), and reserve: how many seconds will be needed after the loop;
    both count where the config gives a time. processes: where they were joined before. Raises
    `BadConfig` if the folder belongs to another config or other data, if another process trains
    there, if a process does not see the folder, and if the time was over before the network had
    seen its cases a few times; `NotEnoughMemory`, and `DeviceFailed` where a GPU stopped.
    """
    began = time.monotonic() if began is None else began
    return in_sentences(
        partial(
            _trained, config, run, source, processes=processes, began=began, reserve=reserve,
            progress=progress, track=track,
        ),
        full=f"{run}: there is no memory to go on with training: give a smaller model.patch or"
        " train.batch, or choose a smaller network; what was saved is kept",
    )  # fmt: skip


def _trained(
    config: Config,
    run: Path,
    source: Source | None,
    *,
    processes: Processes | None,
    began: float,
    reserve: Callable[[], float],
    progress: Report,
    track: Callable[[int, Mapping[str, float]], None],
) -> Path:
    with (
        nullcontext(processes) if processes else joined(config.train.device, run) as processes,
        locked(run, processes),
        stoppable() as stopping,
        processes.repeatable(config.train.deterministic),
    ):
        training = Run.begin(
            config=config,
            folder=run,
            source=source,
            processes=processes,
            began=began,
            reserve=reserve,
        )
        with training.batches:
            training.look(progress, track)
            while training.position < 1:
                batch = training.draw()
                rate = learning_rate(training.step, training.position, config.train)
                loss, dice = training.learn(batch)
                norm = training.move_weights(rate)
                training.average()
                training.count(loss=loss, dice=dice, norm=norm)
                due, stop = training.move(stopping())
                training.tell(rate, progress, track)
                training.keep(due=due, stop=stop)
                if stop:
                    raise Interrupted(stop)
                training.look(progress, track)
        return training.end()
