"""Scans as training data: prepared as inference prepares them, drawn as the settings say, the same
every time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from making import phantoms
from making.cards import Link
from medseg.config import Config, make_config
from medseg.dataset.cases import load_case
from medseg.dataset.reading import read_dataset
from medseg.errors import BadFile
from medseg.inference.backends.copies import Courier
from medseg.inference.preprocess import prepare
from medseg.models.spec import ZScore
from medseg.training import augment
from medseg.training.losses import IGNORE
from medseg.training.scans import ScanSource
from medseg.training.source import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def config_of(data: Path, **changes: Any) -> Config:
    content: dict[str, Any] = {
        "name": "x",
        "data": str(data),
        "model": {
            "name": "unet",
            "options": {"features": [4, 8]},
            "patch": [16, 16, 16],
            "spacing_mm": 1.0,
            "grid": "scan",
            "intensity": [{"scheme": "zscore"}],
        },
        "augment": (
            {
                f"{name}_share": 0
                for name in ("rotation", "scaling", "noise", "blur", "brightness", "contrast")
            }
            | {f"{name}_share": 0 for name in ("low_resolution", "inverted_gamma", "gamma")}
        ),
        "train": {"steps": 10, "batch": 2},
    }
    for dotted, value in changes.items():
        group, _, key = dotted.partition("__")
        content[group][key] = value
    return make_config(content, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.dataset(tmp_path_factory.mktemp("scans") / "data", 4)


def source_of(data: Path, store: Path, **changes: Any) -> ScanSource:
    dataset = read_dataset(data)
    names = [case.name for case in dataset.cases]
    return ScanSource(config_of(data, **changes), dataset, names[:3], names[3:], store)


def batches(source: ScanSource, steps: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = []
    for step in steps:
        images, labels, _ = source.batch(
            step, [100 * step, 100 * step + 1], range(2 * step, 2 * step + 2), CPU
        )
        made.append((images, labels))
    return made


def test_cases_are_prepared_to_the_bit_as_inference_prepares_them(data: Path, tmp_path: Path):
    source = source_of(data, tmp_path / "store")
    volumes, labels = load_case(source.dataset, source.training[0])
    image, grid = prepare(volumes, 1.0, "scan", [ZScore()])
    assert np.array_equal(source._array(0, "image"), image.numpy())
    assert np.array_equal(source._array(0, "labels"), labels.data)
    assert grid.shape == labels.shape


def test_a_patch_without_augmentation_is_a_piece_of_its_case(data: Path, tmp_path: Path):
    source = source_of(data, tmp_path / "store")
    for images, labels in batches(source, range(5)):
        for image, truth in zip(images, labels):
            found = False
            for number in range(3):
                whole, classes = source._array(number, "image")[0], source._array(number, "labels")
                places = np.argwhere(np.isclose(whole, float(image[0, 0, 0, 0])))
                for x, y, z in places:
                    piece = whole[x : x + 16, y : y + 16, z : z + 16]
                    if piece.shape == (16, 16, 16) and np.array_equal(piece, image[0].numpy()):
                        assert np.array_equal(
                            classes[x : x + 16, y : y + 16, z : z + 16], truth.numpy()
                        )
                        found = True
            assert found


def test_batches_depend_on_seeds_alone_and_the_store_is_found_again(data: Path, tmp_path: Path):
    first = source_of(
        data, tmp_path / "store", augment__gamma_share=1.0, augment__rotation_share=1.0
    )
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    again = source_of(
        data, tmp_path / "store", augment__gamma_share=1.0, augment__rotation_share=1.0
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == times
    expected = batches(first, range(4))
    for made, (images, labels) in zip(batches(again, range(4)), expected):
        assert torch.equal(made[0], images)
        assert torch.equal(made[1], labels)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_every_case_comes_once_in_every_pass(data: Path, tmp_path: Path):
    source = source_of(data, tmp_path / "store")
    orders = [[source._case_of(3 * epoch + n) for n in range(3)] for epoch in range(20)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [source._case_of(n) for n in range(3)] == orders[0], (
        "the order of an earlier pass can be asked for again"
    )


def test_foreground_patches_are_centred_on_structures_all_equally(data: Path, tmp_path: Path):
    source = source_of(data, tmp_path / "store", train__foreground=1.0, model__patch=[8, 8, 8])
    found = Counter()
    for step in range(120):
        _, labels, _ = source.batch(step, [step], range(step, step + 1), CPU)
        found[int(labels[0, 4, 4, 4])] += 1
    # Near the border a patch is moved into the scan, so some centres are beside their structure.
    assert found[1] > 40
    assert found[2] > 40


def test_a_scan_smaller_than_the_patch_lies_in_it_whole_with_zeros_around(
    data: Path, tmp_path: Path
):
    source = source_of(data, tmp_path / "store", model__patch=[32, 32, 32])
    places = set()
    for step in range(8):
        images, labels, _ = source.batch(step, [step], range(step, step + 1), CPU)
        inside = images[0, 0] != 0
        assert int(inside.sum()) == 22 * 24 * 20
        assert int((labels > 0).sum()) == int(
            (source._array(source._case_of(step), "labels") > 0).sum()
        )
        places.add(tuple(np.argwhere(inside.numpy()).min(0).tolist()))
    assert len(places) > 3


def test_labels_to_ignore_and_values_that_nobody_named(tmp_path: Path):
    def mark(number: int, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = labels.copy()
        labels[0] = 5
        return image, labels

    data = phantoms.dataset(tmp_path / "data", 4, change=mark)
    with pytest.raises(BadFile, match=r"\[5\]"):
        source_of(data, tmp_path / "store")
    dataset = read_dataset(data)
    object.__setattr__(dataset, "ignore", 5)
    names = [case.name for case in dataset.cases]
    source = ScanSource(config_of(data), dataset, names[:3], names[3:], tmp_path / "store")
    assert (source._array(0, "labels")[0] == IGNORE).all()
    assert (source._array(0, "labels")[1:] >= 0).all()
    images, labels, _ = source.batch(0, [1, 2], range(2), CPU)
    labels[:, :5] = IGNORE
    batch = Batch(images, labels)
    outputs = torch.randn(2, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = torch.where(
        (batch.labels == IGNORE)[:, None], outputs + 9 * torch.sign(outputs), outputs
    )
    assert torch.equal(source.loss(changed, batch), source.loss(outputs, batch))
    assert not torch.equal(source.loss(-outputs, batch), source.loss(outputs, batch))


def test_mirrored_patches_have_left_and_right_exchanged(tmp_path: Path):
    """With one side in each half of the scan: after mirroring, the left structure is still on the
    left.
    """
    data = phantoms.dataset(tmp_path / "data", 4, labels={"left ball": 1, "right ball": 2})
    source = source_of(data, tmp_path / "store", augment__mirror=[0], model__patch=[24, 24, 24])
    sides, mirrored = [], []
    for step in range(10):
        images, labels, _ = source.batch(step, [step], range(step, step + 1), CPU)
        one, two = ((labels[0] == value).nonzero()[:, 0].float().mean() for value in (1, 2))
        sides.append(bool(one < two))
        # Structure 2 of the scan is the brighter one, so brightness tells whether the patch was
        # mirrored.
        mirrored.append(
            bool(images[0, 0][labels[0] == 1].mean() > images[0, 0][labels[0] == 2].mean())
        )
    assert all(sides)
    assert len(set(mirrored)) == 2
    assert source.swap is not None
    assert source.swap.tolist() == [0, 2, 1]


@pytest.mark.parametrize("right", [(3, 4), (3,)])
def test_mirrored_patches_of_regions_have_left_and_right_exchanged(
    tmp_path: Path, right: tuple[int, ...]
):
    """Whatever label values the regions are made of, and where no value lies in those of the other
    side.
    """
    data = phantoms.dataset(tmp_path / "data", 4, labels={"left ball": 1, "right ball": 2})
    dataset = replace(read_dataset(data), regions=((1, 2), right))
    store = tmp_path / "store"
    source = ScanSource(config_of(data), dataset, [case.name for case in dataset.cases], [], store)
    assert source.swap is not None
    assert source.membership is not None
    rows = source.membership
    assert torch.equal(rows[source.swap], rows[:, [1, 0]])
    assert torch.equal(rows[1:3], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_a_case_with_one_side_annotated_is_not_mirrored(tmp_path: Path):
    data = phantoms.dataset(tmp_path / "data", 3, labels={"left ball": 1, "right ball": 2})
    dataset = read_dataset(data)
    cases = [replace(case, labelled=(1,)) for case in dataset.cases[:2]]
    dataset = replace(dataset, cases=(*cases, dataset.cases[2]))
    config = config_of(data, augment__mirror=[0, 1])
    names = [case.name for case in dataset.cases]
    source = ScanSource(config, dataset, names, [], tmp_path / "store")
    assert [one.mirror for one in source._variations] == [(1,), (1,), (0, 1)]


def test_on_a_card_cases_that_stay_there_change_no_bit_and_of_others_little_is_sent(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a card: the CPU's patches but for rounding, and with any room the same bits."""
    big = phantoms.dataset(tmp_path / "big", 4, shape=(70, 72, 74))
    changes = {"augment__rotation_share": 0.5, "augment__elastic_share": 0.5}
    plain = batches(source_of(big, tmp_path / "store", **changes), range(6))
    monkeypatch.setattr(augment, "_uses_kernels", lambda device: False)
    sent_bytes, made = [], []
    for room_bytes in (0, 2_000_000, 10**9):
        source = source_of(big, tmp_path / "store", **changes)
        source._courier = Courier(CPU, Link())
        source.reside(room_bytes)
        made.append(batches(source, range(6)))
        sent_bytes.append(source._courier.link.sent_bytes)
        assert len(source._resident) == min(3, room_bytes // (5 * 70 * 72 * 74))
    for each in made:
        for (images, labels), (again, truth), (cpu, classes) in zip(each, made[0], plain):
            assert torch.equal(images, again)
            assert torch.equal(labels, truth)
            assert torch.allclose(images, cpu, atol=1e-3)
            assert float((labels == classes).float().mean()) > 0.999
    whole_bytes = 12 * 5 * 70 * 72 * 74
    assert sent_bytes[0] < whole_bytes / 8, "no more of a case than its patch shows"


def test_cases_that_a_card_has_no_room_for_are_read_from_the_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = batches(source_of(data, tmp_path / "store"), range(3))
    source = source_of(data, tmp_path / "store")
    source.reside(10**9)
    real, sent = Courier.send, []

    def send(courier: Courier, array: torch.Tensor) -> torch.Tensor:
        sent.append(array.shape)
        if len(sent) == 1:  # a whole image
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(courier, array)

    monkeypatch.setattr(Courier, "send", send)
    found = batches(source, range(3))
    assert not source._resident and source._room_bytes == 0
    for (images, labels), (plain, classes) in zip(found, expected):
        assert torch.equal(images, plain) and torch.equal(labels, classes)


def test_only_whole_scans_validate(data: Path, tmp_path: Path):
    source = source_of(data, tmp_path / "store")

    class Truth(torch.nn.Module):
        """Knows that structures are brighter than the background, and which is which."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            middle = x[:, :1]
            return torch.cat((-middle.abs() * 0 + 0.5 - middle, middle - 1.0, 2 * middle - 4.0), 1)

    scores = source.validate(Truth(), seeds=[0, 1, 2], device=CPU, dtype=torch.float32)
    assert set(scores) == {"body", "spot", "mean"}
    assert scores["mean"] == pytest.approx((scores["body"] + scores["spot"]) / 2)
    assert source.seconds_a_case > 0
    assert source.validate(Truth(), seeds=[], device=CPU, dtype=torch.float32) == {}
