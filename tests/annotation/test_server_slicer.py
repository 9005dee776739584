"""What 3D Slicer's own logic makes of labels that a server sends and gets back: `pytest -m slicer`.

MONAI Label's extension sorts the names of an answer by their values, leaves the background out, and
hands labels and names to Slicer's import; it exports the segments that are shown the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making.serving import HIPPOCAMPI, Served, parts_of, save_nearest, save_scans, served
from medseg.io import read_labels

pytestmark = [pytest.mark.slicer, pytest.mark.usefixtures("known_networks", "one_thread")]
slicer = pytest.importorskip(
    "slicer", reason="trame-slicer is not installed (pip install medseg[slicer-test])"
)
LEFT, RIGHT = HIPPOCAMPI.names.values()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Served]:
    save_scans(tmp_path / "studies", "a")
    with served(tmp_path, save_nearest(tmp_path / "hippo")) as one:
        yield one


def labelmap_of(scene: Any, path: Path) -> Any:
    node = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    return node


def voxels(app: Any, node: Any, name: str) -> int:
    """How many voxels a segment of a name has."""
    from vtkmodules.util.numpy_support import vtk_to_numpy

    segmentation = node.GetSegmentation()
    identity = segmentation.GetSegmentIdBySegmentName(name)
    assert identity, name
    image = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(identity, image)
    scalars = image.GetPointData().GetScalars()
    return 0 if scalars is None else int((vtk_to_numpy(scalars) > 0).sum())


def test_two_full_segments_arrive_and_go_back_as_what_they_are(
    app: Any, scene: Any, here: Served, tmp_path: Path
):
    import vtkmodules.all as vtk

    answer = parts_of(here.infer("hippo", "image=a", result_extension=".nrrd"))
    (tmp_path / answer.name).write_bytes(answer.content)
    labelmap = labelmap_of(scene, tmp_path / answer.name)
    numbers = answer.params["label_names"]
    names = vtk.vtkStringArray()
    for name in sorted(numbers, key=lambda one: numbers[one]):
        names.InsertNextValue(name)
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    assert app.segmentations_logic.ImportLabelmapToSegmentationNode(labelmap, node, names)
    counts = {name: voxels(app, node, name) for name in (LEFT, RIGHT)}
    truth = np.digitize(read_scan(here), [250, 750])
    assert counts == {LEFT: (truth == 1).sum(), RIGHT: (truth == 2).sum()}

    # Back, with an empty segment between them.
    segmentation = node.GetSegmentation()
    segmentation.AddEmptySegment("gap", "gap")
    identities = [segmentation.GetSegmentIdBySegmentName(one) for one in (LEFT, "gap", RIGHT)]
    exported = vtk.vtkStringArray()
    for identity in identities:
        exported.InsertNextValue(identity)
    target = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    assert app.segmentations_logic.ExportSegmentsToLabelmapNode(node, exported, target, labelmap)
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(tmp_path / "label.nii.gz"))
    assert storage.WriteData(target)
    assert set(np.unique(read_labels(tmp_path / "label.nii.gz").data)) == {0, 1, 3}
    saved = here.save_label("a", tmp_path / "label.nii.gz", [LEFT, "gap", RIGHT], model="hippo")
    assert saved.status_code == 200, saved.text
    labels, table = here.store.read_label("a")
    assert table.names == HIPPOCAMPI.names
    assert np.array_equal(labels.data, np.array([0, 17, 53])[truth])


def read_scan(here: Served) -> np.ndarray:
    return np.asarray(here.store.read_scan("a")[0].data)
