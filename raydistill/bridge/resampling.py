"""From one grid to another of any ratio, inside a projector: halved before its body, doubled behind it.

Powers of two are learned (pixel shuffle and unshuffle with a convolution); what is left is a fixed interpolation.
Shapes: B samples, D features, H×W grid.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn


def power_of_two(scale: Fraction | int) -> int:
    """The smallest whole k with 2^k >= scale. Raises ValueError where the scale is not above 0."""
    scale = Fraction(scale)
    if scale <= 0:
        raise ValueError(f"scale ({scale}) must be above 0")
    k = scale.numerator.bit_length() - scale.denominator.bit_length()  # 2^(k-1) < scale < 2^(k+1)
    return k if Fraction(2) ** k >= scale else k + 1


def _matrix(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """[new, old]: linear interpolation along one axis, smoothed where it goes down."""
    identity = torch.eye(old, device=like.device)[None, None]
    rows = F.interpolate(identity, size=(new, old), mode="bilinear", antialias=True, align_corners=False)
    return rows[0, 0].to(like.dtype)


class Resize(nn.Module):
    """[B, D, H, W] -> sides of about `scale` times as many, multiples of `multiple`; without parameters.

    Two products of matrices, whose gradient has no atomic additions: the same bits at every run, unlike F.interpolate's on CUDA.
    """

    def __init__(self, scale: Fraction, multiple: int = 1) -> None:
        super().__init__()
        self.scale, self.multiple = scale, multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = (self.multiple * max(1, round(side * self.scale / self.multiple)) for side in x.shape[-2:])
        if (height, width) == x.shape[-2:]:
            return x
        return _matrix(x.shape[-2], height, x) @ x @ _matrix(x.shape[-1], width, x).T


def unshuffling(scale: Fraction | int) -> nn.Sequential:
    """To the grid of a scale of at most 1, each halving moved into four times the features; empty for scales from 1 on."""
    scale = Fraction(scale)
    if scale >= 1:
        return nn.Sequential()
    halvings = -power_of_two(scale)
    stages = [nn.PixelUnshuffle(2) for _ in range(halvings)]
    return nn.Sequential(Resize(scale * 2**halvings, 2**halvings), *stages)


def downsampler(dim: int, scale: Fraction | int) -> nn.Sequential:
    """As `unshuffling`, with a convolution back to `dim` features behind each halving."""
    stages = [(stage, nn.Conv2d(4 * dim, dim, 3, padding=1)) for stage in unshuffling(scale)[1:]]
    return nn.Sequential(*unshuffling(scale)[:1], *itertools.chain.from_iterable(stages))


def enlarged(scale: Fraction | int, *stages: nn.Module) -> nn.Sequential:
    """`stages`, which double each side as often as a scale above 1 needs, and what then brings it down to the scale."""
    left = Fraction(scale) / 2 ** power_of_two(scale)
    return nn.Sequential(*stages, *([] if left == 1 else [Resize(left)]))


def upsampler(dim: int, scale: Fraction | int) -> nn.Sequential:
    """To the grid of a scale of at least 1 by pixel shuffle, one factor of two at a time; empty for scales up to 1."""
    if scale <= 1:
        return nn.Sequential()
    stages = [(nn.Conv2d(dim, 4 * dim, 3, padding=1), nn.PixelShuffle(2)) for _ in range(power_of_two(scale))]
    return enlarged(scale, *itertools.chain.from_iterable(stages))
