"""How the program ends: at once, but not before what has to be done."""

import subprocess
import sys

BEGIN = "import atexit, sys, threading, time; import torch; from medseg.cli import process; "


def ended(what: str, *words: str, into: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    program = f"{BEGIN} sys.argv[1:] = {list(words)!r}; {what}; process()"
    return subprocess.run(
        [sys.executable, "-c", program], stdout=into, stderr=subprocess.PIPE, text=True, timeout=600
    )


def test_exit_handlers_run_and_what_was_printed_arrives() -> None:
    end = ended("atexit.register(print, 'handled')", "--version")
    assert end.returncode == 0
    assert end.stdout.splitlines()[-1] == "handled"
    assert len(end.stdout.splitlines()) > 1


def test_the_code_of_a_failure_is_that_of_the_process() -> None:
    end = ended("pass", "info", "no-such-scan.nii.gz")
    assert end.returncode == 3
    assert "no-such-scan.nii.gz" in end.stderr


def test_a_thread_that_is_still_at_work_is_waited_for() -> None:
    work = "threading.Thread(target=lambda: (time.sleep(1), print('worked'))).start()"
    end = ended(work, "--version")
    assert end.returncode == 0
    assert end.stdout.splitlines()[-1] == "worked"


def test_idle_threads_of_the_kernels_hold_nothing_up() -> None:
    work = (
        "from medseg.kernels.threads import in_parallel; in_parallel(abs, 8, 2); "
        "atexit.register(lambda: print([t.name for t in threading.enumerate()]))"
    )
    end = ended(work, "--version")
    assert end.returncode == 0
    assert end.stdout.splitlines()[-1] == "['MainThread']"


def test_a_signal_that_comes_at_the_end_changes_nothing() -> None:
    late = (
        "import os, signal; "
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), print('handled')))"
    )
    end = ended(late, "--version")
    assert end.returncode == 0
    assert end.stdout.splitlines()[-1] == "handled"
    assert end.stderr == ""
