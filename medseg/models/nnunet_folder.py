"""Which nnU-Net model a path means: a model folder, a dataset folder, a zip of either, or a folder
of parts.

Nothing is chosen silently where there is more than one: the message says what there is and how to
name one of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medseg.errors import BadConfig, BadModel
from medseg.models.archives import unpacked
from medseg.models.coarse import same_task
from medseg.models.nnunet_plans import read_json

#: What is taken out of an archive; anything else in it, pickles first of all, stays there.
_NEEDED = re.compile(r"(plans|dataset|parts|postprocessing)\.json|checkpoint_\w+\.pth")
#: A model of a set of models that see the same scan, as TotalSegmentator names them.
_PART = re.compile(r"Dataset\d+_(?P<set>\w*?)_?part(?P<number>\d+)(_|$)", re.IGNORECASE)
#: Folders deeper than this below the one that was named are not searched.
_DEPTH = 3


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a set: its folder, and the label of the set for each of its own."""

    folder: Path
    labels: dict[int, int] | None  # None: the set's table follows from the parts' order


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a path means. overlap: the share by which the windows of a set of parts overlap."""

    parts: tuple[Part, ...]
    names: dict[int, str] | None = None  # of the labels of a set, where a file says so
    overlap: float = 0.5
    mirrored: bool = True
    folds: tuple[str, ...] = ()
    several: bool = False  # whether it is a set of parts
    others: tuple[Path, ...] = ()  # of the same task as a set, at other spacings


def is_nnunet(path: Path) -> bool:
    """Whether a path holds models of nnU-Net (v1 too, which is refused later), judged by names
    alone."""
    if path.is_file():
        return path.name.lower().endswith(".zip")
    if names_set(path):
        return True
    return path.is_dir() and bool(model_folders(path) or _version_one(path) or _half(path))


def find_model(path: Path) -> Found:
    """The model, or set of parts, that a path means. Raises `BadModel` where that is none, or not
    one.

    A set beside other models is named like a folder among them that is not there:
    results/TotalSegmentator for Dataset291_TotalSegmentator_part1_... to ..._part5_...
    """
    if names_set(path):
        folders = model_folders(path.parent)
        inside = sets_in(path.parent)[path.name.casefold()]
        others = [one for one in folders if one not in inside and same_task(one, inside)]
        return _set_of(inside, others, root=path)
    root = _unpacked(path) if path.is_file() else path
    folders = model_folders(root)
    if not folders:
        _refuse(root, path)
    parts = _parts(root, folders)
    if parts is not None:
        return parts
    if len(folders) > 1:
        sets = [name_of_set(inside) for inside in sets_in(root).values()]
        said = "; ".join([*sets, *(str(folder.relative_to(root)) for folder in folders[:12])])
        how = "unpack it and name one" if path.is_file() else "name one of them"
        raise BadModel(f"{path}: holds {len(folders)} models of nnU-Net; {how}: {said}")
    return Found(parts=(Part(folder=folders[0], labels=None),))


def model_folders(root: Path) -> list[Path]:
    """The folders at or below `root` that hold plans.json and dataset.json.

    nnU-Net writes both beside labels as well, of ensembles and of what it predicted; those do not
    count.
    """
    if _is_model(root):
        return [root]
    models: list[Path] = []
    level = [root]
    for _ in range(_DEPTH):
        level = sorted(entry for folder in level for entry in _folders(folder))
        models += [folder for folder in level if _is_model(folder)]
        level = [folder for folder in level if not _is_model(folder)]
    return [folder for folder in models if not _holds_labels(folder)]


def _holds_labels(folder: Path) -> bool:
    """Whether a folder with plans holds what nnU-Net made of scans, and no model."""
    predicted = (folder / "predict_from_raw_data_args.json").is_file()
    averaged = folder.parent.name == "ensembles"
    return (predicted or averaged) and next(folder.glob("fold_*"), None) is None


def _folders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError as error:
        raise BadModel(f"{folder}: cannot be read ({error.strerror})") from None


def _is_model(folder: Path) -> bool:
    return (folder / "plans.json").is_file() and (folder / "dataset.json").is_file()


def _version_one(root: Path) -> Path | None:
    """A file that only nnU-Net v1 writes."""
    for pattern in ("plans.pkl", "model_final_checkpoint.model", "model_best.model"):
        for prefix in ("", "*/", "*/*/", "*/*/*/"):
            file = next(iter(sorted(root.glob(prefix + pattern))), None)
            if file is not None:
                return file
    return None


def _half(root: Path) -> str | None:
    """What is missing where only some of a model's files are there."""
    plans = [f for prefix in ("", "*/", "*/*/") for f in sorted(root.glob(f"{prefix}plans.json"))]
    weights = [
        f
        for prefix in ("", "*/", "*/*/", "*/*/*/")
        for f in sorted(root.glob(f"{prefix}checkpoint_*.pth"))
    ]
    if plans:
        return (
            f"{plans[0].parent}: has plans.json but no dataset.json, which says what the labels"
            " mean"
        )
    if weights:
        return (
            f"{weights[0]}: has weights but no plans.json two folders up, which says how to use"
            " them"
        )
    return None


def _refuse(root: Path, path: Path) -> None:
    """Raise `BadModel` saying why there is no model."""
    old = _version_one(root)
    if old is not None:
        raise BadModel(
            f"{path}: was made by nnU-Net v1 ({old.name}), which stores pickles, and those are not"
            " opened; convert it with nnU-Net or ask its authors for a model of v2"
        )
    half = _half(root)
    if half is not None:
        raise BadModel(f"{half}; fetch the whole model again")
    raise BadModel(
        f"{path}: holds no model of nnU-Net v2 (a folder with plans.json, dataset.json and fold_0)"
    )


# Parts --------------------------------------------------------------------------------------------


def _parts(root: Path, folders: Sequence[Path]) -> Found | None:
    """A set of parts, from its `parts.json` or from the names of its folders; None where it is
    none."""
    for place in (root, root.parent):
        if (place / "parts.json").is_file():
            parts = _listed_parts(place / "parts.json", folders)
            if parts is not None:
                return parts
    return _named_parts(root, folders)


def _named_parts(root: Path, folders: Sequence[Path]) -> Found | None:
    """A set of parts from the names of its folders, as TotalSegmentator gives them."""
    inside = [folder for folder in folders if _PART.match(_dataset(folder))]
    others = [folder for folder in folders if folder not in inside]
    if len(inside) < 2 or not all(same_task(one, inside) for one in others):
        return None
    if len(sets := sets_in(root)) > 1:
        names = "; ".join(str(root / name_of_set(parts)) for parts in sets.values())
        raise BadModel(f"{root}: holds {len(sets)} sets of models; name one of them: {names}")
    return _set_of(inside, others, root=root)


def _set_of(inside: Sequence[Path], others: Sequence[Path], *, root: Path) -> Found:
    """The set of these models; `root` is what an error names."""
    number_of = {folder: int(_part(folder)["number"]) for folder in inside}
    if sorted(number_of.values()) != list(range(1, len(number_of) + 1)):
        names = ", ".join(_dataset(folder) for folder in inside)
        raise BadModel(f"{root}: its models are parts of a set that is not complete: {names}")
    # TotalSegmentator predicts its sets without mirroring, fold 0, with windows that overlap by a
    # fifth.
    return Found(
        parts=tuple(Part(folder=one, labels=None) for one in sorted(inside, key=number_of.get)),  # type: ignore[arg-type]
        overlap=1 - 0.8,
        mirrored=False,
        folds=("0",),
        several=True,
        others=tuple(others),
    )


def sets_in(root: Path) -> dict[str, list[Path]]:
    """The folders of the parts of each set in a folder, by the set's name in small letters."""
    sets: dict[str, list[Path]] = {}
    for folder in model_folders(root):
        if match := _PART.match(_dataset(folder)):
            sets.setdefault(match["set"].casefold(), []).append(folder)
    return sets


def name_of_set(parts: Sequence[Path]) -> str:
    """What a set is called by its folders."""
    return _part(parts[0])["set"]


def names_set(path: Path) -> bool:
    """Whether a path that is not there names a set of parts beside it."""
    if path.exists() or not path.parent.is_dir():
        return False
    if not any(_PART.match(folder.name) for folder in _folders(path.parent)):
        return False  # not worth a search
    return path.name.casefold() in sets_in(path.parent)


def _part(folder: Path) -> re.Match[str]:
    match = _PART.match(_dataset(folder))
    assert match is not None
    return match


def _dataset(folder: Path) -> str:
    """The name of the dataset folder that a model folder lies in."""
    return folder.name if folder.name.startswith("Dataset") else folder.parent.name


def _listed_parts(path: Path, folders: Sequence[Path]) -> Found | None:
    """The set that a parts.json describes, if its models are those that were found."""
    content = read_json(path)
    entries, labels = content.get("parts"), content.get("labels")
    folds = content.get("folds") or []
    if not isinstance(entries, list) or not isinstance(folds, list) or not isinstance(labels, dict):
        raise BadModel(f"{path}: does not list parts, their folds, and labels")
    if not all(type(value) is int and 0 < value <= 65535 for value in labels.values()):
        raise BadModel(f"{path}: its labels are not names with whole numbers from 1 on")
    by_name = {_dataset(folder): folder for folder in folders}
    names = [str(entry.get("model")) if isinstance(entry, dict) else "" for entry in entries]
    if not set(names) <= set(by_name) or len(set(names)) < len(names):
        return None
    others = [folder for name, folder in by_name.items() if name not in names]
    if not all(same_task(one, [by_name[str(name)] for name in names]) for one in others):
        return None
    parts = [_listed_part(entry, by_name[entry["model"]], labels, path=path) for entry in entries]
    overlap = _listed_overlap(content, path)
    return Found(
        parts=tuple(parts),
        names={value: str(name) for name, value in labels.items()},
        overlap=overlap,
        mirrored=bool(content.get("mirroring", False)),
        folds=tuple(str(fold) for fold in folds),
        several=True,
        others=tuple(others),
    )


def _listed_overlap(content: Mapping[str, Any], path: Path) -> float:
    """The share by which windows overlap. Raises `BadModel` if the step is not a share of a
    window.
    """
    step = content.get("step_size", 0.8)
    if type(step) not in (int, float) or not 0.1 <= step <= 1:
        raise BadModel(f"{path}: step_size {step!r:.40} is not a share of a window")
    return 1 - step


def _listed_part(entry: Any, folder: Path, labels: Mapping[str, Any], *, path: Path) -> Part:
    """One entry of a parts.json; labels: name to value of the set's labels."""
    try:
        own = {int(value): int(labels[name]) for value, name in entry["labels"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadModel(
            f"{path}: does not give a label of the set to each label of {entry['model']}"
        ) from None
    return Part(folder=folder, labels=own)


# Folds and checkpoints ----------------------------------------------------------------------------


def fold_files(folder: Path, *, folds: Sequence[str] = (), checkpoint: str = "final") -> list[Path]:
    """The checkpoints of the folds that are used, in their order.

    folds: '0', '3', 'all'; by default every numbered fold that has the checkpoint, or fold_all if
    it is the only one. checkpoint: 'final', 'best' or 'latest'. Raises `BadModel` where one is
    missing, `BadConfig` for other names.
    """
    if not re.fullmatch(r"\w+", checkpoint):
        raise BadConfig(f"--checkpoint {checkpoint!r:.40}: give final, best or latest")
    name = f"checkpoint_{checkpoint}.pth"
    fold_folders = [entry for entry in _folders(folder) if entry.name.startswith("fold_")]
    checkpoints = _fold_checkpoints(fold_folders, name)
    missing = [fold for fold in folds if fold not in checkpoints]
    if missing:
        available = ", ".join(sorted(checkpoints)) or "none"
        raise BadModel(
            f"{folder}: has no fold {missing[0]} with {name}; those that have one: {available}"
        )
    fold_names = folds or _default_folds(checkpoints)
    if not fold_names:
        raise _no_weights(folder, fold_folders, name)
    return [checkpoints[fold] for fold in fold_names]


def _fold_checkpoints(fold_folders: Sequence[Path], name: str) -> dict[str, Path]:
    """Of each fold that has a checkpoint of this name its path."""
    paths = {folder.name.removeprefix("fold_"): folder / name for folder in fold_folders}
    return {fold: path for fold, path in paths.items() if path.is_file()}


def _default_folds(folds: Collection[str]) -> list[str]:
    """Every numbered fold, or fold_all if it is the only one."""
    numbers = sorted(filter(str.isdigit, folds), key=int)
    return numbers or [fold for fold in folds if fold == "all"]


def _no_weights(folder: Path, fold_folders: Sequence[Path], name: str) -> BadModel:
    """What to say where no fold has the checkpoint `name`."""
    others = sorted({file.name for fold in fold_folders for file in fold.glob("checkpoint_*.pth")})
    if not others:
        return BadModel(
            f"{folder}: has plans but no weights (no fold_0/{name}); fetch the whole model"
        )
    short = others[0].removeprefix("checkpoint_").removesuffix(".pth")
    names = ", ".join(others)
    return BadModel(f"{folder}: has no {name}, only {names}; ask for it with --checkpoint {short}")


def postprocessing_file(folder: Path, folds: Sequence[str] = ()) -> Path | None:
    """The `postprocessing.json` of a model's cross-validation, if there is one; never the pickle
    beside it.

    Of several that of these folds, or else that of the most.
    """
    files = {
        tuple(re.findall(r"_(\d+|all)(?=_|$)", file.parent.name)): file
        for file in sorted(folder.glob("crossval_results*/postprocessing.json"))
    }
    most = max(files, key=lambda names: (len(names), names), default=())
    return files.get(tuple(folds), files.get(most))


# Archives -----------------------------------------------------------------------------------------


def _unpacked(path: Path) -> Path:
    """A private folder with the plans and checkpoints of a zip."""
    return unpacked(path, is_needed=_is_needed, nothing=_no_model_in)


def _is_needed(parts: tuple[str, ...]) -> bool:
    return bool(_NEEDED.fullmatch(parts[-1]))


def _no_model_in(names: Sequence[str], path: Path) -> BadModel | None:
    """What to say of an archive without any plans; None where there are some."""
    bare = {PurePosixPath(name).name for name in names}
    if "plans.json" in bare:
        return None
    if not {"plans.pkl", "model_final_checkpoint.model"}.isdisjoint(bare):
        return BadModel(
            f"{path}: was made by nnU-Net v1, which stores pickles, and those are not opened; "
            "convert it with nnU-Net or ask its authors for a model of v2"
        )
    return BadModel(
        f"{path}: holds no model of nnU-Net v2 (a folder with plans.json, dataset.json and fold_0)"
    )


def read_postprocessing(path: Path) -> list[list[int]]:
    """The groups of labels of which only the largest component shall stay, in order. Raises
    `BadModel`."""
    content = read_json(path)
    functions, arguments = content.get("postprocessing_fns"), content.get("postprocessing_kwargs")
    keep_largest = "remove_all_but_largest_component_from_segmentation"
    if (
        not isinstance(functions, list)
        or not isinstance(arguments, list)
        or len(functions) != len(arguments)
    ):
        raise BadModel(f"{path}: is not what nnU-Net writes there")
    groups = []
    for function, options in zip(functions, arguments):
        if function != keep_largest:
            raise BadModel(f"{path}: asks for {function!r:.80}, which medseg does not have")
        labels = options.get("labels_or_regions") if isinstance(options, dict) else None
        groups.append(sorted(set(_flat(labels, path))))
    return groups


def _flat(labels: Any, path: Path) -> list[int]:
    """The numbers of a label, a list of labels, or of regions."""
    if type(labels) is int and labels >= 0:
        return [labels]
    if isinstance(labels, list) and labels and all(type(one) in (int, list) for one in labels):
        return [value for one in labels for value in _flat(one, path)]
    raise BadModel(f"{path}: {labels!r:.80} are not labels")
