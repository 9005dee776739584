"""Names of structures as files, OBJ and MTL can hold them on every system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from medseg.text import is_reserved

_MOST = 60


def plain_names(names: Sequence[tuple[int, str]]) -> list[str]:
    """For labels, value and name, names of ASCII letters, digits, '-' and '_', no two of them alike
    but for case: 'left hippocampus' becomes left_hippocampus.

    What has no such letters is label_3. Of names that would be alike all get their value.
    """
    plain = [_plain(name) or f"label_{value}" for value, name in names]
    folded = [name.lower() for name in plain]
    shown = [
        f"{name}_{value}" if folded.count(name.lower()) > 1 else name
        for name, (value, _) in zip(plain, names)
    ]
    if len({name.lower() for name in shown}) == len(shown):
        return shown
    return [f"{name}_label_{value}" for name, (value, _) in zip(plain, names)]


def _plain(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name.replace("ß", "ss")).encode("ascii", "ignore")
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", letters.decode("ascii")).strip("_-")[:_MOST].strip("_-")
    return f"_{plain}" if is_reserved(plain) else plain
