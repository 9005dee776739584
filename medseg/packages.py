"""medseg's version, those of the packages that a result depends on, and what installed packages
add: readers, writers, networks and models, by entry point.

Who installs a package that adds something wants its code to run. A name in a file, a config or a
model chooses among what is installed and imports nothing else. What medseg has itself comes first,
so that no package changes what it does.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from medseg.errors import BadConfig
from medseg.text import harmless

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__version__ = "0.1.0"

_PACKAGES = ("numpy", "scipy", "pydicom", "connected-components-3d", "numba", "torch")

#: Groups of entry points, and what the names in them are.
READERS, WRITERS = "medseg.readers", "medseg.writers"  # suffixes such as .plain
NETWORKS = "medseg.networks"  # architectures
MODELS = "medseg.models"  # models


def versions() -> dict[str, str]:
    """medseg, Python and the packages a result depends on."""
    return dict(_installed())


@cache
def _installed() -> dict[str, str]:
    """Looked up once in a process: finding out takes longer than some scans."""
    import platform
    from importlib.metadata import PackageNotFoundError, distribution

    packages = {"medseg": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            text = distribution(name).read_text("METADATA") or ""
            # Of a metadata file only this line: parsing all of it takes longer than some scans.
            packages[name] = next(
                line.partition(":")[2].strip()
                for line in text.splitlines()
                if line.startswith("Version:")
            )
        except (PackageNotFoundError, StopIteration):
            continue
    return packages


def added(group: str) -> tuple[str, ...]:
    """The names that installed packages add to a group, in order."""
    return tuple(sorted(_points(group)))


def package_of(group: str, name: str) -> str:
    """The package that adds a name."""
    distribution = _points(group)[name][0].dist
    return harmless(distribution.name if distribution else "an installed package")


@cache
def load(group: str, name: str) -> Any:
    """What a package adds under a name. Raises `BadConfig` where it cannot be loaded, or where two
    packages add the same name.
    """
    points = _points(group)[name]
    owners = sorted({harmless(point.dist.name) for point in points if point.dist})
    if len({point.value for point in points}) > 1:
        raise BadConfig(
            f"{' and '.join(owners)} both add '{name}' to {group}; uninstall one of them"
        )
    try:
        return points[0].load()
    except Exception as error:  # whatever its code does wrong
        raise BadConfig(
            f"the package {package_of(group, name)} adds '{harmless(name)}' to {group}, and it"
            f" cannot be loaded: {type(error).__name__}; mend or uninstall it"
        ) from error


@cache
def _points(group: str) -> dict[str, list[EntryPoint]]:
    from importlib.metadata import entry_points  # here, because it takes as long as `medseg info`

    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        points.setdefault(point.name, []).append(point)
    return points
