"""How far it is, in words and lines."""

from __future__ import annotations

import pytest

from medseg.cli.show import Course, bar_of_cases, lines_of_cases, time_left


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_what_was_done_after_the_first():
    clock = Clock()
    course = Course(5, clock)
    clock.now += 1000  # the first scan waits for everything to be loaded
    course.at(1)
    assert course.words("scans") == "1 of 5 scans"
    clock.now += 30
    course.at(2)
    assert course.words("scans") == "2 of 5 scans, about 90 s left".replace("90 s", "2 min")
    clock.now += 10
    course.at(3)
    assert course.words("scans") == "3 of 5 scans, about 40 s left"
    course.at(5)
    assert course.words("scans") == "5 of 5 scans"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (1e5, "27.8 h")],
)
def test_times_in_words(seconds: float, words: str):
    assert time_left(seconds) == f"about {words} left"


def test_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    tell = lines_of_cases(clock)
    for done in range(101):
        tell(f"case {done}", done, 100)
        clock.now += 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0] == "10 of 100 cases, case 10, about 3 min left"
    assert lines[-1].startswith("90 of 100 cases")


def test_who_is_done_soon_tells_no_lines(capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    tell = lines_of_cases(clock, between_s=10)
    for done in range(11):
        tell("", done, 10)
        clock.now += 0.5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_short_work_is_silent_where_nobody_sees_a_bar(
    quiet: bool, capsys: pytest.CaptureFixture[str]
):
    with bar_of_cases(quiet) as progress:
        for done in range(4):
            progress("", done, 3)
    assert capsys.readouterr() == ("", "")
