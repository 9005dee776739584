"""The module for 3D Slicer at work in Slicer's own libraries: scans out of the scene, medseg in a
Python of its own, segmentations into the scene. `pytest -m slicer`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import medseg.view
from making.places import ROOT, SAMPLES
from medseg import io

pytestmark = pytest.mark.slicer
slicer = pytest.importorskip(
    "slicer", reason="trame-slicer is not installed (pip install medseg[slicer-test])"
)
MODULE = Path(medseg.view.__file__).parent / "slicer" / "MedSeg"
#: Slicer's environment has no PyTorch, so medseg runs in that of the program on the path.
PROGRAM = shutil.which("medseg")
#: medseg with the networks of `making.networks`, whose answer is known.
WITH_TINY = [
    str(Path(PROGRAM or "").resolve().parent / "python"),
    "-c",
    "from making.networks import KNOWN, NETWORKS; import medseg.cli; NETWORKS.update(KNOWN);"
    " medseg.cli.main()",
]
needs_medseg = pytest.mark.skipif(PROGRAM is None, reason="no medseg program is on the path")
TINY = """
from pathlib import Path
from making import networks as tiny
folder = Path({folder!r})
tiny.save_two_channels(folder / "two")
tiny.save_known(folder / "one")
tiny.save_scan(folder / "scan.nii.gz")
tiny.save_scan(folder / "other.nii.gz", seed=5)
"""


@pytest.fixture
def work(monkeypatch, tmp_path) -> Iterator[types.ModuleType]:
    """MedSegApp.work, imported as Slicer does, with temporary files where they are counted."""
    monkeypatch.syspath_prepend(str(MODULE))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    yield importlib.import_module("MedSegApp.work")
    for name in [name for name in sys.modules if name.startswith("MedSeg")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model of one channel and one of two, and scans for them."""
    folder = tmp_path_factory.mktemp("tiny")
    script = TINY.format(folder=str(folder))
    subprocess.run([*WITH_TINY[:2], script], env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def loaded(scene: Any, path: Path, name: str = "head") -> Any:
    volume = slicer.vtkMRMLScalarVolumeNode()
    scene.AddNode(volume)
    volume.SetName(name)
    storage = slicer.vtkMRMLVolumeArchetypeStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(path))
    assert storage.ReadData(volume)
    return volume


def head(scene: Any, name: str = "head") -> Any:
    return loaded(scene, SAMPLES / "head_t1.nii.gz", name)


def done(one: Any, seconds: float = 600) -> list[Any]:
    """The states on the way to the end."""
    states = []
    end = time.monotonic() + seconds
    while one.running and time.monotonic() < end:
        states.append(one.look())
        time.sleep(0.05)
    assert not one.running
    return [*states, one.look()]


def voxels(node: Any) -> dict[str, int]:
    """How many voxels each segment has."""
    counts = {}
    segmentation = node.GetSegmentation()
    for number in range(segmentation.GetNumberOfSegments()):
        one = segmentation.GetNthSegmentID(number)
        counts[segmentation.GetSegment(one).GetName()] = int(mask(node, one).sum())
    return counts


def mask(node: Any, one: str) -> np.ndarray:
    from vtkmodules.util.numpy_support import vtk_to_numpy

    image = slicer.vtkOrientedImageData()
    node.GetBinaryLabelmapRepresentation(one, image)
    if image.GetNumberOfPoints() == 0:
        return np.zeros((0, 0, 0), bool)
    values = vtk_to_numpy(image.GetPointData().GetScalars())
    return values.reshape(image.GetDimensions()[::-1]) != 0


def nodes(scene: Any, kind: str) -> int:
    found = scene.GetNodesByClass(kind)
    found.UnRegister(None)
    return found.GetNumberOfItems()


def settings(**values: Any) -> Any:
    return importlib.import_module("MedSegLib.settings").Settings(**values)


@needs_medseg
def test_a_bundled_head_is_segmented_with_names_colours_and_progress(work, scene, tmp_path):
    volume = head(scene)
    one = work.Work(scene, environment())
    one.start([PROGRAM], [volume], settings(model="brain-fast", device="cpu"))

    states = done(one)
    node = one.finish()

    counts = voxels(node)
    truth = io.read_labels(SAMPLES / "head_t1_truth.nii.gz")
    assert len(counts) == 32
    hippocampus = (truth.data == 17).sum()
    assert 0.5 * hippocampus < counts["left hippocampus"] < 2 * hippocampus
    assert node.GetNodeReferenceID("referenceImageGeometryRef") == volume.GetID()
    assert node.GetStorageNode() is None
    shares = [state.share for state in states if state.what == "segmenting" and state.share]
    assert shares == sorted(shares) and shares
    assert one.summary.device == "cpu"
    assert dict(one.summary.volumes_ml).keys() == counts.keys()
    assert not list((tmp_path / "temporary").iterdir())
    scene.RemoveNode(node)
    assert nodes(scene, "vtkMRMLSegmentationNode") == 0
    assert nodes(scene, "vtkMRMLVolumeArchetypeStorageNode") == 1  # that of the head


@needs_medseg
def test_two_channels_are_handed_over_in_their_order(work, scene, tiny):
    volumes = [loaded(scene, tiny / f"{name}.nii.gz", name) for name in ("scan", "other")]
    model = settings(model=str(tiny / "two"), device="cpu")
    one, swapped = work.Work(scene, environment()), work.Work(scene, environment())

    with pytest.raises(work.CommandError, match="same volume"):
        one.start(WITH_TINY, [volumes[0], volumes[0]], model)
    with pytest.raises(work.CommandError, match="for every scan"):
        one.start(WITH_TINY, [volumes[0], None], model)
    one.start(WITH_TINY, volumes, model)
    done(one)
    swapped.start(WITH_TINY, volumes[::-1], model)
    done(swapped)

    # The model finds one structure where the first is bright, and the other where the second is.
    counts, others = voxels(one.finish()), voxels(swapped.finish())
    assert set(counts) == {"left body", "right body"}
    assert counts != others
    wrong = work.Work(scene, environment())
    wrong.start(WITH_TINY, volumes[:1], model)
    done(wrong)
    with pytest.raises(work.CommandError, match="2 scans"):
        wrong.finish()


@needs_medseg
def test_cancel_leaves_nothing(work, scene, tmp_path):
    one = work.Work(scene, environment())
    one.start([PROGRAM], [head(scene)], settings(model="brain-fast", device="cpu"))
    with pytest.raises(work.CommandError, match="at work already"):
        one.start([PROGRAM], [head(scene)], settings())
    one.cancel()
    done(one, 60)

    with pytest.raises(work.CommandError, match="stopped; nothing was changed"):
        one.finish()

    assert one.cancelled
    assert not list((tmp_path / "temporary").iterdir())
    assert nodes(scene, "vtkMRMLSegmentationNode") == 0


@needs_medseg
def test_a_wrong_model_is_one_sentence_that_names_it(work, scene, tmp_path):
    one = work.Work(scene, environment())
    one.start([PROGRAM], [head(scene)], settings(model=str(tmp_path / "nothing")))
    done(one)

    with pytest.raises(work.CommandError, match="nothing") as error:
        one.finish()

    assert "\n" not in str(error.value)
    assert nodes(scene, "vtkMRMLSegmentationNode") == 0


@needs_medseg
def test_a_result_goes_into_a_segmentation_whose_other_segments_stay(work, scene):
    volume = head(scene)
    first = work.Work(scene, environment())
    first.start([PROGRAM], [volume], settings(model="kmeans"))
    done(first)
    node = first.finish()
    before = voxels(node)
    node.GetSegmentation().GetNthSegment(0).SetName("mine")

    second = work.Work(scene, environment())
    second.start([PROGRAM], [volume], settings(model="kmeans"), output=node)
    done(second)

    assert second.finish() is node
    names = list(before)
    assert voxels(node) == {"mine": before[names[0]], **before}
    assert nodes(scene, "vtkMRMLSegmentationNode") == 1


@needs_medseg
def test_one_structure_here_changes_only_what_is_in_the_box(work, scene, tiny):
    segmenting = importlib.import_module("MedSegLib.segmenting")
    scenes = importlib.import_module("MedSegApp.scene")
    volume = loaded(scene, tiny / "scan.nii.gz")
    chosen = settings(model=str(tiny / "one"), structures=("left body",), device="cpu")
    grid = slicer.vtkSlicerSegmentationsModuleLogic.CreateOrientedImageDataFromVolumeNode(volume)
    whole = work.Work(scene, environment())
    whole.start(WITH_TINY, [volume], chosen)
    done(whole)
    node = whole.finish()
    ((name, one),) = scenes.segment_ids(node).items()
    new = scenes._mask(node, one, grid)
    centre = np.argwhere(new).mean(axis=0)[::-1]
    affine = io.read(tiny / "scan.nii.gz").affine
    here = segmenting.cube_around((affine @ [*centre, 1])[:3], 14.0)
    inside = scenes._inside(grid, here)
    old = np.zeros_like(new)
    old[::2] = True  # what somebody drew before
    scenes.slicer.vtkSlicerSegmentationsModuleLogic.SetBinaryLabelmapToSegment(
        scenes._image_like(grid, old), node, one, 0
    )

    second = work.Work(scene, environment())
    second.start(WITH_TINY, [volume], chosen, output=node, box=here)
    done(second)

    assert second.finish() is node and name == "left body"
    now = scenes._mask(node, one, grid)
    assert 0 < inside.sum() < inside.size
    assert np.array_equal(now[inside], new[inside]) and new[inside].any()
    assert np.array_equal(now[~inside], old[~inside])
    fresh = work.Work(scene, environment())
    fresh.start(WITH_TINY, [volume], chosen, box=here)
    done(fresh)
    made = fresh.finish()
    assert voxels(made) == {"left body": int((new & inside).sum())}
    far = work.Work(scene, environment())
    far.start(WITH_TINY, [volume], chosen, box=segmenting.cube_around((9e3, 0, 0), 5))
    done(far)
    with pytest.raises(work.CommandError, match="outside of the volume"):
        far.finish()
    assert nodes(scene, "vtkMRMLSegmentationNode") == 2


@needs_medseg
def test_every_item_of_a_sequence_is_segmented(work, scene):
    volume = head(scene)
    sequence = slicer.vtkMRMLSequenceNode()
    scene.AddNode(sequence)
    sequence.SetIndexName("time")
    from vtkmodules.util.numpy_support import vtk_to_numpy

    for number in range(3):
        vtk_to_numpy(volume.GetImageData().GetPointData().GetScalars())[: 1000 * number] = 1000
        sequence.SetDataNodeAtValue(volume, f"{number / 2}")
    scene.RemoveNode(volume)
    browser = slicer.vtkMRMLSequenceBrowserNode()
    scene.AddNode(browser)
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    logic = slicer.vtkSlicerSequencesLogic()
    logic.SetMRMLScene(scene)
    logic.UpdateProxyNodesFromSequences(browser)
    proxy = browser.GetProxyNode(sequence)
    one = work.Work(scene, environment())

    one.start([PROGRAM], [proxy], settings(model="otsu"), whole_sequence=True)
    states = done(one)
    shown = one.finish()

    assert any(state.what.startswith("3 of 3") for state in states)
    results = browser.GetSequenceNode(shown)
    assert results.GetNumberOfDataNodes() == 3
    assert [results.GetNthIndexValue(n) for n in range(3)] == ["0.0", "0.5", "1.0"]
    counts = [sum(voxels(results.GetNthDataNode(n)).values()) for n in range(3)]
    assert counts[0] < counts[1] < counts[2]
    assert nodes(scene, "vtkMRMLSegmentationNode") == 1  # the one that shows an item
    single = work.Work(scene, environment())
    with pytest.raises(work.CommandError, match="item of a sequence"):
        single.start([PROGRAM], [head(scene)], settings(model="otsu"), whole_sequence=True)


def test_what_is_handed_over_lies_where_the_volume_lies(work, scene, tmp_path):
    volume = loaded(scene, SAMPLES / "head_t1_oblique.nii.gz")
    volume.SetName("Somebody")

    importlib.import_module("MedSegApp.scene").export_volume(scene, volume, tmp_path / "x.nrrd")

    before, after = io.read(SAMPLES / "head_t1_oblique.nii.gz"), io.read(tmp_path / "x.nrrd")
    ends = np.array([[0, 0, 0, 1], [*np.array(before.shape) - 1, 1]])
    assert before.data.sum() == after.data.sum()
    assert (
        np.allclose(
            np.sort(ends @ before.affine.T, axis=0),
            np.sort(ends @ after.affine.T, axis=0),
            atol=1e-3,
        )
        or before.shape == after.shape
    )
    assert b"Somebody" not in (tmp_path / "x.nrrd").read_bytes()


def test_a_volume_without_voxels_is_said(work, scene, tmp_path):
    volume = slicer.vtkMRMLScalarVolumeNode()
    scene.AddNode(volume)

    with pytest.raises(work.CommandError, match="holds no voxels"):
        work.Work(scene).start([sys.executable], [volume], settings())

    assert not list((tmp_path / "temporary").iterdir())


def test_the_slices_say_where_here_is(work, scene):
    scenes = importlib.import_module("MedSegApp.scene")
    if scenes.slice_position(scene) is not None:
        pytest.skip("this scene has slices already")
    for name, offset in (("Yellow", 11.0), ("Green", -7.0), ("Red", 3.0)):
        node = slicer.vtkMRMLSliceNode()
        node.SetSingletonTag(name)
        scene.AddNode(node)
        node.SetOrientation({"Yellow": "Sagittal", "Green": "Coronal", "Red": "Axial"}[name])
        node.SetSliceOffset(offset)

    assert scenes.slice_position(scene) == pytest.approx((11.0, -7.0, 3.0))


@needs_medseg
def test_a_corrected_segmentation_goes_into_a_data_set_and_comes_back(work, scene, tmp_path):
    scenes = importlib.import_module("MedSegApp.scene")
    loop = importlib.import_module("MedSegLib.loop")
    volume = loaded(scene, SAMPLES / "head_t1_oblique.nii.gz", "head")
    first = work.Work(scene, environment())
    first.start([PROGRAM], [volume], settings(model="otsu"))
    done(first)
    node = first.finish()
    one = node.GetSegmentation().GetNthSegmentID(0)
    node.GetSegmentation().GetSegment(one).SetName("Größe of the head")
    scenes.save_segmentation(scene, node, tmp_path / "labels.seg.nrrd")
    scenes.export_volume(scene, volume, tmp_path / "scan.nrrd")

    assert io.embedded_table(tmp_path / "labels.seg.nrrd").names == {1: "Größe of the head"}
    assert io.read_labels(tmp_path / "labels.seg.nrrd").data.sum() == mask(node, one).sum()
    empty = slicer.vtkMRMLSegmentationNode()
    scene.AddNode(empty)
    with pytest.raises(work.CommandError, match="has no segment"):
        scenes.save_segmentation(scene, empty, tmp_path / "empty.seg.nrrd")
    with pytest.raises(work.CommandError, match="could not be read as a scan"):
        scenes.load_volume(scene, tmp_path / "nothing.nii.gz")
    place = str(tmp_path / "grows")
    words = loop.add_command(
        [PROGRAM], place, "first", tmp_path / "labels.seg.nrrd", scans=[tmp_path / "scan.nrrd"]
    )
    ran = subprocess.run(words, env=environment(), capture_output=True, text=True)
    if "No such command" in ran.stderr:
        pytest.skip("this medseg has no command add")
    assert ran.returncode == 0, ran.stderr
    assert "Größe of the head" in loop.added_in(ran.stdout)
    (scan,), _ = loop.files_of(place, "first")
    again = scenes.load_volume(scene, scan)
    assert again.GetImageData().GetDimensions() == volume.GetImageData().GetDimensions()
    checked = subprocess.run(
        loop.check_command([PROGRAM], place), env=environment(), capture_output=True, text=True
    )
    assert not [one for one in loop.findings_in(checked.stdout) if one.severity == "error"]
