"""CT by rules on parts of bodies that whole simple trunks lack: grooves, sinuses, spines, heads."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from making.ct import MUSCLE, VISCERAL, grid, trunk
from medseg.inference.tissues.airways import Window, find_airways
from medseg.inference.tissues.model import ct_tissues
from medseg.inference.tissues.windows import BONE, GAS, MUSCLE_LABEL, SOFT_TISSUE
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")


class Scene:
    """A CT that shapes are put into, on a grid around 0 in mm."""

    def __init__(self, size_mm: tuple[int, int, int], spacing_mm: tuple[float, float, float]):
        shape = [round(size / step) for size, step in zip(size_mm, spacing_mm, strict=True)]
        self.spacing_mm = spacing_mm
        self.x, self.y, self.z = (
            (at - (n - 1) / 2) * step
            for at, n, step in zip(np.indices(shape, np.float32), shape, spacing_mm, strict=True)
        )
        self.hu = np.full(shape, -1000, np.float32)

    def oval(self, x: float, y: float, wide: float, deep: float) -> NDArray[np.bool_]:
        inside: NDArray = ((self.x - x) / wide) ** 2 + ((self.y - y) / deep) ** 2 <= 1
        return inside

    def ball(self, radius: float) -> NDArray[np.bool_]:
        inside: NDArray = self.x**2 + self.y**2 + self.z**2 <= radius**2
        return inside

    def labels(self, noise: float = 15.0) -> NDArray[np.uint8]:
        noisy = self.hu + np.random.default_rng(0).normal(0, noise, self.hu.shape)
        data = np.clip(np.round(noisy), -1024, 3071).astype(np.int16)
        return ct_tissues(Volume(data, np.diag([*self.spacing_mm, 1.0]))).data


def test_a_groove_of_skin_does_not_open_the_wall_of_the_body():
    """As along the spine: the ring of muscle, closed over gaps, goes over the skin in it."""
    affine, shape = grid(
        low_mm=(-225, -135, -60), high_mm=(225, 150, -30), spacing_mm=(3.0, 3.0, 3.0)
    )
    case = trunk(affine, shape, table=False)
    x, y = (affine[a, 3] + 3.0 * np.indices(shape)[a] for a in (0, 1))
    groove = (np.abs(x) < 5) & (y < -88)
    data = np.where(groove, -1000, case.scan.data)
    lips = (np.abs(x) < 9) & (y < -84) & (y > -112) & ~groove
    found = ct_tissues(case.scan.with_data(np.where(lips, 20, data).astype(np.int16))).data
    for value in (MUSCLE, VISCERAL):
        own = (case.truth == value) & ~groove & ~lips
        assert (found[own] == value).mean() > 0.75


def head() -> Scene:
    """A skull of 85 mm with a brain, an opening, and a sinus 10 mm below the skin in front."""
    scene = Scene((240, 240, 240), (2.0, 2.0, 2.0))
    for radius, value in ((92, 30), (89, -90), (85, 1000), (78, 35)):
        scene.hu[scene.ball(radius)] = value
    opening = (np.abs(scene.z - 25) < 25) & (scene.x > 60) & (np.abs(scene.y) < 25)
    scene.hu[opening & scene.ball(85)] = 35
    return scene


def sinus_of(scene: Scene) -> NDArray[np.bool_]:
    flat = (np.abs(scene.x) < 20) & (np.abs(scene.z) < 14)
    around = flat & (scene.y > 60) & scene.ball(85)
    scene.hu[around] = 1000
    inside = (np.abs(scene.x) < 17) & (np.abs(scene.z) < 11) & (scene.y > 64) & scene.ball(80)
    scene.hu[inside] = -1000
    return inside


def test_a_brain_is_no_muscle_and_a_sinus_is_within_the_body():
    scene = head()
    sinus = sinus_of(scene)
    found = scene.labels()
    brain = scene.ball(74) & ~sinus & (scene.hu == 35)
    assert (found[brain] == SOFT_TISSUE).mean() > 0.98
    assert (found[sinus] == GAS).mean() > 0.95
    before = (np.abs(scene.x) < 15) & (np.abs(scene.z) < 9) & scene.ball(90) & (scene.y > 80)
    assert found[before].all()


def test_a_thigh_alone_is_a_limb():
    scene = Scene((190, 190, 120), (2.0, 2.0, 4.0))
    for radius, value in ((85, 20), (82, -100), (72, 55), (14, 1200), (7, -60)):
        scene.hu[scene.oval(0, 0, radius, radius)] = value
    found = scene.labels()
    lean = scene.oval(0, 0, 68, 68) & ~scene.oval(0, 0, 18, 18)
    assert (found[lean] == MUSCLE_LABEL).mean() > 0.98


@pytest.mark.parametrize(
    ("rim", "spongy", "aorta"), [(500, 150, 45), (500, 110, 320), (700, 220, 320)]
)
def test_a_vertebra_with_a_thin_rim_is_bone_and_an_aorta_beside_it_is_not(
    rim: int, spongy: int, aorta: int
):
    scene = Scene((240, 200, 60), (0.8, 0.8, 2.0))
    for shape, value in (
        ((0, 0, 118, 92), -100), ((0, 0, 102, 76), 55), ((0, 8, 86, 58), -100),
        ((0, -25, 24, 17), rim), ((0, -25, 22.5, 15.5), spongy),
        ((0, -50, 18, 15), 600), ((0, -50, 11, 9), 15), ((-12, 6, 11, 11), aorta),
    ):  # fmt: skip
        scene.hu[scene.oval(*shape)] = value
    found = scene.labels()
    assert (found[scene.oval(0, -25, 22, 15)] == BONE).mean() > 0.9
    assert (found[scene.oval(0, -50, 8, 6)] == BONE).mean() < 0.02
    assert (found[scene.oval(-12, 6, 10, 10)] == BONE).mean() < 0.02


def test_a_throat_that_is_longer_than_the_trachea_does_not_hide_it():
    """The glottis is shut: the air above it is a chain of its own, and no airway of a lung."""
    hu = np.full((60, 60, 100), 40, np.int16)
    x, y, z = np.indices(hu.shape)
    round_air = (x - 30) ** 2 + (y - 30) ** 2 <= 8**2
    hu[round_air & (z < 35)] = -1000
    hu[round_air & (z > 40)] = -1000
    window = Window(
        hu=hu,
        box=(slice(0, 60), slice(0, 60), slice(0, 100)),
        spacing_mm=np.ones(3),
        inside=hu < -500,
        middle=(30.0, 30.0),
    )
    found = find_airways(window, -900.0, 20)
    assert found is not None and found[30, 30, :34].all()
    assert find_airways(window, -900.0, None) is not None
