"""The part of the panel that segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ctk
import qt
import slicer

from MedSegApp import scene as scenes
from MedSegApp.install_panel import InstallPanel
from MedSegApp.widgets import CheckList, button, node_box, row_of, section, text_line
from MedSegApp.work import Work
from MedSegLib.command import CommandError, State, time_left
from MedSegLib.models import Facts, Model, choices, facts_command, facts_in, models_in, remembered
from MedSegLib.segmenting import Box, box_of_bounds, cube_around, device_words, devices_in
from MedSegLib.settings import Settings
from MedSegLib.store import Store
from MedSegLib.tasks import Tasks

_VOLUME, _SEGMENTATION = "vtkMRMLScalarVolumeNode", "vtkMRMLSegmentationNode"


class SegmentPanel:
    """Volumes, model, structures, device and output; segment all, or a structure here; how far it
    is.
    """

    def __init__(self, layout: Any, store: Store, tasks: Tasks, install: InstallPanel) -> None:
        self._store, self._tasks, self._install = store, tasks, install
        self._own: list[Model] = []
        self._facts: Facts | None = None
        self._filling = False
        self.work = Work(slicer.mrmlScene, dict(slicer.util.startupEnvironment()))
        self.ended: Callable[[Any], None] = lambda node: None
        self.channels: list[Any] = []
        self._build(layout)
        self.show(store.read())
        self.show_running(False)

    def _build(self, layout: Any) -> None:
        form = section("Segment", layout)
        self.volumes_form = qt.QFormLayout()
        form.addRow(self.volumes_form)
        self.set_channels(("",))
        self.model = qt.QComboBox()
        self.choose_button = button("Folder …", self.choose_folder)
        self.choose_button.toolTip = (
            "A model: of a training run, nnU-Net, Auto3DSeg, a bundle of MONAI; a folder or a zip."
        )
        form.addRow("Model:", row_of([self.model, self.choose_button]))
        self.about = text_line()
        form.addRow(self.about)
        self.structures = CheckList(self.keep)
        form.addRow("Structures:", self.structures.widget)
        self.output = node_box(_SEGMENTATION, add=True, tip="None: a new segmentation.")
        form.addRow("Segmentation:", self.output)
        self._build_more(layout)
        self.apply_button = button("Segment", self.start)
        self.here_button = button(
            "Segment this structure here",
            self.start_here,
            tip="The structure whose line is marked, around the slices or in the ROI; what lies"
            " elsewhere stays as it is.",
        )
        self.cancel_button = button("Cancel", self.work.cancel)
        layout.addLayout(row_of([self.apply_button, self.here_button, self.cancel_button]))
        self.bar = qt.QProgressBar()
        layout.addWidget(self.bar)
        self.status = text_line()
        layout.addWidget(self.status)
        self.model.connect("currentIndexChanged(int)", lambda index: self.choose_model())

    def _build_more(self, layout: Any) -> None:
        form = section("Settings", layout, closed=True)
        self.device = qt.QComboBox()
        self.device.addItems(["auto", "cpu", "cuda"])
        form.addRow("Device:", self.device)
        self.cleanup = qt.QCheckBox("as the model says")
        form.addRow("Clean up:", self.cleanup)
        self.mirrored = qt.QCheckBox("also predict mirrored; slower")
        form.addRow("Accuracy:", self.mirrored)
        self.show_3d = qt.QCheckBox("make surfaces of the result")
        form.addRow("Show 3D:", self.show_3d)
        self.sequence = qt.QCheckBox("every item of the sequence that the volume shows")
        form.addRow("Sequence:", self.sequence)
        self.roi = node_box("vtkMRMLMarkupsROINode", tip="For 'here'. None: around the slices.")
        form.addRow("ROI:", self.roi)
        self.box_mm = ctk.ctkDoubleSpinBox()
        self.box_mm.minimum, self.box_mm.maximum, self.box_mm.suffix = 5, 500, " mm"
        form.addRow("Around the slices:", self.box_mm)
        for box in (self.cleanup, self.mirrored, self.show_3d):
            box.connect("toggled(bool)", lambda on: self.keep())
        self.device.connect("currentIndexChanged(int)", lambda index: self.keep())
        self.box_mm.connect("valueChanged(double)", lambda value: self.keep())

    def set_channels(self, names: tuple[str, ...]) -> None:
        """A list of volumes for every scan that the model takes; what was chosen stays."""
        while len(self.channels) > max(1, len(names)):
            self.volumes_form.removeRow(len(self.channels) - 1)
            self.channels.pop()
        while len(self.channels) < len(names):
            box = node_box(_VOLUME, none=bool(self.channels))
            self.channels.append(box)
            self.volumes_form.addRow("Volume:", box)
        for number, (box, name) in enumerate(zip(self.channels, names)):
            title = name or (f"Volume {number + 1}" if len(names) > 1 else "Volume")
            self.volumes_form.labelForField(box).text = f"{title}:"

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What the scans are that the model takes, by name; () where it is not known."""
        return self._facts.channels if self._facts is not None else ()

    def command(self) -> list[str]:
        """The command that starts medseg. Raises `CommandError`."""
        return self._install.command()

    def show(self, settings: Settings) -> None:
        """Show what was chosen."""
        self._filling = True
        if self.device.findText(settings.device) < 0:
            self.device.addItem(settings.device)
        self.device.currentText = settings.device
        self.cleanup.checked = settings.cleanup
        self.mirrored.checked = settings.mirrored
        self.show_3d.checked = settings.show_3d
        self.box_mm.value = settings.box_mm
        self._filling = False

    def keep(self) -> None:
        """Keep what is chosen."""
        if not self._filling:
            self._store.write(self.chosen())

    def chosen(self) -> Settings:
        """What is chosen now."""
        return self._store.read().changed(
            model=self._chosen_model(),
            structures=self.structures.chosen(),
            device=self.device.currentText,
            cleanup=bool(self.cleanup.checked),
            mirrored=bool(self.mirrored.checked),
            show_3d=bool(self.show_3d.checked),
            box_mm=float(self.box_mm.value),
        )

    def refresh(self) -> None:
        """Ask medseg which models it has, and which devices it takes."""
        try:
            command = self._install.command()
            self._ask("models", [*command, "models", "--json"], self._take_models)
            self._ask("devices", [*command, "infer", "--help"], self._take_devices)
        except CommandError as error:
            self._own = []
            self.fill_models()
            self.status.text = str(error)

    def _ask(self, name: str, arguments: list[str], then: Callable[[str], None]) -> None:
        environment = dict(slicer.util.startupEnvironment()) | {"COLUMNS": "200", "NO_COLOR": "1"}
        self._tasks.start(name, arguments, then=then, failed=self._fail, environment=environment)

    def _fail(self, text: str) -> None:
        self.status.text = text
        self._install.say(text)

    def _take_models(self, text: str) -> None:
        try:
            self._own = models_in(text)
            self.status.text = ""
        except CommandError as error:
            self._fail(str(error))
        self.fill_models()

    def _take_devices(self, text: str) -> None:
        chosen = self._store.read().device
        self._filling = True
        self.device.clear()
        self.device.addItems(devices_in(text))
        self._filling = False
        self.show(self._store.read().changed(device=chosen))

    def fill_models(self) -> None:
        """The list of models, that used last marked."""
        settings = self._store.read()
        self._filling = True
        self.model.clear()
        for number, model in enumerate(choices(self._own, settings.recent)):
            self.model.addItem(model.title, model.name)
            self.model.setItemData(number, model.about, qt.Qt.ToolTipRole)
        self.model.currentIndex = max(0, self.model.findData(settings.model))
        self._filling = False
        self.choose_model()

    def choose_folder(self) -> None:
        """A model that lies somewhere."""
        path = qt.QFileDialog.getExistingDirectory(None, "A folder of a model")
        if path:
            self.use_model(path)

    def use_model(self, path: str) -> None:
        """Put a model in front of those used last, and choose it."""
        settings = self._store.read()
        recent = tuple(remembered(settings.recent, path))
        self._store.write(settings.changed(model=path, structures=(), recent=recent))
        self.fill_models()

    def _chosen_model(self) -> str:
        data = self.model.itemData(self.model.currentIndex)
        return str(data) if data else ""

    def choose_model(self) -> None:
        """Show what the chosen model is, takes and finds."""
        if self._filling:
            return
        model = self._chosen_model()
        settings = self._store.read()
        if model != settings.model:
            self._store.write(settings.changed(model=model, structures=()))
        self._facts = None
        self.structures.fill((), ())
        self.about.text = ""
        self._tasks.drop("facts")
        if not model:
            self.about.text = "medseg looks at the scan: a brain in MR, or tissues in CT."
            self.set_channels(("",))
            return
        try:
            arguments = facts_command(self._install.command(), model)
            self._ask("facts", arguments, self._take_facts)
        except CommandError as error:
            self._fail(str(error))

    def _take_facts(self, text: str) -> None:
        try:
            self._facts = facts_in(text)
        except CommandError as error:
            self._fail(str(error))
            return
        self.about.text = self._facts.text
        self.set_channels(self._facts.channels)
        self.structures.fill(self._facts.structures, self._store.read().structures)

    def start(self) -> None:
        """Segment what is chosen."""
        if self.structures.empty:
            slicer.util.errorDisplay("Tick the structures to segment, or press All.")
            return
        self._start(self.chosen(), None)

    def start_here(self) -> None:
        """Segment the marked structure around the slices, or in the ROI."""
        ticked = self.structures.chosen()
        name = self.structures.current() or (ticked[0] if len(ticked) == 1 else "")
        if not name:
            slicer.util.errorDisplay("Mark the line of one structure in the list of structures.")
            return
        box = self._box()
        if box is None:
            slicer.util.errorDisplay("Show the slices, or choose an ROI, to say where.")
            return
        self._start(self.chosen().changed(structures=(name,)), box)

    def _box(self) -> Box | None:
        node = self.roi.currentNode()
        if node is not None:
            bounds = [0.0] * 6
            node.GetRASBounds(bounds)
            return box_of_bounds(bounds)
        centre = scenes.slice_position(slicer.mrmlScene)
        return None if centre is None else cube_around(centre, float(self.box_mm.value))

    def _start(self, settings: Settings, box: Box | None) -> None:
        volumes = [one.currentNode() for one in self.channels]
        if volumes[0] is None:
            slicer.util.errorDisplay("Load a scan and choose it as the volume.")
            return
        try:
            self.work.start(
                self._install.command(),
                volumes,
                settings,
                output=self.output.currentNode(),
                box=box,
                whole_sequence=bool(self.sequence.checked) and box is None,
            )
        except CommandError as error:
            slicer.util.errorDisplay(str(error))
            return
        if settings.model:
            kept = self._store.read()
            recent = tuple(remembered(kept.recent, settings.model))
            self._store.write(kept.changed(recent=recent))
        self.show_running(True)

    def look(self) -> None:
        """See how far it is; at the end show the result."""
        if self.apply_button.enabled:  # nothing was begun
            return
        at_work = self.work.running
        self._show_state(self.work.look())
        if at_work:
            return
        self.show_running(False)
        try:
            node = self.work.finish()
        except CommandError as error:
            self._fail(str(error))
            if not self.work.cancelled:
                slicer.util.errorDisplay(str(error))
            return
        self._show_result(node)

    def _show_state(self, state: State) -> None:
        self.bar.maximum = 0 if state.share is None else 100
        self.bar.value = round(100 * (state.share or 0))
        self.bar.format = f"{state.what} %p% {time_left(state.left_s)}".strip()
        for line in state.lines:
            self._install.say(line)
            self.status.text = line

    def _show_result(self, node: Any) -> None:
        summary = self.work.summary
        self.output.setCurrentNode(node)
        if self.show_3d.checked:
            scenes.show_in_3d(node)
        count = node.GetSegmentation().GetNumberOfSegments()
        device = device_words(self._store.read().device, summary.device)
        words = [f"{node.GetName()}: {count} structures", f"{summary.seconds:.0f} s", device]
        lines = [", ".join(word for word in words if word)]
        lines += [f"Look again: {warning}" for warning in summary.warnings]
        self.status.text = "\n".join(lines)
        for line in lines:
            self._install.say(line)
        for name, ml in summary.volumes_ml:
            self._install.say(f"{name}: {ml:.2f} mL")
        self.ended(node)

    def show_running(self, running: bool) -> None:
        """What can be pressed now."""
        self.apply_button.enabled = self.here_button.enabled = not running
        self.cancel_button.enabled = running
        self.bar.visible = running

    def abandon(self) -> None:
        """Stop what runs."""
        self.work.abandon()
