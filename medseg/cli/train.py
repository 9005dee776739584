"""`medseg train`: parse, call, show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import (
    Quiet,
    Telling,
    check_one_of,
    in_panel,
    parse_bytes,
    parse_changes,
    parse_seconds,
    word_of_device,
)
from medseg.cli.show import (
    bar_of_stages,
    grouped,
    print_line,
    print_rows,
    print_table,
    tell,
    tell_event,
)
from medseg.errors import BadConfig
from medseg.machine import keep_memory

if TYPE_CHECKING:
    from medseg.config import Config
    from medseg.dataset import Dataset, Finding
    from medseg.evaluation import Evaluation
    from medseg.training import Choice, Request


_PLAN, _FOLDS, _RUN = "How is trained", "Parts of the cases", "The run"


def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET|CONFIG", help="Scans with labels, or a config like configs/brain.yaml."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="The run folder. Default: runs/NAME."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            "--time", metavar="30m|8h", help="All it may take, planning and scoring included."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="The architecture; see the README."),
    ] = None,
    config: Annotated[
        Path | None,
        in_panel(
            _PLAN, "--config", metavar="YAML", help="Some or all settings; the rest is planned."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        in_panel(_PLAN, "--set", metavar="KEY=VALUE", help="Change a setting: --set train.batch=4"),
    ] = None,
    fold: Annotated[
        int | None,
        in_panel(_FOLDS, min=0, metavar="N", help="Which part of the cases validates. Default: 0."),
    ] = None,
    folds: Annotated[
        int | None,
        in_panel(
            _FOLDS,
            min=2,
            metavar="N",
            help="Split into so many parts; without --fold, a model for each. Usually 5 to 10.",
        ),
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Go on from this model, its plan and weights, or from an encoder's weights (.pt).",
        ),
    ] = None,
    max_memory: Annotated[
        str | None, in_panel(_PLAN, metavar="SIZE", help="Use no more than this, e.g. 8GB.")
    ] = None,
    seed: Annotated[
        int | None, in_panel(_PLAN, min=0, metavar="N", help="Another seed, other random numbers.")
    ] = None,
    deterministic: Annotated[
        bool, in_panel(_PLAN, "--deterministic", help="The same bits again, on a GPU too.")
    ] = False,
    device: Annotated[
        str | None,
        in_panel(
            _PLAN, metavar="auto|cpu|cuda|cuda:N", help="Where the network trains. Default: auto."
        ),
    ] = None,
    prepared: Annotated[
        Path | None,
        in_panel(_RUN, metavar="STORE", help="Scans that medseg prepare has prepared."),
    ] = None,
    track: Annotated[
        list[str] | None,
        in_panel(_RUN, metavar="tensorboard|mlflow", help="Log there too, beside metrics.jsonl."),
    ] = None,
    resume: Annotated[
        bool,
        in_panel(
            _RUN, "--resume/--no-resume", help="Go on with the run in the folder, or refuse one."
        ),
    ] = True,
    anyway: Annotated[
        bool,
        in_panel(
            _RUN,
            "--anyway",
            help="Train although medseg check finds errors that can be trained with.",
        ),
    ] = False,
    progress: Annotated[
        str,
        in_panel(
            Telling.PANEL,
            metavar="auto|json",
            help="json: a line of JSON on stderr for every step.",
        ),
    ] = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a model: the same command goes on where an interrupted run stopped.

    A data set is a folder as you have it: nnU-Net, Decathlon, BIDS, TotalSegmentator, images/ and
    labels/, or a list (CSV, TSV, JSON). It is checked, the run is planned for this machine and
    time, and the model is left in RUN/model, scored: medseg infer --model RUN.

    Examples:
    medseg train dataset/
    medseg train dataset/ -o runs/liver --time 8h
    """
    began = monotonic()  # before torch is loaded, which counts into the time
    keep_memory()
    show = _show(quiet, progress)
    changes = parse_changes(overrides or [])
    changes |= {"train.seed": seed} if seed is not None else {}
    changes |= {"train.deterministic": True} if deterministic else {}
    changes |= {"train.device": word_of_device(device)} if device is not None else {}
    if data.suffix.lower() in (".yaml", ".yml"):
        options = {
            "--model": model, "--config": config, "--fold": fold, "--folds": folds,
            "--finetune": finetune, "--prepared": prepared,
        }  # fmt: skip
        conflicts = [name for name, value in options.items() if value is not None]
        if conflicts:
            raise BadConfig(
                f"{conflicts[0]} goes with a data set; {data} is a config, so set it there"
            )
        changes |= {"train.time_s": parse_seconds(time), "train.steps": None} if time else {}
        _train_config(data, output, changes, resume=resume, show=show, began=began)
        return
    from medseg.training import Request

    request = Request(
        data=data,
        run=output,
        config=config,
        overrides=changes,
        architecture=model,
        time_s=parse_seconds(time) if time else None,
        folds=folds,
        fold=fold,
        every_fold=folds is not None and fold is None,
        finetune=finetune,
        memory_bytes=parse_bytes(max_memory, "--max-memory") if max_memory else None,
        track=tuple(track or ()),
        resume=resume, anyway=anyway, prepared=prepared,
        began=began,
    )  # fmt: skip
    _train_dataset(request, show)


def _train_dataset(request: Request, show: AbstractContextManager[_Show]) -> None:
    from medseg.training import Events, train_folds

    with show as shown:
        events = Events(
            found=shown.found,
            reading=shown.reading,
            planned=shown.planned,
            training=shown.training,
            scored=shown.scored,
            say=shown.say,
        )
        outcome = train_folds(request, events)
    if outcome is None:  # another process of torchrun's is the first
        return
    if outcome.evaluation is not None:
        from medseg.evaluation import summary_table

        print_rows(*summary_table(outcome.evaluation.summary))
    for path in outcome.models:
        print_line(path)


def _train_config(
    path: Path,
    output: Path | None,
    changes: dict[str, Any],
    *,
    resume: bool,
    show: AbstractContextManager[_Show],
    began: float,
) -> None:
    from medseg.config import load_config, read_settings

    if "synth" not in read_settings(path):
        raise BadConfig(
            f"{path} has no synth, so it trains from scans: use medseg train DATASET --config"
            f" {path}"
        )
    settings = load_config(path, changes)
    run = output or Path("runs") / settings.name
    if not resume and (run / "config.yaml").exists():
        raise BadConfig(
            f"{run} holds a run; choose another -o, or leave --no-resume out to go on with it"
        )
    from medseg.training import train as run_loop

    with show as shown:
        print_line(run_loop(settings, run, began=began, progress=shown.training))


class _Show:
    """What is told while a model is trained: one bar on stderr, and tables of what was found and
    planned.
    """

    def __init__(self, quiet: bool, progress: Callable[[str, float, str], None]) -> None:
        self.quiet, self.progress = quiet, progress

    def say(self, text: str) -> None:
        """A line of text."""
        tell(text, self.quiet)

    def reading(self, what: str, done: int, count: int) -> None:
        """Cases done."""
        self.progress(what, done / max(1, count), f"{done} of {count} cases")

    def found(self, dataset: Dataset, findings: Sequence[Finding]) -> None:
        """What the data set is, and what to look at in it."""
        names = ", ".join(label.name for label in dataset.table.labels[:8])
        more = f" and {len(dataset.table.labels) - 8} more" if len(dataset.table.labels) > 8 else ""
        channels = ", ".join(dataset.channels)
        self.say(
            f"{dataset.name} ({dataset.layout}): {len(dataset.cases)} cases of {channels};"
            f" {names}{more}"
        )
        warnings = [one for one in findings if one.severity == "warning"]
        lines = grouped(warnings)
        for cases, one in lines[:5]:
            self.say(f"  look at {'the data set' if cases == 'all' else cases}: {one.message}")
        if len(lines) > 5:
            self.say(f"  and {len(lines) - 5} more; medseg check shows all")

    def planned(self, choices: Sequence[Choice], config: Config) -> None:
        """The plan, with its reasons."""
        if self.quiet:
            return
        rows = [(choice.key, _short(choice.value), choice.reason) for choice in choices]
        print_table("", ("setting", "value", "because"), rows, on_stderr=True)

    def training(self, share: float, facts: Mapping[str, Any]) -> None:
        """Where the run stands."""
        if "validation" in facts:
            each = ", ".join(
                f"{name} {score:.3f}"
                for name, score in facts["validation"].items()
                if name != "mean"
            )
            self.say(
                f"step {facts['step']}: validation Dice {facts['validation']['mean']:.3f}"
                + (f" ({each})" if each else "")
            )
            return
        from datetime import timedelta

        left = timedelta(seconds=round(facts["seconds_left"]))
        dice = f"  Dice {facts['dice']:.3f}" if "dice" in facts else ""
        rate = f"rate {facts['learning_rate']:.2g}"
        text = f"step {facts['step']}  loss {facts['loss']:.3f}{dice}  {rate}  {left} left"
        self.progress("training", share, text)

    def scored(self, evaluation: Evaluation) -> None:
        """The scores are printed at the end, on stdout."""


class _Events(_Show):
    """The same as lines of JSON on stderr, for programs."""

    def say(self, text: str) -> None:
        """A line of text."""
        tell_event(event="message", text=text)

    def reading(self, what: str, done: int, count: int) -> None:
        """Cases done."""
        tell_event(event="progress", what=what, done=done, total=count)

    def planned(self, choices: Sequence[Choice], config: Config) -> None:
        """The plan stands in the run folder."""

    def training(self, share: float, facts: Mapping[str, Any]) -> None:
        """Where the run stands."""
        if "validation" in facts:
            tell_event(event="validation", step=facts["step"], dice=facts["validation"])
            return
        names = ("step", "loss", "dice", "seconds_left")
        numbers = {name: round(facts[name], 4) for name in names if name in facts}
        rate = facts["learning_rate"]
        tell_event(event="training", share=round(share, 4), learning_rate=rate, **numbers)


def _show(quiet: bool, progress: str) -> AbstractContextManager[_Show]:
    """What is told, as lines of JSON or with a bar. Raises `typer.BadParameter` for another
    progress than 'auto' and 'json'.
    """
    check_one_of("--progress", progress, ("auto", "json"))
    return _told(quiet, _Events if progress == "json" else _Show)


@contextmanager
def _told(quiet: bool, kind: type[_Show]) -> Iterator[_Show]:
    with bar_of_stages(quiet or kind is _Events) as progress:
        yield kind(quiet, progress)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(one) for one in value) + "]"
    return str(value)
