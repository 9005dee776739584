"""Who types what another tool calls it is told in one sentence how it is done here."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from making import networks as tiny
from medseg.cli.app import make_app
from medseg.cli.words import COMMANDS, OPTIONS


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("predict -i in -o out", "medseg infer SCAN"),
        ("segment scan.nii.gz", "medseg infer SCAN"),
        ("nnUNetv2_predict -i in -o out -d 3 -c 3d_fullres", "medseg infer SCAN"),
        ("nnUNet_predict -i in", "medseg infer SCAN"),
        ("TotalSegmentator -i ct.nii.gz", "medseg infer SCAN"),
        ("mri_synthseg --i a.nii.gz", "medseg infer SCAN"),
        ("mri_synthstrip -i a.nii.gz", "--also stripped"),
        ("plan_and_preprocess -d 3", "medseg train DATASET"),
        ("nnUNetv2_plan_and_preprocess -d 3", "medseg train DATASET"),
        ("nnUNetv2_train 3 3d_fullres 0", "medseg train DATASET"),
        ("nnUNetv2_evaluate_folder a b", "medseg evaluate REFERENCE PREDICTION"),
        ("eval a b", "medseg evaluate REFERENCE PREDICTION"),
        ("mri_convert a b", "medseg convert INPUT OUTPUT"),
        ("dcm2niix folder", "medseg convert INPUT OUTPUT"),
        ("download brain", "nothing is downloaded"),
        ("help", "--help"),
        ("Infer scan.nii.gz", "medseg infer"),
        ("scan.nii.gz", "medseg infer scan.nii.gz"),
        ("-i scan.nii.gz", "medseg infer SCAN"),
        ("-m brain scan.nii.gz", "medseg infer SCAN"),
        ("--model=brain scan.nii.gz", "medseg infer SCAN"),
        ("structures", "medseg info MODEL"),
        ("totalseg_import_weights", "nothing is downloaded"),
        ("--input=scan.nii.gz -o x", "medseg infer SCAN"),
        ("infer -i scan.nii.gz -o out", "medseg infer SCAN"),
        ("infer --input scan.nii.gz", "medseg infer SCAN"),
        ("infer --i scan.nii.gz --o out --parc", "medseg infer SCAN"),
        ("infer scan.nii.gz --o out", "-o or --output"),
        ("infer scan.nii.gz --parc", "medseg models"),
        ("infer scan.nii.gz --robust", "any contrast"),
        ("infer scan.nii.gz --task total", "-m MODEL"),
        ("infer scan.nii.gz -ta total", "-m MODEL"),
        ("infer scan.nii.gz --fast", "brain-fast"),
        ("infer scan.nii.gz --ml", "one label map"),
        ("infer scan.nii.gz -ml", "one label map"),
        ("infer scan.nii.gz --roi_subset liver spleen", "--roi liver,spleen"),
        ("infer scan.nii.gz -rs liver", "--roi liver,spleen"),
        ("infer scan.nii.gz -ot nifti", "suffix"),
        ("infer scan.nii.gz --statistics", "--also volumes"),
        ("infer scan.nii.gz --save_probabilities", "--probabilities"),
        ("infer scan.nii.gz --disable_tta", "--no-tta"),
        ("infer scan.nii.gz -chk checkpoint_best.pth", "--checkpoint"),
        ("infer scan.nii.gz -step_size 0.5", "--overlap"),
        ("infer scan.nii.gz --skip_existing", "--skip-existing"),
        ("infer scan.nii.gz --Device cpu", "--device"),
        ("batch scans -i x", "medseg batch SCAN"),
        ("train -d 3", "medseg train DATASET"),
        ("train data --epochs 100", "--time"),
        ("train data --lr 0.1", "train.learning_rate"),
        ("evaluate --gt a --pred b", "medseg evaluate REFERENCE PREDICTION"),
        ("view --input a", "without an option"),
        ("convert -i a -o b", "without an option"),
    ],
)
def test_the_answer_is_one_sentence_and_wrong_usage(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    ran = tiny.medseg(*line.split())
    assert (ran.code, ran.out) == (2, "")
    (sentence,) = ran.err.splitlines()
    assert sentence.startswith("medseg: ")
    assert told in sentence


def test_no_word_of_another_tool_hides_one_of_ours():
    commands = get_command(make_app()).commands  # type: ignore[attr-defined]
    assert not COMMANDS.keys() & commands.keys()
    assert OPTIONS.keys() <= commands.keys()


def test_a_value_that_looks_like_a_word_of_another_tool_is_a_value(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg("view", scan, "--title", "--fast")
    assert "there is no" not in ran.err
    assert "is no option" not in ran.err


def test_options_that_nobody_knows_are_refused_as_ever():
    ran = tiny.medseg("infer", "x.nii.gz", "--colour", "red")
    assert ran.code == 2
    assert "--colour" in ran.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("infer", ""), "a word after infer is empty"),
        (("infer", "--", ""), "a word after infer is empty"),
        (("infer", "scan.nii.gz", "-o", ""), "the value of -o is empty"),
        (("infer", "scan.nii.gz", "--output="), "the value of --output is empty"),
        (("infer", "scan.nii.gz", "-m", ""), "the value of -m is empty"),
        (("evaluate", "", ""), "a word after evaluate is empty"),
        (("convert", "scan.nii.gz", ""), "a word after convert is empty"),
    ],
)
def test_an_empty_word_is_not_the_folder_one_is_in(
    words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A variable of the shell that is not set gives one."""
    monkeypatch.chdir(tmp_path)
    tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"medseg: {told}; is a variable of the shell not set?\n"
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_an_option_that_is_empty_by_itself_may_be_given_so(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    assert tiny.medseg("infer", scan, "-m", "otsu", "--also", "").code == 0
    assert tiny.medseg("complete", "--", "infer", "").code == 0
