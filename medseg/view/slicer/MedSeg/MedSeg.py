"""3D Slicer module MedSeg: segment volumes with medseg on this computer, correct the result, and
train a better model from it.

The extension holds this folder. Slicer also finds it where it is in Edit > Application Settings >
Modules > Additional module paths. What needs no Slicer is in `MedSegLib`; what is done to the
scene, and the panels, in `MedSegApp`.
"""

from __future__ import annotations

import shutil
from typing import Any

import qt
import slicer
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)

from MedSegApp.install_panel import InstallPanel
from MedSegApp.loop_panel import LoopPanel
from MedSegApp.segment_panel import SegmentPanel
from MedSegApp.work import Work
from MedSegLib.command import CommandError, find_command
from MedSegLib.installing import versions
from MedSegLib.models import list_models
from MedSegLib.settings import Settings
from MedSegLib.store import Store
from MedSegLib.tasks import Tasks

_LOOK_EVERY_MS = 200
_OF_WORK = ("output", "box", "whole_sequence")


class MedSeg(ScriptedLoadableModule):
    """What Slicer's list of modules says."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        parent.title = "MedSeg"
        parent.categories = ["Segmentation"]
        parent.dependencies = []
        parent.contributors = ["the medseg developers"]
        parent.helpText = (
            "Segments volumes with medseg on this computer, with its own models, those you train,"
            " and those of nnU-Net and MONAI; nothing is sent anywhere."
        )
        parent.acknowledgementText = (
            "Research software, not a medical device: look at every result."
        )


class MedSegWidget(ScriptedLoadableModuleWidget):
    """The panel: its parts, and what is looked at from time to time."""

    def setup(self) -> None:
        """Build the panel."""
        super().setup()
        self.logic = MedSegLogic()
        self.store = Store(qt.QSettings())
        self.store.use(self.logic.getParameterNode())
        self.tasks = Tasks()
        self.segment_layout, self.loop_layout = qt.QVBoxLayout(), qt.QVBoxLayout()
        install_layout = qt.QVBoxLayout()
        for one in (self.segment_layout, self.loop_layout, install_layout):
            self.layout.addLayout(one)
        self.install = InstallPanel(install_layout, self.store, self.tasks, self.refresh)
        self.segment = SegmentPanel(self.segment_layout, self.store, self.tasks, self.install)
        self.loop = LoopPanel(
            self.loop_layout, self.store, self.tasks, self.segment, self.install.say
        )
        self.layout.addStretch(1)
        self.observed = [
            slicer.mrmlScene.AddObserver(slicer.vtkMRMLScene.EndCloseEvent, self.use_scene),
            slicer.mrmlScene.AddObserver(slicer.vtkMRMLScene.EndImportEvent, self.use_scene),
        ]
        self.timer = qt.QTimer()
        self.timer.setInterval(_LOOK_EVERY_MS)
        self.timer.connect("timeout()", self.look)
        self.timer.start()
        self.refresh()

    def cleanup(self) -> None:
        """Stop what still runs."""
        self.timer.stop()
        for one in self.observed:
            slicer.mrmlScene.RemoveObserver(one)
        self.tasks.abandon()
        self.segment.abandon()
        self.loop.abandon()

    def use_scene(self, caller: Any = None, event: Any = None) -> None:
        """Another scene: what it says was chosen is shown."""
        self.store.use(self.logic.getParameterNode())
        self.segment.show(self.store.read())
        self.segment.fill_models()
        self.loop.show_running()

    def refresh(self) -> None:
        """Another medseg may be there."""
        self.install.refresh()
        self.segment.refresh()

    def look(self) -> None:
        """See how far all is that runs."""
        self.tasks.look()
        self.segment.look()


class MedSegLogic(ScriptedLoadableModuleLogic):
    """For scripts: `start`, `look` until not `running`, `finish`."""

    def __init__(self) -> None:
        super().__init__()
        self._work = Work(slicer.mrmlScene, self._environment())

    def models(self, program: str = "") -> list[Any]:
        """The models that come with medseg. Raises `CommandError`."""
        return list_models(self._command(program), self._environment())

    def start(
        self,
        volume: Any,
        model: str = "",
        device: str = "auto",
        cleanup: bool = True,
        program: str = "",
        **more: Any,
    ) -> None:
        """Segment a scalar volume node, or a list of them for a model of several channels, with a
        model's name or folder. Raises `CommandError`.

        more: further settings by the names of `MedSegLib.settings.Settings`, and those of
        `MedSegApp.work.Work.start`.
        """
        of_work = {name: more.pop(name) for name in _OF_WORK if name in more}
        settings = Settings(model=model.strip(), device=device, cleanup=cleanup, **more)
        volumes = list(volume) if isinstance(volume, (list, tuple)) else [volume]
        self._work.start(self._command(program), volumes, settings, **of_work)

    @property
    def running(self) -> bool:
        """Whether medseg is at work."""
        return self._work.running

    @property
    def cancelled(self) -> bool:
        """Whether the run was told to stop."""
        return self._work.cancelled

    def look(self) -> Any:
        """Where the run is: a `State`."""
        return self._work.look()

    def cancel(self) -> None:
        """Stop the run, if any."""
        self._work.cancel()

    def abandon(self) -> None:
        """Stop the run, if any, and want nothing of it."""
        self._work.abandon()

    def finish(self) -> Any:
        """Load the result as a segmentation of the volume. Raises `CommandError` with medseg's
        sentence.
        """
        return self._work.finish()

    def _command(self, program: str) -> list[str]:
        python = shutil.which("PythonSlicer")
        return find_command(program, python, has_medseg=bool(versions(["medseg"])) or None)

    def _environment(self) -> dict[str, str]:
        """The environment Slicer was started with: its own would mislead another Python."""
        return dict(slicer.util.startupEnvironment())


class MedSegTest(ScriptedLoadableModuleTest):
    """What Slicer runs as the module's own test."""

    def runTest(self) -> None:  # noqa: N802, Slicer's name
        """Segment a ball by its brightness, if medseg is there."""
        import numpy as np

        slicer.mrmlScene.Clear(0)
        places = np.indices((40, 40, 40)) - 20
        data = np.where((places**2).sum(axis=0) < 100, 1000, 0)
        data = data + np.random.default_rng(0).integers(0, 50, data.shape)
        volume = slicer.util.addVolumeFromArray(data.astype(np.int16))
        logic = MedSegLogic()
        try:
            logic.start(volume, "otsu")
        except CommandError as error:
            self.delayDisplay(str(error))
            return
        while logic.running:
            logic.look()
            slicer.app.processEvents()
        node = logic.finish()
        self.assertEqual(node.GetSegmentation().GetNumberOfSegments(), 1)
        self.delayDisplay("passed")
