"""The training loop, read top to bottom. Every random number is a function of (seed, step, sample), so a run that was
interrupted ends with the same weights, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg.config import Config, TrainConfig
from medseg.errors import BadConfig, Interrupted
from medseg.files import sweep
from medseg.models import save_checkpoint
from medseg.networks import build_model, check_patch
from medseg.postprocess import check_steps
from medseg.progress import Report
from medseg.training.clock import RunClock, is_time_to_validate, learning_rate
from medseg.training.curves import draw_curves
from medseg.training.losses import hard_dice, segmentation_loss
from medseg.training.precision import PRECISIONS, THIN, choose_training_precision, is_channels_last, thinnest_map
from medseg.training.processes import Processes, whole
from medseg.training.rendered import RenderedSource
from medseg.training.source import Source, model_spec
from medseg.training.state import (
    append_line,
    check_same_run,
    locked,
    restore_run,
    save_run,
    start_from,
    state_of,
    stoppable,
    truncate_metrics,
)


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
    """Train `config` in the folder `run`, going on from where it was left; returns the model folder `run/model`.

    The folder holds config.yaml, metrics.jsonl, progress.png, state.safetensors (and the one before) and the model.
    began: when the command began (`time.monotonic`), and reserve: how many seconds will be needed after the loop;
    both count where the config gives a time. processes: the processes, where they were joined before. Raises `BadConfig` if
    the folder belongs to another config or another process trains there.
    """
    began = time.monotonic() if began is None else began
    run.mkdir(parents=True, exist_ok=True)
    with (
        nullcontext(processes) if processes else Processes() as processes,
        locked(run, processes),
        stoppable() as stopping,
        processes.repeatable(config.train.deterministic),
    ):
        settings, device = config.train, processes.device
        check_same_run(config, run, processes)
        check_steps([] if config.cleanup == "auto" else config.cleanup)
        source = source or RenderedSource(config)
        torch.manual_seed(settings.seed)
        network = build_model(config.model.name, source.channels, source.outputs, **config.model.options)
        check_patch(network, config.model.patch)
        if hasattr(network, "folded"):
            network.folded = True  # type: ignore[assignment]  # the losses take it
        if config.start_from:
            start_from(config.start_from, network)
        thinnest = THIN
        if settings.precision == "auto":  # asked before the network is spread over processes
            thinnest = thinnest_map(network, source.channels, config.model.patch, device)
        network, parallel = processes.spread(network.to(device).train(), settings.parallel)
        optimizer = _optimizer(settings, network)
        average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        best: dict[str, Tensor] = {}  # the averages that did best so far, where the settings ask for them
        facts = restore_run(run, network, optimizer, average, best, processes)
        if "precision" not in facts:  # one trial for all processes and for the whole run
            chosen = choose_training_precision(config, device, thinnest) if processes.first else PRECISIONS[0]
            facts["precision"] = PRECISIONS[round(processes.first_says(PRECISIONS.index(chosen)))]
        precision = facts["precision"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        channels_last = is_channels_last(network, precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")
        if scaler.is_enabled() and "scaler" in facts:
            scaler.load_state_dict(facts["scaler"])
        if processes.first:
            truncate_metrics(run / "metrics.jsonl", facts["step"])
            sweep(run, min_age_s=0)  # what a killed process left half-written; the lock says that nobody writes
        clock = RunClock(settings, facts, began, reserve)

        log: list[dict[str, Any]] = []
        while facts["position"] < 1:
            step, position = facts["step"], facts["position"]
            seeds, samples = processes.share(settings, step, _mix)
            images, labels, unlabelled = source.batch(step, seeds, samples, device)
            if channels_last:
                images = images.to(memory_format=torch.channels_last_3d)  # `contiguous` leaves one channel alone
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate(step, position, settings)
            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                outputs = parallel(images)
            loss = _loss(network, source, outputs, labels, unlabelled)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            _average(average, network, min(settings.ema, (1 + step) / (10 + step)))

            value, dice = processes.mean(float(loss.detach()), _training_dice(outputs, labels, source))
            if not torch.isfinite(torch.tensor(value)) or not (torch.isfinite(norm) or scaler.is_enabled()):
                raise BadConfig(f"the loss is not finite at step {step + 1}: lower train.learning_rate or use fp32")
            facts["step"], facts["loss"], facts["dice"] = step + 1, facts["loss"] + value, facts["dice"] + dice
            moved = clock.after(step + 1, position)
            facts["position"], due, stop = processes.agree(moved, clock.is_due(step + 1), stopping())
            done, ended = step + 1, facts["position"] >= 1
            if done % settings.log_every == 0 or ended:
                row = _mean_facts(facts, (done - 1) % settings.log_every + 1, learning_rate(step, position, settings))
                log.append({**row, "seconds_a_step": round(clock.pace, 3)})
                facts["loss"] = facts["dice"] = 0.0
                track(done, row)
                progress(facts["position"], {**row, "seconds_left": clock.seconds_left(done, facts["position"])})
            if is_time_to_validate(settings, done, position, facts["position"]):
                with clock.aside(), _averaged(network, average, processes) as whole_network:
                    scores = _validate(source, whole_network, settings, processes, dtype)
                mean = processes.first_says(scores.get("mean", -1.0))
                if settings.keep == "best" and mean >= facts.setdefault("best", 0.0):
                    facts["best"], best = mean, {key: value.clone() for key, value in average.items()}
                if scores:
                    log.append({"step": done, **_named(scores)})
                    track(done, {f"validation/{name}": score for name, score in scores.items()})
                    progress(facts["position"], {"step": done, "validation": scores})
            if due or ended or stop:
                facts["seconds"] = clock.seconds()
                if scaler.is_enabled():
                    facts["scaler"] = scaler.state_dict()
                state = state_of(network, optimizer, average, best)
                if processes.first:
                    # Metrics first: lines beyond the state are cut on resuming, lines missing could not be restored.
                    append_line(run / "metrics.jsonl", log)
                    save_run(run, facts, state)
                    if clock.is_time_to_draw() or stop:
                        draw_curves(run / "metrics.jsonl", run / "progress.png")
                log.clear()
            if stop:
                raise Interrupted(stop)
        weights = {key: whole(value) for key, value in (best or average).items()}
        if processes.first:  # also what a process killed after its last step left undone
            draw_curves(run / "metrics.jsonl", run / "progress.png")
            _export(run, config, source, weights)
        processes.wait()
        return run / "model"


def _optimizer(settings: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.99; decay spares biases and norms, which have one dimension."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.learning_rate, 0.99, weight_decay=settings.weight_decay, nesterov=True)
    return torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)


def _loss(network: nn.Module, source: Source, outputs: Any, labels: Tensor, unlabelled: Tensor | None) -> Tensor:
    """The network's own loss where it has one (mask classification), else Dice and cross-entropy."""
    own = getattr(network, "loss", None)
    if own is not None:
        loss: Tensor = own(outputs, labels)
        return loss
    return segmentation_loss(
        outputs,
        labels,
        with_ignored=getattr(source, "with_ignored", False),
        unlabelled=unlabelled,
        membership=getattr(source, "membership", None),
    )


def _training_dice(outputs: Any, labels: Tensor, source: Source) -> float:
    """Mean hard Dice of the finest output, or nan where outputs are no class logits."""
    if getattr(source, "membership", None) is not None:
        return float("nan")
    finest = outputs if isinstance(outputs, Tensor) else outputs[0] if isinstance(outputs, list | tuple) else None
    folded = isinstance(finest, Tensor) and finest.ndim == 8
    if not isinstance(finest, Tensor) or not (folded or finest.shape[2:] == labels.shape[1:]):
        return float("nan")
    return hard_dice(finest.detach(), labels)


def _mean_facts(facts: dict[str, Any], count: int, rate: float) -> dict[str, float]:
    row = {"step": facts["step"], "loss": facts["loss"] / count, "dice": facts["dice"] / count, "lr": rate}
    return {key: round(value, 6) for key, value in row.items() if value == value}


def _named(scores: Mapping[str, float]) -> dict[str, Any]:
    """Validation as a line of metrics.jsonl has it."""
    row: dict[str, Any] = {"validation_dice": round(scores["mean"], 6)}
    each = {name: round(score, 6) for name, score in scores.items() if name != "mean"}
    return row | ({"validation": each} if each else {})


def _validate(
    source: Source, network: nn.Module, settings: TrainConfig, processes: Processes, dtype: torch.dtype
) -> dict[str, float]:
    """Scores of the averaged weights; one process computes them."""
    scores: dict[str, float] = {}
    if processes.first:
        seeds = [_mix(settings.seed, -1 - sample, 4095) % 2**63 for sample in range(settings.validate_samples)]
        network.eval()
        with torch.no_grad():
            scores = source.validate(network, seeds, processes.device, dtype)
        network.train()
    processes.wait()
    return scores


@contextmanager
def _averaged(network: nn.Module, average: dict[str, Tensor], processes: Processes) -> Iterator[nn.Module]:
    """The network with its averaged weights for a while; a copy on one device if it is shared out."""
    if processes.sharded:
        weights = {key: whole(value) for key, value in average.items()}
        yield processes.whole_network(weights)
        return
    own = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(average)
    yield network
    network.load_state_dict(own)


def _mix(seed: int, step: int, sample: int) -> int:
    """A seed for each (seed, step, sample) that no other triple of a run shares."""
    return (seed * 1_000_003 + step) * 4096 + sample


@torch.no_grad()
def _average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights, in place; early steps count more so that it starts at once."""
    floats = [key for key, value in average.items() if value.is_floating_point()]
    state = network.state_dict()
    torch._foreach_lerp_([average[key] for key in floats], [state[key] for key in floats], 1 - decay)


def _export(run: Path, config: Config, source: Source, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a model folder that `medseg infer --model` takes."""
    state = {key: value for key, value in average.items() if not key.startswith("deep_heads.")}
    save_checkpoint(run / "model", model_spec(config, source), state, source.table)
