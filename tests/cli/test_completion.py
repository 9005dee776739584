"""What fits the words typed so far, and the scripts that ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from making import networks as tiny
from making.places import ROOT
from medseg.cli.completion import FILES, FOLDERS, SCRIPTS, fitting


def words(*typed: str) -> list[str]:
    return [word for word, _ in fitting(typed)]


def test_commands_are_completed_and_explained():
    assert words("in") == ["infer", "info"]
    assert dict(fitting(["ev"])) == {"evaluate": "Score label maps against references"}
    assert "complete" not in words("")
    assert "--version" in words("--")


def test_options_of_the_command_are_completed():
    assert words("infer", "scan.nii.gz", "--prob") == ["--probabilities"]
    assert {"--tta", "--no-tta", "--verbose", "--help"} <= set(words("infer", "--"))


def test_words_of_an_option_are_completed():
    assert words("infer", "--precision", "") == ["auto", "fp32", "bf16", "fp16"]
    assert words("infer", "--precision=f") == ["--precision=fp32", "--precision=fp16"]
    assert words("infer", "--orientation", "L") == ["LPS", "LAS"]
    assert words("completion", "z") == ["zsh"]


def test_models_are_completed_by_name_and_by_folder():
    assert {"brain", "otsu", FOLDERS} <= set(words("infer", "-m", ""))
    assert words("infer", "scan.nii.gz", "--model", "brain-") == ["brain-fast", FOLDERS]


def test_structures_are_those_of_the_model_that_was_named(tmp_path: Path):
    model = str(tiny.save_unet(tmp_path / "model"))
    assert words("infer", "-m", model, "--roi", "") == ["left_body", "right_body"]
    assert words("infer", "-m", model, "--roi", "right_body,l") == ["right_body,left_body"]
    assert "left_hippocampus" in words("infer", "--roi", "left_h")
    assert words("infer", "-m", "nowhere", "--roi", "l") == []


def test_files_are_left_to_the_shell():
    assert words("infer", "sc") == [FILES]
    assert words("infer", "scan.nii.gz", "-o", "") == [FILES]
    assert words("gather", "") == [FILES]
    assert words("infer", "--overlap", "0") == []
    assert words("infer", "--max-memory", "") == []


def test_kinds_of_schemas_are_completed():
    assert words("schema", "rec") == ["record"]


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_the_script_is_one_that_the_shell_can_read(shell: str, tmp_path: Path):
    ran = tiny.medseg("completion", shell)
    assert ran.code == 0
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(ran.out)
    subprocess.run([shell, "-n", script], check=True, timeout=600)


def test_bash_completes_with_the_script(tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "scan one.nii.gz").touch()
    program = tmp_path / "bin" / "medseg"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m medseg "$@"\n')
    program.chmod(0o755)
    lines = [
        "compopt() { :; }",  # outside of a completion there is none
        tiny.medseg("completion", "bash").out,
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _medseg_complete;',
        "        printf '%s\\n' \"${COMPREPLY[@]}\"; echo; }",
        "try medseg cle",
        "try medseg infer --back",
        "try medseg infer sca",
    ]
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert ran.stdout.split("\n\n")[:3] == ["clean", "--backend", "scan one.nii.gz"]


def test_a_shell_that_is_not_known_is_wrong_usage():
    ran = tiny.medseg("completion", "tcsh")
    assert ran.code == 2
    assert "bash" in ran.err
