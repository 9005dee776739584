"""medseg: from a scan to labels you can trust. These are the public names.

They are looked up when first used (PEP 562), so that `medseg --help` does not wait for numpy, and none imports torch
before it needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.errors import MedsegError
    from medseg.inference import Segmentation, Settings, segment
    from medseg.io import read, read_labels, write
    from medseg.labels import Label, LabelTable
    from medseg.version import __version__
    from medseg.volume import Volume

_HOME = {
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medseg' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
