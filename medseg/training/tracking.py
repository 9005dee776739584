"""Numbers of a training run for TensorBoard and MLflow, beside metrics.jsonl, for those who look at
them there.

Only numbers go there, on this machine: to `tensorboard/` and `mlflow/` in the run folder, unless
the user has told MLflow of a server (`MLFLOW_TRACKING_URI`). TensorBoard writes the machine's name
into the names of its files.
"""

from __future__ import annotations

import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from medseg.errors import BadConfig, DataWarning
from medseg.files import atomic_write
from medseg.text import reason_of

#: Takes a step and numbers by name.
Log = Callable[[int, Mapping[str, float]], None]
#: Ends what was opened; told whether the run came to its end.
Close = Callable[[bool], None]


class Trackers:
    """Called with (step, numbers by name); a context that closes them. One that fails is left out
    with a warning.
    """

    def __init__(self, opened: Mapping[str, tuple[Log, Close]]) -> None:
        self._opened = dict(opened)

    def __call__(self, step: int, facts: Mapping[str, float]) -> None:
        """Log the numbers among `facts`; nothing else, and no failure, gets through."""
        numbers = {name: float(value) for name, value in facts.items() if _is_number(value)}
        for name, (log, _) in list(self._opened.items()):
            try:
                log(step, numbers)
            except Exception as error:  # a server that is away must not end a training run
                self._leave_out(name, error)

    def close(self, finished: bool = True) -> None:
        """Write what is left and end the trackers; `finished`: whether the run came to its end."""
        for name, (_, close) in list(self._opened.items()):
            try:
                close(finished)
            except Exception as error:
                self._leave_out(name, error)
        self._opened.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finished=kind is None)

    def _leave_out(self, name: str, error: Exception) -> None:
        del self._opened[name]
        warnings.warn(
            f"{name} takes no more numbers of this run: {reason_of(error)}",
            DataWarning,
            stacklevel=3,
        )


def open_trackers(names: Sequence[str], run: Path, *, start: int = 0) -> Trackers:
    """Open the trackers of these names ("tensorboard", "mlflow") for the run folder, from step
    `start` on.

    A run that goes on at a step goes on in the same curves: TensorBoard drops what was logged after
    it, MLflow keeps it. Raises `BadConfig` for an unknown name, a package that is not installed and
    a tracker that cannot be opened.
    """
    for name in names:
        if name not in _TRACKERS:
            raise BadConfig(f"there is no tracker '{name}'; there are {' and '.join(_TRACKERS)}")
        package = _TRACKERS[name][0]
        if find_spec(package) is None:
            raise BadConfig(
                f'{name} is not installed: pip install "medseg[{name}]", or train without it'
            )
    trackers: dict[str, tuple[Log, Close]] = {}
    for name in dict.fromkeys(names):
        try:
            trackers[name] = _TRACKERS[name][1](run, start)
        except Exception as error:  # whatever a package or a server raises
            Trackers(trackers).close(finished=False)
            raise BadConfig(
                f"{name} cannot be opened for {run}: {reason_of(error)}; correct that, or train"
                " without it"
            ) from None
    return Trackers(trackers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tensorboard(run: Path, start: int) -> tuple[Log, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, lambda finished: writer.close()


def _mlflow(run: Path, start: int) -> tuple[Log, Close]:
    # Read by mlflow as it is imported: without the first it reports its use to its makers, without
    # the second it refuses to keep runs in files, which is all that needs no database.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    place = None if mlflow.is_tracking_uri_set() else (run / "mlflow").resolve().as_uri()
    # And not mlflow.start_run, which also stores the user's name.
    client = mlflow.MlflowClient(place)
    id_file = run / "mlflow.txt"
    number = id_file.read_text(encoding="ascii").strip() if id_file.is_file() else ""
    try:
        client.update_run(number, status="RUNNING")
    except MlflowException:  # a new run, or one of another store
        experiment = client.get_experiment_by_name("medseg")
        where = experiment.experiment_id if experiment else client.create_experiment("medseg")
        number = client.create_run(where, run_name=run.name).info.run_id
        with atomic_write(id_file) as handle:
            handle.write(number.encode("ascii"))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in numbers.items()}
        client.log_batch(
            number,
            [Metric(name, value, timestamp=now, step=step) for name, value in metrics.items()],
        )

    return log, lambda finished: client.set_terminated(number, "FINISHED" if finished else "FAILED")


#: Name -> the package it needs, and what opens it.
_TRACKERS: dict[str, tuple[str, Callable[[Path, int], tuple[Log, Close]]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "mlflow": ("mlflow", _mlflow),
}
