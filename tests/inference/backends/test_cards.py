"""What cards say when they cannot go on, told by errors as PyTorch raises them; none is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from making.notices import notices
from medseg.errors import BadConfig, DataWarning, DeviceFailed, NotEnoughMemory
from medseg.inference.backends import cards
from medseg.inference.backends.predictor import choose_device
from medseg.inference.stripes import Clock, _predicted, paint_windows

CARD = torch.device("cuda")
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCompile with ..."
STUCK = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might ..."


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was found of cards in one test is not known in another."""
    cards.problem_of.cache_clear()
    yield
    cards.problem_of.cache_clear()


def says(error: BaseException) -> mock._patch:
    """The first convolution on a card ends so."""
    ones = mock.Mock(return_value=mock.Mock(to=mock.Mock(side_effect=error)))
    return mock.patch.object(cards.torch, "ones", ones)


def card_here() -> mock._patch:
    """PyTorch sees one."""
    return mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1)


def test_a_card_that_pytorch_has_no_code_for_is_not_taken():
    with says(RuntimeError(NO_KERNEL)), card_here():
        with pytest.warns(DataWarning, match="no kernel image is available.*the CPU computes"):
            assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(BadConfig, match="cannot use cuda: CUDA error: no kernel image"):
            choose_device("cuda")


def test_a_full_card_is_no_broken_one():
    with says(torch.OutOfMemoryError("CUDA out of memory")), card_here():
        assert choose_device("auto") == CARD


def test_a_convolution_that_is_right_here_is_right_there():
    """The trial itself, on the CPU, and one that computes wrongly."""
    cpu = torch.device("cpu")
    with mock.patch.object(cards, "_warn_of_old_cudnn"):
        assert cards.problem_of(cpu) == ""
        cards.problem_of.cache_clear()
        with mock.patch.object(cards.F, "conv3d", lambda image, kernel: image):
            assert cards.problem_of(cpu) == "it computes wrongly"


@pytest.mark.parametrize(
    ("number", "version", "is_old"),
    [(91501, (9, 15, 1), False), (91002, (9, 10, 2), True), (8907, (8, 9, 7), True)],
)
def test_an_old_cudnn_is_warned_of(number: int, version: tuple[int, ...], is_old: bool):
    with mock.patch.object(torch.backends.cudnn, "version", return_value=number):
        assert cards.cudnn_version() == version
        if is_old:
            with pytest.warns(DataWarning, match=r"install a PyTorch with 9\.15"):
                cards._warn_of_old_cudnn()
        else:
            cards._warn_of_old_cudnn()
    with mock.patch.object(torch.backends.cudnn, "version", return_value=None):
        assert cards.cudnn_version() == ()


@pytest.mark.parametrize(
    "text",
    [
        STUCK,
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_a_card_that_stopped_is_told_once_and_ends_the_run(text: str):
    def predict(patches: Tensor) -> Tensor:
        raise RuntimeError(text)

    with pytest.raises(DeviceFailed, match=r"the GPU stopped working.*--device cpu"):
        _predicted(predict, Clock(), "windows", torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_a_card_without_memory_says_so_in_many_ways(text: str):
    assert cards.is_out_of_memory(RuntimeError(text))
    assert cards.unless_full(mock.Mock(side_effect=RuntimeError(text))) is None
    with pytest.raises(NotEnoughMemory, match="too full"):
        cards.in_sentences(mock.Mock(side_effect=RuntimeError(text)), full="too full")


def test_what_pytorch_keeps_of_the_scan_before_is_free_for_the_next():
    with mock.patch.multiple(
        torch.cuda,
        mem_get_info=lambda card: (3 * 10**9, 12 * 10**9),
        memory_reserved=lambda card: 8 * 10**9,
        memory_allocated=lambda card: 10**9,
    ):
        assert cards.free_bytes_on(CARD) == 10 * 10**9


#: What PyTorch says of TF32 before, within and after, whatever a program has set so far.
EXACT = """
import torch
from medseg.inference.backends.pytorch import _whole_float32

cudnn = torch.backends.cudnn

def said():
    kinds = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision]
    try:
        return [*kinds, cudnn.allow_tf32]
    except RuntimeError:  # for both kinds the same has to be set
        return kinds

for change in (
    "", "cudnn.allow_tf32 = False", "cudnn.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'", "cudnn.conv.fp32_precision = 'ieee'",
    "cudnn.conv.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('high')",
):
    exec(change)
    before = said()
    with _whole_float32():
        assert said() == ["ieee", "ieee", False], (change, said())
    assert said() == before, (change, said(), before)
"""


def test_exact_convolutions_are_without_tf32_whatever_a_program_has_set():
    """In a process of its own, for these are settings of all of PyTorch."""
    done = subprocess.run(
        [sys.executable, "-c", EXACT], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("text", ["mat1 and mat2 shapes cannot be multiplied", NO_KERNEL])
def test_other_errors_are_no_broken_card(text: str):
    assert not cards.is_broken(RuntimeError(text))
    assert not cards.is_broken(ValueError(STUCK))


def test_a_record_names_the_card_and_what_drives_it():
    card = SimpleNamespace(name="NVIDIA Test", major=9, minor=0)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
        mock.patch.object(torch.backends.cudnn, "version", return_value=91501),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(cards, "driver_version", return_value="580.1"),
    ):
        assert cards.versions_of("cuda:1") == {
            "gpu": "NVIDIA Test", "gpu capability": "9.0", "cuda": "13.0", "cudnn": "9.15.1",
            "gpu driver": "580.1",
        }  # fmt: skip
    assert cards.versions_of("cpu") == {}


class Beside:
    """An executor whose work takes no time of the thread that waits for it."""

    def __init__(self, workers: int) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def submit(self, work: Callable[..., None], *arguments: object) -> mock.Mock:
        now = TIME.now
        work(*arguments)
        TIME.now = now
        return mock.Mock()


TIME = SimpleNamespace(now=0.0)


def takes(seconds: float) -> Callable[..., None]:
    """Work of so many seconds of a clock that the test winds."""

    def work(*arguments: object) -> None:
        TIME.now += seconds

    return work


def test_painting_beside_a_card_is_not_taken_from_the_time_of_the_sums():
    """Three blocks: 5 s of network and 2 s of sums each, and 7 s of painting beside them."""

    def sliding(predict: Callable[[Tensor], object], *rest: object, **named: object):
        for n in range(3):
            predict(torch.zeros(1))
            TIME.now += 2
            yield SimpleNamespace(x=n, y=0, data=np.zeros(1))

    way = SimpleNamespace(
        image=np.zeros((1, 8, 8, 8)), patch=(8, 8, 8), overlap=0.5, layout="centred",
        weighting=None, make_sums=None, trimmed=lambda blocks: blocks,
    )  # fmt: skip
    clock = Clock()
    with (
        mock.patch("medseg.inference.stripes.time.perf_counter", lambda: TIME.now),
        mock.patch("medseg.inference.stripes.ThreadPoolExecutor", Beside),
        mock.patch("medseg.inference.window.sliding_window", sliding),
        mock.patch("medseg.inference.window.plan_windows") as plan_windows,
        mock.patch("medseg.inference.stripes.window_count", return_value=3),
        mock.patch("medseg.inference.backends.copies.link_to", return_value=None),
    ):
        plan_windows.return_value.stripes.return_value = [(0, 8)]
        paint_windows(
            painter=mock.Mock(add=takes(7)),
            predictor=mock.Mock(side_effect=takes(5), cell=1),
            way=way,  # type: ignore[arg-type]
            checkpoint=SimpleNamespace(spec=SimpleNamespace(name="x", skip_empty=False)),  # type: ignore[arg-type]
            made=mock.Mock(device="cuda", stripes=1, data_on_card=False),
            clock=clock,
            progress=lambda what, done, total: None,
        )
    assert clock.seconds == {"network": 15.0, "paint": 21.0, "wait": 0.0, "blend": 6.0}


#: Whether each call of `Body` was in half precision.
CALLS: list[bool] = []


class Body(nn.Module):
    """Values too large for half precision."""

    def forward(self, x: Tensor) -> Tensor:
        halved = torch.is_autocast_enabled("cpu")
        CALLS.append(halved)
        return x / (0 if halved else 1)


def test_what_is_too_large_for_half_precision_is_computed_twice_only_once():
    from medseg.inference.backends.pytorch import _Torch

    CALLS.clear()
    run = _Torch(Body(), "large", torch.device("cpu"), torch.bfloat16, exact=True)
    with pytest.warns(DataWarning, match="too large for bfloat16; float32 goes on") as told:
        for _ in range(3):
            assert torch.equal(run(torch.ones(1, 1, 2, 2, 2)), torch.ones(1, 1, 2, 2, 2))
    assert CALLS == [True, False, False, False]
    assert len(notices(told)) == 1


@pytest.mark.parametrize(
    ("trained", "asked", "has_bfloat16", "kind"),
    [
        ("bf16", "auto", True, torch.bfloat16),
        ("bf16", "auto", False, torch.float16),
        ("bf16", "fp16", True, torch.float16),
        ("fp16", "auto", True, torch.float16),
        ("fp32", "auto", True, torch.float16),
        (None, "auto", True, torch.float16),
    ],
)
def test_auto_follows_the_precision_of_the_training_where_the_card_can(
    trained: str | None, asked: str, has_bfloat16: bool, kind: torch.dtype
):
    from medseg.inference.backends import pytorch

    with mock.patch.object(pytorch, "computes_bfloat16", return_value=has_bfloat16):
        assert pytorch.choose_precision(asked, CARD, trained) == kind  # type: ignore[arg-type]
