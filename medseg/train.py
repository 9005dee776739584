"""The training loop, read top to bottom. Every random number is a function of (seed, step, sample), so a run that was
interrupted ends with the same weights, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import fcntl
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from medseg.config import Config, TrainConfig
from medseg.curves import draw_curves
from medseg.errors import BadConfig, BadModel, DataWarning, Interrupted
from medseg.files import atomic_write, sweep
from medseg.label_maps import LabelMaps, hard_dice
from medseg.labels import LabelTable
from medseg.losses import segmentation_loss
from medseg.models.folder import load_checkpoint, load_state, save_checkpoint, save_state
from medseg.networks.layers import conv, likes_channels_last
from medseg.networks.zoo import FLOAT32_ON_CPU, build_model, check_patch
from medseg.postprocess.cleanup import check_steps
from medseg.processor import has_matrix_units
from medseg.team import Team, whole

#: Called after some steps with (share of the run that is done, facts); facts hold step, loss, dice, seconds_left ...
Progress = Callable[[float, Mapping[str, Any]], None]
#: Seconds between two states, in a run that is given a time, and between two pictures of its curves.
SAVE_EVERY_S = 60.0
#: Into how many parts validation divides a run that is given a time.
VALIDATIONS = 8
_PRECISIONS = ("fp32", "bf16", "fp16")
#: In oneDNN's bfloat16 without matrix units the gradients of weights are wrong, to infinity, where a map is two voxels
#: deep (PyTorch 2.13, AMD Zen 5): maps thinner than this are not trained in it.
THIN = 3


class Source(Protocol):
    """What a model is trained from: `LabelMaps`, or `Scans`."""

    channels: int
    outputs: int
    table: LabelTable

    def batch(
        self, step: int, seeds: list[int], samples: range, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (B, C, X, Y, Z), labels (B, X, Y, Z) int64, and which classes are unlabelled (B, K) or None.

        `samples` are their places in the whole run; all that is random comes from the seeds, one for each sample.
        """

    def spec(self) -> dict[str, Any]:
        """What `ModelSpec` needs to know of the data."""

    def validate(
        self, network: nn.Module, seeds: list[int], device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """Dice of each structure and their 'mean' on some data held out; empty if there is none."""


def train(
    config: Config,
    run: Path,
    source: Source | None = None,
    *,
    team: Team | None = None,
    began: float | None = None,
    reserve: Callable[[], float] = lambda: 0.0,
    progress: Progress = lambda share, facts: None,
    track: Callable[[int, Mapping[str, float]], None] = lambda step, facts: None,
) -> Path:
    """Train `config` in the folder `run`, going on from where it was left; returns the model folder `run/model`.

    The folder holds config.yaml, metrics.jsonl, progress.png, state.safetensors (and the one before) and the model.
    began: when the command began (`time.monotonic`), and reserve: how many seconds will be needed after the loop;
    both count where the config gives a time. team: the processes, where they were joined before. Raises `BadConfig` if
    the folder belongs to another config or another process trains there.
    """
    began = time.monotonic() if began is None else began
    run.mkdir(parents=True, exist_ok=True)
    with (
        nullcontext(team) if team else Team() as team,
        locked(run, team),
        _stoppable() as stopping,
        team.repeatable(config.train.deterministic),
    ):
        settings, device = config.train, team.device
        _same_run(config, run, team)
        check_steps([] if config.cleanup == "auto" else config.cleanup)
        source = source or LabelMaps(config)
        torch.manual_seed(settings.seed)
        network = build_model(config.model.name, source.channels, source.outputs, **config.model.options)
        check_patch(network, config.model.patch)
        if hasattr(network, "folded"):
            network.folded = True  # type: ignore[assignment]  # the losses take it
        if config.start_from:
            _start_from(config.start_from, network)
        thinnest = THIN
        if settings.precision == "auto":  # asked before the network is spread over processes
            thinnest = _thinnest_map(network, source.channels, config.model.patch, device)
        network, parallel = team.spread(network.to(device).train(), settings.parallel)
        optimizer = _optimizer(settings, network)
        average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        best: dict[str, Tensor] = {}  # the averages that did best so far, where the settings ask for them
        facts = _restore(run, network, optimizer, average, best, team)
        if "precision" not in facts:  # one trial for all processes and for the whole run
            chosen = choose_training_precision(config, device, thinnest) if team.first else _PRECISIONS[0]
            facts["precision"] = _PRECISIONS[round(team.first_says(_PRECISIONS.index(chosen)))]
        precision = facts["precision"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        channels_last = _is_channels_last(network, precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type == "cuda")
        if scaler.is_enabled() and "scaler" in facts:
            scaler.load_state_dict(facts["scaler"])
        if team.first:
            _truncate_metrics(run / "metrics.jsonl", facts["step"])
            sweep(run, min_age_s=0)  # what a killed process left half-written; the lock says that nobody writes
        clock = _Clock(settings, facts, began, reserve)

        log: list[dict[str, Any]] = []
        while facts["position"] < 1:
            step, position = facts["step"], facts["position"]
            seeds, samples = team.share(settings, step, _mix)
            images, labels, unlabelled = source.batch(step, seeds, samples, device)
            if channels_last:
                images = images.to(memory_format=torch.channels_last_3d)  # `contiguous` leaves one channel alone
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate(step, position, settings)
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

            value, dice = team.mean(float(loss.detach()), _training_dice(outputs, labels, source))
            if not torch.isfinite(torch.tensor(value)) or not (torch.isfinite(norm) or scaler.is_enabled()):
                raise BadConfig(f"the loss is not finite at step {step + 1}: lower train.learning_rate or use fp32")
            facts["step"], facts["loss"], facts["dice"] = step + 1, facts["loss"] + value, facts["dice"] + dice
            moved = clock.after(step + 1, position)
            facts["position"], due, stop = team.agree(moved, clock.is_due(step + 1), stopping())
            done, ended = step + 1, facts["position"] >= 1
            if done % settings.log_every == 0 or ended:
                row = _mean_facts(facts, (done - 1) % settings.log_every + 1, _rate(step, position, settings))
                log.append({**row, "seconds_a_step": round(clock.pace, 3)})
                facts["loss"] = facts["dice"] = 0.0
                track(done, row)
                progress(facts["position"], {**row, "seconds_left": clock.seconds_left(done, facts["position"])})
            if _is_time_to_validate(settings, done, position, facts["position"]):
                with clock.aside(), _averaged(network, average, team) as whole_network:
                    scores = _validate(source, whole_network, settings, team, dtype)
                mean = team.first_says(scores.get("mean", -1.0))
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
                state = _state(network, optimizer, average, best)
                if team.first:
                    # Metrics first: lines beyond the state are cut on resuming, lines missing could not be restored.
                    _append(run / "metrics.jsonl", log)
                    _save(run, facts, state)
                    if clock.is_time_to_draw() or stop:
                        draw_curves(run / "metrics.jsonl", run / "progress.png")
                log.clear()
            if stop:
                raise Interrupted(stop)
        weights = {key: whole(value) for key, value in (best or average).items()}
        if team.first:  # also what a process killed after its last step left undone
            draw_curves(run / "metrics.jsonl", run / "progress.png")
            _export(run, config, source, weights)
        team.wait()
        return run / "model"


class _Clock:
    """Where a run stands between its beginning, 0, and its end, 1: by its steps, or by the time that is left.

    With a time the position moves by the share of the remaining time that a step takes, so that the learning rate comes
    down when the time is over, however the machine's speed changes.
    """

    def __init__(
        self, settings: TrainConfig, facts: dict[str, Any], began: float, reserve: Callable[[], float]
    ) -> None:
        self.settings, self.reserve, self.before = settings, reserve, float(facts["seconds"])
        self.began, self.first, self.start = began, int(facts["step"]), time.monotonic()
        self.last, self.pace, self.apart = self.start, 0.0, 0.0
        self.saved = self.drawn = self.start
        if settings.steps is not None:
            facts["position"] = min(1.0, facts["step"] / settings.steps)

    def seconds(self) -> float:
        """Spent on this run, in earlier processes too."""
        return self.before + time.monotonic() - self.began

    def after(self, done: int, position: float) -> float:
        """The new position, `done` steps being done."""
        now = time.monotonic()
        taken, self.last = now - self.last - self.apart, now
        self.apart = 0.0
        # The first step of a process also waits for files and memory; it counts until there are others.
        self.pace = taken if done - self.first <= 2 else 0.9 * self.pace + 0.1 * taken
        if self.settings.steps is not None:
            return min(1.0, done / self.settings.steps)
        assert self.settings.time_s is not None
        left = self.settings.time_s - self.seconds() - self.reserve()
        return 1.0 if left <= self.pace else position + (1 - position) * min(1.0, self.pace / left)

    def is_due(self, done: int) -> bool:
        """Whether the state should be saved: every so many steps, or once a minute."""
        if self.settings.steps is not None:
            return done % self.settings.checkpoint_every == 0
        due = time.monotonic() - self.saved > SAVE_EVERY_S
        self.saved = time.monotonic() if due else self.saved
        return due

    def is_time_to_draw(self) -> bool:
        """Whether the picture is old."""
        old = time.monotonic() - self.drawn > SAVE_EVERY_S
        self.drawn = time.monotonic() if old else self.drawn
        return old

    def seconds_left(self, done: int, position: float) -> float:
        """How much longer the loop will take."""
        if self.settings.steps is not None:
            return self.pace * (self.settings.steps - done)
        assert self.settings.time_s is not None
        return max(0.0, self.settings.time_s - self.seconds() - self.reserve())

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Something that is no step and does not count into the pace."""
        begun = time.monotonic()
        yield
        self.apart += time.monotonic() - begun


def choose_training_precision(config: Config, device: torch.device, thinnest: int = THIN) -> str:
    """The arithmetic of the loop: 'auto' is bf16 where the GPU knows it, else fp16; on a CPU what is faster.

    thinnest: the least size of a map that the network convolves; below `THIN` a CPU without matrix units takes fp32.
    A CPU with matrix units (AMX) trains faster in bfloat16, but for `FLOAT32_ON_CPU`; where there are none a trial
    tells: processors were measured at twice and at half their float32 speed, too far apart for chance to decide.
    """
    settings = config.train
    if settings.precision != "auto":
        if settings.precision == "fp16" and device.type == "cpu":
            raise BadConfig("fp16 is very slow on a CPU; set train.precision=bf16 or fp32")
        return settings.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if config.model.name in FLOAT32_ON_CPU or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    if has_matrix_units():
        return "bf16"
    if thinnest < THIN:
        return "fp32"
    block = conv(32, 32)
    x = torch.rand(2, 32, 32, 32, 32)

    def seconds(half: bool) -> float:
        images = x.to(memory_format=torch.channels_last_3d) if half else x
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = block(images)
            out.float().sum().backward()
            times.append(time.perf_counter() - begun)
        return min(times[1:])

    return "bf16" if seconds(True) < 0.9 * seconds(False) else "fp32"


def _thinnest_map(network: nn.Module, channels: int, patch: Sequence[int], device: torch.device) -> int:
    """The least size along an axis that convolutions wider than 1x1x1 read; `THIN` if more, or on other processors."""
    if device.type != "cpu" or has_matrix_units():
        return THIN
    found = [THIN]

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(min(inputs[0].shape[2:]))

    wide = [m for m in network.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1]
    hooks = [module.register_forward_pre_hook(look) for module in wide]
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, *patch))
    for hook in hooks:
        hook.remove()
    return min(found)


def _is_channels_last(network: nn.Module, precision: str, device: torch.device) -> bool:
    """Whether maps have their channels innermost: on a GPU, and on a CPU where that is faster."""
    return device.type != "cpu" or (precision == "bf16" and likes_channels_last(network))


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


def _is_time_to_validate(settings: TrainConfig, done: int, before: float, after: float) -> bool:
    if settings.steps is not None:
        return done % settings.validate_every == 0 or after >= 1
    # At the end only where weights are chosen by it: all validation scans are scored then anyway.
    return int(before * VALIDATIONS) < int(after * VALIDATIONS) < VALIDATIONS + (settings.keep == "best")


def _validate(
    source: Source, network: nn.Module, settings: TrainConfig, team: Team, dtype: torch.dtype
) -> dict[str, float]:
    """Scores of the averaged weights; one process computes them."""
    scores: dict[str, float] = {}
    if team.first:
        seeds = [_mix(settings.seed, -1 - sample, 4095) % 2**63 for sample in range(settings.validate_samples)]
        network.eval()
        with torch.no_grad():
            scores = source.validate(network, seeds, team.device, dtype)
        network.train()
    team.wait()
    return scores


@contextmanager
def _averaged(network: nn.Module, average: dict[str, Tensor], team: Team) -> Iterator[nn.Module]:
    """The network with its averaged weights for a while; a copy on one device if it is shared out."""
    if team.sharded:
        weights = {key: whole(value) for key, value in average.items()}
        yield team.whole_network(weights)
        return
    own = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(average)
    yield network
    network.load_state_dict(own)


def _mix(seed: int, step: int, sample: int) -> int:
    """A seed for each (seed, step, sample) that no other triple of a run shares."""
    return (seed * 1_000_003 + step) * 4096 + sample


def _rate(step: int, position: float, settings: TrainConfig) -> float:
    """The learning rate as a share of the largest: warm-up, then as `schedule` says.

    linear: constant, then a fall to zero over the last `decay` steps (of a run by time: over its last third). Until the
    fall begins it does not depend on `steps`, so a run can be prolonged and still be one run.
    """
    warm = min(1.0, (step + 1) / settings.warmup)
    if settings.schedule == "poly":
        return warm * (1 - position) ** 0.9
    if settings.schedule == "cosine":
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * position, dtype=torch.float64))))
    if settings.steps is None:
        return min(warm, 3 * (1 - position))
    decay = min(settings.decay, max(1, settings.steps // 2))
    return min(warm, (settings.steps - step) / decay)


@torch.no_grad()
def _average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights, in place; early steps count more so that it starts at once."""
    floats = [key for key, value in average.items() if value.is_floating_point()]
    state = network.state_dict()
    torch._foreach_lerp_([average[key] for key in floats], [state[key] for key in floats], 1 - decay)


def _state(
    network: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], best: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors that a run goes on from, whole on every process."""
    tensors: dict[str, Tensor] = {}
    for name, weights in (("network", network.state_dict()), ("average", average), ("best", best)):
        tensors |= {f"{name}.{key}": whole(value) for key, value in weights.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": whole(value) for key, value in values.items() if value is not None}
    return tensors


def _save(run: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The state of the run, replacing the last one, which stays as the one before.

    facts: the steps done, the position in the run, the seconds spent, the precision, and the loss and Dice summed over
    those steps that metrics.jsonl has not got yet.
    """
    last, before = run / "state.safetensors", run / "state-before.safetensors"
    if last.exists():
        before.unlink(missing_ok=True)
        before.hardlink_to(last)  # a hard link, so that the last state never leaves its name
    save_state(last, tensors, facts)


def _restore(
    run: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    best: dict[str, Tensor],
    team: Team,
) -> dict[str, Any]:
    """Load the newest sound state into place and return its facts (see `_save`); those of a beginning if there is none.

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
        team.wait()  # until everybody has read it
        for other in damaged if team.first else []:  # or `_save` would put it in the place of the sound one
            other.unlink()
        part = lambda name, tensors=tensors: {k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)}  # noqa: E731
        with torch.no_grad():
            for place, name in ((network.state_dict(), "network."), (average, "average.")):
                for key, value in part(name).items():
                    place[key].copy_(team.like(value, place[key]))
        best.update({key: team.like(value, average[key]).clone() for key, value in part("best.").items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimizer.").items():
            number, name = key.split(".")
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:  # in the parameter's layout in memory too, as the optimiser keeps it
                value = torch.empty_like(parameter).copy_(team.like(value, parameter))
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return {"position": 0.0, "seconds": 0.0, "loss": 0.0, "dice": 0.0} | facts
    if damaged:
        raise BadModel(f"every training state in {run} is damaged; choose another -o, or delete it to start again")
    return {"step": 0, "position": 0.0, "seconds": 0.0, "loss": 0.0, "dice": 0.0}


def _start_from(source: Path, network: nn.Module) -> None:
    """Give the network the weights of a run (its averages) or of a model, as far as names and shapes agree.

    A `DataWarning` names what was not loaded: heads for other labels. Raises `BadModel` if less than half fits.
    """
    if (source / "state.safetensors").is_file():
        tensors, _ = load_state(source / "state.safetensors")
        weights = {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}
    else:
        weights = load_checkpoint(str(source)).network().state_dict()
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if 2 * len(fitting) < len(own):
        raise BadModel(f"the weights of {source} do not fit this network; it needs one of the same kind and size")
    new = [key for key in own if key not in fitting]
    network.load_state_dict(fitting, strict=False)
    if new:
        shown = ", ".join(new[:4]) + (" ..." if len(new) > 4 else "")
        warnings.warn(
            f"{len(fitting)} of {len(own)} tensors were taken from {source}; new are {shown}", DataWarning, stacklevel=2
        )


def _same_run(config: Config, run: Path, team: Team) -> None:
    """Record the config in the run folder, or check that it is the one recorded.

    How long to train and what only describes the model may differ, and where the data lies.
    """
    content, path = _content(config), run / "config.yaml"
    if path.exists():
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        # These do not touch the weights of a step.
        free = ("train.steps", "train.time_s", "card", "description", "fluid", "brain", "cleanup")
        changed = {key for key in _differences(recorded, content) if not key.startswith(free)}
        if changed:
            raise BadConfig(f"{run} was started with other settings ({', '.join(sorted(changed))}); choose another -o")
    team.wait()
    if team.first:
        record_config(config, run)


def record_config(config: Config, run: Path) -> None:
    """Write config.yaml of a run: every setting but where things lie."""
    with atomic_write(run / "config.yaml") as handle:
        handle.write(yaml.safe_dump(_content(config), sort_keys=False).encode())


def _content(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"data", "labels", "start_from"})


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


def model_spec(config: Config, source: Source) -> dict[str, Any]:
    """The fields of `ModelSpec`, but the hash, of the model that a run makes."""
    options = {key: value for key, value in config.model.options.items() if key != "deep_supervision"}
    return {
        "name": config.name,
        "description": config.description,
        "architecture": config.model.name,
        "options": options,
        "patch": config.model.patch,
        "spacing_mm": config.model.spacing_mm,
        "grid": config.model.grid,
        "intensity": config.model.intensity,
        "mirror": config.augment.mirror if config.synth is None else (),
        "fluid": config.fluid,
        "brain": config.brain,
        "cleanup": [] if config.cleanup == "auto" else config.cleanup,
        "card": config.card,
    } | source.spec()


def _export(run: Path, config: Config, source: Source, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a model folder that `medseg infer --model` takes."""
    state = {key: value for key, value in average.items() if not key.startswith("deep_heads.")}
    save_checkpoint(run / "model", model_spec(config, source), state, source.table)


@contextmanager
def locked(run: Path, team: Team) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, so a killed run leaves none behind."""
    with (run / ".lock").open("w") as handle:
        if team.first:
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
