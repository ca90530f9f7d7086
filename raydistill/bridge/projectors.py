"""The ablation's other projectors: a small convolutional U-Net and a per-pixel MLP (arXiv 2606.32020)."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.bridge.resampling import downsampler, enlarged, power_of_two, unshuffling, upsampler


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (8, 6, 5, 4, 3, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            _norm(out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.skip(x) + self.body(x)


class UNetProjector(nn.Module):
    """Two-level U-Net: [B, in, H, W] -> [B, out, H·scale, W·scale]; any H and W, of at least 2 each on the smaller grid."""

    def __init__(self, in_channels: int, out_channels: int, width: int, scale: Fraction | int = 1) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.downsample = downsampler(width, scale)
        self.down = ResidualBlock(width, width)
        self.halve = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(ResidualBlock(2 * width, 2 * width), ResidualBlock(2 * width, 2 * width))
        self.up = ResidualBlock(3 * width, width)
        self.upsample = upsampler(width, scale)
        self.conv_last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.down(self.downsample(self.conv_first(x)))
        low = self.middle(self.halve(high))
        low = F.interpolate(low, size=high.shape[-2:], mode="nearest")
        return self.conv_last(self.upsample(self.up(torch.cat([high, low], dim=1))))


class MlpProjector(nn.Module):
    """Three layers at every pixel alone: [B, in, H, W] -> [B, out, H·scale, W·scale] by pixel shuffle and unshuffle."""

    def __init__(self, in_channels: int, out_channels: int, width: int, scale: Fraction | int = 1) -> None:
        super().__init__()
        power = power_of_two(scale)
        more, fewer = max(power, 0), max(-power, 0)
        self.unshuffle = unshuffling(scale)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels * 4**fewer, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, out_channels * 4**more, 1),
            *(enlarged(scale, nn.PixelShuffle(2**more)) if scale >= 1 else ()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.unshuffle(x))
