"""The ablation's other projectors: a small convolutional U-Net and a per-pixel MLP (arXiv 2606.32020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.bridge.swinir import upsampler


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
    """Two-level U-Net: [B, in, H, W] -> [B, out, H·upscale, W·upscale]; any H and W of at least 2."""

    def __init__(self, in_channels: int, out_channels: int, width: int, upscale: int = 1) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = ResidualBlock(width, width)
        self.halve = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(ResidualBlock(2 * width, 2 * width), ResidualBlock(2 * width, 2 * width))
        self.up = ResidualBlock(3 * width, width)
        self.upsample = upsampler(width, upscale)
        self.conv_last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.down(self.conv_first(x))
        low = self.middle(self.halve(high))
        low = F.interpolate(low, size=high.shape[-2:], mode="nearest")
        return self.conv_last(self.upsample(self.up(torch.cat([high, low], dim=1))))


class MlpProjector(nn.Module):
    """Three layers at every pixel alone: [B, in, H, W] -> [B, out, H·upscale, W·upscale] by pixel shuffle."""

    def __init__(self, in_channels: int, out_channels: int, width: int, upscale: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, out_channels * upscale**2, 1),
            nn.PixelShuffle(upscale),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)
