"""Make the extension's pictures: the icon anywhere, the screenshot in Slicer's libraries.

    python medseg/view/slicer/make_pictures.py icon
    python medseg/view/slicer/make_pictures.py screenshot SCAN LABELS.seg.nrrd

The second needs `pip install "trame-slicer[standalone]"`; what it shows is drawn by Slicer's views.
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ICONS = (HERE / "MedSeg.png", HERE / "MedSeg" / "Resources" / "Icons" / "MedSeg.png")
SCREENSHOT = HERE / "Screenshots" / "brain.png"
_SIDE = 128
_VIEW = 400


def icon(side: int = _SIDE) -> NDArray[np.uint8]:
    """A head from above with two structures, as (row, column, RGBA)."""
    fine = 4  # times as fine, then averaged, so that edges are smooth
    at = (np.arange(side * fine) + 0.5) / (side * fine) * 2 - 1
    x, y = at[None, :], at[:, None]
    picture = np.zeros((side * fine, side * fine, 4))

    def paint(inside: NDArray[np.bool_], red: int, green: int, blue: int) -> None:
        picture[inside] = (red, green, blue, 255)

    def ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> NDArray[np.bool_]:
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1

    paint(ellipse((0, 0), (0.78, 0.97)), 225, 229, 233)
    paint(ellipse((0, 0), (0.68, 0.87)), 84, 92, 102)
    paint(ellipse((-0.26, -0.16), (0.27, 0.42)), 88, 178, 236)
    paint(ellipse((0.30, 0.16), (0.22, 0.34)), 240, 160, 60)
    return picture.reshape(side, fine, side, fine, 4).mean(axis=(1, 3)).round().astype(np.uint8)


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture of RGB or RGBA as the bytes of a PNG file (ISO/IEC 15948)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width, values = picture.shape
    lines = np.hstack([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)])
    head = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[values], 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


def screenshot(scan: str, labels: str) -> NDArray[np.uint8]:
    """Three slices of a scan with its segmentation, as Slicer draws them."""
    import slicer
    from trame_slicer.core import SlicerApp
    from trame_slicer.views import (
        DirectViewFactory,
        ViewLayoutDefinition,
        ViewProps,
        ViewType,
    )

    app = SlicerApp()
    app.view_manager.register_factory(DirectViewFactory(do_render_offscreen=True))
    views = []
    for name, orientation in (("Red", "Axial"), ("Green", "Coronal"), ("Yellow", "Sagittal")):
        properties = ViewProps(orientation=orientation, label=name[0])
        definition = ViewLayoutDefinition(name, ViewType.SLICE_VIEW, properties)
        views.append(app.view_manager.create_view(definition))
    volume = app.io_manager.load_volumes([scan])[0]
    node = app.segmentations_logic.LoadSegmentationFromFile(
        labels, True, None, None, slicer.vtkMRMLMessageCollection()
    )
    node.GetDisplayNode().SetOpacity2DFill(0.45)
    app.display_manager.show_volume(volume, do_reset_views=True)
    pictures = [_picture(view) for view in views]
    return np.hstack(pictures)


def _picture(view: Any) -> NDArray[np.uint8]:
    import vtkmodules.all as vtk
    from vtkmodules.util.numpy_support import vtk_to_numpy

    view.render_window().SetSize(_VIEW, _VIEW)
    if hasattr(view.get_view_node(), "SetDimensions"):
        view.get_view_node().SetDimensions(_VIEW, _VIEW, 1)
    for reset in ("fit_view_to_content", "reset_view", "reset_focal_point"):
        if hasattr(view, reset):
            getattr(view, reset)()
    for _ in range(3):
        view.render()
    view.render_window().Render()
    grab = vtk.vtkWindowToImageFilter()
    grab.SetInput(view.render_window())
    grab.ReadFrontBufferOff()
    grab.Update()
    image = grab.GetOutput()
    width, height, _ = image.GetDimensions()
    values = vtk_to_numpy(image.GetPointData().GetScalars())
    return values.reshape(height, width, -1)[::-1, :, :3].copy()


def main() -> None:
    """Write the pictures that the words of the command ask for."""
    if sys.argv[1:2] == ["screenshot"]:
        picture = screenshot(*sys.argv[2:4])
        SCREENSHOT.parent.mkdir(exist_ok=True)
        SCREENSHOT.write_bytes(png(picture))
        return
    for path in ICONS:
        path.write_bytes(png(icon()))


if __name__ == "__main__":
    main()
