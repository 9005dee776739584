"""What a scan is, where that is certain; which model it gets, and which is refused for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from making import networks as tiny
from making.ct import grid, legs, trunk
from medseg.errors import BadConfig
from medseg.inference import look as look_module
from medseg.inference.jobs import Extras, Job
from medseg.inference.look import (
    Head,
    Seen,
    bundled_brain,
    choose,
    fitting,
    has_room,
    is_hounsfield,
    is_noise,
    look,
    look_for_head,
    modality_of,
    refusal,
    upper_part,
)
from medseg.inference.settings import Settings
from medseg.inference.untrained import AUTO
from medseg.io import read, write
from medseg.models import load_models
from medseg.volume import Volume, resample

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
FOUND = Head(is_brain=True, is_likely=True, is_none=False, doubts=())
UNSURE = Head(is_brain=False, is_likely=False, is_none=False, doubts=("odd",))
NONE = Head(is_brain=False, is_likely=False, is_none=True, doubts=("none",))


def body(spacing: float = 5.0) -> Volume:
    affine, shape = grid(
        low_mm=(-200, -160, -100), high_mm=(200, 140, 100), spacing_mm=(spacing,) * 3
    )
    return trunk(affine, shape, noise=15).scan


def job_of(path: Path) -> Job:
    return Job(scan=path, labels=path.with_name("labels.nii.gz"))


def test_hounsfield_units_are_known_by_air_fat_and_soft_tissue():
    affine, shape = grid(low_mm=(-190, -100, 0), high_mm=(190, 100, 60), spacing_mm=(5, 5, 5))
    assert is_hounsfield(body())
    assert is_hounsfield(legs(affine, shape, noise=20).scan)
    padded = body()
    assert is_hounsfield(padded.with_data(np.where(padded.data < -990, -3024, padded.data)))


@pytest.mark.parametrize(
    "other",
    ["offset", "MR", "z-scores", "MR from -1000", "MR to -1000 and 1000", "no air", "noise", "nan"],
)
def test_other_values_are_not_taken_for_hounsfield_units(other: str):
    ct, random = body().data.astype(np.float32), np.random.default_rng(0)
    # As MR: dark air, bright fat, tissue between, noise.
    mr = np.select([ct < -700, ct < -20, ct < 100], [10.0, 900.0, 420.0], 60.0)
    mr += np.abs(random.normal(0, 25, ct.shape))
    data = {
        "offset": ct + 1024,
        "MR": mr,
        "z-scores": (mr - mr.mean()) / mr.std(),
        "MR from -1000": mr - 1000,
        "MR to -1000 and 1000": np.interp(mr, (0, 1000), (-1000, 1000)),
        "no air": ct[34:46, 20:26, 8:16],
        "noise": random.normal(-200, 400, ct.shape),
        "nan": np.full(ct.shape, np.nan),
    }[other]
    assert not is_hounsfield(Volume(data.astype(np.float32), np.eye(4)))


def test_the_modality_that_dicom_says_is_believed(shared_data: Path):
    for kind, code in (("CT", "CT"), ("MR_T1", "MR"), ("PET", "PT")):
        folder = shared_data / "rtstruct" / "STS_002" / "dicom" / kind / "image"
        assert modality_of(job_of(folder), body(), Extras()) == code


@pytest.mark.parametrize(
    ("seen", "chosen"),
    [
        (Seen(modality="CT"), "ct-tissues"),
        (Seen(modality="", head=FOUND), "brain"),
        (Seen(modality="MR", head=FOUND), "brain"),
        (Seen(modality="MR", head=UNSURE), ""),
        (Seen(modality="", head=NONE), ""),
        (Seen(modality="PT"), ""),
    ],
)
def test_a_model_is_chosen_only_where_it_is_certain(seen: Seen, chosen: str):
    if chosen:
        assert choose(seen) == chosen
        return
    with pytest.raises(BadConfig, match=r"brain\).*ct-tissues\).*-m") as refused:
        choose(seen)
    assert refused.value.exit_code == 5


def test_brain_is_refused_for_ct_and_for_scans_without_a_head_and_for_nothing_else():
    brain = load_models(["brain"])
    assert "CT" in refusal(Seen(modality="CT"), brain)
    assert "no head" in refusal(Seen(modality="MR", head=NONE), brain)
    for seen in (
        Seen(modality=""),
        Seen(modality="MR", head=UNSURE),
        Seen(modality="PT"),
        Seen(modality="", head=FOUND),
    ):
        assert refusal(seen, brain) == ""
    assert Seen(modality="PT").doubts(brain) and not Seen(modality="MR", head=FOUND).doubts(brain)


def test_models_of_others_are_asked_nothing(tmp_path: Path):
    own = load_models([str(tiny.save_unet(tmp_path / "m"))])
    for model in ("otsu", "ct-tissues", own, [*load_models(["brain"]), *own]):
        assert bundled_brain(model) == ""
        assert fitting(job_of(tmp_path / "x.nii"), [body()], model, Settings(), Extras()) == (
            model,
            None,
        )


def test_the_look_costs_nothing_where_it_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(look_module, "look_for_head", None)  # never reached
    small = Volume(np.ones((20, 20, 20), np.float32), np.eye(4))
    large = Volume(np.ones((30, 30, 30), np.float32), np.diag([6.0, 6, 6, 1]))
    assert has_room(large) and not has_room(small)
    job = job_of(tmp_path / "x.nii")
    for model, scan in (
        (AUTO, body()),
        (load_models(["brain-fast"]), large),
        (load_models(["brain"]), small),
    ):
        assert look(job, [scan], model, Settings(), Extras()).head is None


def test_a_head_is_found_and_none_in_noise_and_none_where_there_is_no_room():
    head = look_for_head(read(ROOT / "sample_volumes" / "head_t1.nii.gz"), Settings())
    assert head.is_brain and head.is_likely and not head.is_none and not head.doubts
    random = np.random.default_rng(0)
    noise = Volume(random.normal(100, 20, (40, 40, 40)).astype(np.float32), np.diag([4.0, 4, 4, 1]))
    assert look_for_head(noise, Settings()).is_none
    small = Volume(noise.data[:20], noise.affine)
    found = look_for_head(small, Settings())
    assert not found.is_none and not found.is_brain


def test_infer_without_a_model_labels_ct_by_rules(tmp_path: Path):
    write(body(), tmp_path / "ct.nii.gz")
    ran = tiny.medseg("infer", tmp_path / "ct.nii.gz", "--json", "-q")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["model"] == {"name": "ct-tissues"}
    assert record["seen"] == {"modality": "CT", "head": None} and record["doubts"] == []
    again = tiny.medseg("infer", tmp_path / "ct.nii.gz", "--skip-existing", "--strict")
    assert again.code == 0 and "skipped" in again.err


def test_infer_without_a_model_says_what_it_sees_where_nothing_fits(tmp_path: Path):
    random = np.random.default_rng(0)
    scan = Volume(random.normal(100, 20, (16, 18, 20)).astype(np.float32), np.eye(4))
    write(scan, tmp_path / "what.nii.gz")
    ran = tiny.medseg("infer", tmp_path / "what.nii.gz", "-q")
    assert ran.code == 5 and ran.err.count("\n") == 1
    assert "what.nii.gz" in ran.err and "ct-tissues" in ran.err and "-m" in ran.err
    assert not list(tmp_path.glob("*_seg*"))


def test_what_is_no_image_is_told_with_its_name(tmp_path: Path):
    write(Volume(np.ones((20, 20, 20), np.int16), np.eye(4)), tmp_path / "flat.nii.gz")
    ran = tiny.medseg("infer", tmp_path / "flat.nii.gz", "-q")
    assert ran.code in (3, 5) and "flat.nii.gz" in ran.err and ran.err.count("\n") == 1


def test_a_brain_model_on_ct_is_refused_unless_forced_and_strict_tells_by_its_code(tmp_path: Path):
    ct = body()
    piece = Volume(ct.data[30:50, :24, 10:30].copy(), ct.affine)
    assert is_hounsfield(piece)
    write(piece, tmp_path / "ct.nii.gz")
    command = ("infer", tmp_path / "ct.nii.gz", "-m", "brain-fast", "-q")
    ran = tiny.medseg(*command)
    assert ran.code == 5 and ran.err.count("\n") == 1 and "--force" in ran.err
    assert "ct-tissues" in ran.err and not list(tmp_path.glob("*_seg*"))
    ran = tiny.medseg(*command, "--force", "--json", "--strict")
    assert ran.code == 8, ran.err
    record = json.loads(ran.out)
    assert record["seen"] == {"modality": "CT", "head": None, "forced": True}
    assert "by force" in record["doubts"][0] and record["doubts"][0] in record["warnings"]


def test_who_asks_for_what_only_a_brain_has_means_brain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(body(), tmp_path / "ct.nii.gz")
    for more in (("--roi", "5"), ("--also", "brain-mask"), ("--probabilities", "17")):
        ran = tiny.medseg("infer", tmp_path / "ct.nii.gz", "-q", *more)
        assert ran.code == 5 and "brain knows MR alone" in ran.err


SIZE_MM = np.array([160.0, 192.0, 160.0])


def head_on_a_neck(affine: np.ndarray, shape: tuple[int, int, int]) -> tuple[Volume, np.ndarray]:
    """A bright ball of 85 mm around (10, 5, 60), a neck below it; and where the ball is."""
    at = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    ball = ((at - (10, 5, 60)) ** 2).sum(-1) < 65**2
    neck = (((at - (10, 5, 60)) ** 2)[..., :2].sum(-1) < 50**2) & (at[..., 2] < 60)
    noise = np.random.default_rng(0).normal(0, 2, shape)
    return Volume((100 * (ball | neck) + noise).astype(np.float32), affine), ball


@pytest.mark.parametrize("turn", [0.0, 8.0])
@pytest.mark.parametrize("flip", [1, -1])
def test_the_first_look_is_at_the_box_below_the_vertex(flip: int, turn: float):
    angle = np.radians(turn)
    turned = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    shape = (80, 84, 90)
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag([-3.0, 3.0, flip * 3.0])
    affine[:3, 3] = np.array([0, 0, 0]) - affine[:3, :3] @ (np.array(shape) / 2)
    scan, ball = head_on_a_neck(affine, shape)
    part = upper_part(scan, SIZE_MM)
    assert part is not None
    corners = np.abs(part.affine[:3, :3]) @ np.array(part.shape)
    assert (corners <= SIZE_MM).all()
    inside = scan.with_data(ball.astype(np.uint8))
    kept = resample(inside, part.affine, part.shape, order=0).data
    assert kept.sum() > 0.98 * ball.sum()


def test_a_scan_no_larger_than_a_window_is_looked_at_whole():
    assert upper_part(Volume(np.zeros((50, 60, 50), np.float32), np.eye(4)), SIZE_MM) is None


@pytest.mark.parametrize(("answers", "looks"), [([FOUND], 1), ([UNSURE, NONE], 2)])
def test_only_a_whole_brain_in_the_box_ends_the_look(
    monkeypatch: pytest.MonkeyPatch, answers: list[Head], looks: int
):
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = -120
    scan, _ = head_on_a_neck(affine, (80, 80, 80))
    shapes = []

    def asked(volume: Volume, *rest: object) -> Head:
        shapes.append(volume.shape)
        return answers[len(shapes) - 1]

    monkeypatch.setattr(look_module, "_asked", asked)
    assert look_for_head(scan, Settings(device="cpu")) == answers[-1]
    assert len(shapes) == looks
    assert np.prod(shapes[0]) < np.prod(scan.shape)
    assert looks == 1 or shapes[1] == scan.shape


@pytest.mark.parametrize(
    ("air", "noise", "inside"),
    [(0.0, 20.0, 600.0), (-1000.0, 25.0, 1000.0)],
    ids=["a head in MR", "a body in CT"],
)
def test_noise_in_the_corner_of_a_large_scan_is_no_scan_of_noise(
    air: float, noise: float, inside: float
):
    """Of 512 x 512 voxels a corner is air, and its noise is as much as there is of it."""
    rng = np.random.default_rng(0)
    data = (rng.standard_normal((260, 260, 140), np.float32) * noise + air).astype(np.int16)
    data[135:230, 135:230, 20:130] += np.int16(inside)
    assert not is_noise(Volume(data, np.eye(4)))
    assert is_noise(Volume(data[:130, :130], np.eye(4)))
    everywhere = rng.standard_normal((260, 60, 140), np.float32)
    assert is_noise(Volume(everywhere, np.eye(4)))
