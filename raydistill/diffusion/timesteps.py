"""Diffusion times: sampled for scores, uniform in a range, shifted towards noise for flow models; and those of a student.

Does without torch: the configuration asks here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def shift(t_B: torch.Tensor, factor: float) -> torch.Tensor:
    """SD 3's timestep shift s t / (1 + (s - 1) t); 1 changes nothing, more moves mass towards noise."""
    return factor * t_B / (1 + (factor - 1) * t_B)


def sample_t(uniform_B: torch.Tensor, low: float, high: float, factor: float = 1.0) -> torch.Tensor:
    """Turn U(0, 1) draws into times: shift them, then scale into [low, high].

    The range is applied last, so that no shift can leave it: times near 0 and 1 make x_0 ill-conditioned.
    """
    return low + (high - low) * shift(uniform_B, factor)


def student_timesteps(start_timestep: int, steps: int) -> list[int]:
    """The timesteps of a student's evaluations, from the most noise to the least.

    Evenly down: with T = start_timestep + 1 and k = floor(T / steps) they are k (steps - i) - 1 for i = 0 … steps - 1, as
    LCMScheduler of diffusers has them (arXiv 2310.04378). 999 in four steps is 999, 749, 499, 249, as in DMD2. Where
    steps does not divide T, the first one lies a little below the start: 625 in four is 623, 467, 311, 155.
    """
    each = (start_timestep + 1) // steps
    return [each * left - 1 for left in range(steps, 0, -1)]


def least_start(steps: int) -> int:
    """The least start timestep of a student of so many: of several the last lies at 1 or above.

    At 0 there is nothing left to take away, and LCMScheduler returns what it is given, x_t.
    """
    return 1 if steps == 1 else 2 * steps - 1
