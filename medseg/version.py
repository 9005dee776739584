"""The version of medseg, and those of the packages that a result depends on."""

from __future__ import annotations

from functools import cache

__version__ = "0.1.0"

_PACKAGES = ("numpy", "scipy", "pydicom", "connected-components-3d", "numba", "torch")


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
