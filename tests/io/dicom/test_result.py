"""DICOM results: SEG, RTSTRUCT and SR hold the labels exactly, are valid, and say nothing that they
need not say.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings

from making import dicom as make
from making.dicom_labels import TABLE, centroids, errors, phantom, program, source
from making.strategies import affines
from medseg import io
from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning
from medseg.inference.jobs import Extras, Job
from medseg.inference.results import check_output
from medseg.inference.run import infer
from medseg.inference.settings import Settings
from medseg.io.dicom.codes import cielab, rgb, text
from medseg.io.dicom.result import CARRIED, DicomOptions, decimal, open_origin
from medseg.io.dicom.rtstruct import read_structures
from medseg.io.dicom.seg import _packed, read_segments
from medseg.labels import Label, LabelTable
from medseg.volume import LPS, ORIENTATIONS, Volume, crop, grid_distance_mm, reorient

KINDS = {
    "seg": (".dcm", DicomOptions(model="brain", version="0123456789abcdef")),
    "labelmap": (".dcm", DicomOptions(seg_type="labelmap", model="brain")),
    "rtstruct": (".rtstruct.dcm", DicomOptions(model="brain")),
    "seg of unknown origin": (".dcm", DicomOptions()),
    "labelmap of unknown origin": (".dcm", DicomOptions(seg_type="labelmap")),
    "seg without patient": (".dcm", DicomOptions(deidentify=True)),
    "rtstruct without patient": (".rtstruct.dcm", DicomOptions(deidentify=True)),
}


def there_and_back(
    labels: Volume, path: Path, folder: Path, options: DicomOptions | None = None
) -> Volume:
    io.write(labels, path, table=TABLE, source=folder, options=options)
    return io.read_labels(path, source=folder if ".rtstruct" in path.name else None)


def test_48_orientations_go_through_nifti_seg_seg_nrrd_and_rtstruct_unchanged(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    places = centroids(labels)
    for number, orientation in enumerate(ORIENTATIONS):
        turned = reorient(labels, orientation)
        io.write(turned, tmp_path / "a.nii.gz")
        options = DicomOptions(seg_type="binary" if number % 16 else "labelmap")
        found = there_and_back(
            io.read_labels(tmp_path / "a.nii.gz"), tmp_path / "b.dcm", folder, options
        )
        assert np.array_equal(found.data, labels.data), orientation
        assert grid_distance_mm(found, labels) < 1e-6
        io.write(found, tmp_path / "c.seg.nrrd", table=io.embedded_table(tmp_path / "b.dcm"))
        found = there_and_back(
            io.read_labels(tmp_path / "c.seg.nrrd"), tmp_path / "d.rtstruct.dcm", folder
        )
        assert np.array_equal(found.data, labels.data), orientation
        assert grid_distance_mm(found, labels) < 1e-6
        for value, place in centroids(found).items():
            assert np.allclose(place, places[value], atol=1e-3)


@given(affine=affines())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_geometry(tmp_path_factory, affine):
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    pieces = make.as_mr(make.series(6, 13, 11))
    for number, piece in enumerate(pieces):
        piece.PixelSpacing = [f"{spacing[1]:.9g}", f"{spacing[0]:.9g}"]
        piece.ImageOrientationPatient = [f"{x:.10f}" for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
        piece.ImagePositionPatient = [f"{x:.9g}" for x in (lps @ (0, 0, number, 1))[:3]]
    home = tmp_path_factory.mktemp("any")
    folder = make.save(pieces, home / "scan")
    labels = phantom(io.read(folder))

    for name in ("a.dcm", "a.rtstruct.dcm"):
        found = there_and_back(labels, home / name, folder)

        assert np.array_equal(found.data, labels.data)
        assert grid_distance_mm(found, labels) < 1e-6


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
@pytest.mark.parametrize("where", ["nowhere", "one voxel", "last slice", "everywhere", "middle"])
def test_extremes(tmp_path, suffix, where):
    folder, grid = source(tmp_path / "scan", count=4)
    data = np.zeros(grid.shape, np.uint8)
    place = {
        "nowhere": (),
        "one voxel": (5, 6, 2),
        "last slice": (..., 3),
        "everywhere": ...,
        "middle": (..., [1, 2]),
    }
    if where != "nowhere":
        data[place[where]] = 2

    found = there_and_back(grid.with_data(data), tmp_path / f"x{suffix}", folder)

    assert np.array_equal(found.data, data)
    assert grid_distance_mm(found, grid) < 1e-6
    assert io.embedded_table(tmp_path / f"x{suffix}").values == (2,)


def test_a_block_cut_out_of_the_scan_comes_back_in_its_place(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    block = crop(labels, (2, 3, 1), (6, 8, 4))
    expected = np.zeros_like(labels.data)
    expected[2:8, 3:11, 1:5] = block.data

    found = there_and_back(reorient(block, "SPL"), tmp_path / "x.dcm", folder)

    assert np.array_equal(found.data, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_are_valid(tmp_path, kind):
    folder, grid = source(tmp_path / "scan")
    suffix, options = KINDS[kind]
    path = tmp_path / f"x{suffix}"

    io.write(phantom(grid), path, table=TABLE, source=folder, options=options)

    assert errors(path) == []
    assert path.read_bytes()[:132] == bytes(128) + b"DICM"


def test_names_colours_and_codes_come_back(tmp_path):
    folder, grid = source(tmp_path / "scan")
    present = LabelTable(
        tuple(sorted((label for label in TABLE.labels if label.value != 7), key=lambda x: x.value))
    )
    for kind, (suffix, options) in KINDS.items():
        path = tmp_path / f"{kind}{suffix}"
        io.write(phantom(grid), path, table=TABLE, source=folder, options=options)

        assert io.embedded_table(path) == present
        dataset = pydicom.dcmread(path)
        schemes = [
            item.CodingSchemeDesignator
            for item in dataset.get("CodingSchemeIdentificationSequence", ())
        ]
        assert schemes == ["99MEDSEG"]


def test_labels_without_a_table_get_names_and_odd_names_are_made_to_fit(tmp_path):
    folder, grid = source(tmp_path / "scan")
    odd = LabelTable((Label(2, "a\\b\n" + "c" * 100, (1, 2, 3)),))
    path = tmp_path / "x.dcm"

    io.write(phantom(grid), path, table=odd, source=folder)

    names = io.embedded_table(path).names
    assert names[2] == "a/b " + "c" * 60
    assert names[300] == "label 300"
    assert errors(path) == []


def test_colours_are_those_of_highdicom_and_of_a_label_map_by_dcmqi():
    from highdicom.color import CIELabColor

    chance = np.random.default_rng(3)
    for color in [
        *chance.integers(0, 256, (300, 3)).tolist(),
        [0, 0, 0],
        [255, 255, 255],
        [255, 0, 0],
        [0, 0, 255],
    ]:
        assert tuple(cielab(tuple(color))) == CIELabColor.from_rgb(*color).value
        assert rgb(cielab(tuple(color))) == tuple(color)
    assert rgb([41661, 41167, 40792]) == (221, 130, 101)


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_highdicom_reads_the_same(tmp_path, seg_type):
    import highdicom as hd

    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    path = tmp_path / "x.dcm"
    io.write(labels, path, table=TABLE, source=folder, options=DicomOptions(seg_type=seg_type))

    found = hd.seg.segread(path)
    volume = found.get_volume(combine_segments=True)

    items = [item for item in found.SegmentSequence if item.SegmentNumber]
    numbers = {item.SegmentNumber: int(item.SegmentDescription.split()[-1]) for item in items}
    values = np.vectorize(lambda number: numbers.get(number, 0))(volume.array)
    theirs = Volume(values, LPS @ volume.affine)
    assert np.array_equal(reorient(theirs, labels.orientation).data, labels.data)
    assert grid_distance_mm(reorient(theirs, labels.orientation), labels) < 1e-3


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_dcmqi_reads_the_same(tmp_path, seg_type):
    tool = program("segimage2itkimage")
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    io.write(
        labels,
        tmp_path / "x.dcm",
        table=TABLE,
        source=folder,
        options=DicomOptions(seg_type=seg_type),
    )

    command = [
        tool,
        "--inputDICOM",
        tmp_path / "x.dcm",
        "--outputDirectory",
        tmp_path,
        "--prefix",
        "q",
        "-t",
        "nrrd",
    ]
    subprocess.run([*command, "--mergeSegments"], check=True, capture_output=True, timeout=60)

    about = json.loads((tmp_path / "q-meta.json").read_text())
    segments = [segment for group in about["segmentAttributes"] for segment in group]
    named = {
        segment["labelID"]: int(segment["SegmentDescription"].split()[-1]) for segment in segments
    }
    image = sitk.ReadImage(str(tmp_path / "q-1.nrrd"))
    merged = io.read(tmp_path / "q-1.nrrd")
    theirs = merged.with_data(np.vectorize(lambda number: named.get(number, 0))(merged.data))
    assert image.GetSize() == merged.shape
    assert np.array_equal(reorient(theirs, labels.orientation).data, labels.data)
    assert grid_distance_mm(reorient(theirs, labels.orientation), labels) < 1e-3
    colours = {named[s["labelID"]]: tuple(s["recommendedDisplayRGBValue"]) for s in segments}
    assert np.abs(np.array(colours[2]) - TABLE[2].color).max() <= 1


def test_pydicom_seg_reads_the_same(tmp_path):
    reader = pytest.importorskip(
        "pydicom_seg", reason="pydicom-seg needs pydicom below 3", exc_type=ImportError
    )
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    io.write(labels, tmp_path / "x.dcm", table=TABLE, source=folder)

    result = reader.SegmentReader().read(pydicom.dcmread(tmp_path / "x.dcm"))

    for number in result.available_segments:
        value = int(result.segment_infos[number].SegmentDescription.split()[-1])
        assert np.array_equal(result.segment_data(number).T > 0, labels.data == value)


def every_reference(dataset: pydicom.Dataset) -> set[tuple[str, str, int | None]]:
    found = set()
    for element in dataset.iterall():
        if element.keyword == "ReferencedSOPInstanceUID":
            found.add(str(element.value))
    return found


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
def test_references_are_to_the_images_of_the_series_each_to_its_own(tmp_path, suffix):
    folder, grid = source(tmp_path / "scan")
    images = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, folder.iterdir())}
    io.write(phantom(grid), tmp_path / f"x{suffix}", table=TABLE, source=folder)
    dataset = pydicom.dcmread(tmp_path / f"x{suffix}")

    known = set(images) | {next(iter(images.values())).StudyInstanceUID}
    assert every_reference(dataset) <= known
    assert set(images) <= every_reference(dataset)
    assert dataset.StudyInstanceUID == "1.2.3.4"
    assert dataset.SeriesInstanceUID not in {d.SeriesInstanceUID for d in images.values()}
    for frame in dataset.get("PerFrameFunctionalGroupsSequence", ()):
        image = images[
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        ]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == image.ImagePositionPatient
    for roi in dataset.get("ROIContourSequence", ()):
        for contour in roi.ContourSequence:
            image = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            points = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(
                image.ImagePositionPatient, float
            )
            along, down = np.reshape(np.array(image.ImageOrientationPatient, float), (2, 3))
            assert np.abs(points @ np.cross(along, down)).max() < 1e-3  # on the plane of its image
            assert len(points) == contour.NumberOfContourPoints >= 3
            assert all(len(str(number)) <= 16 for number in contour.ContourData)


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
def test_frames_of_an_enhanced_file_are_referred_to_by_number(tmp_path, suffix):
    pieces = make.as_mr(make.series(6, 13, 11))
    file = make.enhanced([make.change(pieces, StudyInstanceUID="1.2.3.4")])
    folder = make.save([file], tmp_path / "scan")
    labels = phantom(io.read(folder))

    found = there_and_back(labels, tmp_path / f"x{suffix}", folder)

    assert np.array_equal(found.data, labels.data)
    assert errors(tmp_path / f"x{suffix}") == []
    dataset = pydicom.dcmread(tmp_path / f"x{suffix}")
    frames = file.PerFrameFunctionalGroupsSequence
    seen = 0
    for frame in dataset.get("PerFrameFunctionalGroupsSequence", ()):
        reference = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == file.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == file.SOPClassUID
        expected = (
            frames[reference.ReferencedFrameNumber - 1]
            .PlanePositionSequence[0]
            .ImagePositionPatient
        )
        assert frame.PlanePositionSequence[0].ImagePositionPatient == expected
        seen += 1
    for contour in (
        c for roi in dataset.get("ROIContourSequence", ()) for c in roi.ContourSequence
    ):
        number = contour.ContourImageSequence[0].ReferencedFrameNumber
        start = np.array(frames[number - 1].PlanePositionSequence[0].ImagePositionPatient, float)
        points = np.array(contour.ContourData, float).reshape(-1, 3) - start
        assert np.abs(points @ make.OBLIQUE[:, 2]).max() < 1e-3
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("suffix", [".dcm", ".rtstruct.dcm"])
def test_deterministic_results_are_the_same_file_and_others_are_new_objects(tmp_path, suffix):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    again = phantom(grid, seed=1)

    def written(labels: Volume, deterministic: bool) -> bytes:
        options = DicomOptions(model="brain", deterministic=deterministic)
        io.write(labels, tmp_path / f"x{suffix}", table=TABLE, source=folder, options=options)
        return (tmp_path / f"x{suffix}").read_bytes()

    def uids(content: bytes) -> tuple[str, str]:
        dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))
        return dataset.SOPInstanceUID, dataset.SeriesInstanceUID

    assert written(labels, True) == written(labels, True)
    assert not set(uids(written(labels, True))) & set(uids(written(again, True)))
    assert not set(uids(written(labels, False))) & set(uids(written(labels, False)))


#: Where texts of the source may go; the standard wants these (type 2) in every object of the same
#: study.
ALLOWED = {*CARRIED, "PositionReferenceIndicator"}


def planted(folder: Path) -> Path:
    """A series with a sentinel in every text tag of PS3.6 that a slice can take, private ones, and
    its file names.
    """
    pieces = make.as_mr(make.series(6, 13, 11))
    names = []
    for tag, (kind, _, _, _, name) in sorted(pydicom.datadict.DicomDictionary.items()):
        texts = kind in ("LO", "SH", "ST", "LT", "UT", "UC", "PN", "AE") and name not in (
            "",
            "CodingSchemeDesignator",
        )
        if texts and tag >> 16 in (0x08, 0x10, 0x12, 0x18, 0x20, 0x32, 0x38, 0x40):
            names.append(name)
    for number, name in enumerate(names):
        for piece in pieces:
            setattr(piece, name, f"ZQ{number:04d}")
    make.change(pieces, StudyInstanceUID="1.2.3.4")
    for piece in pieces:
        block = piece.private_block(0x0009, "ZQPRIVATE", create=True)
        block.add_new(1, "LO", "ZQINPRIVATE")
        piece.PatientBirthDate, piece.StudyDate, piece.StudyTime = "19120304", "19131415", "111213"
        piece.preamble = b"ZQPREAMBLE".ljust(128, b"\0")
    assert len(names) > 60
    return make.save(pieces, folder / "ZQFOLDER")


@pytest.mark.parametrize("deidentify", [False, True])
def test_only_what_the_standard_requires_comes_from_the_source(tmp_path, deidentify, caplog):
    caplog.set_level("DEBUG")
    folder = planted(tmp_path)
    job = Job(scan=folder, labels=tmp_path / "out" / "result.dcm")
    extras = Extras(also=("rtstruct", "sr"), dicom=DicomOptions(deidentify=deidentify))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        infer(job, "otsu", Settings(), extras)

    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == [
        "result.dcm", "result.json", "result.labels.csv", "result.rtstruct.dcm", "result.sr.dcm",
    ]  # fmt: skip
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".dcm":
            assert errors(path) == []
            dataset = pydicom.dcmread(path)
            carrying = {
                e.keyword for e in dataset.iterall() if "ZQ" in str(e.value) and e.VR != "SQ"
            }
            assert carrying <= (set() if deidentify else ALLOWED)
            for name in () if deidentify else CARRIED:
                assert str(dataset.get(name)) == str(
                    pydicom.dcmread(next(folder.iterdir())).get(name)
                ) or name in (
                    "StudyDate",  # the planted one is no date
                    "PatientSex",
                )
            if deidentify:
                for secret in (b"19120304", b"111213"):
                    assert secret not in content
                references = every_reference(dataset) | {
                    dataset.StudyInstanceUID,
                    dataset.get("FrameOfReferenceUID"),
                }
                originals = {
                    str(e.value)
                    for f in folder.iterdir()
                    for e in pydicom.dcmread(f)
                    if e.VR == "UI"
                }
                classes = {
                    str(e.value)
                    for f in folder.iterdir()
                    for e in pydicom.dcmread(f)
                    if "Class" in e.keyword
                }
                assert not references & (originals - classes)
        else:
            assert b"ZQ" not in content
        assert content.count(b"ZQ") == 0 or (path.suffix == ".dcm" and not deidentify)
    assert "ZQ" not in caplog.text


def test_deidentified_results_of_one_run_belong_together(tmp_path):
    folder, grid = source(tmp_path / "scan")
    for suffix in (".dcm", ".rtstruct.dcm"):
        options = DicomOptions(deidentify=True)
        io.write(
            phantom(grid), tmp_path / f"x{suffix}", table=TABLE, source=folder, options=options
        )

    one, other = pydicom.dcmread(tmp_path / "x.dcm"), pydicom.dcmread(tmp_path / "x.rtstruct.dcm")

    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert (
            one[name].value
            == other[name].value
            != pydicom.dcmread(next(folder.iterdir()))[name].value
        )
    assert one.PatientIdentityRemoved == "YES"
    assert every_reference(one) < every_reference(other)  # which also names the study


def test_odd_headers_of_the_source_are_no_obstacle(tmp_path):
    folder, grid = source(
        tmp_path / "scan", PatientName="A" * 70, PatientID="B" * 70, PatientSex="female",
        PatientBirthDate="1970-01-01",
        StudyTime="25h", SpecificCharacterSet="ISO_IR 100", StudyID="Ä" * 20,
        LossyImageCompression="01",
        LossyImageCompressionRatio="10", LossyImageCompressionMethod="ISO_10918_1",
        FrameOfReferenceUID="1.2.03.4",
    )  # fmt: skip
    for suffix in (".dcm", ".rtstruct.dcm"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydicom's quote what they warn about
            found = there_and_back(phantom(grid), tmp_path / f"x{suffix}", folder)
        assert np.array_equal(found.data, phantom(grid).data)
        dataset = pydicom.dcmread(tmp_path / f"x{suffix}")
        assert (dataset.PatientName, dataset.PatientID, dataset.StudyID) == (
            "A" * 70,
            "B" * 70,
            "Ä" * 16,
        )
        assert (dataset.PatientSex, dataset.PatientBirthDate, dataset.StudyTime) == ("", "", "")
    assert pydicom.dcmread(tmp_path / "x.dcm").LossyImageCompression == "01"


@pytest.mark.parametrize("suffix", [".dcm", ".seg.dcm", ".rtstruct.dcm"])
@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda labels: Volume(labels.data, labels.affine + np.eye(4)[[0, 0, 0, 0]] * 0), None, ""),
        (
            lambda labels: Volume(labels.data, labels.affine @ np.diag([1.1, 1, 1, 1])),
            BadOutput,
            "another grid",
        ),
        (
            lambda labels: Volume(labels.data, shifted(labels.affine, 0.4)),
            BadOutput,
            "another grid",
        ),
        (lambda labels: Volume(labels.data, shifted(labels.affine, 1)), BadOutput, "reach beyond"),
        (lambda labels: labels.with_data(labels.data - 0.5), BadOutput, "label map"),
        (lambda labels: labels.with_data(-labels.data.astype(int)), BadOutput, "negative"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, suffix, change, error, reason):
    folder, grid = source(tmp_path / "scan")
    path = tmp_path / f"x{suffix}"
    if error is None:
        io.write(change(phantom(grid)), path, source=folder)
        return
    with pytest.raises(error, match=reason) as caught:
        io.write(change(phantom(grid)), path, source=folder)

    assert str(caught.value).startswith(str(path))
    assert not path.exists()


def shifted(affine: np.ndarray, voxels: float) -> np.ndarray:
    step = np.eye(4)
    step[0, 3] = voxels
    return affine @ step


def test_labels_of_another_grid_are_put_on_the_source_by_nearest_neighbour_when_asked(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    fine = Volume(labels.data.repeat(2, axis=2), labels.affine @ halved())

    found = there_and_back(fine, tmp_path / "x.dcm", folder, DicomOptions(nearest=True))

    assert np.array_equal(found.data, labels.data)


def halved() -> np.ndarray:
    step = np.diag([1, 1, 0.5, 1.0])
    step[2, 3] = -0.25 + 0.01  # not quite halfway, so that the nearest is one
    return step


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"StudyInstanceUID": ""}, "study"),
        ({"SOPInstanceUID": "not a uid"}, "identifier|damaged"),
    ],
)
def test_a_source_that_cannot_be_referred_to_is_refused(tmp_path, tags, reason):
    folder, grid = source(tmp_path / "scan", **tags)

    with pytest.raises(BadFile, match=reason) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io.write(phantom(grid), tmp_path / "x.dcm", source=folder)

    assert str(caught.value).startswith(str(folder))
    assert make.NAME not in str(caught.value)
    assert not (tmp_path / "x.dcm").exists()


def test_a_source_without_a_frame_of_reference_gets_one_that_all_its_results_share(tmp_path):
    folder, grid = source(tmp_path / "scan", FrameOfReferenceUID="")
    found = []
    for suffix in (".dcm", ".rtstruct.dcm"):
        with pytest.warns(DataWarning, match="no frame of reference"):
            assert there_and_back(phantom(grid), tmp_path / f"x{suffix}", folder).data.any()
        found.append(pydicom.dcmread(tmp_path / f"x{suffix}").FrameOfReferenceUID)
        assert errors(tmp_path / f"x{suffix}") == []
    assert found[0] == found[1] != ""


@pytest.mark.parametrize(("rows", "columns"), [(3, 700), (143, 161), (2, 1), (1, 2)])
def test_runs_are_packed_as_every_decoder_knows_them(rows, columns):
    chance = np.random.default_rng(4)
    for highest in (1, 3, 60000):
        frame = np.repeat(
            chance.integers(0, highest + 1, (rows, columns)), chance.integers(1, 300), axis=1
        )[:, :columns]
        frame = frame.astype(np.uint16 if highest > 255 else np.uint8)
        packed = _packed(frame)

        unpacked = pydicom.pixels.decoders.rle._rle_decode_frame(
            packed, rows, columns, 1, 8 * frame.itemsize
        )

        assert np.array_equal(
            np.frombuffer(bytes(unpacked), frame.dtype).reshape(frame.shape), frame
        )


def test_the_source_must_be_given_and_be_dicom(tmp_path):
    folder, grid = source(tmp_path / "scan")
    io.write(grid, tmp_path / "scan.nii.gz")
    with pytest.raises(BadOutput, match="--source"):
        io.write(phantom(grid), tmp_path / "x.dcm")
    with pytest.raises(BadFile, match=r"scan\.nii\.gz"):
        io.write(phantom(grid), tmp_path / "x.dcm", source=tmp_path / "scan.nii.gz")
    with pytest.raises(BadConfig, match="fractional"):
        io.write(
            phantom(grid),
            tmp_path / "x.dcm",
            source=folder,
            options=DicomOptions(seg_type="fractional"),
        )
    assert not (tmp_path / "x.dcm").exists()


def test_infer_writes_all_results_or_none(tmp_path):
    folder, _ = source(tmp_path / "scan")
    out = tmp_path / "out"
    job = Job(scan=folder, labels=out / "result.dcm")
    (out / "result.sr.dcm").mkdir(parents=True)  # where a file should go

    with pytest.raises(BadOutput):
        infer(job, "otsu", Settings(), Extras(also=("rtstruct", "sr")))

    assert sorted(path.name for path in out.iterdir()) == ["result.sr.dcm"]


def test_infer_refuses_dicom_results_of_what_is_no_dicom_before_any_work(tmp_path):
    _, grid = source(tmp_path / "scan")
    io.write(grid, tmp_path / "scan.nii.gz")
    for name, also in (("x.dcm", ()), ("x.nii.gz", ("rtstruct",))):
        with pytest.raises(BadOutput, match="no DICOM"):
            check_output(Job(scan=tmp_path / "scan.nii.gz", labels=tmp_path / name), also)
    with pytest.raises(BadConfig, match="seg,sr"):
        check_output(Job(scan=tmp_path / "scan", labels=tmp_path / "x.nii.gz"), ("sr",))


def test_a_report_gives_the_volumes_and_dcmqi_reads_it(tmp_path):
    folder, _ = source(tmp_path / "scan", count=8, rows=20, columns=20)
    content = infer(
        Job(scan=folder, labels=tmp_path / "r.dcm"),
        "kmeans",
        Settings(),
        Extras(also=("sr", "rtstruct")),
    )
    subprocess.run(
        [program("tid1500reader"), "--inputDICOM", tmp_path / "r.sr.dcm", "--outputMetadata",
        tmp_path / "r.json"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip

    groups = json.loads((tmp_path / "r.json").read_text())["Measurements"]
    segments = {
        item.SegmentNumber: item for item in pydicom.dcmread(tmp_path / "r.dcm").SegmentSequence
    }
    volumes = {}
    for group in groups:
        (measured,) = group["measurementItems"]
        assert (measured["quantity"]["CodeMeaning"], measured["units"]["CodeValue"]) == (
            "Volume",
            "mL",
        )
        assert group["TrackingUniqueIdentifier"] == segments[group["ReferencedSegment"]].TrackingUID
        volumes[segments[group["ReferencedSegment"]].SegmentLabel] = float(measured["value"])
    assert volumes == {row["name"]: row["ml"] for row in content["structures"] if row["voxels"]}
    assert len(volumes) >= 2
    assert errors(tmp_path / "r.sr.dcm") == []
    report = pydicom.dcmread(tmp_path / "r.sr.dcm")
    assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert pydicom.dcmread(tmp_path / "r.rtstruct.dcm").ApprovalStatus == "UNAPPROVED"


def test_a_report_refers_to_the_segments_of_a_label_map_by_number(tmp_path):
    folder, _ = source(tmp_path / "scan", count=8, rows=20, columns=20)
    extras = Extras(also=("sr",), dicom=DicomOptions(seg_type="labelmap"))
    infer(Job(scan=folder, labels=tmp_path / "r.dcm"), "kmeans", Settings(), extras)

    # PS3.3 has label maps among the segmentations that may be referred to so; dciodvfy does not
    # know them yet.
    unaware = "not segmentation - attribute <ReferencedSegmentNumber>"
    assert [line for line in errors(tmp_path / "r.sr.dcm") if unaware not in line] == []
    report, segments = (
        pydicom.dcmread(tmp_path / "r.sr.dcm"),
        pydicom.dcmread(tmp_path / "r.dcm").SegmentSequence,
    )
    named = [int(e.value) for e in report.iterall() if e.keyword == "ReferencedSegmentNumber"]
    assert named == [item.SegmentNumber for item in segments if item.SegmentNumber]


def test_results_and_source_agree_about_patient_study_and_frame_of_reference(tmp_path):
    folder, _ = source(
        tmp_path / "scan", count=8, rows=20, columns=20, PositionReferenceIndicator="XY"
    )
    infer(
        Job(scan=folder, labels=tmp_path / "r.dcm"),
        "otsu",
        Settings(),
        Extras(also=("sr", "rtstruct")),
    )
    files = [*folder.iterdir(), *tmp_path.glob("*.dcm")]

    ran = subprocess.run(
        [program("dcentvfy"), *files], capture_output=True, text=True, errors="replace", timeout=60
    )

    assert len(files) == 11
    told = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("Error")]
    assert [
        line for line in told if "referenced - 1.2.3.4 " not in line
    ] == []  # a structure set names the study so


def test_names_in_other_scripts_stay_as_they_are(tmp_path):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    folder, grid = source(
        tmp_path / "scan", SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name
    )
    for suffix in (".dcm", ".rtstruct.dcm"):
        io.write(phantom(grid), tmp_path / f"x{suffix}", source=folder)
        assert str(pydicom.dcmread(tmp_path / f"x{suffix}").PatientName) == name
        assert errors(tmp_path / f"x{suffix}") == []


@pytest.mark.parametrize(
    "number", [0.1, -1234.567890123, 1e-9, -0.0, 123456789012345.6, 1 / 3, -1e-7, 1e17]
)
def test_decimal_strings_are_valid_and_close(number):
    words = decimal(number, 9)

    assert len(words) <= 16
    assert abs(float(words) - number) <= max(1e-9, abs(number) * 1e-9)
    assert pydicom.valuerep.DSfloat(words, validation_mode=pydicom.config.RAISE) == float(words)


def test_text_is_what_dicom_can_hold():
    assert text("a\\b\r\nc\x1b ") == "a/b c"
    assert len(text("x" * 99)) == 64


def test_segments_and_structures_are_given_one_by_one(tmp_path):
    folder, grid = source(tmp_path / "scan")
    labels = phantom(grid)
    for name in ("x.dcm", "x.rtstruct.dcm"):
        io.write(labels, tmp_path / name, table=TABLE, source=folder)
    for found in (
        read_segments(tmp_path / "x.dcm"),
        read_structures(tmp_path / "x.rtstruct.dcm", source=folder),
    ):
        assert [label.value for label, _ in found] == [2, 5, 41, 300]
        for label, mask in found:
            assert np.array_equal(mask.data, labels.data == label.value)
    chosen = io.read_labels(tmp_path / "x.dcm", segments=["MASS", "2"])
    assert np.array_equal(chosen.data, np.where(np.isin(labels.data, (2, 41)), labels.data, 0))


def test_the_origin_shows_nothing_of_the_patient(tmp_path):
    folder, _ = source(tmp_path / "scan")

    assert make.NAME not in repr(open_origin(folder))
