"""Nothing of a patient goes on: sentinels are planted wherever a file can hold text, and looked for
everywhere else.

Values of headers may be in no output that is not DICOM, no line on the terminal, no log, no
traceback and no name or argument that others on the machine can see. Names of files and folders may
be repeated to the user who typed them, on the terminal, and in nothing that is written.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import re
import shutil
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

import medseg
from making import dicom_series, networks as tiny
from medseg.errors import MedsegError

pytestmark = pytest.mark.usefixtures("leave_libraries_as_they_were")

#: One for every place, each found whatever its case: SENT00QX and so on. Dates and UIDs have their
#: own form.
COUNT = 64
SENTINELS = [f"SENT{n:02d}QX" for n in range(COUNT)]
DATE, UID_PART = "19470401", "90210907.90210907"
#: In names of files and folders.
NAMES = [f"NAMED{n:02d}QX" for n in range(6)]
EVERYTHING = re.compile(rb"(?i)SENT\d\dQX|19470401|90210907\.90210907")
IN_NAMES = re.compile(rb"(?i)NAMED\d\dQX")


def planted_series(folder: Path, pieces: list[Dataset] | None = None) -> Path:
    """A DICOM series whose every text holds a sentinel, private elements and sequences included; 4
    slices.
    """
    words = iter(SENTINELS[:40])
    texts = {
        "PatientName": "SENT00QX^SENT01QX", **{name: next(words) for name in (
            "PatientID", "OtherPatientNames", "PatientAddress", "PatientComments", "EthnicGroup",
            "Occupation",
            "AdditionalPatientHistory", "CountryOfResidence", "PatientTelephoneNumbers",
            "AccessionNumber", "StudyID",
            "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "InstitutionName",
            "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "StudyDescription",
            "SeriesDescription", "ProtocolName", "BodyPartExamined", "Manufacturer",
            "ManufacturerModelName",
            "DeviceSerialNumber", "SoftwareVersions", "ImageComments",
            "RequestedProcedureDescription",
            "ContrastBolusAgent", "SequenceName", "StationAETitle", "DerivationDescription",
            "ReasonForStudy",
        )},
        "PatientBirthDate": DATE, "StudyDate": DATE, "SeriesDate": DATE,
        "AcquisitionDateTime": DATE + "120000",
        "ContentDate": DATE, "RetrieveURL": "http://SENT35QX/", "LongCodeValue": "SENT36QX",
        "TextValue": "SENT37QX",
    }  # fmt: skip
    pieces = pieces or dicom_series.series()
    for number, piece in enumerate(pieces):
        for name, value in texts.items():
            setattr(piece, name, value)
        piece.StudyInstanceUID = f"1.2.{UID_PART}.1"
        piece.SeriesInstanceUID, piece.FrameOfReferenceUID = (
            f"1.2.{UID_PART}.2",
            f"1.2.{UID_PART}.3",
        )
        piece.SOPInstanceUID = piece.file_meta.MediaStorageSOPInstanceUID = (
            f"1.2.{UID_PART}.4.{number}"
        )
        piece.ImageType = ["ORIGINAL", "PRIMARY", "SENT38QX"]
        item = Dataset()
        item.ScheduledProcedureStepDescription, item.ScheduledPerformingPhysicianName = (
            "SENT39QX",
            "SENT40QX",
        )
        piece.RequestAttributesSequence = Items([item])
        block = piece.private_block(0x0029, "SENT41QX", create=True)
        for offset, kind, value in (
            (1, "LO", "SENT42QX"), (2, "UN", b"SENT43QX"), (3, "OB", b"SENT44QX"), (4, "PN",
            "SENT45QX"),
            (5, "UT", "SENT46QX"), (6, "SQ", Items([item])),
        ):  # fmt: skip
            block.add_new(offset, kind, value)
        piece.add_new(0x60000022, "LO", "SENT47QX")  # the description of an overlay
        piece.preamble = b"SENT48QX" * 16
        folder.mkdir(parents=True, exist_ok=True)
        piece.save_as(folder / f"{NAMES[0]}_{number}.dcm", enforce_file_format=True)
    return folder


def planted_nifti(path: Path, data: np.ndarray) -> Path:
    image = nib.Nifti1Image(data, tiny.affine_of())
    image.header.set_xyzt_units("mm")
    for key, value in {
        "descrip": "SENT49QX",
        "aux_file": "SENT50QX",
        "db_name": "SENT51QX",
    }.items():
        image.header[key] = value
    image.header["intent_name"] = "SENT52QX"
    for code, content in (
        (6, b"SENT53QX"),
        (4, b"<SENT54QX/>"),
        (2, b"SENT55QX"),
        (0, b"SENT56QX"),
    ):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, content))
    nib.save(image, path)
    return path


def planted_nrrd(path: Path, data: np.ndarray) -> Path:
    lines = [
        "NRRD0004", "# SENT57QX", "type: int16", "dimension: 3", "space: left-posterior-superior",
        "content: SENT58QX",
        f"sizes: {' '.join(map(str, data.shape))}", "space directions: (2,0,0) (0,2,0) (0,0,2)",
        "kinds: domain domain domain", "endian: little", "encoding: gzip", "space origin: (0,0,0)",
        "patient:=SENT59QX", "SENT60QX:=x", "", "",
    ]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + gzip.compress(data.astype("<i2").tobytes("F")))
    return path


def planted_metaimage(path: Path, data: np.ndarray) -> Path:
    lines = [
        "ObjectType = Image", "Comment = SENT61QX", "NDims = 3",
        f"DimSize = {' '.join(map(str, data.shape))}",
        "TransformMatrix = 1 0 0 0 1 0 0 0 1", "Offset = 0 0 0", "ElementSpacing = 2 2 2",
        "PatientName = SENT62QX",
        "BinaryData = True", "BinaryDataByteOrderMSB = False", "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL", "",
    ]  # fmt: skip
    path.write_bytes("\n".join(lines).encode() + data.astype("<i2").tobytes("F"))
    return path


def planted_mgh(path: Path, data: np.ndarray) -> Path:
    image = nib.MGHImage(data.astype(np.float32), tiny.affine_of())
    nib.save(image, path)
    history = b"mri_convert SENT63QX\0"
    # A tag: command line.
    path.write_bytes(path.read_bytes() + struct.pack(">iq", 3, len(history)) + history)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A planted file or folder of each kind, under a planted name in a planted folder."""
    place = tmp_path_factory.mktemp("in") / NAMES[1]
    place.mkdir()
    data = tiny.phantom((14, 16, 12)).round().astype(np.int16)
    name = f"{NAMES[2]} {NAMES[3]}"
    return {
        "dicom": planted_series(place / NAMES[4]),
        "zip": zipped(planted_series(place / NAMES[5]), place / f"{name}.zip"),
        "nii": planted_nifti(place / f"{name}.nii.gz", data),
        "nrrd": planted_nrrd(place / f"{name}.nrrd", data),
        "mha": planted_metaimage(place / f"{name}.mha", data),
        "mgh": planted_mgh(place / f"{name}.mgh", data),
    }


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"SENT01QX"
        for file in folder.iterdir():
            archive.write(file, f"{NAMES[0]}/{file.name}")
    return path


def test_all_sentinels_are_planted(inputs: dict[str, Path]):
    """The search below proves nothing if the search does not find them where they are."""
    there = b"".join(
        unpacked(path.read_bytes()) for one in inputs.values() for path in files_of(one)
    )
    found = {word.upper() for word in EVERYTHING.findall(there)}
    assert len(found) >= 60, sorted(set(SENTINELS) - {word.decode() for word in found})


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def unpacked(content: bytes, depth: int = 3) -> bytes:
    """The bytes of a file, and those packed in it: gzip, zip, deflated and base64 parts."""
    out = [content]
    if depth == 0:
        return content
    for at in [found.start() for found in re.finditer(rb"\x1f\x8b\x08", content)]:
        with_rest = zlib.decompressobj(31)
        try:
            out.append(unpacked(with_rest.decompress(content[at:]), depth - 1))
        except zlib.error:
            continue
    if content[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            out += [name.encode() for name in archive.namelist()]
            out += [unpacked(archive.read(name), depth - 1) for name in archive.namelist()]
    for found in re.finditer(rb"[A-Za-z0-9+/]{64,}={0,2}", content):
        text = found[0][: len(found[0]) // 4 * 4]
        out.append(unpacked(base64.b64decode(text), depth - 1))
    return b"\n".join(out)


#: What goes to the operating system where others see it: names that are made, and arguments of
#: programs.
_seen: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and not set(mode) & set("wax+")) or (
            mode is None and not flags & 0o103
        ):
            return  # only read
        _seen.append(str(path))
    elif event in (
        "os.mkdir",
        "os.rename",
        "os.link",
        "os.symlink",
        "tempfile.mkstemp",
        "tempfile.mkdtemp",
    ):
        _seen.extend(str(one) for one in arguments if isinstance(one, str | bytes | Path))
    elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        _seen.append(str(arguments))


sys.addaudithook(_watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


class Trial:
    """Runs commands with outputs in a neutral folder, and judges all they left and said."""

    def __init__(
        self, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
    ) -> None:
        self.folder, self.caplog, self.capfd = folder, caplog, capfd

    def run(self, *arguments: object, code: int | None = 0) -> tiny.Ran:
        self.capfd.readouterr()
        self.caplog.clear()
        with watched() as seen:
            ran = tiny.medseg(*arguments)
        printed = self.capfd.readouterr()  # what went around sys.stdout
        if code is not None:
            assert ran.code == code, ran.err
        logs = "\n".join(f"{one.getMessage()} {one.exc_text or ''}" for one in self.caplog.records)
        for what, text in {
            "stdout": ran.out, "stderr": ran.err, "descriptors": printed.out + printed.err,
            "log": logs,
        }.items():  # fmt: skip
            assert not EVERYTHING.search(text.encode()), f"{what} of {arguments}: {text}"
            assert "Traceback" not in text
        names = "\n".join(seen)
        assert not EVERYTHING.search(names.encode()) and not IN_NAMES.search(names.encode()), names
        assert not IN_NAMES.search(logs.encode())
        self.judge()
        return ran

    def judge(self) -> None:
        for path in files_of(self.folder):
            content = unpacked(path.read_bytes())
            assert not IN_NAMES.search(content), path.name
            if path.suffix != ".dcm":
                found = EVERYTHING.search(content)
                assert not found, f"{path.name}: {found[0] if found else b''!r}"
            assert not IN_NAMES.search(str(path.relative_to(self.folder)).encode())


@pytest.fixture
def trial(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> Trial:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "out").mkdir()
    return Trial(tmp_path / "out", caplog, capfd)


KINDS = ("dicom", "zip", "nii", "nrrd", "mha", "mgh")


@pytest.mark.parametrize("kind", KINDS)
def test_info_tells_nothing(kind: str, inputs: dict[str, Path], trial: Trial):
    for options in ((), ("--json",)):
        ran = trial.run("info", inputs[kind], *options)
        assert "2" in ran.out


@pytest.mark.parametrize("kind", KINDS)
def test_infer_writes_and_tells_nothing(kind: str, inputs: dict[str, Path], trial: Trial):
    out = trial.folder / "out.nii.gz"
    trial.run(
        "infer",
        inputs[kind],
        "-o",
        out,
        "-m",
        "otsu",
        "--instances",
        "--preview",
        trial.folder / "out.png",
    )
    assert {path.name for path in trial.folder.iterdir()} == {
        "out.nii.gz", "out.png", "out.json", "out.labels.csv", "out.objects.nii.gz",
    }  # fmt: skip
    for suffix in (".seg.nrrd", ".mha", ".mgz"):
        trial.run(
            "infer",
            inputs[kind],
            "-o",
            trial.folder / f"more{suffix}",
            "-m",
            "kmeans",
            "--quiet",
            "--json",
        )


@pytest.mark.parametrize("kind", ["dicom", "nii"])
def test_pages_scenes_and_pictures_tell_nothing(kind: str, inputs: dict[str, Path], trial: Trial):
    labels = trial.folder / "labels.nii.gz"
    trial.run("infer", inputs[kind], "-o", labels, "-m", "otsu")
    for name in ("page.html", "scene.mrb", "sheet.png"):
        trial.run("view", inputs[kind], labels, "-o", trial.folder / name)
        assert (trial.folder / name).stat().st_size > 1000


@pytest.mark.parametrize("kind", ["dicom", "zip"])
def test_dicom_results_hold_no_names_of_files_and_nothing_private(
    kind: str, inputs: dict[str, Path], trial: Trial
):
    out = trial.folder / "out.dcm"
    trial.run("infer", inputs[kind], "-o", out, "-m", "otsu", "--also", "rtstruct,sr")
    assert len(list(trial.folder.glob("*.dcm"))) == 3
    for path in trial.folder.glob("*.dcm"):
        content = path.read_bytes()
        assert not [word for word in SENTINELS[38:49] if word.encode() in content], path.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mgz"])
def test_convert_takes_nothing_along(kind: str, suffix: str, inputs: dict[str, Path], trial: Trial):
    trial.run("convert", inputs[kind], trial.folder / f"out{suffix}")


def test_labels_are_converted_cleaned_and_scored_without_telling(trial: Trial, tmp_path: Path):
    data = (tiny.phantom((14, 16, 12)) > 400).astype(np.int16)
    for side in ("reference", "prediction"):
        (tmp_path / NAMES[0] / side).mkdir(parents=True)
        for case in ("a", "b"):
            planted_nifti(tmp_path / NAMES[0] / side / f"{case}.nii.gz", data)
    planted_nifti(tmp_path / NAMES[0] / "prediction" / "c.nii.gz", data)
    (tmp_path / NAMES[0] / "reference" / "d.nii.gz").write_bytes(b"damaged")
    planted_nifti(tmp_path / NAMES[0] / "prediction" / "d.nii.gz", data)
    one = tmp_path / NAMES[0] / "reference" / "a.nii.gz"
    trial.run("convert", one, trial.folder / "out.seg.nrrd")
    trial.run("clean", one, "-o", trial.folder / "clean.nii.gz", "--keep-largest")
    sides = (tmp_path / NAMES[0] / "reference", tmp_path / NAMES[0] / "prediction")
    trial.run("evaluate", *sides, "-o", trial.folder / "scores", "--bootstrap", 10)
    summary = json.loads((trial.folder / "scores" / "summary.json").read_text())
    assert summary["cases"]["failed"].keys() == {"d"} and summary["cases"]["without_reference"] == [
        "c"
    ]


def test_cases_can_be_numbered_where_their_names_tell(trial: Trial, tmp_path: Path):
    """Scores name their cases by file; with --number-cases they do not."""
    data = (tiny.phantom((14, 16, 12)) > 400).astype(np.int16)
    for side in ("reference", "prediction"):
        (tmp_path / side).mkdir(parents=True)
        for name in NAMES[:2]:
            planted_nifti(tmp_path / side / f"{name}.nii.gz", data)
    trial.run(
        "evaluate",
        tmp_path / "reference",
        tmp_path / "prediction",
        "-o",
        trial.folder,
        "--number-cases",
        "--bootstrap",
        10,
    )
    assert json.loads((trial.folder / "summary.json").read_text())["cases"]["scored"] == [
        "case 1",
        "case 2",
    ]


def broken(kind: str, path: Path, folder: Path) -> list[Path]:
    """Copies of an input that are cut short, changed in the header, incomplete or empty."""
    made = []
    for number, cut in enumerate((0.3, 0.9)):
        copy = folder / f"cut{number}" / path.name
        copy.parent.mkdir(parents=True)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        for file in files_of(copy)[:1]:
            file.write_bytes(file.read_bytes()[: int(file.stat().st_size * cut)])
        made.append(copy)
    if kind == "dicom":
        fewer = folder / "fewer"
        shutil.copytree(path, fewer)
        sorted(fewer.iterdir())[1].unlink()
        made.append(fewer)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_tells_nothing(kind: str, inputs: dict[str, Path], trial: Trial, tmp_path: Path):
    failed = 0
    for path in broken(kind, inputs[kind], tmp_path / "broken"):
        for command in (("info",), ("infer", "-m", "otsu", "-o", trial.folder / "x.nii.gz")):
            failed += trial.run(*command[:1], path, *command[1:], code=None).code == 3
        with pytest.raises(MedsegError) as raised, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            medseg.read(path)
        told = "".join(traceback.format_exception(raised.value))
        assert not EVERYTHING.search(told.encode()), told
    assert failed >= 4
    trial.run("infer", inputs[kind], "-o", trial.folder / "x.nii.gz", "-m", "nothing", code=6)
    trial.run("infer", inputs[kind], "-o", "/dev/null/x.nii.gz", "-m", "otsu", code=4)
    trial.run("convert", inputs[kind], trial.folder / "x.jpg", code=4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of writing such files
@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("PixelSpacing", b"SENT00QX\\1 "), ("ImagePositionPatient", b"0\\SENT00QX\\1"),
        ("RescaleSlope", b"SENT00QX"),
        ("ImageOrientationPatient", b"SENT00QX"), ("Rows", b"SENT00QX"), ("SOPClassUID",
        b"SENT00QX"),
        ("PhotometricInterpretation", b"SENT00QX"), ("ImageType", b"SENT00QX"),
        ("SeriesInstanceUID", b"SENT00QX"),
        ("FrameOfReferenceUID", b"SENT00QX"), ("NumberOfFrames", b"SENT00QX"), ("InstanceNumber",
        b"SENT00QX"),
        ("SeriesNumber", b"SENT00QX"), ("EchoTime", b"SENT00QX"), ("SpecificCharacterSet",
        b"SENT00QX"),
        ("StudyInstanceUID", b"SENT00QX"), ("PatientBirthDate", b"SENT00QX"), ("PatientName",
        b"SENT00QX\xff\xfe"),
    ],
)  # fmt: skip
def test_a_sentinel_in_a_tag_that_is_read_is_not_repeated(
    tag: str, value: bytes, trial: Trial, tmp_path: Path
):
    """A number that is a name, a kind of image that is a name: refused or ignored, never quoted."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    pieces = dicom_series.series()
    number = Tag(tag_for_keyword(tag) or 0)
    for n, piece in enumerate(pieces):
        piece[number] = RawDataElement(
            number, dictionary_VR(number), len(value), value, 0, False, True
        )
        piece.save_as(tmp_path / f"{n}.dcm", enforce_file_format=True)
    folder = tmp_path / "series"
    folder.mkdir()
    for n in range(len(pieces)):
        (tmp_path / f"{n}.dcm").rename(folder / f"{n}.dcm")
    trial.run("info", folder, code=None)
    trial.run("infer", folder, "-m", "otsu", "-o", trial.folder / "x.nii.gz", code=None)
    trial.run("infer", folder, "-m", "otsu", "-o", trial.folder / "y.dcm", code=None)


def test_an_error_that_nobody_foresaw_tells_where_and_not_what(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("could not convert string to float: 'SENT00QX'")

    monkeypatch.setattr("medseg.io.read", fail)
    ran = trial.run("info", "scan.nii.gz", code=1)
    assert (
        "ValueError" in ran.err and "cli/convert.py" in ran.err and ran.err.startswith("medseg: ")
    )
