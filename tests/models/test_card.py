"""The model card: what is known is in it, what only a person knows is marked, and no case is
named.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from medseg.evaluation.metrics import score_titles
from medseg.evaluation.summary import summarise
from medseg.labels import Code, Label, LabelTable
from medseg.models.card import TO_COMPLETE, model_card
from medseg.models.folder import Checkpoint
from medseg.models.spec import ModelSpec
from medseg.networks.zoo import build_network

TABLE = LabelTable(
    (
        Label(1, "Anterior", (255, 0, 0), type=Code("SCT", "1", "Head of hippocampus")),
        Label(2, "Tail | <script>alert(1)</script>", (0, 255, 0)),
    )
)
OPTIONS = {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}


def checkpoint(**changes) -> Checkpoint:
    fields = {
        "name": "hippocampus", "architecture": "unet", "options": OPTIONS, "classes": (0, 1, 2),
        "patch": (40, 56, 40), "spacing_mm": (1.0, 0.8, 2.5), "sha256": "a" * 64,
    }  # fmt: skip
    return Checkpoint(ModelSpec(**{**fields, **changes}), TABLE, Path("nowhere"))


def evaluated(cases: int = 12):
    rng = np.random.default_rng(0)
    rows = [
        {"case": f"Mustermann_Erika_{n}", "structure": label.name, "status": "both",
         "dice": float(rng.uniform(0.7, 0.9)), "hausdorff95_mm": float("inf") if n == 0 else 1.5,
         "surface_dice": 0.95}
        for n in range(cases) for label in TABLE.labels
    ]  # fmt: skip
    names = sorted({row["case"] for row in rows})
    broken = {"Mustermann_Max": "Mustermann_Max.nii.gz: is cut off"}
    return {
        "cases": {
            "scored": names,
            "without_prediction": [],
            "without_reference": [],
            "failed": broken,
        },
        "problems": ["Mustermann_Max: is cut off"],
        **summarise(rows),
    }


def facts(**changes):
    found = {
        "cases": {"training": 156, "validation": 12}, "layout": "decathlon", "steps": 4321,
        "training_seconds": 1740,
        "fingerprint": {
            "cases": 156, "median_shape": [35.0, 50.0, 36.0], "smallest_shape": [31, 40, 24],
            "largest_shape": [43, 59, 47], "median_spacing_mm": [1.0, 1.0, 1.0],
            "spacing_range_mm": [[0.9, 1.0, 1.0], [1.1, 1.0, 2.0]], "intensities": [{"mean": 1.0}],
            "zeros": 0.1,
        },
        "scores": evaluated(), "score_titles": score_titles(),
    }  # fmt: skip
    return {**found, **changes}


def parts_of(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_what_hugging_face_reads():
    summary = evaluated()
    front, _ = parts_of(model_card(checkpoint(channel_names=("MRI T1",)), facts(scores=summary)))

    assert front["library_name"] == "medseg" and front["pipeline_tag"] == "image-segmentation"
    assert front["license"] == "unknown"
    assert {"medical", "unet", "mri t1"} <= set(front["tags"])
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert model["name"] == "hippocampus" and result["task"] == {"type": "image-segmentation"}
    assert {"name", "type", "split"} == set(result["dataset"])
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert all(metric["type"] == "dice" for metric in result["metrics"])
    for label in TABLE.labels:
        mean = summary["structures"][label.name]["dice"]["mean"]
        assert values[f"Dice, {label.name}"] == pytest.approx(mean, abs=5e-5)
    assert values["Dice, mean over structures"] == pytest.approx(
        summary["mean_over_structures"]["dice"], abs=5e-5
    )


def test_what_training_knows_is_in_the_card():
    summary = evaluated()
    spec = {"mirror": (0, 2), "cleanup": ({"step": "keep_largest", "labels": [1]},)}
    _, body = parts_of(model_card(checkpoint(**spec), facts(scores=summary)))

    network = build_network("unet", 1, 3, **OPTIONS)
    assert f"unet, {sum(p.numel() for p in network.parameters()):,} parameters" in body
    for text in ("156 scans to train from and 12 others to validate", "4,321 steps in 29 minutes",
    "decathlon",
                 "35 x 50 x 36 voxels of 1 x 1 x 1 mm", "0.9 to 1.1, 1, 1 to 2", "1 x 0.8 x 2.5 mm",
                 "40 x 56 x 40",
                 "mirrored along R and S", "keep_largest (labels [1])", "a" * 64,
                 "could not be scored: 1"):  # fmt: skip
        assert text in body, text
    one = summary["structures"]["Anterior"]["dice"]
    low, high = one["ci95"]
    assert (
        f"| Anterior | 12 | {one['mean']:.3f} ({low:.3f} to {high:.3f}) | 1.500 (1.500 to 1.500) |"
        in body
    )
    assert "is missing there: up to 1" in body
    assert "| 1 | Anterior | Head of hippocampus |" in body


def test_no_case_is_named_and_names_are_no_markup():
    card = model_card(checkpoint(), facts())

    assert "Mustermann" not in card
    _, body = parts_of(card)
    assert not re.search(r"(?<!\\)<script", body)
    # A table has as many columns in all of its lines.
    for lines in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1


def test_what_only_a_person_knows_is_marked():
    _, body = parts_of(model_card(checkpoint(), facts()))

    sections = dict(re.findall(r"## (.+)\n\n((?:.|\n)*?)(?=\n## |\Z)", body))
    for name in ("Intended use", "Training data", "Limits", "Licence"):
        assert TO_COMPLETE in sections[name], name
    for word in ("consent", "licence of the data", "age, sex", "must not be used"):
        assert word in body
    assert TO_COMPLETE not in sections["Scores"] and "Not a medical device" in body


@pytest.mark.parametrize(
    "missing", ["cases", "layout", "fingerprint", "steps", "training_seconds", "scores", None]
)
def test_a_card_is_written_from_whatever_is_known(missing):
    known = {key: value for key, value in facts().items() if key != missing} if missing else {}

    front, body = parts_of(
        model_card(
            checkpoint(
                intensity=({"scheme": "ct", "low": -100, "high": 240, "mean": 80.25, "sd": 32.0},)
            ),
            known,
        )
    )

    assert "None" not in body and "nan" not in body
    assert "clipped to -100 to 240, minus 80.25, over 32" in body
    if missing in ("scores", None):
        assert "model-index" not in front and "No scan was kept apart" in body


def test_several_channels_regions_and_single_cases():
    names = ("FLAIR", "T1")
    card = model_card(
        checkpoint(channels=2, channel_names=names, regions=True), facts(scores=evaluated(cases=1))
    )

    _, body = parts_of(card)
    assert "| 1 | FLAIR |" in body and "| 2 | T1 |" in body
    assert "Regions may overlap" in body
    # No interval from one case, no mean of infinity.
    assert re.search(r"\| Anterior \| 1 \| 0\.\d{3} \| - \|", body)
