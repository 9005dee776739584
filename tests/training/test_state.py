"""What a run leaves where it could not write to the end, and where it cannot write at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from making import networks as tiny, phantoms
from medseg.errors import BadOutput
from medseg.training import state
from medseg.training.scans import ScanSource
from medseg.training.state import append_line, locked, save_run, truncate_metrics


def test_a_line_of_metrics_that_was_cut_off_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "validation": {"a": 0.5}}]
    append_line(path, rows)
    cut = '{"step": 3, "validation_dice": 0.5, "validation": {"a": 0.5}'
    for end in (cut, "\0" * 40, '{"loss": 1.0}'):
        append_line(path, rows)
        with path.open("a") as file:
            file.write(end)
        truncate_metrics(path, 9)
        assert {*map(json.dumps, rows)} == set(path.read_text().splitlines())


def test_where_a_run_cannot_write_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BadOutput, match=r"metrics\.jsonl: cannot be written"):
        append_line(tmp_path / "gone" / "metrics.jsonl", [{"step": 1}])
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(BadOutput, match="lock: cannot be written"),
        locked(tmp_path, SimpleNamespace(first=True)),  # type: ignore[arg-type]
    ):
        pass
    save_run(tmp_path, {"step": 1}, {"a": torch.zeros(2)})

    def full(path: Path, copy: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "link_or_copy", full)
    with pytest.raises(BadOutput, match=r"before\.safetensors: cannot be written: the disk is"):
        save_run(tmp_path, {"step": 2}, {"a": torch.ones(2)})
    assert state.load_state(tmp_path / "state.safetensors")[1] == {"step": 1}


def test_a_run_folder_that_cannot_be_one_is_refused_in_a_sentence(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data")
    (tmp_path / "file").write_text("no folder")
    for run, words in (("file", "is a file; give a folder"), ("file/run", "cannot be written")):
        ran = tiny.medseg("train", data, "-o", tmp_path / run)
        assert ran.code == BadOutput.exit_code
        assert words in ran.err
        assert "please report" not in ran.err
    assert (tmp_path / "file").read_text() == "no folder"


def test_prepared_scans_are_deleted_and_what_else_lies_there_ends_no_run(tmp_path: Path):
    source = ScanSource.__new__(ScanSource)
    source.store, source._prepared = tmp_path / "prepared", None
    for kept in (".nfs0001", ""):
        source.store.mkdir(exist_ok=True)
        for name in filter(None, ("a.image.npy", kept)):
            (source.store / name).write_bytes(b"1")
        source.discard()
        assert not list(source.store.glob("*.npy"))
        (source.store / ".nfs0001").unlink(missing_ok=True)
    assert not source.store.exists()
