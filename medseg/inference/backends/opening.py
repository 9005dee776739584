"""The backends by name, the choice among them, and models of one task joined into one predictor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, combinations

import numpy as np
import torch
from torch import Tensor

from medseg.errors import BadConfig
from medseg.inference.backends.kept import kept_open, known_of
from medseg.inference.backends.openvino import open_openvino
from medseg.inference.backends.predictor import (
    Precision,
    Predictor,
    choose_device,
    deferred_width,
    example_patch,
    seconds_of,
    worth_deferring,
)
from medseg.inference.backends.pytorch import choose_precision, open_torch, steps_down
from medseg.inference.painter import Head, Slopes
from medseg.inference.window import Predict
from medseg.models import Checkpoint

#: Seconds of predicting from which on the three or four that a trial of OpenVINO takes do not
#: matter.
OPENVINO_PAYS_S = 120.0
#: How much faster than PyTorch it must then be for one window.
OPENVINO_GAIN = 1.1
#: Name -> open(checkpoint, device, dtype, exact=, defer=).
BACKENDS: dict[str, Callable[..., Predictor]] = {"torch": open_torch, "openvino": open_openvino}


def open_models(
    checkpoints: Sequence[Checkpoint],
    *,
    backend: str = "auto",
    device: str = "auto",
    precision: Precision = "auto",
    mirror: Sequence[int] = (),
    windows: int = 0,
    exact: bool | None = None,
) -> Predictor:
    """The predictor of `open_anew`; within `models_kept_open` the one of an earlier scan, if it was
    opened alike.

    One that had to step down, as where a GPU ran out of memory or half precision did not do, is
    opened anew: no scan changes how others are done.
    """
    from importlib.util import find_spec

    # Only the trial of OpenVINO depends on the number of windows.
    trial = windows if backend == "auto" and find_spec("openvino") else 0
    models = tuple((str(one.folder), one.spec.sha256) for one in checkpoints)
    key = (models, backend, device, precision, tuple(mirror), trial, exact, steps_down())
    predictor: Predictor = kept_open(
        key,
        lambda: open_anew(
            checkpoints,
            backend=backend,
            device=device,
            precision=precision,
            mirror=mirror,
            windows=windows,
            exact=exact,
        ),
    )
    return predictor


def open_anew(
    checkpoints: Sequence[Checkpoint],
    *,
    backend: str = "auto",
    device: str = "auto",
    precision: Precision = "auto",
    mirror: Sequence[int] = (),
    windows: int = 0,
    exact: bool | None = None,
) -> Predictor:
    """One predictor for one or several checkpoints of the same task, whose logits are averaged.

    mirror: axes (0, 1, 2) along which patches are also predicted mirrored, in all combinations.
    windows: how many there will be; 'auto' tries OpenVINO, where it is installed, if so many take
    long enough for it to pay. exact: plain convolutions, as with 'fp32' by default; otherwise
    faster ones that round a little more.
    """
    place = choose_device(device)
    dtype = choose_precision(precision, place, checkpoints[0].spec.trained_precision)
    exact = precision == "fp32" if exact is None else exact
    first = BACKENDS["torch" if backend == "auto" else backend](
        checkpoints[0], place, dtype, exact=exact
    )
    if backend == "auto" and place.type == "cpu" and not exact:
        first = _faster(checkpoints[0], first, windows, dtype=dtype)
    opener = partial(BACKENDS[first.backend], device=place, dtype=dtype, exact=exact)
    predictors = [first, *(opener(one) for one in checkpoints[1:])]
    if not _may_defer(predictors, checkpoints[0].spec.outputs, mirrored=bool(mirror)):
        predictors = [opener(one, defer=False) for one in checkpoints]
    predictor = _ensemble(predictors) if len(predictors) > 1 else predictors[0]
    return _mirrored(predictor, mirror) if mirror else predictor


def _faster(
    checkpoint: Checkpoint, plain: Predictor, windows: int, *, dtype: torch.dtype
) -> Predictor:
    """OpenVINO's predictor on the CPU where a trial pays and shows it faster, else the plain
    one.
    """
    if not _openvino_pays(checkpoint, plain, windows):
        return plain
    with suppress(BadConfig):  # of networks that it cannot run
        candidate = open_openvino(checkpoint, torch.device("cpu"), dtype)
        patch = example_patch(checkpoint)
        seconds = seconds_of(lambda: candidate(patch), 1)
        if seconds * OPENVINO_GAIN < seconds_of(lambda: plain(patch), 1):
            return candidate
    return plain


def _may_defer(predictors: Sequence[Predictor], outputs: int, *, mirrored: bool) -> bool:
    """Whether what predictors give before their heads can be blended, and if several, is worth
    it.
    """
    cell = predictors[0].cell
    if mirrored and cell > 1:  # the voxels of a mirrored cell would have to change places
        return False
    if len(predictors) == 1:
        return True
    together = sum(one.features for one in predictors) / cell**3
    alike = all(one.head and one.cell == cell for one in predictors)
    return alike and worth_deferring(together, outputs)


def open_apart(
    checkpoints: Sequence[Checkpoint],
    *,
    device: str = "auto",
    mirror: Sequence[int] = (),
    exact: bool = False,
) -> Predictor:
    """One predictor with the logits of all checkpoints side by side, in float32; exact: by
    PyTorch's convolutions.
    """
    place = choose_device(device)
    each = [open_torch(one, place, torch.float32, exact=exact, defer=False) for one in checkpoints]
    each = [_mirrored(one, mirror) for one in each] if mirror else each
    if len(each) == 1:
        return each[0]
    run: Predict = lambda x: torch.cat([one(x) for one in each], 1)  # noqa: E731
    return Predictor(
        run, sum(one.features for one in each), None, backend="torch", precision=each[0].precision
    )


def blended_features(checkpoints: Sequence[Checkpoint], mirrored: bool = False) -> tuple[int, int]:
    """How many numbers `open_models` of these checkpoints gives, and for how many voxels along each
    axis.

    Found without loading any weights. mirrored: whether patches are also predicted mirrored.
    """
    models = tuple((str(one.folder), one.spec.sha256) for one in checkpoints)
    key = ("blended", models, mirrored)
    features, cell = known_of(key, lambda: _find_blended(checkpoints, mirrored))
    return features, cell


def _find_blended(checkpoints: Sequence[Checkpoint], mirrored: bool) -> tuple[int, int]:
    from medseg.networks import build_network

    outputs = checkpoints[0].spec.outputs
    widths = []
    for one in checkpoints:
        with torch.device("meta"):
            network = build_network(
                one.spec.architecture, one.spec.inputs, outputs, **one.spec.options
            )
        widths.append(deferred_width(network))
    together, cell = sum(width for width, _ in widths), widths[0][1]
    if not all(width and one == cell for width, one in widths) or not worth_deferring(
        together / cell**3, outputs
    ):
        return outputs, 1
    return (outputs, 1) if mirrored and cell > 1 else (together, cell)


def _openvino_pays(checkpoint: Checkpoint, predictor: Predictor, windows: int) -> bool:
    from importlib.util import find_spec

    if windows < 2 or find_spec("openvino") is None:
        return False
    patch = example_patch(checkpoint)

    def takes_long() -> bool:
        begun = time.perf_counter()
        predictor(patch)
        return (time.perf_counter() - begun) * windows > OPENVINO_PAYS_S

    # The first window is the slowest: where it is fast enough, no second one is needed.
    return takes_long() and takes_long()


def _ensemble(predictors: list[Predictor]) -> Predictor:
    """The mean of several predictors' logits; with heads their features side by side and one head
    for all.
    """
    heads = [one.head for one in predictors if one.head is not None]
    count = len(predictors)
    first = predictors[0]
    if len(heads) == count:
        weights = np.concatenate([head.weights for head in heads], 1) / count
        bias = np.mean([head.bias for head in heads], 0).astype(np.float32)
        head = Head(
            weights.astype(np.float32),
            bias,
            _side_by_side([head.slopes for head in heads], predictors),
        )
        width = sum(one.features for one in predictors)
        run: Predict = lambda x: torch.cat([one(x) for one in predictors], 1)  # noqa: E731
        return Predictor(
            run, width, head=head, backend=first.backend, precision=first.precision, cell=first.cell
        )

    def mean(x: Tensor) -> Tensor:
        total = predictors[0](x).float()
        for one in predictors[1:]:
            total = total + one(x).float()
        return total / count

    return Predictor(mean, first.features, None, backend=first.backend, precision=first.precision)


def _side_by_side(
    slopes: Sequence[Slopes | None], predictors: Sequence[Predictor]
) -> Slopes | None:
    """The mean of several, their features side by side; voxels' own numbers are the same in each
    that has them.
    """
    if all(one is None for one in slopes):
        return None
    outputs = next(len(one.bias) for one in slopes if one is not None)
    begins = np.cumsum([0, *(one.features for one in predictors)])
    weights, bias, own = (
        np.zeros((outputs, begins[-1]), np.float32),
        np.zeros(outputs, np.float32),
        0,
    )
    for one, begin, end in zip(slopes, begins[:-1], begins[1:]):
        if one is not None:
            weights[:, begin:end] = one.weights / len(slopes)
            bias += one.bias / len(slopes)
            own = int(begin) + one.own
    return Slopes(weights, bias, own)


def _mirrored(predictor: Predictor, axes: Sequence[int]) -> Predictor:
    """The mean over all mirrorings of patches along `axes`, each mirrored back (test-time
    augmentation).
    """
    flips = list(
        chain.from_iterable(
            combinations([2 + axis for axis in axes], n) for n in range(len(axes) + 1)
        )
    )

    def run(x: Tensor) -> Tensor:
        total = torch.zeros(())
        for dims in flips:
            part = predictor(x.flip(dims) if dims else x).float()
            total = total.to(part.device) + (part.flip(dims) if dims else part)
        return total / len(flips)

    return Predictor(
        run,
        predictor.features,
        head=predictor.head,
        backend=predictor.backend,
        precision=predictor.precision,
        cell=predictor.cell,
    )
