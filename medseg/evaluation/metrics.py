"""The scores of structures in pairs of label maps: one table says of each how it comes and what its
numbers mean.

Definitions follow Maier-Hein, Reinke et al., Metrics Reloaded (Nature Methods 2024); distances are
those of `surfaces`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import BadConfig
from medseg.evaluation.surfaces import (
    Surface,
    SurfaceDistances,
    assd,
    hausdorff,
    masd,
    overlaps,
    surface_dice,
    surface_distances,
)

Empty = Literal["nan", "best_worst", "diagonal"]


def score(
    reference: NDArray,
    prediction: NDArray,
    spacing_mm: Sequence[float],
    structures: Mapping[str, Sequence[int]],
    *,
    surface: Surface = "surfel",
    percentiles: Sequence[float] = (95,),
    tolerance_mm: float | Mapping[str, float] = 1.0,
    ignore: int | None = None,
    empty: Empty = "nan",
) -> dict[str, dict[str, Any]]:
    """Every score of every structure (a name and the labels of which it is the union) in one pair
    of label maps.

    tolerance_mm: for the surface Dice, one for all or one per structure; that of "" (or 1 mm) for
    the rest. Each structure has its status ("ok", "both_empty", "reference_empty",
    "prediction_empty"), voxel counts, volumes in mm3, and scores; distances in mm. What a score is
    for an empty mask is decided by `empty`:

    - "nan": undefined scores are nan (all of both_empty; 0 / 0 of precision or recall); of one
      mask empty Dice, IoU and surface Dice are 0 and distances inf.
    - "best_worst": both_empty counts as perfect (1, 0 mm), one mask empty as the worst (0, inf).
    - "diagonal": as best_worst, with the diagonal of the array in mm for inf.
    """
    if empty not in ("nan", "best_worst", "diagonal"):
        raise BadConfig(f"the rule for empty masks is nan, best_worst or diagonal, not '{empty}'")
    sets = list(structures.values())
    counts = overlaps(reference, prediction, sets, ignore=ignore)
    distances = surface_distances(
        reference, prediction, spacing_mm, structures=sets, surface=surface, ignore=ignore
    )
    diagonal_mm = float(np.sqrt(((np.array(reference.shape) * spacing_mm) ** 2).sum()))
    results = {}
    for name, (n_reference, n_prediction, n_both), structure_distances in zip(
        structures, counts.tolist(), distances
    ):
        pair = Pair(
            n_reference=n_reference, n_prediction=n_prediction, n_both=n_both,
            voxel_mm3=float(np.prod(spacing_mm)),
            distances=structure_distances, tolerance_mm=_tolerance_of(name, tolerance_mm),
        )  # fmt: skip
        row = _scores_of(pair, percentiles)
        undefined = row["status"] != "ok" and empty != "nan"
        results[name] = _with_policy(row, empty, diagonal_mm) if undefined else row
    return results


def _tolerance_of(name: str, tolerance_mm: float | Mapping[str, float]) -> float:
    """The tolerance of one structure."""
    if not isinstance(tolerance_mm, Mapping):
        return float(tolerance_mm)
    return float(tolerance_mm.get(name, tolerance_mm.get("", 1.0)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """What is known of one structure in two label maps: voxels of each and of both, distances of
    their surfaces.
    """

    n_reference: int
    n_prediction: int
    n_both: int
    voxel_mm3: float
    distances: SurfaceDistances
    tolerance_mm: float

    @property
    def status(self) -> str:
        """Which of the two maps has the structure."""
        there = (self.n_reference > 0, self.n_prediction > 0)
        names = {
            (False, False): "both_empty",
            (False, True): "reference_empty",
            (True, False): "prediction_empty",
        }
        return names.get(there, "ok")


def _ratio(part: float, whole: float) -> float:
    """A share; nan for 0 / 0."""
    return part / whole if whole else float("nan")


Function = Callable[[Pair], float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What is known of a score: how it comes from a pair, and what its numbers mean.

    function: of a `Pair`; None for scores of lesions, which `lesion_scores` gives. better: which
    way, and by its size where values have a sign; "" where it says nothing about which method is
    better. least, most: between which values it lies, None for no limit; empty: of perfect and of
    worst empty masks, None for a score that they do not decide. title: what people read. main:
    whether it is in a model's card and in tables, and is drawn in the report.
    """

    function: Function | None = None
    unit: str = ""
    better: Literal["more", "less", ""] = ""
    least: float | None = None
    most: float | None = None
    empty: tuple[float, float] | None = None
    title: str = ""
    main: bool = False


def _share(
    function: Function | None, *, title: str = "", of_lesions: bool = False, main: bool = False
) -> Metric:
    """A score from 0 to 1 of which more is better."""
    empty = None if of_lesions else (1.0, 0.0)
    return Metric(
        function=function, better="more", least=0.0, most=1.0, empty=empty, title=title, main=main
    )  # fmt: skip


def _distance(
    function: Function | None, *, title: str, of_lesions: bool = False, main: bool = False
) -> Metric:
    """A distance in mm, of which less is better; infinite where a map lacks the structure."""
    empty = None if of_lesions else (0.0, float("inf"))
    return Metric(
        function=function, unit="mm", better="less", least=0.0, empty=empty, title=title, main=main
    )  # fmt: skip


#: Every column of scores, in the order of scores.csv. A new one is a function of a `Pair` and a
#: line here; statistics, limits, directions, plots and `medseg compare` follow.
METRICS: dict[str, Metric] = {
    "dice": _share(
        lambda pair: _ratio(2 * pair.n_both, pair.n_reference + pair.n_prediction),
        title="Dice",
        main=True,
    ),
    "iou": _share(
        lambda pair: _ratio(pair.n_both, pair.n_reference + pair.n_prediction - pair.n_both),
        title="intersection over union",
    ),
    "precision": _share(lambda pair: _ratio(pair.n_both, pair.n_prediction), title="precision"),
    "recall": _share(lambda pair: _ratio(pair.n_both, pair.n_reference), title="recall"),
    "volume_reference_mm3": Metric(
        function=lambda pair: pair.n_reference * pair.voxel_mm3,
        unit="mm3",
        title="volume in the reference (mm³)",
    ),
    "volume_prediction_mm3": Metric(
        function=lambda pair: pair.n_prediction * pair.voxel_mm3,
        unit="mm3",
        title="volume in the result (mm³)",
    ),
    "volume_difference_mm3": Metric(
        function=lambda pair: (pair.n_prediction - pair.n_reference) * pair.voxel_mm3,
        unit="mm3",
        better="less",
        title="volume difference (mm³)",
    ),
    "volume_difference_relative": Metric(
        function=lambda pair: _ratio(pair.n_prediction - pair.n_reference, pair.n_reference),
        better="less",
        title="volume difference, as a share of the reference",
    ),
    "hausdorff_mm": _distance(
        lambda pair: hausdorff(pair.distances), title="Hausdorff distance (mm)"
    ),
    # A column for each percentile that is asked for.
    "hausdorff95_mm": _distance(None, title="95 % Hausdorff distance (mm)", main=True),
    "assd_mm": _distance(
        lambda pair: assd(pair.distances),
        title="average symmetric surface distance (mm)",
        main=True,
    ),
    "masd_mm": _distance(
        lambda pair: masd(pair.distances), title="mean average surface distance (mm)"
    ),
    "surface_dice": _share(
        lambda pair: surface_dice(pair.distances, pair.tolerance_mm),
        title="surface Dice",
        main=True,
    ),
    "lesions_reference": Metric(title="lesions in the reference"),
    "lesions_prediction": Metric(title="lesions in the result"),
    "lesions_found": Metric(better="more", title="lesions found"),
    "lesions_missed": Metric(better="less", least=0.0, title="lesions missed"),
    "lesions_invented": Metric(better="less", least=0.0, title="lesions invented"),
    "lesion_f1": _share(None, of_lesions=True, title="F1 of lesions", main=True),
    "lesion_sq": _share(None, of_lesions=True, title="segmentation quality of lesions"),
    "lesion_pq": _share(None, of_lesions=True, title="panoptic quality of lesions"),
    "lesion_dice": _share(None, of_lesions=True, title="Dice of lesions"),
    "lesion_hausdorff95_mm": _distance(
        None, of_lesions=True, title="95 % Hausdorff distance of lesions (mm)"
    ),
}
_PERCENTILE = re.compile(r"hausdorff([0-9.]+)_mm")


def metric_of(column: str) -> Metric | None:
    """What is known of a column of scores; a Hausdorff distance may have any percentile. None for
    others' columns.
    """
    return METRICS["hausdorff95_mm"] if _PERCENTILE.fullmatch(column) else METRICS.get(column)


def title_of(column: str) -> str:
    """What people read where a table has the name of a column."""
    if match := _PERCENTILE.fullmatch(column):
        return f"{match[1]} % Hausdorff distance (mm)"
    metric = METRICS.get(column)
    return metric.title if metric and metric.title else column.replace("_", " ")


def score_titles() -> dict[str, str]:
    """The scores of a model's card, and what it calls them."""
    return {name: metric.title for name, metric in METRICS.items() if metric.main}


def main_columns(columns: Iterable[str]) -> list[str]:
    """Those of the columns that tables show and plots are made of: shares, then distances, then
    those of lesions.
    """
    metrics = {name: metric_of(name) for name in columns}
    main = {name: metric for name, metric in metrics.items() if metric and metric.main}
    return sorted(main, key=lambda name: (name.startswith("lesion"), main[name].unit))


def _scores_of(pair: Pair, percentiles: Sequence[float]) -> dict[str, Any]:
    """Status, voxel counts and every score of a pair."""
    row: dict[str, Any] = {
        "status": pair.status, "n_reference": pair.n_reference, "n_prediction": pair.n_prediction,
        "n_both": pair.n_both,
    }  # fmt: skip
    for name, metric in METRICS.items():
        if name == "hausdorff95_mm":
            row |= {
                f"hausdorff{each:g}_mm": hausdorff(pair.distances, each) for each in percentiles
            }
        elif metric.function is not None:
            row[name] = metric.function(pair)
    return row | {"tolerance_mm": pair.tolerance_mm}


def _with_policy(row: dict[str, Any], empty: Empty, diagonal_mm: float) -> dict[str, Any]:
    """The scores of a structure that a map or both lack under "best_worst" or "diagonal"."""
    perfect = row["status"] == "both_empty"
    for name in row:
        metric = metric_of(name)
        if metric is None or metric.empty is None:
            continue
        worst = (
            diagonal_mm
            if empty == "diagonal" and metric.empty[1] == float("inf")
            else metric.empty[1]
        )
        row[name] = metric.empty[0] if perfect else worst
    return row | {"volume_difference_relative": 0.0} if perfect else row
