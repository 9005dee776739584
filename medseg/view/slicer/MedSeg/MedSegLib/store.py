"""Settings are kept: in the scene what belongs to it, and between sessions all."""

from __future__ import annotations

from typing import Any

from MedSegLib.settings import GROUP, Settings, from_texts

#: What a scene says. Programs, packages and folders are not among it: a scene may be a stranger's,
#: and it must not say what is run here.
_OF_SCENE = ("model", "structures", "device", "cleanup", "mirrored", "show_3d", "box_mm")


class Store:
    """Settings in a parameter node, and in those that Slicer keeps for the user.

    kept: what has `value(key, default)` and `setValue(key, text)`, as QSettings.
    """

    def __init__(self, kept: Any) -> None:
        self._kept = kept
        self._node: Any = None

    def use(self, node: Any) -> None:
        """The parameter node of the scene from now on; None for none."""
        self._node = node

    def read(self) -> Settings:
        """Those of the scene, and what it does not say as it was last."""
        return from_texts(self._text)

    def write(self, settings: Settings) -> None:
        """Keep these in both."""
        for name, text in settings.texts().items():
            self._kept.setValue(f"{GROUP}/{name}", text)
            if self._node is not None and name in _OF_SCENE:
                self._node.SetParameter(name, text)

    def _text(self, name: str) -> str | None:
        if self._node is not None and name in _OF_SCENE:
            text = self._node.GetParameter(name)
            if text:
                return str(text)
        text = self._kept.value(f"{GROUP}/{name}", "")
        return None if text is None else str(text)
