"""Scans out of a scene of 3D Slicer, segmentations into it. MRML and VTK alone, no Qt: it runs in
Slicer's libraries without its window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from MedSegLib.command import CommandError
from MedSegLib.segmenting import Box

_REPLACE = 0  # of vtkSlicerSegmentationsModuleLogic's ways to merge


def export_volume(scene: Any, volume: Any, path: Path) -> None:
    """Write a volume's voxels and place to a NRRD file, and nothing else of it. Raises
    `CommandError`.
    """
    if volume.GetImageData() is None:
        raise CommandError(f"{volume.GetName()} holds no voxels; load the scan again")
    storage = slicer.vtkMRMLVolumeArchetypeStorageNode()
    scene.AddNode(storage)
    try:
        storage.SetFileName(str(path))
        storage.SetUseCompression(0)
        if not storage.WriteData(volume) or not path.is_file():
            raise CommandError(
                "the volume could not be handed over; save it and run medseg on the file"
            )
    finally:
        scene.RemoveNode(storage)


def load_volume(scene: Any, path: Path) -> Any:
    """A scan in a file as a node. Raises `CommandError`."""
    node = slicer.vtkMRMLScalarVolumeNode()
    scene.AddNode(node)
    name = path.name
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha"):
        name = name[: -len(suffix)] if name.endswith(suffix) else name
    node.SetName(scene.GenerateUniqueName(name))
    node.CreateDefaultDisplayNodes()
    storage = slicer.vtkMRMLVolumeArchetypeStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(path))
    if not storage.ReadData(node):
        scene.RemoveNode(storage)
        scene.RemoveNode(node)
        raise CommandError(f"{path} could not be read as a scan; look whether it is there")
    node.SetAndObserveStorageNodeID(storage.GetID())
    return node


def save_segmentation(scene: Any, node: Any, path: Path) -> None:
    """Write a segmentation to a `.seg.nrrd` file. Raises `CommandError`."""
    if node.GetSegmentation().GetNumberOfSegments() == 0:
        raise CommandError(f"{node.GetName()} has no segment; draw or segment something first")
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    try:
        storage.SetFileName(str(path))
        if not storage.WriteData(node) or not path.is_file():
            raise CommandError("the segmentation could not be handed over; save it as .seg.nrrd")
    finally:
        scene.RemoveNode(storage)


def load_segmentation(scene: Any, path: Path, volume: Any, name: str) -> Any:
    """A segmentation file as a node that belongs to a volume: on its grid, under its transform,
    beside it in the subject hierarchy. Raises `CommandError`.
    """
    node = slicer.vtkMRMLSegmentationNode()
    scene.AddNode(node)
    node.SetName(scene.GenerateUniqueName(name))
    node.CreateDefaultDisplayNodes()
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    try:
        storage.SetFileName(str(path))
        if not storage.ReadData(node):
            scene.RemoveNode(node)
            raise CommandError("medseg's result could not be read; look at the log")
    finally:
        scene.RemoveNode(storage)  # it names a temporary file, which goes
    attach(scene, node, volume)
    return node


def attach(scene: Any, segmentation: Any, volume: Any) -> None:
    """Make a segmentation that of a volume."""
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segmentation.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    tree = scene.GetSubjectHierarchyNode() if hasattr(scene, "GetSubjectHierarchyNode") else None
    if tree is None:
        return
    above, item = tree.GetItemByDataNode(volume), tree.GetItemByDataNode(segmentation)
    if above and item:
        tree.SetItemParent(item, tree.GetItemParent(above))


def segment_ids(node: Any) -> dict[str, str]:
    """Name to identifier of a segmentation's segments; of several of one name the first."""
    segmentation = node.GetSegmentation()
    ids: dict[str, str] = {}
    for number in range(segmentation.GetNumberOfSegments()):
        one = segmentation.GetNthSegmentID(number)
        ids.setdefault(segmentation.GetSegment(one).GetName(), one)
    return ids


def put_segments(source: Any, target: Any) -> int:
    """Put all segments of one segmentation into another, where they take the place of those of the
    same name; how many they were.
    """
    there = segment_ids(target)
    mine = segment_ids(source)
    for name, one in mine.items():
        if name in there:
            target.GetSegmentation().RemoveSegment(there[name])
        target.GetSegmentation().CopySegmentFromSegmentation(source.GetSegmentation(), one)
    return len(mine)


def put_in_box(source: Any, target: Any, name: str, *, volume: Any, box: Box) -> int:
    """Put what a segment is inside a box into another segmentation, where the segment of that name
    stays as it was outside of the box; the voxels it now has inside. Raises `CommandError`.
    """
    if volume.GetTransformNodeID():
        raise CommandError(
            f"{volume.GetName()} lies under a transform; harden it before a part is segmented"
        )
    ids = segment_ids(source)
    if name not in ids:
        raise CommandError(f"the model found no {name}")
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    grid = logic.CreateOrientedImageDataFromVolumeNode(volume)
    inside = _inside(grid, box)
    if not inside.any():
        raise CommandError("the place lies outside of the volume; move the slices into it")
    new = _mask(source, ids[name], grid)
    there = segment_ids(target)
    if name not in there:
        segment = source.GetSegmentation().GetSegment(ids[name])
        fresh = slicer.vtkSegment()
        fresh.DeepCopyMetadata(segment)
        fresh.RemoveAllRepresentations()
        target.GetSegmentation().AddSegment(fresh, ids[name])
        there = segment_ids(target)
        old = np.zeros_like(new)
    else:
        old = _mask(target, there[name], grid)
    result = np.where(inside, new, old)
    image = _image_like(grid, result)
    if not logic.SetBinaryLabelmapToSegment(image, target, there[name], _REPLACE):
        raise CommandError("the result could not be put into the segmentation; choose a new one")
    return int(np.count_nonzero(new & inside))


def _mask(node: Any, segment_id: str, grid: Any) -> np.ndarray:
    """Where a segment is, on a grid, as (k, j, i) of truth values."""
    image = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(segment_id, image)
    extent = image.GetExtent()
    if any(extent[2 * axis] > extent[2 * axis + 1] for axis in range(3)):
        return np.zeros(grid.GetDimensions()[::-1], bool)
    placed = slicer.vtkOrientedImageData()
    resample = slicer.vtkOrientedImageDataResample
    resample.ResampleOrientedImageToReferenceOrientedImage(image, grid, placed)
    values = vtk_to_numpy(placed.GetPointData().GetScalars())
    return values.reshape(placed.GetDimensions()[::-1]) != 0


def _inside(grid: Any, box: Box) -> np.ndarray:
    """Which voxel centres of a grid lie in a box, as (k, j, i)."""
    matrix = vtk.vtkMatrix4x4()
    grid.GetImageToWorldMatrix(matrix)
    extent = grid.GetExtent()
    steps = [np.arange(extent[2 * axis], extent[2 * axis + 1] + 1) for axis in range(3)]
    inside = np.ones(grid.GetDimensions()[::-1], bool)
    for row in range(3):
        parts = [matrix.GetElement(row, axis) * steps[axis] for axis in range(3)]
        place = parts[2][:, None, None] + parts[1][None, :, None] + parts[0][None, None, :]
        place = place + matrix.GetElement(row, 3)
        inside &= (place >= box.low[row]) & (place <= box.high[row])
    return inside


def _image_like(grid: Any, mask: np.ndarray) -> Any:
    image = slicer.vtkOrientedImageData()
    image.SetExtent(grid.GetExtent())
    matrix = vtk.vtkMatrix4x4()
    grid.GetImageToWorldMatrix(matrix)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    image.SetImageToWorldMatrix(matrix)
    vtk_to_numpy(image.GetPointData().GetScalars())[:] = mask.reshape(-1)
    return image


def show_in_3d(node: Any) -> None:
    """Make surfaces of all segments and show them."""
    node.CreateClosedSurfaceRepresentation()
    display = node.GetDisplayNode()
    if display is not None:
        display.SetVisibility3D(True)


def slice_position(scene: Any) -> tuple[float, float, float] | None:
    """Where the three slices meet, in RAS mm; None where there are none."""
    nodes = [scene.GetNodeByID(f"vtkMRMLSliceNode{name}") for name in ("Yellow", "Green", "Red")]
    if any(node is None for node in nodes):
        return None
    right, anterior, superior = (float(node.GetSliceOffset()) for node in nodes)
    return right, anterior, superior


def sequence_of(scene: Any, volume: Any) -> Any:
    """The sequence that a volume shows one item of, and its browser; (None, None) for a volume of
    its own.
    """
    browsers = scene.GetNodesByClass("vtkMRMLSequenceBrowserNode")
    browsers.UnRegister(None)
    for number in range(browsers.GetNumberOfItems()):
        browser = browsers.GetItemAsObject(number)
        sequence = browser.GetSequenceNode(volume)
        if sequence is not None:
            return sequence, browser
    return None, None


def items_of(sequences: Sequence[Any]) -> list[list[Any]]:
    """The items of sequences that belong together: for each of the first, those of all. Raises
    `CommandError` where one has fewer.
    """
    count = sequences[0].GetNumberOfDataNodes()
    if any(one.GetNumberOfDataNodes() != count for one in sequences):
        raise CommandError("the sequences of the channels have different lengths; choose others")
    return [[one.GetNthDataNode(number) for one in sequences] for number in range(count)]


def sequence_of_results(
    scene: Any, nodes: Sequence[Any], sequence: Any, browser: Any, name: str
) -> Any:
    """A sequence of segmentations beside one of volumes, shown by the same browser; the nodes are
    taken out of the scene. The segmentation that shows its item.
    """
    results = slicer.vtkMRMLSequenceNode()
    scene.AddNode(results)
    results.SetName(scene.GenerateUniqueName(name))
    results.SetIndexName(sequence.GetIndexName())
    results.SetIndexUnit(sequence.GetIndexUnit())
    results.SetIndexType(sequence.GetIndexType())
    for number, node in enumerate(nodes):
        results.SetDataNodeAtValue(node, sequence.GetNthIndexValue(number))
        scene.RemoveNode(node)
    browser.AddSynchronizedSequenceNodeID(results.GetID())
    logic = slicer.vtkSlicerSequencesLogic()
    logic.SetMRMLScene(scene)
    logic.UpdateProxyNodesFromSequences(browser)
    return browser.GetProxyNode(results)
