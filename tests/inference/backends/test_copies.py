"""Copies to and from a card: right for who waits, and never of what has changed in between."""

from __future__ import annotations

import pytest
import torch

from making.cards import Link
from medseg.inference.backends import copies
from medseg.inference.backends.copies import Courier, link_to

CPU = torch.device("cpu")


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_to_a_cpu_nothing_is_copied():
    courier, source = Courier(CPU), numbers(0, 3, 4)
    assert link_to(CPU) is None
    assert courier.send(source) is source
    with courier.fetch(source).read() as here:
        assert here is source


def test_what_is_sent_may_change_as_soon_as_it_is():
    """Many in a row through two buffers, of many sizes and kinds, whose sources are overwritten."""
    link = Link()
    courier = Courier(CPU, link)
    there, wanted = [], []
    for seed in range(12):
        source = numbers(seed, 1 + seed % 5, 7).to((torch.float32, torch.float16)[seed % 2])
        wanted.append(source.clone())
        there.append(courier.send(source))
        source.fill_(9)
    link.check()
    assert all(torch.equal(*pair) for pair in zip(there, wanted))
    assert len({part.data_ptr() for part in there}) == 12


def test_what_is_large_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copies, "PIECE_BYTES", 400)
    link, source = Link(), numbers(0, 2, 9, 11, 10)[:, 2:8, 1:]  # a cut, which has gaps in memory
    courier = Courier(CPU, link)
    assert torch.equal(courier.send(source), source)
    assert all(len(buffer.memory) <= 400 for buffer in courier._there)
    assert link.sent_bytes == source.nbytes


def test_what_is_fetched_is_read_after_it_has_come():
    courier = Courier(CPU, Link())
    first, second = courier.fetch(numbers(0, 5)), courier.fetch(numbers(1, 5))
    assert first._target.isnan().all(), "nobody has waited yet"
    with first.read() as here:
        assert torch.equal(here, numbers(0, 5))
    third = courier.fetch(numbers(2, 4))
    with second.read() as here:
        assert torch.equal(here, numbers(1, 5))
    with third.read() as here:
        assert torch.equal(here, numbers(2, 4))


def test_more_than_two_are_not_fetched_at_once():
    courier = Courier(CPU, Link())
    waiting = [courier.fetch(numbers(n, 5)) for n in range(2)]
    with pytest.raises(AssertionError, match="two copies"):
        courier.fetch(numbers(2, 5))
    with waiting[0].read() as here:
        assert torch.equal(here, numbers(0, 5))


def test_a_courier_that_did_not_wait_would_be_caught(monkeypatch: pytest.MonkeyPatch):
    """The fake, not the courier: without the wait before a buffer is used again it complains."""

    def careless(buffer: copies._Buffer, tensor: torch.Tensor, link: Link) -> torch.Tensor:
        if len(buffer.memory) < tensor.nbytes:
            buffer.memory = link.pinned(tensor.nbytes)
        return buffer.memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    monkeypatch.setattr(copies._Buffer, "like", careless)
    courier = Courier(CPU, Link())
    with pytest.raises(AssertionError, match="written to while it was copied"):
        for seed in range(4):
            courier.send(numbers(seed, 5))
