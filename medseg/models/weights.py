"""Weights of other programs as plain tensors: loaded by PyTorch with `weights_only`, nothing else
of a pickle made, and fitted to a network by name and shape."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BadModel
from medseg.models.folder import Checkpoint
from medseg.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Largest file of weights that is opened.
MAX_WEIGHTS_BYTES = 8_000_000_000
#: Numbers that count; networks of medseg's have no place for them.
_COUNTS = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index)$")


def load_plain(path: Path) -> dict[str, Any]:
    """The dict in a file that `torch.save` wrote, mapped into memory where it can be.

    Raises `BadModel` for files that are damaged, are code, or name what is no number or tensor.
    """
    whole = is_archive(path)
    if whole and _is_script(path):
        raise BadModel(f"{path}: is TorchScript, which is code, and medseg does not run it")
    content = _loaded(path, whole=whole)
    if not isinstance(content, dict):
        raise BadModel(f"{path}: holds no weights with names; fetch the model again")
    return content


def is_archive(path: Path) -> bool:
    """Whether a file of weights is a zip, as PyTorch has written them since 1.6. Raises `BadModel`
    for one that cannot be read, is too large, or was never fetched.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(40)
        whole = zipfile.is_zipfile(path)
    except OSError as error:
        raise BadModel(f"{path}: cannot be read ({error.strerror})") from None
    if size > MAX_WEIGHTS_BYTES:
        raise BadModel(
            f"{path}: holds {size / 1e9:.1f} GB, more than the {MAX_WEIGHTS_BYTES / 1e9:.0f}"
            " allowed"
        )
    if start.startswith(b"version https://git-lfs"):
        raise BadModel(
            f"{path}: is a pointer that Git LFS left in place of the file; fetch the file itself"
        )
    return whole


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                "/code/" in name or name.endswith("constants.pkl") for name in archive.namelist()
            )
    except (OSError, zipfile.BadZipFile):
        return False


def _loaded(path: Path, *, whole: bool) -> Any:
    import torch

    foreign: list[str] = []
    try:
        if whole:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if not foreign:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except Exception as error:  # whatever a stranger's file made the unpickler say: it is refused
        raise BadModel(
            f"{path}: is damaged or holds more than weights ({type(error).__name__}); nothing of it"
            " was run; fetch the model again"
        ) from None
    raise BadModel(
        f"{path}: names {foreign[0]}, which weights need not; nothing of the file was run, and it"
        " is not opened"
    )


def state_of(content: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: under one of `keys`, or at its top. Raises `BadModel`."""
    from torch import Tensor

    tensors: Any = content
    for key in keys:
        if isinstance(content.get(key), dict):
            tensors = content[key]
            break
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise BadModel(
                f"{path}: its weights are not tensors with names; it is damaged, fetch the model"
                " again"
            )
        state[key.removeprefix("module.")] = value
    if not state:
        raise BadModel(f"{path}: holds no weights; fetch the model again")
    return state


def fitted(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Any],
    path: Path,
    name_of: Callable[[str], str | None],
) -> dict[str, Tensor]:
    """The tensors under the names and in the shapes of a network of medseg's.

    expected: name to shape. name_of: a checkpoint's name to medseg's, None for what is not needed.
    Raises `BadModel` naming what does not fit, or is not finite.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = None if _COUNTS.search(key) else name_of(key)
        if name is None:
            continue
        if name not in expected:
            raise _misfit(path, f"{key} has no place in it")
        if tuple(value.shape) != tuple(expected[name]):
            stored, wanted = (
                " x ".join(map(str, shape)) or "one number"
                for shape in (value.shape, expected[name])
            )
            raise _misfit(path, f"{key} is {stored} where {wanted} is needed")
        if not value.is_floating_point():
            raise _misfit(path, f"{key} does not hold floating point numbers")
        if not bool(torch.isfinite(value.sum(dtype=torch.float64))):
            raise BadModel(f"{path}: its weights ({key}) hold values that are not finite numbers")
        tensors[name] = value
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise _misfit(path, f"{missing[0]} is missing")
    return tensors


def _misfit(path: Path, what: str) -> BadModel:
    return BadModel(f"{path}: the weights do not fit the network that the config names: {what}")


@dataclass(frozen=True)
class WeightsCheckpoint(Checkpoint):
    """A model of another program, used as it lies there. weights: under medseg's names."""

    weights: Mapping[str, Tensor] = field(kw_only=True, repr=False)

    @property
    def weight_bytes(self) -> int:
        """Of the weights in half precision, as if they were stored so."""
        return sum(2 * value.numel() for value in self.weights.values())

    def outline(self) -> nn.Module:
        """The network in evaluation mode without memory for its weights. Raises `BadModel`."""
        return bare_network(self.spec).to("meta").eval()

    def network(self) -> nn.Module:
        """The network in evaluation mode, float32, on the CPU."""
        network = bare_network(self.spec)
        # A copy: what is mapped must not change under a run, and half precision is widened.
        network.load_state_dict(
            {key: value.float().clone() for key, value in self.weights.items()},
            assign=True,
            strict=False,  # names were compared; batch norms would miss what they count
        )
        return network.eval()

    def first_stage(self) -> list[Checkpoint]:
        """None: such models have no stages."""
        return []

    def postprocessing(self) -> list[list[int]]:
        """None: what is worth doing is part of the recipe."""
        return []


def bare_network(spec: ModelSpec) -> nn.Module:
    """The network of a model without memory for its weights. Raises `BadModel` if it cannot be
    built, or takes no such windows."""
    import torch

    from medseg.networks import build_network, check_patch

    with torch.device("meta"):  # shapes are compared before any memory is taken
        network = build_network(spec.architecture, spec.inputs, spec.outputs, **spec.options)
    check_patch(network, spec.patch)
    return network
