"""Stand-ins for Slicer's window: enough of Qt, CTK and `slicer` that the module's panels can be
built and pressed without them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock


class Part:
    """Any widget: what is set is kept, what is called without meaning does nothing, and what is
    connected can be pressed with `emit`.
    """

    def __init__(self, *arguments: object) -> None:
        self.slots: dict[str, list[Callable[..., Any]]] = {}
        self.enabled, self.visible, self.checked, self.value = True, True, False, 0.0
        self.text = arguments[0] if arguments and isinstance(arguments[0], str) else ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return mock.MagicMock()

    def connect(self, signal: str, slot: Callable[..., Any]) -> None:
        """Call a slot where the signal of this name is emitted."""
        self.slots.setdefault(signal.partition("(")[0], []).append(slot)

    def emit(self, signal: str, *arguments: object) -> None:
        """What happens where a user does it."""
        for slot in self.slots.get(signal, []):
            slot(*arguments)

    def press(self) -> None:
        """Press a button that can be pressed."""
        assert self.enabled, f"{self.text} cannot be pressed"
        self.emit("clicked")


class ComboBox(Part):
    """A list of which one line is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[tuple[str, Any]] = []
        self._index = -1

    def addItem(self, text: str, data: Any = None) -> None:  # noqa: N802, Qt's name
        """A further line."""
        self.items.append((text, data))
        if self._index < 0:
            self.currentIndex = 0

    def addItems(self, texts: list[str]) -> None:  # noqa: N802, Qt's name
        """Further lines."""
        for text in texts:
            self.addItem(text)

    def clear(self) -> None:
        """No lines."""
        self.items.clear()
        self._index = -1

    @property
    def currentIndex(self) -> int:  # noqa: N802, Qt's name
        """Which line is chosen."""
        return self._index

    @currentIndex.setter
    def currentIndex(self, index: int) -> None:  # noqa: N802, Qt's name
        if index != self._index:
            self._index = index
            self.emit("currentIndexChanged", index)

    @property
    def currentText(self) -> str:  # noqa: N802, Qt's name
        """The text of the line that is chosen."""
        return self.items[self._index][0] if self._index >= 0 else ""

    @currentText.setter
    def currentText(self, text: str) -> None:  # noqa: N802, Qt's name
        if self.findText(text) >= 0:
            self.currentIndex = self.findText(text)

    def itemData(self, index: int) -> Any:  # noqa: N802, Qt's name
        """What stands behind a line."""
        return self.items[index][1] if 0 <= index < len(self.items) else None

    def findText(self, text: str) -> int:  # noqa: N802, Qt's name
        """The line of a text, -1 for none."""
        return next((n for n, (one, _) in enumerate(self.items) if one == text), -1)

    def findData(self, data: Any) -> int:  # noqa: N802, Qt's name
        """The line with something behind it, -1 for none."""
        return next((n for n, (_, one) in enumerate(self.items) if one == data), -1)


class Item:
    """A line that can be ticked."""

    def __init__(self, text: str = "") -> None:
        self._text, self._state, self._hidden = text, 0, False

    def text(self) -> str:
        """Its text."""
        return self._text

    def flags(self) -> int:
        """What can be done to it."""
        return 0

    def setFlags(self, flags: int) -> None:  # noqa: N802, Qt's name
        """Say what can be done to it."""

    def checkState(self) -> int:  # noqa: N802, Qt's name
        """Whether it is ticked."""
        return self._state

    def setCheckState(self, state: int) -> None:  # noqa: N802, Qt's name
        """Tick it or not."""
        self._state = state

    def setHidden(self, hidden: bool) -> None:  # noqa: N802, Qt's name
        """Show it or not."""
        self._hidden = hidden

    def isHidden(self) -> bool:  # noqa: N802, Qt's name
        """Whether it is not shown."""
        return self._hidden


class ListWidget(Part):
    """Lines that can be ticked."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Item] = []
        self.marked: Item | None = None

    @property
    def count(self) -> int:
        """How many lines there are."""
        return len(self.lines)

    def addItem(self, item: Item) -> None:  # noqa: N802, Qt's name
        """A further line."""
        self.lines.append(item)

    def item(self, row: int) -> Item:
        """A line."""
        return self.lines[row]

    def clear(self) -> None:
        """No lines."""
        self.lines.clear()
        self.marked = None

    def currentItem(self) -> Item | None:  # noqa: N802, Qt's name
        """The line that is marked."""
        return self.marked


class TableWidget(Part):
    """Cells."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()
        self.cells: dict[tuple[int, int], Item] = {}
        self.rowCount = 0

    def setItem(self, row: int, column: int, item: Item) -> None:  # noqa: N802, Qt's name
        """Fill a cell."""
        self.cells[row, column] = item

    def texts(self) -> list[list[str]]:
        """What stands in the rows."""
        columns = 1 + max((column for _, column in self.cells), default=-1)
        return [
            [self.cells[row, column].text() for column in range(columns)]
            for row in range(self.rowCount)
        ]


class Log(Part):
    """Lines of text."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def appendPlainText(self, text: str) -> None:  # noqa: N802, Qt's name
        """A further line."""
        self.lines.append(text)


class NodeBox(Part):
    """A list of nodes of which one is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.node: Any = None

    def currentNode(self) -> Any:  # noqa: N802, Qt's name
        """The node that is chosen."""
        return self.node

    def setCurrentNode(self, node: Any) -> None:  # noqa: N802, Qt's name
        """Choose a node."""
        self.node = node


class Kept(dict):
    """QSettings, which stay between sessions."""

    def value(self, key: str, default: Any = None) -> Any:
        """What is kept under a key."""
        return self.get(key, default)

    def setValue(self, key: str, value: Any) -> None:  # noqa: N802, Qt's name
        """Keep something."""
        self[key] = value


class ParameterNode(dict):
    """A parameter node of a scene."""

    def GetParameter(self, name: str) -> str:  # noqa: N802, Slicer's name
        """The text of a name, '' for none."""
        return self.get(name, "")

    def SetParameter(self, name: str, text: str) -> None:  # noqa: N802, Slicer's name
        """Set the text of a name."""
        self[name] = text


class Base:
    """Stands for the base classes of scripted modules."""

    def __init__(self, *arguments: object) -> None:
        self.layout = Part()
        self.parameters = ParameterNode()

    def setup(self) -> None:
        """Slicer's own part."""

    def getParameterNode(self) -> ParameterNode:  # noqa: N802, Slicer's name
        """The parameter node of the module."""
        return self.parameters


class VolumeNode:
    """A volume with a name."""

    def __init__(self, name: str = "CT") -> None:
        self.name = name
        self.attributes: dict[str, str] = {}

    def GetAttribute(self, name: str) -> str | None:  # noqa: N802, Slicer's name
        """What a name says of it."""
        return self.attributes.get(name)

    def SetAttribute(self, name: str, text: str) -> None:  # noqa: N802, Slicer's name
        """Say something of it."""
        self.attributes[name] = text

    def GetID(self) -> str:  # noqa: N802, Slicer's name
        """Its identifier."""
        return f"id of {self.name}"

    def GetName(self) -> str:  # noqa: N802, Slicer's name
        """Its name."""
        return self.name


def stand_ins(kept: Kept, environment: dict[str, str]) -> dict[str, types.ModuleType]:
    """The modules that Slicer has, by name: `slicer`, `qt`, `ctk` and what is imported of them."""
    qt = mock.MagicMock(name="qt")
    qt.QSettings = lambda *arguments: kept
    qt.QComboBox, qt.QListWidget, qt.QListWidgetItem = ComboBox, ListWidget, Item
    qt.QTableWidget, qt.QTableWidgetItem, qt.QPlainTextEdit = TableWidget, Item, Log
    for name in ("QLineEdit", "QPushButton", "QCheckBox", "QLabel", "QProgressBar", "QTimer"):
        setattr(qt, name, type(name, (Part,), {"singleShot": staticmethod(lambda wait, do: do())}))
    qt.Qt.Checked, qt.Qt.Unchecked, qt.Qt.ItemIsUserCheckable = 2, 0, 16
    ctk = mock.MagicMock(name="ctk")
    ctk.ctkPathLineEdit = type("ctkPathLineEdit", (Part,), {"Files": 1, "Dirs": 2})
    ctk.ctkDoubleSpinBox = Part
    slicer = mock.MagicMock(name="slicer")
    slicer.qMRMLNodeComboBox = NodeBox
    slicer.util.startupEnvironment.return_value = environment
    base = types.ModuleType("slicer.ScriptedLoadableModule")
    for part in ("", "Logic", "Widget", "Test"):
        setattr(base, f"ScriptedLoadableModule{part}", Base)
    return {
        "slicer": slicer, "slicer.ScriptedLoadableModule": base, "qt": qt, "ctk": ctk,
        "vtk": mock.MagicMock(name="vtk"), "vtk.util": mock.MagicMock(),
        "vtk.util.numpy_support": mock.MagicMock(),
    }  # fmt: skip


def forget() -> None:
    """Take the module's parts out of what is imported, so that the next import is a new one."""
    for name in [name for name in sys.modules if name.startswith("MedSeg")]:
        del sys.modules[name]
