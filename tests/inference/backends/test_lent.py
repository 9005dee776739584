"""Memory that is lent: who gets it, and that it is given back."""

from __future__ import annotations

import threading

import torch

from medseg.inference.backends.lent import borrowed, lent, room


def is_in(x: torch.Tensor, memory: torch.Tensor) -> bool:
    return 0 <= x.data_ptr() - memory.data_ptr() < 4 * len(memory)


def test_room_is_made_side_by_side_while_there_is_some_and_elsewhere_then():
    memory = torch.zeros(100)
    with lent(memory):
        first, second, third = room((3, 7)), room((2, 20)), room((2, 20))
        assert is_in(first, memory) and is_in(second, memory) and not is_in(third, memory)
        assert third.shape == (2, 20)
        first.fill_(1)
        second.fill_(2)
        assert bool((first == 1).all()) and bool((second == 2).all())
        assert second.data_ptr() % 64 == memory.data_ptr() % 64
    assert not is_in(room((3, 7)), memory)


def test_what_is_borrowed_is_made_anew_and_what_was_made_before_stays():
    memory = torch.zeros(64)
    with lent(memory):
        kept = room((16,))
        with borrowed():
            one = room((32,))
        other = room((32,))
        assert one.data_ptr() == other.data_ptr() != kept.data_ptr()


def test_other_types_other_threads_and_an_inner_block_have_their_own():
    memory, inner = torch.zeros(64), torch.zeros(64)
    elsewhere = []
    with lent(memory):
        assert room((8,), torch.bfloat16).dtype == torch.bfloat16
        thread = threading.Thread(target=lambda: elsewhere.append(room((8,))))
        thread.start()
        thread.join()
        assert not is_in(elsewhere[0], memory)
        with lent(inner):
            assert is_in(room((8,)), inner)
        with lent(None):
            assert not is_in(room((8,)), memory)
        assert is_in(room((8,)), memory)
