"""The note about a face: there where one is, not where there is none, whatever the orientation."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from medseg.io import read_labels
from medseg.labels import Label, LabelTable
from medseg.models.folder import BUNDLED
from medseg.postprocess import face
from medseg.volume import Volume, reorient

TABLE = LabelTable(
    (Label(3, "left cerebral cortex", (1, 2, 3)), Label(42, "right cerebral cortex", (3, 2, 1)))
)
SHAPE = (70, 90, 80)


def head(
    *, nose: bool = True, skull: bool = True, air: float = 0, noise: float = 0
) -> tuple[Volume, Volume]:
    """A scan of 3 mm voxels to RAS, and its labels: a brain, a skull around it, and a face below
    its front.
    """
    brain = tiny.ellipsoid(SHAPE, (35, 42, 50), (23, 30, 22))
    brain &= np.arange(SHAPE[2]) > 38  # a flat underside
    image = np.where(brain, 100.0, 0)
    if skull:
        image[
            tiny.ellipsoid(SHAPE, (35, 42, 50), (27, 34, 26)) & ~brain & (np.arange(SHAPE[2]) > 40)
        ] = 60
    if nose:
        image[tiny.ellipsoid(SHAPE, (35, 66, 28), (14, 12, 11)) & ~brain] = 80
    image += air + np.abs(np.random.default_rng(0).normal(0, noise, SHAPE))
    affine = tiny.affine_of((3.0, 3.0, 3.0), (-100, -120, -90))
    sides = np.where(np.arange(SHAPE[0]) < 35, 3, 42)[:, None, None]
    return Volume(image.astype(np.float32), affine), Volume(
        (brain * sides).astype(np.uint8), affine
    )


@pytest.mark.parametrize(
    "look", [{}, {"air": -1000}, {"noise": 5}], ids=["MR", "air at -1000", "noise"]
)
def test_a_head_with_a_face_is_noticed(look: dict):
    assert face.shows_face(*head(**look), TABLE)


@pytest.mark.parametrize(
    "look",
    [
        {"nose": False},
        {"nose": False, "skull": False},
        {"nose": False, "noise": 5},
        {"nose": False, "air": -1000},
    ],
    ids=["defaced", "skull-stripped", "noise", "air at -1000"],
)
def test_a_head_without_a_face_is_not(look: dict):
    assert face.face_ml(*head(**look), TABLE) < face.MIN_FACE_ML / 2


def test_a_scan_that_ends_above_the_eyes_shows_no_face():
    scan, labels = head()
    up = slice(39, None)
    assert not face.shows_face(
        Volume(scan.data[..., up], scan.affine), Volume(labels.data[..., up], scan.affine), TABLE
    )


def test_how_the_scan_is_stored_does_not_matter():
    scan, labels = head()
    expected = face.face_ml(scan, labels, TABLE)
    codes = [
        "".join(code) for order in permutations(("LR", "PA", "IS")) for code in product(*order)
    ]
    assert len(codes) == 48
    for code in codes:  # thinning out may keep other voxels
        assert face.face_ml(reorient(scan, code), reorient(labels, code), TABLE) == pytest.approx(
            expected, rel=0.1
        )


def test_without_a_brain_nothing_is_said():
    scan, labels = head()
    assert not face.shows_face(
        scan, labels, LabelTable((Label(3, "liver", (1, 2, 3)), Label(42, "spleen", (3, 2, 1))))
    )
    assert not face.shows_face(scan, labels.with_data(labels.data * 0), TABLE)


def test_infer_puts_the_note_into_the_record_and_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the rule standing on its head; notebook 03 asserts the rule itself after the real
    network.
    """
    monkeypatch.setattr(face, "shows_face", lambda scan, labels, table: True)
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    ran = tiny.medseg("infer", scan, "-m", "otsu", "-o", tmp_path / "out.nii.gz")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out.json").read_text())["notes"] == [face.NOTE]
    assert f"note: {scan}: {face.NOTE}" in ran.err
    assert json.loads((tmp_path / "out.json").read_text())["warnings"] == []


def test_infer_says_nothing_of_a_face_about_other_scans(tmp_path: Path):
    scan = tiny.save_scan(tmp_path / "scan.nii.gz")
    assert tiny.medseg("infer", scan, "-m", "otsu", "-o", tmp_path / "out.nii.gz").code == 0
    assert json.loads((tmp_path / "out.json").read_text())["notes"] == []


def test_a_real_skull_stripped_scan_shows_no_face(shared_data: Path):
    content = np.load(shared_data / "brain_scans" / "test_scan.npz")
    # Stored as (L, I, A).
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    stripped, labels = (
        Volume(content["vol"], affine),
        Volume(content["seg"].astype(np.uint16), affine),
    )
    table = LabelTable.read(BUNDLED / "brain" / "labels.csv")
    assert face.face_ml(stripped, labels, table) == 0


def test_real_heads_show_faces_and_their_brains_alone_do_not(shared_data: Path):
    table = LabelTable.read(BUNDLED / "brain" / "labels.csv")
    for number in ("04", "11", "20"):
        labels = read_labels(shared_data / "brain_label_maps" / f"training_seg_{number}.nii.gz")
        scan = Volume((labels.data > 0).astype(np.uint8), labels.affine)
        alone = scan.with_data(
            np.isin(labels.data, [label.value for label in table.labels]).astype(np.uint8)
        )
        assert face.shows_face(scan, labels, table)
        assert not face.shows_face(alone, labels, table)
