"""BIDS data sets with label maps under `derivatives`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from medseg.dataset.cases import Case, Dataset, Finding
from medseg.dataset.layouts.finding import (
    files_in,
    folders_in,
    scans_below,
    united_table,
    unpaired_case,
)
from medseg.errors import BadConfig, BadFile, MedsegError
from medseg.io import read, read_labels, strip_suffix
from medseg.labels import LabelTable
from medseg.volume import turned_onto

# BIDS ---------------------------------------------------------------------------------------------


def find_bids(path: Path) -> Dataset | None:
    """BIDS: `sub-*` folders with images, and `*_dseg` label maps in derivatives, with `dseg.tsv` by
    inheritance.

    Given the folder of one pipeline in `derivatives/`, only its label maps are taken.
    """
    places = _places(path)
    if places is None:
        return None
    root, homes = places
    labels = [(home, file) for home in homes for file in _segmentations_in(home)]
    if not labels:
        return None
    _check_one_kind(path, labels)
    home = labels[0][0]
    images_of = {file: _bids_images(root, home, file) for _, file in labels}
    pairs = {file: images for file, images in images_of.items() if images}
    common = _common_kinds(path, pairs)
    channels = _bids_on_grid(pairs, common)
    return Dataset(
        folder=root,
        layout="",
        name=root.name,
        cases=tuple(_bids_case(file, images, channels) for file, images in pairs.items()),
        channels=tuple(channels),
        table=_united_bids_table(path, home, pairs),
        findings=(
            *(
                unpaired_case(strip_suffix(file), f"{file}: no image belongs to it")
                for file, images in images_of.items()
                if not images
            ),
            *_about_rest(pairs, common),
        ),
    )


def _places(path: Path) -> tuple[Path, list[Path]] | None:
    """The root of a BIDS data set and the folders to look in for segmentations: the pipeline that
    is given, or all and the root. None for another folder.
    """
    if not path.is_dir():
        return None
    pipeline = path if path.parent.name == "derivatives" else None
    root = path.parent.parent if pipeline else path
    if not (root / "dataset_description.json").is_file() and not folders_in(root, "sub-"):
        return None
    return root, [pipeline] if pipeline else [*folders_in(root / "derivatives"), root]


def _united_bids_table(path: Path, home: Path, labels: Iterable[Path]) -> LabelTable:
    tables = [_bids_table(home, file) for file in labels]
    return united_table(path, [table for table in tables if table is not None])


def _segmentations_in(home: Path) -> list[Path]:
    """The `*_dseg` files of a pipeline or of the raw data, subject by subject."""
    files = [file for subject in folders_in(home, "sub-") for file in scans_below(subject)]
    return [file for file in files if _entities(file)[1] == "dseg"]


def _check_one_kind(path: Path, labels: Sequence[tuple[Path, Path]]) -> None:
    """Raise `BadConfig` if (pipeline, file) are segmentations of several pipelines, spaces, atlases
    and so on.
    """
    kinds = {(home.name, home, _kind_of(file)) for home, file in labels}
    if len(kinds) == 1:
        return
    names = sorted(" ".join(part for part in (name, *kind) if part) for name, _, kind in kinds)
    raise BadConfig(
        f"{path}: holds {len(kinds)} kinds of segmentations ({'; '.join(names[:4])}); give the "
        "folder of one in derivatives/, or a list of cases as CSV"
    )


def _kind_of(label: Path) -> tuple[str, ...]:
    """What tells segmentations of one scan apart; '' where a file's name does not say."""
    entities = _entities(label)[0]
    return tuple(entities.get(key, "") for key in ("space", "seg", "desc", "atlas"))


def _common_kinds(path: Path, paired: Mapping[Path, Mapping[str, Path]]) -> list[str]:
    """The kinds of images that every segmentation has. Raises `BadFile` if there are none."""
    common = set.intersection(*map(set, paired.values())) if paired else set()
    if not common:
        raise BadFile(
            f"{path}: no image of one kind (T1w, FLAIR ...) belongs to every segmentation"
        )
    return sorted(common)


def _about_rest(
    pairs: Mapping[Path, Mapping[str, Path]], common: Sequence[str]
) -> Iterator[Finding]:
    """Warnings of kinds of images that most segmentations have on their grid and some lack: these
    few take the channel from all.
    """
    for kind in sorted(set().union(*pairs.values()) - set(common)):
        having = {label: images for label, images in pairs.items() if kind in images}
        first = next(iter(having))
        if 2 * len(having) < len(pairs) or not _is_on_grid(first, having[first][kind]):
            continue
        lacking = [strip_suffix(label) for label in pairs if label not in having]
        examples = ", ".join(lacking[:5]) + (" ..." if len(lacking) > 5 else "")
        message = (
            f"{kind} is no channel, for {len(lacking)} of {len(pairs)} segmentations have no such"
            f" image: {examples}; leave these out to train with it"
        )
        yield Finding(case="", kind="channels", severity="warning", message=message)


def _is_on_grid(label: Path, image: Path) -> bool:
    try:
        return turned_onto(read_labels(label), read(image)) is not None
    except MedsegError:
        return False


def _bids_case(label: Path, images: Mapping[str, Path], channels: Sequence[str]) -> Case:
    entities = _entities(label)[0]
    keys = [key for key in ("sub", "ses", "acq", "run") if key in entities]
    return Case(
        name="_".join(f"{key}-{entities[key]}" for key in keys),
        images=tuple(images[kind] for kind in channels),
        label=label,
        group=f"sub-{entities['sub']}",
    )


def _entities(file: Path) -> tuple[dict[str, str], str]:
    """The entities of a BIDS file name and its suffix: ({'sub': '01', 'space': 'orig'}, 'dseg')."""
    *pairs, suffix = file.name.split(".")[0].split("_")
    return dict(pair.partition("-")[::2] for pair in pairs if "-" in pair), suffix


def _bids_images(root: Path, home: Path, label: Path) -> dict[str, Path]:
    """Suffix (T1w ...) to the image a segmentation belongs to: of the same subject, session, run
    and space.

    An image may say less than the segmentation about itself, but nothing else.
    """
    label_entities = _without(_entities(label)[0], ("desc", "seg", "atlas", "label"))
    if label_entities.get("space", "").lower() in ("orig", "t1w", "t2w", "individual", "native"):
        label_entities.pop("space")
    images: dict[str, Path] = {}
    for place in dict.fromkeys((home, root)):
        for file in scans_below(place / f"sub-{label_entities['sub']}"):
            entities, suffix = _entities(file)
            entities = _without(entities, ("desc", "part", "echo"))
            same_space = entities.get("space") == label_entities.get("space")
            fits = same_space and entities.items() <= label_entities.items()
            if fits and suffix not in ("dseg", "probseg", "mask"):
                images.setdefault(suffix, file)
    return images


def _without(entities: Mapping[str, str], keys: Sequence[str]) -> dict[str, str]:
    return {key: value for key, value in entities.items() if key not in keys}


def _bids_on_grid(found: Mapping[Path, Mapping[str, Path]], kinds: Sequence[str]) -> list[str]:
    """Those kinds of images that lie on the grid of the first segmentation; all of them if there is
    only one.
    """
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
    """The nearest `dseg.tsv` that speaks of a file: in its folder or one above, saying nothing else
    than its name.
    """
    label_entities = _entities(label)[0]
    folder = label.parent
    while True:
        fitting = [
            file
            for file in files_in(folder)
            if file.suffix == ".tsv"
            and _entities(file)[1] == "dseg"
            and _entities(file)[0].items() <= label_entities.items()
        ]
        if fitting:
            return LabelTable.read(max(fitting, key=lambda file: len(_entities(file)[0])))
        if folder == home or home not in folder.parents:
            return None
        folder = folder.parent
