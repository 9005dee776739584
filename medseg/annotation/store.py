"""A data set that grows: scans under ids, labels under tags, in a folder that `medseg check` and
`medseg train` read as it lies.

    cases.csv            a line for each scan: a manifest, as `medseg.dataset` reads it
    labels.csv           names, colours and codes of the structures that the final labels hold
    images/ID.nii.gz     scans; of several channels ID_0000.nii.gz, ID_0001.nii.gz ...
    labels/final/        what is trained with: label maps whose values are those of labels.csv
    labels/original/     what a model proposed, .seg.nrrd with names of its own; and other tags

cases.csv alone says what is there, and is replaced in one step once all that it names is written.
A scan without a final label counts as set aside ('test') until it has one. Writers wait for each
other; readers need not wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.annotation.listing import (
    AUTO,
    FINAL,
    LIST,
    StoredCase,
    check_channels,
    check_id,
    check_split,
    check_tag,
    read_channels_of,
    read_list,
    settled_split,
    stem_of,
    write_list,
)
from medseg.annotation.names import joined_by_name
from medseg.dataset import Case, Dataset, complete, onto, read_case_labels, read_label_file
from medseg.errors import BadConfig, BadFile, BadOutput, MedsegError
from medseg.evaluation import find_table
from medseg.files import atomic_write, take_lock
from medseg.io import (
    embedded_table,
    is_dicom_source,
    label_kind,
    read,
    read_labels,
    stored_sizes,
    write,
)
from medseg.labels import LabelTable
from medseg.text import counted, harmless
from medseg.volume import Volume

#: A table of nothing.
NO_NAMES = LabelTable(())
_TABLE = "labels.csv"
_LOCK = ".lock"
#: How long a writer waits for others.
_WAIT_S = 120.0


class Store:
    """A growing data set in a folder. `Store.open` for one that is there, `Store.create` for a new
    one; both are cheap, and every call reads the list anew, so that several processes may share it.
    """

    def __init__(self, folder: Path, channels: tuple[str, ...]) -> None:
        """folder: where cases.csv lies; channels: what each scan consists of, in order."""
        self.folder, self.channels = folder, channels
        # What labels without a table mean, and the files as they were then.
        self._names: tuple[list[tuple[int, int]], LabelTable] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The data set in a folder. Raises `BadFile` where there is none."""
        place = Path(folder)
        if not (place / LIST).is_file():
            what = f"holds no {LIST}, so it is no data set that grows"
            what = what if place.exists() else "does not exist"
            raise BadFile(f"{place}: {what}; medseg add makes one in a new folder")
        return cls(place, read_channels_of(place))

    @classmethod
    def create(cls, folder: str | Path, channels: Sequence[str] = ("image",)) -> Store:
        """The data set in a folder, or a new one where the folder is empty or not there.

        channels: what each scan consists of, such as ('CT',) or ('T1', 'FLAIR'). Raises `BadConfig`
        for other channels than those of the data set that is there, and for channels without
        distinct plain names; `BadOutput` for a folder that holds something else.
        """
        place, names = Path(folder), tuple(channels)
        if (place / LIST).is_file():
            store = cls.open(place)
            if store.channels != names:
                raise BadConfig(
                    f"{place}: its scans consist of {', '.join(store.channels)}, not of"
                    f" {', '.join(names)}"
                )
            return store
        check_channels(names)
        if place.exists() and not _is_empty_folder(place):
            raise BadOutput(
                f"{place}: is not empty and holds no {LIST}; give a new folder, medseg add fills it"
            )
        store = cls(place, names)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOutput(f"{place}: cannot be made: {error.strerror}") from None
        with store._locked():
            if not (place / LIST).exists():
                store._write_list({})
        return store

    @property
    def table(self) -> LabelTable:
        """What the values of the final labels mean; empty before there are any."""
        path = self.folder / _TABLE
        if path.is_file():
            return LabelTable.read(path)
        finals = [one for one in read_list(self.folder).values() if FINAL in one.labels]
        if all(one.annotated for one in finals):
            return NO_NAMES
        stamp = [_stamp(one.labels[FINAL]) for one in finals]
        if self._names is None or self._names[0] != stamp:
            self._names = stamp, self._names_in(finals)
        return self._names[1]

    def _names_in(self, finals: Sequence[StoredCase]) -> LabelTable:
        """What the labels of a list that people wrote mean, as `medseg train` takes them; empty
        where they hold nothing.
        """
        try:
            return self._as_dataset(finals, NO_NAMES).table
        except BadFile:
            if any(read_labels(one.labels[FINAL]).data.any() for one in finals):
                raise
            return NO_NAMES

    def _as_dataset(self, finals: Iterable[StoredCase], table: LabelTable) -> Dataset:
        """Scans with their final labels as `medseg.dataset` reads them, with a table or with what
        their labels say.
        """
        cases = (Case(name=one.id, images=one.images, label=one.labels[FINAL]) for one in finals)
        return complete(
            Dataset(
                folder=self.folder, layout="manifest", name=self.folder.name, cases=tuple(cases),
                channels=self.channels, table=table, source=self.folder / LIST,
            )
        )  # fmt: skip

    def cases(self) -> tuple[StoredCase, ...]:
        """Every scan, in the order in which they were added. Raises `BadFile`."""
        return tuple(read_list(self.folder).values())

    def case(self, case_id: str) -> StoredCase:
        """The scan of an id. Raises `BadConfig` for one that is not there, or is no id."""
        return self._named(case_id, read_list(self.folder))

    def _named(self, case_id: str, cases: Mapping[str, StoredCase]) -> StoredCase:
        case = cases.get(case_id) or cases.get(check_id(case_id))
        if case is None:
            raise BadConfig(f"{self.folder}: has no case '{harmless(case_id)}'")
        return case

    def read_scan(self, case_id: str) -> list[Volume]:
        """A `Volume` per channel, all on the first one's grid. Raises `BadConfig`, `BadFile`."""
        return read_files(self.case(case_id).images, len(self.channels))

    def read_label(self, case_id: str, tag: str = FINAL) -> tuple[Volume, LabelTable]:
        """The label map under a tag, on the grid of its scan, and what its values mean. Raises
        `BadConfig` where there is none, `BadFile`.
        """
        case = self.case(case_id)
        if tag not in case.labels:
            raise BadConfig(f"{self.folder}: case {case.id} has no label '{harmless(tag)}'")
        image, path = self._grid_of(case), case.labels[tag]
        if tag != FINAL:
            return read_segmentation(path, image, case.images[0])
        table = self.table
        if not len(table):  # it holds nothing
            return onto(read_labels(path), image, path=path, image_path=case.images[0]), table
        # Axes may be stored in another order, and a segmentation may number its structures
        # otherwise than others do.
        (one,) = self._as_dataset([case], table).cases
        return read_case_labels(one, image), table

    def _grid_of(self, case: StoredCase) -> Volume:
        """The first channel of a scan."""
        is_one_file = len(case.images) < len(self.channels)
        return read(case.images[0], volume_index=0 if is_one_file else None)

    # Changes --------------------------------------------------------------------------------------

    def add_scan(
        self,
        case_id: str,
        files: Sequence[str | Path],
        *,
        replace: bool = False,
        split: str = AUTO,
        group: str = "",
    ) -> StoredCase:
        """Take a scan in under an id, voxels and geometry as they are; it has no labels yet.

        files: one for each channel, or a 4-D file of all; of any format that medseg reads. replace:
        put it in the place of one that is there, whose labels then go. split: 'train', 'val' to
        validate with, 'test' to be left alone, 'auto' to settle it when it gets its final label, so
        that one of five validates. group: the patient, whose scans stay on one side of
        every split. Raises `BadOutput` for an id that is there, `BadFile` for what is no scan,
        `BadConfig` for what is no id.
        """
        volumes = read_files([Path(file) for file in files], len(self.channels))
        return self.add_volumes(case_id, volumes, replace=replace, split=split, group=group)

    def add_volumes(
        self,
        case_id: str,
        volumes: Sequence[Volume],
        *,
        labels: Volume | None = None,
        table: LabelTable = NO_NAMES,
        like: LabelTable = NO_NAMES,
        replace: bool = False,
        split: str = AUTO,
        group: str = "",
    ) -> StoredCase:
        """`add_scan` of volumes in memory; labels, table, like: its final label at once, as for
        `put_label`, so that both or neither are there.
        """
        name = check_id(case_id)
        check_split(split)
        group = check_id(group) if group else ""
        if len(volumes) != len(self.channels):
            raise BadConfig(
                f"a scan of {self.folder} consists of {counted(len(self.channels), 'volume')}"
                f" ({', '.join(self.channels)}), and {len(volumes)} are given"
            )
        with self._changing() as cases:
            before = cases.get(name)
            self._check_new(name, cases, replace)
            images = self._write_images(name, volumes)
            case = StoredCase(id=name, images=images, split=split, group=group)
            try:
                if labels is not None:
                    where = Path(f"{name} ({FINAL})")
                    labels = onto(labels, volumes[0], path=where, image_path=images[0])
                    case = self._with_final(case, labels, table, like=like, cases=cases)
                self._write_list(cases | {name: case})
            except BaseException:
                _remove((*images, *case.labels.values()))
                raise
            if before is not None:
                self._remove_own((*before.images, *before.labels.values()))
        return case

    def list_scans(self, scans: Iterable[StoredCase]) -> None:
        """List scans that lie in the folder already, where they lie; who is listed stays so."""
        with self._changing() as cases:
            new = {case.id: case for case in scans if case.id not in cases}
            self._write_list(cases | new)

    def put_label(
        self,
        case_id: str,
        labels: Volume,
        table: LabelTable,
        *,
        tag: str = FINAL,
        split: str | None = None,
        like: LabelTable = NO_NAMES,
    ) -> StoredCase:
        """Keep a label map of a scan under a tag, in the place of one that is there.

        labels: on the scan's grid, axes stored in any order. table: a name for every value in it.
        Under 'final' structures are known by name in the whole data set: a name that is new gets
        the value that `like` (the table of a model) or else its own file has for it if that is
        free, or the next free one. Values that the table names and no voxel has count as looked for
        and not there; structures that the table does not name count as not looked for. Under
        another tag the label keeps its own names and values. split: as of `add_scan`, if it
        changes. Raises `BadFile` for another grid, for a value without a name and for two values
        of one name, `BadConfig` for an id that is not there.
        """
        check_tag(tag)
        if split is not None:
            check_split(split)
        with self._changing() as cases:
            case = self._named(case_id, cases)
            case = replace(case, split=split or case.split)
            image, before = self._grid_of(case), case.labels.get(tag)
            where = Path(f"{case.id} ({tag})")
            labels = onto(labels, image, path=where, image_path=case.images[0])
            with _restored_on_error(before):
                if tag == FINAL:
                    case = self._with_final(case, labels, table, like=like, cases=cases)
                else:
                    path = self._place_of(case, tag)
                    write(labels, path, table=table)
                    case = replace(case, labels={**case.labels, tag: path})
                self._write_list(cases | {case.id: case})
            if before not in (None, case.labels[tag]):
                self._remove_own([before])
        return case

    def _place_of(self, case: StoredCase, tag: str) -> Path:
        """Where a label of a scan is written: in the place of one that this class wrote. What
        people have elsewhere, or in another format, is not written over.
        """
        suffix = ".nii.gz" if tag == FINAL else ".seg.nrrd"
        path = case.labels.get(tag)
        if path is not None and path.name.endswith(suffix) and self._is_own(path):
            return path
        return self._free(f"labels/{tag}", stem_of(case.id), suffix)

    def remove_label(self, case_id: str, tag: str = FINAL) -> StoredCase:
        """Remove the label under a tag. Raises `BadConfig` where there is none."""
        with self._changing() as cases:
            case = self._named(case_id, cases)
            if tag not in case.labels:
                raise BadConfig(f"{self.folder}: case {case.id} has no label '{harmless(tag)}'")
            left = {name: path for name, path in case.labels.items() if name != tag}
            kept = replace(case, labels=left)
            kept = replace(kept, annotated=(), holds=()) if tag == FINAL else kept
            self._write_list(cases | {case.id: kept})
            self._remove_own([case.labels[tag]])
        return kept

    def remove_scan(self, case_id: str) -> None:
        """Remove a scan with all its labels. Raises `BadConfig` where there is none."""
        with self._changing() as cases:
            case = self._named(case_id, cases)
            self._write_list({name: one for name, one in cases.items() if name != case.id})
            self._remove_own((*case.images, *case.labels.values()))

    def _write_list(self, cases: Mapping[str, StoredCase]) -> None:
        write_list(self.folder, self.channels, cases.values())

    # Files ----------------------------------------------------------------------------------------

    def _with_final(
        self,
        case: StoredCase,
        labels: Volume,
        table: LabelTable,
        *,
        like: LabelTable,
        cases: dict[str, StoredCase],
    ) -> StoredCase:
        """The case with its final label written, and labels.csv with the names that are new.

        cases: all, of which those change that nobody looked at for what is new.
        """
        before = self.table if (self.folder / _TABLE).is_file() else NO_NAMES
        known = self.table
        joined = joined_by_name(case.id, labels.data, table, known, like=like)
        if set(joined.table.values) - set(known.values):
            cases.update(self._as_looked_at(cases.values(), known))
        path = self._place_of(case, FINAL)
        # First the names, so that at no moment a label map holds a value without one.
        self._write_table(joined.table)
        try:
            write(labels.with_data(joined.data), path)
        except BaseException:
            self._write_table(before)
            raise
        case = replace(
            case,
            labels={**case.labels, FINAL: path},
            annotated=joined.annotated,
            holds=joined.holds,
        )
        return replace(case, split=settled_split(case, cases.values()))

    def _as_looked_at(
        self, cases: Iterable[StoredCase], table: LabelTable
    ) -> dict[str, StoredCase]:
        """The cases of a list that people wrote that have final labels and do not say what was
        looked for in them: it was what a table names, and nothing that comes later.
        """
        return {
            one.id: replace(one, annotated=table.values, holds=self._values_in(one, table))
            for one in cases
            if FINAL in one.labels and not one.annotated
        }

    def _values_in(self, case: StoredCase, table: LabelTable) -> tuple[int, ...]:
        """The values that a final label holds. Raises `BadFile`."""
        held: set[int] = set()
        for one in self._as_dataset([case], table).cases:
            held |= set(np.unique(read_label_file(one).data).tolist()) - {0}
        return tuple(sorted(held))

    def _write_table(self, table: LabelTable) -> None:
        """Replace labels.csv in one step, if it changes."""
        path = self.folder / _TABLE
        if not len(table):
            path.unlink(missing_ok=True)
        elif not path.is_file() or table != self.table:
            table.write(path)

    def _prune(self) -> None:
        """Take names that no final label holds out of labels.csv, for nothing could be learnt of
        them; where nobody can say what a label holds, all stay.
        """
        finals = [one for one in read_list(self.folder).values() if FINAL in one.labels]
        if not all(one.annotated for one in finals):
            return
        table = self.table
        with suppress(MedsegError):
            # Lists that people wrote say what was looked for, and not what there is.
            used = {v for one in finals for v in one.holds or self._values_in(one, table)}
            self._write_table(LabelTable(tuple(one for one in table.labels if one.value in used)))

    def _check_new(self, name: str, cases: Mapping[str, StoredCase], replaces: bool) -> None:
        if name in cases and not replaces:
            raise BadOutput(
                f"{self.folder}: case {name} is there already; give another id, or --replace to put"
                " this one in its place"
            )
        for other in cases:
            if other != name and other.casefold() == name.casefold():
                raise BadOutput(f"{self.folder}: {name} and {other} differ only in case; rename it")

    def _write_images(self, name: str, volumes: Sequence[Volume]) -> tuple[Path, ...]:
        """Write a file per channel under names that nothing else has."""
        several = len(volumes) > 1
        stems = [f"{name}_{number:04d}" if several else name for number in range(len(volumes))]
        paths: list[Path] = []
        try:
            for stem, volume in zip(stems, volumes):
                paths.append(self._free("images", stem, ".nii.gz"))
                write(volume, paths[-1])
        except BaseException:
            _remove(paths)
            raise
        return tuple(paths)

    def _free(self, folder: str, stem: str, suffix: str) -> Path:
        """A path in a folder of the data set, which is made, that no file has."""
        place = self.folder / folder
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadOutput(f"{place}: cannot be made: {error.strerror}") from None
        path, number = place / f"{stem}{suffix}", 1
        while path.exists():
            number += 1
            path = place / f"{stem}_{number}{suffix}"
        return path

    def _remove_own(self, paths: Iterable[Path]) -> None:
        """Remove files that no line names any more; files of people elsewhere are left alone."""
        _remove(path for path in paths if self._is_own(path))

    def _is_own(self, path: Path) -> bool:
        """Whether a file lies in the data set."""
        return path.resolve().is_relative_to(self.folder.resolve())

    @contextmanager
    def _changing(self) -> Iterator[dict[str, StoredCase]]:
        """While the block runs, no other process or thread changes the data set; it gets all cases,
        and afterwards labels.csv names what the final labels hold, whatever happened.
        """
        with self._locked():
            try:
                yield read_list(self.folder)
            except BaseException:
                with suppress(MedsegError):
                    self._prune()
                raise
            self._prune()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """While the block runs, no other process or thread changes the data set."""
        until = time.monotonic() + _WAIT_S
        try:
            handle = (self.folder / _LOCK).open("ab")
        except OSError as error:
            raise BadOutput(f"{self.folder}: cannot be written to: {error.strerror}") from None
        with handle:
            while True:
                try:
                    take_lock(handle.fileno())
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise BadOutput(
                            f"{self.folder}: another process is changing it; try again later"
                        ) from None
                    time.sleep(0.05)
                except OSError:  # some file systems have no locks
                    break
            yield


def read_segmentation(
    path: str | Path,
    image: Volume,
    image_path: str | Path,
    *,
    table: str | Path | None = None,
    segments: Sequence[str] = (),
) -> tuple[Volume, LabelTable]:
    """A segmentation of any format on the grid of its scan, and what its values mean.

    The grid may be stored along other axes, and a segmentation that 3D Slicer cropped gets
    background around it. table: where the names are; without one they are those that the file
    carries, or labels.csv or NAME.labels.csv beside it. segments: only these, by name or value,
    later over earlier, where they overlap. Raises `BadFile` for another grid, for segments that
    overlap and for labels without names.
    """
    file, scan = Path(path), Path(image_path)
    source = scan if label_kind(file) and is_dicom_source(scan) else None
    labels = read_labels(file, source=source, segments=segments or None)
    names = LabelTable.read(table) if table else embedded_table(file)
    names = names or find_table(None, file, file)
    if names is None:
        raise BadFile(
            f"{file}: names no structures, and no label table lies beside it; give --table"
        )
    if segments:
        there = [names.value_of(one) for one in segments]
        names = LabelTable(tuple(one for one in names.labels if one.value in there))
    return onto(labels, image, path=file, image_path=scan), names


def read_files(files: Sequence[Path], channels: int) -> list[Volume]:
    """A volume per channel, of a file each or of one 4-D file, on the first one's grid. Raises
    `BadFile`, and `BadConfig` for another number of files.
    """
    if len(files) == 1 and channels > 1:
        path = files[0]
        held = stored_sizes(path)[3:] if path.name.lower().endswith((".nii", ".nii.gz")) else ()
        if int(np.prod(held or (1,))) != channels:
            raise BadFile(f"{path}: does not hold {channels} volumes; give a file for each channel")
        return [read(path, volume_index=number) for number in range(channels)]
    if len(files) != channels:
        raise BadConfig(
            f"a scan consists of {counted(channels, 'file')} here, and {len(files)} are given"
        )
    first = read(files[0])
    rest = [onto(read(one), first, path=one, image_path=files[0]) for one in files[1:]]
    return [first, *rest]


def _is_empty_folder(place: Path) -> bool:
    return place.is_dir() and all(one.name.startswith(".") for one in place.iterdir())


@contextmanager
def _restored_on_error(path: Path | None) -> Iterator[None]:
    """If the block fails, what a file held before is in it again."""
    content = path.read_bytes() if path is not None and path.is_file() else None
    try:
        yield
    except BaseException:
        if path is not None and content is not None:
            with atomic_write(path) as file:
                file.write(content)
        raise


def _stamp(path: Path) -> tuple[int, int]:
    """Another one, where a file was changed."""
    about = path.stat() if path.is_file() else None
    return (about.st_size, about.st_mtime_ns) if about else (0, 0)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
