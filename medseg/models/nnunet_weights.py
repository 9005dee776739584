"""Weights out of nnU-Net's checkpoints, which are pickles, without a single object that a stranger
named being made.

`torch.load(weights_only=True)` refuses nearly all of them, because they hold numpy numbers. Two
stand-ins take their place: one keeps a type's code, the other unpacks bytes to a Python number.
Nothing of numpy is unpickled, whichever version wrote the file; any other name in the pickle is
refused, and named, before anything is loaded. The file is mapped into memory, so that of a
checkpoint with its optimizer's state only the weights are read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadModel
from medseg.models.weights import is_archive

if TYPE_CHECKING:
    from torch import Tensor

#: Type code of a numpy number -> code of `struct`.
_CODES = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q",
    "u4": "I", "u2": "H",
    "u1": "B", "b1": "?",
}  # fmt: skip
#: Trainers of networks that are no U-Net of nnU-Net's plans, whatever their plans say.
_OTHER_NETWORKS = re.compile(
    r"primus|mamba|mednext|(?-i:STU_?Net)|swin_?unet|(?<!nn)unetr|nnformer|transunet|dints"
    r"|segresnet",
    re.IGNORECASE,
)
#: Parts of the names of nnU-Net's and TotalSegmentator's trainers that leave the network as
#: planned.
_KNOWN_PARTS = re.compile(
    r"nnUNetTrainer|BN|[0-9]+epochs?|NoMirroring|onlyMirror01|noMirroring|DASegOrd0|DAOrd0|DASegord0|DA5|ord0|Segord0"
    r"|NoDA|noDummy2DDA|DiceCELoss|DiceTopK10Loss|DiceLoss|CELoss|TopK10LossLS01|TopK10Loss|TopK10|LS01|noSmooth"
    r"|Benchmark|noDataLoading|noDeepSupervision|NoDeepSupervision|vanilla|Vanilla|Adam|Adan|RAdam|CosAnneal|PolyLR"
    r"|SGD|1en3|3en4|1en4|warmup|probabilisticOversampling|[0-9]{3}|SkeletonRecall|QuarterLR|HalfLR|allOnes|_"
)


class _Kind:
    """Stands for `numpy.dtype`: the code and byte order of a number, nothing else."""

    def __init__(self, code: str = "f8", align: bool = False, copy: bool = True) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and len(state) > 1 and state[1] == ">" else "<"


def _number(kind: _Kind, content: bytes) -> Any:
    """Stands for numpy's `scalar`: a Python number from its few bytes. Raises `ValueError` for
    anything else."""
    code = _CODES.get(kind.code) if isinstance(kind, _Kind) else None
    if code is None or not isinstance(content, bytes) or len(content) != struct.calcsize(code):
        raise ValueError("a number of a kind that numpy does not have")
    return struct.unpack(kind.order + code, content)[0]


#: What a checkpoint may name beside PyTorch's own.
_STAND_INS: list[Any] = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_Kind, "numpy.dtype"),
]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What is used of one checkpoint. mirror: axes of the transposed array, None where none are
    allowed."""

    path: Path
    weights: dict[str, Tensor]
    trainer: str
    configuration: str | None
    mirror: tuple[int, ...] | None


def load_saved(path: Path) -> Saved:
    """A checkpoint of nnU-Net v2. Raises `BadModel` for files that are damaged, or name what they
    must not."""
    content = _load(path)
    weights = content.get("network_weights")
    if not isinstance(weights, dict) or not weights:
        raise BadModel(f"{path}: holds no network_weights; it is not a checkpoint of nnU-Net v2")
    from torch import Tensor

    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise BadModel(
                f"{path}: its weights are not tensors with names; it is damaged, fetch the model"
                " again"
            )
        state[key.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")] = (
            value
        )
    arguments = content.get("init_args")
    name = arguments.get("configuration") if isinstance(arguments, dict) else None
    return Saved(
        path=path,
        weights=state,
        trainer=str(content.get("trainer_name", "")),
        configuration=name if isinstance(name, str) else None,
        mirror=_mirror(content.get("inference_allowed_mirroring_axes"), path),
    )


def _mirror(axes: Any, path: Path) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, list | tuple) or not all(
        type(axis) is int and 0 <= axis <= 2 for axis in axes
    ):
        raise BadModel(f"{path}: mirrors along {axes!r:.80}, which are not axes")
    return tuple(sorted(set(axes))) or None


def _load(path: Path) -> dict[str, Any]:
    """The checkpoint's dict, mapped into memory."""
    if not is_archive(path):
        raise BadModel(
            f"{path}: is damaged or no checkpoint of nnU-Net v2 (a zip that PyTorch wrote); fetch"
            " it again"
        )
    import torch

    try:
        with torch.serialization.safe_globals(_STAND_INS):
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            content = (
                {}
                if foreign
                else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            )
    except Exception as error:  # whatever a stranger's file made the unpickler say: it is refused
        raise BadModel(
            f"{path}: is damaged or no checkpoint of nnU-Net v2 ({type(error).__name__}); nothing"
            " of it was run; fetch the model again"
        ) from None
    if foreign:
        raise BadModel(
            f"{path}: names {foreign[0]}, which a checkpoint of nnU-Net needs not; nothing of the"
            " file was run, and it is not opened"
        )
    if not isinstance(content, dict):
        raise BadModel(f"{path}: is not a checkpoint of nnU-Net v2; fetch the model again")
    return content


def check_trainer(saved: Saved) -> str | None:
    """A note about a trainer that nobody knows. Raises `BadModel` for one of another network."""
    if _OTHER_NETWORKS.search(saved.trainer):
        raise BadModel(
            f"{saved.path}: was trained by {saved.trainer}, whose network is not the U-Net that its"
            " plans describe; medseg runs nnU-Net's PlainConvUNet and ResidualEncoderUNet"
        )
    if not saved.trainer.startswith("nnUNetTrainer") or _KNOWN_PARTS.sub("", saved.trainer):
        return (
            f"nobody here knows the trainer {saved.trainer!r:.80}; its weights fit the plans"
            " exactly"
        )
    return None


def has_batch_norm(saved: Saved) -> bool:
    """Whether a trainer put batch norms in place of the planned instance norms, as names with BN
    do."""
    return "encoder.stages.0.0.convs.0.norm.running_mean" in saved.weights or any(
        key.endswith(".norm.running_mean") for key in saved.weights
    )


def medseg_name(key: str, stages: int) -> str | None:
    """The name in medseg's `nnunet` network of one of nnU-Net's tensors; None for copies and for
    training's heads."""
    if (
        ".all_modules." in key
        or key.startswith("decoder.encoder.")
        or key.endswith(".num_batches_tracked")
    ):
        return None
    match = re.fullmatch(r"decoder\.seg_layers\.(\d+)\.(weight|bias)", key)
    if match:
        return f"head.{match[2]}" if int(match[1]) == stages - 2 else None
    for pattern, replacement in _NAMES:
        name, count = pattern.subn(replacement, key)
        if count:
            return name
    return key


_NAMES = [
    (re.compile(r"^encoder\.stem\.convs\.0\.(conv|norm)\."), r"entry.\1."),
    (re.compile(r"^encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(conv|norm)\."), r"encoder.\1.\2.\3."),
    (
        re.compile(r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.(conv|norm)\."),
        r"encoder.\1.\2.first.\3.",
    ),
    (
        re.compile(r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv2\.(conv|norm)\."),
        r"encoder.\1.\2.second.\3.",
    ),
    (
        re.compile(r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.[01]\.(conv|norm)\."),
        r"encoder.\1.\2.project.\3.",
    ),
    (re.compile(r"^decoder\.transpconvs\.(\d+)\."), r"up.\1."),
    (re.compile(r"^decoder\.stages\.(\d+)\.convs\.(\d+)\.(conv|norm)\."), r"decoder.\1.\2.\3."),
]


def fitted_state(saved: Saved, expected: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The weights under the names and in the shapes of medseg's network. Raises `BadModel` naming
    what does not fit.

    expected: name to shape. Weights of 2d networks get an axis of length 1.
    """
    stages = 1 + max(
        (int(key.split(".")[1]) for key in expected if key.startswith("encoder.")), default=1
    )
    state: dict[str, Tensor] = {}
    for key in saved.weights:
        name = medseg_name(key, stages)
        if name is None:
            continue
        shape = expected.get(name)
        if shape is None:
            raise _misfit(saved, f"{key} has no place in it")
        state[name] = _fitted(saved, key, shape)
    missing = [name for name in expected if name not in state]
    if missing:
        raise _misfit(saved, f"{missing[0]} is missing")
    return state


def _fitted(saved: Saved, key: str, wanted: Sequence[int]) -> Tensor:
    """One weight in the shape that is wanted. Raises `BadModel` if it has another."""
    value = saved.weights[key]
    if len(wanted) == value.ndim + 1 and value.ndim == 4:
        value = value.unsqueeze(2)
    if tuple(value.shape) != tuple(wanted):
        stored, planned = (" x ".join(map(str, shape)) for shape in (value.shape, wanted))
        raise _misfit(saved, f"{key} is {stored} where {planned} is planned")
    if not value.is_floating_point():
        raise _misfit(saved, f"{key} does not hold floating point numbers")
    return value


def check_finite(saved: Saved, state: Mapping[str, Tensor]) -> None:
    """Raise `BadModel` if some weight is not a finite number."""
    import torch

    for key, value in state.items():
        # The sum of finite float32 weights in float64 is finite, and needs no copy.
        if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
            raise BadModel(
                f"{saved.path}: its weights ({key}) hold values that are not finite numbers"
            )


def _misfit(saved: Saved, what: str) -> BadModel:
    return BadModel(
        f"{saved.path}: the weights, trained by {saved.trainer or 'nobody named'}, do not fit the"
        f" network of plans.json: {what}"
    )
