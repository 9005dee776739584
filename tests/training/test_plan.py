"""Planning: every rule on data made so that its answer is known, and memory that is refused with
what would fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from medseg.config import make_config, override
from medseg.dataset.cases import Case, Dataset
from medseg.errors import BadConfig, NotEnoughMemory
from medseg.labels import Label, LabelTable
from medseg.networks.zoo import NETWORKS, build_network, check_patch
from medseg.training import plan as planning
from medseg.training.capacity import (
    Machine,
    _saved_bytes,
    check_memory,
    room_for_cases,
    training_bytes,
)
from medseg.training.plan import (
    Choice,
    Fingerprint,
    as_settings,
    make_plan,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Machine(device="cpu", memory_bytes=16_000_000_000)
GPU = Machine(device="cuda", memory_bytes=16_000_000_000)
TABLE = LabelTable((Label(1, "liver", (200, 30, 30)), Label(2, "tumour", (30, 200, 30))))
SPREAD = {"low": -100.0, "high": 240.0, "mean": 80.0, "sd": 30.0}


def data_of(table: LabelTable = TABLE, channels: tuple[str, ...] = ("MRI",)) -> Dataset:
    return Dataset(
        folder=Path("data"),
        layout="lists",
        name="Made up",
        cases=(Case(name="a", images=(Path("a.nii.gz"),), label=Path("b.nii.gz")),),
        channels=channels,
        table=table,
    )


def cases(
    shape: Any, spacing: Any, count: int = 9, zeros: float = 0.0, channels: int = 1
) -> Fingerprint:
    shapes, spacings = np.broadcast_to(shape, (count, 3)), np.broadcast_to(spacing, (count, 3))
    rows = [tuple(map(tuple, one.tolist())) for one in (shapes, spacings)]
    return Fingerprint(
        cases=count,
        shapes=rows[0],
        spacings_mm=rows[1],
        intensities=(SPREAD,) * channels,
        zeros=zeros,
    )  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine trains a voxel in a microsecond, and on a GPU in a hundredth of that."""
    speed = {"cpu": 1e-6, "cuda": 1e-8}
    monkeypatch.setattr(
        planning, "seconds_a_voxel", lambda machine, channels: speed[machine.device]
    )


def planned(
    found: Fingerprint, machine: Machine = CPU, dataset: Dataset | None = None, **fixed: Any
) -> dict[str, Any]:
    name = fixed.pop("architecture", "unet")
    given = {key.replace("__", "."): value for key, value in fixed.items()}
    return as_settings(make_plan(dataset or data_of(), found, machine, name, given))


def test_small_scans_of_one_spacing_are_seen_whole_at_their_own_spacing():
    chosen = planned(cases((35, 50, 36), (1, 1, 1)), train__time_s=1800)
    assert chosen["model.spacing_mm"] == [1, 1, 1]
    assert all(n >= size - 4 for n, size in zip(chosen["model.patch"], (35, 50, 36)))
    assert "stem" not in chosen["model.options"]
    assert chosen["model.grid"] == "scan"


def test_less_time_makes_patches_cheaper_and_never_larger():
    found = cases((128, 128, 128), (1, 1, 1))
    sizes, spacings = [], []
    for hours in (0.05, 0.5, 5, 50):
        chosen = planned(found, train__time_s=3600 * hours)
        sizes.append(
            np.prod(chosen["model.patch"]) / (2.6 if "stem" in chosen["model.options"] else 1)
        )
        spacings.append(min(chosen["model.spacing_mm"]))
    assert sizes == sorted(sizes)
    assert spacings == sorted(spacings, reverse=True)
    assert spacings[-1] == 1
    assert planning.LARGEST_PATCH["cpu"] >= max(sizes)


def test_slices_that_are_far_apart_are_prepared_at_the_finer_tenth_and_halved_last():
    spacing = np.tile((0.5, 0.5, 5.0), (20, 1))
    spacing[:4, 2] = 3.0
    chosen = planned(cases((256, 256, 24), spacing, 20), GPU)
    assert chosen["model.spacing_mm"] == [0.5, 0.5, 3.0]
    strides = chosen["model.options"]["strides"]
    assert strides[0] == [1, 1, 1]
    assert strides[1] == [2, 2, 1]
    assert chosen["model.options"]["kernels"][0] == [3, 3, 1]
    network = build_network("unet", 1, 3, **chosen["model.options"])
    check_patch(network, chosen["model.patch"])
    assert chosen["model.patch"][2] < chosen["model.patch"][0]


@pytest.mark.parametrize("name", ["unet", "resenc_unet"])
@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("minutes", [1, 600])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((200, 200, 9), (1.4, 1.4, 8)),  # hearts in short axis
        ((320, 320, 20), (0.5, 0.5, 3.6)),  # prostates
        ((512, 512, 40), (0.4, 0.4, 5)),
        ((64, 64, 6), (1, 1, 1)),  # slabs
        ((7, 64, 64), (3, 3, 3)),
        ((256, 256, 1), (1, 1, 1)),  # single slices
        ((64, 64, 1), (3, 3, 1)),
    ],
)
def test_thick_slices_and_thin_slabs_get_a_network_that_takes_its_patch(
    shape: Any, spacing: Any, minutes: int, machine: Machine, name: str
):
    found = cases(shape, spacing)
    chosen = planned(found, machine, architecture=name, train__time_s=60 * minutes)
    with torch.device("meta"):
        network = build_network(name, 1, 3, **chosen["model.options"])
    check_patch(network, chosen["model.patch"])


def test_scans_too_large_for_the_time_are_prepared_coarser_and_the_reason_says_so():
    choices = make_plan(
        data_of(), cases((512, 512, 600), (0.7, 0.7, 0.7)), CPU, "unet", {"train.time_s": 1800.0}
    )
    spacing = next(choice for choice in choices if choice.key == "model.spacing_mm")
    assert min(spacing.value) > 1.5
    assert "coarser" in spacing.reason
    patch = as_settings(choices)["model.patch"]
    extent = np.array((512, 512, 600)) * 0.7
    assert (extent / spacing.value).prod() <= 1.1 * planning.PATCHES_A_SCAN["cpu"] * max(
        np.prod(patch), 32**3
    )


def test_ct_is_clipped_to_what_structures_have_and_other_images_are_standardised_each():
    assert planned(cases(64, 1), dataset=data_of(channels=("CT",)))["model.intensity"] == [
        {"scheme": "ct", **SPREAD}
    ]
    flat = replace(cases(64, 1), intensities=({"low": 50.0, "high": 50.0, "mean": 50.0, "sd": 0},))
    zscore = [{"scheme": "zscore", "nonzero": False}]
    assert planned(flat, dataset=data_of(channels=("CT",)))["model.intensity"] == zscore
    assert planned(cases(64, 1))["model.intensity"] == zscore
    stripped = planned(cases(64, 1, zeros=1.0, channels=2), dataset=data_of(channels=("T1", "T2")))
    assert stripped["model.intensity"] == [{"scheme": "zscore", "nonzero": True}] * 2


@pytest.mark.parametrize(
    ("names", "mirror"),
    [
        (("liver", "tumour"), [0]),
        (("left kidney", "right kidney"), [0]),
        (("left kidney", "liver"), []),
    ],
)
def test_mirroring_follows_the_names_of_the_structures(names: tuple[str, ...], mirror: list[int]):
    table = LabelTable(tuple(Label(n, name, (9, 9, n)) for n, name in enumerate(names, start=1)))
    assert planned(cases(64, 1), dataset=data_of(table))["augment.mirror"] == mirror


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("size", [(16, 16, 16), (35, 50, 36), (100, 120, 90)])
def test_every_architecture_gets_a_patch_that_it_takes_and_options_it_knows(
    name: str, size: tuple[int, int, int]
):
    if name in ("unetr", "swin_unetr", "segresnet", "mednext"):
        pytest.importorskip("monai")
    chosen = planned(cases(size, 1), architecture=name, train__time_s=7200)
    with torch.device("meta"):
        check_patch(build_network(name, 1, 3, **chosen["model.options"]), chosen["model.patch"])


def test_what_a_person_fixed_stays_and_the_rest_follows_from_it():
    choices = make_plan(
        data_of(),
        cases(100, 1),
        CPU,
        "unet",
        {"model.spacing_mm": [2, 2, 2], "train.time_s": 36000},
    )
    spacing = next(choice for choice in choices if choice.key == "model.spacing_mm")
    assert spacing == Choice(key="model.spacing_mm", value=[2, 2, 2], reason="as asked")
    assert max(as_settings(choices)["model.patch"]) <= 56
    assert all(choice.reason for choice in choices)


def test_patches_vary_more_where_cases_are_seen_very_often():
    found = cases((35, 50, 36), 1, count=200)
    few, many = planned(found, train__time_s=600), planned(found, train__time_s=36_000)
    assert few["augment.rotation_share"] < many["augment.rotation_share"]
    assert "augment.elastic_share" not in few
    assert many["augment.elastic_share"] > 0


def test_an_unknown_architecture_is_refused_with_those_that_exist():
    with pytest.raises(BadConfig, match="mednext"):
        planned(cases(64, 1), architecture="vnet")


def test_a_batch_is_shared_by_processes():
    assert planned(cases(64, 1), replace(CPU, processes=3))["train.batch"] % 3 == 0


def config_of(**changes: Any) -> Any:
    chosen = planned(cases(64, 1), train__time_s=600) | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    return make_config(override({"name": "x", "data": "."}, chosen), "test")


def test_memory_that_is_not_there_is_refused_with_settings_that_fit():
    config = config_of(
        train__batch=64, model__patch=[96, 96, 96], model__options={"features": [16, 32, 64]}
    )
    with pytest.raises(NotEnoughMemory, match="would fit") as refused:
        check_memory(config, 1, 3, replace(CPU, memory_bytes=3_000_000_000))
    said = str(refused.value)
    batch = int(said.split("train.batch=")[1].split()[0])
    patch = [int(n) for n in said.split("model.patch=[")[1].split("]")[0].split(",")]
    fitting = config_of(
        train__batch=batch, model__patch=patch, model__options={"features": [16, 32, 64]}
    )
    assert check_memory(fitting, 1, 3, replace(CPU, memory_bytes=3_000_000_000)) <= 3_000_000_000
    with pytest.raises(NotEnoughMemory, match="smaller network"):
        check_memory(config, 1, 3, replace(CPU, memory_bytes=1))


def test_the_forecast_counts_what_autograd_keeps():
    """Against the tensors of a real forward pass, each storage once."""
    options = {"features": [8, 16], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    network = build_network("unet", 1, 2, **options).train()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(torch.rand(2, 1, 16, 16, 16))
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    measured = sum(size for at, size in kept.items() if at not in weights)
    meta = build_network("unet", 1, 2, **options).to("meta").train()
    forecast = _saved_bytes(meta, torch.empty(2, 1, 16, 16, 16, device="meta"))
    assert forecast == pytest.approx(measured, rel=0.05)
    del out


def test_more_voxels_and_larger_batches_need_more():
    options = {"features": [8, 16]}
    one = training_bytes("unet", options, 1, 3, (32, 32, 32), 1)
    assert (
        one
        < training_bytes("unet", options, 1, 3, (32, 32, 32), 4)
        < training_bytes("unet", options, 1, 3, (64,) * 3, 4)
    )


def test_a_patch_holds_nine_of_ten_scans_where_there_is_time_for_that_else_the_median_one():
    shapes = [(36, 48, 36)] * 6 + [(36, 56, 36)] * 3 + [(60, 90, 60)]
    found = cases(shapes, 1.0, count=10)
    assert planned(found, train__time_s=1800.0)["model.patch"] == [40, 56, 40]
    # A microsecond a voxel: three quarters of these seconds are 2,500 patches of about 80,000
    # voxels.
    assert planned(found, train__time_s=2500 * 0.08 / 0.75)["model.patch"] == [40, 48, 40]


def test_cases_lie_on_a_card_where_training_leaves_room():
    content = {
        "name": "x", "data": "data", "train": {"steps": 1},
        "model": {
            "name": "unet", "options": {"features": [4, 8]}, "patch": [16, 16, 16],
            "spacing_mm": 1.0,
        },
    }  # fmt: skip
    config = make_config(content, "test")
    rest = {"processes": 1, "device": torch.device("cuda")}
    need_bytes = training_bytes("unet", {"features": [4, 8]}, 1, 3, (16, 16, 16), 1, "cuda")
    for free_bytes, room_bytes in ((0, 0), (10**10, 7 * 10**9 - need_bytes)):
        with mock.patch.object(torch.cuda, "mem_get_info", return_value=(free_bytes, 10**11)):
            assert room_for_cases(config, 1, 3, **rest) == room_bytes  # type: ignore[arg-type]
    assert room_for_cases(config, 1, 3, processes=1, device=torch.device("cpu")) == 0
