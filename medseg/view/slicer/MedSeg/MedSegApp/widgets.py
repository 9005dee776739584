"""Small parts of the panels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ctk
import qt
import slicer


def node_box(kind: str, *, none: bool = True, add: bool = False, tip: str = "") -> Any:
    """A list of the scene's nodes of a kind."""
    box = slicer.qMRMLNodeComboBox()
    box.nodeTypes = [kind]
    box.showChildNodeTypes = False
    box.noneEnabled = none
    box.addEnabled = box.renameEnabled = add
    box.removeEnabled = False
    box.setMRMLScene(slicer.mrmlScene)
    box.toolTip = tip
    return box


def section(title: str, layout: Any, *, closed: bool = False) -> Any:
    """A part of a panel that can be folded; its form."""
    button = ctk.ctkCollapsibleButton()
    button.text, button.collapsed = title, closed
    layout.addWidget(button)
    return qt.QFormLayout(button)


def button(text: str, clicked: Callable[[], Any], *, tip: str = "") -> Any:
    """A button and what it does."""
    made = qt.QPushButton(text)
    made.toolTip = tip
    made.connect("clicked()", clicked)
    return made


def row_of(widgets: Sequence[Any]) -> Any:
    """Widgets beside each other."""
    row = qt.QHBoxLayout()
    for one in widgets:
        row.addWidget(one)
    return row


def text_line() -> Any:
    """A line of text that is broken where it is long and can be copied."""
    line = qt.QLabel()
    line.wordWrap = True
    line.textInteractionFlags = qt.Qt.TextSelectableByMouse
    line.textFormat = qt.Qt.PlainText
    return line


class CheckList:
    """Names that are chosen with ticks, and a field that narrows them."""

    def __init__(self, changed: Callable[[], Any]) -> None:
        self.widget = qt.QWidget()
        layout = qt.QVBoxLayout(self.widget)
        layout.setContentsMargins(0, 0, 0, 0)
        self.filter = qt.QLineEdit()
        self.filter.placeholderText = "find a structure"
        self.list = qt.QListWidget()
        self.list.maximumHeight = 150
        self.all = button("All", lambda: self.tick(True))
        self.none = button("None", lambda: self.tick(False))
        layout.addWidget(self.filter)
        layout.addWidget(self.list)
        layout.addLayout(row_of([self.all, self.none]))
        self._changed = changed
        self._filling = False
        self.filter.connect("textChanged(QString)", self.narrow)
        self.list.connect("itemChanged(QListWidgetItem*)", lambda item: self._tell())

    def fill(self, names: Sequence[str], chosen: Sequence[str]) -> None:
        """Show these names, those chosen ticked; all of them where none is chosen."""
        self._filling = True
        self.list.clear()
        for name in names:
            item = qt.QListWidgetItem(name)
            item.setFlags(item.flags() | qt.Qt.ItemIsUserCheckable)
            ticked = not chosen or name in chosen
            item.setCheckState(qt.Qt.Checked if ticked else qt.Qt.Unchecked)
            self.list.addItem(item)
        self._filling = False

    def chosen(self) -> tuple[str, ...]:
        """The names that are ticked; () where all are, which needs no choice."""
        items = [self.list.item(row) for row in range(self.list.count)]
        ticked = [item.text() for item in items if item.checkState() == qt.Qt.Checked]
        return () if len(ticked) == len(items) else tuple(ticked)

    @property
    def empty(self) -> bool:
        """Whether there are names and none is ticked."""
        return self.list.count > 0 and self.chosen() == () and not self._any()

    def current(self) -> str:
        """The name of the line that is marked; '' for none."""
        item = self.list.currentItem()
        return item.text() if item is not None else ""

    def tick(self, on: bool) -> None:
        """Tick all that are shown, or none of them."""
        self._filling = True
        for row in range(self.list.count):
            item = self.list.item(row)
            if not item.isHidden():
                item.setCheckState(qt.Qt.Checked if on else qt.Qt.Unchecked)
        self._filling = False
        self._changed()

    def narrow(self, text: str) -> None:
        """Show the names that hold all words of a text."""
        words = text.lower().split()
        for row in range(self.list.count):
            item = self.list.item(row)
            item.setHidden(not all(word in item.text().lower() for word in words))

    def _any(self) -> bool:
        items = [self.list.item(row) for row in range(self.list.count)]
        return any(item.checkState() == qt.Qt.Checked for item in items)

    def _tell(self) -> None:
        if not self._filling:
            self._changed()
