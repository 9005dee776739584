"""What a run goes on from: its state on disk, its lock, the settings it began with."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from medseg.config import Config, TrainConfig, read_settings
from medseg.errors import BadConfig, BadFile, BadModel, DataWarning, Interrupted
from medseg.files import atomic_write, link_or_copy, output_errors, read_bytes, take_lock
from medseg.text import parse_json
from medseg.training.processes import Processes, whole

if TYPE_CHECKING:
    from torch import Tensor


def state_of(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: dict[str, Tensor],
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """All tensors that a run goes on from, whole on every process."""
    tensors: dict[str, Tensor] = {}
    for name, weights in (("network", network.state_dict()), ("average", average), ("best", best)):
        tensors |= {f"{name}.{key}": whole(value) for key, value in weights.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{number}.{key}": whole(value)
            for key, value in values.items()
            if value is not None
        }
    return tensors


def save_run(run: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The state of the run, replacing the last one, which stays as the one before.

    facts: the steps done, the position in the run, the seconds spent, the precision, and the loss
    and Dice summed over those steps that metrics.jsonl has not got yet.
    """
    last, before = run / "state.safetensors", run / "state-before.safetensors"
    if last.exists():
        with output_errors(before):
            before.unlink(missing_ok=True)
            link_or_copy(last, before)  # so that the last state never leaves its name
    save_state(last, tensors, facts)


def restore_run(
    *,
    run: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    best: dict[str, Tensor],
    processes: Processes,
) -> dict[str, Any]:
    """Load the newest sound state into place and return its facts (see `save_run`), or those of a
    beginning.

    Raises `BadModel` if there are states and all are damaged: starting again is for the user to
    decide.
    """
    bad_paths: list[Path] = []
    for path in (run / "state.safetensors", run / "state-before.safetensors"):
        if not path.exists():
            continue
        try:
            tensors, facts = load_state(path)
        except BadModel as error:
            warnings.warn(f"{error}; going on from the one before", DataWarning, stacklevel=2)
            bad_paths.append(path)
            continue
        _check_fit(run, tensors, network)
        processes.wait()  # until everybody has read it
        # Or `save_run` would put it in the place of the sound one.
        for other in bad_paths if processes.first else []:
            other.unlink()
        with torch.no_grad():
            for place, name in ((network.state_dict(), "network."), (average, "average.")):
                for key, value in _part(tensors, name).items():
                    place[key].copy_(processes.like(value, place[key]))
        best.update(
            {
                key: processes.like(value, average[key]).clone()
                for key, value in _part(tensors, "best.").items()
            }
        )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _part(tensors, "optimizer.").items():
            number, name = key.split(".")
            parameter = parameters[int(number)]
            # In the parameter's layout in memory too, as the optimiser keeps it.
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter).copy_(processes.like(value, parameter))
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        return {"position": 0.0, "seconds": 0.0, "loss": 0.0, "dice": 0.0} | facts
    if bad_paths:
        raise BadModel(
            f"every training state in {run} is damaged; choose another -o, or delete it to start"
            " again"
        )
    return {"step": 0, "position": 0.0, "seconds": 0.0, "loss": 0.0, "dice": 0.0}


def _check_fit(run: Path, tensors: dict[str, Tensor], network: nn.Module) -> None:
    """Raises `BadConfig` for a state of another network: of other labels, channels or options."""
    prefix = "network."
    kept = {
        key.removeprefix(prefix): value.shape
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    own = {key: value.shape for key, value in network.state_dict().items()}
    other = next(
        (key for key in sorted(kept.keys() | own.keys()) if kept.get(key) != own.get(key)), None
    )
    if other is not None:
        raise BadConfig(
            f"{run} was begun with another network: its {other} is not as these labels, channels"
            " and settings make it; choose another -o"
        )


#: Settings that do not touch the weights of a step: how long to train, and what only describes the
#: model.
_FREE = ("train.steps", "train.time_s", "card", "description", "fluid", "brain", "cleanup")


def check_same_run(config: Config, run: Path, processes: Processes) -> None:
    """Record the config in the run folder, or check that it is the one recorded; where the data
    lies may differ.
    """
    check_same_settings(config, run)
    processes.wait()
    if processes.first:
        record_config(config, run)


def check_same_settings(config: Config, run: Path, *, finished: bool = False) -> None:
    """Raises `BadConfig` naming the settings that differ from those recorded; in a finished run
    none may.
    """
    keys = [key for key in changed_settings(config, run) if finished or not key.startswith(_FREE)]
    if keys:
        how = "finished" if finished else "started"
        raise BadConfig(
            f"{run} was {how} with other settings ({', '.join(keys)}); choose another -o"
        )


def changed_settings(config: Config, run: Path) -> list[str]:
    """Dotted names of the settings that are not those that the run folder has recorded; none if it
    has none.
    """
    path = run / "config.yaml"
    if not path.exists():
        return []
    return sorted(_differences(read_settings(path), _content(config)))


def record_config(config: Config, run: Path) -> None:
    """Write config.yaml of a run: every setting but where things lie and run."""
    with atomic_write(run / "config.yaml") as handle:
        handle.write(yaml.safe_dump(_content(config), sort_keys=False).encode())


def _content(config: Config) -> dict[str, Any]:
    content = config.model_dump(mode="json", exclude={"data", "labels", "start_from"})
    del content["train"]["device"]  # where it runs, too, may change from one start to the next
    # What runs of earlier versions have not recorded is left out where it is as it was for them.
    if config.model.recipe is None:
        del content["model"]["recipe"]
    if config.train.betas == TrainConfig.model_fields["betas"].default:
        del content["train"]["betas"]
    return content


def _differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """Dotted names of the settings in which two nested dicts differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {prefix}
    keys = a.keys() | b.keys()
    return set().union(
        *(_differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k)) for k in keys)
    )


def truncate_metrics(path: Path, step: int, *, validated: bool = True) -> None:
    """Drop the lines of metrics.jsonl beyond `step`, and where it has not been `validated` those of
    its scores; a run that goes on writes them again.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [(line, row) for line in lines if (row := _row_of(line)) is not None]
    valid_lines = [
        line
        for line, row in rows
        if row["step"] < step
        or (row["step"] == step and (validated or "validation_dice" not in row))
    ]
    with atomic_write(path) as handle:
        handle.write("".join(line + "\n" for line in valid_lines).encode())


def _row_of(line: str) -> dict[str, Any] | None:
    """The row of a line of metrics; None of one that a kill or a full disk has cut off."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def append_line(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as lines of JSON at the end of a file. Raises `BadOutput`."""
    with output_errors(path), path.open("a", encoding="utf-8", newline="\n") as handle:
        handle.write("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def locked(run: Path, processes: Processes) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, so a killed run leaves none behind."""
    with output_errors(run / ".lock"):
        handle = (run / ".lock").open("wb")
    with handle:
        if processes.first:
            try:
                take_lock(handle.fileno())
            except OSError:
                raise BadConfig(
                    f"another process is training in {run}; wait for it or choose another -o"
                ) from None
        yield


@contextmanager
def stoppable() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM let the step finish and the state be saved; a second one stops at once.

    Only the main thread is told of signals; training in another one goes on until its end.
    """
    stop_signal = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def ask(number: int, frame: object) -> None:
        nonlocal stop_signal
        if stop_signal:
            raise Interrupted(number)
        stop_signal = number

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stop_signal
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a training state atomically: tensors and JSON facts in one safetensors file."""
    from safetensors.torch import save

    content = save(
        {key: value.detach().contiguous() for key, value in tensors.items()},
        {"medseg": json.dumps(facts)},
    )
    with atomic_write(path) as handle:
        handle.write(hashlib.sha256(content).digest() + content)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts written by `save_state`. Raises `BadModel` if the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        raw = read_bytes(path)
    except BadFile as error:
        raise BadModel(f"the training state cannot be read: {error}") from None
    digest, content = raw[:32], raw[32:]
    if hashlib.sha256(content).digest() != digest:
        raise BadModel(f"the training state {path} is damaged")
    try:
        tensors = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")].decode())
        facts = parse_json(header["__metadata__"]["medseg"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"the training state {path} is damaged: {error}") from None
    return tensors, facts


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
