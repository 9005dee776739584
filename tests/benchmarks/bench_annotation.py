"""The loop of annotation, scripted: choose a scan, correct it, train a few minutes, and again; the
least sure scan against any.

python tests/benchmarks/bench_annotation.py ../shared/data/hippocampus --lines loop.jsonl
    [--minutes 2 | --steps 150] [--rounds 5] [--seeds 3] [--threads 1] [--at-once 2]

All of it is done by the commands add, next, train, infer and check; labels are corrected by taking
them from the truth. Every seed begins with other labelled cases, the same for each strategy, and
with one model of them. Dice is the mean over structures and over cases that are in no data set, the
same for all. What stands in the file of lines is not done again, and an interrupted round goes on.

The measure of doubt was chosen on the first 68 cases in the order of `random.Random("choice")`;
none of them is used here. On a machine that does other things as well, minutes hold more or fewer
steps (`steps` in each line): compare strategies by --steps then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

CHOSEN_ON = 68
STRATEGIES = ("uncertain", "random")


@dataclass
class Bench:
    """What is measured, and where its lines go."""

    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def row(self, seed: int, strategy: str, number: int) -> dict[str, Any] | None:
        asked = {"seed": seed, "strategy": strategy, "round": number}
        return next((one for one in self.rows if asked.items() <= one.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            with self.options.lines.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def medseg(self, *words: object, allowed: Sequence[int] = (0,)) -> str:
        """What a command prints."""
        threads = str(self.options.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        command = [sys.executable, "-m", "medseg", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode not in allowed:
            raise SystemExit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a data set in Decathlon's layout")
    parser.add_argument("--lines", type=Path, required=True, help="JSON lines; the work beside it")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--steps", type=int, help="of training in a round, instead of minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--begin", type=int, default=4, help="labelled cases at the beginning")
    parser.add_argument("--candidates", type=int, default=40, help="cases to choose from")
    parser.add_argument("--held-out", type=int, default=30, help="cases that score")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2)
    bench = Bench(parser.parse_args())
    if bench.options.lines.exists():
        lines = bench.options.lines.read_text().splitlines()
        bench.rows = [json.loads(line) for line in lines]
    work = bench.options.lines.with_suffix("")
    names = sorted(path.name for path in (bench.options.data / "imagesTr").glob("[!.]*.nii.gz"))
    random.Random("choice").shuffle(names)
    names = names[CHOSEN_ON:]
    held_out, pool = names[: bench.options.held_out], names[bench.options.held_out :]
    (work / "held_out").mkdir(parents=True, exist_ok=True)
    for name in held_out:
        shutil.copy(bench.options.data / "imagesTr" / name, work / "held_out" / name)
    with ThreadPoolExecutor(bench.options.at_once) as threads:
        begun = {
            seed: threads.submit(begin, bench, work, pool, seed) for seed in range(seeds(bench))
        }
        chains = [
            threads.submit(chain, bench, work, begun[seed].result(), seed, strategy)
            for seed in begun
            for strategy in STRATEGIES
        ]
        for one in chains:
            one.result()
    print(table_of(bench))


def seeds(bench: Bench) -> int:
    return int(bench.options.seeds)


def begin(bench: Bench, work: Path, pool: Sequence[str], seed: int) -> list[str]:
    """A data set of a few cases and a model of them; returns the candidates."""
    order = random.Random(f"pool {seed}").sample(list(pool), len(pool))
    few, rest = order[: bench.options.begin], order[bench.options.begin :]
    candidates = rest[: bench.options.candidates]
    folder = work / f"begin-{seed}"
    if bench.row(seed, "", 0) is None:
        for name in few:
            if not (folder / "labels/final" / name).exists():
                add_truth(bench, folder, name)
        train(bench, folder, 0, seed)
        bench.add({"seed": seed, "strategy": "", "round": 0, **scored(bench, work, folder, 0)})
    return candidates


def chain(bench: Bench, work: Path, candidates: Sequence[str], seed: int, strategy: str) -> None:
    """All rounds of a seed by a strategy."""
    folder, scans = work / f"{strategy}-{seed}", work / f"{strategy}-{seed}-scans"
    if not folder.exists():
        shutil.copytree(work / f"begin-{seed}", folder)
        scans.mkdir(exist_ok=True)
        for name in candidates:
            shutil.copy(bench.options.data / "imagesTr" / name, scans / name)
    for number in range(1, bench.options.rounds + 1):
        if bench.row(seed, strategy, number) is not None:
            continue
        note = folder / "runs" / f"chosen-{number}.json"
        if not note.exists():
            words = ("--strategy", strategy, "--seed", seed, "--json", "-q")
            told = bench.medseg("next", folder, "--from", scans, *words)
            chosen = json.loads(told)
            add_truth(bench, folder, f"{chosen['case']}.nii.gz", is_there=True)
            note.write_text(told)
        chosen = json.loads(note.read_text())
        train(bench, folder, number, seed)
        about = {key: chosen[key] for key in ("case", "score", "unsure", "disagreement")}
        row = {"seed": seed, "strategy": strategy, "round": number, **about}
        bench.add(row | scored(bench, work, folder, number))


def add_truth(bench: Bench, folder: Path, name: str, *, is_there: bool = False) -> None:
    """Add a case with its label, or give one that is there its label."""
    case, truth = name.removesuffix(".nii.gz"), bench.options.data / "labelsTr" / name
    table = bench.options.lines.with_suffix("") / "names.csv"
    if not table.exists():
        from medseg.labels import Label, LabelTable

        named = json.loads((bench.options.data / "dataset.json").read_text())["labels"]
        labels = [
            Label(int(value), text, LabelTable.from_values([int(value)]).labels[0].color)
            for value, text in named.items()
            if int(value)
        ]
        LabelTable(tuple(labels)).write(table)
    scan = [] if is_there else [bench.options.data / "imagesTr" / name, "--modalities", "MRI"]
    bench.medseg("add", folder, *scan, "--id", case, "--labels", truth, "--table", table)


def train(bench: Bench, folder: Path, number: int, seed: int) -> None:
    """Train a round, from the model of the one before."""
    start = ["--finetune", folder / "runs" / str(number - 1)] if number else []
    run, steps = folder / "runs" / str(number), bench.options.steps
    long = ["--time", f"{60 * bench.options.minutes:.0f}s"]
    long = ["--set", f"train.steps={steps}"] if steps else long
    bench.medseg("train", folder, "-o", run, *long, "--seed", seed, *start, "-q")


def scored(bench: Bench, work: Path, folder: Path, number: int) -> dict[str, Any]:
    """The mean Dice of a round's model on the cases held out, and what check finds in its data."""
    import numpy as np

    from medseg.io import read_labels

    run, dice = folder / "runs" / str(number), []
    with tempfile.TemporaryDirectory() as place:
        bench.medseg("infer", work / "held_out", "-m", run, "-o", f"{place}/", "-q")
        for path in sorted(Path(place).glob("*.nii.gz")):
            name = path.name.removesuffix("_seg.nii.gz").removesuffix(".nii.gz") + ".nii.gz"
            labels = read_labels(path).data
            truth = read_labels(bench.options.data / "labelsTr" / name).data
            each = [
                2 * np.sum((labels == value) & (truth == value))
                / (np.sum(labels == value) + np.sum(truth == value))
                for value in np.unique(truth)
                if value
            ]  # fmt: skip
            dice.append(float(np.mean(each)))
    check = json.loads(bench.medseg("check", folder, "--json", "-q", allowed=(0, 3)))
    lines = [json.loads(one) for one in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "dice": round(float(np.mean(dice)), 4),
        "worst": round(min(dice), 4),
        "cases": len(dice),
        "findings": [one["message"] for one in check["findings"]],
        "steps": max(one["step"] for one in lines),
        "load": round(os.getloadavg()[0], 1),
    }


def table_of(bench: Bench) -> str:
    """Mean Dice by round and strategy, over the seeds, and each seed's."""
    lines = ["| round | labelled | uncertain | random | each seed, uncertain | each seed, random |"]
    lines += ["|---|---|---|---|---|---|"]
    for number in range(bench.options.rounds + 1):
        cells: list[str] = []
        seeds_cells: list[str] = []
        for strategy in STRATEGIES:
            rows = [
                bench.row(seed, strategy if number else "", number) for seed in range(seeds(bench))
            ]
            dice = [row["dice"] for row in rows if row is not None]
            cells.append(f"{statistics.fmean(dice):.3f}" if dice else "")
            seeds_cells.append(", ".join(f"{one:.3f}" for one in dice))
        labelled = bench.options.begin + number
        lines.append(f"| {number} | {labelled} | {' | '.join([*cells, *seeds_cells])} |")
    findings = sorted({text for row in bench.rows for text in row["findings"]})
    return "\n".join([*lines, f"findings of check: {findings or 'none'}"])


if __name__ == "__main__":
    main()
