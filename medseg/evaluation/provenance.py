"""Where the files of an evaluation come from: their hashes, and what their run records say."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from medseg.errors import MedsegError
from medseg.files import file_hash, read_text
from medseg.io import strip_suffix
from medseg.packages import versions
from medseg.text import harmless, parse_json

#: Packages that scores depend on.
_PACKAGES = ("medseg", "python", "numpy", "scipy")


def origins(
    pairs: Mapping[str, tuple[Path, Path]], scans: Mapping[str, Path]
) -> dict[str, list[str]]:
    """Of each case the SHA-256 of its reference, its result and, where there are scans, its
    scan.
    """
    return {
        case: [digest(path) for path in (*pair, *([scans[case]] if case in scans else []))]
        for case, pair in pairs.items()
    }


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the hashes of the files in it, by their names."""
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.is_file())
        return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()
    return file_hash(path)


def software() -> str:
    """What scores, with its versions."""
    here = versions()
    return ", ".join(f"{name} {here[name]}" for name in _PACKAGES if name in here)


def maker_of(labels: Path, sha256: str) -> str:
    """What made a label map, as the run record beside it says.

    A record counts only if it holds the hash of this label map.
    """
    stem = strip_suffix(labels)
    try:
        record = parse_json(read_text(labels.with_name(f"{stem}.json")))
        if record["files_sha256"][labels.name.removeprefix(stem)] != sha256:
            return "beside a run record that is not about them"
        hashes = record["model"].get("weights_sha256", "")
        weights = " ".join([hashes] if isinstance(hashes, str) else map(str, hashes))
        model = record["model"]["name"] + (f" (weights {weights[:16]})" if weights else "")
        return harmless(f"of the model {model}, by medseg {record['versions']['medseg']}")[:300]
    except (MedsegError, KeyError, TypeError, ValueError, AttributeError):
        return "without a run record"
