"""A scene for 3D Slicer, `.mrb`: one file that opens with the scan windowed, its segmentation over
it, the layout set.

A `.mrb` is a zip of one folder with a `.mrml` (XML) and the data that it names. Nodes and
attributes are those that Slicer writes itself (Libs/MRML/Core). File names inside are neutral,
times are those of no day, and volumes have no headers, so that the file says nothing of a patient
and equal input gives equal bytes.
"""

from __future__ import annotations

import tempfile
import zipfile
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from medseg.files import atomic_write
from medseg.io import write_nrrd, write_seg_nrrd
from medseg.labels import LabelTable
from medseg.text import harmless
from medseg.view.contrast import Contrast, contrast_of
from medseg.volume import Volume

#: Slicer builds surfaces when the scene opens, unless the label map has more voxels than this.
MAX_SURFACE_VOXELS = 32 << 20
_FOUR_UP = "3"  # vtkMRMLLayoutNode::SlicerLayoutFourUpView
_FILE_COLORS = "14"  # vtkMRMLColorTableNode::File
#: Colour, orientation and direction cosines of Slicer's three slice views; columns of the matrix
#: are the view's axes.
_SLICES = {
    "Red": ("R", "0.952941 0.290196 0.2", "Axial", ((-1, 0, 0), (0, 1, 0), (0, 0, 1))),
    "Green": ("G", "0.431373 0.690196 0.294118", "Coronal", ((-1, 0, 0), (0, 0, 1), (0, 1, 0))),
    "Yellow": ("Y", "0.929412 0.835294 0.298039", "Sagittal", ((0, 0, -1), (-1, 0, 0), (0, 1, 0))),
}
_NO_DAY = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say


def write_scene(
    path: str | Path,
    scan: Volume,
    labels: Volume,
    table: LabelTable | None = None,
    *,
    title: str = "",
) -> None:
    """Write a scan and a label map (uint8 or uint16) as a scene, whole or not at all. Raises
    `BadOutput`.

    title: what the scan is called in Slicer; 'scan' without it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_nrrd(scan, folder / "scan.nrrd")
        surfaces = labels.data.size <= MAX_SURFACE_VOXELS
        write_seg_nrrd(labels, folder / "labels.seg.nrrd", table=table, surfaces=surfaces)
        members = {
            "case/Data/scan.nrrd": folder / "scan.nrrd",
            "case/Data/labels.seg.nrrd": folder / "labels.seg.nrrd",
        }
        if table is not None:
            table.write(folder / "labels.ctbl")
            members["case/Data/labels.ctbl"] = folder / "labels.ctbl"
        with (
            atomic_write(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            archive.writestr(
                _member("case/case.mrml", zipfile.ZIP_DEFLATED),
                scene_xml(scan, labels, table, title=title),
            )
            for member, source in members.items():  # gzipped already, but for the colours
                with (
                    archive.open(_member(member), "w", force_zip64=True) as out,
                    source.open("rb") as data,
                ):
                    while block := data.read(1 << 20):
                        out.write(block)


def scene_xml(
    scan: Volume, labels: Volume, table: LabelTable | None = None, title: str = ""
) -> bytes:
    """The `.mrml` of a scene whose data lies in Data/ beside it."""
    contrast = contrast_of(scan.data)
    root = ElementTree.Element("MRML", version="Slicer4.4.0", userTags="")
    title = harmless(title)  # XML cannot hold control characters at all
    _add_scan(root, contrast, title or "scan")
    _add_segmentation(root, f"{title} labels".strip())
    if table is not None:
        storage = "vtkMRMLColorTableStorageNode1"
        _add(
            root, "ColorTable", "vtkMRMLColorTableNode1", "labels colours",
            references=f"storage:{storage};", type=_FILE_COLORS, userTags="",
        )  # fmt: skip
        _add(
            root,
            "ColorTableStorage",
            storage,
            "labels colours storage",
            fileName="Data/labels.ctbl",
        )
    references = "ActiveVolume:vtkMRMLScalarVolumeNode1;"
    _add(
        root,
        "Selection",
        "vtkMRMLSelectionNodeSingleton",
        "Selection",
        singletonTag="Singleton",
        references=references,
    )
    low, high = _extent(scan)
    centre = _labelled_centre(labels)
    _add_views(
        root,
        (low + high) / 2 if centre is None else centre,
        float((high - low).max()),
        spacing_mm=scan.spacing_mm,
    )
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True) + b"\n"


def _add(
    root: ElementTree.Element, kind: str, identifier: str, name: str, **attributes: str
) -> None:
    ElementTree.SubElement(root, kind, {"id": identifier, "name": name} | attributes)


def _add_scan(root: ElementTree.Element, contrast: Contrast, name: str) -> None:
    display, storage = "vtkMRMLScalarVolumeDisplayNode1", "vtkMRMLVolumeArchetypeStorageNode1"
    references = f"display:{display};storage:{storage};"
    _add(root, "Volume", "vtkMRMLScalarVolumeNode1", name, references=references)
    _add(
        root, "VolumeDisplay", display, "scan display",
        colorNodeID="vtkMRMLColorTableNodeGrey", autoWindowLevel="0", interpolate="1",
        window=f"{contrast.high - contrast.low:.6g}",
        level=f"{(contrast.high + contrast.low) / 2:.6g}",
    )  # fmt: skip
    _add(
        root,
        "VolumeArchetypeStorage",
        storage,
        "scan storage",
        fileName="Data/scan.nrrd",
        useCompression="1",
    )


def _add_segmentation(root: ElementTree.Element, name: str) -> None:
    display, storage = "vtkMRMLSegmentationDisplayNode1", "vtkMRMLSegmentationStorageNode1"
    references = (
        f"display:{display};storage:{storage};referenceImageGeometryRef:vtkMRMLScalarVolumeNode1;"
    )
    _add(root, "Segmentation", "vtkMRMLSegmentationNode1", name, references=references)
    _add(
        root, "SegmentationDisplay", display, "labels display",
        visibility="true", visibility2D="true", visibility3D="true", Visibility2DFill="true",
        Visibility2DOutline="true", Opacity2DFill="0.5", Opacity2DOutline="1", Opacity3D="1",
    )  # fmt: skip
    _add(
        root,
        "SegmentationStorage",
        storage,
        "labels storage",
        fileName="Data/labels.seg.nrrd",
        useCompression="1",
    )


def _add_views(
    root: ElementTree.Element,
    centre: NDArray,
    extent_mm: float,
    spacing_mm: tuple[float, float, float],
) -> None:
    """Four views: three slices through `centre` that show the whole scan, and 3D from the front."""
    field = f"{extent_mm * 1.1:.6g}"
    for name, (letter, color, orientation, axes) in _SLICES.items():
        turn = np.array(axes, float)
        place = np.eye(4)
        place[:3, :3], place[:3, 3] = turn, centre
        _add(
            root, "Slice", f"vtkMRMLSliceNode{name}", name,
            singletonTag=name, layoutName=name, layoutLabel=letter, layoutColor=color,
            visibility="true",
            active="false", backgroundColor="0 0 0", backgroundColor2="0 0 0",
            AxisLabels="L;R;P;A;I;S",
            fieldOfView=f"{field} {field} {min(spacing_mm):.6g}", dimensions="512 512 1",
            xyzOrigin="0 0 0",
            sliceResolutionMode="1", uvwExtents=f"{field} {field} {min(spacing_mm):.6g}",
            uvwDimensions="256 256 1",
            uvwOrigin="0 0 0", sliceToRAS=_numbers(place), jumpMode="1", sliceVisibility="false",
            orientation=orientation, orientationReference=orientation,
            **{f"orientationMatrix{o}": _numbers(np.array(a)) for _, _, o, a in _SLICES.values()},
        )  # fmt: skip
        _add(
            root, "SliceComposite", f"vtkMRMLSliceCompositeNode{name}", "SliceComposite",
            singletonTag=name, layoutName=name,
            references="backgroundVolume:vtkMRMLScalarVolumeNode1;",
        )  # fmt: skip
    _add(
        root, "View", "vtkMRMLViewNode1", "View1",
        singletonTag="1", layoutName="1", layoutLabel="1", boxVisible="false",
    )  # fmt: skip
    front = centre + np.array([0, 2.5 * extent_mm, 0])
    _add(
        root, "Camera", "vtkMRMLCameraNode1", "Camera", singletonTag="1", layoutName="1",
        viewUp="0 0 1",
        position=_numbers(front), focalPoint=_numbers(centre), viewAngle="30",
        parallelProjection="false",
    )  # fmt: skip
    _add(
        root, "Layout", "vtkMRMLLayoutNodevtkMRMLLayoutNode", "Layout",
        singletonTag="vtkMRMLLayoutNode", currentViewArrangement=_FOUR_UP,
    )  # fmt: skip


def _extent(volume: Volume) -> tuple[NDArray, NDArray]:
    """The corner of least and of largest RAS+ mm coordinates that the voxels of a volume reach."""
    corners = np.array(
        [(*corner, 1.0) for corner in product(*((-0.5, n - 0.5) for n in volume.shape))]
    )
    places = (corners @ volume.affine.T)[:, :3]
    return places.min(axis=0), places.max(axis=0)


def _labelled_centre(labels: Volume) -> NDArray | None:
    """RAS+ mm of the middle of the box around all labels, or None if there are none."""
    sides = [np.flatnonzero(labels.data.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not all(len(side) for side in sides):
        return None
    middle = [(side[0] + side[-1]) / 2 for side in sides]
    return (labels.affine @ (*middle, 1.0))[:3]


def _numbers(array: NDArray) -> str:
    return " ".join(f"{x:.9g}" for x in np.asarray(array, float).ravel() + 0.0)


def _member(name: str, compression: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _NO_DAY)
    info.compress_type = compression
    info.external_attr = 0o100644 << 16
    info.create_system = 3  # Unix, on every system
    return info
