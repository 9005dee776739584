"""Install medseg into Slicer's Python: what pip is told, so that all that Slicer holds stays as it
is, PyTorch above all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

#: The oldest Python that runs medseg.
OLDEST_PYTHON = (3, 11)
#: The oldest Slicer with such a Python.
OLDEST_SLICER = "5.10"
#: What pip takes: a name with a version, or a file.
_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,.-]*\])?\s*([=<>!~]=?\s*[\w.*+!-]+)?")
_PYTHON: tuple[int, ...] = tuple(sys.version_info[:3])
_SHOWN = ("medseg", "torch", "numpy", "scipy", "numba", "SimpleITK", "pydicom")


def python_problem(version: Sequence[int] = _PYTHON) -> str:
    """Why Slicer's Python cannot hold medseg, and what to do; '' where it can."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return ""
    have, need = (".".join(map(str, one[:2])) for one in (version, OLDEST_PYTHON))
    return (
        f"This Slicer's Python is {have} and medseg needs {need} or newer: use Slicer"
        f" {OLDEST_SLICER} or newer, or install medseg elsewhere and choose its program below."
    )


def versions(names: Iterable[str] = _SHOWN) -> dict[str, str]:
    """The versions of what is installed in this Python, of those that are."""
    there = {}
    for name in names:
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return there


def versions_text(python: Sequence[int] = _PYTHON) -> str:
    """This Python and what of medseg's is in it, in one line."""
    parts = [f"Python {'.'.join(map(str, python[:3]))}"]
    parts += [f"{name} {version}" for name, version in versions().items()]
    return ", ".join(parts)


def constraints(installed: Iterable[tuple[str, str]] | None = None) -> str:
    """The lines that keep pip from exchanging anything that is installed, but medseg itself.

    installed: name and version of each package; all of this Python's where it is None.
    """
    if installed is None:
        installed = [(one.metadata["Name"] or "", one.version) for one in metadata.distributions()]
    kept = {}
    for name, version in installed:
        if name and version and _plain(name) != "medseg":
            kept[_plain(name)] = f"{name}=={version}"
    return "".join(f"{line}\n" for _, line in sorted(kept.items()))


def pip_command(
    python: str, package: str, constraints_file: Path, upgrade: bool = False
) -> list[str]:
    """The arguments that install medseg. Raises `ValueError` for what is neither a package nor a
    file.
    """
    package = package.strip()
    is_file = Path(package).exists() and bool(package)
    if not is_file and not _PACKAGE.fullmatch(package):
        raise ValueError(
            f"'{package}' is neither a package nor a file; give medseg, medseg==VERSION, or the"
            " path of a .whl"
        )
    arguments = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    arguments += ["--progress-bar", "off", "--constraint", str(constraints_file)]
    return [*arguments, *(["--upgrade"] if upgrade else []), package]


def question(has_torch: bool, has_extension: bool, package: str = "medseg") -> str:
    """What the user is asked before anything is installed."""
    lines = [f"Install {package} into this Slicer's Python?"]
    if has_torch:
        lines.append(f"The PyTorch that is there ({versions(['torch']).get('torch', '')}) is kept.")
    elif has_extension:
        lines.append("The extension PyTorch first installs the PyTorch for this computer.")
    else:
        lines.append(
            "PyTorch is not there yet. With the extension PyTorch (Extensions Manager) it is the"
            " one for this computer's graphics card; without it pip takes the usual one, which may"
            " be large."
        )
    lines.append("Packages that Slicer holds are not exchanged. This needs the network.")
    return "\n\n".join(lines)


def removal_command(python: str) -> list[str]:
    """The arguments that remove medseg; what it needed stays, for others may need it."""
    return [python, "-m", "pip", "uninstall", "--yes", "--disable-pip-version-check", "medseg"]


def _plain(name: str) -> str:
    """The name of a package as all spellings of it are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()
