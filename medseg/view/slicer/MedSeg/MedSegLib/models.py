"""Which models there are, what each of them finds and takes, and those used last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from MedSegLib.command import CommandError, ask

#: How many models used last are kept.
MOST_RECENT = 12
#: The first line of the list: medseg looks at the scan and chooses.
AUTOMATIC = "automatic"


class Model(NamedTuple):
    """A model in a list: what `--model` takes, what it is called, and words about it."""

    name: str
    title: str
    about: str


class Facts(NamedTuple):
    """What is known of a model: its title, words about it, the scans it takes by name ('' where it
    does not say), the structures it finds in the order of their values, and further lines for
    readers.
    """

    title: str
    about: str
    channels: tuple[str, ...]
    structures: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it in a few lines."""
        count = len(self.structures)
        scans = len(self.channels)
        named = [name for name in self.channels if name]
        takes = f"{scans} scans" if scans > 1 else "1 scan"
        takes += f" ({', '.join(named)})" if named else ""
        finds = f"{count} structures" if count != 1 else "1 structure"
        return "\n".join([self.about, f"Takes {takes}, finds {finds}.", *self.lines]).strip()


def list_models(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[Model]:
    """The models that come with medseg. Raises `CommandError`."""
    return models_in(ask([*command, "models", "--json"], environment))


def models_in(text: str) -> list[Model]:
    """The models that `medseg models --json` printed. Raises `CommandError`."""
    try:
        return [
            Model(str(row["name"]), str(row["name"]), str(row["about"])) for row in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError):
        raise CommandError(
            "medseg did not say which models it has; look whether the program is medseg"
        ) from None


def facts_command(command: Sequence[str], model: str) -> list[str]:
    """The arguments that ask what a model is."""
    return [*command, "info", model, "--json"]


def read_facts(
    command: Sequence[str], model: str, environment: Mapping[str, str] | None = None
) -> Facts:
    """What a model is. Raises `CommandError`, such as where it is none."""
    return facts_in(ask(facts_command(command, model), environment))


def facts_in(text: str) -> Facts:
    """What `medseg info --json` printed of a model. Raises `CommandError` where it is no model."""
    try:
        content = json.loads(text.strip().splitlines()[0])
        models = content["models"]
        first = models[0]
        labels = content.get("labels", first["labels"])
        channels = first["channels"]
        names = [""] * channels if isinstance(channels, int) else [str(name) for name in channels]
    except (ValueError, KeyError, TypeError, IndexError):
        raise CommandError(
            "this is no model; choose a folder of a model, of a training run, of nnU-Net, of"
            " Auto3DSeg or a bundle, or a zip of one"
        ) from None
    structures = [str(labels[value]) for value in sorted(labels, key=int)]
    return Facts(
        title=str(first.get("name", "")),
        about=str(first.get("about", "")),
        channels=tuple(names),
        structures=tuple(structures),
        lines=tuple(_lines(first, models)),
    )


def _lines(first: Mapping[str, Any], models: Sequence[Any]) -> list[str]:
    lines = []
    if len(models) > 1:
        lines.append(f"{len(models)} models, of which the results are put together.")
    if first.get("made_by"):
        version = first.get("version")
        lines.append(f"Made by {first['made_by']}" + (f", version {version}" if version else ""))
    if first.get("spacing_mm"):
        lines.append("Sees voxels of " + " x ".join(f"{s:g}" for s in first["spacing_mm"]) + " mm.")
    for key, title in (("license", "Licence"), ("data_license", "Licence of the data")):
        if first.get(key):
            lines.append(f"{title}: {first[key]}")
    lines += [str(note) for note in first.get("notes", [])]
    return lines


def choices(own: Sequence[Model], recent: Iterable[str]) -> list[Model]:
    """The lines of the list of models: medseg's choice, those that come with medseg, and those used
    last that are still there.
    """
    lines = [Model("", AUTOMATIC, "what suits the scan: a brain in MR, or tissues in CT")]
    lines += own
    names = {model.name for model in own}
    for path in recent:
        if path not in names and Path(path).exists():
            lines.append(Model(path, _title(path), path))
    return lines


def _title(path: str) -> str:
    """What a folder or file is called, with its folder where its own name says little."""
    place = Path(path)
    if place.name.lower() in ("model", "best", "final", "models"):
        return f"{place.parent.name}/{place.name}"
    return place.name or path


def remembered(recent: Sequence[str], path: str) -> list[str]:
    """The models used last, with this one in front; medseg's own are not kept, they are listed."""
    if not path or os.sep not in path:
        return list(recent)
    return [path, *(one for one in recent if one != path)][:MOST_RECENT]
