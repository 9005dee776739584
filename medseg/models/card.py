"""The model card: README.md of a model folder, filled from what training knows, open where only a
person knows.

Front matter as Hugging Face reads it (huggingface.co/docs/hub/model-cards), sections after Mitchell
et al. 2019 (Model Cards for Model Reporting). Nothing of a single case gets in: counts, medians and
statistics only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from medseg.labels import LabelTable
from medseg.models.folder import Checkpoint
from medseg.models.spec import ModelSpec
from medseg.packages import versions
from medseg.text import harmless

#: What stands before everything that is left to a person; search for it before the model is passed
#: on.
TO_COMPLETE = "To be completed by a person"
_DESCRIPTION = "A model for segmenting medical images, trained with medseg."
_ARITHMETIC = {
    "percentiles": "scaled so that percentiles 0.5 and 99.5 of the scan become 0 and 1",
    "zscore": "minus the mean of the scan, over its standard deviation",
    "ct": "clipped to {low:g} to {high:g}, minus {mean:.4g}, over {sd:.4g}",
}


def model_card(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    """The text of README.md for a trained model.

    facts, each may be missing: cases ({"training": n, "validation": n}), layout of the data set,
    fingerprint (see `training.plan.Fingerprint.as_json`), steps, training_seconds, few_passes (a
    sentence where they were too few), scores (the summary of an evaluation), score_titles (which
    scores of it the card shows, and what it calls them).
    """
    spec, table = checkpoint.spec, checkpoint.table
    scores = facts.get("scores") or {}
    parts = [
        _front_matter(spec, scores),
        f"# {spec.name}\n\n{spec.description or _DESCRIPTION}",
        (
            "For research. Not a medical device: a person who can judge the images looks at every"
            " result."
        ),
        "```bash\npip install medseg\nmedseg infer SCAN -m MODEL_FOLDER -o labels.nii.gz\n```",
        "## Intended use",
        _open(
            "whom and what it is for",
            "what it must not be used for",
            "who looks at its results, and how",
        ),
        "## Input",
        _input(spec),
        "## Labels",
        _labels(spec, table),
        "## Training data",
        _data(facts),
        _open(
            "where the scans come from: sites, scanners, protocols, years",
            "who the people are: numbers by age, sex and disease",
            "who annotated, how, and how well annotators agree",
            "consent, ethics approval and what the law of data protection asks for",
            "the licence of the data",
        ),
        "## Training",
        _training(checkpoint, facts),
        "## Scores",
        _scores(scores, facts.get("score_titles", {}), spec.cleanup),
        "## Limits",
        _open(
            "on which scans it fails, with examples",
            "scores on data of other sites, and by age, sex, scanner and disease",
            "whom to tell of errors",
        ),
        "## Licence",
        _open(
            "the licence of the weights, also as `license` at the top of this file", "whom to cite"
        ),
        "## Versions",
        ", ".join(f"{name} {number}" for name, number in versions().items())
        + f". SHA-256 of the weights: `{spec.sha256}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(spec: ModelSpec, scores: Mapping[str, Any]) -> str:
    metrics = [
        {"type": "dice", "name": f"Dice, {name}", "value": round(statistics["dice"]["mean"], 4)}
        for name, statistics in scores.get("structures", {}).items()
        if statistics.get("dice", {}).get("mean") is not None
    ]
    overall = scores.get("mean_over_structures", {}).get("dice")
    if overall is not None:
        metrics.insert(
            0, {"type": "dice", "name": "Dice, mean over structures", "value": round(overall, 4)}
        )
    content: dict[str, Any] = {
        "license": "unknown",
        "library_name": "medseg",
        "pipeline_tag": "image-segmentation",
        "tags": [
            "medical",
            "segmentation",
            "3d",
            spec.architecture,
            *(name.lower() for name in spec.channel_names),
        ],
    }
    if metrics:
        content["metrics"] = ["dice"]
        dataset = {"name": spec.name, "type": "private", "split": "validation"}
        result = {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": metrics}
        content["model-index"] = [{"name": spec.name, "results": [result]}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _open(*questions: str) -> str:
    return f"**{TO_COMPLETE}:**\n\n" + "\n".join(f"- [ ] {question}" for question in questions)


def _input(spec: ModelSpec) -> str:
    rows = []
    for number, scheme in enumerate(spec.intensities):
        name = spec.channel_names[number] if spec.channel_names else "any"
        rows.append((number + 1, name, _ARITHMETIC[scheme.scheme].format(**scheme.model_dump())))
    spacing = " x ".join(f"{mm:g}" for mm in spec.spacing)
    grid = "along the scan's own axes" if spec.grid == "scan" else "along right, anterior, superior"
    return (
        _table(("channel", "what", "intensities"), rows)
        + f"\n\nScans of any size, orientation and spacing are resampled to {spacing} mm {grid} and"
        f" looked at in windows of {' x '.join(map(str, spec.patch))} voxels; labels come back on"
        " the scan's own grid."
    )


def _labels(spec: ModelSpec, table: LabelTable) -> str:
    rows = [
        (label.value, label.name, label.type.meaning if label.type else "")
        for label in table.labels
    ]
    note = "\n\nRegions may overlap; where they do, later ones lie on top." if spec.regions else ""
    coded = any(row[2] for row in rows)
    return (
        _table(("value", "structure", "code"), rows if coded else [row[:2] for row in rows]) + note
    )


def _data(facts: Mapping[str, Any]) -> str:
    cases, fingerprint = facts.get("cases", {}), facts.get("fingerprint") or {}
    lines = []
    if cases:
        lines.append(
            f"{cases['training']} scans to train from and {cases.get('validation', 0)} others to"
            " validate"
        )
        if facts.get("layout"):
            lines[-1] += f", from a data set of the layout {facts['layout']}"
    if "median_shape" in fingerprint:
        shape = " x ".join(f"{n:g}" for n in fingerprint["median_shape"])
        spacing = " x ".join(f"{mm:g}" for mm in fingerprint["median_spacing_mm"])
        lines.append(
            f"the median scan has {shape} voxels of {spacing} mm along right, anterior, superior"
        )
        low, high = fingerprint["spacing_range_mm"]
        if low != high:
            ranges = ", ".join(f"{a:g} to {b:g}" if a != b else f"{a:g}" for a, b in zip(low, high))
            lines[-1] += f" (spacings from {ranges})"
    return (
        ". ".join(line[0].upper() + line[1:] for line in lines) + "."
        if lines
        else "Nothing is recorded."
    )


def _training(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str:
    spec = checkpoint.spec
    options = ", ".join(f"{key} {value}" for key, value in spec.options.items())
    lines = [
        f"Network: {spec.architecture}, {_parameters(spec):,}"
        f" parameters{f' ({options})' if options else ''}."
    ]
    if facts.get("steps"):
        took = (
            f" in {_duration(facts['training_seconds'])}" if facts.get("training_seconds") else ""
        )
        lines.append(f"Trained for {facts['steps']:,} steps{took}.")
    if facts.get("few_passes"):
        lines.append(f"**Hardly trained: {facts['few_passes']}.**")
    if spec.mirror:
        lines.append(
            f"Patches were mirrored along {' and '.join('RAS'[axis] for axis in spec.mirror)} at"
            " random."
        )
    else:
        lines.append("Patches were not mirrored.")
    return "\n".join(f"- {line}" for line in lines)


def _parameters(spec: ModelSpec) -> int:
    import torch

    from medseg.networks import build_network

    with torch.device("meta"):
        network = build_network(spec.architecture, spec.inputs, spec.outputs, **spec.options)
    return sum(parameter.numel() for parameter in network.parameters())


def _scores(
    scores: Mapping[str, Any],
    titles: Mapping[str, str],
    cleanup: Sequence[Mapping[str, Any]],
) -> str:
    structures = scores.get("structures", {})
    if not structures:
        return f"No scan was kept apart to score it.\n\n{_open('scores on scans it has not seen')}"
    overall = scores.get("mean_over_structures", {})
    sentences = [
        "Means over scans that were not trained from, with 95 % intervals of the mean (bootstrap "
        "over scans). The weights that were kept were chosen on some of them, so other scans may "
        "do slightly worse."
    ]
    if cleanup:
        steps = "; ".join(map(_step, cleanup))
        sentences.append(
            f"The labels were cleaned up: {steps}. Training chooses such steps on these same "
            "scans, which makes the scores slightly too good."
        )
    if left_out := _most_left_out(structures, titles):
        sentences.append(
            f"Scans left out of a mean because a structure is missing there: up to {left_out}."
        )
    if failures := len(scores.get("cases", {}).get("failed", ())):
        sentences.append(f"Scans that could not be scored: {failures}.")
    return f"{_table_of_scores(structures, overall, titles)}\n\n{' '.join(sentences)}"


def _columns(structures: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """The scores that any structure has, in the order of the table."""
    return [column for column in titles if any(column in one for one in structures.values())]


def _table_of_scores(
    structures: Mapping[str, Any], overall: Mapping[str, Any], titles: Mapping[str, str]
) -> str:
    """A row a structure, and one of means over them."""
    columns = _columns(structures, titles)
    rows = [
        (name, sum(one["status"].values()), *(_statistic(one.get(column)) for column in columns))
        for name, one in structures.items()
    ]
    rows.append(("mean", "", *(_number(overall.get(column)) for column in columns)))
    return _table(("structure", "scans", *(titles[column] for column in columns)), rows)


def _most_left_out(structures: Mapping[str, Any], titles: Mapping[str, str]) -> int:
    """How many scans the mean with the fewest is without."""
    scores = [one[column] for one in structures.values() for column in titles if column in one]
    return max((score["n_excluded"] + score["n_inf"] for score in scores), default=0)


def _statistic(one: Mapping[str, Any] | None) -> str:
    if one is None or one.get("mean") is None:
        return "-"
    interval = one.get("ci95")
    return _number(one["mean"]) + (
        f" ({_number(interval[0])} to {_number(interval[1])})" if interval else ""
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _step(step: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in step.items() if key != "step")
    return f"{step.get('step', '?')} ({options})" if options else str(step.get("step", "?"))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        f"{minutes / 60:.1f} hours"
        if minutes >= 90
        else f"{minutes:.0f} minutes"
        if minutes >= 2
        else f"{seconds:.0f} s"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    rows = list(rows)
    lines = [head[: len(rows[0])] if rows else head, *rows]
    text = ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]
    text.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(text)


def _cell(value: object) -> str:
    """A value without what Markdown or HTML would read as a command."""
    text = " ".join(harmless(value).split())
    for character in "\\|`*_[]<>":
        text = text.replace(character, f"\\{character}")
    return text
