"""Primus is the paper's: where tokens lie is told by turns alone, blocks are left out in training
only, and its recipe and sizes are those published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg.config import TrainConfig
from medseg.errors import BadModel
from medseg.networks.layers import unfold_cells
from medseg.networks.primus import SIZES, Primus, RotaryAttention, rotate, rotations
from medseg.networks.zoo import TRAINING, build_network, check_patch, patch_multiples, small
from medseg.training.losses import deep_supervision
from medseg.training.step import make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {"width": 24, "depth": 3, "heads": 2, "decoder": [8, 8]}


def primus(**more: Any) -> Primus:
    torch.manual_seed(0)
    return Primus(1, 3, **(TINY | more))


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))


def test_turns_are_of_each_axis_and_of_the_frequencies_of_the_paper():
    """By the definition: pair n of an axis turns by 10,000 to the power of -n / pairs at each
    token."""
    turns = rotations((2, 3, 4), 12)
    place = (1 * 3 + 2) * 4 + 3  # the token at (1, 2, 3)
    expected = torch.tensor([at * 10_000.0**-rate for at in (1, 2, 3) for rate in (0, 0.5)])
    assert turns.shape == (2, 24, 6)
    assert torch.allclose(turns[0, place], expected.cos(), atol=1e-6)
    assert torch.allclose(turns[1, place], expected.sin(), atol=1e-6)


def test_a_turned_pair_is_a_complex_number_times_a_unit():
    x, turns = torch.randn(2, 3, 24, 12), rotations((2, 3, 4), 12)
    expected = torch.view_as_complex(x.unflatten(-1, (6, 2)).contiguous()) * torch.complex(*turns)
    assert torch.allclose(rotate(x, turns), torch.view_as_real(expected).flatten(-2), atol=1e-5)


def test_how_tokens_attend_depends_on_how_they_lie_to_each_other_and_not_on_where():
    turns = rotations((6, 6, 6), 12).unflatten(1, (6, 6, 6))
    query, key = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
        turned = [rotate(x, turns[:, i, j, k][:, None]) for x, (i, j, k) in
                  ((query, one), (key, other))]  # fmt: skip
        return float((turned[0] * turned[1]).sum())

    assert score((0, 1, 2), (1, 3, 2)) == pytest.approx(score((4, 2, 3), (5, 4, 3)), abs=1e-4)
    assert abs(score((0, 1, 2), (1, 3, 2)) - score((0, 1, 2), (3, 1, 2))) > 1e-2


def test_attention_is_that_of_the_textbook_on_turned_queries_and_keys():
    torch.manual_seed(0)
    attention, x, turns = RotaryAttention(24, 2), tokens(8, 24), rotations((2, 2, 2), 12)
    heads = [y.unflatten(-1, (2, 12)).transpose(1, 2)
             for y in (attention.query(x), attention.key(x), attention.value(x))]  # fmt: skip
    scores = rotate(heads[0], turns) @ rotate(heads[1], turns).mT / 12**0.5
    mixed = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    expected = attention.out(attention.norm(mixed))
    assert torch.allclose(attention(x, turns), expected, atol=1e-5)


def test_any_patch_of_whole_tokens_is_taken_unless_places_are_learnt():
    free, tied = primus().eval(), primus(patch=[16, 16, 24]).eval()
    assert free(torch.zeros(1, 1, 24, 8, 16)).shape == (1, 3, 24, 8, 16)
    assert tied(torch.zeros(1, 1, 16, 16, 24)).shape == (1, 3, 16, 16, 24)
    with pytest.raises(ValueError, match="not the"):
        tied(torch.zeros(1, 1, 24, 16, 24))
    with pytest.raises(BadModel, match="set its option patch"):
        check_patch(tied, (24, 16, 24))
    assert {k for k in tied.state_dict() if k not in free.state_dict()} == {"place"}


@pytest.mark.parametrize("token", [[8, 8, 8], [4, 8, 2], [2, 2, 4]])
def test_tokens_may_be_shorter_along_axes_of_thick_slices(token: list[int]):
    network = primus(token=token).eval()
    assert patch_multiples(network) == tuple(token)
    patch = [2 * length for length in token]
    check_patch(network, patch)
    with torch.inference_mode():
        assert network(torch.randn(1, 1, *patch)).shape == (1, 3, *patch)
        assert len(network.embed(torch.zeros(1, 1, *patch))[0, 0].flatten()) == 8


def test_the_head_is_the_last_transposed_convolution():
    network, x = primus().eval(), torch.randn(1, 1, 8, 16, 8)
    last = nn.ConvTranspose3d(8, 3, 2, stride=2)
    weight = network.head.weight.detach().view(3, 2, 2, 2, 8)
    with torch.no_grad():
        last.weight.copy_(weight.permute(4, 0, 1, 2, 3))
        last.bias.copy_(network.head.bias.view(3, 8)[:, 0])
        network.head.bias.copy_(last.bias.repeat_interleave(8))
        assert torch.allclose(network(x), last(network.features(x)), atol=1e-5)


def test_folded_logits_have_the_loss_of_the_others():
    network, x = primus(drop_path=0.0).train(), torch.randn(2, 1, 8, 16, 8)
    labels = torch.randint(0, 3, (2, 8, 16, 8), generator=torch.Generator().manual_seed(1))
    plain = network(x)
    network.folded = True
    folded = network(x)
    assert folded.shape == (2, 3, 4, 2, 8, 2, 4, 2)
    assert torch.equal(folded.reshape(plain.shape), plain)
    assert torch.allclose(deep_supervision(folded, labels), deep_supervision(plain, labels))
    assert torch.equal(network.eval()(x), unfold_cells(network.head(network.features(x)), 2))


def test_blocks_are_left_out_in_training_only_and_deeper_ones_more_often():
    network = primus(drop_path=0.9, depth=4)
    assert [round(block.ffn.drop, 6) for block in network.blocks] == [0, 0.3, 0.6, 0.9]
    branch, x, turns = network.blocks[-1].attention, tokens(8, 24), rotations((2, 2, 2), 12)
    batch = x.expand(2000, -1, -1)
    torch.manual_seed(1)
    with torch.inference_mode():
        added = branch.train()(batch, turns) - batch
        always = branch.eval()(x, turns) - x
    skipped = added.abs().amax((1, 2)) == 0
    assert 0.87 < float(skipped.float().mean()) < 0.93
    assert torch.allclose(added[~skipped], 10 * always, atol=1e-4)  # the mean stays what it is


def test_what_a_block_adds_begins_at_its_scale():
    network = primus(layer_scale=0.1)
    scales = [branch.scale for block in network.blocks for branch in (block.attention, block.ffn)]
    assert all(torch.equal(scale, torch.full((24,), 0.1)) for scale in scales)


@pytest.mark.parametrize(("size", "millions"), [("S", 23), ("B", 92), ("M", 145), ("L", 324)])
def test_sizes_are_the_paper_s(size: str, millions: int):
    with torch.device("meta"):
        network = Primus(1, 3, size=size)
    width, depth, heads = SIZES[size]
    assert (network.embed.out_channels, len(network.blocks), network.heads) == (width, depth, heads)
    weights = sum(parameter.numel() for parameter in network.parameters())
    in_blocks = sum(parameter.numel() for parameter in network.blocks.parameters())
    assert round(weights / 1e6) == millions
    assert in_blocks > 0.98 * weights - width * 8**3  # nearly all of it is the transformer


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"size": "XL"}, "none of S, B, M, L"),
        ({"width": 100, "heads": 4}, "multiple of 6"),
        ({"token": [8, 8]}, "3 whole numbers"),
        ({"token": [8, 6, 8]}, "2, 4 or 8"),
        ({"token": [16, 8, 8]}, "from 2 to 8"),
        ({"patch": [20, 16, 16]}, "multiples of"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": "often"}, "drop_path"),
        ({"layer_scale": 0}, "layer_scale"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_a_sentence(
    options: dict[str, Any], what: str
):
    with pytest.raises(BadModel, match=rf"primus.*{what}"):
        build_network("primus", 1, 3, **options)


def test_it_is_trained_by_the_paper_s_recipe():
    settings = TrainConfig(**TRAINING["primus"])
    optimizer = make_optimizer(settings, primus())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert (settings.learning_rate, settings.gradient_clip) == (3e-4, 1.0)
    usual = make_optimizer(TrainConfig(**TRAINING["segformer"]), primus())
    assert {group["betas"] for group in usual.param_groups} == {(0.9, 0.999)}


def test_small_ones_have_tokens_that_fit_the_patch():
    assert small("primus", (40, 48, 12))["token"] == [8, 8, 4]
