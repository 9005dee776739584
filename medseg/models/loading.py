"""A model by what a user typed: a name, a folder of medseg's, or a folder or zip of another
program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import BadConfig, BadModel, MedsegError
from medseg.models.folder import (
    FOLD,
    Checkpoint,
    bundled_models,
    installed_folder,
    load_checkpoint,
    load_checkpoints,
)

if TYPE_CHECKING:
    from medseg.models.sets import ModelSet


def load_models(
    names: Sequence[str], *, folds: Sequence[str] = (), checkpoint: str = "final"
) -> list[Checkpoint] | ModelSet:
    """The checkpoints of all names, to be averaged, or the set of models that one name means.
    Raises `BadModel`.

    folds, checkpoint: of nnU-Net's models, see `load_nnunet`; `BadConfig` where they are given for
    others.
    """
    checkpoints: list[Checkpoint] = []
    for given in names:
        name = str(installed_folder(given) or given)
        path = Path(name)
        if name in bundled_models() or _is_own(path):
            if folds or checkpoint != "final":
                raise BadConfig(
                    f"--folds and --checkpoint are for models of nnU-Net, and {name} is"
                    " medseg's own"
                )
            own: list[Checkpoint] | ModelSet = _own(path, name)
            if not isinstance(own, list):
                return _alone(own, name, names)
            checkpoints += own
            continue
        foreign = _foreign(path, folds=folds, checkpoint=checkpoint)
        if foreign is None:
            checkpoints.append(load_checkpoint(name))  # which says what there is
            continue
        if not isinstance(foreign, Sequence):
            return _alone(foreign, name, names)
        checkpoints += foreign
    return checkpoints


def _foreign(
    path: Path, *, folds: Sequence[str], checkpoint: str
) -> Sequence[Checkpoint] | ModelSet | None:
    """The model of another program that a path holds, if it holds one."""
    from medseg.models.auto3dseg import is_auto3dseg, load_auto3dseg
    from medseg.models.bundle import is_bundle, load_bundle
    from medseg.models.nnunet_folder import is_nnunet

    for is_one, load in ((is_bundle, load_bundle), (is_auto3dseg, load_auto3dseg)):
        if is_one(path):
            if folds or checkpoint != "final":
                raise BadConfig(
                    f"--folds and --checkpoint are for models of nnU-Net, and {path} is MONAI's"
                )
            return load(path)
    if not is_nnunet(path):
        return None
    from medseg.models.nnunet import load_nnunet

    return load_nnunet(path, folds=folds, checkpoint=checkpoint)


def _own(path: Path, name: str) -> list[Checkpoint] | ModelSet:
    from medseg.models.conversion import SET_FILE, read_set

    return read_set(path) if (path / SET_FILE).is_file() else load_checkpoints(name)


def _alone(models: ModelSet, name: str, names: Sequence[str]) -> ModelSet:
    if len(names) > 1:
        raise BadModel(
            f"{name}: is a set of models, which cannot be averaged with others; give it alone"
        )
    return models


def _is_own(path: Path) -> bool:
    marks = ("model.json", "model/model.json", f"{FOLD}0/model.json", "set.json")
    return any((path / mark).is_file() for mark in marks)


def is_model(path: Path) -> bool:
    """Whether a path holds a model, of medseg's or of another program, judged by the names of its
    files."""
    from medseg.models.auto3dseg import is_auto3dseg
    from medseg.models.bundle import is_bundle

    if is_bundle(path) or (is_auto3dseg(path) and not _is_own(path)):
        return True
    if path.is_file():
        return path.suffix.lower() == ".zip" and _holds_plans(path)
    if not path.is_dir():
        from medseg.models.nnunet_folder import names_set

        return names_set(path)
    marks = (
        "plans.json",
        "*/plans.json",
        "*/*/plans.json",
        "plans.pkl",
        "*/plans.pkl",
        "*/*/plans.pkl",
    )
    return _is_own(path) or any(next(path.glob(mark), None) is not None for mark in marks)


def _holds_plans(path: Path) -> bool:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                Path(name).name in ("plans.json", "plans.pkl") for name in archive.namelist()
            )
    except (OSError, zipfile.BadZipFile):
        return False


def list_models(root: Path) -> list[dict[str, str]]:
    """What models lie in a folder: path, name, structures, and what they are or why they cannot be
    used.

    Raises `BadModel` if the folder holds none.
    """
    from medseg.models.auto3dseg import is_auto3dseg
    from medseg.models.bundle import is_bundle
    from medseg.models.nnunet_folder import model_folders, name_of_set, sets_in

    def of_monai(place: Path) -> bool:
        return is_bundle(place) or is_auto3dseg(place)

    if not root.is_dir():
        raise BadModel(f"{root}: is no folder of models")
    beside = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    own = [entry for entry in beside if _is_own(entry)]
    monai = [one for one in beside[1:] if one not in own and of_monai(one)]
    if not monai and root not in own and of_monai(root):
        monai = [root]
    places = [*own, *monai, *(folder for folder in model_folders(root) if folder not in own)]
    sets = [root / name_of_set(inside) for inside in sets_in(root).values() if len(inside) > 1]
    places += [one for one in sets if not one.exists()]
    zips = sorted(root.glob("*.zip"))
    places += [entry for entry in zips if _holds_plans(entry) or of_monai(entry)]
    if not places:
        raise BadModel(f"{root}: holds no model of medseg, nnU-Net or MONAI")
    return [_row(place, root) for place in places]


def _row(place: Path, root: Path) -> dict[str, str]:
    row = {"path": str(place.relative_to(root)), "name": "", "structures": "", "about": ""}
    try:
        models = load_models([str(place)])
    except MedsegError as error:
        return row | {"about": f"cannot be used: {error}"}
    first = models[0] if isinstance(models, list) else models.models[0][0]
    table = first.table if isinstance(models, list) else models.table
    folds = f"; {len(models)} folds" if isinstance(models, list) and len(models) > 1 else ""
    about = first.spec.description if isinstance(models, list) else f"{len(models.models)} models"
    return row | {
        "name": first.spec.name if isinstance(models, list) else models.name,
        "structures": str(len(table)),
        "about": about + folds,
    }


def load_single(name: str) -> Checkpoint:
    """The one checkpoint of a model. Raises `BadModel` for several folds and for sets of models."""
    models = load_models([name])
    if not isinstance(models, list) or len(models) > 1:
        raise BadModel(f"{name}: is several networks; this takes a model of one")
    return models[0]
