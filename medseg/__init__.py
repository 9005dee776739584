"""medseg: from a scan to labels you can trust. These are the public names.

They are looked up when first used (PEP 562), so that `medseg --help` does not wait for numpy, and
none imports torch before it needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.errors import MedsegError
    from medseg.inference import Segmentation, Settings, segment
    from medseg.io import read, read_labels, write
    from medseg.labels import Label, LabelTable
    from medseg.version import __version__
    from medseg.volume import Volume


def door(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are looked up when they are first used.

    names: of each module of the package those that others may use; under '' modules that are handed
    out whole. Entering a package so loads nothing but what is asked for: with ordinary ones `medseg
    info --json` loaded yaml.
    """
    homes = {name: module for module, inside in names.items() for name in inside}

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        if not homes[name]:
            return import_module(f"{package}.{name}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return look_up, lambda: sorted(homes)


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
__getattr__, __dir__ = door(
    __name__,
    {
        "errors": ("MedsegError",),
        "inference": ("Segmentation", "Settings", "segment"),
        "io": ("read", "read_labels", "write"),
        "labels": ("Label", "LabelTable"),
        "version": ("__version__",),
        "volume": ("Volume",),
    },
)
