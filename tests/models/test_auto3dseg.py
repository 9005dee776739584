"""Checkpoints of Auto3DSeg as data: config, labels, weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")

from making import monai as making
from medseg.errors import BadModel
from medseg.models import facts_of, is_model, list_models, load_models, write_models
from medseg.models.auto3dseg import is_auto3dseg


def refused(folder: Path) -> str:
    with pytest.raises(BadModel) as caught:
        load_models([str(folder)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_is_kept_to_its_last_column(tmp_path):
    model = load_models([str(making.write_auto3dseg(tmp_path / "model"))])[0]
    label = model.table[1]
    assert (label.name, label.type.value, label.type_modifier.meaning) == (
        "Part 1",
        "78961009",
        "Left",
    )
    assert label.region.meaning == "Abdomen" and label.region_modifier is None
    write_models([model], tmp_path / "own")
    again = load_models([str(tmp_path / "own")])[0]
    assert again.table == model.table
    assert again.spec.recipe == model.spec.recipe


def test_folders_zips_and_the_file_itself_are_models(tmp_path):
    folder = making.write_auto3dseg(tmp_path / "models" / "liver")
    with zipfile.ZipFile(tmp_path / "models" / "liver.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    specs = []
    for path in (folder, folder / "model.pt", tmp_path / "models" / "liver.zip"):
        assert is_auto3dseg(path) and is_model(path)
        specs.append(load_models([str(path)])[0].spec.sha256)
    assert len(set(specs)) == 1
    assert len(list_models(tmp_path / "models")) == 2
    facts = facts_of(load_models([str(folder)]))
    assert facts["network"] == "segresnet" and facts["labels"] == {"1": "Part 1", "2": "Part 2"}


def test_regions_get_the_labels_that_the_config_gives_them(tmp_path):
    folder = making.write_auto3dseg(
        tmp_path / "model", sigmoid=True, class_index=[[3], [1, 2, 3], [1, 3]]
    )
    spec = load_models([str(folder)])[0].spec
    assert spec.recipe.ending.order == (1, 2, 0)
    assert spec.classes == (0, 2, 1, 3)
    folder = making.write_auto3dseg(tmp_path / "brats-gli", sigmoid=True)
    spec = load_models([str(folder)])[0].spec
    assert spec.classes == (0, 2, 1, 3)
    folder = making.write_auto3dseg(
        tmp_path / "model", sigmoid=True, class_index=[[1, 2], [1], [1, 2]]
    )
    assert "class_index" in refused(folder)


def test_the_network_may_be_named_in_full_and_its_activation_with_what_changes_nothing(tmp_path):
    folder = making.write_auto3dseg(tmp_path / "model")
    plain = load_models([str(folder)])[0].spec
    content = torch.load(folder / "model.pt", weights_only=True)
    content["config"]["network"] |= {
        "_target_": "monai.networks.nets.segresnet_ds.SegResNetDS",
        "act": ["RELU", {"inplace": False}],
    }
    torch.save(content, folder / "model.pt")
    assert load_models([str(folder)])[0].spec.options == plain.options


def test_what_is_not_known_is_refused_by_name(tmp_path):
    for change, word in (
        ({"network": {"norm": "none"}}, "model.pt: its config makes no network"),
        ({"network": {"act": ["relu", {"slope": 1}]}}, "act"),
        ({"normalize_mode": "histogram"}, "histogram"),
        ({"network": {"_target_": "os.system"}}, "os.system"),
        ({"network": {"_target_": "SwinUNETR"}}, "SwinUNETR"),
        ({"network": {"upsample_mode": "nontrainable"}}, "upsample_mode"),
        ({"roi_size": [24, 24]}, "roi_size"),
        ({"roi_size": [24, 24, 10**400]}, "roi_size"),
        ({"extra_modalities": torch.zeros(2)}, "extra_modalities"),
        ({"sigmoid": "yes"}, "sigmoid"),
        ({"extra_modalities": {"b": "ct"}}, "1 channels"),
        ({"normalize_mode": "ct", "intensity_bounds": None}, "intensity_bounds"),
    ):
        folder = making.write_auto3dseg(tmp_path / "model")
        content = torch.load(folder / "model.pt", weights_only=True)
        network = content["config"]["network"] | change.pop("network", {})
        content["config"] |= change | {"network": network}
        torch.save(content, folder / "model.pt")
        assert word in refused(folder)
    (folder / "labels.csv").unlink()
    assert "labels.csv" in refused(folder)
    making.write_auto3dseg(folder)
    torch.save({"state_dict": {}}, folder / "model.pt")
    assert "no config" in refused(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = making.write_auto3dseg(tmp_path / "model")
    content = torch.load(folder / "model.pt", weights_only=True)
    content["config"]["network"]["init_filters"] = 16
    torch.save(content, folder / "model.pt")
    assert "do not fit" in refused(folder)
