"""One thing that medseg does for a scene: hand the scans over, run, load the result."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from MedSegApp import scene as scenes
from MedSegLib.command import Chain, CommandError, State
from MedSegLib.segmenting import Box, Summary, infer_command, summary_of
from MedSegLib.settings import Settings


class Work:
    """A volume, or a sequence of them, becomes a segmentation. `look` until not `running`, then
    `finish`.
    """

    def __init__(self, scene: Any, environment: Mapping[str, str] | None = None) -> None:
        self._scene = scene
        self._environment = environment
        self._chain: Chain | None = None
        self._folder: Path | None = None
        self._volume: Any = None
        self._sequence: tuple[Any, Any] = (None, None)
        self._output: Any = None
        self._box: Box | None = None
        self._settings = Settings()
        self._results: list[Path] = []
        self._names: dict[str, str] = {}
        self.summary: Summary = summary_of([])

    def start(
        self,
        command: Sequence[str],
        volumes: Sequence[Any],
        settings: Settings,
        *,
        output: Any = None,
        box: Box | None = None,
        whole_sequence: bool = False,
    ) -> None:
        """Begin. Raises `CommandError`.

        volumes: one per channel, in the model's order. output: the segmentation to put the result
        into, None for a new one. box: put only what lies in it. whole_sequence: segment every item
        of the sequence that the first volume shows.
        """
        if self.running:
            raise CommandError("a run is at work already; wait for it or cancel it")
        if not volumes or any(volume is None for volume in volumes):
            raise CommandError("choose a volume for every scan that the model takes")
        if len({volume.GetID() for volume in volumes}) < len(volumes):
            raise CommandError("two channels are the same volume; choose one for each")
        self._volume, self._output, self._box = volumes[0], output, box
        self._settings = settings
        self._sequence = (None, None)
        cases = [list(volumes)]
        if whole_sequence:
            cases = self._items(volumes)
        self._folder = Path(tempfile.mkdtemp(prefix="medseg-"))
        try:
            commands = [self._prepare(command, case, number) for number, case in enumerate(cases)]
            self._chain = Chain(commands, self._environment)
        except ValueError as error:
            self._tidy()
            raise CommandError(str(error)) from None
        except CommandError:
            self._tidy()
            raise

    def _items(self, volumes: Sequence[Any]) -> list[list[Any]]:
        pairs = [scenes.sequence_of(self._scene, volume) for volume in volumes]
        if any(sequence is None for sequence, _ in pairs):
            raise CommandError("not every volume is an item of a sequence; choose those that are")
        self._sequence = pairs[0]
        return scenes.items_of([sequence for sequence, _ in pairs])

    def _prepare(self, command: Sequence[str], case: Sequence[Any], number: int) -> list[str]:
        """Write the scans of a case to files that name nobody, and say how it is segmented."""
        assert self._folder is not None
        scans = [self._folder / f"scan{number}_{index:04d}.nrrd" for index in range(len(case))]
        if len(scans) == 1:
            scans = [self._folder / f"scan{number}.nrrd"]
        for volume, path in zip(case, scans):
            scenes.export_volume(self._scene, volume, path)
            self._names[str(path)] = volume.GetName() or "the volume"
        result = self._folder / f"labels{number}.seg.nrrd"
        if number == 0:
            self._results = []
        self._results.append(result)
        return infer_command(command, scans, result, self._settings)

    @property
    def running(self) -> bool:
        """Whether medseg is at work."""
        return self._chain is not None and self._chain.running

    @property
    def cancelled(self) -> bool:
        """Whether it was told to stop."""
        return self._chain is not None and self._chain.cancelled

    def look(self) -> State:
        """Where it is."""
        assert self._chain is not None
        state = self._chain.look()
        return state._replace(lines=tuple(self._with_names(line) for line in state.lines))

    def cancel(self) -> None:
        """Stop it, if it runs."""
        if self._chain is not None:
            self._chain.cancel()

    def abandon(self) -> None:
        """Stop it, if it runs, and want nothing of it."""
        self.cancel()
        self._tidy()

    def finish(self) -> Any:
        """Load the result into the scene; the segmentation. Raises `CommandError`."""
        assert self._chain is not None
        try:
            try:
                self._chain.finish()
            except CommandError as error:
                raise CommandError(self._with_names(str(error))) from None
            self.summary = summary_of(self._chain.outputs)
            name = f"{self._volume.GetName()} labels"
            nodes = [
                scenes.load_segmentation(self._scene, path, self._volume, name)
                for path in self._results
            ]
            return self._placed(nodes, name)
        finally:
            self._tidy()

    def _placed(self, nodes: Sequence[Any], name: str) -> Any:
        sequence, browser = self._sequence
        if sequence is not None:
            return scenes.sequence_of_results(self._scene, nodes, sequence, browser, name)
        node = nodes[0]
        if self._output is None and self._box is None:
            return node
        target = self._output
        try:
            if target is None:
                target = self._new_segmentation(name)
            if self._box is None:
                scenes.put_segments(node, target)
            else:
                scenes.put_in_box(
                    node, target, self._settings.structures[0], volume=self._volume, box=self._box
                )
        except CommandError:
            if self._output is None and target is not None:
                self._scene.RemoveNode(target)
            raise
        finally:
            self._scene.RemoveNode(node)
        return target

    def _with_names(self, text: str) -> str:
        """A text with the names of volumes in place of the temporary files."""
        for path, name in self._names.items():
            text = text.replace(path, name)
        return text

    def _new_segmentation(self, name: str) -> Any:
        import slicer

        node = slicer.vtkMRMLSegmentationNode()
        self._scene.AddNode(node)
        node.SetName(self._scene.GenerateUniqueName(name))
        node.CreateDefaultDisplayNodes()
        scenes.attach(self._scene, node, self._volume)
        return node

    def _tidy(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
