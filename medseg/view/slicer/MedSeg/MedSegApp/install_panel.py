"""The part of the panel that installs medseg, and says what is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer

from MedSegApp.widgets import button, row_of, section, text_line
from MedSegLib.command import CommandError, State, find_command
from MedSegLib.installing import (
    constraints,
    pip_command,
    python_problem,
    question,
    removal_command,
    versions,
    versions_text,
)
from MedSegLib.store import Store
from MedSegLib.tasks import Tasks


class InstallPanel:
    """Install, remove, versions, the program, and the log."""

    def __init__(self, layout: Any, store: Store, tasks: Tasks, changed: Callable[[], Any]) -> None:
        """changed: what is called where another medseg is there."""
        self._store, self._tasks, self._changed = store, tasks, changed
        self._folder: Path | None = None
        settings = store.read()
        form = section("medseg", layout, closed=True)
        self.versions = text_line()
        form.addRow(self.versions)
        self.package = qt.QLineEdit(settings.package)
        self.package.toolTip = "medseg, medseg==VERSION, or the path of a file of medseg (.whl)"
        form.addRow("Install from:", self.package)
        self.install_button = button("Install or update", self.install)
        self.remove_button = button("Remove", self.remove)
        self.stop_button = button("Stop", lambda: tasks.cancel("pip"))
        buttons = [self.install_button, self.remove_button, self.stop_button]
        form.addRow(row_of(buttons))
        self.program = ctk.ctkPathLineEdit()
        self.program.filters = ctk.ctkPathLineEdit.Files
        self.program.currentPath = settings.program
        self.program.toolTip = (
            "A medseg installed elsewhere; empty: that of Slicer's Python, or the one on the path."
        )
        form.addRow("medseg program:", self.program)
        self.log = qt.QPlainTextEdit()
        self.log.readOnly = True
        self.log.maximumBlockCount = 5000
        form.addRow(self.log)
        self.program.connect("currentPathChanged(QString)", self.use_program)
        self.refresh()

    def refresh(self) -> None:
        """Say what is there, and what can be pressed."""
        problem = python_problem()
        self.versions.text = "\n".join(filter(None, [versions_text(), problem]))
        busy = self._tasks.at_work("pip")
        there = bool(versions(["medseg"]))
        self.install_button.enabled = not busy and not problem
        self.remove_button.enabled = not busy and there
        self.stop_button.enabled = busy

    def command(self) -> list[str]:
        """The command that starts medseg. Raises `CommandError`."""
        python = shutil.which("PythonSlicer")
        try:
            return find_command(
                self._store.read().program, python, has_medseg=bool(versions(["medseg"]))
            )
        except CommandError as error:
            raise CommandError(python_problem() or str(error)) from None

    def use_program(self, path: str) -> None:
        """Keep the chosen program."""
        self._store.write(self._store.read().changed(program=path or ""))
        self._changed()

    def install(self) -> None:
        """Ask, then let pip install medseg; all that is there stays as it is."""
        package = self.package.text.strip() or "medseg"
        has_torch = bool(versions(["torch"]))
        torch = None if has_torch else _pytorch_extension()
        if not slicer.util.confirmOkCancelDisplay(question(has_torch, torch is not None, package)):
            return
        self._store.write(self._store.read().changed(package=package))
        if torch is not None and torch.installTorch(askConfirmation=True) is None:
            self.say("PyTorch was not installed, so medseg was not either.")
            return
        self._folder = Path(tempfile.mkdtemp(prefix="medseg-"))
        kept = self._folder / "kept.txt"
        kept.write_bytes(constraints().encode())  # Python 3.9 of Slicer knows no `newline`
        try:
            arguments = pip_command(_python(), package, kept, upgrade=True)
        except ValueError as error:
            self._end(str(error))
            return
        self._pip(arguments, "medseg is installed.")

    def remove(self) -> None:
        """Ask, then let pip remove medseg."""
        if slicer.util.confirmOkCancelDisplay("Remove medseg from this Slicer's Python?"):
            self._pip(removal_command(_python()), "medseg is removed.")

    def say(self, text: str) -> None:
        """A line in the log."""
        self.log.appendPlainText(text)

    def _pip(self, arguments: list[str], at_end: str) -> None:
        self.say(" ".join(arguments))

        def seen(state: State) -> None:
            for line in state.lines:
                self.say(line)

        def then(output: str) -> None:
            self.say(output.strip())
            self._end(at_end)
            self._changed()

        try:
            environment = dict(slicer.util.startupEnvironment())
            self._tasks.start(
                "pip", arguments, then=then, failed=self._end, seen=seen, environment=environment
            )
        except CommandError as error:
            self._end(str(error))
        self.refresh()

    def _end(self, text: str) -> None:
        self.say(text)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        qt.QTimer.singleShot(0, self.refresh)


def _python() -> str:
    return shutil.which("PythonSlicer") or "PythonSlicer"


def _pytorch_extension() -> Any:
    """The extension that installs the PyTorch for this computer; None where it is not there."""
    try:
        import PyTorchUtils
    except ImportError:
        return None
    return PyTorchUtils.PyTorchUtilsLogic()
