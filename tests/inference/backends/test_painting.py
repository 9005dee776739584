"""Painting on a card, on this CPU: what the compiled painter paints, but where classes tie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from making.cards import Link
from making.notices import notices
from medseg.errors import DataWarning
from medseg.inference.backends import painting
from medseg.inference.backends.painting import CardPainter
from medseg.inference.painter import Head, Painter, Slopes

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GRID = (9, 12, 10)


def features_of(seed: int, width: int, shape: Sequence[int] = GRID) -> NDArray[np.float32]:
    """(F, X, Y, Z) smooth and random."""
    random = np.random.default_rng(seed)
    each = [ndimage.gaussian_filter(random.normal(size=shape), 1.0) for _ in range(width)]
    return np.stack(each).astype(np.float32)


def blocks_of(
    features: NDArray[np.float32], random: np.random.Generator
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(x, y, block with features last) row by row, cut at random places."""
    cuts = []
    for size in features.shape[1:3]:
        count = random.integers(0, size)
        inner = sorted(random.choice(np.arange(1, size), count, replace=False).tolist())
        cuts.append([0, *inner, size])
    for x, x_end in zip(cuts[0], cuts[0][1:]):
        for y, y_end in zip(cuts[1], cuts[1][1:]):
            yield x, y, np.ascontiguousarray(np.moveaxis(features[:, x:x_end, y:y_end], 0, -1))


def to_model(kind: str, seed: int) -> NDArray[np.float64]:
    """(4, 4) scan index to model index: straight, turned, slanted, or reaching far beyond."""
    random = np.random.default_rng(seed)
    matrix = np.diag([*random.uniform(0.4, 1.3, 3), 1.0])
    if kind == "turned":
        matrix = matrix[[1, 2, 0, 3]]
        matrix[0, :3] *= -1
        matrix[0, 3] = 8.0
    if kind == "slanted":
        matrix[:3, :3] += random.uniform(-0.3, 0.3, (3, 3))
        matrix[:3, 3] = random.uniform(-1, 1, 3)
    if kind == "beyond":
        matrix[:3, 3] = (-4.2, -3.0, -5.7)
    return matrix


def both(
    features: NDArray[np.float32], matrix: NDArray[np.float64], seed: int = 0, **options: Any
) -> tuple[Painter, CardPainter]:
    """Two painters that were given the same blocks."""
    shape, link = (11, 13, 12), Link()
    size = options.pop("size", features.shape[1:])
    values = options.pop("values")
    here = Painter(shape, matrix, size, values, **options)
    there = CardPainter(shape, matrix, size, values, device=CPU, link=link, **options)
    for x, y, block in blocks_of(features, np.random.default_rng(seed)):
        here.add(x, y, block)
        there.add(x, y, torch.from_numpy(block), link.now())
    there.finish()
    assert link.held == link.moments, "work on a block waits for the block"
    return here, there


def assert_alike(here: Painter, there: CardPainter, most: float = 0.001) -> None:
    assert here.labels.dtype == there.labels.dtype
    assert here.labels.any()
    assert float((here.labels != there.labels).mean()) <= most
    assert here.confidence().keys() == there.confidence().keys()
    for value, share in here.confidence().items():
        assert there.confidence()[value] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("kind", ["straight", "turned", "slanted", "beyond"])
@pytest.mark.parametrize("regions", [False, True])
def test_logits_are_painted_alike_from_any_blocks(kind: str, regions: bool):
    for seed in range(2):
        values = [0, 7, 300, 5, 9][: 4 + regions]
        features = features_of(seed, 4)
        options = {"values": values, "regions": regions, "certain": True}
        assert_alike(*both(features, to_model(kind, seed), seed, **options))


@pytest.mark.parametrize(("classes", "width"), [(3, 5), (25, 16), (90, 4)])
def test_a_head_is_applied_last_alike(classes: int, width: int):
    random = np.random.default_rng(classes)
    head = Head(
        random.normal(size=(classes, width)).astype(np.float32),
        random.normal(size=classes).astype(np.float32),
    )
    for seed in range(3):
        options = {"values": range(classes), "head": head, "certain": True}
        assert_alike(*both(features_of(seed, width), to_model("slanted", seed), seed, **options))


@pytest.mark.parametrize("sloped", [False, True])
@pytest.mark.parametrize("size", [(17, 24, 19), (18, 23, 20)])
def test_cells_are_painted_alike(sloped: bool, size: tuple[int, int, int]):
    classes, width = 5, 13 if sloped else 6
    random = np.random.default_rng(3)
    slopes = None
    if sloped:
        slopes = Slopes(
            random.normal(size=(classes, width)).astype(np.float32),
            random.normal(size=classes).astype(np.float32),
            4,
        )
    head = Head(
        random.normal(size=(8 * classes, width)).astype(np.float32),
        random.normal(size=8 * classes).astype(np.float32),
        slopes,
    )
    options = {"values": range(classes), "head": head, "cell": 2, "certain": True, "size": size}
    for seed in range(3):
        matrix = to_model("straight", seed) * [[2], [2], [2], [1]]
        assert_alike(*both(features_of(seed, width), matrix, seed, **options))


def test_nothing_is_painted_beyond_the_limits_and_parts_overlap_by_a_plane():
    features, matrix = features_of(0, 3), np.eye(4)
    limits = [(1.0, 6.0), (-np.inf, np.inf), (2.5, 8.0)]
    options: dict[str, Any] = {"values": (0, 1, 2), "limits": limits}
    here = Painter((9, 12, 10), matrix, GRID, **options)
    there = CardPainter((9, 12, 10), matrix, GRID, device=CPU, **options)
    for low, high in ((0, 6), (5, 12)):
        for painter in (here, there):
            painter.begin_part()
            block = np.ascontiguousarray(np.moveaxis(features[:, :, low:high], 0, -1))
            painter.add(0, low, block)
    there.finish()
    assert_alike(here, there, most=0)


def test_voxels_are_looked_at_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(painting, "SLAB_VOXELS", 400)
    monkeypatch.setattr(painting, "MIXED_NUMBERS", 30)
    assert_alike(*both(features_of(1, 4), to_model("slanted", 1), values=range(4)))


@pytest.mark.parametrize("failing", range(0, 12, 3))
def test_without_memory_on_the_card_the_cpu_goes_on_from_what_is_painted(
    failing: int, monkeypatch: pytest.MonkeyPatch
):
    """Whatever is being painted when memory is out; nothing counts twice."""
    features, matrix = features_of(2, 4), to_model("straight", 2)
    options: dict[str, Any] = {"values": range(4), "certain": True}
    here = Painter((11, 13, 12), matrix, GRID, **options)
    there = CardPainter((11, 13, 12), matrix, GRID, device=CPU, **options)
    real, calls = CardPainter._paint_slab, []

    def paint_slab(painter: CardPainter, *arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) > failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(painter, *arguments)

    monkeypatch.setattr(CardPainter, "_paint_slab", paint_slab)
    with pytest.warns(DataWarning, match="the CPU paints, which is slower") as told:
        for x, y, block in blocks_of(features, np.random.default_rng(1)):
            here.add(x, y, block)
            there.add(x, y, torch.from_numpy(block))
    there.finish()
    assert_alike(here, there)
    assert len(notices(told)) == 1
