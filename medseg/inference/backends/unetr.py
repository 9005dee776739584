"""MONAI's `SwinUNETR` and `UNETR` as wholes, for `accelerate`: in windows one by one, each map made
when it is needed and no longer kept than that.

MONAI's own make the finest skip first, which is the largest map, and keep it to the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medseg.inference.backends.lent import lent, room
from medseg.inference.backends.residual import FastJoin, FastResidual, Strip, runs_plainly
from medseg.machine import trim_memory


class _Whole(nn.Module):
    """A network of MONAI's; what of it is done by `_window` is the same."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, D, H, W) to (B, features, D, H, W)."""
        if runs_plainly(x) or x.ndim != 5:
            y: Tensor = self.plain(x)
            return y
        windows = [self._window(one) for one in x.split(1)]
        return windows[0] if len(windows) == 1 else torch.cat(windows)

    def _window(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FastSwin(_Whole):
    """MONAI's `SwinUNETR`."""

    def _window(self, x: Tensor) -> Tensor:
        plain = self.plain
        plain._check_input_size(x.shape[2:])
        first, last = plain.encoder1.layer, plain.decoder1
        # The largest map's memory is had first: it is the same in every window, and nothing else
        # is in its way. That of the second largest is not there while others are made.
        strip = last.strip_of(tuple(x.shape[2:])) if isinstance(last, FastJoin) else None
        skip = first.strip_of(x, is_apart=True) if isinstance(first, FastResidual) else None
        with lent(None if strip is None else strip.memory):
            states = _swin_states(x, plain.swinViT, normalize=plain.normalize)
        maps = [plain.decoder5(plain.encoder10(states.pop()), states.pop())]
        _join(plain.decoder4, maps, plain.encoder4(states.pop()))
        _join(plain.decoder3, maps, plain.encoder3(states.pop()))
        _join(plain.decoder2, maps, plain.encoder2(states.pop()))
        trim_memory()  # of what smaller maps left, 0.1 GB beside the largest
        skip_map = first(x) if skip is None else first.made(x, skip)
        _join(last, maps, skip_map, strip)
        del skip, skip_map
        logits: Tensor = plain.out(maps.pop())
        return logits


def _swin_states(x: Tensor, swin: Any, *, normalize: bool) -> list[Tensor]:
    """What MONAI's `SwinTransformer` returns, coarsest last, every map with channels innermost."""
    x = swin.pos_drop(_patches(x, swin.patch_embed))
    states = [swin.proj_out(x, normalize) if normalize else x.clone()]
    for n in range(1, 5):
        if swin.use_v2:
            x = getattr(swin, f"layers{n}c")[0](x)
        x = getattr(swin, f"layers{n}")[0](x)
        states.append(swin.proj_out(x, normalize))
    return states


def _patches(x: Tensor, embed: Any) -> Tensor:
    """MONAI's `PatchEmbed`: what is apart before it is convolved, as a product of matrices."""
    sides = embed.proj.kernel_size
    if embed.norm is not None or any(n % side for n, side in zip(x.shape[2:], sides)):
        y: Tensor = embed(x)
        return y.contiguous(memory_format=torch.channels_last_3d)
    (d, h, w), (i, j, k) = (n // side for n, side in zip(x.shape[2:], sides)), sides
    parts = x.reshape(*x.shape[:2], d, i, h, j, w, k).permute(0, 2, 4, 6, 1, 3, 5, 7)
    parts, weight = parts.reshape(-1, x.shape[1] * i * j * k), embed.proj.weight.flatten(1)
    rows = torch.mm(parts, weight.T, out=room((len(parts), len(weight)))).add_(embed.proj.bias)
    return rows.view(x.shape[0], d, h, w, -1).permute(0, 4, 1, 2, 3)


class FastUnetr(_Whole):
    """MONAI's `UNETR`."""

    def _window(self, x: Tensor) -> Tensor:
        plain = self.plain
        y, states = plain.vit(x)
        maps = [plain.proj_feat(y)]
        _join(plain.decoder5, maps, plain.encoder4(plain.proj_feat(states[9])))
        _join(plain.decoder4, maps, plain.encoder3(plain.proj_feat(states[6])))
        _join(plain.decoder3, maps, plain.encoder2(plain.proj_feat(states[3])))
        _join(plain.decoder2, maps, plain.encoder1(x))
        logits: Tensor = plain.out(maps.pop())
        return logits


def _join(decoder: Any, maps: list[Tensor], skip: Tensor, strip: Strip | None = None) -> None:
    """A step of the decoder: the last map becomes a finer one, with a skip that nobody else needs;
    neither is kept.
    """
    if isinstance(decoder, FastJoin):
        maps.append(decoder.joined(maps, skip, spend=True, strip=strip))
    else:
        maps.append(decoder(maps.pop(), skip))


def swin_of(module: Any) -> nn.Module | None:
    """Where it has MONAI's parts."""
    parts = ("swinViT", "encoder1", "encoder10", "decoder1", "decoder5", "out", "normalize")
    fits = all(hasattr(module, name) for name in (*parts, "_check_input_size"))
    swin = getattr(module, "swinViT", None)
    return FastSwin(module) if fits and hasattr(swin, "layers4") else None


def unetr_of(module: Any) -> nn.Module | None:
    """Where it has MONAI's parts."""
    parts = ("vit", "encoder1", "encoder4", "decoder2", "decoder5", "out", "proj_feat")
    return FastUnetr(module) if all(hasattr(module, name) for name in parts) else None
