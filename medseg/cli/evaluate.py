"""`medseg evaluate`, `compare` and `clean`: parse, call, show what came back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import Json, Quiet, Table, Volume, in_panel
from medseg.cli.show import bar_of_cases, print_json, print_rows, tell
from medseg.errors import BadConfig, BadOutput
from medseg.labels import same_name, structure_value
from medseg.text import decimal_number

if TYPE_CHECKING:
    from medseg.labels import LabelTable

_SCORES, _LESIONS, _STATISTICS = "How is scored", "Lesions", "Statistics"
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="STRUCTURES", help="Only these: 1,2 or liver=1,tumour=1+2+3 or names of the table."
    ),
]


def evaluate(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="A label map, or a folder of them.")
    ],
    prediction: Annotated[
        Path, typer.Argument(metavar="PREDICTION", help="The same of what is to be scored.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results.")
    ] = Path("evaluation"),
    labels: Labels = None,
    table: Table = None,
    ignore: Annotated[
        str | None,
        in_panel(
            _SCORES,
            metavar="STRUCTURE",
            help="Where the reference has this, by name or number, do not score.",
        ),
    ] = None,
    surface: Annotated[
        str, in_panel(_SCORES, metavar="surfel|voxel", help="What a surface is made of.")
    ] = "surfel",
    percentile: Annotated[
        list[float] | None,
        in_panel(_SCORES, metavar="PERCENT", help="Hausdorff percentiles. Default: 95."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        in_panel(
            _SCORES,
            metavar="MM",
            help="Of the surface Dice: 1 or liver=2.5, repeatable. Default: 1.",
        ),
    ] = None,
    empty: Annotated[
        str, in_panel(_SCORES, metavar="nan|best_worst|diagonal", help="What empty masks score.")
    ] = "nan",
    lesions: Annotated[
        list[str] | None,
        in_panel(
            _LESIONS,
            metavar="STRUCTURE",
            help="Also score this by lesion, by name or number; again for more.",
        ),
    ] = None,
    lesion_matching: Annotated[
        str, in_panel(_LESIONS, metavar="overlap|iou", help="Which lesions match.")
    ] = "overlap",
    lesion_iou: Annotated[
        float, in_panel(_LESIONS, metavar="SHARE", help="Least IoU of a match.")
    ] = 0.5,
    lesion_connectivity: Annotated[
        int, in_panel(_LESIONS, metavar="6|18|26", help="What touches is one lesion.")
    ] = 26,
    lesion_min_mm3: Annotated[
        float, in_panel(_LESIONS, metavar="MM3", help="Leave out smaller lesions.")
    ] = 0,
    lesion_dilation: Annotated[
        int,
        in_panel(
            _LESIONS, metavar="VOXELS", help="Grow reference lesions by voxels before matching."
        ),
    ] = 0,
    lesion_penalty_mm: Annotated[
        float, in_panel(_LESIONS, metavar="MM", help="HD95 of missed and invented lesions.")
    ] = 374,
    resample: Annotated[
        bool,
        in_panel(_SCORES, "--resample", help="Score a prediction on another grid all the same."),
    ] = False,
    volume: Volume = None,
    bootstrap: Annotated[
        int,
        in_panel(_STATISTICS, min=0, metavar="N", help="Resamplings of cases for the intervals."),
    ] = 2000,
    seed: Annotated[int, in_panel(_STATISTICS, metavar="N", help="Of the resamplings.")] = 0,
    scans: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Show these scans under the errors in report.html."),
    ] = None,
    number_cases: Annotated[
        bool,
        typer.Option(
            "--number-cases", help="Call cases by numbers in all results, not by their file names."
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score label maps against references: scores.csv, summary.json, and report.html with plots and
    worst cases.

    Examples:
    medseg evaluate truth/ labels/ -o report/
    medseg evaluate truth.nii.gz labels.nii.gz --labels liver,tumour
    """
    from medseg import evaluation

    label_table = evaluation.find_table(table, reference, prediction)
    structures = evaluation.parse_structures(labels, label_table) if labels else None
    name_of = partial(_scored_name, structures=structures, table=label_table)
    options = evaluation.EvaluationOptions(
        structures=structures,
        ignore=structure_value(ignore, label_table, "--ignore") if ignore else None,
        surface=surface,  # type: ignore[arg-type]
        percentiles=tuple(percentile or (95,)),
        tolerance_mm=_tolerances(tolerance, name_of),
        empty=empty,  # type: ignore[arg-type]
        lesions=tuple(name_of(one, option="--lesions") for one in lesions or ()),
        lesion_options=evaluation.LesionOptions(
            matching=lesion_matching,  # type: ignore[arg-type]
            min_iou=lesion_iou,
            connectivity=lesion_connectivity,
            min_mm3=lesion_min_mm3,
            dilation=lesion_dilation,
            penalty_mm=lesion_penalty_mm,
        ),
        resample=resample,
        bootstrap=bootstrap,
        seed=seed,
        number_cases=number_cases,
    )
    with bar_of_cases(quiet) as progress:
        result = evaluation.evaluate(
            reference, prediction, output, options, label_table, progress, volume_index=volume,
            scans=scans,
        )  # fmt: skip
    for problem in result.problems:
        tell(f"note: {problem}")
    tell(f"scores.csv, summary.json and report.html are in {output}", quiet)
    if as_json:
        print_json(result.summary)
    else:
        print_rows(*evaluation.summary_table(result.summary))


def compare(
    scores: Annotated[
        list[Path],
        typer.Argument(metavar="SCORES...", help="The scores.csv of two methods or more."),
    ],
    score: Annotated[
        str, typer.Option(metavar="COLUMN", help="The column to compare by.")
    ] = "dice",
    structure: Annotated[
        str | None,
        typer.Option(
            metavar="STRUCTURE",
            help="Only this, by name or number. Default: the mean over all.",
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the ranking as a picture.")
    ] = None,
    bootstrap: Annotated[
        int,
        in_panel(_STATISTICS, min=0, metavar="N", help="Resamplings of cases for the stability."),
    ] = 1000,
    seed: Annotated[int, in_panel(_STATISTICS, metavar="N", help="Of the resamplings.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare methods on the same cases: ranking, its stability, and paired Wilcoxon tests with
    Holm's correction.

    Example:
    medseg compare a/scores.csv b/scores.csv --png ranking.png
    """
    from medseg import evaluation

    if png and png.suffix.lower() != ".png":
        raise BadOutput(f"{png}: a ranking is a picture; give a name that ends in .png")
    result = evaluation.compare(scores, score, structure, bootstrap, seed)
    for problem in result.problems:
        tell(f"note: {problem}")
    if png:
        evaluation.write_ranking(png, result)
    if as_json:
        print_json(asdict(result))
        return
    title = f"{evaluation.title_of(result.score)}: {result.n_cases} cases"
    print_rows(f"{title}, {result.n_excluded} undefined scores left out", result.methods)
    print_rows("paired Wilcoxon signed-rank tests", result.tests)
    if result.kendall_tau:
        print_rows(
            "agreement of the ranking under resampling of cases (Kendall's tau)",
            [result.kendall_tau],
        )


def clean(
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="A label map.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to; the suffix decides the format."
        ),
    ],
    only: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="STRUCTURES",
            help="Only these, by name or number: 1,liver. Default: all.",
        ),
    ] = None,
    keep_largest: Annotated[
        bool, typer.Option("--keep-largest", help="Keep the largest part of each label.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep so many parts of each label.")
    ] = None,
    min_mm3: Annotated[
        float | None, typer.Option(min=0, metavar="MM3", help="Drop smaller parts.")
    ] = None,
    fill_holes: Annotated[
        bool, typer.Option("--fill-holes", help="Fill holes with the label around them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Fill over other labels, too.")
    ] = False,
    connectivity: Annotated[
        int, typer.Option(metavar="6|18|26", help="What touches is one part.")
    ] = 26,
    volume: Volume = None,
    as_json: Json = False,
) -> None:
    """Clean up a label map: keep the largest parts, drop small ones, fill holes, in this order.

    Example:
    medseg clean labels.nii.gz -o clean.nii.gz --labels liver --keep-largest
    """
    from medseg.evaluation import find_table, read_label_map, refuse_folder
    from medseg.io import embedded_table, write
    from medseg.postprocess import clean as clean_labels, steps_of

    steps = steps_of(
        count=keep or int(keep_largest),
        min_mm3=min_mm3,
        fill=fill_holes,
        overwrite=overwrite,
        connectivity=connectivity,
    )
    if not steps:
        raise BadConfig("say what to do: --keep-largest, --keep, --min-mm3 or --fill-holes")
    refuse_folder(labels)
    table = find_table(None, labels, labels)
    selection = {"labels": _values(only, table)} if only else {}
    before = read_label_map(labels, volume)
    after = clean_labels(before, [step | selection for step in steps])
    write(after, output, table=embedded_table(labels))
    row: dict[str, Any] = {"output": str(output), "steps": [step["step"] for step in steps]}
    row["voxels_changed"] = int((before.data != after.data).sum())
    print_json(row) if as_json else print_rows("", [row | {"steps": ", ".join(row["steps"])}])


def _scored_name(
    text: str, structures: Mapping[str, Any] | None, table: LabelTable | None, option: str
) -> str:
    """What the scores call a structure that is given by its name or number. Raises `BadConfig`."""
    from medseg.evaluation import scored_names

    if structures is not None:
        return _name_among(text, structures, table)
    if table is None and text.startswith("label "):
        return text  # as structures without a table are called
    value = structure_value(text, table, option)
    names = scored_names(table) if table else {}
    return names.get(value, f"label {value}")


def _name_among(text: str, structures: Mapping[str, Any], table: LabelTable | None) -> str:
    """The name of one of the structures that were asked for; what is none is refused later."""
    if same := same_name(text, structures):
        return same
    try:
        value = structure_value(text, table, "")
    except BadConfig:
        return text
    return next((name for name, one in structures.items() if one == (value,)), text)


def _tolerances(
    texts: Sequence[str] | None, name_of: Callable[..., str]
) -> float | dict[str, float]:
    tolerances_mm: dict[str, float] = {}
    for text in texts or ("1",):
        name, _, number = text.rpartition("=")
        try:
            tolerance_mm = decimal_number(number)
        except ValueError:
            raise BadConfig(f"--tolerance {text}: write 1 or liver=2.5, in mm") from None
        name = name.strip()
        tolerances_mm[name_of(name, option="--tolerance") if name else ""] = tolerance_mm
    return tolerances_mm.get("", 1.0) if set(tolerances_mm) <= {""} else tolerances_mm


def _values(text: str, table: LabelTable | None) -> list[int]:
    return [structure_value(part, table, "--labels") for part in text.split(",")]
