"""BIDS data sets with label maps under `derivatives`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.dataset.cases import Case, Dataset
from medseg.dataset.layouts.finding import files_in, folders_in, scans_below, united_table, unpaired_case
from medseg.errors import BadConfig, BadFile, MedsegError
from medseg.io import read, read_labels, strip_suffix
from medseg.labels import LabelTable
from medseg.volume import turned_onto

# BIDS ----------------------------------------------------------------------------------------------------------------


def find_bids(path: Path) -> Dataset | None:
    """BIDS: `sub-*` folders with images, and `*_dseg` label maps in derivatives, with `dseg.tsv` by inheritance.

    Given the folder of one pipeline in `derivatives/`, only its label maps are taken.
    """
    if not path.is_dir():
        return None
    pipeline = path if path.parent.name == "derivatives" else None
    root = path.parent.parent if pipeline else path
    if not (root / "dataset_description.json").is_file() and not any(folders_in(root, "sub-")):
        return None
    homes = [pipeline] if pipeline else [*folders_in(root / "derivatives"), root]
    labels = [(home, file) for home in homes for file in _bids_files(home) if _entities(file)[1] == "dseg"]
    if not labels:
        return None
    kinds: set[tuple[Any, ...]] = {
        (home, *(_entities(file)[0].get(key, "") for key in ("space", "seg", "desc", "atlas"))) for home, file in labels
    }
    if len(kinds) > 1:
        told = sorted(" ".join(part for part in (kind[0].name, *kind[1:]) if part) for kind in kinds)
        raise BadConfig(
            f"{path}: holds {len(kinds)} kinds of segmentations ({'; '.join(told[:4])}); give the folder of one in "
            "derivatives/, or a list of cases as CSV"
        )
    home = labels[0][0]
    found = {file: _bids_images(root, home, file) for _, file in labels}
    lacking = [file for file, images in found.items() if not images]
    common = (
        set.intersection(*(set(images) for images in found.values() if images)) if len(lacking) < len(found) else set()
    )
    if not common:
        raise BadFile(f"{path}: no image of one kind (T1w, FLAIR ...) belongs to every segmentation")
    channels = _bids_on_grid({file: images for file, images in found.items() if images}, sorted(common))
    cases, tables = [], []
    for file, images in found.items():
        if images:
            entities = _entities(file)[0]
            name = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses", "acq", "run") if key in entities)
            subject = f"sub-{entities['sub']}"
            cases.append(Case(name, tuple(images[kind] for kind in channels), file, group=subject))
            tables.append(_bids_table(home, file))
    table = united_table(path, [one for one in tables if one is not None])
    findings = [unpaired_case(strip_suffix(file), f"{file}: no image belongs to it") for file in lacking]
    return Dataset(root, "", root.name, tuple(cases), tuple(channels), table, findings=tuple(findings))


def _entities(file: Path) -> tuple[dict[str, str], str]:
    """The entities of a BIDS file name and its suffix: ({'sub': '01', 'space': 'orig'}, 'dseg')."""
    *pairs, suffix = file.name.split(".")[0].split("_")
    return dict(pair.partition("-")[::2] for pair in pairs if "-" in pair), suffix


def _bids_files(home: Path) -> list[Path]:
    return [file for subject in folders_in(home, "sub-") for file in scans_below(subject)]


def _bids_images(root: Path, home: Path, label: Path) -> dict[str, Path]:
    """Suffix (T1w ...) to the image a segmentation belongs to: of the same subject, session, run and space.

    An image may say less than the segmentation about itself, but nothing else.
    """
    wanted = {key: value for key, value in _entities(label)[0].items() if key not in ("desc", "seg", "atlas", "label")}
    if wanted.get("space", "").lower() in ("orig", "t1w", "t2w", "individual", "native"):
        wanted.pop("space")
    found: dict[str, Path] = {}
    for place in dict.fromkeys((home, root)):
        for file in scans_below(place / f"sub-{wanted['sub']}"):
            entities, suffix = _entities(file)
            entities.pop("desc", None)
            said = {key: value for key, value in entities.items() if key not in ("part", "echo")}
            fits = said.items() <= wanted.items() and said.get("space") == wanted.get("space")
            if fits and suffix not in ("dseg", "probseg", "mask") and suffix not in found:
                found[suffix] = file
    return found


def _bids_on_grid(found: Mapping[Path, Mapping[str, Path]], kinds: Sequence[str]) -> list[str]:
    """Those kinds of images that lie on the grid of the first segmentation; all of them if there is only one."""
    if len(kinds) == 1:
        return list(kinds)
    label, images = next(iter(found.items()))
    try:
        labels = read_labels(label)
        fitting = []
        for kind in kinds:
            if turned_onto(labels, read(images[kind])) is not None:
                fitting.append(kind)
    except MedsegError:
        return list(kinds)
    return fitting or list(kinds)


def _bids_table(home: Path, label: Path) -> LabelTable | None:
    """The nearest `dseg.tsv` that speaks of a file: in its folder or one above, saying nothing else than its name."""
    wanted = _entities(label)[0]
    folder = label.parent
    while True:
        fitting = [
            file
            for file in files_in(folder)
            if file.suffix == ".tsv" and _entities(file)[1] == "dseg" and _entities(file)[0].items() <= wanted.items()
        ]
        if fitting:
            return LabelTable.read(max(fitting, key=lambda file: len(_entities(file)[0])))
        if folder == home or home not in folder.parents:
            return None
        folder = folder.parent
