"""What medseg tells to Python's `logging`, and to whom."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import medseg
from making import networks as tiny
from medseg import logs
from medseg.errors import BadOutput


def test_nothing_is_printed_where_nobody_listens():
    program = "import logging\nfrom medseg import logs\nlogs.warning('medseg.x', 'said')"
    ran = tiny.run_child("-c", program)
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_logging_is_not_imported_for_who_does_not_listen():
    program = (
        "import sys\nfrom medseg import logs\nlogs.info('medseg.x', 'said')\n"
        "print('logging' in sys.modules)"
    )
    assert tiny.run_child("-c", program).out.split() == ["False"]


def test_a_program_hears_what_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    scan = tiny.save_scan(tmp_path / "named.nii.gz")
    with caplog.at_level(logging.DEBUG, logger="medseg"):
        volume = medseg.read(scan)
        medseg.write(volume, tmp_path / "named.mha")
    assert [one.name for one in caplog.records] == ["medseg.io.formats"] * 2
    assert caplog.messages[0] == f"read {volume!r}"
    assert caplog.messages[1].endswith("as .mha")
    assert not any("named" in message for message in caplog.messages)


def test_a_run_tells_what_it_will_do_and_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    with caplog.at_level(logging.INFO, logger="medseg"):
        assert tiny.medseg("infer", scan, "-m", "otsu").code == 0
    messages = [one.getMessage() for one in caplog.records if one.name == "medseg.inference.run"]
    assert "model otsu, by intensity" in messages[0]
    assert re.match(r"done: read .* s, .*write .* s; .* GB$", messages[-1])


def test_listening_writes_lines_to_a_file_and_ends(tmp_path: Path):
    file = tmp_path / "log.txt"
    file.write_text("before\n", encoding="utf-8")
    logger = logging.getLogger("medseg")
    state = (logger.level, list(logger.handlers))
    with logs.listening(file=file):
        logs.debug("medseg.one", "a name with\na line and \x1b[31m")
        logger.exception("went wrong", exc_info=ValueError("JOHN DOE"))
    logs.warning("medseg.one", "after")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d{4} DEBUG \d+ medseg.one: "
        r"a name with\\na line and \\x1b\[31m",
        lines[1],
    )
    assert lines[2].endswith("medseg: went wrong")
    assert len(lines) == 3
    assert logger.level == state[0]
    assert [one for one in logger.handlers if one not in state[1]] in (
        [],
        [one for one in logger.handlers if isinstance(one, logging.NullHandler)],
    )


@pytest.mark.parametrize(("verbose", "count"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_more_is_told_to_who_asks_for_more(
    verbose: int, count: int, capsys: pytest.CaptureFixture[str]
):
    with logs.listening(verbose=verbose):
        logs.info("medseg.one", "step %d", 1)
        logs.debug("medseg.one", "detail")
    assert len(capsys.readouterr().err.splitlines()) == count


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path):
    with (
        pytest.raises(BadOutput, match=r"there/log\.txt: cannot be written: .*; choose"),
        logs.listening(verbose=1, file=tmp_path / "there" / "log.txt"),
    ):
        pass


def test_lines_are_added_to_a_log_and_to_nothing_else(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    content = scan.read_bytes()
    ran = tiny.medseg("infer", scan, "-m", "otsu", "-q", "--log", scan)
    assert (ran.code, scan.read_bytes()) == (4, content)
    assert "is there and is no log of medseg" in ran.err
    (tmp_path / "job.log").write_text("begun by me\n", encoding="utf-8")
    for name in ("job.log", "steps", "steps.medseg", "steps.medseg"):
        with logs.listening(file=tmp_path / name):
            logs.info("medseg.x", "said")
    assert (tmp_path / "job.log").read_text(encoding="utf-8").startswith("begun by me\n")
    assert len((tmp_path / "steps.medseg").read_text(encoding="utf-8").splitlines()) == 2
