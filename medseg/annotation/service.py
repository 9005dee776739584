"""What a server of annotation does, without the network: the scans of a folder, models that segment
them, labels that come back, training.

One scan is segmented at a time. No line that is told, and no answer, holds a path or anything of a
patient; ids of scans stand in answers alone.
"""

from __future__ import annotations

import hashlib
import random
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from medseg import logs
from medseg.annotation.choice import Candidate, choose
from medseg.annotation.forms import RAW
from medseg.annotation.lessons import TIMES, Lesson, Lessons, score_of
from medseg.annotation.listing import FINAL, ORIGINAL, StoredCase, check_id
from medseg.annotation.protocol import (
    MAX_LABELS,
    Naming,
    Refused,
    known_structures,
    names_in,
    naming_of,
    numbered,
    returned,
    values_in,
)
from medseg.annotation.served import Segmenting, Served, add_model, devices, settings_in
from medseg.annotation.sessions import Session, Sessions
from medseg.annotation.store import Store, read_segmentation
from medseg.annotation.teaching import newest_models
from medseg.dataset import onto
from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.io import Overlap, embedded_table, read, read_labels, strip_suffix, write, write_nrrd
from medseg.labels import LabelTable, same_name
from medseg.text import counted
from medseg.volume import Volume, same_grid

#: Lines that `/logs/` shows.
_LINES = 200
#: How the labels of an answer may be written.
_ANSWERS = (".nrrd", ".nii.gz", ".nii")
#: Of scans that are sent as they lie.
_WHOLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".mgz", ".mgh")
#: Seconds for which a scan that was offered to somebody is offered to others last.
_OFFERED_S = 3600.0
#: Scans that are looked at for the one about which a model is most unsure.
_LOOKED_AT = 8
_TAG = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Service:
    """What clients may ask for. Its calls may come from several threads; those of `infer` from one.

    folder: a private one for what is on its way. say: gets a neutral line for each thing that
    happens.
    """

    def __init__(
        self,
        store: Store,
        models: dict[str, Served],
        folder: Path,
        *,
        max_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        self.store, self.models, self.folder = store, models, folder
        self.sessions = Sessions(folder, 4 * max_bytes)
        self.lines: deque[str] = deque(maxlen=_LINES)
        self._say, self._segment = say, Segmenting()
        self._offered: dict[str, tuple[str, float]] = {}  # scan: to whom, and when
        self._devices = devices()
        self.lessons = Lessons(
            store, finished=self._take_up, tell=self.tell, without=self.without_paths
        )
        for run in newest_models(store)[::-1]:
            self._add_round(run)

    def tell(self, text: str) -> None:
        """A line for who runs the server."""
        logs.info(__name__, "%s", text)
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        self._say(text)

    def without_paths(self, text: str) -> str:
        """A text with other words for files."""
        places = [self.folder, self.store.folder, *(Path(m.word) for m in self.models.values())]
        for place in sorted({str(one) for one in places if one.is_absolute()}, key=len)[::-1]:
            text = re.sub(re.escape(place) + r"[^:;'\"\n]*", "a file", text)
        return re.sub(r"(?<![\w.])(/[\w.+@-]+){2,}/?", "a file", text)

    # What there is --------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """All that a client shows of this server."""
        names = dict.fromkeys(name for one in self.models.values() for name in one.naming.names)
        return {
            "name": "medseg",
            "description": "Labels by medseg",
            "version": "1",
            "labels": list(names),
            "models": {name: self._about(one) for name, one in self.models.items()},
            "trainers": {name: self._trainer() for name in self.trainers()},
            "strategies": {name: {"description": text} for name, text in self.strategies().items()},
            "scoring": {},
            "train_stats": self.lessons.stats(),
            "datastore": self.status(),
        }

    def trainers(self) -> list[str]:
        """The models that can be trained further."""
        return [name for name, served in self.models.items() if served.can_go_on]

    def _trainer(self) -> dict[str, Any]:
        places = [device for device in self._devices if device != "mps"]  # where nothing trains
        return {"description": "", "config": {"time": list(TIMES), "device": places}}

    def _take_up(self, lesson: Lesson) -> None:
        """Offer a model that was trained."""
        name = self._add_round(lesson.teaching.run)
        self.tell(f"{name}: the new model is offered")

    def _add_round(self, run: Path) -> str:
        return add_model(self.models, str(run), f"round-{run.name}", score_of(run)).name

    def _about(self, served: Served) -> dict[str, Any]:
        return {
            "type": "segmentation",
            "labels": {"background": 0, **served.naming.numbers},
            "dimension": 3,
            "description": served.about,
            "config": {"device": self._devices, "cleanup": True, "force": False},
        }

    def status(self) -> dict[str, Any]:
        """How many scans there are, and labels under each tag."""
        cases = self.store.cases()
        tags: dict[str, int] = {}
        for case in cases:
            for tag in case.labels:
                tags[tag] = tags.get(tag, 0) + 1
        return {"total": len(cases), "completed": tags.get(FINAL, 0), "label_tags": tags}

    def datastore(self) -> dict[str, Any]:
        """Every scan with its labels."""
        table = self.store.table
        objects = {case.id: self._listed(case, table) for case in self.store.cases()}
        return {"name": "medseg", "description": "", "objects": objects}

    def _listed(self, case: StoredCase, table: LabelTable) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for tag in case.labels:
            numbers: dict[str, int] = {}
            with suppress(BadFile):  # who asks for it is told
                numbers = self._naming_of(case, tag, table).numbers
            labels[tag] = {"ext": ".nii.gz", "info": {"params": {"label_names": numbers}}}
        return {"image": {"ext": _suffix(case), "info": {}}, "labels": labels}

    def _naming_of(self, case: StoredCase, tag: str, table: LabelTable) -> Naming:
        """How a label that is sent is called. table: of the data set.

        The structures of the model that knows most of what it holds come first, all of them, in
        the order in which this model's labels are sent.
        """
        if tag != FINAL:
            return naming_of(embedded_table(case.labels[tag]) or LabelTable(()))
        values = case.holds or table.values
        own = LabelTable(tuple(label for label in table.labels if label.value in values))
        like = self._most_like(own)
        structures = known_structures(table, [like])
        firsts = [same_name(name, structures) for name in naming_of(like).names]
        held = [name for name, label in structures.items() if label.value in own]
        order = list(dict.fromkeys(firsts + held))
        order = order if len(order) <= MAX_LABELS else held
        return Naming(values=tuple(structures[name].value for name in order), names=tuple(order))

    def _most_like(self, table: LabelTable) -> LabelTable:
        """The table of the model that knows most of some structures; an empty one for none."""

        def count(served: Served) -> int:
            names = served.naming.names
            return sum(bool(same_name(label.name, names)) for label in table.labels)

        best = max(self.models.values(), key=count)
        return best.table if count(best) else LabelTable(())

    def case(self, identity: str) -> StoredCase:
        """A scan of the data set. Raises `Refused`."""
        cases = {case.id: case for case in self.store.cases()}
        if identity not in cases:
            with suppress(Refused):
                identity = stored_id(identity)
        if identity not in cases:
            raise Refused(404, "there is no scan of this id")
        return cases[identity]

    def image_file(self, identity: str) -> Path:
        """The file of a scan, of the first of its channels; of DICOM, and of a header whose voxels
        lie in a second file, one made from it, in the private folder.
        """
        case = self.case(identity)
        scan = case.images[0]
        if _is_sent_as_it_is(scan):
            return scan
        about = f"{case.id} {scan.stat().st_mtime_ns if scan.exists() else 0}"
        path = self.folder / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.nii.gz"
        if not path.exists():
            write(read(scan), path)
        return path

    def label_file(self, identity: str, tag: str) -> Path:
        """The labels of a scan, numbered as `datastore` names them, in a file in the private folder
        that the caller removes. Raises `Refused`.
        """
        case = self.case(identity)
        if tag not in case.labels:
            raise Refused(404, "there is no label of this scan under this tag")
        labels, _ = self.store.read_label(case.id, tag)
        naming = self._naming_of(case, tag, self.store.table)
        path = self._free(".nii.gz")
        write(numbered(labels, naming), path)
        return path

    def _free(self, suffix: str) -> Path:
        return self.folder / f"{secrets.token_hex(12)}{suffix}"

    # What is sent ---------------------------------------------------------------------------------

    def add_image(self, identity: str, file: Path) -> str:
        """Take a scan into the data set; returns its id. The same scan again changes nothing.
        Raises `Refused`.
        """
        name = stored_id(identity)
        there = next((case for case in self.store.cases() if case.id == name), None)
        if there is not None and not _is_same(read(there.images[0]), read(file)):
            raise Refused(409, "there is another scan of this id already; give a new id")
        if there is None:
            try:
                self.store.add_scan(name, [file])
            except BadOutput as error:
                raise Refused(409, self.without_paths(str(error))) from None
            self.tell("a scan was added to the data set")
        return name

    def save_label(
        self, identity: str, tag: str, file: Path, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keep labels of a scan; returns what is answered. Raises `Refused`."""
        case, tag = self.case(identity), tag or FINAL
        if not _TAG.fullmatch(tag):
            raise Refused(400, "a tag is a word of small letters such as final")
        models = self._models_for(params.get("model"))
        structures = known_structures(self.store.table, [one.table for one in models])
        labels, names = self._sent_labels(case, file, params)
        labels, table = returned(labels, names, structures)
        before = {label.value for label in structures.values()}
        like = models[0].table if models else LabelTable(())
        self.store.put_label(case.id, labels, table, tag=tag, like=like)
        present = set(values_in(labels))
        added = [label for label in table.labels if label.value in present - before]
        told = f"a label was saved: {counted(len(present), 'structure')}"
        values = ", ".join(str(label.value) for label in added)
        self.tell(told + (f", {len(added)} of them new (value {values})" if added else ""))
        return {
            "image": case.id,
            "label": case.id,
            "tag": tag,
            "new_labels": {label.name: label.value for label in added},
        }

    def _models_for(self, name: object) -> list[Served]:
        """All models, that of a name first: its values count most."""
        return sorted(self.models.values(), key=lambda served: served.name != name)

    def _sent_labels(
        self, case: StoredCase, file: Path, params: Mapping[str, Any]
    ) -> tuple[Volume, dict[int, str]]:
        """A label map that was sent, and the names of its values."""
        image = self.store.read_scan(case.id)[0]
        if file.suffix == RAW:
            return _raw_labels(file, image), names_in(params)
        if embedded_table(file) is None:
            # Before anything is counted: what is sent may be many times the scan.
            place = Path(f"the label of {case.id}")
            return onto(read_labels(file), image, place, case.images[0]), names_in(params)
        try:
            labels, table = read_segmentation(file, image, case.images[0])
        except Overlap:
            raise Refused(
                400,
                "segments overlap, and a voxel has one label here; in the Segment Editor, let each"
                " overwrite the others under Masking",
            ) from None
        return labels, dict(table.names)

    def start_session(self, file: Path) -> dict[str, Any]:
        """Keep a scan for a while."""
        # Where a form's files lie they go with it.
        session = self.sessions.add(file.rename(self._free("".join(file.suffixes))))
        self.tell("a session begins")
        return {"session_id": session.identity, "session_info": self.about_session(session)}

    def about_session(self, session: Session) -> dict[str, Any]:
        """What is told of a session."""
        return {"name": session.identity, "size_bytes": session.size_bytes}

    # Models ---------------------------------------------------------------------------------------

    def infer(
        self,
        model: str,
        files: Sequence[Path],
        params: Mapping[str, Any],
        *,
        is_over: Callable[[], bool],
    ) -> tuple[Path, dict[str, Any]]:
        """Segment a scan: labels in a file in the private folder, which the caller removes, and
        what is said of them. Raises `Refused` and what a model raises.
        """
        served = self.model(model)
        suffix = params.get("result_extension", ".nrrd")
        if suffix not in _ANSWERS:
            raise Refused(400, f"result_extension is one of {', '.join(_ANSWERS)}")
        settings, force = settings_in(params, may_use_gpu=not self.lessons.is_running)
        begun = time.perf_counter()
        result, messages = self._segment(
            served, files, settings=settings, force=force, is_over=is_over
        )
        labels = numbered(result.labels, served.naming)
        path = self._free(suffix)
        if suffix == ".nrrd":
            write_nrrd(labels, path, compress=params.get("result_compress") is not False)
        else:
            write(labels, path)
        spent_s = time.perf_counter() - begun
        doubts = [self.without_paths(text) for text in (*result.doubts, *messages)]
        told = f", {counted(len(doubts), 'doubt')}" if doubts else ""
        self.tell(f"{served.name}: a scan was segmented in {spent_s:.1f} s{told}")
        seconds = {name: round(spent, 3) for name, spent in result.seconds.items()}
        return path, {
            "label_names": served.naming.numbers,
            "latencies": {**seconds, "total": round(spent_s, 3)},
            "doubts": doubts,
        }

    def model(self, name: str) -> Served:
        """A model by its name. Raises `Refused`."""
        if name not in self.models:
            raise Refused(404, "there is no model of this name; /info/ lists them")
        return self.models[name]

    # Which next -----------------------------------------------------------------------------------

    def strategies(self) -> dict[str, str]:
        """The ways to choose the next scan, and what they mean."""
        return (
            _STRATEGIES
            if self._judge()
            else {name: text for name, text in _STRATEGIES.items() if name != "uncertain"}
        )

    def _judge(self) -> Served | None:
        """The newest model that says how sure it is."""
        every = [one for one in self.models.values() if not isinstance(one.model, str)]
        return every[-1] if every else None

    def next_sample(
        self, strategy: str, client: str, *, is_over: Callable[[], bool] = lambda: False
    ) -> dict[str, Any]:
        """The scan to label next; {} if all are labelled. Raises `Refused`."""
        if strategy not in self.strategies():
            raise Refused(404, "there is no strategy of this name; /info/ lists them")
        cases = [case for case in self.store.cases() if case.state != FINAL]
        free = [case for case in cases if not self._is_elsewhere(case.id, client)] or cases
        if not free:
            return {}
        if strategy == "uncertain":
            case = self._most_unsure(free, is_over)
        else:
            case = random.choice(free) if strategy == "random" else free[0]
        self._offered[case.id] = (client, time.monotonic())
        path = self.image_file(case.id)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"id": case.id, "name": f"{case.id}{_suffix(case)}", "checksum": f"SHA256:{digest}"}

    def _most_unsure(self, cases: Sequence[StoredCase], is_over: Callable[[], bool]) -> StoredCase:
        """The scan about which the newest model is most unsure; what it proposes is kept."""
        judge = self._judge()
        assert judge is not None

        def progress(what: str, done: int, total: int) -> None:
            if is_over():
                raise Refused(503, "this was given up, for nobody waits for it any more")

        scans = [Candidate(id=case.id, files=case.images, stored=True) for case in cases]
        settings, _ = settings_in({}, may_use_gpu=not self.lessons.is_running)
        try:
            choice = choose(
                self.store, scans, judge.model, seed=random.randrange(2**32), most=_LOOKED_AT,
                settings=settings, progress=progress,
            )  # fmt: skip
        except MedsegError as error:
            raise Refused(400, self.without_paths(str(error))) from None
        result = choice.result
        self.store.put_label(choice.candidate.id, result.labels, result.table, tag=ORIGINAL)
        self.tell(f"{judge.name}: {counted(len(choice.doubts), 'scan')} were looked at for doubts")
        return self.case(choice.candidate.id)

    def _is_elsewhere(self, identity: str, client: str) -> bool:
        """Whether somebody else was given a scan not long ago."""
        to, at_s = self._offered.get(identity, (client, 0.0))
        return to != client and time.monotonic() - at_s < _OFFERED_S


_STRATEGIES = {
    "first": "The first scan that has no final label",
    "random": "Any scan that has no final label",
    "uncertain": "The scan about which the newest model is most unsure, already segmented",
}


def stored_id(name: str) -> str:
    """The id under which a scan of a name is kept; itself where it may be one.

    3D Slicer calls scans by names such as '2: Head^T1'. Another id is made of these, and no two
    names have the same. Raises `Refused` for a name with a part of a path.
    """
    with suppress(BadConfig):
        return check_id(name)
    is_path = ".." in name or any(sign in name for sign in "/\\")
    plain = re.sub(r"[^\w +-]+", "_", name).strip("_ +-")[:60].rstrip(" ")
    if is_path or not name.isprintable() or not plain:
        raise Refused(
            400, "this is no name for a scan; one holds letters and digits, and no part of a path"
        )
    return check_id(f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}")


def _suffix(case: StoredCase) -> str:
    """The suffix of the file that is sent of a scan."""
    name = case.images[0].name
    return name[len(strip_suffix(name)) :] if _is_sent_as_it_is(case.images[0]) else ".nii.gz"


def _is_sent_as_it_is(scan: Path) -> bool:
    """Whether one file holds all of a scan, in a format that clients read."""
    name = scan.name
    return name[len(strip_suffix(name)) :].lower() in _WHOLE and scan.is_file()


def _is_same(one: Volume, other: Volume) -> bool:
    return same_grid(one, other) and bool(np.array_equal(one.data, other.data))


def _raw_labels(file: Path, image: Volume) -> Volume:
    """Voxels without a header, i fastest, on the grid of a scan. Raises `Refused`."""
    content = np.fromfile(file, np.uint8)
    voxels = int(np.prod(image.shape))
    if content.size not in (voxels, 2 * voxels):
        raise Refused(
            400,
            f"the voxels that were sent are {content.size} bytes, and the scan has {voxels} voxels",
        )
    data = content if content.size == voxels else content.view("<u2")
    return image.with_data(data.reshape(image.shape, order="F"))
