"""The training loop, read top to bottom. Every random number is a function of (seed, step, sample), so a run that was
interrupted ends with the same weights, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import fcntl
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from medseg.checkpoint import load_state, save_checkpoint, save_state
from medseg.cleanup import check_steps
from medseg.config import Config
from medseg.errors import BadConfig, BadModel, DataWarning, Interrupted
from medseg.io import read_labels
from medseg.io.files import atomic_write
from medseg.labels import LabelTable
from medseg.losses import deep_supervision
from medseg.models import build_model, check_patch
from medseg.synth import Heads, Lookup, load_heads, lookup, render

#: Called after every step with (step, facts) to draw progress; facts hold loss, dice, seconds a step and time left.
Progress = Callable[[int, dict[str, float]], None]


def train(config: Config, run: Path, *, progress: Progress = lambda step, facts: None) -> Path:
    """Train `config` in the folder `run`, going on from where it was left; returns the model folder `run/model`.

    The folder holds config.yaml, metrics.jsonl, state.safetensors (and the one before) and the model. Raises
    `BadConfig` if the folder belongs to another config or another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run), _stoppable() as stopping:
        _same_run(config, run)
        check_steps(config.cleanup)
        table = LabelTable.read(config.labels)
        classes = (0, *table.values)
        training, validation, known = _label_maps(config, table, classes)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.train.seed)
        network = build_model(config.model.name, 1, len(classes), **config.model.options).to(device).train()
        check_patch(network, config.model.patch)
        optimizer = torch.optim.AdamW(
            network.parameters(), config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        if config.start_from:
            _start_from(config.start_from, network)
        average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        start, losses, dices = _restore(run, network, optimizer, average)
        _truncate_metrics(run / "metrics.jsonl", start)

        began = time.monotonic()
        log: list[dict[str, Any]] = []
        for step in range(start, config.train.steps):
            images, labels = _batch(training, known, config, step, device)
            for group in optimizer.param_groups:
                group["lr"] = config.train.learning_rate * _rate(step, config)
            with _autocast(config, device):
                outputs = network(images)
            loss = deep_supervision(outputs, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.train.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _average(average, network, min(config.train.ema, (1 + step) / (10 + step)))

            done = step + 1
            finest = outputs if isinstance(outputs, Tensor) else outputs[0]
            losses, dices = losses + float(loss.detach()), dices + _dice(finest.detach(), labels)
            if not torch.isfinite(loss):
                raise BadConfig(f"the loss is not finite at step {done}: lower train.learning_rate or use fp32")
            pace = (time.monotonic() - began) / (done - start)
            left = pace * (config.train.steps - done)
            if done % config.train.log_every == 0 or done == config.train.steps:
                count = (done - 1) % config.train.log_every + 1
                facts = {"step": done, "loss": losses / count, "dice": dices / count, "lr": _rate(step, config)}
                log.append({key: round(value, 6) for key, value in facts.items()} | {"seconds_a_step": round(pace, 3)})
                losses, dices = 0.0, 0.0
                progress(done, {**facts, "seconds_left": left})
            if validation and (done % config.train.validate_every == 0 or done == config.train.steps):
                score = _validate(network, average, validation, known, config, device)
                log.append({"step": done, "validation_dice": round(score, 6)})
            if done % config.train.checkpoint_every == 0 or done == config.train.steps or stopping():
                # Metrics first: lines beyond the state are cut on resuming, lines missing could not be restored.
                _append(run / "metrics.jsonl", log)
                log.clear()
                _save(run, {"step": done, "loss": losses, "dice": dices}, network, optimizer, average)
            if number := stopping():
                raise Interrupted(number)
        return _export(run, config, classes, average, table)


def _label_maps(config: Config, table: LabelTable, classes: tuple[int, ...]) -> tuple[Heads, Heads | None, Lookup]:
    paths = sorted(path for path in config.data.glob("*.nii.gz") if path.is_file())
    held = [path for path in paths if path.name in config.hold_out]
    if len(held) == len(paths):
        raise BadConfig(f"there are no label maps (*.nii.gz) to train from in {config.data}; set data=FOLDER")
    if len(held) != len(config.hold_out):
        raise BadConfig(f"hold_out names files that are not in {config.data}: {', '.join(config.hold_out)}")
    wanted = {*table.values, *config.synth.merge}
    # All maps share one list of values, so that one Lookup serves training and validation.
    heads = load_heads([read_labels(path) for path in paths], sorted(wanted))
    known = lookup(heads.values, classes, table.mirror_pairs() | config.synth.mirror, config.synth)
    training = _select(heads, [n for n, path in enumerate(paths) if path not in held])
    validation = _select(heads, [n for n, path in enumerate(paths) if path in held])
    return training, validation if held else None, known


def _select(heads: Heads, numbers: list[int]) -> Heads:
    maps, spacings, centres = ([part[n] for n in numbers] for part in (heads.maps, heads.spacings_mm, heads.centres))
    return Heads(tuple(maps), tuple(spacings), tuple(centres), heads.values)


def _batch(heads: Heads, known: Lookup, config: Config, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 1, X, Y, Z) and classes (B, X, Y, Z) int64 of one step: a function of the seed and the step alone."""
    first, last = config.synth.t1_share
    begin, end = config.synth.t1_steps
    share = first + (last - first) * min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    samples = []
    for sample in range(config.train.batch):
        generator = torch.Generator().manual_seed(_mix(config.train.seed, step, sample))
        model = config.model
        samples.append(render(heads, known, model.patch, model.spacing_mm, config.synth, generator, t1_like=share))
    images, labels = (torch.stack(part) for part in zip(*samples))
    return images[:, None].to(device), labels.long().to(device)


def _mix(seed: int, step: int, sample: int) -> int:
    """A seed for each (seed, step, sample) that no other triple of a run shares."""
    return (seed * 1_000_003 + step) * 4096 + sample


def _rate(step: int, config: Config) -> float:
    """Warm-up, constant, then a linear fall to zero over the last `decay` steps; as a share of the learning rate.

    Until the fall begins it does not depend on `steps`, so a run can be prolonged and still be one run.
    """
    settings = config.train
    decay = min(settings.decay, max(1, settings.steps // 2))
    return min(1.0, (step + 1) / settings.warmup, (settings.steps - step) / decay)


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    enabled = config.train.precision == "bf16" or (config.train.precision == "auto" and bool(fast))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def _average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights, in place; early steps count more so that it starts at once."""
    torch._foreach_lerp_(list(average.values()), list(network.state_dict().values()), 1 - decay)


@torch.no_grad()
def _dice(logits: Tensor, labels: Tensor) -> float:
    """Mean hard Dice over the structures present in `labels` (B, X, Y, Z), background left out."""
    classes = logits.shape[1]
    found = logits.argmax(1).flatten()
    truth = labels.flatten()
    both = torch.bincount(truth[found == truth], minlength=classes).float()
    total = torch.bincount(found, minlength=classes) + torch.bincount(truth, minlength=classes)
    present = torch.bincount(truth, minlength=classes)[1:] > 0
    if not present.any():
        return 1.0
    return float((2 * both / total.clamp(min=1))[1:][present].mean())


@torch.no_grad()
def _validate(
    network: nn.Module, average: dict[str, Tensor], heads: Heads, known: Lookup, config: Config, device: torch.device
) -> float:
    """Mean Dice of the averaged weights on fixed images of the held-out maps, half T1-like and half random."""
    own = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(average)
    network.eval()
    model, scores = config.model, []
    for sample in range(config.train.validate_samples):
        generator = torch.Generator().manual_seed(_mix(config.train.seed, -1 - sample, 4095) % 2**63)
        share = float(sample % 2 == 0)
        image, labels = render(heads, known, model.patch, model.spacing_mm, config.synth, generator, t1_like=share)
        with _autocast(config, device):
            logits = network(image[None, None].to(device))
        scores.append(_dice(logits, labels[None].long().to(device)))
    network.load_state_dict(own)
    network.train()
    return sum(scores) / max(1, len(scores))


def _save(
    run: Path, facts: dict[str, float], network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> None:
    """The state of the run, replacing the last one, which stays as the one before.

    facts: the steps done, and the loss and Dice summed over those that metrics.jsonl has not got yet.
    """
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    last, before = run / "state.safetensors", run / "state-before.safetensors"
    if last.exists():
        before.unlink(missing_ok=True)
        before.hardlink_to(last)  # a hard link, so that the last state never leaves its name
    save_state(last, tensors, facts)


def _restore(
    run: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> tuple[int, float, float]:
    """Load the newest sound state into place and return its step and sums (see `_save`); zeros if there is none.

    Raises `BadModel` if there are states and all are damaged: starting again is for the user to decide.
    """
    damaged: list[Path] = []
    for path in (run / "state.safetensors", run / "state-before.safetensors"):
        if not path.exists():
            continue
        try:
            tensors, facts = load_state(path)
        except BadModel as error:
            warnings.warn(f"{error}; going on from the one before", DataWarning, stacklevel=2)
            damaged.append(path)
            continue
        for other in damaged:  # or `_save` would put it in the place of the sound one
            other.unlink()
        part = lambda name, tensors=tensors: {k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)}  # noqa: E731
        network.load_state_dict(part("network."))
        for key, value in part("average.").items():
            average[key].copy_(value)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer.").items():
            number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(facts["step"]), facts.get("loss", 0.0), facts.get("dice", 0.0)
    if damaged:
        raise BadModel(f"every training state in {run} is damaged; choose another -o, or delete it to start again")
    return 0, 0.0, 0.0


def _start_from(run: Path, network: nn.Module) -> None:
    """Give the network the averaged weights of another run. Raises `BadModel` if they are missing or do not fit."""
    tensors, _ = load_state(run / "state.safetensors")
    weights = {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise BadModel(f"the weights of {run} do not fit this network; start_from needs one like it") from None


def _same_run(config: Config, run: Path) -> None:
    """Record the config in the run folder, or check that it is the one recorded.

    The number of steps and what only describes the model may differ, and where the data lies.
    """
    content = config.model_dump(mode="json", exclude={"data", "labels", "start_from"})
    path = run / "config.yaml"
    if path.exists():
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        free = ("train.steps", "card", "description", "fluid", "cleanup")  # these do not touch the weights of a step
        changed = {key for key in _differences(recorded, content) if not key.startswith(free)}
        if changed:
            raise BadConfig(f"{run} was started with other settings ({', '.join(sorted(changed))}); choose another -o")
    with atomic_write(path) as handle:
        handle.write(yaml.safe_dump(content, sort_keys=False).encode())


def _differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """Dotted names of the settings in which two nested dicts differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {prefix}
    keys = a.keys() | b.keys()
    return set().union(*(_differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k)) for k in keys))


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl beyond `step`; a run that goes on writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_write(path) as handle:
        handle.write("".join(line + "\n" for line in kept).encode())


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))


def _export(run: Path, config: Config, classes: tuple[int, ...], average: dict[str, Tensor], table: LabelTable) -> Path:
    """Write the averaged weights as a model folder that `medseg infer --model` takes."""
    options = {key: value for key, value in config.model.options.items() if key != "deep_supervision"}
    spec = {
        "name": config.name,
        "description": config.description,
        "architecture": config.model.name,
        "options": options,
        "classes": classes,
        "patch": config.model.patch,
        "spacing_mm": config.model.spacing_mm,
        "fluid": config.fluid,
        "cleanup": config.cleanup,
        "card": config.card,
    }
    state = {key: value for key, value in average.items() if not key.startswith("deep_heads.")}
    save_checkpoint(run / "model", spec, state, table)
    return run / "model"


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, so a killed run leaves none behind."""
    with (run / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadConfig(f"another process is training in {run}; wait for it or choose another -o") from None
        yield


@contextmanager
def _stoppable() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM let the step finish and the state be saved; a second one stops at once."""
    asked = 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise Interrupted(number)
        asked = number

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
