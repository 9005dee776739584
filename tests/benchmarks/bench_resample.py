"""Time of interpolating images and of painting labels from logits, against other packages in the
same run.

python tests/benchmarks/bench_resample.py [--runs 3] [--small] [--skip image|logits]

Images: cubic against scipy (the truth) and skimage.transform.resize as nnU-Net calls it (where
installed), linear and oblique against scipy. Logits of 25 classes are painted on a finer grid by
`painter.Painter` and, on the same thread, by trilinear interpolation class by class with a running
maximum; labels that differ are counted, with their margin.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Volume, resample


def timed(work: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Median seconds, and the last result."""
    seconds, result = [], None
    for _ in range(runs):
        result = None
        begun = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), result


def scan(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Smooth anatomy and noise as CT has it: int16 from about -1000 to 1500."""
    random = np.random.default_rng(0)
    waves = [np.sin(np.linspace(0, 9 + axis, n) + axis) for axis, n in enumerate(shape)]
    image = 700 * waves[0][:, None, None] * waves[1][:, None] * waves[2]
    return (image + random.normal(0, 20, shape)).astype(np.int16)


def resized_affine(shape: tuple[int, ...], new: tuple[int, ...]) -> NDArray[np.float64]:
    """The grid of `new` voxels over the same extent as `shape` voxels of 1 mm."""
    ratio = np.array(shape) / np.array(new)
    affine = np.diag([*ratio, 1.0])
    affine[:3, 3] = ratio / 2 - 0.5
    return affine


def images(cases: list[tuple[tuple[int, int, int], tuple[int, int, int]]], runs: int) -> None:
    """Cubic and linear, parallel and oblique grids: seconds, and the largest difference as a share
    of the range.
    """
    for shape, new in cases:
        volume = Volume(scan(shape), np.eye(4))
        straight = resized_affine(shape, new)
        oblique = straight.copy()
        oblique[:3, :3] = rotation(0.2) @ straight[:3, :3]
        print(f"\n{'x'.join(map(str, shape))} int16 to {'x'.join(map(str, new))}")
        for order, name in ((3, "cubic"), (1, "linear")):
            one_image(name, volume, straight, new, order, runs)
            one_image(f"{name}, oblique", volume, oblique, new, order, runs)


def one_image(
    name: str, volume: Volume, affine: NDArray, new: tuple[int, int, int], order: int, runs: int
) -> None:
    """Lines for one kind of interpolation."""
    spread = float(np.ptp(volume.data))

    def line(package: str, seconds: float, note: str = "") -> None:
        print(f"  {name:<16}{package:<20}{seconds:7.2f} s  {note}")

    resample(volume, affine, (8, 8, 8), order=order)  # compiles
    mine, ours = timed(lambda: resample(volume, affine, new, order=order).data, runs)
    line("medseg", mine)
    there, peer = timed(lambda: scipys(volume, affine, new, order), 1)
    difference = np.abs(ours - peer) / spread
    # Rounding decides whether a point exactly on the border of the scan is inside.
    border = int((difference > 1e-3).sum())
    worst = difference[difference <= 1e-3].max()
    line(
        "scipy, float64",
        there,
        f"{there / mine:5.1f} x; differs {worst:.1e}; {border} points on the border",
    )
    if "oblique" in name:
        return
    if find_spec("skimage") is None:
        print(f"  {name:<16}skimage is not installed")
        return
    there, peer = timed(lambda: skimages(volume.data, new, order), 1)
    # At the border it continues the image, scipy ends it.
    inner = tuple(slice(16, -16) for _ in range(3))
    clipped = np.clip(ours, volume.data.min(), volume.data.max())
    worst = (np.abs(clipped - peer)[inner] / spread).max()
    line("skimage as nnU-Net", there, f"{there / mine:5.1f} x; differs {worst:.1e}")


def model_grids(cases: list[tuple[tuple[int, int, int], float, float]], runs: int) -> None:
    """A scan on a coarser grid, every voxel the mean of several points, as the network's input is
    made.
    """
    from scipy import ndimage

    for shape, spacing, wanted in cases:
        data = np.asfortranarray(scan(shape))
        new = tuple(int(np.ceil(n * spacing / wanted)) for n in shape)
        points = (max(1, round(wanted / spacing)),) * 3
        affine = resized_affine(shape, new)
        volume = Volume(data, np.eye(4))
        resample(volume, affine, (8, 8, 8), points=points)
        mine, ours = timed(
            lambda v=volume, a=affine, n=new, p=points: resample(v, a, n, points=p).data, runs
        )

        def fine(
            volume: Volume = volume, new: Any = new, affine: Any = affine, points: Any = points
        ) -> NDArray:
            out = np.empty(new, np.float32)
            many = np.array(points)
            step = np.diag(affine)[:3] / many
            offset = affine[:3, 3] + step * (1 - many) / 2
            for i in range(0, new[0], 16):
                count = min(16, new[0] - i)
                start = offset + np.array((step[0] * many[0] * i, 0, 0))
                shape = (count * many[0], *(np.array(new[1:]) * many[1:]))
                part = ndimage.affine_transform(
                    volume.data, step, start, output_shape=shape, output=np.float32, order=1
                )
                blocks = part.reshape(count, many[0], new[1], many[1], new[2], many[2])
                out[i : i + count] = blocks.mean((1, 3, 5))
            return out

        there, peer = timed(fine, 1)
        worst = np.abs(ours - peer).max() / np.ptp(data)
        print(
            f"\n{'x'.join(map(str, shape))} at {spacing} mm to {wanted} mm, means of {points[0]}"
            " points an axis"
        )
        print(f"  medseg, points={points[0]}         {mine:7.2f} s")
        print(
            f"  scipy, then means        {there:7.2f} s  {there / mine:5.1f} x; differs {worst:.1e}"
        )


def scipys(volume: Volume, affine: NDArray, shape: tuple[int, int, int], order: int) -> NDArray:
    """What scipy gives in float64."""
    from scipy import ndimage

    matrix: NDArray = affine[:3, :3]
    if not np.any(matrix - np.diag(np.diag(matrix))):
        matrix = np.diag(matrix)
    return ndimage.affine_transform(
        volume.data.astype(np.float64),
        matrix,
        affine[:3, 3],
        output_shape=shape,
        order=order,
        mode="constant",
    )


def skimages(data: NDArray, shape: tuple[int, int, int], order: int) -> NDArray:
    """As nnU-Net's resample_data_or_seg does."""
    from skimage.transform import resize

    return resize(data.astype(np.float64), shape, order, mode="edge", anti_aliasing=False)


def rotation(angle: float) -> NDArray[np.float64]:
    """A turn about an axis that is none of the grid's."""
    axis = np.array([1.0, 2, 3]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def logits(
    small: tuple[int, int, int], large: tuple[int, int, int], classes: int, runs: int
) -> None:
    """Painter against plain trilinear interpolation and arg-max, both on one thread."""
    import torch
    from torch.nn import functional as F

    from medseg.inference.painter import Painter

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, classes, *(max(2, n // 16) for n in small), generator=generator)
    smooth = F.interpolate(coarse, small, mode="trilinear", align_corners=True)[0] * 4
    to_model = resized_affine(small, large)
    blocks = smooth.permute(1, 2, 3, 0).contiguous().numpy()  # as the sliding window gives them

    def paint() -> NDArray:
        painter = Painter(large, to_model, small, range(classes), workers=1)
        for first in range(0, small[0], 48):
            painter.add(first, 0, blocks[first : first + 48])
        return painter.labels

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        best = torch.full(large, -torch.inf)
        second = torch.full(large, -torch.inf)
        labels = torch.zeros(large, dtype=torch.uint8)
        for n in range(classes):
            one = F.interpolate(
                smooth[None, n : n + 1], large, mode="trilinear", align_corners=False
            )[0, 0]
            higher = one > best
            second = torch.maximum(second, torch.minimum(one, best))
            best = torch.maximum(best, one)
            labels[higher] = n
        return labels, best - second

    def only_labels() -> None:
        best = F.interpolate(smooth[None, :1], large, mode="trilinear", align_corners=False)[0, 0]
        labels = torch.zeros(large, dtype=torch.uint8)
        for n in range(1, classes):
            one = F.interpolate(
                smooth[None, n : n + 1], large, mode="trilinear", align_corners=False
            )[0, 0]
            labels.masked_fill_(one > best, n)
            torch.maximum(best, one, out=best)

    paint()  # compiles
    mine, ours = timed(paint, runs)
    plain_seconds, _ = timed(only_labels, 1)
    labels, margin = plain()
    differs = torch.from_numpy(ours) != labels
    worst = float(margin[differs].max()) if differs.any() else 0.0
    print(
        f"\nlogits of {classes} classes, {'x'.join(map(str, small))} to"
        f" {'x'.join(map(str, large))}, one thread"
    )
    print(f"  painter.Painter                     {mine:7.2f} s")
    print(
        f"  torch, class by class               {plain_seconds:7.2f} s "
        f" {plain_seconds / mine:5.1f} x"
    )
    print(
        f"  labels that differ: {int(differs.sum())} of {labels.numel()}; largest margin there"
        f" {worst:.1e}"
    )
    print(f"  (spread of the logits {float(smooth.max() - smooth.min()):.1f})")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="sizes for a look at the script itself"
    )
    parser.add_argument("--skip", choices=("image", "logits"))
    options = parser.parse_args()
    cases = [
        ((200, 256, 256), (160, 200, 200)),
        ((300, 512, 512), (250, 273, 273)),
        ((150, 256, 256), (300, 512, 512)),
    ]
    sizes: tuple[tuple[int, int, int], tuple[int, int, int]] = (250, 273, 273), (300, 512, 512)
    heads = [((256, 256, 256), 1.0, 1.6), ((512, 512, 600), 0.8, 1.5)]
    if options.small:
        cases, sizes = [((50, 64, 64), (40, 50, 50))], ((60, 70, 70), (75, 130, 130))
        heads = [((60, 70, 80), 1.0, 1.6)]
    if options.skip != "image":
        images(cases, options.runs)
        model_grids(heads, options.runs)
    if options.skip != "logits":
        logits(*sizes, 25, options.runs)


if __name__ == "__main__":
    sys.exit(main())
