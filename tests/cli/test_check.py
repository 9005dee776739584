"""What `medseg check` prints: equal findings of many cases are one line, and lines of threads stay
apart.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from making import datasets as made, networks as tiny
from making.datasets import put
from medseg.cli.show import grouped, show_warning
from medseg.dataset.cases import Finding
from medseg.errors import DataWarning
from medseg.io import read_labels
from medseg.volume import Volume


def finding(case: str, message: str, kind: str = "empty", severity: str = "warning") -> Finding:
    return Finding(case=case, kind=kind, severity=severity, message=message)


def test_equal_findings_are_one_line():
    same = [
        finding(f"c{n:02d}", f"/data/labelsTr/c{n:02d}.nii.gz: is stored as 4-D") for n in range(18)
    ]
    ((cases, one),) = grouped(same)
    assert cases == "c00 and 17 more"
    assert one.message == "/data/labelsTr/*.nii.gz: is stored as 4-D"


@pytest.mark.parametrize(
    "other",
    [
        finding("b", "has no liver"),
        finding("b", "has no spleen", kind="absent"),
        finding("b", "has no spleen", severity="error"),
    ],
)
def test_findings_that_differ_keep_their_lines(other: Finding):
    first = finding("a", "has no spleen")
    assert [cases for cases, _ in grouped([first, other])] == ["a", "b"]


def test_a_finding_alone_and_one_of_the_whole_set_are_as_they_were():
    alone, whole = finding("a", "a: is cut off"), finding("", "no scan has air")
    assert grouped([alone, whole]) == [("a", alone), ("all", whole)]


@pytest.mark.parametrize("command", ["check", "train"])
def test_eighteen_cases_without_labels_are_one_line_of_the_command(command: str, tmp_path: Path):
    folder = made.decathlon(tmp_path / "data", 22)
    for number in range(18):
        path = folder / "labelsTr" / f"case_{number}.nii.gz"
        labels = read_labels(path)
        put(Volume(np.zeros_like(labels.data), labels.affine), path)
    options = ["-o", tmp_path / "run", "--time", "1s"] if command == "train" else []
    ran = tiny.medseg(command, folder, *options)
    text = " ".join((ran.out + ran.err).split())
    assert text.count("nothing but background") == 1
    assert "case_0 and 17 more" in text


def test_warnings_of_threads_do_not_run_into_each_other(capfd: pytest.CaptureFixture[str]):
    """Every line is whole, whoever else writes at the same time."""
    gate = threading.Barrier(8)

    def warn(number: int) -> None:
        gate.wait()
        for _ in range(50):
            show_warning(f"scan {number} " + "x" * 40, DataWarning)

    threads = [threading.Thread(target=warn, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 400
    assert set(lines) == {f"warning: scan {number} " + "x" * 40 for number in range(8)}
