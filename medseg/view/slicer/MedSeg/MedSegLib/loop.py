"""The loop: add a corrected case to a data set, check it, train, choose the next case. What medseg
is told, and what it answers.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from MedSegLib.command import CommandError

#: The list of a data set that `medseg add` makes, and the table of its structures.
LIST, TABLE = "cases.csv", "labels.csv"
_RUNS = "runs"
_FINAL, _ORIGINAL = "final", "original"


class Finding(NamedTuple):
    """What `medseg check` found: the case ('' for the data set), how bad it is, and words."""

    case: str
    severity: str
    message: str


class Round(NamedTuple):
    """A model that was trained in a data set: its name and run, with how many cases, whether it has
    ended, and its score on cases that no model was trained with (None where there is none).
    """

    name: str
    run: str
    cases: int
    finished: bool
    mean_dice: float | None


class Choice(NamedTuple):
    """The case to label next: its id, its files, and why it was chosen."""

    case: str
    files: tuple[str, ...]
    why: str


def case_name(name: str) -> str:
    """An id that medseg takes, from what a volume is called; '' where nothing is left."""
    plain = re.sub(r"[^\w .+-]+", " ", name).strip(" .+-_")
    return re.sub(r"\s+", " ", plain)[:80].strip(" .+-_")


def add_command(
    command: Sequence[str],
    data_set: str,
    case: str,
    labels: Path,
    *,
    scans: Sequence[Path] = (),
    channels: Sequence[str] = (),
    model: str = "",
) -> list[str]:
    """The arguments that add a corrected segmentation of a case. scans: its channels, where the
    data set has it not yet. channels: what they are called.
    """
    scans = in_order(scans, channels, channels_of(data_set))
    arguments = ["add", data_set, *(str(scan) for scan in scans[:1])]
    for scan in scans[1:]:
        arguments += ["--channel", str(scan)]
    arguments += ["--labels", str(labels), "--id", case, "--json"]
    named = [name for name in channels if name]
    if scans and len(named) == len(scans) and not is_data_set(data_set):
        arguments += ["--modalities", ",".join(named)]
    arguments += ["--model", model] if model else []
    return [*command, *arguments]


def check_command(command: Sequence[str], data_set: str) -> list[str]:
    """The arguments that check a data set."""
    return [*command, "check", data_set, "--json"]


def rounds_command(command: Sequence[str], data_set: str, device: str) -> list[str]:
    """The arguments that score the models of a data set."""
    return [*command, "rounds", data_set, "--device", device, "--json"]


def next_command(
    command: Sequence[str], data_set: str, proposal: Path, *, model: str, folder: str, device: str
) -> list[str]:
    """The arguments that choose the next case and segment it. model: where the data set has none of
    its own; folder: where scans lie that are not in it yet.
    """
    arguments = ["next", data_set, "--output", str(proposal), "--device", device, "--json"]
    has_own = any(is_finished(run) for run in runs_of(data_set))
    arguments += ["--model", model] if model and not has_own else []
    arguments += ["--from", folder] if folder else []
    return [*command, *arguments]


def train_command(
    command: Sequence[str], data_set: str, run: Path, *, start: str, minutes: float, device: str
) -> list[str]:
    """The arguments that train, or go on with a run that was stopped. start: the model to go on
    from, '' for none.
    """
    arguments = ["train", data_set, "--output", str(run), "--time", f"{minutes:g}m"]
    arguments += ["--finetune", start] if start else []
    arguments += ["--device", device] if device != "auto" else []
    return [*command, *arguments, "--progress", "json"]


def convert_command(command: Sequence[str], data_set: str, labels: Path, target: Path) -> list[str]:
    """The arguments that make labels of a data set into a segmentation.

    The data set's table says what label maps without names mean. Segmentations, as what a model
    proposed, have names of their own, which may have the table's values.
    """
    arguments = ["convert", str(labels), str(target)]
    table = Path(data_set) / TABLE
    if table.is_file() and not labels.name.lower().endswith(".seg.nrrd"):
        arguments += ["--labels", str(table)]
    return [*command, *arguments]


def is_data_set(data_set: str) -> bool:
    """Whether a folder is a data set that `medseg add` made."""
    return bool(data_set) and (Path(data_set) / LIST).is_file()


def channels_of(data_set: str) -> list[str]:
    """What the channels of a data set are called, in its order; [] where it does not say."""
    try:
        with (Path(data_set) / LIST).open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    return [name[len("image_") :] for name in columns if name.startswith("image_")]


def in_order(items: Sequence[Any], have: Sequence[str], want: Sequence[str]) -> list[Any]:
    """One thing for each channel, in the order in which somebody wants the channels: where both
    name the same ones, by name; else as they are.
    """
    mine, theirs = ([name.lower() for name in names] for names in (have, want))
    if sorted(mine) != sorted(theirs) or len(items) != len(mine):
        return list(items)
    return [items[mine.index(name)] for name in theirs]


def runs_of(data_set: str) -> list[Path]:
    """The runs of a data set in their order."""
    folder = Path(data_set) / _RUNS
    if not folder.is_dir():
        return []
    runs = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(runs, key=lambda path: int(path.name))


def is_finished(run: Path) -> bool:
    """Whether a run has left its model, and scored it."""
    return (run / "model" / "README.md").is_file()


def next_run(data_set: str, *, go_on: bool) -> tuple[Path, str]:
    """The folder of the run to train, and the model to go on from ('' where there is none).

    go_on: go on with the last run where it was stopped, else begin a new one.
    """
    runs = runs_of(data_set)
    if go_on and runs and not is_finished(runs[-1]):
        older = [str(run) for run in runs[:-1] if is_finished(run)]
        return runs[-1], older[-1] if older else ""
    number = int(runs[-1].name) + 1 if runs else 1
    finished = [str(run) for run in runs if is_finished(run)]
    return Path(data_set) / _RUNS / str(number), finished[-1] if finished else ""


def can_go_on(data_set: str) -> bool:
    """Whether the last run was stopped."""
    runs = runs_of(data_set)
    return bool(runs) and not is_finished(runs[-1])


def findings_in(text: str) -> list[Finding]:
    """What `medseg check --json` printed, the worst first. Raises `CommandError`."""
    rows = _read(text, "check")["findings"]
    found = [Finding(str(row["case"]), str(row["severity"]), str(row["message"])) for row in rows]
    return sorted(found, key=lambda one: (one.severity != "error", one.case))


def rounds_in(text: str) -> list[Round]:
    """What `medseg rounds --json` printed. Raises `CommandError`."""
    return [
        Round(
            str(row["round"]),
            str(row["run"]),
            len(row["training"]),
            bool(row["finished"]),
            None if row["mean_dice"] is None else float(row["mean_dice"]),
        )
        for row in _read(text, "rounds")["rounds"]
    ]


def choice_in(text: str) -> Choice:
    """What `medseg next --json` printed. Raises `CommandError`."""
    content = _read(text, "next")
    files = tuple(str(one) for one in content["files"])
    return Choice(str(content["case"]), files, str(content["why"]))


def added_in(text: str) -> str:
    """What `medseg add --json` printed, in words. Raises `CommandError`."""
    case = _read(text, "add")["cases"][0]
    present = ", ".join(str(one) for one in case["structures"]) or "nothing but background"
    use = {"train": "to train with", "val": "to compare models with", "test": "set aside"}
    words = f"{case['case']} is in the data set: {present}"
    return f"{words}; {use[case['split']]}" if case["split"] in use else words


def score_words(rounds: Sequence[Round]) -> str:
    """The newest score beside the one before it."""
    scored = [one for one in rounds if one.mean_dice is not None]
    if not scored:
        return ""
    newest = scored[-1]
    text = f"round {newest.name}: mean Dice {newest.mean_dice:.3f}"
    if len(scored) > 1:
        text += f", before {scored[-2].mean_dice:.3f}"
    return text


def files_of(data_set: str, case: str) -> tuple[list[Path], Path | None]:
    """The scans of a case, in the order of the channels, and its labels: the final ones, or what
    was proposed. Raises `CommandError` where the list does not have it.
    """
    folder = Path(data_set)
    try:
        with (folder / LIST).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise CommandError(
            f"{folder.name} has no {LIST}; only cases of a data set that Add made can be shown"
        ) from None
    for row in rows:
        if row.get("case") == case:
            scans = [value for key, value in row.items() if key and key.split("_")[0] == "image"]
            labels = row.get("label") or row.get(f"label_{_ORIGINAL}")
            paths = [folder / one for one in scans if one]
            return paths, folder / labels if labels else None
    raise CommandError(f"{folder.name} has no case {case}; check the data set again")


def _read(text: str, name: str) -> Any:
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError
    except ValueError:
        raise CommandError(
            f"medseg {name} said nothing that this module understands; use a medseg of its version"
        ) from None
    return content
