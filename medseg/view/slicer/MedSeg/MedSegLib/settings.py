"""What was chosen in the panel, as texts: in the parameter node of a scene, and between
sessions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

#: Where settings stand among those of other modules.
GROUP = "MedSeg"


@dataclass(frozen=True)
class Settings:
    """What was chosen.

    model: what `--model` takes, '' for medseg's choice. structures: those to segment, () for all.
    program: the medseg program, '' for that of Slicer's Python or on the path. package: what pip
    installs. box_mm: edge of the cube around the slices for "here". recent: models used last.
    data_set: folder that is annotated. minutes: time to train.
    """

    model: str = ""
    structures: tuple[str, ...] = ()
    device: str = "auto"
    cleanup: bool = True
    mirrored: bool = False
    show_3d: bool = False
    program: str = ""
    package: str = "medseg"
    box_mm: float = 80.0
    recent: tuple[str, ...] = ()
    data_set: str = ""
    minutes: float = 10.0

    def texts(self) -> dict[str, str]:
        """Name to text of every setting."""
        return {field.name: _text(getattr(self, field.name)) for field in fields(self)}

    def changed(self, **values: Any) -> Settings:
        """These with others."""
        return replace(self, **values)


def from_texts(read: Callable[[str], str | None]) -> Settings:
    """Settings from a store of texts; what is missing or damaged is as it is at first.

    read: the text of a name, or None or '' where there is none.
    """
    usual = Settings()
    values = {}
    for field in fields(Settings):
        text = read(field.name)
        default = getattr(usual, field.name)
        values[field.name] = default if text in (None, "") else _value(str(text), default)
    return Settings(**values)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _value(text: str, default: Any) -> Any:
    """A text as the kind of value that the default is; the default where it is none."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, float):
            number = float(text)
            return number if 0 < number < 1e6 else default
        if isinstance(default, tuple):
            items = json.loads(text)
            if not isinstance(items, list):
                return default
            return tuple(item for item in items if isinstance(item, str))
        return text
    except (ValueError, KeyError, TypeError):
        return default
