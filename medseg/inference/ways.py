"""What a network sees of a scan, and the way of its answers back: medseg's own grids, and the
frames of foreign models.

A `Way` is all that the engine (`segmentation`) asks; it does not know whose model it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.inference.frame import Frame, content_mask, one_hot, prepare_frame
from medseg.inference.preprocess import ModelGrid, prepare, scan_to_grid
from medseg.inference.settings import Settings
from medseg.models import Recipe
from medseg.volume import Volume

if TYPE_CHECKING:
    import torch

    from medseg.inference.backends.predictor import Predictor
    from medseg.inference.forecast import Plan
    from medseg.inference.painter import Painter
    from medseg.inference.window import Block, MakeSums
    from medseg.models import Checkpoint, ModelSpec

#: A plane of the model's input belongs to the content if any of its voxels is brighter than this
#: share.
CONTENT_ABOVE = 0.1
#: Voxels kept around the content.
CONTENT_MARGIN = 6
#: Logit of every other class where a voxel is known to be background.
NEVER = -1e4


@dataclass(kw_only=True)
class Way:
    """image: (C, X, Y, Z) over which windows are laid; after that it may be dropped.

    low, size: what of it is the scan's, where it was padded. patch: the sides of a window. layout,
    weighting: names of `window`.
    painter: what paints a predictor's answers. back: what was painted, (X, Y, Z) to the scan's own
    grid (I, J, K).
    """

    image: torch.Tensor
    low: tuple[int, ...]
    size: tuple[int, ...]
    patch: tuple[int, int, int]
    layout: str
    weighting: str
    overlap: float | tuple[float, float, float]
    painter: Callable[[Predictor], Painter]
    back: Callable[[NDArray], NDArray]
    make_sums: MakeSums | None = None

    def trimmed(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The blocks without the padding, counted from the scan's first voxel."""
        from medseg.inference.window import Block

        if not any(self.low) and tuple(self.image.shape[1:]) == self.size:
            yield from blocks
            return
        for block in blocks:
            begin = (block.x, block.y, 0)
            first = [max(0, low - at) for low, at in zip(self.low, begin)]
            last = [
                min(length, low + size - at)
                for length, low, size, at in zip(block.data.shape, self.low, self.size, begin)
            ]
            if all(a < b for a, b in zip(first, last)):
                part = block.data[tuple(slice(a, b) for a, b in zip(first, last))]
                x, y = (at + a - low for at, a, low in zip(begin[:2], first[:2], self.low[:2]))
                if isinstance(part, np.ndarray):
                    yield Block(x, y, np.ascontiguousarray(part))
                else:
                    yield Block(x, y, part.contiguous())


def painter_class(made: Plan) -> Callable[..., Painter]:
    """What paints: the CPU, or the card that the features lie on."""
    from medseg.inference.painter import Painter

    if not made.data_on_card:
        return Painter
    import torch

    from medseg.inference.backends.painting import CardPainter

    return partial(CardPainter, device=torch.device(made.device))


def content_box(image: torch.Tensor) -> tuple[slice, slice, slice]:
    """The part of a model input (C, X, Y, Z) that is more than air, with a margin; all of it if
    there is only air.

    Windows are laid over this part, so that air around a head, however much of it a scan has,
    changes nothing: instance norm would otherwise see another mean with every margin.
    """
    content = image[0] > CONTENT_ABOVE
    for channel in image[1:]:
        content |= channel > CONTENT_ABOVE
    box = []
    for axis in range(3):
        planes = content.any(dim=tuple({0, 1, 2} - {axis})).nonzero()
        size = content.shape[axis]
        first, last = (int(planes[0]), int(planes[-1])) if len(planes) else (0, size - 1)
        box.append(slice(max(0, first - CONTENT_MARGIN), min(size, last + 1 + CONTENT_MARGIN)))
    return box[0], box[1], box[2]


def own_way(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    made: Plan,
    previous: Volume | None,
) -> Way:
    """The way of medseg's own models, whose grid lies along the world's axes or the scan's."""
    spec = checkpoints[0].spec
    image, grid = prepare(
        volumes, spec.spacing, spec.grid, spec.intensities, names=spec.channel_names
    )
    x, y, z = grid.shape
    box = content_box(image) if spec.dark_air else (slice(0, x), slice(0, y), slice(0, z))
    cut = image[:, *box]
    return Way(
        image=cut,
        low=(0, 0, 0),
        size=tuple(cut.shape[1:]),
        patch=spec.patch,
        layout="even",
        weighting="floored",
        overlap=settings.share(spec),
        painter=lambda predictor: _own_painter(
            volumes[0],
            spec,
            predictor=predictor,
            settings=settings,
            grid=grid,
            box=box,
            make=painter_class(made),
        ),
        back=lambda painted: painted,
    )


def _own_painter(
    volume: Volume,
    spec: ModelSpec,
    predictor: Predictor,
    settings: Settings,
    grid: ModelGrid,
    box: tuple[slice, slice, slice],
    make: Callable[..., Painter],
) -> Painter:
    """A painter of what the model says inside the content box; the rest of the scan is
    background."""
    import torch

    head = predictor.head
    limits = [
        (
            0.0 if side.start else -np.inf,
            side.stop - side.start - 1.0 if side.stop < size else np.inf,
        )
        for side, size in zip(box, grid.shape)
    ]
    if head is not None and spec.skip_empty:  # one more feature says that a window was left out
        never = np.full((spec.outputs, 1), NEVER, np.float32)
        never[: not spec.regions] = 0
        head = head.with_feature(never.repeat(predictor.cell**3, 0))
    return make(
        volume.shape,
        scan_to_grid(volume, grid, [side.start for side in box]),
        [side.stop - side.start for side in box],
        values=spec.classes,
        head=head,
        regions=spec.regions,
        wanted=wanted_outputs(spec, settings),
        limits=limits,
        certain=True,
        cell=predictor.cell,
        workers=torch.get_num_threads(),
    )


def wanted_outputs(spec: ModelSpec, settings: Settings) -> list[int] | None:
    """The outputs whose probabilities are asked for; None where no map is."""
    if settings.every_output:
        return list(range(spec.outputs))
    outputs = [spec.classes.index(value) - spec.regions for value in settings.probabilities]
    return outputs if outputs or settings.uncertainty else None


def foreign_way(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    made: Plan,
    previous: Volume | None,
) -> Way:
    """The way of a model of nnU-Net; previous: the labels of its first stage, on the scan's grid.

    With `made.half` sums and logits are in half precision.
    """
    import torch

    spec = checkpoints[0].spec
    recipe, frame, half = spec.recipe, made.grid, made.half
    assert isinstance(recipe, Recipe) and isinstance(frame, Frame)
    array = prepare_frame(volumes, recipe, frame, exact=settings.exact, previous=previous)
    if previous is not None:
        mask = content_mask([frame.seen(volume) for volume in volumes])
        array = np.concatenate(
            (array, one_hot(previous, recipe.previous, recipe, frame=frame, mask=mask))
        )
    low, image = _padded(torch.from_numpy(array), spec.patch, recipe.padding)
    make_sums: MakeSums | None = None
    if half:
        from medseg.inference.exact import HalfSums

        make_sums = partial(HalfSums, folds=len(checkpoints))
    return Way(
        image=image,
        low=low,
        size=frame.shape,
        patch=spec.patch,
        layout=recipe.layout,
        weighting=recipe.weights,
        overlap=settings.share(spec),
        painter=lambda predictor: _frame_painter(
            spec, predictor, settings, frame=frame, half=half, make=painter_class(made)
        ),
        back=frame.back,
        make_sums=make_sums,
    )


def _padded(
    image: torch.Tensor, patch: Sequence[int], padding: str
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Where the image begins in what is padded with zeros to at least a patch, and that."""
    from torch.nn import functional as F

    missing = [max(0, wanted - have) for wanted, have in zip(patch, image.shape[1:])]
    low = tuple(PADDINGS[padding](n) for n in missing)
    if any(missing):  # padding copies, even by nothing
        image = F.pad(image, [n for a, b in list(zip(low, missing))[::-1] for n in (a, b - a)])
    return low, image


#: Name in a recipe -> how many of the planes that are missing along an axis come before the image.
PADDINGS: dict[str, Callable[[int], int]] = {
    "both": lambda missing: missing // 2,
    "behind": lambda missing: 0,
}


def _frame_painter(
    spec: ModelSpec,
    predictor: Predictor,
    settings: Settings,
    frame: Frame,
    *,
    half: bool,
    make: Callable[..., Painter],
) -> Painter:
    import torch

    target = frame.painted()
    shared: dict[str, Any] = {
        "regions": spec.regions,
        "wanted": wanted_outputs(spec, settings),
        "certain": True,
        "workers": torch.get_num_threads(),
    }
    if half:
        from medseg.inference.exact import HalfPainter

        # PyTorch's resampling leaves logits in float32; scikit-image's are stored as half
        # precision.
        halved = frame.logits.scheme != "linear"
        shared |= {"halved": halved, "raw": settings.every_output}
        return HalfPainter(target.shape, target.to_model, frame.shape, spec.classes, **shared)
    return make(
        target.shape,
        target.to_model,
        frame.shape,
        values=spec.classes,
        head=predictor.head,
        **shared,
    )
