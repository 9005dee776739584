"""What runs networks: heads applied last, ensembles, mirroring, and what happens when memory or
numbers run out.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from making import networks as tiny
from medseg.errors import BadConfig, BadModel, DataWarning, NotEnoughMemory
from medseg.inference.backends import cards
from medseg.inference.backends.activations import activation_bytes
from medseg.inference.backends.kept import models_kept_open
from medseg.inference.backends.opening import (
    BACKENDS,
    _openvino_pays,
    blended_features,
    open_models,
)
from medseg.inference.backends.openvino import openvino_core
from medseg.inference.backends.predictor import Predictor, choose_device, deferred_width
from medseg.inference.backends.pytorch import _Torch, choose_precision, open_torch, steps_down
from medseg.inference.settings import Settings
from medseg.models.folder import Checkpoint, load_checkpoint
from medseg.networks.layers import unfold_cells
from medseg.networks.unet import UNet
from medseg.networks.zoo import NETWORKS, small

pytestmark = pytest.mark.usefixtures("known_networks", "one_thread")

CPU = torch.device("cpu")
STEMLESS = {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_unet(tmp_path_factory.mktemp("models") / "unet")))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Two networks of one plan with other weights, whose heads may be applied last."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = UNet(1, 3, **STEMLESS)
        with mock.patch.object(tiny, "build_network", return_value=network):
            folder = tiny.save_unet(tmp_path_factory.mktemp("models") / str(seed), options=STEMLESS)
        made.append(load_checkpoint(str(folder)))
    return made


@pytest.fixture(scope="module")
def sloped(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """Two networks of cells in whose logits voxels' own intensities enter, and one without that."""
    made = []
    for seed, own in ((1, True), (2, True), (3, False)):
        torch.manual_seed(seed)
        options = STEMLESS | {"stem": 2, "own_intensity": own}
        network = UNet(1, 3, **options)
        if network.slope is not None:
            nn.init.normal_(network.slope.weight)
            nn.init.normal_(network.slope.bias)
        with mock.patch.object(tiny, "build_network", return_value=network):
            folder = tiny.save_unet(tmp_path_factory.mktemp("models") / str(seed), options=options)
        made.append(load_checkpoint(str(folder)))
    return made


def patches(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def logits_of(predictor: Predictor, x: Tensor) -> np.ndarray:
    """(B, K, X, Y, Z), the head applied where there is one."""
    features = predictor(x).float()
    if predictor.head is None:
        return features.numpy()

    def made(weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return np.einsum("kf,bfxyz->bkxyz", weights, features.numpy()) + bias[:, None, None, None]

    logits, slopes = made(predictor.head.weights, predictor.head.bias), predictor.head.slopes
    if slopes is not None:
        own = features[:, None, slopes.own : slopes.own + 8].numpy()
        logits = logits + (made(slopes.weights, slopes.bias)[:, :, None] * own).reshape(
            logits.shape
        )
    return unfold_cells(torch.from_numpy(logits), predictor.cell).numpy()


def truth(checkpoint: Checkpoint, x: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.network().double()(x.double()).numpy()


def close(a: np.ndarray, b: np.ndarray, share: float = 1e-4) -> bool:
    """Whether two arrays differ by at most a share of the spread of the second."""
    return float(np.abs(a - b).max()) <= share * float(np.ptp(b))


def test_every_backend_gives_the_networks_logits(unet: Checkpoint, others: list[Checkpoint]):
    for name, opened in BACKENDS.items():
        if importlib.util.find_spec("openvino") is None and name == "openvino":
            continue
        for checkpoint in (unet, others[0]):
            predictor = opened(checkpoint, CPU, torch.float32)
            assert predictor.backend == name
            assert close(logits_of(predictor, patches()), truth(checkpoint, patches()), 5e-3), name


#: A U-Net for thick slices, and a patch that every architecture takes.
THICK = {
    "features": [16, 32, 32],
    "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
    "kernels": [[3, 3, 1], [3] * 3, [3] * 3],
}
PATCH = (32, 32, 64)
#: On OpenVINO only one network with shortcuts, which ended the process, a transformer, and one of
#: unequal axes: compiling takes long.
RUNS = [("torch", name) for name in (*NETWORKS, "thick")] + [
    ("openvino", name) for name in ("resenc_unet", "primus", "thick")
]


@pytest.mark.parametrize(("backend", "architecture"), RUNS)
def test_every_architecture_runs(tmp_path: Path, architecture: str, backend: str):
    """Whether or not it has a head that can be applied last, on several channels and patches of
    unequal sides.
    """
    if backend == "openvino":
        pytest.importorskip("openvino")
    if architecture in ("unetr", "swin_unetr", "segresnet", "mednext"):
        pytest.importorskip("monai")
    options = THICK if architecture == "thick" else small(architecture, PATCH)
    options.pop("deep_supervision", None)
    name = "unet" if architecture == "thick" else architecture
    checkpoint = load_checkpoint(
        str(tiny.save_two_channel_network(tmp_path / "m", name, options, PATCH))
    )
    x = torch.rand(1, 2, *PATCH, generator=torch.Generator().manual_seed(0))
    predictor = BACKENDS[backend](checkpoint, CPU, torch.float32)
    assert close(logits_of(predictor, x), truth(checkpoint, x), 1e-3)
    assert blended_features([checkpoint]) == (predictor.features, predictor.cell)
    assert activation_bytes(checkpoint) > 4 * 3 * np.prod(PATCH)


def test_a_network_that_openvino_cannot_run_is_refused_and_auto_goes_on_without_it(
    others: list[Checkpoint],
):
    pytest.importorskip("openvino")
    refusal = mock.patch(
        "openvino.convert_model", side_effect=RuntimeError("no such operation\nat line 3")
    )
    with (
        refusal,
        pytest.raises(
            BadConfig, match=r"OpenVINO cannot run .* \(no such operation\); use --backend torch"
        ),
    ):
        open_models(others[:1], backend="openvino", device="cpu")
    with refusal, mock.patch("medseg.inference.backends.opening._openvino_pays", return_value=True):
        assert open_models(others[:1], device="cpu", precision="auto").backend == "torch"


def test_exact_fp32_is_within_a_ten_thousandth_of_the_spread(
    unet: Checkpoint, others: list[Checkpoint]
):
    for checkpoint in (unet, others[0]):
        predictor = open_models([checkpoint], precision="fp32", device="cpu")
        assert close(logits_of(predictor, patches()), truth(checkpoint, patches()), 1e-4)


def test_openvino_has_one_core_that_is_never_freed(unet: Checkpoint, others: list[Checkpoint]):
    """Its plugin frees the stack that signal handlers run on together with a core: Ctrl-C crashed
    after that.
    """
    openvino = pytest.importorskip("openvino")
    openvino_core.cache_clear()
    with mock.patch.object(openvino, "Core", side_effect=openvino.Core) as made:
        for checkpoint in (unet, *others):
            BACKENDS["openvino"](checkpoint, CPU, torch.float32)
    assert made.call_count == 1
    assert openvino_core() is openvino_core()


def test_openvino_that_is_not_installed_says_how_to_get_it(
    unet: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BadConfig, match="pip install"):
        open_models([unet], backend="openvino", device="cpu")


def test_a_head_is_applied_last_only_where_the_network_is_narrow_or_has_many_classes():
    def width(features: int, classes: int, **options) -> tuple[int, int]:
        return deferred_width(UNet(1, classes, features=(features, 8), **options))

    assert width(16, 2) == (16, 1)
    assert width(32, 2) == (0, 1)
    assert width(32, 118) == (32, 1)
    assert width(32, 2, stem=2) == (32, 2)  # 4 numbers a voxel
    assert width(256, 2, stem=2) == (0, 1)
    assert deferred_width(nn.Conv3d(1, 2, 1)) == (0, 1)


def test_an_ensemble_is_the_mean_of_the_logits(others: list[Checkpoint]):
    expected = np.mean([truth(one, patches()) for one in others], 0)
    joined = open_models(others, device="cpu", precision="fp32")
    assert joined.head is not None
    assert (joined.features, 1) == blended_features(others) == (8, 1)
    assert close(logits_of(joined, patches()), expected)
    with mock.patch("medseg.inference.backends.predictor.ALWAYS_DEFER", 4):
        joined = open_models(others, device="cpu", precision="fp32")
        assert joined.head is None
        assert (joined.features, 1) == blended_features(others) == (3, 1)
    assert close(logits_of(joined, patches()), expected)


@pytest.mark.parametrize("precision", ["fp32", "auto", "bf16"])
@pytest.mark.parametrize("which", [(0,), (0, 1), (2, 0)])
def test_own_intensities_are_blended_and_multiplied_last(
    sloped: list[Checkpoint], which: tuple[int, ...], precision
):
    models = [sloped[n] for n in which]
    expected = np.mean([truth(one, patches()) for one in models], 0)
    joined = open_models(models, device="cpu", precision=precision)
    assert joined.head is not None
    assert joined.head.slopes is not None
    assert (
        (joined.features, joined.cell)
        == blended_features(models)
        == (4 * len(which) + 8 * which.count(0) + 8 * which.count(1), 2)
    )
    assert close(logits_of(joined, patches()), expected, 1e-4 if precision == "fp32" else 0.05)
    if importlib.util.find_spec("openvino") is not None and len(which) == 1:
        other = BACKENDS["openvino"](models[0], CPU, torch.float32)
        assert close(logits_of(other, patches()), expected, 5e-3)


def test_models_whose_cells_differ_are_averaged_by_their_logits(tmp_path: Path):
    common = {"features": [4, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1]}
    models = [
        load_checkpoint(
            str(
                tiny.save_two_channel_network(
                    tmp_path / str(stem), "unet", common | {"stem": stem}, PATCH
                )
            )
        )
        for stem in (1, 2)
    ]
    x = torch.rand(1, 2, *PATCH, generator=torch.Generator().manual_seed(0))
    joined = open_models(models, device="cpu", precision="fp32")
    assert (joined.features, joined.cell) == blended_features(models) == (models[0].spec.outputs, 1)
    assert close(logits_of(joined, x), np.mean([truth(one, x) for one in models], 0))


def test_mirroring_is_the_mean_of_all_mirrored_answers_mirrored_back(others: list[Checkpoint]):
    x = patches(1)
    flips = [(), (2,), (4,), (2, 4)]
    expected = np.mean([np.flip(truth(others[0], x.flip(dims)), dims) for dims in flips], 0)
    mirrored = open_models(others[:1], device="cpu", precision="fp32", mirror=(0, 2))
    assert close(logits_of(mirrored, x), expected)


class Full(nn.Module):
    """Runs out of memory at certain calls, as a GPU does, and with more than `most` patches at
    once.
    """

    def __init__(self, at: set[int], most: int = 100) -> None:
        super().__init__()
        self.calls, self.at, self.most = 0, at, most

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 in self.at or len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat((x, -x), 1)


def on_gpu(network: nn.Module) -> _Torch:
    """A network that believes that it runs on a GPU."""
    run = _Torch(network, "full", CPU, torch.float32, exact=True)
    run.device = mock.Mock(type="cuda")
    run.forward = lambda x, dtype: run.network(x)  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("at", [0, 2, 4])
def test_out_of_memory_halves_the_batch_then_goes_to_the_cpu_and_says_so(at: int):
    expected = [torch.cat((x, -x), 1) for x in [patches(4)] * 5]
    run = on_gpu(Full({at}))
    with (
        mock.patch.object(Tensor, "to", lambda self, *rest, **named: self),
        pytest.warns(DataWarning) as told,
    ):
        results = [run(patches(4)) for _ in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
    assert run.most == 2
    assert "2 at a time" in str(told[0].message)


def test_out_of_memory_with_one_window_moves_to_the_cpu():
    run = on_gpu(Full({0}))
    with (
        mock.patch.object(Tensor, "to", lambda self, *rest, **named: self),
        pytest.warns(DataWarning, match="CPU"),
    ):
        result = run(patches(1))
    assert run.device.type == "cpu"
    assert torch.equal(result, torch.cat((patches(1), -patches(1)), 1))


def test_the_network_on_the_cpu_stays_there_when_another_is_placed_on_a_device():
    """The device `meta` stands for a card: everything moves there and nothing is computed."""
    network = nn.Conv3d(1, 2, 1)
    expected = network(patches(1))
    run = _Torch(network, "two", torch.device("meta"), torch.float32, exact=True)
    assert {weights.device.type for weights in run.network.parameters()} == {"meta"}
    assert {weights.device.type for weights in run.plain.parameters()} == {"cpu"}
    run.place(CPU, torch.float32)
    assert torch.equal(run(patches(1)), expected)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Unable to find an engine to execute this computation"),
    ],
    ids=["torch", "cublas", "cudnn", "no engine"],
)
def test_every_way_of_saying_that_memory_is_short_is_understood(error: RuntimeError):
    class Short(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 1:
                raise error
            return -x

    run = on_gpu(Short())
    to = mock.patch.object(Tensor, "to", lambda self, *rest, **named: self)
    with to, pytest.warns(DataWarning, match="2 at a time"):
        assert torch.equal(run(patches(4)), -patches(4))


def test_a_card_without_room_for_the_weights_leaves_the_work_to_the_cpu():
    class Heavy(nn.Conv3d):
        def to(self, *rest: Any, **named: Any) -> nn.Module:
            if rest and isinstance(rest[0], torch.device) and rest[0].type == "meta":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().to(*rest, **named)

    network = Heavy(1, 2, 1)
    with pytest.warns(DataWarning, match="the CPU goes on"):
        run = _Torch(network, "heavy", torch.device("meta"), torch.float32, exact=True)
    assert run.device == CPU and run(patches(1)).shape[1] == 2


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:x", "cuda:", "mps:0", "cuda:-1", "", "0"])
def test_a_device_that_is_none_is_refused_and_not_run_on_the_cpu(device: str):
    with pytest.raises(BadConfig, match=f"no device '{device}'; use auto, cpu, cuda"):
        choose_device(device)
    with pytest.raises(BadConfig, match="no device"):
        Settings(device=device)


def test_cards_are_called_by_their_numbers():
    here = mock.patch.multiple(
        torch.cuda, is_available=lambda: True, device_count=lambda: 2, spec_set=True
    )
    with here, mock.patch("medseg.inference.backends.predictor.problem_of", return_value=""):
        assert choose_device("cuda:1") == torch.device("cuda", 1)
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
        with pytest.raises(BadConfig, match="no cuda:2 here; its CUDA devices are cuda:0 to 1"):
            choose_device("cuda:2")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert choose_device("auto") == CPU
        with pytest.raises(BadConfig, match="no CUDA device here"):
            choose_device("cuda:0")


def test_the_gpu_of_a_mac_computes_in_float32_and_is_refused_where_there_is_none():
    with mock.patch.object(torch.backends.mps, "is_available", return_value=False):
        with pytest.raises(BadConfig, match="there is no mps here, which is the GPU of a Mac"):
            choose_device("mps")
        assert choose_device("auto") == CPU
    problem = mock.patch("medseg.inference.backends.predictor.problem_of", return_value="")
    with problem, mock.patch.object(torch.backends.mps, "is_available", return_value=True):
        mac = choose_device("mps")
    assert mac == torch.device("mps")
    assert choose_precision("auto", mac) == choose_precision("fp32", mac) == torch.float32
    for precision in ("bf16", "fp16"):
        with pytest.raises(BadConfig, match="on mps medseg computes in fp32 alone"):
            choose_precision(precision, mac)


def test_a_mac_without_3d_convolutions_is_told_so_before_the_run():
    error = "Conv3D is only supported on MPS for MacOS_13_2 or newer"
    ones = mock.Mock(return_value=mock.Mock(to=mock.Mock(side_effect=RuntimeError(error))))
    cards.problem_of.cache_clear()
    with (
        mock.patch.object(torch.backends.mps, "is_available", return_value=True),
        mock.patch.object(cards.torch, "ones", ones),
        pytest.raises(BadConfig, match="cannot use mps: Conv3D is only supported on MPS for MacOS"),
    ):
        choose_device("mps")
    cards.problem_of.cache_clear()


@pytest.mark.parametrize("most", [0, 1])
def test_a_mac_without_memory_takes_fewer_windows_and_then_its_cpu(most: int):
    """The GPU has room for so many windows; what it and the CPU say is one result."""

    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if run.device.type == "mps" and len(x) > most:
                raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
            return x + 1

    class Mac:
        type = "mps"

    run = _Torch(Full(), "full", CPU, torch.float32, exact=True)
    run.device = Mac()  # type: ignore[assignment]
    x = torch.arange(5.0).view(5, 1, 1, 1, 1)
    to = Tensor.to

    def there(tensor: Tensor, *rest: Any, **named: Any) -> Tensor:
        return tensor if rest and isinstance(rest[0], Mac) else to(tensor, *rest, **named)

    with (
        mock.patch.object(Tensor, "to", there),
        mock.patch.object(_Torch, "forward", lambda self, x, dtype: self.network(x)),
        pytest.warns(DataWarning) as told,
    ):
        assert torch.equal(run(x), x + 1)
    words = [str(one.message) for one in told]
    assert words[:2] == [f"the GPU ran out of memory; windows go {n} at a time" for n in (2, 1)]
    assert words[2:] == ["the GPU ran out of memory; the CPU goes on"] * (most == 0)
    assert run.device.type == ("cpu" if most == 0 else "mps")


def test_what_torch_cannot_do_on_the_gpu_of_a_mac_is_one_sentence():
    class NotYet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("The operator 'aten::x' is not implemented for MPS")

    run = _Torch(NotYet(), "odd", CPU, torch.float32, exact=True)
    with pytest.raises(NotImplementedError):
        run(patches(1))
    run.device = mock.Mock(type="mps")
    with (
        mock.patch.object(_Torch, "finite", lambda self, x: self.network(x)),
        pytest.raises(BadConfig, match="network of odd needs something that PyTorch cannot do on"),
    ):
        run(mock.Mock(__len__=lambda self: 1))


def test_only_out_of_memory_is_caught():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("something else")

    to = mock.patch.object(Tensor, "to", lambda self, *rest, **named: self)
    with to, pytest.raises(RuntimeError, match="something else"):
        on_gpu(Broken())(patches(2))


def test_a_cpu_out_of_memory_is_an_error_of_ours():
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(2**32, -1, -1, -1, -1).contiguous()

    run = _Torch(Huge(), "huge", CPU, torch.float32, exact=True)
    with pytest.raises(NotEnoughMemory, match="huge"):
        run(patches(1))


def test_what_is_not_finite_is_computed_again_in_fp32_and_then_refused(tmp_path: Path):
    kinds: list[torch.dtype] = []

    class Overflows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kinds.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
            return x / (0 if torch.is_autocast_enabled("cpu") else 1)

    run, before = _Torch(Overflows(), "overflows", CPU, torch.bfloat16, exact=False), steps_down()
    with pytest.warns(DataWarning, match="float32 goes on"):
        assert torch.equal(run(patches()), patches())
    assert steps_down() == before + 1  # so that the next scan opens it anew
    assert kinds == [torch.bfloat16, torch.float32]
    checkpoint = load_checkpoint(str(tiny.save_known(tmp_path / "nan", "not_a_number")))
    with pytest.raises(BadModel, match="not finite"):
        open_torch(checkpoint, CPU, torch.bfloat16)(patches())


def test_precision_is_chosen_by_trying_and_fp16_on_a_cpu_is_refused():
    for faster, kind in ((True, torch.bfloat16), (False, torch.float32)):
        with mock.patch("medseg.inference.backends.pytorch._bf16_is_faster", return_value=faster):
            assert choose_precision("auto", CPU) == kind
    with pytest.raises(BadConfig, match="fp16"):
        choose_precision("fp16", CPU)
    assert choose_precision("auto", torch.device("cuda")) == torch.float16


def test_openvino_is_tried_only_where_it_is_installed_and_can_save_its_start(
    others: list[Checkpoint],
):
    predictor = open_torch(others[0], CPU, torch.float32)
    for there, seconds, windows, expected in (
        (True, 2.0, 100, True), (False, 2.0, 100, False), (True, 0.1, 100, False), (True, 1000.0, 1,
        False),
    ):  # fmt: skip
        with (
            mock.patch("importlib.util.find_spec", return_value=object() if there else None),
            mock.patch(
                "medseg.inference.backends.opening.time.perf_counter",
                side_effect=itertools.count(0.0, seconds),
            ),
        ):
            assert _openvino_pays(others[0], predictor, windows) is expected


def test_what_a_network_needs_is_asked_once_while_models_are_kept_open(others: list[Checkpoint]):
    expected = (blended_features(others), activation_bytes(others[0]))
    with models_kept_open():
        first = (blended_features(others), activation_bytes(others[0]))
        with mock.patch("medseg.networks.build_network", side_effect=AssertionError("built")):
            again = (blended_features(others), activation_bytes(others[0]))
            with pytest.raises(AssertionError):
                activation_bytes(others[0], batch=2)
    assert first == again == expected


def test_activation_bytes_are_the_most_that_live_at_once(others: list[Checkpoint]):
    """By hand for a network of two convolutions: while the second runs, its input and its output
    live.
    """

    class Two(nn.Sequential):
        def __init__(self, channels: int, classes: int) -> None:
            super().__init__(nn.Conv3d(channels, 5, 1), nn.Conv3d(5, classes, 1))

    with torch.device("meta"):
        network = Two(1, 3)
    with mock.patch.object(Checkpoint, "outline", return_value=network):
        assert activation_bytes(others[0]) == 4 * 16**3 * (5 + 3)
        assert activation_bytes(others[0], 3) == 3 * 4 * 16**3 * (5 + 3)


@pytest.mark.parametrize(
    "options", [{"features": [4, 8]}, {"features": [4, 8], "residual": True}, {"stem": 2}]
)
def test_activation_bytes_are_those_that_pytorch_itself_works_out(
    options, tmp_path: Path, monkeypatch
):
    """Shapes of convolutions, norms and joins are worked out here, so that half of PyTorch's
    compiler stays away.
    """
    options = {"features": [4, 8], "encoder_blocks": [1, 2], "decoder_blocks": [1]} | options
    checkpoint = load_checkpoint(
        str(tiny.save_two_channel_network(tmp_path / "m", "unet", options, PATCH))
    )
    ours = [activation_bytes(checkpoint, 2, deferred) for deferred in (False, True)]
    monkeypatch.setattr("medseg.inference.backends.activations._SHAPED", {})
    assert ours == [activation_bytes(checkpoint, 2, deferred) for deferred in (False, True)]
    assert 0 < ours[1] <= ours[0]
