"""A run under way: its network, optimiser, averages, clock and facts, and each thing that a
training step does.

`loop.train` calls the methods of `Run` in the order in which they stand here.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg import logs
from medseg.config import Config, TrainConfig
from medseg.errors import BadConfig, DataWarning, NotEnoughMemory
from medseg.files import sweep
from medseg.inference import Courier, Fetched, is_out_of_memory, unless_full
from medseg.logs import Report
from medseg.models import save_checkpoint
from medseg.networks import build_network, check_patch
from medseg.postprocess import check_steps
from medseg.text import reason_of
from medseg.training.ahead import Ahead, batches_ahead
from medseg.training.capacity import room_for_cases
from medseg.training.clock import RunClock, is_time_to_validate
from medseg.training.curves import draw_curves
from medseg.training.identity import check_same_maps
from medseg.training.losses import mean_dice
from medseg.training.origin import start_from
from medseg.training.precision import (
    PRECISIONS,
    THIN,
    choose_training_precision,
    is_channels_last,
    thinnest_map,
)
from medseg.training.processes import Processes, whole
from medseg.training.rendered import RenderedSource
from medseg.training.source import Batch, Folding, Residing, Source, WithLoss, model_spec
from medseg.training.state import (
    append_line,
    check_same_run,
    restore_run,
    save_run,
    state_of,
    truncate_metrics,
)

#: A network that has seen its cases less often than this is no model.
LEAST_PASSES = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True, eq=False)
class Run:
    """A run under way. parallel: the network as it is called; best: the averages that did best so
    far, where the settings ask for them; facts: what `save_run` keeps beside the tensors; untold:
    steps whose loss is on its way from a card; parts: in how many a batch is learnt from; log:
    lines not yet in metrics.jsonl.
    """

    config: Config
    folder: Path
    source: Source
    processes: Processes
    network: nn.Module
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average_weights: dict[str, Tensor]
    best: dict[str, Tensor]
    facts: dict[str, Any]
    clock: RunClock
    channels_last: bool
    batches: Ahead = field(init=False)
    courier: Courier = field(init=False)
    untold: deque[tuple[int, Fetched]] = field(default_factory=deque)
    parts: int = 1
    before: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        device, source = self.processes.device, self.source
        if isinstance(source, Residing):
            sizes, count = (source.channels, source.outputs), self.processes.size
            source.reside(room_for_cases(self.config, *sizes, processes=count, device=device))
        self.courier = Courier(device)
        self.batches = Ahead(
            self._make_batch,
            device=device,
            count=batches_ahead(device),
            stop=self.config.train.steps,
        )

    @classmethod
    def begin(
        cls,
        *,
        config: Config,
        folder: Path,
        source: Source | None,
        processes: Processes,
        began: float,
        reserve: Callable[[], float],
    ) -> Run:
        """A run at its beginning, or where the folder's state left it. Raises `BadConfig` if it is
        another run's.
        """
        settings, device = config.train, processes.device
        processes.check_batch(settings.batch)
        check_same_run(config, folder, processes)
        check_steps([] if config.cleanup == "auto" else config.cleanup)
        source = source or _rendered(config, folder, processes)
        torch.manual_seed(settings.seed)
        network = build_network(
            config.model.name, source.channels, source.outputs, **config.model.options
        )
        check_patch(network, config.model.patch)
        if isinstance(network, Folding):
            network.folded = True
        if config.start_from:
            names = [label.name for label in source.table.labels]
            regions = source.membership is not None
            start_from(config.start_from, network, names=names, regions=regions)
        thinnest = THIN
        if settings.precision == "auto":  # asked before the network is spread over processes
            patch = config.model.patch
            thinnest = thinnest_map(network, source.channels, patch=patch, device=device)
        network, parallel = processes.spread(network.to(device).train(), settings.parallel)
        optimizer = make_optimizer(settings, network)
        averages = {key: value.detach().clone() for key, value in network.state_dict().items()}
        best: dict[str, Tensor] = {}
        facts = restore_run(
            run=folder, network=network, optimizer=optimizer, average=averages, best=best,
            processes=processes,
        )  # fmt: skip
        if "precision" not in facts:  # one trial for all processes and for the whole run
            facts["precision"] = _agreed_precision(config, processes, thinnest)
        precision = facts["precision"]
        is_scaled = precision == "fp16" and device.type == "cuda"
        scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
        if scaler.is_enabled() and "scaler" in facts:
            scaler.load_state_dict(facts["scaler"])
        if processes.first:
            is_to_look = facts.get("look", False)
            truncate_metrics(folder / "metrics.jsonl", facts["step"], validated=not is_to_look)
            # What a killed process left half-written; the lock says that nobody writes.
            sweep(folder, min_age_s=0)
        return cls(
            config=config, folder=folder, source=source, processes=processes, network=network,
            parallel=parallel, optimizer=optimizer, scaler=scaler, average_weights=averages,
            best=best, facts=facts,
            clock=RunClock(settings=settings, facts=facts, began=began, reserve=reserve),
            channels_last=is_channels_last(network, precision, device),
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.facts["step"])

    @property
    def position(self) -> float:
        """Where the run stands between its beginning, 0, and its end, 1."""
        return float(self.facts["position"])

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the network."""
        return _DTYPES[self.facts["precision"]]

    def draw(self) -> Batch:
        """This process's samples of the step; what the network does at random with them follows
        from their seeds, too.
        """
        seeds, _ = self.processes.share(self.config.train, self.step, mix)
        torch.manual_seed(seeds[0] % 2**63)
        batch = unless_full(lambda: self.batches.take(self.step))
        if batch is not None:
            return batch
        # It was made while a card held all that a step needs, which now it does not.
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.batches.take(self.step)

    def _make_batch(self, step: int) -> Batch:
        """This process's samples of any step; nothing of the run may change it."""
        seeds, samples = self.processes.share(self.config.train, step, mix)
        batch = self.source.batch(step, seeds, samples=samples, device=self.processes.device)
        if not self.channels_last:
            return batch
        # `contiguous` leaves one channel alone
        return batch._replace(images=batch.images.to(memory_format=torch.channels_last_3d))

    def learn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and Dice (NaN where there is none) of a batch, whose gradients are there then.

        Where memory is out the batch is taken in more and more parts, whose gradients are added up;
        so are all that follow. Raises `NotEnoughMemory` where one sample does not fit, or several
        processes wait for each other.
        """
        while True:
            try:
                return self._learn_in_parts(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback keeps the failed step's memory.
            self.optimizer.zero_grad(set_to_none=True)
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.processes.size > 1 or self.parts >= len(batch.images):
                size = " x ".join(map(str, batch.images.shape[2:]))
                raise NotEnoughMemory(
                    f"memory is out in step {self.step + 1}, with patches of {size},"
                    f" {-(-len(batch.images) // self.parts)} at a time: give a smaller model.patch,"
                    " or train.batch where there are several processes, or choose a smaller network"
                )
            self.parts = min(2 * self.parts, len(batch.images))
            warnings.warn(
                f"memory is out; the {len(batch.images)} patches of a step are learnt from in"
                f" {self.parts} parts, which is slower",
                DataWarning,
                stacklevel=2,
            )

    def _learn_in_parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        count = len(batch.images)
        size = -(-count // self.parts)
        told = []
        for begin in range(0, count, size):
            some = slice(begin, begin + size)
            part = Batch(*(None if one is None else one[some] for one in batch))  # type: ignore[arg-type]
            outputs = self.forward(part.images)
            loss = self.loss(outputs, part)
            share = len(part.images) / count
            self.scaler.scale(loss if share == 1 else loss * share).backward()
            dice = None
            if self.source.membership is None:
                dice = _training_dice(outputs, part.labels)
            own = torch.full((), torch.nan, device=loss.device) if dice is None else dice
            told.append((loss.detach().double(), own.double().to(loss.device), share))
        losses, dices, shares = zip(*told)
        if len(told) == 1:
            return losses[0], dices[0]
        weights = torch.tensor(shares, dtype=torch.float64, device=losses[0].device)
        return torch.stack(losses) @ weights, torch.stack(dices) @ weights

    def forward(self, images: Tensor) -> Any:
        """The network's outputs."""
        half = self.dtype != torch.float32
        with torch.autocast(self.processes.device.type, self.dtype, enabled=half):
            return self.parallel(images)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The network's own loss where it has one, else the source's."""
        if isinstance(self.network, WithLoss):
            return self.network.loss(outputs, batch.labels)
        return self.source.loss(outputs, batch)

    def move_weights(self, rate: float) -> Tensor:
        """A step against the gradients, clipped; returns their norm. rate: the learning rate's
        share.
        """
        settings = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def average(self) -> None:
        """Exponential moving average of the weights; early steps count more so that it starts at
        once.
        """
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        averages, weights = self.average_weights, self.network.state_dict()
        floats = [key for key, value in averages.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [averages[key] for key in floats], [weights[key] for key in floats], 1 - decay
        )

    def count(self, *, loss: Tensor, dice: Tensor, norm: Tensor) -> None:
        """Note the step's loss and Dice. Raises `BadConfig` if the loss is not finite."""
        numbers = self.processes.mean(torch.stack((loss, dice)))
        self.facts["step"] += 1
        told = torch.cat((numbers, whole(norm).detach().double().reshape(1)))
        self.untold.append((self.step, self.courier.fetch(told)))
        # Asking for the numbers of this step would wait until a card has done it, and the card then
        # for the next: those of the step before are there.
        self._hear(len(self.untold) - (self.courier.link is not None))

    def _hear(self, count: int) -> None:
        """Add up what the oldest steps told. Raises `BadConfig` if a loss is not finite."""
        for _ in range(count):
            step, numbers = self.untold.popleft()
            with numbers.read() as here:
                value, dice, norm = here.tolist()
            if not math.isfinite(value) or not (math.isfinite(norm) or self.scaler.is_enabled()):
                raise BadConfig(
                    f"the loss is not finite at step {step}: lower train.learning_rate or use fp32"
                )
            self.facts["loss"] += value
            self.facts["dice"] += dice

    def move(self, stopping: int) -> tuple[bool, int]:
        """Move on to the next step's position; whether to save, and the signal to stop at, or 0."""
        self.before = self.position
        after, due = self.clock.after(self.step, self.before), self.clock.is_due(self.step)
        self.facts["position"], due, stop = self.processes.agree(after, due, stopping)
        return due, stop

    def tell(
        self, rate: float, progress: Report, track: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        """Log and show the mean of the last steps, and note where it is time to validate."""
        settings, facts, step = self.config.train, self.facts, self.step
        if step % settings.log_every == 0 or self.position >= 1:
            rate *= settings.learning_rate
            self._hear(len(self.untold))
            row = _mean_facts(facts, (step - 1) % settings.log_every + 1, rate)
            self.log.append({**row, "seconds_a_step": round(self.clock.pace, 3)})
            logs.info(__name__, "%s", row)
            facts["loss"] = facts["dice"] = 0.0
            track(step, row)
            progress(
                self.position, {**row, "seconds_left": self.clock.seconds_left(step, self.position)}
            )
        if is_time_to_validate(settings, step, before=self.before, after=self.position):
            facts["look"] = True

    def keep(self, *, due: bool, stop: int) -> None:
        """Save the state, and the lines of metrics that belong to it, where it is time to."""
        if not (due or stop or self.facts.get("look") or self.position >= 1):
            return
        self._hear(len(self.untold))
        facts, folder = self.facts, self.folder
        facts["seconds"], facts["pace"] = (
            self.clock.seconds(),
            self.clock.pace or facts.get("pace", 0.0),
        )
        if self.config.train.steps is None:
            facts["time_s"] = self.config.train.time_s
        if self.scaler.is_enabled():
            facts["scaler"] = self.scaler.state_dict()
        state = state_of(self.network, self.optimizer, average=self.average_weights, best=self.best)
        if self.processes.first:
            # Metrics first: lines beyond the state are cut on resuming, lines missing could not be
            # restored.
            append_line(folder / "metrics.jsonl", self.log)
            save_run(folder, facts, state)
            if self.clock.is_time_to_draw() or stop:
                _draw(folder)
        self.log.clear()

    def look(self, progress: Report, track: Callable[[int, Mapping[str, float]], None]) -> None:
        """Validate where it is time to: after the state is saved, since whole scans take longer
        than a signal to stop leaves, and what is saved says that it is still to be done.
        """
        if not self.facts.pop("look", False):
            return
        step, scores = self.step, self._validate()
        if scores:
            self.log.append({"step": step, **_named(scores)})
            logs.info(__name__, "step %d: validation Dice %.3f", step, scores["mean"])
            track(step, {f"validation/{name}": score for name, score in scores.items()})
            progress(self.position, {"step": step, "validation": scores})
        self.keep(due=False, stop=0)  # at the end

    def _validate(self) -> dict[str, float]:
        """Scores of the averaged weights, of which each process computes its share; the best
        weights are remembered.
        """
        settings, processes = self.config.train, self.processes
        with self.clock.aside(), self._averaged() as network:
            numbers = range(settings.validate_samples)
            seeds = [mix(settings.seed, -1 - number, 4095) % 2**63 for number in numbers]
            network.eval()
            with torch.no_grad():
                scores = self.source.validate(
                    network,
                    seeds=seeds,
                    device=processes.device,
                    dtype=self.dtype,
                    deal=processes.deal,
                )
            network.train()
        # Where no score is defined it cannot choose either: -1 is below every Dice.
        mean = processes.first_says(scores.get("mean", -1.0))
        if settings.keep == "best" and mean >= self.facts.setdefault("best", 0.0):
            self.facts["best"] = mean
            self.best = {key: value.clone() for key, value in self.average_weights.items()}
        return scores

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        """The network with its averaged weights for a while; a copy on one device if it is shared
        out.
        """
        if self.processes.sharded:
            weights = {key: whole(value) for key, value in self.average_weights.items()}
            self.processes.same(weights.values())
            with self.processes.whole_network(self.network, weights) as network:
                yield network
            return
        self.processes.same(self.average_weights.values())
        own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average_weights)
        yield self.network
        self.network.load_state_dict(own)

    def end(self) -> Path:
        """Draw the curves and write the model, also what a process killed after its last step left
        undone.

        Raises `BadConfig` where the time was too short for a model.
        """
        weights = {key: whole(value) for key, value in (self.best or self.average_weights).items()}
        if self.processes.first:
            _draw(self.folder)
            self._check_passes()
            state = {
                key: value for key, value in weights.items() if not key.startswith("deep_heads.")
            }
            save_checkpoint(
                self.folder / "model",
                model_spec(self.config, self.source)
                | {"trained_precision": self.facts["precision"]},
                state=state,
                table=self.source.table,
            )
        self.processes.wait()
        return self.folder / "model"

    def _check_passes(self) -> None:
        settings, cases = self.config.train, self.source.cases
        passes = self.step * settings.batch / cases
        if settings.steps is not None or settings.time_s is None or passes >= LEAST_PASSES:
            return
        steps = "1 step" if self.step == 1 else f"{self.step} steps"
        pace = max(self.clock.pace, self.facts.get("pace", 0.0))
        elsewhere = max(0.0, settings.time_s - self.step * pace)
        enough_s = 1.5 * (elsewhere + pace * LEAST_PASSES * cases / settings.batch)
        raise BadConfig(
            f"{self.folder}: only {steps} of training fitted into the time, {passes:.1g} passes"
            f" over the {cases} cases where {LEAST_PASSES} are the least, so no model was written;"
            f" give --time {in_minutes(enough_s)} or more, and the same command goes on"
        )


def _draw(folder: Path) -> None:
    """The picture of the curves; a run goes on where it cannot be drawn."""
    try:
        draw_curves(folder / "metrics.jsonl", folder / "progress.png")
    except Exception as error:  # whatever the plotting library, or the disk, says
        reason = reason_of(error)
        warnings.warn(
            f"{folder / 'progress.png'} could not be drawn, and the run goes on: {reason}",
            DataWarning,
            stacklevel=2,
        )


def _rendered(config: Config, folder: Path, processes: Processes) -> RenderedSource:
    """The label maps of a config, which must be those that the run was begun with."""
    source = RenderedSource(config)
    view = {f"label map {name}": digest for name, digest in source.digests.items()}
    processes.check_same(view, config.data)
    if processes.first:
        check_same_maps(folder, source)
    return source


def in_minutes(seconds: float) -> str:
    """A time as the option --time takes it, in whole minutes."""
    return f"{max(1, math.ceil(seconds / 60))}m"


def make_optimizer(settings: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.99; decay spares biases and norms, which have one
    dimension.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.99, weight_decay=decay, nesterov=True)
    return torch.optim.AdamW(groups, lr=rate, betas=settings.betas, weight_decay=decay, fused=True)


def _training_dice(outputs: Any, labels: Tensor) -> Tensor | None:
    """Mean hard Dice of the finest output; None where outputs are no class logits."""
    finest = (
        outputs
        if isinstance(outputs, Tensor)
        else outputs[0]
        if isinstance(outputs, list | tuple)
        else None
    )
    folded = isinstance(finest, Tensor) and finest.ndim == 8
    if not isinstance(finest, Tensor) or not (folded or finest.shape[2:] == labels.shape[1:]):
        return None
    return mean_dice(finest.detach(), labels)


def _mean_facts(facts: dict[str, Any], count: int, rate: float) -> dict[str, float]:
    row = {
        "step": facts["step"],
        "loss": facts["loss"] / count,
        "dice": facts["dice"] / count,
    }
    means = {key: round(value, 6) for key, value in row.items() if value == value}
    return means | {"learning_rate": float(f"{rate:.6g}")}  # may be smaller than six places


def _named(scores: Mapping[str, float]) -> dict[str, Any]:
    """Validation as a line of metrics.jsonl has it."""
    row: dict[str, Any] = {"validation_dice": round(scores["mean"], 6)}
    each = {name: round(score, 6) for name, score in scores.items() if name != "mean"}
    return row | ({"validation": each} if each else {})


def mix(seed: int, step: int, sample: int) -> int:
    """A seed for each (seed, step, sample) that no other triple of a run shares."""
    return (seed * 1_000_003 + step) * 4096 + sample


def _agreed_precision(config: Config, processes: Processes, thinnest: int) -> str:
    """What the first process finds fastest, for all of them."""
    precision = PRECISIONS[0]
    if processes.first:
        precision = choose_training_precision(config, processes.device, thinnest)
    return PRECISIONS[round(processes.first_says(PRECISIONS.index(precision)))]
