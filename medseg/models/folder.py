"""Models and training states on disk: safetensors with JSON beside them, never pickle.

A model is a folder: `model.safetensors` (weights), `model.json` (`ModelSpec`: everything needed to
use them) and `labels.csv` (the structures). `model.json` carries the SHA-256 of the weights and is
written last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from medseg import logs, packages
from medseg.errors import BadConfig, BadFile, BadModel
from medseg.files import atomic_write, open_file
from medseg.labels import LabelTable
from medseg.models.spec import ModelSpec
from medseg.postprocess import check_steps
from medseg.text import parse_json, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


#: Models that come with medseg, by name.
BUNDLED = Path(__file__).parents[1] / "bundled"
#: Folder inside a model's in which the first stage of a cascade lies, and the beginning of those of
#: several folds.
FIRST_STAGE, FOLD = "first_stage", "fold_"
#: Folder inside a model's, or a set's, in which a coarse model of the same task lies.
COARSE = "coarse"
MAX_WEIGHTS = 8_000_000_000
#: Most bytes of a model's JSON, and of the JSON at the beginning of its weights.
MAX_SPEC = 1_000_000


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A model read from its folder and verified; `network()` builds it."""

    spec: ModelSpec
    table: LabelTable
    folder: Path

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.folder)!r}: {self.spec!r}>"

    @property
    def weight_bytes(self) -> int:
        """Of the weights as they are stored, in half precision."""
        return (self.folder / "model.safetensors").stat().st_size

    @property
    def family(self) -> Path:
        """The folder of the model whose fold this is; of a model without folds its own."""
        return self.folder.parent if self.folder.name.startswith(FOLD) else self.folder

    def outline(self) -> nn.Module:
        """The network in evaluation mode without memory for its weights (torch's device meta).

        Raises `BadModel` if it cannot be built, takes no such patches, or has other weights than
        are stored.
        """
        return self._without_weights().to("meta").eval()

    def _without_weights(self) -> nn.Module:
        """The network with its constants in memory, which no file stores, and its weights not;
        checked as `outline`.
        """
        import torch

        from medseg.networks import build_network, check_patch

        spec = self.spec
        with torch.device("meta"):
            network = build_network(spec.architecture, spec.inputs, spec.outputs, **spec.options)
        check_patch(network, spec.patch)
        expected = {key: list(value.shape) for key, value in network.state_dict().items()}
        stored = _stored_shapes(self.folder)
        wrong = sorted(expected.keys() ^ stored.keys())
        wrong += [key for key in expected if key in stored and stored[key] != expected[key]]
        if wrong:
            raise BadModel(
                f"the weights in {self.folder} do not fit its architecture: {', '.join(wrong[:3])}"
            )
        return network

    def network(self) -> nn.Module:
        """The network in evaluation mode, float32, on the CPU. Raises `BadModel` if the weights do
        not fit it.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        spec = self.spec
        path = self.folder / "model.safetensors"
        if sha256_of(path) != spec.sha256:
            raise BadModel(
                f"the weights in {self.folder} are not those its model.json names; fetch the model"
                " again"
            )
        try:
            state = load_file(path)  # mapped into memory: no second copy of what is large
        except (SafetensorError, ValueError, OSError) as error:
            raise BadModel(f"the weights in {self.folder} cannot be read: {error}") from None
        network = self._without_weights()  # shapes are compared before any memory is taken
        if any(
            value.dtype not in (torch.float16, torch.bfloat16, torch.float32)
            for value in state.values()
        ):
            raise BadModel(f"the weights in {self.folder} are not numbers of 16 or 32 bits")
        if not all(_is_finite(value) for value in state.values()):
            raise BadModel(f"the weights in {self.folder} hold values that are not finite")
        # Assigned, because `to_empty` would import sympy, which takes as long as a fifth of torch.
        network.load_state_dict(
            {
                key: value.float() if value.dtype != torch.float32 else value.clone()
                for key, value in state.items()
            },
            assign=True,
            strict=False,  # names were compared; batch norms would miss what they count
        )
        return network.eval()

    def first_stage(self) -> list[Checkpoint]:
        """The models whose labels this one sees beside the scan. Raises `BadModel` if they are not
        there.
        """
        inside = self.folder / FIRST_STAGE
        return load_checkpoints(
            str(inside if inside.is_dir() else self.folder.parent / FIRST_STAGE)
        )

    def coarse(self) -> list[Checkpoint]:
        """A model of the same task with larger voxels, to find what is looked for; [] for none."""
        folder = self.family / COARSE
        is_there = self.spec.recipe is not None and (folder / "model.json").is_file()
        return load_checkpoints(str(folder)) if is_there else []

    def postprocessing(self) -> list[list[int]]:
        """The groups of labels of which only the largest part shall stay, in order, if asked for;
        [] for none.
        """
        return [list(group) for group in self.spec.card.get("postprocessing", [])]


def bundled_models() -> list[str]:
    """Names of the models that come with medseg."""
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "model.json").is_file())


def known_models() -> list[str]:
    """Names of the models that come with medseg, and of those of installed packages."""
    own = bundled_models()
    return [*own, *(name for name in packages.added(packages.MODELS) if name not in own)]


def installed_folder(name: str) -> Path | None:
    """The folder of a model of an installed package; None where there is none of that name."""
    if name in bundled_models() or Path(name).exists():
        return None
    if name not in packages.added(packages.MODELS):
        return None
    added = packages.load(packages.MODELS, name)
    package = packages.package_of(packages.MODELS, name)
    try:
        folder = added() if callable(added) else added
    except Exception as error:  # its code is not ours
        raise BadModel(
            f"the package {package} adds the model '{name}' and stopped with"
            f" {type(error).__name__} when it was asked for its folder"
        ) from error
    if not isinstance(folder, str | Path):
        raise BadModel(f"the package {package} adds the model '{name}' and names no folder for it")
    return Path(folder)


def load_checkpoint(name: str) -> Checkpoint:
    """The model of a folder, of a training run's folder, of a bundled name, or of one that an
    installed package adds.

    Raises `BadModel` if there is none or it is damaged.
    """
    folder = _folder_of(name)
    try:
        spec = ModelSpec.model_validate(read_json(folder / "model.json", max_bytes=MAX_SPEC))
        check_steps(spec.cleanup)
        table = LabelTable.read(folder / "labels.csv")
        with open_file(folder / "model.safetensors") as file:
            size = os.fstat(file.fileno()).st_size
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise BadModel(f"{folder / 'model.json'} is damaged: {where}: {first['msg']}") from None
    except BadConfig as error:
        raise BadModel(f"{folder / 'model.json'} is damaged: {error}") from None
    except BadFile as error:
        raise BadModel(f"the model in {folder} is incomplete or damaged: {error}") from None
    if size > MAX_WEIGHTS:
        raise BadModel(
            f"the weights in {folder} hold {size} bytes, more than the {MAX_WEIGHTS} allowed"
        )
    _check_classes(folder, spec.classes, table)
    logs.debug(__name__, "%r of weights %.12s", spec, spec.sha256)
    return Checkpoint(spec, table, folder)


def _folder_of(name: str) -> Path:
    """The folder that holds the model of a name. Raises `BadModel` if there is none."""
    folder = BUNDLED / name if name in bundled_models() else installed_folder(name) or Path(name)
    for place in (folder, folder / "model"):
        if (place / "model.json").is_file():
            return place
    if (folder / "plans.json").is_file():
        raise BadModel(
            f"the model '{name}' is nnU-Net's: infer, convert and info read it, and nothing else"
            " does"
        )
    names = ", ".join(known_models())
    raise BadModel(
        f"there is no model '{name}': give a model folder, or one that comes with medseg ({names})"
    )


def _check_classes(folder: Path, classes: Sequence[int], table: LabelTable) -> None:
    """Raise `BadModel` for classes that are not background and then named values, each once."""
    missing = [value for value in classes[1:] if value not in table.values]
    if classes[0] != 0 or len(set(classes)) < len(classes):
        raise BadModel(
            f"{folder / 'model.json'} is damaged: classes are background 0 and then each value once"
        )
    if missing:
        raise BadModel(
            f"{folder}: labels.csv does not name the values {', '.join(map(str, missing))}"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, read piece by piece. Raises `BadModel` if it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except BadFile as error:
        raise BadModel(str(error)) from None
    except OSError as error:
        raise BadModel(f"{path}: cannot be read ({error.strerror})") from None


def _is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    import torch

    # A sum takes a fifth of the time, and NaN and Inf survive it; a sum that is too large does not
    # say whether there were any.
    total = values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Name to shape of the stored weights, from the header of their file
    (huggingface.co/docs/safetensors, Format).
    """
    path = folder / "model.safetensors"
    try:
        with open_file(path) as file:
            header = parse_json(
                file.read(min(int.from_bytes(file.read(8), "little"), MAX_SPEC)).decode()
            )
        return {
            name: list(about["shape"]) for name, about in header.items() if name != "__metadata__"
        }
    except BadFile as error:
        raise BadModel(str(error)) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadModel(f"the weights in {folder} cannot be read: {error}") from None


def load_checkpoints(name: str) -> list[Checkpoint]:
    """The model of a name or folder, or the folds `fold_*` of one in a folder. Raises
    `BadModel`.
    """
    folder = Path(name)
    if not (folder / "model.json").is_file() and (folder / f"{FOLD}0" / "model.json").is_file():
        folds = sorted(
            entry for entry in folder.glob(f"{FOLD}*") if (entry / "model.json").is_file()
        )
        return [load_checkpoint(str(fold)) for fold in folds]
    return [load_checkpoint(name)]


def save_checkpoint(
    folder: Path,
    spec: dict[str, Any],
    state: dict[str, Tensor],
    table: LabelTable,
    *,
    half: bool = True,
) -> None:
    """Write a model folder; weights in half precision, or in float32. `spec`: `ModelSpec`'s fields
    but the hash.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    content = save(
        {
            key: (value.detach().half() if half else value.detach().float()).contiguous()
            for key, value in state.items()
        }
    )
    model_spec = ModelSpec(**spec, sha256=hashlib.sha256(content).hexdigest())
    table.write(folder / "labels.csv")
    with atomic_write(folder / "model.safetensors") as handle:
        handle.write(content)
    with atomic_write(folder / "model.json") as handle:
        handle.write(_json_of(model_spec))


def _json_of(spec: ModelSpec) -> bytes:
    """A spec as it is stored; what came later only where there is some, so that earlier versions
    read all others.
    """
    absent = {name for name in ("recipe", "trained_precision") if getattr(spec, name) is None}
    return (spec.model_dump_json(indent=1, exclude=absent) + "\n").encode()


def change_spec(folder: Path, **changes: Any) -> None:
    """Change fields of a model's JSON that do not touch its weights: cleanup, card, description."""
    model_spec = ModelSpec.model_validate(
        read_json(folder / "model.json", BadModel, max_bytes=MAX_SPEC) | changes
    )
    with atomic_write(folder / "model.json") as handle:
        handle.write(_json_of(model_spec))
