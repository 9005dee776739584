"""`medseg serve` as a process: it begins, says where it is, and ends cleanly; the public client of
MONAI Label drives it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from making import networks as tiny
from making.serving import save_scans


@contextmanager
def started(studies: Path, *words: object, place: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The server of a folder, as a process with temporary files in `place`; its address."""
    place.mkdir(exist_ok=True)
    command = ("-m", "medseg", "serve", studies, "--port", "0", *words)
    with tiny.start(*command, env=tiny.environment() | {"TMPDIR": str(place)}) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            match = re.search(r"http://\S+", line)
            assert match, line + child.stderr.read()
            yield match[0], child
        finally:
            child.kill()


def test_it_says_where_it_is_and_ends_cleanly(tmp_path: Path):
    studies = save_scans(tmp_path / "studies", "a")
    with started(studies, "-m", "otsu", place=tmp_path / "tmp") as (address, child):
        with urllib.request.urlopen(f"{address}/info/", timeout=600) as answer:
            assert json.load(answer)["datastore"]["total"] == 1
        assert list((tmp_path / "tmp").iterdir())  # the private folder
        child.send_signal(signal.SIGTERM)
        _, stderr = child.communicate(timeout=600)
    assert child.returncode == 143
    assert stderr.splitlines() == ["medseg: stopped; nothing was left half-written"]
    assert list((tmp_path / "tmp").iterdir()) == []


def children_of(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(one) for file in files for one in file.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_its_training_ends_with_it(tmp_path: Path):
    studies = save_scans(tmp_path / "studies", "a")
    scan = tiny.volume_of(studies / "a.nii.gz")
    labels = tiny.save_nifti(
        tmp_path / "l.nii.gz", np.ones(scan.shape, np.uint8), np.array(scan.affine)
    )
    model = tiny.save_unet(tmp_path / "organs")
    with started(studies, "-m", model, place=tmp_path / "tmp") as (address, child):
        info = json.dumps({"label_info": [{"name": "left body"}]})
        answer = httpx.put(
            f"{address}/datastore/label?image=a", timeout=600,
            files={"label": ("l.nii.gz", labels.read_bytes()), "params": (None, info)},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        assert httpx.post(f"{address}/train/tiny", json={}, timeout=600).status_code == 200
        (training,) = children_of(child.pid)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=600)
    assert child.returncode == 143
    assert not Path(f"/proc/{training}").exists()


def test_a_port_that_is_taken_and_an_address_of_others_are_told(tmp_path: Path):
    studies = save_scans(tmp_path / "studies", "a")
    with started(studies, "-m", "otsu", place=tmp_path / "tmp") as (address, _):
        port = address.rpartition(":")[2]
        second = tiny.medseg("serve", studies, "-m", "otsu", "--port", port)
    assert second.code == 5 and "choose another --port" in second.err
    assert tiny.medseg("serve", studies, "--host", "0.0.0.0").code == 5


def test_the_public_client_is_content(shared_data: Path, tmp_path: Path):
    pytest.importorskip("monailabel.client")
    pytest.importorskip("requests")
    program = shared_data / "interop_monai" / "monailabel" / "client_check.py"
    studies = save_scans(tmp_path / "studies", "a", "b")
    model = tiny.save_unet(tmp_path / "organs")
    with started(studies, "-m", model, place=tmp_path / "tmp") as (address, _):
        command = [sys.executable, "-W", "ignore", program, address, studies, "tiny"]
        ran = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=600, check=False
        )
    lines = ran.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok")] == [], ran.stderr
    assert ran.returncode == 0 and len(lines) >= 64
