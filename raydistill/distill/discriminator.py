"""Discriminator: a small convolutional head on the fake score's intermediate features."""

from __future__ import annotations

import torch
from torch import nn


class Discriminator(nn.Module):
    """Features [B, D, h, w] -> logits [B, h', w'] (patches), positive for real."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        groups = next(g for g in (8, 4, 2, 1) if width % g == 0)
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # contiguous: torch 2.13 crashes in GroupNorm's backward on the strides of transposed tokens
        return self.layers(features.float().contiguous())[:, 0]
