"""Which scans the command line means, what their results are called, and that listing them is
linear.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from medseg.errors import BadConfig, BadFile, BadOutput
from medseg.inference import jobs as jobs_module
from medseg.inference.jobs import given_name, list_jobs

TWO = ("T1", "FLAIR")


def touch(*paths: Path) -> None:
    """Files that are not read here; those called IM1 begin as DICOM does."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM" if path.name == "IM1" else b"x")


def results(inputs: list[Path], output: Path | None, **options: object) -> list[str]:
    return [job.labels.name for job in list_jobs(inputs, output, **options)]  # type: ignore[arg-type]


# Links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["sub-01_T1w.nii.gz", "scan.mha", "scan.v2.nrrd"])
def test_a_result_is_called_like_the_link_and_not_like_what_it_leads_to(tmp_path: Path, given: str):
    """As DataLad and git-annex keep files: under the hash of their content."""
    target = (
        tmp_path
        / ".git"
        / "annex"
        / "objects"
        / "MD5E-s12--0cc175b9c0f1b6a831c399e269772661.nii.gz"
    )
    touch(target)
    link = tmp_path / given
    link.symlink_to(target)
    stem = given_name(link)
    assert given.startswith(f"{stem}.")
    for inputs in ([link], [tmp_path]):
        (job,) = list_jobs(inputs, None)
        assert job.labels == tmp_path / f"{stem}_seg.nii.gz"


def test_a_link_to_a_folder_of_dicom_names_the_result(tmp_path: Path):
    touch(tmp_path / "1.2.840" / "IM1")
    (tmp_path / "patient_b").symlink_to(tmp_path / "1.2.840")
    assert results([tmp_path / "patient_b"], tmp_path / "out") == ["patient_b_seg.nii.gz"]


def test_the_folder_one_is_in_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path / "study" / "IM1")
    monkeypatch.chdir(tmp_path / "study")
    assert results([Path()], tmp_path / "out") == ["study_seg.nii.gz"]


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_link_to_what_was_not_fetched_is_the_failure_of_that_scan(tmp_path: Path, others: int):
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    touch(*(tmp_path / f"b{n}.nii.gz" for n in range(others)))
    if not others:
        with pytest.raises(BadFile, match="link to a file that is not there; fetch it first"):
            list_jobs([tmp_path], None)
        return
    jobs = list_jobs([tmp_path], None)
    assert [job.scan.name for job in jobs if job.problem] == ["a.nii.gz"]
    assert len(jobs) == others + 1


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.v2", "run.2024-05", "T1.anat", "0.5mm", "a.b.c"])
def test_a_name_with_a_dot_that_no_format_has_is_a_folder(tmp_path: Path, name: str):
    touch(tmp_path / "scan.nii.gz")
    (job,) = list_jobs([tmp_path / "scan.nii.gz"], tmp_path / name)
    assert job.labels == tmp_path / name / "scan_seg.nii.gz"


@pytest.mark.parametrize("name", ["labels.nii.gz", "x.png", "out.dcm"])
def test_a_folder_that_is_there_is_one_whatever_its_name(tmp_path: Path, name: str):
    touch(tmp_path / "scan.nii.gz")
    (tmp_path / name).mkdir()
    (job,) = list_jobs([tmp_path / "scan.nii.gz"], tmp_path / name)
    assert job.labels == tmp_path / name / "scan_seg.nii.gz"
    (job,) = list_jobs([tmp_path / "scan.nii.gz"], tmp_path / "new.nii.gz", is_folder=True)
    assert job.labels == tmp_path / "new.nii.gz" / "scan_seg.nii.gz"


@pytest.mark.parametrize("name", ["out.nrdd", "out.nifti", "out.tiff", "labels.nii.bz2", "out.ni"])
def test_what_may_be_a_slip_or_another_format_is_refused_and_not_made_a_folder(
    tmp_path: Path, name: str
):
    touch(tmp_path / "scan.nii.gz")
    with pytest.raises(BadOutput, match=r"does not write this format.*end its name with /"):
        list_jobs([tmp_path / "scan.nii.gz"], tmp_path / name)


@pytest.mark.parametrize("name", ["patient.1", "scan.nii", "study.zip"])
def test_the_name_of_a_folder_of_dicom_is_kept_whole(tmp_path: Path, name: str):
    touch(tmp_path / name / "IM1")
    assert results([tmp_path / name], tmp_path / "out") == [f"{name}_seg.nii.gz"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "dataset.json"),
            "1 in imagesTr, 1 in labelsTr.*e.g. .*imagesTr",
        ),
        (
            ("sub-1/anat/T1w.nii.gz", "sub-2/anat/T1w.nii.gz", "README"),
            "1 in sub-1/anat, 1 in sub-2/anat",
        ),
        (("a.jpg", "b.jpg", "notes.txt"), "2 with .jpg, 1 with .txt"),
    ],
)
def test_a_folder_without_scans_is_told_what_it_holds(
    tmp_path: Path, files: tuple[str, ...], words: str
):
    touch(*(tmp_path / file for file in files))
    with pytest.raises(BadFile, match=words):
        list_jobs([tmp_path], None)


def test_a_folder_with_dicom_somewhere_is_left_to_the_reader_of_dicom(tmp_path: Path):
    touch(tmp_path / "export" / "label.nii.gz")
    (tmp_path / "export" / "1.2.840.55").write_bytes(b"\0" * 128 + b"DICM")
    assert [job.scan for job in list_jobs([tmp_path], None)] == [tmp_path]


def test_hidden_files_are_no_scans(tmp_path: Path):
    touch(tmp_path / "a.nii.gz", tmp_path / "._a.nii.gz", tmp_path / ".medseg-1.nii.gz")
    assert [job.scan.name for job in list_jobs([tmp_path], None)] == ["a.nii.gz"]


# Scans of one name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("one/scan.nii.gz", "two/scan.nii.gz"), ("one_scan", "two_scan")),
        (("s1/ct/img.nii", "s2/ct/img.mha", "other.nii"), ("s1_ct_img", "s2_ct_img", "other")),
        (("a/x_0000.nii.gz", "b/x_0000.nii.gz"), ("a_x", "b_x")),
    ],
)
def test_scans_of_one_name_get_the_names_of_their_folders(
    tmp_path: Path, files: tuple[str, ...], names: tuple[str, ...]
):
    inputs = [tmp_path / file for file in files]
    touch(*inputs)
    assert results(inputs, tmp_path / "out") == [f"{name}_seg.nii.gz" for name in names]
    beside = [job.labels.parent for job in list_jobs(inputs, None)]
    assert beside == [file.parent for file in inputs]


def test_folders_of_dicom_of_one_name_get_the_names_of_those_above(tmp_path: Path):
    inputs = [tmp_path / patient / "CT" for patient in ("p1", "p2")]
    touch(*(folder / "IM1" for folder in inputs))
    assert results(inputs, tmp_path / "out") == ["p1_CT_seg.nii.gz", "p2_CT_seg.nii.gz"]


def test_a_longer_name_that_another_scan_has_is_not_taken(tmp_path: Path):
    inputs = [
        tmp_path / "a/one/scan.nii",
        tmp_path / "b/two/scan.nii",
        tmp_path / "three" / "one_scan.nii",
    ]
    touch(*inputs)
    names = [f"{name}_seg.nii.gz" for name in ("a_one_scan", "b_two_scan", "one_scan")]
    assert results(inputs, tmp_path / "out") == names


def test_scans_of_one_name_in_one_folder_are_refused(tmp_path: Path):
    touch(tmp_path / "scan.nii", tmp_path / "scan.mha", tmp_path / "other.nii")
    for output in (None, tmp_path / "out"):
        with pytest.raises(BadConfig, match="two scans would both be written"):
            list_jobs([tmp_path], output)


def test_a_scan_that_is_named_twice_is_done_once(tmp_path: Path):
    touch(tmp_path / "a.nii", tmp_path / "b.nii")
    assert results([tmp_path, tmp_path / "a.nii"], tmp_path / "out") == [
        "a_seg.nii.gz",
        "b_seg.nii.gz",
    ]


# Channels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("hippo_1_0000.nii.gz", "hippo_2_0000.nii.gz"), ("hippo_1", "hippo_2")),
        (("case_0000.nii", "case_0001.nii"), ("case_0000", "case_0001")),
        (("a_0000.nii", "a.nii"), ("a", "a_0000")),
        (("a_0000.nii", "a_0003.mha"), ("a_0000", "a_0003")),
        (("a_0001.nii",), ("a_0001",)),
        (("x_0000_0000.nrrd",), ("x_0000",)),
    ],
)
def test_the_first_channels_number_is_left_out_only_where_it_is_no_number_of_the_case(
    tmp_path: Path, files: tuple[str, ...], names: tuple[str, ...]
):
    touch(*(tmp_path / file for file in files))
    expected = [f"{name}_seg.nii.gz" for name in names]
    assert sorted(results([tmp_path], None)) == sorted(expected)
    one_by_one = [results([tmp_path / file], None)[0] for file in sorted(files)]
    assert sorted(one_by_one) == sorted(expected)


def test_what_a_case_lacks_is_its_own_failure_among_several(tmp_path: Path):
    touch(
        tmp_path / "a_0000.nii",
        tmp_path / "a_0001.nii",
        tmp_path / "b_0000.nii",
        tmp_path / "c_0000.nii",
    )
    touch(tmp_path / "c_0001.nii", tmp_path / "c_0001.mha", tmp_path / "d_0000.nii")
    (tmp_path / "d_0001.nii").symlink_to(tmp_path / "gone")
    jobs = {job.labels.name: job.problem for job in list_jobs([tmp_path], None, names=TWO)}
    assert list(jobs) == [f"{case}_seg.nii.gz" for case in "abcd"]
    assert jobs["a_seg.nii.gz"] is None
    assert "b_0001 (FLAIR) is not there" in str(jobs["b_seg.nii.gz"])
    assert "same channel of the same case" in str(jobs["c_seg.nii.gz"])
    assert "not there; fetch it first" in str(jobs["d_seg.nii.gz"])


@pytest.mark.parametrize("missing", ["b.nii.gz", "no/folder/b.mha", "x" * 300 + ".nii"])
def test_a_file_that_is_not_there_is_its_own_failure_among_several(tmp_path: Path, missing: str):
    touch(tmp_path / "a.nii.gz")
    for names in (("",), TWO):
        jobs = list_jobs([tmp_path / "a.nii.gz", tmp_path / missing], None, names=names)
        assert [job.problem is None for job in jobs] == [True, False]
        assert "no such file" in str(jobs[1].problem)


@pytest.mark.parametrize("channels", [1, 2])
def test_listing_looks_at_every_folder_once_and_at_every_file_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int
):
    """What is done for a scan must not grow with the number of scans beside it."""
    counts: Counter[str] = Counter()

    def counted(name: str, function):
        def call(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return call

    for name in ("scandir", "lstat", "stat"):
        monkeypatch.setattr(jobs_module.os, name, counted(name, getattr(os, name)))
    for name in ("realpath", "islink", "exists", "isdir"):
        monkeypatch.setattr(jobs_module.os.path, name, counted(name, getattr(os.path, name)))
    monkeypatch.setattr(
        jobs_module, "strip_suffix", counted("strip_suffix", jobs_module.strip_suffix)
    )
    per_scan = []
    for number in (50, 400):
        folder = tmp_path / str(number)
        touch(*(folder / f"c{n}_{c:04d}.nii" for n in range(number) for c in range(channels)))
        counts.clear()
        jobs = list_jobs([folder], tmp_path / "out", names=("",) * channels)
        assert len(jobs) == number
        assert counts["scandir"] == 1
        per_scan.append(sum(counts.values()) / number)
    assert per_scan[1] <= per_scan[0]
