"""3D Slicer module MedSeg: run medseg on the active volume and show the result with names and
colours.

Slicer finds it once this file's folder is in Edit > Application Settings > Modules > Additional
module paths. medseg itself may be installed anywhere: the module runs its command line. What needs
no Slicer is in `MedSegLib`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
from MedSegLib.command import CommandError, Run, find_command, infer_command, list_models
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)

_COMMAND_SETTING = "MedSeg/command"
_OWN_MODEL = "model folder …"
_LOOK_EVERY_MS = 200


class MedSeg(ScriptedLoadableModule):
    """What Slicer's list of modules says."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        parent.title = "MedSeg"
        parent.categories = ["Segmentation"]
        parent.contributors = ["the medseg developers"]
        parent.helpText = (
            "Segments the active volume with medseg on this computer; nothing is sent anywhere."
        )
        parent.acknowledgementText = (
            "Research software, not a medical device: look at every result."
        )


class MedSegWidget(ScriptedLoadableModuleWidget):
    """The panel: volume, model, Apply and Cancel, progress."""

    def setup(self) -> None:
        """Build the panel."""
        super().setup()
        self.logic = MedSegLogic()
        form = qt.QFormLayout()
        self.layout.addLayout(form)

        self.volume = slicer.qMRMLNodeComboBox()
        self.volume.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self.volume.addEnabled = self.volume.removeEnabled = False
        self.volume.setMRMLScene(slicer.mrmlScene)
        form.addRow("Volume:", self.volume)

        self.model = qt.QComboBox()
        form.addRow("Model:", self.model)
        self.folder = ctk.ctkPathLineEdit()
        self.folder.filters = ctk.ctkPathLineEdit.Dirs
        self.folder.visible = False
        form.addRow("", self.folder)

        settings = ctk.ctkCollapsibleButton()
        settings.text, settings.collapsed = "Settings", True
        self.layout.addWidget(settings)
        inner = qt.QFormLayout(settings)
        self.device = qt.QComboBox()
        self.device.addItems(["auto", "cpu", "cuda"])
        inner.addRow("Device:", self.device)
        self.tidy = qt.QCheckBox("as the model says")
        self.tidy.checked = True
        inner.addRow("Clean up:", self.tidy)
        self.command = ctk.ctkPathLineEdit()
        self.command.filters = ctk.ctkPathLineEdit.Files
        self.command.currentPath = qt.QSettings().value(_COMMAND_SETTING, "") or ""
        self.command.toolTip = (
            "The medseg program; empty: the one on the path, or in Slicer's Python."
        )
        inner.addRow("medseg program:", self.command)

        self.apply_button = qt.QPushButton("Apply")
        self.cancel_button = qt.QPushButton("Cancel")
        buttons = qt.QHBoxLayout()
        buttons.addWidget(self.apply_button)
        buttons.addWidget(self.cancel_button)
        self.layout.addLayout(buttons)
        self.bar = qt.QProgressBar()
        self.layout.addWidget(self.bar)
        self.status = qt.QLabel()
        self.status.wordWrap = True
        self.layout.addWidget(self.status)
        self.layout.addStretch(1)

        self.timer = qt.QTimer()
        self.timer.setInterval(_LOOK_EVERY_MS)
        self.timer.connect("timeout()", self.look)
        self.apply_button.connect("clicked()", self.start)
        self.cancel_button.connect("clicked()", self.logic.cancel)
        self.command.connect("currentPathChanged(QString)", self.remember_command)
        self.model.connect("currentTextChanged(QString)", self.show_folder)
        self.fill_models()
        self.show_running(False)

    def cleanup(self) -> None:
        """Stop what still runs."""
        self.timer.stop()
        self.logic.abandon()

    def fill_models(self) -> None:
        """Ask medseg which models it has."""
        self.model.clear()
        try:
            for model in self.logic.models(self.command.currentPath):
                self.model.addItem(model.name)
                text = f"{model.about} ({model.structures} structures)"
                self.model.setItemData(self.model.count - 1, text, qt.Qt.ToolTipRole)
            self.status.text = ""
        except CommandError as error:
            self.status.text = str(error)
        self.model.addItem(_OWN_MODEL)

    def show_folder(self, text: str) -> None:
        """A model folder can be chosen where none of medseg's own models is."""
        self.folder.visible = text == _OWN_MODEL

    def remember_command(self, path: str) -> None:
        """Keep the chosen program for the next time."""
        qt.QSettings().setValue(_COMMAND_SETTING, path)
        self.fill_models()

    def start(self) -> None:
        """Begin with the chosen volume."""
        volume = self.volume.currentNode()
        if volume is None:
            slicer.util.errorDisplay("Load a scan and choose it as the volume.")
            return
        own = self.model.currentText == _OWN_MODEL
        model = self.folder.currentPath if own else self.model.currentText
        try:
            self.logic.start(
                volume, model, self.device.currentText, self.tidy.checked, self.command.currentPath
            )
        except CommandError as error:
            slicer.util.errorDisplay(str(error))
            return
        self.show_running(True)
        self.timer.start()

    def look(self) -> None:
        """See how far it is; at the end load the result."""
        state = self.logic.look()
        self.bar.maximum = 0 if state.share is None else 100
        self.bar.value = round(100 * (state.share or 0))
        self.status.text = state.lines[-1] if state.lines else self.status.text or state.what
        self.bar.format = f"{state.what} %p%"
        if self.logic.running:
            return
        self.timer.stop()
        self.show_running(False)
        try:
            segmentation = self.logic.finish()
            count = segmentation.GetSegmentation().GetNumberOfSegments()
            self.status.text = f"{segmentation.GetName()}: {count} structures"
        except CommandError as error:
            self.status.text = str(error)
            if not self.logic.cancelled:
                slicer.util.errorDisplay(str(error))

    def show_running(self, running: bool) -> None:
        """What can be pressed now."""
        self.apply_button.enabled, self.cancel_button.enabled = not running, running
        self.bar.visible = running


class MedSegLogic(ScriptedLoadableModuleLogic):
    """Export, run, load. Also for scripts: `start`, `look` until not `running`, `finish`."""

    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._folder: Path | None = None
        self._volume: Any = None

    def models(self, program: str = "") -> list[Any]:
        """The models that come with medseg. Raises `CommandError`."""
        return list_models(self._command(program), self._environment())

    def start(
        self, volume: Any, model: str, device: str = "auto", cleanup: bool = True, program: str = ""
    ) -> None:
        """Segment a scalar volume node with a model's name or folder. Raises `CommandError`."""
        if self.running:
            raise CommandError("a run is at work already; wait for it or cancel it")
        if not model.strip():
            raise CommandError("choose a model")
        command = self._command(program)
        self._folder = Path(tempfile.mkdtemp(prefix="medseg-"))
        self._volume = volume
        scan = self._folder / "scan.nrrd"  # names nobody
        try:
            if (
                not slicer.util.exportNode(volume, str(scan), {"useCompression": 0})
                or not scan.is_file()
            ):
                raise CommandError(
                    "the volume could not be handed over; save it and run medseg on the file"
                )
            arguments = infer_command(
                command,
                scan,
                output=self._folder / "labels.seg.nrrd",
                model=model,
                device=device,
                cleanup=cleanup,
            )
            self._run = Run(arguments, self._environment())
        except CommandError:
            self._tidy()
            raise

    @property
    def running(self) -> bool:
        """Whether medseg is at work."""
        return self._run is not None and self._run.running

    @property
    def cancelled(self) -> bool:
        """Whether the run was told to stop."""
        return self._run is not None and self._run.cancelled

    def look(self) -> Any:
        """Where the run is: a `State`."""
        assert self._run is not None
        return self._run.look()

    def cancel(self) -> None:
        """Stop the run, if any."""
        if self._run is not None:
            self._run.cancel()

    def abandon(self) -> None:
        """Stop the run, if any, and want nothing of it."""
        self.cancel()
        self._tidy()

    def finish(self) -> Any:
        """Load the result as a segmentation of the volume. Raises `CommandError` with medseg's
        sentence.
        """
        assert self._run is not None
        assert self._folder is not None
        try:
            self._run.finish()
            node = slicer.util.loadSegmentation(str(self._folder / "labels.seg.nrrd"))
            node.SetName(slicer.mrmlScene.GenerateUniqueName(f"{self._volume.GetName()} labels"))
            node.SetReferenceImageGeometryParameterFromVolumeNode(self._volume)
            node.SetAndObserveTransformNodeID(self._volume.GetTransformNodeID())
            storage = node.GetStorageNode()  # names the temporary file, which goes
            if storage is not None:
                node.SetAndObserveStorageNodeID(None)
                slicer.mrmlScene.RemoveNode(storage)
            tree = slicer.mrmlScene.GetSubjectHierarchyNode()
            if tree is not None:  # beside its volume, under the same study
                parent = tree.GetItemParent(tree.GetItemByDataNode(self._volume))
                tree.SetItemParent(tree.GetItemByDataNode(node), parent)
            return node
        finally:
            self._tidy()

    def _tidy(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _command(self, program: str) -> list[str]:
        return find_command(program, shutil.which("PythonSlicer"))

    def _environment(self) -> dict[str, str]:
        """The environment Slicer was started with: its own would mislead another Python."""
        return dict(slicer.util.startupEnvironment())
