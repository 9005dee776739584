"""The way that a card takes from scan to labels, on this CPU: what the CPU finds, whatever lies
there, and never of a copy that has not ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from making import networks as tiny
from making.cards import Link
from making.notices import notices
from medseg.errors import BadModel, DataWarning, DeviceFailed, NotEnoughMemory
from medseg.inference import segmentation, window
from medseg.inference.backends import copies, painting
from medseg.inference.backends.copies import Courier
from medseg.inference.backends.pytorch import _Torch
from medseg.inference.settings import Settings
from medseg.models.folder import Checkpoint, load_checkpoint
from medseg.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load_checkpoint(str(tiny.save_unet(tmp_path_factory.mktemp("unet") / "m")))


def scan() -> Volume:
    random = np.random.default_rng(0)
    data = random.normal(100, 40, (30, 34, 26)).astype(np.float32)
    return Volume(data, tiny.affine_of((1.4, 1.3, 1.5)))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Link]]:
    """Makes `segment` go as on a card with room for sums and data, through poisoned copies."""

    def on_card(*, sums: bool, data: bool, batch: int = 2, stripes: int = 1) -> list[Link]:
        links: list[Link] = []
        real = segmentation.plan

        def plan(*arguments: Any) -> Any:
            # For torch the same device, and not the one that medseg calls the CPU.
            return replace(
                real(*arguments), device="cpu:0", sums_on_card=sums, data_on_card=data, batch=batch,
                stripes=stripes,
            )  # fmt: skip

        def link_to(device: torch.device) -> Link:
            links.append(Link())
            return links[-1]

        monkeypatch.setattr(segmentation, "plan", plan)
        monkeypatch.setattr(window, "_uses_kernels", lambda device: device == torch.device("cpu"))
        for module in (copies, painting):
            monkeypatch.setattr(module, "link_to", link_to)
        return links

    return on_card


@pytest.mark.parametrize(
    ("sums", "data"), [(True, True), (True, False), (False, False)], ids=["all", "sums", "nothing"]
)
@pytest.mark.parametrize("stripes", [1, 3])
def test_labels_are_the_cpu_s_whatever_lies_on_the_card(
    model: Checkpoint, as_on_a_card: Callable, sums: bool, data: bool, stripes: int
):
    settings = Settings(device="cpu", precision="fp32")
    expected = segmentation.segment(scan(), model, settings)
    links = as_on_a_card(sums=sums, data=data, stripes=stripes)
    result = segmentation.segment(scan(), model, settings)
    assert len(np.unique(expected.labels.data)) > 2
    assert float((result.labels.data != expected.labels.data).mean()) < 1e-4
    assert result.confidence.keys() == expected.confidence.keys()
    for value, share in expected.confidence.items():
        assert result.confidence[value] == pytest.approx(share, abs=0.01)  # parts overlap
    for link in links:
        link.check()
    assert sum(link.sent_bytes for link in links) > 0, "the image, or features"


def test_maps_are_made_of_what_comes_back(model: Checkpoint, as_on_a_card: Callable):
    settings = Settings(device="cpu", precision="fp32", uncertainty=True)
    expected = segmentation.segment(scan(), model, settings).maps["uncertainty"].data
    as_on_a_card(sums=True, data=False)
    found = segmentation.segment(scan(), model, settings).maps["uncertainty"].data
    assert np.abs(found - expected).max() < 1e-3


def test_an_image_that_does_not_fit_stays_here(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(device="cpu", precision="fp32")
    expected = segmentation.segment(scan(), model, settings).labels.data

    def send(courier: Courier, source: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    as_on_a_card(sums=True, data=True)
    monkeypatch.setattr(Courier, "send", send)
    with pytest.warns(DataWarning, match="no room for the image"):
        labels = segmentation.segment(scan(), model, settings).labels.data
    assert float((labels != expected).mean()) < 1e-4


class FullOnce:
    """A module of which one function once finds no memory, at its call of a number from 0."""

    def __init__(self, module: Any, name: str, at: int) -> None:
        self.module, self.name, self.at, self.calls = module, name, at, 0

    def __getattr__(self, name: str) -> Any:
        return self._full if name == self.name else getattr(self.module, name)

    def _full(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return getattr(self.module, self.name)(*arguments, **options)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("name", "sums", "says"),
    [
        ("stack", True, ""),  # of windows
        ("cat", True, "no room for the sums"),  # of the planes that are finished
        ("cat", False, ""),
    ],
)
def test_where_a_card_has_no_room_in_between_the_labels_are_the_same(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch, name: str,
    sums: bool, says: str, at: int,
):  # fmt: skip
    settings = Settings(device="cpu", precision="fp32")
    expected = segmentation.segment(scan(), model, settings).labels.data
    as_on_a_card(sums=sums, data=True)
    full = FullOnce(torch, name, at)
    monkeypatch.setattr(window, "torch", full)
    with pytest.warns(DataWarning, match=says) if says else nullcontext():
        labels = segmentation.segment(scan(), model, settings).labels.data
    assert full.calls > at or (name == "cat" and not sums)
    assert float((labels != expected).mean()) < 1e-4


@pytest.mark.parametrize("at", [0, 1, 3])
def test_features_that_cannot_be_sent_for_are_waited_for(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch, at: int
):
    settings = Settings(device="cpu", precision="fp32")
    expected = segmentation.segment(scan(), model, settings).labels.data
    as_on_a_card(sums=False, data=False)
    real, calls = Courier.fetch, []

    def fetch(courier: Courier, source: torch.Tensor) -> Any:
        if source.ndim == 5:
            calls.append(1)
            if len(calls) == at + 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(courier, source)

    monkeypatch.setattr(Courier, "fetch", fetch)
    labels = segmentation.segment(scan(), model, settings).labels.data
    assert len(calls) > at
    assert float((labels != expected).mean()) < 1e-4


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("CUDA error: an illegal memory access was encountered", DeviceFailed, "stopped working"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", NotEnoughMemory, "there is no memory"),
    ],
)
def test_what_a_card_tells_where_it_is_waited_for_becomes_a_sentence(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch, text: str,
    kind: type[Exception], sentence: str,
):  # fmt: skip
    def end_row(sums: Any, deep: int) -> None:
        raise RuntimeError(text)

    as_on_a_card(sums=True, data=True)
    monkeypatch.setattr(window._Sums, "end_row", end_row)
    with pytest.raises(kind, match=sentence):
        segmentation.segment(scan(), model, Settings(device="cpu", precision="fp32"))


def too_large(monkeypatch: pytest.MonkeyPatch, kinds: set[torch.dtype]) -> list[torch.dtype]:
    """Numbers of the third batch are too large for these arithmetics; those of every call."""
    real, calls = _Torch.forward, []

    def forward(network: _Torch, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(dtype)
        features = real(network, x, torch.float32)
        return features * (torch.inf if calls.count(dtype) == 3 and dtype in kinds else 1)

    monkeypatch.setattr(_Torch, "forward", forward)
    return calls


def test_numbers_too_large_for_half_precision_are_noticed_one_batch_later_and_done_again(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(device="cpu", precision="bf16")
    expected = segmentation.segment(scan(), model, Settings(device="cpu", precision="fp32"))
    as_on_a_card(sums=True, data=True, batch=1)
    calls = too_large(monkeypatch, {torch.bfloat16})
    with pytest.warns(DataWarning, match="too large for bfloat16; float32 goes on") as told:
        labels = segmentation.segment(scan(), model, settings).labels
    assert float((labels.data != expected.labels.data).mean()) < 1e-4
    assert calls[:4] == [torch.bfloat16] * 4, "the fourth was on its way"
    assert set(calls[4:]) == {torch.float32}
    assert len(notices(told)) == 1


def test_numbers_that_are_never_finite_are_refused(
    model: Checkpoint, as_on_a_card: Callable, monkeypatch: pytest.MonkeyPatch
):
    as_on_a_card(sums=True, data=True, batch=1)
    too_large(monkeypatch, {torch.float32})
    with pytest.raises(BadModel, match="values that are not finite"):
        segmentation.segment(scan(), model, Settings(device="cpu", precision="fp32"))
