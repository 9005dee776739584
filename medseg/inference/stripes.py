"""The windows over a scan, run stripe by stripe, and what is finished painted: on a CPU one after
the other, with a GPU beside each other.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DataWarning
from medseg.inference.forecast import Plan, window_count
from medseg.inference.ways import CONTENT_ABOVE, NEVER, Way
from medseg.logs import Progress

if TYPE_CHECKING:
    import torch

    from medseg.inference.backends.copies import Courier, Event, Fetched
    from medseg.inference.backends.predictor import Predictor
    from medseg.inference.painter import Painter
    from medseg.inference.window import Block
    from medseg.models import Checkpoint, ModelSpec


Made = TypeVar("Made")


class Clock:
    """Seconds of what overlaps nothing else, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The seconds of a block go to this name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _of_air(spec: ModelSpec, predictor: Predictor) -> list[float]:
    """What a predictor would say of a voxel of background."""
    if predictor.head is not None:
        return [0.0] * predictor.features + [1.0]
    return [NEVER if spec.regions else 0.0] + [NEVER] * (spec.outputs - 1)


def _predicted(
    predictor: Predictor, clock: Clock, what: str, patches: torch.Tensor
) -> torch.Tensor:
    """The features of patches. Raises as `_on_device`."""

    def work() -> torch.Tensor:
        with clock("network"):
            return predictor(patches)

    return _on_device(what, work)


def _on_device(what: str, work: Callable[[], Made]) -> Made:
    """What some work on a device makes. Raises `NotEnoughMemory`, `DeviceFailed`."""
    from medseg.inference.backends.cards import in_sentences

    return in_sentences(work, full=f"there is no memory for {what}; use --batch 1 or --device cpu")


def paint_windows(
    painter: Painter,
    predictor: Predictor,
    *,
    way: Way,
    checkpoint: Checkpoint,
    made: Plan,
    clock: Clock,
    progress: Progress,
) -> None:
    """Run the windows over the content of a scan and paint what is finished. Raises `NotFinite`
    where it has to be done again, and as `_on_device`.
    """
    import torch

    from medseg.inference.backends.checks import checked_later
    from medseg.inference.backends.copies import Courier
    from medseg.inference.window import plan_windows, sliding_window

    spec, cell = checkpoint.spec, predictor.cell
    windows = plan_windows(
        way.image.shape[1:], way.patch, way.overlap, cell=cell, layout=way.layout
    )
    total, done = window_count(windows, made.stripes), 0
    what = f"windows of {spec.name} on {made.device}"
    predict = partial(_predicted, predictor, clock, what)

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress("segmenting", done, total)

    empty = (CONTENT_ABOVE, _of_air(spec, predictor)) if spec.skip_empty else None
    start = time.perf_counter()
    courier = Courier(torch.device(made.device))
    if made.data_on_card:
        way.image = _on_device(what, partial(_on_card, way.image, courier))
    run = partial(
        sliding_window, predict, way.image, windows, batch=made.batch, empty=empty, cell=cell
    )
    run = partial(run, weighting=way.weighting, make_sums=way.make_sums, progress=count)
    run = partial(run, device=made.device if made.sums_on_card else "cpu", courier=courier)
    is_beside = made.device != "cpu"

    def paint() -> None:
        with checked_later(courier), _Brush(painter, clock, courier, is_beside=is_beside) as brush:
            for stripe in windows.stripes(made.stripes):
                painter.begin_part()
                for block in way.trimmed(run(stripe=stripe, stays=made.sums_on_card)):
                    brush.paint(block)
                brush.wait()
        with clock("paint"):
            painter.finish()

    _on_device(what, paint)
    # What is left of the time is the sums'. Beside a GPU painting costs only what it is waited for.
    waited_for = "paint" if made.device == "cpu" else "wait"
    others = (clock.seconds.get("network", 0.0), clock.seconds.get(waited_for, 0.0))
    clock.seconds["blend"] = max(0.0, time.perf_counter() - start - sum(others))


def _on_card(image: torch.Tensor, courier: Courier) -> torch.Tensor:
    """The image on the card, or where it is if there is no room: windows are copied one by one
    then.
    """
    from medseg.inference.backends.cards import is_out_of_memory

    try:
        return courier.send(image)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    warnings.warn(
        "the GPU has no room for the image; windows are copied one by one, which is slower",
        DataWarning,
        stacklevel=3,
    )
    return image


class _Brush:
    """Paints blocks at once, or in a thread of its own, one block behind."""

    def __init__(
        self, painter: Painter, clock: Clock, courier: Courier, *, is_beside: bool
    ) -> None:
        self._painter, self._clock, self._courier = painter, clock, courier
        self._thread = ThreadPoolExecutor(1) if is_beside else None
        self._behind: Future[None] | None = None

    def __enter__(self) -> _Brush:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def paint(self, block: Block) -> None:
        """Paint a block; an error may come at the next one."""
        if self._thread is None:
            assert isinstance(block.data, np.ndarray)
            self._painted(block.x, block.y, block.data)
            return
        work = self._work(block)
        self.wait()
        self._behind = self._thread.submit(work)

    def wait(self) -> None:
        """Until all blocks are painted, as far as this process does it."""
        if self._behind is not None:
            with self._clock("wait"):
                self._behind.result()
        self._behind = None

    def _work(self, block: Block) -> Callable[[], None]:
        """What paints a block, wherever it lies, begun as far as it can be before its turn."""
        from medseg.inference.backends.painting import CardPainter

        x, y, data = block.x, block.y, block.data
        if isinstance(data, np.ndarray):
            return partial(self._painted, x, y, data)
        if isinstance(self._painter, CardPainter):
            link = self._courier.link
            return partial(self._painted_there, x, y, data, link.now() if link else None)
        return partial(self._painted_here, x, y, self._courier.fetch(data))

    def _painted(self, x: int, y: int, data: NDArray[np.float32]) -> None:
        with self._clock("paint"):
            self._painter.add(x, y, data)

    def _painted_there(self, x: int, y: int, data: torch.Tensor, ready: Event | None) -> None:
        from medseg.inference.backends.painting import CardPainter

        assert isinstance(self._painter, CardPainter)
        with self._clock("paint"):
            self._painter.add(x, y, data, ready)

    def _painted_here(self, x: int, y: int, coming: Fetched) -> None:
        with coming.read() as data:
            self._painted(x, y, data.numpy())
