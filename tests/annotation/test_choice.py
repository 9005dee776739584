"""What is labelled next is what a model is least sure of, measured in numbers that can be checked
by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from torch import Tensor

from making import networks as tiny
from medseg.annotation import FINAL, Store, candidates, choice, choose, look_at
from medseg.annotation.choice import agreement, expected_dice
from medseg.errors import BadConfig, BadFile, BadOutput, DataWarning
from medseg.inference import Model, Settings, load_model
from medseg.labels import Label, LabelTable
from medseg.networks.zoo import NETWORKS
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Settings(device="cpu")


class Sharp(tiny.Nearest):
    """Nearest brightness, with probabilities that are near 0 and 1 but between two classes."""

    def forward(self, x: Tensor) -> Tensor:
        return 100 * super().forward(x)


@pytest.fixture(autouse=True)
def sharp_is_known() -> Iterator[None]:
    with mock.patch.dict(tiny.KNOWN, sharp=Sharp), mock.patch.dict(NETWORKS, tiny.KNOWN):
        yield


def scan(clear: float, seed: int = 1) -> Volume:
    """A body as bright as a class where clear is 1, and between two classes where it is 0."""
    shape = (20, 22, 18)
    middle, half = (np.array(shape) - 1) / 2, np.array(shape) / 2
    image = (250 + 250 * clear) * tiny.ellipsoid(shape, middle, half * 0.9)
    image[tiny.ellipsoid(shape, middle + half * (-0.25, 0.3, 0.2), half * 0.4)] = 1000
    image = image + np.random.default_rng(seed).normal(0, 4, shape)
    return Volume(np.asfortranarray(image, np.float32), tiny.affine_of())


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(str(tiny.save_known(tmp_path / "model", "sharp")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Scans c1, c2 and c10, of which c2 is the least clear, and a labelled one that is as bad."""
    store = Store.create(tmp_path / "set")
    for name, clear in (("c10", 0.15), ("c2", 0.05), ("c1", 1.0)):
        store.add_volumes(name, [scan(clear)])
    labels = Volume(np.zeros((20, 22, 18), np.uint8), tiny.affine_of())
    labels.data[5, 5, 5] = 2
    store.add_volumes("done", [scan(0.05)], labels=labels, table=tiny.TABLE)
    return store


def test_the_dice_that_a_model_expects_is_that_of_its_probabilities():
    labels = np.array([1, 1, 0, 2], np.uint8).reshape(4, 1, 1)
    maps = {
        1: np.array([0.8, 0.6, 0.2, 0.0], np.float32).reshape(4, 1, 1),
        2: np.array([0.0, 0.0, 0.0, 1.0], np.float32).reshape(4, 1, 1),
        3: np.zeros((4, 1, 1), np.float32),
    }
    assert expected_dice(labels, maps) == pytest.approx((2 * 1.4 / (2 + 1.6) + 1) / 2)
    assert expected_dice(labels, {}) == 0


def test_models_agree_about_structures_of_one_name():
    table = LabelTable((Label(1, "liver", (0, 0, 0)), Label(2, "left lung", (0, 0, 0))))
    turned = LabelTable((Label(7, "Left_Lung", (0, 0, 0)), Label(1, "spleen", (0, 0, 0))))
    labels = np.array([1, 1, 2, 2, 0, 0], np.uint8)
    others = np.array([0, 0, 7, 0, 0, 1], np.uint8)
    assert agreement(labels, table, others, turned) == pytest.approx((0 + 2 / 3) / 2)
    assert agreement(labels, table, labels, table) == 1
    assert agreement(labels * 0, table, others * 0, turned) == 1


def test_the_least_clear_scan_comes_first(store: Store, model: Model):
    scans = candidates(store, model)
    assert [one.id for one in scans] == ["c1", "c2", "c10"]
    choice = choose(store, scans, model, settings=CPU)
    assert choice.candidate.id == "c2"
    scores = {name: doubt.score for name, doubt in choice.doubts.items()}
    assert scores["c2"] > scores["c10"] > scores["c1"]
    assert set(np.unique(choice.result.labels.data)) <= {0, 2, 41}
    assert choice.why.startswith("most unsure of 3: the model expects a Dice of 0.")


def test_other_strategies_ask_no_model_and_chance_is_a_matter_of_the_seed(
    store: Store, model: Model
):
    scans = candidates(store, model)
    assert choose(store, scans, model, strategy="first", settings=CPU).candidate.id == "c1"
    drawn = [
        choose(store, scans, model, strategy="random", seed=seed, settings=CPU).candidate.id
        for seed in (*range(8), *range(8))
    ]
    assert drawn[:8] == drawn[8:] and len(set(drawn)) > 1
    with pytest.raises(BadConfig, match="there is no strategy 'best'"):
        choose(store, scans, model, strategy="best")


def test_a_second_model_counts_where_it_disagrees(store: Store, model: Model, tmp_path: Path):
    volumes = store.read_scan("c1")
    alone = look_at(volumes, model, settings=CPU)[1]
    same = look_at(volumes, model, model, settings=CPU)[1]
    assert same.disagreement == 0 and same.score == pytest.approx(alone.score / 2)
    other = load_model(str(tiny.save_known(tmp_path / "other", "sharp", classes=(0, 41, 2))))
    apart = look_at(volumes, model, other, settings=CPU)[1]
    assert apart.disagreement == 1 and apart.score > same.score


def test_a_scan_in_which_nothing_is_found_is_fully_unsure(model: Model):
    dark = scan(1.0)
    with mock.patch("medseg.annotation.choice.segment") as segment:
        segment.return_value.labels = dark.with_data(np.zeros(dark.shape, np.uint8))
        segment.return_value.maps = {f"probability_{value}": dark for value in (2, 41)}
        doubt = look_at([dark], model)[1]
    assert doubt.score == 1 and doubt.why == "the model finds nothing in it"


def test_what_was_measured_with_a_model_is_not_measured_again(store: Store, model: Model):
    scans = candidates(store, model)
    first = choose(store, scans, model, settings=CPU)
    with mock.patch("medseg.annotation.choice.look_at", wraps=look_at) as looked:
        again = choose(store, scans, model, settings=CPU)
        assert looked.call_count == 1  # the one that is chosen is segmented
        assert again.doubts == first.doubts
        store.add_volumes("c1", [scan(0.0, seed=7)], replace=True)
        assert choose(store, candidates(store, model), model, settings=CPU).candidate.id == "c1"
        assert looked.call_count == 3
    (store.folder / ".doubts.json").write_text("{damaged")
    assert choose(store, scans[1:], model, settings=CPU).candidate.id == "c2"


@pytest.mark.parametrize(
    "damaged",
    [
        "[]", "{", '"x"', '{"models": 1}', '{"models": KEY, "doubts": []}',
        '{"models": KEY, "doubts": {"a": 1}}', '{"models": KEY, "doubts": {"a": {"unsure": "x"}}}',
        '{"models": KEY, "doubts": {"a": {"unsure": "x", "disagreement": null, "share": 0}}}',
    ],
)  # fmt: skip
def test_what_was_measured_and_is_damaged_is_nothing(tmp_path: Path, damaged: str):
    store = Store.create(tmp_path / "set")
    (store.folder / ".doubts.json").write_text(damaged.replace("KEY", '"k"'))
    assert choice._kept(store, "k") == {}


def test_a_data_set_that_may_only_be_read_is_looked_at_all_the_same(
    store: Store, model: Model, monkeypatch: pytest.MonkeyPatch
):
    def locked(path: Path) -> None:
        raise BadOutput(f"{path}: cannot be written: Read-only file system")

    monkeypatch.setattr(choice, "atomic_write", locked)
    assert choose(store, candidates(store, model), model, settings=CPU).candidate.id == "c2"


def test_few_scans_of_many_may_be_looked_at(store: Store, model: Model):
    choice = choose(store, candidates(store, model), model, most=1, settings=CPU)
    assert len(choice.doubts) == 1


def test_scans_of_a_folder_are_those_without_a_final_label(
    store: Store, model: Model, tmp_path: Path
):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("done", "c2", "new"):
        tiny.save_scan(folder / f"{name}.nii.gz")
    scans = candidates(store, model, folder)
    assert [(one.id, one.stored) for one in scans] == [("c2", True), ("new", False)]
    (folder / "c2.nii.gz").unlink()
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    with pytest.warns(DataWarning, match="broken is left out"):
        assert choose(store, candidates(store, model, folder), model).candidate.id == "new"
    (folder / "new.nii.gz").unlink()
    with (
        pytest.warns(DataWarning, match="broken is left out"),
        pytest.raises(BadFile, match="no other scan can be segmented"),
    ):
        choose(store, candidates(store, model, folder), model)
    with pytest.raises(BadFile, match="is no folder"):
        candidates(store, model, tmp_path / "nowhere")


def test_channels_of_a_folder_are_one_scan(tmp_path: Path):
    two = load_model(str(tiny.save_two_channels(tmp_path / "two")))
    store = Store.create(tmp_path / "set", ("T1", "FLAIR"))
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(2):
        tiny.save_scan(folder / f"a_{number:04d}.nii.gz", seed=number)
    (only,) = candidates(store, two, folder)
    assert only.id == "a" and len(only.files) == 2
    assert choose(store, [only], two, settings=CPU).candidate == only


def test_there_must_be_something_to_choose_from_and_a_model_that_doubts(store: Store):
    with pytest.raises(BadConfig, match="every scan has a final label"):
        choose(store, [], [])
    with pytest.raises(BadConfig, match="does not say how sure it is"):
        choose(store, candidates(store, "otsu"), "otsu")


def test_nothing_is_said_twice_of_scans_that_are_there(store: Store, model: Model):
    assert FINAL in store.case("done").labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(candidates(store, model)) == 3
