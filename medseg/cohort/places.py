"""What lies where in the output of a cohort.

    OUT/cohort.json, labels.csv     what was asked for; what the values of labels mean
    OUT/cases/ab/CASE/              the files of a case; `ab`: two hex digits of a hash of its name
    OUT/records/ab/CASE.json        its record, written last; it alone says that a case is done
    OUT/attempts/ab/CASE            a line for each attempt begun
    OUT/log/PART.jsonl              what a part did, for people
    OUT/table.csv, report.html ...  made by `medseg gather`

In BIDS form the labels lie in `sub-01/ses-2/anat/` instead, and all but they is listed in
`.bidsignore`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.cohort.cases import Case
from medseg.cohort.folders import entities_of

#: Entities that may come before the suffix of a derivative, in the order of BIDS 1.10, appendix IX.
_ENTITIES = (
    "sub", "ses", "sample", "task", "tracksys", "acq", "ce", "trc", "stain", "rec", "dir", "run",
    "mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split", "recording",
    "chunk", "res", "den",
)  # fmt: skip


#: Where `medseg view SCAN LABELS -o OUT/pages/viewer/CASE.html` puts a page, the report has a link.
VIEWERS = "pages/viewer"


@dataclass(frozen=True, kw_only=True)
class Places:
    """The paths of a cohort's output. bids: what a segmentation's `desc` is, '' for the plain form.

    several: images of several suffixes are segmented, so that their names say which. names: what an
    output in a store holds, None for a folder.
    """

    out: Path
    bids: str = ""
    several: bool = False
    names: frozenset[str] | None = None

    @property
    def cohort(self) -> Path:
        """What was asked for."""
        return self.out / "cohort.json"

    @property
    def table(self) -> Path:
        """What the values of labels mean."""
        return self.out / "labels.csv"

    @property
    def arithmetic(self) -> Path:
        """What 'auto' means here."""
        return self.out / "arithmetic.json"

    # Paths are made of texts here, which is several times as fast: there are 40,000 of each kind.

    def record(self, name: str) -> Path:
        """The record of a case, whatever became of it."""
        return Path(f"{self.out}/{self.record_below(name)}")

    def record_below(self, name: str) -> str:
        """The same, seen from the output."""
        return f"records/{shelf(name)}/{name}.json"

    def attempts(self, name: str) -> Path:
        """The attempts at a case."""
        return Path(f"{self.out}/attempts/{shelf(name)}/{name}")

    def picture(self, name: str) -> Path:
        """The picture of a case in the report."""
        return Path(f"{self.out}/{self.picture_below(name)}")

    def picture_below(self, name: str) -> str:
        """The same, seen from the output."""
        return f"cases/{shelf(name)}/{name}/{name}.png"

    def log(self, part: str) -> Path:
        """What a part did."""
        return self.out / "log" / f"{part.replace('/', '-of-')}.jsonl"

    def labels(self, case: Case) -> Path:
        """The label map of a case."""
        return Path(f"{self.out}/{self.labels_below(case)}")

    def labels_below(self, case: Case) -> str:
        """The same, seen from the output."""
        name = case.name
        if not self.bids or not case.images:
            return f"cases/{shelf(name)}/{name}/{name}_seg.nii.gz"
        source = Path(case.images[0])
        entities, _ = entities_of(source.name)
        pairs = [f"{key}-{entities[key]}" for key in _ENTITIES if key in entities]
        stem = "_".join((*pairs, f"desc-{self.description(case)}", "dseg"))
        folders = [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]
        return "/".join((*folders, source.parent.name, f"{stem}.nii.gz"))

    def description(self, case: Case) -> str:
        """What `desc` is in BIDS form: the model, and what tells images apart and has no place of
        its own in the name of a segmentation.
        """
        name = Path(case.images[0]).name.removesuffix(".gz").removesuffix(".nii")
        *parts, suffix = name.split("_")
        others = [one for one in parts if one.partition("-")[0] not in _ENTITIES]
        text = "".join(one.removeprefix("desc-") for one in others)
        return self.bids + _plain(text) + (_plain(suffix) if self.several else "")

    def has(self, path: Path | str) -> bool:
        """Whether a file of the output is there."""
        if self.names is None:
            return os.path.exists(path)  # noqa: PTH110 - of a text, which is faster
        return str(path).removeprefix(f"{self.out}/") in self.names

    def viewers(self) -> frozenset[str]:
        """The names of cases that have a page of the viewer."""
        if self.names is None:
            try:
                pages = os.listdir(self.out / VIEWERS)  # noqa: PTH208 - names are wanted
            except OSError:
                return frozenset()
        else:
            begin = f"{VIEWERS}/"
            pages = [one.removeprefix(begin) for one in self.names if one.startswith(begin)]
        return frozenset(one.removesuffix(".html") for one in pages if one.endswith(".html"))

    def homes(self, case: Case) -> list[Path]:
        """The folders into which a case is written."""
        name = case.name
        folders = [self.labels(case).parent, self.picture(name).parent, self.record(name).parent]
        return list(dict.fromkeys(folders))


def shelf(name: str) -> str:
    """Two hex digits, so that no folder holds more than about a 256th of the cases."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:2]


def bids_description(model: str, suffixes: Sequence[str]) -> tuple[str, bool]:
    """`Places.bids` and `Places.several` for a model's name and the suffixes of the images."""
    return _plain(model) or "medseg", len(set(suffixes)) > 1


def _plain(text: str) -> str:
    """Letters and digits alone, as values of BIDS entities are."""
    return re.sub(r"[^A-Za-z0-9]", "", text)
