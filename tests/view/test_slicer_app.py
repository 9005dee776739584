"""What real 3D Slicer code makes of medseg's files: names, colours, codes, voxel counts, places.
`pytest -m slicer`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from making import heads
from medseg import io
from medseg.errors import DataWarning
from medseg.io.slicer import read_segments, read_table, write_segments
from medseg.labels import Label, LabelTable
from medseg.view.contrast import contrast_of
from medseg.view.page import full_table
from medseg.view.scene import write_scene
from medseg.volume import Volume

pytestmark = pytest.mark.slicer
slicer = pytest.importorskip(
    "slicer", reason="trame-slicer is not installed (pip install medseg[slicer-test])"
)


def loaded_segmentation(app: Any, path: Any) -> Any:
    """The node Slicer makes of a file; nothing may be said against the file."""
    messages = slicer.vtkMRMLMessageCollection()
    node = app.segmentations_logic.LoadSegmentationFromFile(str(path), True, None, None, messages)
    assert [messages.GetNthMessageText(n) for n in range(messages.GetNumberOfMessages())] == []
    return node


def array_of(image: Any) -> np.ndarray:
    from vtkmodules.util.numpy_support import vtk_to_numpy

    return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions(), order="F")


def voxels_mm(image: Any, value: int) -> np.ndarray:
    """RAS mm of every voxel of a value in an oriented image of Slicer."""
    import vtkmodules.all as vtk

    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    affine = np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])
    extent = image.GetExtent()
    found = np.argwhere(array_of(image) == value) + np.array([extent[0], extent[2], extent[4]])
    return (np.c_[found, np.ones(len(found))] @ affine.T)[:, :3]


def tag(segment: Any, name: str) -> str:
    from vtkmodules.vtkCommonCore import reference

    value = reference("")
    return str(value) if segment.GetTag(name, value) else ""


def facts(node: Any) -> dict[str, tuple]:
    """Name to colour, voxels and centre of every segment."""
    segmentation = node.GetSegmentation()
    found = {}
    for n in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(n)
        image = segment.GetRepresentation("Binary labelmap")
        places = voxels_mm(image, segment.GetLabelValue())
        color = tuple(round(255 * part) for part in segment.GetColor())
        found[segment.GetName()] = (
            color,
            len(places),
            places.mean(axis=0) if len(places) else None,
        )
    return found


def assert_like(found: dict[str, tuple], labels: Volume, table: LabelTable) -> None:
    assert set(found) == {label.name for label in table.labels}
    for label in table.labels:
        color, count, centre = found[label.name]
        assert color == label.color
        assert count == (labels.data == label.value).sum()
        if count:
            assert np.allclose(centre, heads.centre_mm(labels, label.value), atol=1e-3)


@pytest.mark.parametrize(
    ("orientation", "degrees"), [("LAS", 0), ("RAS", 0), ("PIR", 0), ("LPS", 20)]
)
def test_slicer_reads_a_segmentation_as_medseg_wrote_it(app, scene, tmp_path, orientation, degrees):
    _, labels = heads.head(orientation, degrees)
    io.write(labels, tmp_path / "x.seg.nrrd", table=heads.TABLE)

    node = loaded_segmentation(app, tmp_path / "x.seg.nrrd")

    assert_like(facts(node), labels, heads.TABLE)
    segment = node.GetSegmentation().GetNthSegment(1)
    assert tag(segment, "TerminologyEntry").split("~")[1:4] == [
        "SCT^123037004^Anatomical Structure", "SCT^64033007^Kidney", "SCT^24028007^Right",
    ]  # fmt: skip


def overlapping() -> list[tuple[Label, Volume]]:
    _, labels = heads.head()
    organ = labels.with_data((labels.data == heads.RIGHT).astype(np.uint8))
    lesion = np.zeros(labels.shape, np.uint8)
    lesion[tuple(slice(int(a.mean()), int(a.mean()) + 3) for a in np.nonzero(organ.data))] = 1
    other = labels.with_data((labels.data == heads.LEFT).astype(np.uint8))
    return [
        (Label(1, "organ", (200, 100, 50)), organ),
        (Label(2, "lesion", (250, 250, 0)), labels.with_data(lesion)),
        (Label(9, "other organ", (0, 100, 50)), other),
    ]


def test_slicer_reads_segments_that_overlap(app, scene, tmp_path):
    segments = overlapping()
    write_segments(segments, tmp_path / "x.seg.nrrd")

    node = loaded_segmentation(app, tmp_path / "x.seg.nrrd")

    assert node.GetSegmentation().GetNumberOfLayers() == 2
    found = facts(node)
    for label, mask in segments:
        assert found[label.name][:2] == (label.color, mask.data.sum())
        assert np.allclose(found[label.name][2], heads.centre_mm(mask, 1), atol=1e-3)


def test_medseg_reads_what_slicer_writes(app, scene, tmp_path):
    segments = overlapping()
    write_segments(segments, tmp_path / "x.seg.nrrd")
    node = loaded_segmentation(app, tmp_path / "x.seg.nrrd")
    storage = node.GetStorageNode()
    storage.SetFileName(str(tmp_path / "slicer.seg.nrrd"))
    assert storage.WriteData(node)

    back = list(read_segments(tmp_path / "slicer.seg.nrrd"))

    assert [label.name for label, _ in back] == ["organ", "lesion", "other organ"]
    assert read_table(tmp_path / "slicer.seg.nrrd").names == {
        label.value: label.name for label, _ in back
    }
    for (label, mask), (_, before) in zip(back, segments):
        assert mask.data.sum() == before.data.sum(), label.name
        assert np.allclose(heads.centre_mm(mask, 1), heads.centre_mm(before, 1), atol=1e-3)


@pytest.mark.parametrize("orientation", ["LAS", "PIR"])
def test_a_label_map_that_slicer_wrote_is_read_without_a_warning(app, scene, tmp_path, orientation):
    _, labels = heads.head(orientation)
    io.write(labels, tmp_path / "x.seg.nrrd", table=heads.TABLE)
    node = loaded_segmentation(app, tmp_path / "x.seg.nrrd")
    storage = node.GetStorageNode()
    storage.SetFileName(str(tmp_path / "slicer.seg.nrrd"))
    storage.SetCropToMinimumExtent(True)
    assert storage.WriteData(node)

    back, table = (
        io.read_labels(tmp_path / "slicer.seg.nrrd"),
        read_table(tmp_path / "slicer.seg.nrrd"),
    )

    assert {label.name: label.color for label in table.labels} == {
        x.name: x.color for x in heads.TABLE.labels
    }
    for label in table.labels:
        before = next(x.value for x in heads.TABLE.labels if x.name == label.name)
        assert (back.data == label.value).sum() == (labels.data == before).sum()
        if before != heads.ABSENT:
            assert np.allclose(
                heads.centre_mm(back, label.value), heads.centre_mm(labels, before), atol=1e-3
            )


def drawn(scene: Any) -> Any:
    """A segmentation as people leave it: segments that share a layer, overlap, are empty, and have
    names, colours and tags of every sort.
    """
    node = slicer.vtkMRMLSegmentationNode()
    scene.AddNode(node)
    node.CreateDefaultDisplayNodes()
    node.SetName("of a person")
    entry = "~".join([
        "my list", "SCT^123037004^Anatomical Structure", "SCT^64033007^Kidney", "SCT^7771000^Left",
        "my regions", "SCT^818983003^Abdomen", "^^",
    ])  # fmt: skip
    for number, (name, box) in enumerate(
        (("liver", (2, 7)), ('Größe ~ | "x" 脳', (9, 12)), ("lesion", (4, 6)), ("nothing", ()))
    ):
        segment = slicer.vtkSegment()
        segment.SetName(name)
        segment.SetColor(0.123456, number / 7, 1)
        segment.SetNameAutoGenerated(number == 0)
        segment.SetColorAutoGenerated(number == 1)
        segment.SetTag("TerminologyEntry", entry)
        segment.SetTag("Segmentation.Status", "flagged" if number else "completed")
        segment.SetTag("Größe", "ä:b")
        segment.AddRepresentation("Binary labelmap", oriented_box(*box))
        node.GetSegmentation().AddSegment(segment, f"id {number}")
    node.GetSegmentation().SetConversionParameter("Smoothing factor", "0.25")
    return node


def oriented_box(start: int = 0, stop: int = -1) -> Any:
    """A cube of ones in Slicer, on an oblique grid; empty without its sides."""
    import vtkmodules.all as vtk
    from vtkmodules.util.numpy_support import vtk_to_numpy

    image = slicer.vtkOrientedImageData()
    matrix = vtk.vtkMatrix4x4()
    for row, values in enumerate(((0, -1.5, 0, 20), (1.5, 0, 0, -7), (0, 0, 2, 3))):
        for column, value in enumerate(values):
            matrix.SetElement(row, column, value)
    image.SetExtent(start, stop, start, stop, start, stop)
    image.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    if start <= stop:
        vtk_to_numpy(image.GetPointData().GetScalars())[:] = 1
    image.SetImageToWorldMatrix(matrix)
    return image


def all_facts(node: Any) -> dict[str, Any]:
    """All that Slicer knows of a segmentation that a file of it holds."""
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(n) for n in range(segmentation.GetNumberOfSegments())]
    known: dict[str, Any] = {"parameters": segmentation.SerializeAllConversionParameters()}
    known["layers"] = [segmentation.GetLayerIndex(one) for one in ids]
    for one in ids:
        segment = segmentation.GetSegment(one)
        image = segment.GetRepresentation("Binary labelmap")
        places = voxels_mm(image, segment.GetLabelValue()) if image.GetNumberOfPoints() else []
        names = ("TerminologyEntry", "Segmentation.Status", "Größe")
        known[one] = (
            segment.GetName(), segment.GetColor(), segment.GetNameAutoGenerated(),
            segment.GetColorAutoGenerated(), segment.GetLabelValue(), len(places),
            np.round(np.sum(places, axis=0), 3).tolist(), [tag(segment, name) for name in names],
        )  # fmt: skip
    return known


@pytest.mark.parametrize("cropped", [True, False])
def test_what_slicer_wrote_is_the_same_to_slicer_after_medseg(app, scene, tmp_path, cropped):
    node = drawn(scene)
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    storage.SetCropToMinimumExtent(cropped)
    storage.SetFileName(str(tmp_path / "slicer.seg.nrrd"))
    assert storage.WriteData(node)

    io.convert_file(tmp_path / "slicer.seg.nrrd", tmp_path / "medseg.seg.nrrd")

    before = all_facts(loaded_segmentation(app, tmp_path / "slicer.seg.nrrd"))
    after = all_facts(loaded_segmentation(app, tmp_path / "medseg.seg.nrrd"))
    assert after == before
    assert before["id 2"][5] == 27 and before["id 3"][5] == 0
    assert before["id 1"][0] == 'Größe ~ | "x" 脳' and max(before["layers"]) > 0


def test_slicer_cuts_what_medseg_warns_of(app, scene, tmp_path):
    _, labels = heads.head()
    io.write(
        labels.with_data((labels.data == heads.RIGHT).astype(np.uint8)), tmp_path / "x.seg.nrrd"
    )
    content = (tmp_path / "x.seg.nrrd").read_bytes()
    i0, i1, *rest = re.search(rb"Segment0_Extent:=([\d ]+)", content)[1].split()
    short = b" ".join([i0, str(int(i1) - 2).encode(), *rest])
    (tmp_path / "x.seg.nrrd").write_bytes(
        re.sub(rb"(Segment0_Extent:=)[\d ]+", rb"\g<1>" + short, content)
    )

    with pytest.warns(DataWarning, match="does not show"):
        whole = io.read_labels(tmp_path / "x.seg.nrrd").data.sum()

    assert 0 < facts(loaded_segmentation(app, tmp_path / "x.seg.nrrd"))["label 1"][1] < whole


@pytest.mark.parametrize("orientation", ["LAS", "ASR"])
def test_slicer_opens_the_scene(app, scene, tmp_path, orientation):
    scan, labels = heads.head(orientation)
    write_scene(tmp_path / "case.mrb", scan, labels, heads.TABLE)

    app.io_manager.load_scene(str(tmp_path / "case.mrb"))

    volume = scene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    display, contrast = volume.GetDisplayNode(), contrast_of(scan.data)
    assert volume.GetName() == "scan"
    assert display.GetWindow() == pytest.approx(contrast.high - contrast.low, rel=1e-4)
    assert display.GetLevel() == pytest.approx((contrast.high + contrast.low) / 2, rel=1e-4)
    assert np.prod(volume.GetImageData().GetDimensions()) == scan.data.size
    node = scene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    assert_like(facts(node), labels, heads.TABLE)
    assert node.GetSegmentation().ContainsRepresentation("Closed surface")
    assert node.GetNodeReferenceID("referenceImageGeometryRef") == volume.GetID()
    assert node.GetDisplayNode().GetVisibility()
    assert scene.GetFirstNodeByClass("vtkMRMLLayoutNode").GetViewArrangement() == 3
    for name, orientation_name in (("Red", "Axial"), ("Green", "Coronal"), ("Yellow", "Sagittal")):
        view = scene.GetNodeByID(f"vtkMRMLSliceNode{name}")
        composite = scene.GetNodeByID(f"vtkMRMLSliceCompositeNode{name}")
        assert view.GetOrientation() == orientation_name
        assert composite.GetBackgroundVolumeID() == volume.GetID()
    colors = scene.GetFirstNodeByName("labels colours")
    for label in heads.TABLE.labels:
        assert colors.GetColorName(label.value) == " ".join(label.name.split())


def test_slicer_names_a_nifti_label_map_by_the_colour_table(app, scene, tmp_path):
    _, labels = heads.head()
    io.write(labels, tmp_path / "labels.nii.gz")
    known = [label for label in heads.TABLE.labels if (labels.data == label.value).any()]
    LabelTable(tuple(known)).write(tmp_path / "labels.ctbl")
    storage = slicer.vtkMRMLColorTableStorageNode()
    scene.AddNode(storage)
    colors = slicer.vtkMRMLColorTableNode()
    scene.AddNode(colors)
    storage.SetFileName(str(tmp_path / "labels.ctbl"))
    assert storage.ReadData(colors)

    messages = slicer.vtkMRMLMessageCollection()
    node = app.segmentations_logic.LoadSegmentationFromFile(
        str(tmp_path / "labels.nii.gz"), True, None, colors, messages
    )

    assert_like(facts(node), labels, LabelTable(tuple(known)))


def test_values_without_a_name_are_named_in_slicer_too(app, scene, tmp_path):
    scan, labels = heads.head()
    write_scene(tmp_path / "case.mrb", scan, labels, full_table(labels, None))

    app.io_manager.load_scene(str(tmp_path / "case.mrb"))

    assert set(facts(scene.GetFirstNodeByClass("vtkMRMLSegmentationNode"))) == {
        "label 7",
        "label 12",
        "label 300",
    }


def with_views() -> tuple[Any, dict[str, Any]]:
    """A Slicer of its own with three slice views, which must be there before what they show."""
    from trame_slicer.core import SlicerApp
    from trame_slicer.views import DirectViewFactory, ViewLayoutDefinition, ViewProps, ViewType

    app = SlicerApp()
    app.view_manager.register_factory(DirectViewFactory(do_render_offscreen=True))
    made = {}
    for name, orientation in (("Red", "Axial"), ("Green", "Coronal"), ("Yellow", "Sagittal")):
        properties = ViewProps(orientation=orientation, label=name[0])
        made[name] = app.view_manager.create_view(
            ViewLayoutDefinition(name, ViewType.SLICE_VIEW, properties)
        )
        made[name].render_window().SetSize(300, 300)
    return app, made


def picture_of(view: Any) -> np.ndarray:
    import vtkmodules.all as vtk
    from vtkmodules.util.numpy_support import vtk_to_numpy

    view.get_view_node().SetDimensions(300, 300, 1)
    for _ in range(3):
        view.render()
    view.render_window().Render()
    grab = vtk.vtkWindowToImageFilter()
    grab.SetInput(view.render_window())
    grab.ReadFrontBufferOff()
    grab.Update()
    image = grab.GetOutput()
    width, height, _ = image.GetDimensions()
    return (
        vtk_to_numpy(image.GetPointData().GetScalars())
        .reshape(height, width, -1)[::-1, :, :3]
        .astype(int)
    )


def test_slicer_shows_the_scene_with_the_same_side_on_the_left_as_the_page(tmp_path, monkeypatch):
    """The counterpart of test_browser.test_left_is_left."""
    monkeypatch.chdir(tmp_path)
    app, views = with_views()
    scan, labels = heads.head("PIR")
    write_scene(tmp_path / "case.mrb", scan, labels, heads.TABLE)
    app.io_manager.load_scene(str(tmp_path / "case.mrb"))
    seen: dict[tuple[str, int], tuple[float, float]] = {}
    for value, name in (
        (heads.RIGHT, "Red"),
        (heads.RIGHT, "Green"),
        (heads.LEFT, "Green"),
        (heads.FRONT, "Yellow"),
    ):
        node = views[name].get_view_node()
        node.JumpSliceByOffsetting(*heads.centre_mm(labels, value))
        picture = picture_of(views[name])
        strong = picture.argmax(-1) == np.argmax(heads.PURE[value])
        rows, columns = np.nonzero(strong & (np.ptp(picture, axis=-1) > 60))
        assert len(rows) > 50, (name, value)
        seen[name, value] = (rows.mean() / 300, columns.mean() / 300)
    assert seen["Red", heads.RIGHT][1] < 0.45
    assert seen["Green", heads.RIGHT][1] < 0.45
    assert seen["Green", heads.RIGHT][0] < 0.5
    assert seen["Green", heads.LEFT][1] > 0.55
    assert seen["Green", heads.LEFT][0] > 0.5
    assert seen["Yellow", heads.FRONT][1] < 0.35
