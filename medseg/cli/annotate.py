"""`medseg add`, `medseg next` and `medseg rounds`: parse, call, show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medseg.cli.options import (
    Device,
    Json,
    Quiet,
    Table,
    check_one_of,
    in_panel,
    word_of_device,
)
from medseg.cli.show import bar_of_cases, print_json, print_line, print_table, tell
from medseg.errors import BadConfig
from medseg.machine import keep_memory

if TYPE_CHECKING:
    from medseg.annotation import Choice, Round, Store, StoredCase
    from medseg.inference import Job, Model
    from medseg.labels import LabelTable

_LABELS, _NEW, _WHICH = "Labels", "The data set", "Which scan"
Growing = Annotated[
    Path, typer.Argument(metavar="DATASET", help="A data set that medseg add has made.")
]


def add(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Its folder; a new one is made.")
    ],
    scans: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SCAN...", help="Scans of any format, DICOM folders, folders."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            "-l",
            metavar="SEG",
            help="The scan's corrected segmentation, of any format.",
        ),
    ] = None,
    case_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="What the scan is called. Default: its file."),
    ] = None,
    channel: Annotated[
        list[Path] | None,
        in_panel(
            _NEW, metavar="SCAN", help="The scan's next channel, in their order; again for more."
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="In the place of what is there under this id."),
    ] = False,
    table: Table = None,
    segment: Annotated[
        list[str] | None,
        in_panel(
            _LABELS, metavar="STRUCTURE", help="Only this, by name or number; again: on top."
        ),
    ] = None,
    model: Annotated[
        str | None,
        in_panel(
            _LABELS, "--model", "-m", metavar="MODEL",
            help="New structures get the values that this model has for them.",
        ),
    ] = None,
    modalities: Annotated[
        str | None,
        in_panel(
            _NEW, metavar="NAMES",
            help="What the channels of a new data set are, such as CT, or T1,FLAIR.",
        ),
    ] = None,
    split: Annotated[
        str,
        in_panel(
            _NEW, metavar="auto|train|val|test",
            help="What the scan is for. auto: one of five validates.",
        ),
    ] = "auto",
    group: Annotated[
        str,
        in_panel(_NEW, metavar="PATIENT", help="Scans of one patient stay on one side."),
    ] = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Add scans to a data set that grows, and what was segmented in one.

    The folder is one that medseg check and medseg train read. What a segmentation names and does
    not hold is absent; what it does not name was not looked for. A label alone is of a scan that is
    there: medseg add DATASET --id ID --labels SEG.

    Examples:
    medseg add dataset/ scan.nii.gz --labels scan.seg.nrrd
    medseg add dataset/ more_scans/
    """
    from medseg.annotation import SPLITS

    check_one_of("--split", split, SPLITS)
    like = _table_of(model)
    if not scans:
        if labels is None or case_id is None:
            raise typer.BadParameter(
                "give scans, or the id of one that is there and its labels: --id ID --labels SEG",
                param_hint="SCAN...",
            )
        one = _label(dataset, case_id, labels, table, segment or (), like=like, split=split)
        _show_added(dataset, [one], as_json, quiet)
        return
    names = _channel_names(dataset, modalities, 1 + len(channel or ()))
    jobs = _jobs(scans, names, channel or ())
    if len(jobs) > 1 and (labels is not None or case_id is not None):
        what = "--labels" if labels is not None else "--id"
        raise BadConfig(
            f"{what} goes with one scan, and {len(jobs)} are given; add them one by one"
        )
    cases = []
    with bar_of_cases(quiet or len(jobs) == 1) as progress:
        for number, job in enumerate(jobs, 1):
            case = _add_one(
                dataset, job, names,
                name=case_id, labels=labels, table=table, segments=segment or (), like=like,
                replace=replace, split=split, group=group,
            )  # fmt: skip
            cases.append(case)
            progress(case.id, number, len(jobs))
    _show_added(dataset, cases, as_json, quiet)


def _jobs(scans: Sequence[Path], names: Sequence[str], channel: Sequence[Path]) -> list[Job]:
    """The scans as jobs. Raises what is wrong with the first that cannot be read."""
    from medseg.inference import list_jobs

    jobs = list_jobs(scans, None, names=names, channels=channel)
    for job in jobs:
        if job.problem is not None:
            raise job.problem
    return jobs


def _add_one(
    dataset: Path,
    job: Job,
    names: Sequence[str],
    *,
    name: str | None,
    labels: Path | None,
    table: Path | None,
    segments: Sequence[str],
    like: LabelTable,
    **how: Any,
) -> StoredCase:
    """Read all of a scan, and then add it."""
    from medseg.annotation import NO_NAMES, Store, check_id, name_of, read_files, read_segmentation

    case_id = check_id(name if name is not None else name_of(job))
    volumes = read_files(job.files, len(names))
    segmentation, own = None, NO_NAMES
    if labels is not None:
        segmentation, own = read_segmentation(
            labels, volumes[0], job.scan, table=table, segments=segments
        )
    store = Store.create(dataset, names)
    return store.add_volumes(case_id, volumes, labels=segmentation, table=own, like=like, **how)


def _label(
    dataset: Path,
    case_id: str,
    labels: Path,
    table: Path | None,
    segments: Sequence[str],
    *,
    like: LabelTable,
    split: str,
) -> StoredCase:
    """Give a scan that is there its final label."""
    from medseg.annotation import Store, read_segmentation

    store = Store.open(dataset)
    image, path = store.read_scan(case_id)[0], store.case(case_id).images[0]
    segmentation, own = read_segmentation(labels, image, path, table=table, segments=segments)
    change = None if split == "auto" else split
    return store.put_label(case_id, segmentation, own, like=like, split=change)


def _channel_names(dataset: Path, modalities: str | None, count: int) -> tuple[str, ...]:
    """The channels of a data set, or those that a new one gets."""
    from medseg.annotation import LIST, Store

    if modalities is not None:
        return tuple(part.strip() for part in modalities.split(","))
    if (dataset / LIST).is_file():
        return Store.open(dataset).channels
    return ("image",) if count == 1 else tuple(str(number) for number in range(1, count + 1))


def _table_of(model: str | None) -> LabelTable:
    from medseg.annotation import NO_NAMES

    if model is None:
        return NO_NAMES
    from medseg.inference import label_table, load_model

    return label_table(load_model(model))


def _show_added(dataset: Path, cases: Sequence[StoredCase], as_json: bool, quiet: bool) -> None:
    from medseg.annotation import Store

    names = Store.open(dataset).table.names
    if as_json:
        print_json({"dataset": str(dataset), "cases": [_as_dict(one, names) for one in cases]})
        return
    for one in cases:
        present = ", ".join(names[value] for value in one.holds if value in names)
        there = f", {present or 'nothing but background'}" if one.state == "final" else ""
        what = {"train": "to train with", "val": "to validate with", "test": "set aside"}
        use = f", {what[one.split]}" if one.split in what else ""
        print_line(f"{one.id}: {one.state}{there}{use}")
        absent = [names[value] for value in names if value not in one.annotated]
        if one.state == "final" and absent:
            tell(
                f"{one.id}: its segmentation does not name {', '.join(absent)}, so that counts as"
                " not looked for; name it, empty, if it is not there",
                quiet,
            )


def _as_dict(case: StoredCase, names: dict[int, str]) -> dict[str, Any]:
    return {
        "case": case.id,
        "state": case.state,
        "split": case.split,
        "files": [str(path) for path in case.images],
        "labels": {tag: str(path) for tag, path in case.labels.items()},
        "structures": [names[value] for value in case.holds if value in names],
        "annotated": [names[value] for value in case.annotated if value in names],
    }


def next(  # the name of the command
    dataset: Growing,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="MODEL",
            help="A model; a second one may disagree. Default: those of the last two rounds.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FOLDER",
            help="Choose among the scans here. Default: those of the data set without labels.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PATH",
            help="Where the proposal goes, e.g. x.seg.nrrd. Default: into the data set.",
        ),
    ] = None,
    strategy: Annotated[
        str,
        in_panel(
            _WHICH, metavar="uncertain|random|first", help="The least sure, any, the first."
        ),
    ] = "uncertain",
    most: Annotated[
        int | None,
        in_panel(_WHICH, min=1, metavar="N", help="Look at no more scans than this, at random."),
    ] = None,
    seed: Annotated[
        int, in_panel(_WHICH, min=0, metavar="N", help="Other random numbers.")
    ] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Choose the scan to label next: the one that a model is least sure of, and segment it.

    Correct what was proposed and give it back with medseg add. Scans of a folder are taken into the
    data set when they are chosen.

    Examples:
    medseg next dataset/
    medseg next dataset/ -m runs/liver --from scans/ -o proposal.seg.nrrd
    """
    from medseg import annotation
    from medseg.inference import Settings

    check_one_of("--strategy", strategy, annotation.STRATEGIES)
    settings = Settings(device=word_of_device(device))
    store = annotation.Store.open(dataset)
    models = _models(store, model)
    keep_memory()
    scans = annotation.candidates(store, models[0], folder)
    with bar_of_cases(quiet) as progress:
        choice = annotation.choose(
            store, scans, models[0],
            strategy=strategy, other=models[1] if len(models) > 1 else None, seed=seed, most=most,
            settings=settings, progress=progress,
        )  # fmt: skip
    files = _files_of(store, choice, models[0])
    proposal = _keep(store, choice, files, output)
    if as_json:
        print_json(_choice_as_dict(choice, files, proposal, left=len(scans)))
        return
    print_line(f"{choice.candidate.id}: {choice.why}")
    for path in files:
        print_line(path)
    print_line(proposal)
    tell(f"correct it, then: medseg add {dataset} --id {choice.candidate.id!r} --labels SEG", quiet)


def _models(store: Store, names: Sequence[str] | None) -> list[Model]:
    from medseg.annotation import newest_models
    from medseg.inference import load_model

    if names and len(names) > 2:
        raise BadConfig(f"{len(names)} models are given; give one, or two that may disagree")
    if names:
        return [load_model(name) for name in names]
    newest = newest_models(store)[:2]
    if not newest:
        raise BadConfig(f"{store.folder}: has no trained model yet; name one with -m")
    return [load_model(str(run)) for run in newest]


def _files_of(store: Store, choice: Choice, model: Model) -> Sequence[Path]:
    """The files of the chosen scan, in the order of the data set's channels."""
    from medseg.annotation import in_order
    from medseg.inference import channel_names

    scan = choice.candidate
    if scan.stored:
        return scan.files
    # Those of a folder come in the order of the model.
    return in_order(scan.files, channel_names(model), store.channels)


def _keep(store: Store, choice: Choice, files: Sequence[Path], output: Path | None) -> Path:
    """Take the chosen scan into the data set, and write what the model proposes; returns where."""
    from medseg.annotation import ORIGINAL
    from medseg.io import write

    candidate, result = choice.candidate, choice.result
    if output is not None:
        write(result.labels, output, table=result.table)
    if not candidate.stored:
        store.add_scan(candidate.id, files)
    if output is not None:
        return output
    case = store.put_label(candidate.id, result.labels, result.table, tag=ORIGINAL)
    return case.labels[ORIGINAL]


def _choice_as_dict(
    choice: Choice, files: Sequence[Path], proposal: Path, left: int
) -> dict[str, Any]:
    doubt = choice.doubt
    return {
        "case": choice.candidate.id,
        "files": [str(path) for path in files],
        "proposal": str(proposal),
        "strategy": choice.strategy,
        "score": round(doubt.score, 4),
        "unsure": round(doubt.unsure, 4),
        "disagreement": None if doubt.disagreement is None else round(doubt.disagreement, 4),
        "why": choice.why,
        "looked_at": len(choice.doubts),
        "without_label": left,
    }


def rounds(
    dataset: Growing, device: Device = "auto", as_json: Json = False, quiet: Quiet = False
) -> None:
    """List the models that were trained in a data set: their scores on the same cases.

    They lie in DATASET/runs, and are compared on labelled cases that none of them was trained with.

    Example:
    medseg rounds dataset/
    """
    from medseg.annotation import Store, rounds_of
    from medseg.inference import Settings

    settings = Settings(device=word_of_device(device))
    store = Store.open(dataset)
    keep_memory()
    with bar_of_cases(quiet) as progress:
        every, cases = rounds_of(store, settings, progress)
    if as_json:
        print_json(
            {
                "dataset": str(dataset),
                "cases": cases,
                "rounds": [_round_as_dict(one) for one in every],
            }
        )
        return
    structures = list(dict.fromkeys(name for one in every for name in one.structures))
    head = ("round", "trained with", "from", *structures, "mean Dice")
    rows = [_row(one, structures) for one in every]
    listed = ", ".join(cases[:6]) + (f" and {len(cases) - 6} more" if len(cases) > 6 else "")
    title = f"{dataset}: rounds scored on {listed or 'nothing'}"
    print_table(title, head, rows, right=(1, *range(3, len(head))))
    if not every:
        tell(f"nothing was trained yet; medseg train {dataset} -o {dataset / 'runs' / '1'}", quiet)
    elif not cases:
        tell("every labelled case was trained with; add one with --split val to compare", quiet)


def _row(one: Round, structures: Sequence[str]) -> list[str]:
    every = one.structures
    scores = [f"{every[name]:.3f}" if name in every else "" for name in structures]
    mean = "not finished" if not one.finished else "" if one.mean is None else f"{one.mean:.3f}"
    return [one.name, f"{len(one.training)} cases", one.start, *scores, mean]


def _round_as_dict(one: Round) -> dict[str, Any]:
    return {
        "round": one.name,
        "run": str(one.run),
        "finished": one.finished,
        "training": list(one.training),
        "from": one.start or None,
        "mean_dice": None if one.mean is None else round(one.mean, 4),
        "structures": dict(one.structures),
        "dice": dict(one.dice),
    }
