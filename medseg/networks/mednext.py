"""MedNeXt (Roy et al. 2023, arXiv:2303.09975): a U-Net of ConvNeXt blocks, depthwise convolutions
of large kernels with an inverted bottleneck, also where it halves and doubles. MONAI's network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medseg.networks.layers import check_number, check_numbers
from medseg.networks.monai import Bound, assemble, learn_depthwise


def mednext(
    channels: int,
    classes: int,
    *,
    init_filters: int = 32,
    kernel_size: int = 3,
    encoder_expansion_ratio: Sequence[int] | int = 2,
    decoder_expansion_ratio: Sequence[int] | int = 2,
    bottleneck_expansion_ratio: int = 2,
    blocks_down: Sequence[int] = (2, 2, 2, 2),
    blocks_bottleneck: int = 2,
    blocks_up: Sequence[int] = (2, 2, 2, 2),
    global_resp_norm: bool = False,
    deep_supervision: bool = False,
) -> Bound:
    """(B, channels, D, H, W) to logits (B, classes, D, H, W), halved as often as `blocks_down` is
    long.

    Options are those of `monai.networks.nets.MedNeXt`; the defaults are the paper's S. In training
    mode with `deep_supervision` a list of logits, finest first, each half the size of the one
    before.
    """
    levels = len(blocks_down)
    check_number("init_filters", init_filters, 512)
    check_number("kernel_size", kernel_size, 9)
    check_numbers("blocks_down", blocks_down, 64)
    check_numbers("blocks_up", blocks_up, most=64, count=levels)
    check_number("blocks_bottleneck", blocks_bottleneck, 64)
    check_number("bottleneck_expansion_ratio", bottleneck_expansion_ratio, 16)
    for way, ratio in (("encoder", encoder_expansion_ratio), ("decoder", decoder_expansion_ratio)):
        ratios = [ratio] * levels if isinstance(ratio, int) else ratio
        check_numbers(f"{way}_expansion_ratio", ratios, most=16, count=levels)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size {kernel_size} is not odd")
    network = assemble(
        "mednext",
        "MedNeXt",
        in_channels=channels,
        out_channels=classes,
        init_filters=init_filters,
        kernel_size=kernel_size,
        encoder_expansion_ratio=encoder_expansion_ratio,
        decoder_expansion_ratio=decoder_expansion_ratio,
        bottleneck_expansion_ratio=bottleneck_expansion_ratio,
        blocks_down=tuple(blocks_down),
        blocks_bottleneck=blocks_bottleneck,
        blocks_up=tuple(blocks_up),
        global_resp_norm=global_resp_norm,
        use_residual_connection=True,
        deep_supervision=deep_supervision,
    )
    learn_depthwise(network)
    network.out_0 = nn.Identity()
    if deep_supervision:
        network.out_blocks = nn.ModuleList(nn.Identity() for _ in range(levels))
    heads = [
        nn.Conv3d(init_filters * 2**n, classes, 1) for n in range(levels if deep_supervision else 1)
    ]
    return Bound(network, channels, heads[0], multiple=2**levels, deep_heads=heads[1:])
