"""Mask2Former in 3-D (Cheng et al. 2022, arXiv:2112.01527): a set of masks, each with a class, for
semantic and for instance segmentation.

A U-Net is backbone and pixel decoder (the paper's deformable attention has no 3-D form that is fast
on a CPU). Queries attend to the three coarsest levels of its decoder in turn, each only where its
own mask was so far; a query's mask is its product with the finest map. Training matches queries to
targets by the Hungarian method and compares masks at sampled points, as the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers import Attention, check_number, unfold_cells
from medseg.networks.unet import UNet

#: What the paper weighs class, mask and overlap with, when matching and in the loss.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
#: Weight of queries that stand for nothing.
NO_OBJECT_WEIGHT = 0.1
#: Points are chosen from this many times as many, this share of them where the network is least
#: sure (PointRend).
OVERSAMPLE, UNSURE_SHARE = 3, 0.75
#: Levels that queries attend to.
SCALES = 3


class Masks(NamedTuple):
    """What the network says in training, of every decoder layer and before the first (L of
    them).
    """

    classes: Tensor  #: (L, B, Q, classes + 1) logits, the last one for no object
    queries: Tensor  #: (L, B, Q, M)
    pixels: Tensor  #: (B, M, D, H, W); a mask's logits are the product with its query
    voxels: Tensor | None = (
        None  #: (B, classes, D, H, W) logits of `pixels` alone, with deep supervision
    )


class Targets(NamedTuple):
    """What is in one sample."""

    classes: Tensor  #: (T,)
    masks: Tensor  #: (T, V) bool over all voxels
    known: Tensor  #: (K,) numbers of the voxels that are labelled


class Layer(nn.Module):
    """Masked attention to a map, attention among queries, feed-forward; a norm after each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look, self.talk = Attention(width, heads), Attention(width, heads)
        self.think = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self, x: Tensor, place: Tensor, tokens: Tensor, position: Tensor, allowed: Tensor
    ) -> Tensor:
        """Queries x (B, Q, width) with their `place` (Q, width) look at `tokens` (B, N, width) at
        `position`.
        """
        x = self.norms[0](x + self.look(x + place, tokens, allowed=allowed, position=position))
        x = self.norms[1](x + self.talk(x + place, x, position=place))
        y: Tensor = self.norms[2](x + self.think(x))
        return y


class Mask2Former(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W); class 0, the background, is a mask
    like others.

    Patch sizes must be multiples of `Mask2Former.multiple`. Options: `width`, `heads` and `layers`
    of the transformer, how many `queries` there are (more than the most objects in a patch), how
    wide (`mask_width`) the finest map is, and at how many `points` masks are compared; the others
    are those of the U-Net (`UNet`). With `deep_supervision` the finest map is in training also
    classified voxel by voxel, as in kMaX-DeepLab (Yu et al. 2022, arXiv:2207.04044): learning from
    a few hundred images, it is what gets masks started. In training mode it returns `Masks` for
    `loss`.
    """

    #: Voxels of this label are not compared.
    ignore_index = -1

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        features: Sequence[int] = (32, 64, 128, 256, 320),
        residual: bool = True,
        width: int = 192,
        heads: int = 8,
        layers: int = 6,
        queries: int = 32,
        mask_width: int = 64,
        points: int = 12544,
        deep_supervision: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, number, most in (
            ("width", width, 4096),
            ("heads", heads, 64),
            ("layers", layers, 64),
            ("queries", queries, 1024),
            ("mask_width", mask_width, 1024),
            ("points", points, 2**24),
        ):
            check_number(name, number, most)
        if len(features) < 2:
            raise ValueError("features needs two levels or more")
        self.channels, self.classes, self.points = channels, classes, points
        self.unet = UNet(channels, mask_width, features=features, residual=residual, **options)
        self.multiple = self.unet.multiple
        scales = list(features)[::-1][:SCALES]
        self.project = nn.ModuleList(nn.Conv3d(number, width, 1) for number in scales)
        self.scale = nn.Parameter(torch.randn(len(scales), width) * 0.02)
        self.query, self.place = (nn.Parameter(torch.randn(queries, width)) for _ in range(2))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes + 1)
        self.to_mask = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, mask_width),
        )
        self.deep_heads = nn.ModuleList(
            [nn.Conv3d(mask_width, classes, 1)] if deep_supervision else []
        )

    def forward(self, x: Tensor) -> Tensor | Masks:
        """Semantic logits, or in training `Masks`."""
        prediction = self._said(x)
        return prediction if self.training else self.semantic(prediction)

    def semantic(self, said: Masks) -> Tensor:
        """Logits (B, classes, D, H, W): logarithms of each class's sum over queries of class times
        mask probability.
        """
        chance = said.classes[-1].float().softmax(-1)[..., :-1]
        masks = _product(said.queries[-1].float(), said.pixels.float()).sigmoid()
        scores = torch.einsum("bqk,bqv->bkv", chance, masks)
        return (scores + 1e-6).log().reshape(scores.shape[0], -1, *said.pixels.shape[2:])

    @torch.no_grad()
    def instances(self, x: Tensor, threshold: float = 0.5) -> list[list[tuple[int, float, Tensor]]]:
        """For each sample the objects in it as (class, score, mask (D, H, W) bool), the surest
        first; no background.

        The score is the chance of the class times the mean of the mask's probability within it.
        """
        prediction, samples = self._said(x), []
        chances = prediction.classes[-1].float().softmax(-1)
        masks = _product(prediction.queries[-1].float(), prediction.pixels.float()).sigmoid()
        for chance, mask in zip(chances, masks, strict=True):
            objects = []
            best, kind = chance.max(-1)
            for n in torch.nonzero((kind > 0) & (kind < self.classes))[:, 0].tolist():
                inside = mask[n] > 0.5
                score = float(best[n] * mask[n][inside].mean()) if bool(inside.any()) else 0.0
                if score >= threshold:
                    objects.append((int(kind[n]), score, inside.reshape(x.shape[2:])))
            samples.append(sorted(objects, key=lambda item: -item[1]))
        return samples

    def _said(self, x: Tensor) -> Masks:
        maps = self.unet.maps(x)
        pixels = unfold_cells(self.unet.head(maps[-1]), self.unet.stem)
        voxels = self.deep_heads[0](pixels) if self.training and self.deep_heads else None
        scales: list[tuple[Tensor, Tensor, Tensor]] = []
        coarse = pixels.detach()
        for n in reversed(range(len(self.project))):
            size = maps[n].shape[2:]
            # A mask's mean over a cell is the product with the mean of the pixels: a coarse mask
            # costs little.
            coarse = _means(coarse, size)
            tokens = self.project[n](maps[n]).flatten(2).transpose(1, 2) + self.scale[n]
            scales.insert(0, (tokens, _position(size, self.scale.shape[1], x.device), coarse))
        query = self.query.expand(x.shape[0], -1, -1)
        classes, queries = [], []
        for n in range(len(self.layers) + 1):
            states = self.norm(query)
            classes.append(self.classify(states))
            queries.append(self.to_mask(states))
            if n < len(self.layers):
                tokens, position, means = scales[n % len(scales)]
                allowed = _product(queries[-1].detach(), means) >= 0
                # A query whose mask is empty looks everywhere.
                allowed = allowed | ~allowed.any(-1, keepdim=True)
                query = self.layers[n](
                    query, self.place, tokens, position=position, allowed=allowed
                )
        return Masks(
            classes=torch.stack(classes),
            queries=torch.stack(queries),
            pixels=pixels,
            voxels=voxels,
        )

    def loss(self, said: Masks, labels: Tensor, instances: Tensor | None = None) -> Tensor:
        """Cross-entropy of classes, and cross-entropy and Dice of masks, a mean over decoder
        layers; a scalar.

        labels (B, D, H, W) int64, -1 where unknown. Every class in a sample is one target, unless
        `instances` (B, D, H, W) numbers its objects from 1: then each object is one, of the class
        that most of it has, and 0 leaves a voxel to its class. Which points are compared depends on
        labels and masks alone.
        """
        # Each part of the network gets a gradient where no voxel is labelled, too: processes that
        # share a step wait for those of all parts.
        total, count = (said.pixels.sum() + said.classes.sum() + said.queries.sum()) * 0.0, 0
        if said.voxels is not None:
            total = total + said.voxels.sum() * 0.0
        weight = torch.ones(self.classes + 1, device=labels.device)
        weight[-1] = NO_OBJECT_WEIGHT
        generator = torch.Generator().manual_seed(int(labels.sum()) % 2**31)
        with torch.autocast(labels.device.type, enabled=False):
            for n in range(len(labels)):
                targets = _targets(
                    labels[n], None if instances is None else instances[n], self.ignore_index
                )
                if len(targets.known):
                    sample = Masks(
                        said.classes[:, n].float(),
                        said.queries[:, n].float(),
                        said.pixels[n].flatten(1),
                    )
                    count += 1
                    total = total + self._sample_loss(
                        sample, targets, weight=weight, generator=generator
                    )
            total = total / max(1, count * len(said.classes))
            if said.voxels is not None and count:
                total = total + self._voxel_loss(said.voxels.float(), labels)
        return total

    def _sample_loss(
        self, said: Masks, targets: Targets, *, weight: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The sum over decoder layers; here classes are (L, Q, classes + 1), queries (L, Q, M) and
        pixels (M, V).
        """
        points = _candidates(targets.known, self.points, generator)
        at, truth = said.pixels[:, points].float(), targets.masks[:, points].float()
        total = at.new_zeros(())
        for classes, queries in zip(said.classes, said.queries, strict=True):
            logits = queries @ at
            first = slice(0, self.points)
            query, aim = _match(
                classes, logits[:, first], wanted=targets.classes, truth=truth[:, first]
            )
            true_classes = torch.full((len(queries),), self.classes, device=at.device)
            true_classes[query] = targets.classes[aim]
            unsure_logits, right = _unsure(logits[query], truth[aim], self.points)
            total = total + CLASS_WEIGHT * F.cross_entropy(classes, true_classes, weight)
            total = total + MASK_WEIGHT * F.binary_cross_entropy_with_logits(unsure_logits, right)
            total = total + DICE_WEIGHT * _dice_loss(unsure_logits.sigmoid(), right).mean()
        return total

    def _voxel_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy and Dice of every voxel that is labelled; the losses' weights are those of
        masks.
        """
        known = labels != self.ignore_index
        log_chance = logits.log_softmax(1)
        chance = (log_chance.exp() * known[:, None]).flatten(2)
        truth = torch.stack([labels == number for number in range(self.classes)], 1).flatten(2)
        # Not `F.cross_entropy`: for maps on a GPU it has no gradient that is the same every time.
        right = log_chance.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        cross_entropy = -(right * known).sum() / known.sum()
        return MASK_WEIGHT * cross_entropy + DICE_WEIGHT * _dice_loss(chance, truth.float()).mean()


def _product(queries: Tensor, pixels: Tensor) -> Tensor:
    """(B, Q, M) and (B, M, D, H, W) to the logits of masks (B, Q, D·H·W)."""
    return queries.to(pixels.dtype) @ pixels.flatten(2)


def _means(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) to its means over the cells of a coarser grid, (B, C, *size)."""
    (b, c), (d, h, w) = x.shape[:2], size
    return x.reshape(b, c, d, x.shape[2] // d, h, x.shape[3] // h, w, x.shape[4] // w).mean(
        (3, 5, 7)
    )


def _position(size: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(D·H·W, width): sines and cosines of where a voxel lies along each axis (Carion et al. 2020,
    arXiv:2005.12872); what is left of a width that is no multiple of 6 is zero."""
    count = width // 6
    rates = 10000.0 ** -(torch.arange(count, device=device) / max(1, count))
    parts = []
    for axis, length in enumerate(size):
        angles = (torch.arange(length, device=device) + 1)[:, None] / length * 2 * torch.pi * rates
        waves = torch.cat((angles.sin(), angles.cos()), 1)
        shape = [length if n == axis else 1 for n in range(3)]
        parts.append(waves.reshape(*shape, -1).expand(*size, -1))
    return F.pad(torch.cat(parts, -1).reshape(-1, 6 * count), (0, width - 6 * count))


def _targets(labels: Tensor, instances: Tensor | None, ignore: int) -> Targets:
    """The objects of a sample: (D, H, W) labels, and numbers of objects or None."""
    labels = labels.flatten()
    alone = (
        labels != ignore if instances is None else (labels != ignore) & (instances.flatten() <= 0)
    )
    classes = torch.unique(labels[alone])
    masks = (labels == classes[:, None]) & alone
    if instances is not None:
        objects = torch.where(labels != ignore, instances.flatten(), 0)
        numbers = torch.unique(objects[objects > 0])
        own = objects == numbers[:, None]
        kinds = [torch.bincount(labels[mask]).argmax() for mask in own]
        classes = torch.cat((classes, torch.stack(kinds))) if kinds else classes
        masks = torch.cat((masks, own))
    return Targets(classes, masks, torch.nonzero(labels != ignore)[:, 0])


def _candidates(known: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Numbers of the voxels to compare at: `OVERSAMPLE` times `points` of those known, or all if
    there are fewer.
    """
    if len(known) <= OVERSAMPLE * points:
        return known[torch.randperm(len(known), generator=generator).to(known.device)]
    return known[
        torch.randint(len(known), (OVERSAMPLE * points,), generator=generator).to(known.device)
    ]


def _unsure(logits: Tensor, truth: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """(T, P) logits and truth at `points` of their points: most where a logit is near 0, the rest
    the first ones.
    """
    if logits.shape[1] <= points:
        return logits, truth
    sure = logits.detach().abs()
    unsure = sure.topk(int(UNSURE_SHARE * points), 1, largest=False, sorted=False).indices
    rest = torch.arange(points - unsure.shape[1], device=logits.device).expand(len(logits), -1)
    indices = torch.cat((unsure, rest), 1)
    return logits.gather(1, indices), truth.gather(1, indices)


def _dice_loss(chance: Tensor, truth: Tensor) -> Tensor:
    """1 - soft Dice of masks (..., P)."""
    return 1 - (2 * (chance * truth).sum(-1) + 1) / (chance.sum(-1) + truth.sum(-1) + 1)


@torch.no_grad()
def _match(
    classes: Tensor, logits: Tensor, *, wanted: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """Which query stands for which target at the least cost (Kuhn 1955): numbers of both, as many.

    classes (Q, classes + 1) and logits (Q, P) of the queries; wanted (T,) and truth (T, P) of the
    targets.
    """
    from scipy.optimize import linear_sum_assignment

    chance = logits.sigmoid()
    # -log(1 - p) for every point, and what turns it to -log p where the truth is 1
    mask = (F.softplus(logits).sum(1)[:, None] - logits @ truth.T) / logits.shape[1]
    overlap = (2 * chance @ truth.T + 1) / (chance.sum(1)[:, None] + truth.sum(1) + 1)
    cost = (
        CLASS_WEIGHT * -classes.softmax(-1)[:, wanted]
        + MASK_WEIGHT * mask
        + DICE_WEIGHT * (1 - overlap)
    )
    cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
    query, aim = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(query, device=logits.device), torch.as_tensor(aim, device=logits.device)
