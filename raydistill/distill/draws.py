"""Random numbers of the updates: each is a function of (seed, purpose, sample id), so no generator has a state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.timesteps import sample_t

T_MIN, T_MAX = 1e-3, 1 - 1e-3  # the whole range of t but its ill-conditioned ends


@dataclass(frozen=True)
class Draws:
    """Noise and times for sample ids [B], on a device.

    Attributes:
        shift: of the sampled times (`vsd.shift`, else the teacher family's).
    """

    seed: int
    shift: float
    device: torch.device

    def normal(self, ids: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """N(0, I), [B, *shape] float32."""
        return normal(self.seed, ids, shape, purpose).to(self.device)

    def uniform(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """U[0, 1), [B] float32."""
        return uniform(self.seed, ids, purpose).to(self.device)

    def t(self, ids: torch.Tensor, purpose: str, t_min: float = T_MIN, t_max: float = T_MAX) -> torch.Tensor:
        """Shifted diffusion times in [t_min, t_max], [B]."""
        return sample_t(self.uniform(ids, purpose), t_min, t_max, self.shift)
