"""Segmenting from Python: any form of a scan in, labels with all that belongs to them out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from medseg.errors import BadConfig, BadFile, DataWarning
from medseg.inference import (
    AUTO,
    CT_TISSUES,
    UNTRAINED,
    Extras,
    Job,
    Model,
    Plan,
    Segmentation,
    Settings,
    as_list,
    channel_names,
    in_python,
    is_set,
    label_table,
    labels_named,
    load_model,
    models_kept_open,
    names_tissues,
    read_scans,
    segment_scan,
    without_names,
)
from medseg.io import (
    ScanLike,
    as_path,
    as_volume,
    as_volumes,
    is_one_scan,
    is_path,
    is_readable_name,
    what_is,
)
from medseg.logs import Progress, silent
from medseg.models import known_models
from medseg.text import counted
from medseg.volume import Volume

if TYPE_CHECKING:
    from medseg.labels import LabelTable

#: A name, a folder, several of them to be averaged, what `medseg.load` returned, or checkpoints.
ModelLike: TypeAlias = "str | os.PathLike[str] | Segmenter | Model | Sequence[str] | None"
#: One call computes at a time: it uses all cores, and its forecast of memory is about itself alone.
_COMPUTING = RLock()


class Changes(TypedDict, total=False):
    """The settings of `Settings` as keywords. Label values of `roi` and `probabilities` may be the
    names of structures.
    """

    device: str
    precision: str
    overlap: float | None
    cleanup: bool
    backend: str
    batch: int
    tta: bool | None
    max_memory_bytes: int | None
    probabilities: Iterable[int | str]
    uncertainty: bool
    exact: bool
    orientation: str
    roi: Iterable[int | str]
    postprocess: bool


def segment(
    scan: ScanLike,
    model: ModelLike = None,
    settings: Settings | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
    announce: Callable[[Plan], None] = lambda plan: None,
    **changes: Unpack[Changes],
) -> Segmentation:
    """Segment a scan; without a model with the one that suits it, as `medseg infer` chooses.

    scan: a path (file or DICOM folder), a `Volume`, an image of nibabel or SimpleITK, a pair of an
    array or tensor (I, J, K) and an affine (4, 4) to RAS+ mm, or a list of these, one for each
    channel of the model, in its order and on one grid. model: a name such as 'brain', 'ct-tissues'
    or 'otsu', a folder or zip of a model, several to be averaged, or what `load` returned.
    settings: see `Settings`; single ones may be given by name: `device="cpu"`. force: also where
    the model makes no sense for the scan. announce: is told the plan before it is carried out.

    The labels lie on the scan's own grid: same shape, same affine. What speaks against them is
    warned of (`DataWarning`) and stands in `doubts`. Calls from several threads wait for each
    other. Raises `BadFile` for scans that are no images or whose place is not certain, `BadConfig`
    for what is no scan, too few or too many channels, settings that do not fit, and where no model
    suits, `BadModel`, `NotEnoughMemory` before anything is computed.
    """
    asked = settings_of(settings, changes)
    if isinstance(model, Segmenter):
        return model(scan, settings, force=force, progress=progress, announce=announce, **changes)
    with _COMPUTING:
        return _segment(
            scan, model_of(model), asked,
            changes=changes, force=force, progress=progress, announce=announce,
        )  # fmt: skip


class Segmenter:
    """A model that stays loaded: called with a scan it does what `segment` does.

    It may be called from several threads, which wait for each other. `name`, `table` (what its
    labels mean) and `channels` (what scans it takes, '' where it does not say) describe it.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._open: dict[Any, Any] = {}

    @property
    def name(self) -> str:
        """What the model is called."""
        return _name(self.model)

    @property
    def table(self) -> LabelTable:
        """What the values of its labels mean."""
        return label_table(self.model)

    @property
    def channels(self) -> tuple[str, ...]:
        """What each scan is that it takes, in order; '' where it does not say."""
        return tuple(channel_names(self.model))

    def __call__(
        self,
        scan: ScanLike,
        settings: Settings | None = None,
        *,
        force: bool = False,
        progress: Progress = silent,
        announce: Callable[[Plan], None] = lambda plan: None,
        **changes: Unpack[Changes],
    ) -> Segmentation:
        """Segment a scan as `medseg.segment` does, with the settings of `medseg.load` unless others
        are given.
        """
        asked = settings_of(settings or self.settings, changes)
        with _COMPUTING, models_kept_open(self._open):
            return _segment(
                scan, self.model, asked,
                changes=changes, force=force, progress=progress, announce=announce,
            )  # fmt: skip

    def __repr__(self) -> str:
        names = ", ".join(name for name in self.channels if name)
        takes = f"{len(self.channels)} channels" if len(self.channels) > 1 else "one scan"
        return (
            f"<Segmenter {self.name}: {takes}{f' ({names})' if names else ''} to"
            f" {counted(len(self.table), 'structure')}>"
        )


def load(
    model: ModelLike = "brain",
    *more: str | os.PathLike[str],
    folds: Sequence[int | str] = (),
    checkpoint: str = "final",
    settings: Settings | None = None,
    **changes: Unpack[Changes],
) -> Segmenter:
    """A model that stays loaded between calls: `model = load("brain"); model(scan)`.

    model, more: names and folders as of `segment`; several are averaged. folds, checkpoint: of
    models of nnU-Net. settings, changes: for all calls that give no others. Raises `BadModel`,
    `BadConfig`.
    """
    if isinstance(model, Segmenter):
        asked = settings_of(settings or model.settings, changes)
        return Segmenter(model.model, named_values(asked, changes, model.model))
    if isinstance(folds, str | int):
        raise BadConfig(f"folds are a list such as [0, 1] or ['all'], and this is {what_is(folds)}")
    if checkpoint not in ("final", "best", "latest"):
        raise BadConfig(f"there is no checkpoint '{checkpoint}'; use final, best or latest")
    loaded = model_of(
        [model, *more] if more else model, folds=[str(one) for one in folds], checkpoint=checkpoint
    )
    if loaded == AUTO:
        raise BadConfig("name a model to load; which one suits a scan, medseg.segment chooses")
    return Segmenter(loaded, named_values(settings_of(settings, changes), changes, loaded))


def model_of(
    model: ModelLike | Sequence[Any], *, folds: Sequence[str] = (), checkpoint: str = "final"
) -> Model:
    """The model that is meant; 'auto' for none. Raises `BadModel`, and `BadConfig` for what is no
    model.
    """
    if model is None or (isinstance(model, str) and model == AUTO):
        return AUTO
    if isinstance(model, Segmenter):
        return model.model
    several: list[Any] = list(model) if isinstance(model, list | tuple) else [model]
    if several and all(is_path(one) for one in several):
        names = [os.fsdecode(one) for one in several]
        return load_model(*names, folds=folds, checkpoint=checkpoint)
    is_loaded = several and all(hasattr(one, "spec") for one in several)
    if is_loaded or hasattr(model, "models"):
        loaded: Any = model
        return loaded
    raise BadConfig(
        f"a model is a name such as 'brain', a folder or what medseg.load returns; this is"
        f" {what_is(model)}"
    )


#: Settings whose values may be names of structures.
_BY_NAME = ("roi", "probabilities")


def settings_of(settings: Settings | None, changes: Changes) -> Settings:
    """The settings with changes, all but those that may be names of structures. Raises `BadConfig`
    for wrong values, `TypeError` for a name that no setting has.
    """
    if settings is not None and not isinstance(settings, Settings):
        raise BadConfig(f"settings are a medseg.Settings, and this is {what_is(settings)}")
    names = {one.name for one in fields(Settings)}
    for name in changes:
        if name not in names:
            near = get_close_matches(name, names, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"there is no setting '{name}'{meant}")
    plain: dict[str, Any] = {key: one for key, one in changes.items() if key not in _BY_NAME}
    return replace(settings or Settings(), **plain)


def named_values(settings: Settings, changes: Changes, model: Model) -> Settings:
    """The settings with the values of the structures that are named. Raises `BadConfig`."""
    given: dict[str, Any] = {key: one for key, one in changes.items() if key in _BY_NAME}
    values: dict[str, Any] = {}
    for key, names in given.items():
        if isinstance(names, str | bytes | Mapping) or not isinstance(names, Iterable):
            raise BadConfig(f"{key} is a list of names or values, and this is {what_is(names)}")
        values[key] = _values_of(list(names), model, key)
    if settings.roi and "roi" not in values:
        _values_of(settings.roi, model, "roi")
    return replace(settings, **values)


def _values_of(names: Sequence[int | str], model: Model, setting: str) -> tuple[int, ...]:
    """The values of labels by names or values, which the model has. Raises `BadConfig`."""
    texts = [str(one.item() if hasattr(one, "item") else one) for one in names]
    try:
        return labels_named(model, texts)
    except BadConfig as error:
        raise BadConfig(str(error).replace("--roi", setting)) from None


def _segment(
    scan: ScanLike,
    model: Model,
    settings: Settings,
    *,
    changes: Changes,
    force: bool,
    progress: Progress,
    announce: Callable[[Plan], None],
) -> Segmentation:
    _check_calls(force, progress=progress, announce=announce)
    if model == AUTO:
        model = _meant(settings, changes)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            volumes, source = _read(scan, model)
        for one in caught:  # to who called, and for the record of what may be saved
            warnings.warn(one.message, one.category, stacklevel=3)
        asked = named_values(settings, changes, model)
        return segment_scan(
            volumes, model, asked, messages=_messages(caught, scan),
            source=source, inputs=_files_of(scan), force=force, progress=progress,
            announce=announce,
        )  # fmt: skip
    except (BadConfig, BadFile) as error:
        raise in_python(error) from None


def _check_calls(force: object, **functions: object) -> None:
    """Raise `BadConfig` for what is neither a truth value nor a function."""
    if not isinstance(force, bool):
        raise BadConfig(f"force is True or False, and this is {what_is(force)}")
    for name, one in functions.items():
        if not callable(one):
            raise BadConfig(f"{name} is a function that is called, and this is {what_is(one)}")


def _meant(settings: Settings, changes: Changes) -> Model:
    """The model that who names structures means, as `medseg infer` understands it; 'auto' where
    none are named.
    """
    names: list[object] = [*settings.roi, *settings.probabilities]
    for key in _BY_NAME:
        given = changes.get(key, ())
        if isinstance(given, Sized) and isinstance(given, Iterable):
            names.extend([given] if isinstance(given, str) else given)
        elif given is not None:  # an iterator, which is read but once
            return load_model("brain")
    if not names:
        return AUTO
    return CT_TISSUES if names_tissues(names) else load_model("brain")


def _messages(caught: Sequence[warnings.WarningMessage], scan: object) -> list[str]:
    """What was said about the data while it was read, without the names of its files."""
    texts = [str(one.message) for one in caught if issubclass(one.category, DataWarning)]
    files = [Path(os.fsdecode(one)) for one in _several(scan) if is_path(one)]
    if not files:
        return texts
    return without_names(texts, Job(scan=files[0], labels=files[0], channels=tuple(files[1:])))


def _several(scan: object) -> Sequence[object]:
    return scan if isinstance(scan, list | tuple) else [scan]


def _files_of(scan: object) -> list[Path]:
    """The files that a scan came from; an image of nibabel knows its own."""
    files = [one for one in _several(scan) if is_path(one)]
    for one in _several(scan):
        name_of = getattr(one, "get_filename", None)
        if callable(name_of) and is_path(name := name_of()):
            files.append(name)
    return [Path(os.fsdecode(one)) for one in files]


def _read(scan: object, model: Model) -> tuple[list[Volume], Path | None]:
    """The channels of a scan, and the file of the first where it is one. Raises `BadConfig` for
    what is no scan, or has another number of channels than the model takes.
    """
    names = channel_names(model)
    if is_path(scan):
        path = Path(os.fsdecode(scan))
        if isinstance(scan, str) and not (scan and _is_there(path)):
            raise BadFile(_no_file(scan))
        if count := _scans_in(path):
            raise BadFile(
                f"{path}: is a folder of {counted(count, 'scan')}; give one of them, or the folder"
                " to medseg.batch"
            )
        return read_scans(Job(scan=path, labels=path), names, Extras()), path
    if is_one_scan(scan) or not isinstance(scan, list | tuple):
        volumes = as_volumes(scan)
        several = f" of {len(volumes)} volumes" if len(volumes) > 1 else ""
        _check_count(len(volumes), f"{what_is(scan)}{several}", model)
        return volumes, None
    _check_count(len(scan), what_is(scan), model)
    if all(is_path(one) for one in scan):
        first, *rest = (as_path(one, "each channel") for one in scan)
        job = Job(scan=first, labels=first, channels=tuple(rest))
        return read_scans(job, names, Extras()), first
    return [as_volume(one) for one in scan], None


def _is_there(path: Path) -> bool:
    """Whether a path names something; one with too long a name does not."""
    try:
        return path.exists()
    except OSError:
        return False


def _scans_in(path: Path) -> int:
    """How many scans lie in a folder, DICOM aside, as `medseg infer` counts them."""
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        return 0
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    return sum(is_readable_name(one) and not one.lower().endswith(".dcm") for one in names)


def _no_file(text: str) -> str:
    models = (*UNTRAINED, *known_models())
    meant = f"; to use the model of this name: segment(scan, {text!r})" if text in models else ""
    return f"{text!r} is a text that names no file or folder{meant or '; check the name'}"


def _check_count(count: int, given: str, model: Model) -> None:
    names = channel_names(model)
    if count == len(names):
        return
    title = "a model that is chosen by the scan" if model == AUTO else f"the model {_name(model)}"
    listed = f" ({', '.join(names)})" if any(names) else ""
    wanted = "1 scan" if len(names) == 1 else f"{len(names)} scans{listed}, in this order"
    remedy = "call it for each of several scans, or medseg.batch for many"
    if count < len(names):
        remedy = "give a list of them"
    raise BadConfig(f"{title} takes {wanted}, and {given} is given; {remedy}")


def _name(model: Model) -> str:
    if isinstance(model, str):
        return model
    return model.name if is_set(model) else as_list(model)[0].spec.name
