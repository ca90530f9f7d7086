"""The discriminator: small convolutional heads on the fake score's features, one for each depth that is read.

A head sees a feature map as it is, or standardised (`discriminator.standardize`). Transformers have a few channels that
are hundreds of times as large as the others (massive activations, Sun et al. 2024, arXiv 2402.17762). The norm at the
head's input has one scale for all channels, so such channels leave nothing of the others. Standardised, channel c is

    (f_c - m_c) / s_c        m_c, s_c: mean and spread of the teacher samples' features, over positions and over t

Shapes: B samples, D channels of features, h×w positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

SMALLEST = 1e-3  # of the median spread: a channel that hardly changes does not drown the others when students move it

TINY = 1e-6  # median spread of features that are all alike


class Head(nn.Module):
    """Features [B, D, h, w] of one depth -> logits [B, h', w'] (patches), positive for real.

    Attributes:
        mean, spread: of each channel [D], where it standardises; a spread of 0: they were not measured yet.
    """

    def __init__(self, channels: int, width: int, standardize: bool = False) -> None:
        super().__init__()
        self.standardize = standardize
        if standardize:
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("spread", torch.zeros(channels))
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
        features = features.float().contiguous()
        if self.standardize:
            features = (features - self.mean[:, None, None]) / self.spread[:, None, None]
        return self.layers(features)[:, 0]

    @torch.no_grad()
    def take(self, moments: torch.Tensor) -> None:
        """Mean and spread from the mean and the mean square of each channel, [2, D] float64."""
        mean, square = moments
        self.mean.copy_(mean)
        spread = (square - mean.square()).clamp_min(0).sqrt()
        self.spread.copy_(spread.clamp_min(SMALLEST * spread.median().clamp_min(TINY)))


class Discriminator(nn.Module):
    """A head for each depth.

    Args:
        channels: of the features of each depth.
        width: channels of the heads.
        standardize: see the top of this file.

    Attributes:
        measured: whether it can be used: where it standardises, the statistics have to be there.
    """

    def __init__(self, channels: Sequence[int], width: int, standardize: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(one, width, standardize) for one in channels)
        self.measured = not standardize
        self.register_load_state_dict_pre_hook(_name_the_head)
        self.register_load_state_dict_post_hook(_look_whether_measured)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features [B, D, h, w] of each depth -> each head's logits [B, h', w']."""
        return [head(one) for head, one in zip(self.heads, features, strict=True)]

    def take(self, moments: Sequence[torch.Tensor]) -> None:
        """The statistics of the teacher samples' features, for each depth as in `Head.take`."""
        for head, one in zip(self.heads, moments, strict=True):
            head.take(one)
        self.measured = True


@torch.no_grad()
def moments_of(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mean and mean square of each channel over samples and positions: [2, D] float64 for each depth."""
    found = []
    for one in features:
        flat = one.double().transpose(0, 1).flatten(1)
        found.append(torch.stack([flat.mean(1), flat.square().mean(1)]))
    return found


def _name_the_head(module: Discriminator, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of versions with a single head do not name it."""
    for key in [key for key in state if key.startswith(f"{prefix}layers.")]:
        state[f"{prefix}heads.0.{key.removeprefix(prefix)}"] = state.pop(key)


def _look_whether_measured(module: Discriminator, _: Any) -> None:
    module.measured = all(bool((head.spread > 0).all()) for head in module.heads if head.standardize)
