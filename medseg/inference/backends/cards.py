"""What GPUs say when they cannot go on, whether one works here at all, and what a record says of
it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional as F

from medseg.errors import DataWarning, DeviceFailed, NotEnoughMemory

#: What some work makes.
Made = TypeVar("Made")
#: What PyTorch, cuBLAS and cuDNN say where memory is all they lack. From version 9 on cuDNN says
#: whose (CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED), and on a full card neither of them
#: can begin (NOT_INITIALIZED; NVIDIA's references of cublasCreate and cudnnCreate).
_NO_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "_ALLOCATION_FAILED",
    "nable to find an engine to execute",
)
#: After these nothing runs on the card until the process has ended (CUDA Runtime API, error
#: handling: "sticky" errors).
_BROKEN = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "hardware stack error",
    "illegal instruction",
    "uncorrectable ECC error",
    "launch timed out",
    "GPU is lost",
)
#: Older ones are slow, hungry or, in bfloat16 at large sizes, wrong in 3-D convolutions
#: (PyTorch's issues 166122, 166643 and 163539).
OLDEST_CUDNN = (9, 15)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch says, in any of its ways, that there is not enough memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )


def unless_full(work: Callable[[], Made]) -> Made | None:
    """What some work makes; None where there is no memory for it, of which it then holds none."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_broken(error: BaseException) -> bool:
    """Whether an error says that this process can do nothing more on its card."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)


def in_sentences(work: Callable[[], Made], *, full: str) -> Made:
    """What some work on a device makes, and a sentence where it cannot go on: of what a card was
    given some time ago it tells wherever it is waited for. Raises `DeviceFailed`, and
    `NotEnoughMemory` in the words of `full`.
    """
    try:
        return work()
    except RuntimeError as error:
        if is_broken(error):
            raise DeviceFailed(str(error).strip().splitlines()[0].rstrip(".")) from None
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, whose traceback keeps what the work holds.
    raise NotEnoughMemory(full)


@cache
def problem_of(device: torch.device) -> str:
    """Why a card cannot be used, found by one small convolution; '' if it can.

    That a card is there does not say that this PyTorch has code for it; nor that a Mac's system has
    3-D convolutions, which came with macOS 13.2. A full card is no problem
    here: the network steps down when its turn comes.
    """
    half = torch.float32 if device.type == "mps" else torch.float16  # what is computed in there
    try:
        image, kernel = (torch.ones(1, 1, size, size, size, device=device) for size in (4, 3))
        with torch.inference_mode():
            sums = F.conv3d(image.to(half), kernel.to(half))
        if float(sums.sum()) != 8 * 27:
            return "it computes wrongly"
    except (RuntimeError, AssertionError) as error:
        return "" if is_out_of_memory(error) else str(error).strip().splitlines()[0].rstrip(".")
    if device.type != "mps":
        _warn_of_old_cudnn()
    return ""


def _warn_of_old_cudnn() -> None:
    version = cudnn_version()
    if version and version < OLDEST_CUDNN:
        warnings.warn(
            f"cuDNN {'.'.join(map(str, version))} is slow or inexact in 3-D convolutions; install"
            f" a PyTorch with {'.'.join(map(str, OLDEST_CUDNN))} or later",
            DataWarning,
            stacklevel=3,
        )


def cudnn_version() -> tuple[int, ...]:
    """(major, minor, patch), or () where there is no cuDNN."""
    number = torch.backends.cudnn.version()
    if not number:
        return ()
    unit = 10_000 if number >= 90_000 else 1000  # from 9 on it has two more digits
    return number // unit, number % unit // 100, number % 100


def free_bytes_on(card: torch.device) -> int:
    """Memory of a card that this process may still take: what is free there, and what PyTorch keeps
    of earlier work, as of the scan before, without anything in it.
    """
    kept_bytes = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return int(torch.cuda.mem_get_info(card)[0]) + max(0, kept_bytes)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a card computes in bfloat16; before Ampere it is emulated, and slow."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def versions_of(device: str) -> dict[str, str]:
    """What a result depends on beside packages where it was computed on a card: the card's name and
    the libraries below PyTorch. {} of other devices.
    """
    if not device.startswith("cuda"):
        return {}
    card = torch.cuda.get_device_properties(torch.device(device))
    found = {"gpu": str(card.name), "gpu capability": f"{card.major}.{card.minor}"}
    found |= {"cuda": str(torch.version.cuda)} if torch.version.cuda else {}
    found |= {"cudnn": ".".join(map(str, cudnn_version()))} if cudnn_version() else {}
    driver = driver_version()
    return found | ({"gpu driver": driver} if driver else {})


def driver_version() -> str:
    """The kernel driver's version, as Linux tells it; '' where it does not."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")
