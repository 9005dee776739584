"""medseg: from a scan to labels you can trust. These are the public names.

They are looked up when first used (PEP 562), so that `medseg --help` does not wait for numpy, and none imports torch
before it needs it.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.errors import MedsegError
    from medseg.inference import Segmentation, Settings, segment
    from medseg.io import read, read_labels, write
    from medseg.labels import Label, LabelTable
    from medseg.version import __version__
    from medseg.volume import Volume


def door(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are looked up when they are first used.

    homes: the module in which each name is defined; a name may also be a module of the package. Entering a package then
    loads what is asked for and nothing else: with ordinary ones `medseg info --json` loaded yaml.
    """

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home = import_module(homes[name])
        return home if homes[name] == f"{package}.{name}" else getattr(home, name)

    def names() -> list[str]:
        return sorted(homes)

    return look_up, names


_HOMES = {
    "Label": "medseg.labels",
    "LabelTable": "medseg.labels",
    "MedsegError": "medseg.errors",
    "Segmentation": "medseg.inference",
    "Settings": "medseg.inference",
    "Volume": "medseg.volume",
    "__version__": "medseg.version",
    "read": "medseg.io",
    "read_labels": "medseg.io",
    "segment": "medseg.inference",
    "write": "medseg.io",
}
__all__ = [
    "Label",
    "LabelTable",
    "MedsegError",
    "Segmentation",
    "Settings",
    "Volume",
    "__version__",
    "read",
    "read_labels",
    "segment",
    "write",
]
__getattr__, __dir__ = door(__name__, _HOMES)
