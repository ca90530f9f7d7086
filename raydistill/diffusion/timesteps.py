"""Sampling of diffusion times: uniform in a range, shifted towards noise for flow models."""

from __future__ import annotations

import torch


def shift(t_B: torch.Tensor, factor: float) -> torch.Tensor:
    """SD 3's timestep shift s t / (1 + (s - 1) t); 1 changes nothing, more moves mass towards noise."""
    return factor * t_B / (1 + (factor - 1) * t_B)


def sample_t(uniform_B: torch.Tensor, low: float, high: float, factor: float = 1.0) -> torch.Tensor:
    """Turn U(0, 1) draws into times: shift them, then scale into [low, high].

    The range is applied last, so that no shift can leave it: times near 0 and 1 make x_0 ill-conditioned.
    """
    return low + (high - low) * shift(uniform_B, factor)
