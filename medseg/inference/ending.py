"""The way of MONAI's models: their transforms, their windows, and what becomes of the network's
outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadFile, DataWarning
from medseg.inference.journey import Journey, Target
from medseg.inference.painter import EVERY, Head, Painter
from medseg.inference.settings import Settings
from medseg.inference.transforms import travel
from medseg.inference.ways import Way, wanted_outputs
from medseg.kernels.threads import in_slabs
from medseg.models import Ending, StepRecipe
from medseg.postprocess import keep_largest
from medseg.volume import Volume

if TYPE_CHECKING:
    import torch

    from medseg.inference.backends.predictor import Predictor
    from medseg.inference.forecast import Plan
    from medseg.inference.window import MakeSums
    from medseg.models import Checkpoint, ModelSpec

#: Longest side of a window that is the whole image.
MOST_VOXELS = 1024


def journey_way(
    volumes: Sequence[Volume],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    made: Plan,
    previous: Volume | None,
) -> Way:
    """The way of a model whose recipe is a list of steps. Raises `BadFile` for scans that do not
    fit them."""
    import torch

    spec, recipe = checkpoints[0].spec, checkpoints[0].spec.recipe
    assert isinstance(recipe, StepRecipe) and isinstance(made.grid, Journey)
    for note in spec.card.get("notes", []):
        warnings.warn(str(note), DataWarning, stacklevel=2)
    image, journey = travel(volumes, made.grid)
    patch = window_of(recipe, spec.patch, journey.shape)
    low, image = _padded(image, patch, recipe)
    make_sums: MakeSums | None = None
    if recipe.weights == "gaussian":
        from medseg.inference.window import MappedSums, gaussian_map

        make_sums = partial(
            MappedSums,
            weights=gaussian_map(patch, recipe.sigma_scale),
            device=torch.device(made.device if made.sums_on_card else "cpu"),
        )
    return Way(
        image=image,
        low=low,
        size=journey.shape,
        patch=patch,
        layout=recipe.layout,
        weighting="constant",
        overlap=settings.share(spec),
        painter=lambda predictor: _painter(spec, predictor, settings, journey=journey),
        back=partial(_back, journey=journey, ending=recipe.ending),
        make_sums=make_sums,
    )


def window_of(
    recipe: StepRecipe, patch: Sequence[int], shape: Sequence[int]
) -> tuple[int, int, int]:
    """The sides of a window: along some axes perhaps those of the whole image. Raises `BadFile`
    where that is longer than any window."""
    sides = [size if whole else side for side, whole, size in zip(patch, recipe.whole, shape)]
    if max(sides) > MOST_VOXELS:
        raise BadFile(
            f"is {max(sides)} voxels long on the model's grid, which looks at the whole of it at"
            f" once; crop it to {MOST_VOXELS} at most"
        )
    return sides[0], sides[1], sides[2]


def _padded(
    image: torch.Tensor, patch: Sequence[int], recipe: StepRecipe
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Where the image begins in what is padded on both sides to at least a window, and that."""
    from torch.nn import functional as F

    missing = [max(0, wanted - have) for wanted, have in zip(patch, image.shape[1:])]
    low = tuple(n // 2 for n in missing)
    if any(missing):
        sides = [n for a, b in list(zip(low, missing))[::-1] for n in (a, b - a)]
        options = {"value": recipe.padding_value} if recipe.padding == "constant" else {}
        try:
            image = F.pad(image[None], sides, mode=recipe.padding, **options)[0]
        except RuntimeError:  # a mirror needs more than it is to add
            raise BadFile(
                f"is too small to be padded to the model's window by {recipe.padding!r}; give a"
                " larger part of the scan"
            ) from None
    return low, image.contiguous()


def _painter(
    spec: ModelSpec, predictor: Predictor, settings: Settings, journey: Journey
) -> Painter:
    import torch

    recipe = spec.recipe
    assert isinstance(recipe, StepRecipe)
    return OutputPainter(
        journey.target() if recipe.ending.interpolate else own_target(journey),
        journey.shape,
        spec.classes,
        ending=recipe.ending,
        head=predictor.head,
        regions=spec.regions,
        wanted=wanted_outputs(spec, settings),
        workers=torch.get_num_threads(),
    )


def own_target(journey: Journey) -> Target:
    """The network's own grid, on which outputs decide where they are."""
    return Target(
        shape=journey.shape,
        matrix=np.eye(4),
        low=np.zeros(3),
        high=np.array(journey.shape) - 1.0,
        axes=(0, 1, 2),
    )


def _back(painted: NDArray, *, journey: Journey, ending: Ending) -> NDArray:
    """What was painted on the scan's own grid; of labels only the parts that are to stay."""
    labels = np.issubdtype(painted.dtype, np.integer)
    if labels and ending.inner:
        painted = keep_largest(painted, ending.inner, count=ending.parts)
    back = journey.back_from_target if ending.interpolate else journey.back
    array = back(painted)
    if labels and ending.outer:
        array = keep_largest(array, ending.outer, count=ending.parts)
    return array


class OutputPainter(Painter):
    """Labels of outputs that become probabilities before they are interpolated, or where they
    are."""

    def __init__(
        self,
        target: Target,
        size: Sequence[int],
        values: Sequence[int],
        *,
        ending: Ending,
        head: Head | None,
        regions: bool,
        wanted: Sequence[int] | None,
        workers: int,
    ) -> None:
        """target: the grid to be painted. size: the network's array. Others are of `Painter`."""
        super().__init__(
            target.shape,
            target.matrix,
            size,
            values,
            regions=regions,
            wanted=wanted,
            certain=True,
            workers=workers,
        )
        self._low, self._high = target.low, target.high
        self._ending, self._last = ending, head

    def add(self, x: int, y: int, block: NDArray[np.float32]) -> None:
        """Paint what lies between the planes seen; outputs are made what is compared first."""
        super().add(x, y, self._activated(block))

    def _activated(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        outputs = torch.from_numpy(block)
        if self._last is not None:
            outputs = torch.nn.functional.linear(
                outputs, torch.from_numpy(self._last.weights), torch.from_numpy(self._last.bias)
            )
        outputs = ACTIVATIONS[self._ending.activation](outputs)
        if self._ending.order:
            outputs = outputs[..., list(self._ending.order)]
        values: NDArray[np.float32] = outputs.contiguous().numpy()
        return values

    def _paint(self, x: int, y: int, block: NDArray[np.float32], inner: bool = False) -> None:
        from medseg.kernels.outputs import choose_outputs, paint_outputs
        from medseg.kernels.painting import agree

        best = np.empty(block.shape[:3], np.uint16)
        cells = np.empty_like(best)
        rule = (self._regions, self._ending.threshold)
        self._shared(lambda a, b: choose_outputs(a, b, block, *rule, best), len(block))
        self._shared(lambda a, b: agree(a, b, best, cells), len(block))
        if self._asked and inner:
            self._count(block, best)
        (first_i, last_i), (first_j, last_j) = self._reach((x, y), block.shape)
        map_outputs = np.zeros(0, np.int64) if self._wanted is None else self._wanted
        origin = np.array((x, y), np.int64)
        shares = self._ending.activation != "none"
        rest = (
            *(self.labels, self.maps, self._matrix, block, cells, origin, self._size),
            *(self._low, self._high, *rule, shares, map_outputs, self.values),
        )

        def work(a: int, b: int) -> None:
            paint_outputs(first_i + a, first_i + b, first_j, last_j, *rest)

        self._shared(work, last_i - first_i)

    def _shared(self, work: Callable[[int, int], Any], count: int) -> None:
        in_slabs(work, count, workers=self._workers)

    def _count(self, block: NDArray[np.float32], best: NDArray[np.uint16]) -> None:
        """Count how probable the chosen classes are, of every eighth voxel or so."""
        from medseg.kernels.outputs import count_outputs

        every = (slice(None, None, EVERY),) * 3
        count_outputs(
            np.ascontiguousarray(block[every]),
            np.ascontiguousarray(best[every]),
            self._regions,
            self._ending.activation != "none",
            self._certain,
        )


def _as_they_are(outputs: torch.Tensor) -> torch.Tensor:
    return outputs


def _softmax(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.softmax(-1)


def _sigmoid(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.sigmoid()


#: Name in a recipe -> what outputs (..., K) become before they are compared or interpolated.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": _as_they_are,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
}
