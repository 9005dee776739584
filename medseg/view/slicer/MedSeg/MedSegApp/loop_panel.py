"""The part of the panel for the loop: next case, correct, add to the data set, check, train."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer

from MedSegApp import scene as scenes
from MedSegApp.segment_panel import SegmentPanel
from MedSegApp.widgets import button, row_of, section, text_line
from MedSegLib import loop
from MedSegLib.command import CommandError, State, time_left
from MedSegLib.store import Store
from MedSegLib.tasks import Tasks

#: What a volume node says of the case that it is.
_CASE = "MedSeg.case"
_NAMES = ("add", "check", "train", "next", "rounds")
_TO_SHOW = "show"
#: Seconds in which training ends its step and keeps what it has learnt, once it is told to stop.
_TRAINING_PATIENCE_S = 300.0


class LoopPanel:
    """Next case, add, check, train; findings in a table, and scores of the models."""

    def __init__(
        self,
        layout: Any,
        store: Store,
        tasks: Tasks,
        segment: SegmentPanel,
        say: Callable[..., Any],
    ) -> None:
        """say: writes a line into the log."""
        self._store, self._tasks, self._segment, self._say = store, tasks, segment, say
        self._folders: list[Path] = []
        self._findings: list[loop.Finding] = []
        self._run: Path | None = None
        form = section("Correct and train", layout, closed=True)
        settings = store.read()
        self.data_set = ctk.ctkPathLineEdit()
        self.data_set.filters = ctk.ctkPathLineEdit.Dirs
        self.data_set.currentPath = settings.data_set
        self.data_set.toolTip = "The folder that holds what is annotated; a new one is made."
        form.addRow("Data set:", self.data_set)
        self.scans = ctk.ctkPathLineEdit()
        self.scans.filters = ctk.ctkPathLineEdit.Dirs
        self.scans.toolTip = "Where the next case is taken from. Empty: what the data set holds."
        form.addRow("Scans:", self.scans)
        self.next_button = button("Next case", self.next_case)
        self.add_button = button("Add to data set", self.add)
        self.case = qt.QLineEdit()
        self.case.toolTip = (
            "What a new case is called in the data set; name no patient. Empty: as the volume."
        )
        form.addRow("Case:", self.case)
        self.check_button = button("Check", self.check)
        form.addRow(row_of([self.next_button, self.add_button, self.check_button]))
        self.table = qt.QTableWidget(0, 3)
        self.table.setHorizontalHeaderLabels(["case", "", "finding"])
        self.table.visible = False
        form.addRow(self.table)
        self.minutes = ctk.ctkDoubleSpinBox()
        self.minutes.minimum, self.minutes.maximum, self.minutes.suffix = 1, 10000, " min"
        self.minutes.value = settings.minutes
        form.addRow("Time to train:", self.minutes)
        self.train_button = button("Train", lambda: self.train(go_on=False))
        self.go_on_button = button("Go on", lambda: self.train(go_on=True))
        self.stop_button = button("Stop", self.stop)
        form.addRow(row_of([self.train_button, self.go_on_button, self.stop_button]))
        self.bar = qt.QProgressBar()
        form.addRow(self.bar)
        self.curves = qt.QLabel()
        form.addRow(self.curves)
        self.status = text_line()
        form.addRow(self.status)
        self.data_set.connect("currentPathChanged(QString)", self.use_data_set)
        self.minutes.connect("valueChanged(double)", lambda value: self.keep())
        self.table.connect("cellClicked(int,int)", lambda row, column: self.show_case(row))
        self.show_running()

    def keep(self) -> None:
        """Keep what is chosen."""
        settings = self._store.read()
        path = self.data_set.currentPath or ""
        self._store.write(settings.changed(data_set=path, minutes=float(self.minutes.value)))

    def use_data_set(self, path: str) -> None:
        """Another data set."""
        self.keep()
        self._fill([])
        self.show_running()

    def show_running(self) -> None:
        """What can be pressed now."""
        busy = any(map(self._tasks.at_work, _NAMES))
        path = self.data_set.currentPath or ""
        there = loop.is_data_set(path)
        self.add_button.enabled = bool(path) and not busy
        self.next_button.enabled = self.check_button.enabled = there and not busy
        self.train_button.enabled = there and not busy
        self.go_on_button.enabled = there and not busy and loop.can_go_on(path)
        self.stop_button.enabled = busy
        self.bar.visible = busy

    def stop(self) -> None:
        """Stop what runs; training keeps what it has learnt."""
        for name in _NAMES:
            self._tasks.cancel(name)

    def abandon(self) -> None:
        """Want nothing of what runs."""
        for folder in self._folders:
            _remove(folder)

    def add(self) -> None:
        """Put the volume and its corrected segmentation into the data set."""
        volumes = [box.currentNode() for box in self._segment.channels]
        node = self._segment.output.currentNode()
        if node is None or any(volume is None for volume in volumes):
            slicer.util.errorDisplay("Choose the volume and its corrected segmentation above.")
            return
        known = self._known_case(volumes[0])
        case = self.case.text.strip() or known or loop.case_name(volumes[0].GetName())
        if not case:
            slicer.util.errorDisplay("Give the case a name; letters and digits, and no patient's.")
            return
        folder = _new_folder()
        scans = []
        try:
            scenes.save_segmentation(slicer.mrmlScene, node, folder / "labels.seg.nrrd")
            if case != known:
                scans = [folder / f"scan_{number}.nrrd" for number in range(len(volumes))]
                for volume, path in zip(volumes, scans):
                    scenes.export_volume(slicer.mrmlScene, volume, path)
        except CommandError as error:
            _remove(folder)
            self._fail(str(error))
            return
        model = self._store.read().model

        def then(text: str) -> None:
            self.status.text = loop.added_in(text)
            self._remember_case(volumes[0], case)

        self._begin(
            "add",
            lambda command: loop.add_command(
                command, self.data_set.currentPath, case, folder / "labels.seg.nrrd", scans=scans,
                channels=self._segment.channel_names, model=model if Path(model).exists() else "",
            ),
            then,
            folder=folder,
        )  # fmt: skip

    def next_case(self) -> None:
        """Load the case about which the model is least sure, with what it proposes."""
        settings = self._store.read()
        folder = _new_folder()

        def then(text: str) -> None:
            choice = loop.choice_in(text)
            volumes = self._show_files(choice.files, folder / "proposal.seg.nrrd", choice.case)
            self.status.text = f"{choice.case}: {choice.why}. Correct it, then press Add."
            if not volumes:
                self.status.text = f"{choice.case}: its files are gone; check the data set"

        self._begin(
            "next",
            lambda command: loop.next_command(
                command, self.data_set.currentPath, folder / "proposal.seg.nrrd",
                model=settings.model, folder=self.scans.currentPath or "", device=settings.device,
            ),
            then,
            folder=folder,
        )  # fmt: skip

    def check(self) -> None:
        """Show what is to be looked at in the data set."""

        def then(text: str) -> None:
            self._fill(loop.findings_in(text))
            self.status.text = (
                f"{len(self._findings)} findings; click one to see its case"
                if self._findings
                else "nothing was found: the data set can be trained with"
            )

        path = self.data_set.currentPath
        self._begin("check", lambda command: loop.check_command(command, path), then)

    def _fill(self, findings: list[loop.Finding]) -> None:
        self._findings = findings
        self.table.rowCount = len(findings)
        for row, one in enumerate(findings):
            for column, text in enumerate((one.case, one.severity, one.message)):
                self.table.setItem(row, column, qt.QTableWidgetItem(text))
        self.table.visible = bool(findings)

    def show_case(self, row: int) -> None:
        """Load the case of a finding."""
        case = self._findings[row].case
        if not case:
            self.status.text = "this is about the data set as a whole"
            return
        try:
            scans, labels = loop.files_of(self.data_set.currentPath, case)
            command = self._segment.command()
        except CommandError as error:
            self._fail(str(error))
            return
        if labels is None:
            self._show_files([str(one) for one in scans], None, case)
            return
        if self._tasks.at_work(_TO_SHOW):
            return
        folder = _new_folder()
        target = folder / "labels.seg.nrrd"

        def then(text: str) -> None:
            self._show_files([str(one) for one in scans], target, case)

        arguments = loop.convert_command(command, self.data_set.currentPath, labels, target)
        self._begin(_TO_SHOW, lambda _: arguments, then, folder=folder)

    def _show_files(self, files: Any, labels: Path | None, case: str) -> list[Any]:
        """Load scans and labels, and choose them above; the volumes. files: in the order of the
        data set, which need not be the model's.
        """
        scene = slicer.mrmlScene
        own = loop.channels_of(self.data_set.currentPath)
        files = loop.in_order(files, own, self._segment.channel_names)
        volumes = [scenes.load_volume(scene, Path(one)) for one in files if Path(one).exists()]
        for box, volume in zip(self._segment.channels, volumes):
            box.setCurrentNode(volume)
        if not volumes:
            return []
        self._remember_case(volumes[0], case)
        slicer.util.setSliceViewerLayers(background=volumes[0], fit=True)
        if labels is not None and labels.is_file():
            node = scenes.load_segmentation(scene, labels, volumes[0], f"{case} labels")
            self._segment.output.setCurrentNode(node)
        return volumes

    def _known_case(self, volume: Any) -> str:
        """The case that a volume is in this data set; '' where it is not in it."""
        place, _, case = (volume.GetAttribute(_CASE) or "").rpartition("|")
        return case if place == self.data_set.currentPath else ""

    def _remember_case(self, volume: Any, case: str) -> None:
        volume.SetAttribute(_CASE, f"{self.data_set.currentPath}|{case}")
        self.case.text = ""

    def train(self, *, go_on: bool) -> None:
        """Train for the time that is given, from the last model; or go on with what was stopped."""
        settings = self._store.read()
        path = self.data_set.currentPath
        run, start = loop.next_run(path, go_on=go_on)
        own = settings.model if Path(settings.model).exists() else ""
        self._run = run

        def then(text: str) -> None:
            self._segment.use_model(str(run))
            self.status.text = f"round {run.name} is trained; its score is being measured"
            qt.QTimer.singleShot(0, self.score)

        self._begin(
            "train",
            lambda command: loop.train_command(
                command, path, run, start=start or own, minutes=float(self.minutes.value),
                device=settings.device,
            ),
            then,
            stopped="stopped; what was learnt is kept, and Go on goes on with it",
        )  # fmt: skip

    def score(self) -> None:
        """Score the models of the data set on the same cases."""
        path, device = self.data_set.currentPath, self._store.read().device

        def then(text: str) -> None:
            rounds = loop.rounds_in(text)
            words = loop.score_words(rounds)
            self.status.text = words or "no case is held out yet, so models cannot be compared"
            for one in rounds:
                score = "no score" if one.mean_dice is None else f"mean Dice {one.mean_dice:.3f}"
                self._say(f"round {one.name}, {one.cases} cases: {score}")

        self._begin("rounds", lambda command: loop.rounds_command(command, path, device), then)

    def _begin(
        self,
        name: str,
        arguments: Callable[[list[str]], list[str]],
        then: Callable[[str], None],
        *,
        folder: Path | None = None,
        stopped: str = "",
    ) -> None:
        """Run a command; where it ends well do what follows, and say what happened else. folder:
        what is removed in the end.
        """

        def ended(text: str) -> None:
            try:
                then(text)
            except (CommandError, KeyError, TypeError, IndexError) as error:
                damaged = "medseg's answer is damaged; use a medseg of this module's version"
                fail(str(error) if isinstance(error, CommandError) else damaged)
                return
            _remove(folder)
            qt.QTimer.singleShot(0, self.show_running)

        def fail(text: str) -> None:
            _remove(folder)
            self._fail(stopped if stopped and text.startswith("stopped") else text)

        try:
            environment = dict(slicer.util.startupEnvironment())
            self._tasks.start(
                name, arguments(self._segment.command()), then=ended, failed=fail,
                seen=self._seen, environment=environment, answers_anyway=name == "check",
                patience_s=_TRAINING_PATIENCE_S if name == "train" else None,
            )  # fmt: skip
        except CommandError as error:
            fail(str(error))
            return
        self._folders += [folder] if folder is not None else []
        self.status.text = ""
        self.show_running()

    def _seen(self, state: State) -> None:
        self.bar.maximum = 0 if state.share is None else 100
        self.bar.value = round(100 * (state.share or 0))
        self.bar.format = f"{state.what} %p% {time_left(state.left_s)}".strip()
        for line in state.lines:
            self._say(line)
            self.status.text = line
        picture = None if self._run is None else self._run / "progress.png"
        if self._tasks.at_work("train") and picture is not None and picture.is_file():
            self.curves.setPixmap(qt.QPixmap(str(picture)))

    def _fail(self, text: str) -> None:
        self.status.text = text
        self._say(text)
        qt.QTimer.singleShot(0, self.show_running)


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="medseg-"))


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
