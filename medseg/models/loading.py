"""A model by what a user typed: a name, a folder of medseg's, or a folder or zip of another program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import BadConfig, BadModel
from medseg.models.folder import FOLD, Checkpoint, bundled_models, load_checkpoint, load_checkpoints

if TYPE_CHECKING:
    from medseg.models.nnunet import ModelSet


def load_models(
    names: Sequence[str], *, folds: Sequence[str] = (), checkpoint: str = "final"
) -> list[Checkpoint] | ModelSet:
    """The checkpoints of all names, to be averaged, or the set of models that one name means. Raises `BadModel`.

    folds, checkpoint: of nnU-Net's models, see `load_nnunet`; `BadConfig` where they are given for others.
    """
    found: list[Checkpoint] = []
    for name in names:
        path = Path(name)
        if name in bundled_models() or _is_own(path):
            if folds or checkpoint != "final":
                raise BadConfig(f"--folds and --checkpoint are for models of nnU-Net, and {name} is medseg's own")
            found += load_checkpoints(name)
            continue
        from medseg.models.nnunet_folder import is_nnunet

        if not is_nnunet(path):
            found.append(load_checkpoint(name))  # which says what there is
            continue
        from medseg.models.nnunet import load_nnunet

        loaded = load_nnunet(path, folds=folds, checkpoint=checkpoint)
        if isinstance(loaded, list):
            found += loaded
        elif len(names) > 1:
            raise BadModel(f"{name}: is a set of models, which cannot be averaged with others; give it alone")
        else:
            return loaded
    return found


def _is_own(path: Path) -> bool:
    return any((path / part / "model.json").is_file() for part in ("", "model", f"{FOLD}0"))
