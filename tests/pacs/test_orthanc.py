"""Against a real PACS: store, query, retrieve, infer, push, and `medseg listen` in between.

Orthanc listens on every address of its machine whatever it is told, so it gets a network of its own
(`unshare -n`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from making import networks as tiny

pytest.importorskip(
    "dicomweb_client", reason="a PACS needs dicomweb-client: pip install medseg[pacs]"
)

from making import orthanc_session
from making.orthanc_session import PLUGIN
from medseg.io import read_labels

#: As root a network namespace needs nothing else; others need a user namespace with it, where that
#: is allowed.
ALONE = ["unshare", "-n"] if os.getuid() == 0 else ["unshare", "-r", "-n"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    for program in ("Orthanc", "unshare", "ip"):
        if not shutil.which(program):
            pytest.skip(
                f"{program} is not installed: apt-get install orthanc orthanc-dicomweb iproute2"
                " util-linux"
            )
    if not PLUGIN.exists():
        pytest.skip("Orthanc has no DICOMweb here: apt-get install orthanc-dicomweb")
    if subprocess.run(
        [*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True, check=False
    ).returncode:
        pytest.skip("a network namespace of its own (unshare -n) is not allowed here")
    folder = tmp_path_factory.mktemp("orthanc")
    command = [*ALONE, sys.executable, orthanc_session.__file__, str(folder)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=tiny.environment(), check=False
    )
    assert ran.returncode == 0, ran.stderr
    return folder, json.loads(ran.stdout.splitlines()[-1])


def test_a_series_is_stored_queried_retrieved_and_segmented(session: tuple[Path, dict[str, Any]]):
    folder, facts = session
    assert facts["stored"] == [0] * 5 and facts["queried"] == 5
    assert facts["retrieved"][0] == 0, facts["retrieved"]
    assert tiny.volume_of(folder / "kept.nii.gz").data.sum() == 5 * 25


def test_results_are_pushed_and_found_again(session: tuple[Path, dict[str, Any]]):
    folder, facts = session
    assert facts["pushed"][0] == 0, facts["pushed"]
    assert [facts[kind] for kind in ("SEG", "RTSTRUCT", "SR")] == [1, 1, 1]
    truth = tiny.volume_of(folder / "kept.nii.gz")
    for kind in ("seg", "rtstruct"):
        labels = read_labels(folder / f"pushed.{kind}.dcm", source=folder / "first")
        assert np.abs(labels.affine - truth.affine).max() < 1e-4
        assert (labels.data == truth.data).all()


def test_a_node_between_receives_segments_and_replies(session: tuple[Path, dict[str, Any]]):
    folder, facts = session
    assert facts["node stored"] == [0] * 6 and facts["node seg"] == "SEG" and facts["node sr"] == 1
    code, out, err = facts["node"]
    assert code == 143 and out == ""
    assert "series 1: 6 instances received" in err and "delivered" in err
    assert read_labels(folder / "replied.seg.dcm", source=folder / "second").data.sum() == 6 * 25


def test_nothing_is_left_behind_and_nothing_told(session: tuple[Path, dict[str, Any]]):
    _, facts = session
    assert facts["left"] == []
    told = json.dumps([facts[part] for part in ("retrieved", "pushed", "node")])
    assert not [secret for secret in facts["secrets"] if secret in told]
