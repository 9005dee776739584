"""medseg: from a scan to labels you can trust. These are the public names.

They are looked up when first used (PEP 562), so that `medseg --help` does not wait for numpy, and
none imports torch before it needs it.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.api import (
        Segmenter,
        batch,
        check,
        clean,
        compare,
        convert,
        evaluate,
        export,
        load,
        prepare,
        segment,
        train,
        view,
    )
    from medseg.errors import DataWarning, MedsegError
    from medseg.inference import Segmentation, Settings
    from medseg.io import (
        Reader,
        Writer,
        as_volume,
        read,
        read_labels,
        to_nibabel,
        to_sitk,
        write,
    )
    from medseg.labels import Label, LabelTable
    from medseg.packages import __version__
    from medseg.volume import Volume


def door(
    package: str, names: Mapping[str, Sequence[str]], *, called: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are looked up when they are first used.

    names: of each module of the package those that others may use; under '' modules that are handed
    out whole. Entering a package so loads nothing but what is asked for: with ordinary ones `medseg
    info --json` loaded yaml. called: what `medseg.view(...)` does, where a package has the name of
    a command.
    """
    if called:
        _make_callable(import_module(package), called)
    homes = {name: module for module, inside in names.items() for name in inside}

    def look_up(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        if not homes[name]:
            return import_module(f"{package}.{name}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return look_up, lambda: sorted(homes)


def _make_callable(package: Any, name: str) -> None:
    """Let calling a package call the public function of its name, which the package hides."""

    class Called(type(package)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return getattr(import_module("medseg.api"), name)(*arguments, **named)

        @property
        def __signature__(self) -> Any:
            function = getattr(import_module("medseg.api"), name)
            return import_module("inspect").signature(function)

    package.__class__ = Called


__all__ = [
    "DataWarning",
    "Label",
    "LabelTable",
    "MedsegError",
    "Reader",
    "Segmentation",
    "Segmenter",
    "Settings",
    "Volume",
    "Writer",
    "__version__",
    "as_volume",
    "batch",
    "check",
    "clean",
    "compare",
    "convert",
    "evaluate",
    "export",
    "load",
    "prepare",
    "read",
    "read_labels",
    "segment",
    "to_nibabel",
    "to_sitk",
    "train",
    "view",
    "write",
]
__getattr__, __dir__ = door(
    __name__,
    {
        "api": (
            "Segmenter",
            "batch",
            "check",
            "clean",
            "compare",
            "convert",
            "evaluate",
            "export",
            "load",
            "prepare",
            "segment",
            "train",
            "view",
        ),
        "errors": ("DataWarning", "MedsegError"),
        "inference": ("Segmentation", "Settings"),
        "io": (
            "Reader",
            "Writer",
            "as_volume",
            "read",
            "read_labels",
            "to_nibabel",
            "to_sitk",
            "write",
        ),
        "labels": ("Label", "LabelTable"),
        "packages": ("__version__",),
        "volume": ("Volume",),
    },
)
