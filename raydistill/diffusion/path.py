"""The Gaussian path x_t = alpha_t x_0 + sigma_t eps, and conversions of network predictions to x_0.

Time t runs from 0 (data) to 1 (noise) for every family. Shapes: B samples, any trailing dimensions.
All arithmetic is float32 or better: SD 1.5 at its last step has alpha = 0.068, so x_0 amplifies an
error of eps 14.65 times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from raydistill.transfer import upload

Prediction = Literal["epsilon", "v_prediction", "velocity"]


def expand(value_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, …] with as many dimensions as `like`."""
    return value_B.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow: alpha = 1 - t, sigma = t (SD 3, FLUX)."""

    num_train_timesteps: int = 1000

    def alpha_sigma(self, t_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - t_B, t_B

    def timestep(self, t_B: torch.Tensor) -> torch.Tensor:
        """What diffusers schedulers call the timestep: t scaled to 0 … 1000, continuous."""
        return t_B * self.num_train_timesteps

    def t_of_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep / self.num_train_timesteps


@dataclass(frozen=True)
class DiscretePath:
    """Variance preserving DDPM with N discrete steps: alpha_i = sqrt(prod(1 - beta)), t = i / (N - 1)."""

    alphas_cumprod: torch.Tensor  # [N] float64

    @classmethod
    def from_scheduler_config(cls, config: dict) -> DiscretePath:
        """Read the betas of any diffusers DDPM-like scheduler configuration."""
        from diffusers import DDPMScheduler  # slow, and needed by none of the equations

        keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        scheduler = DDPMScheduler(**{key: config[key] for key in keys if config.get(key) is not None})
        return cls((1 - scheduler.betas.double()).cumprod(0))

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> torch.Tensor:
        """[N] float64."""
        first = torch.ones(1, dtype=self.alphas_cumprod.dtype)
        return 1 - self.alphas_cumprod / torch.cat([first, self.alphas_cumprod[:-1]])

    def timestep(self, t_B: torch.Tensor) -> torch.Tensor:
        """The nearest integer step, 0 … N - 1."""
        return (t_B.double() * (self.num_train_timesteps - 1)).round().long()

    def t_of_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep / (self.num_train_timesteps - 1)

    def alpha_sigma(self, t_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas_cumprod = upload(self.alphas_cumprod, t_B.device)[self.timestep(t_B)]
        return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


Path = FlowPath | DiscretePath


def add_noise(path: Path, x_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """x_t = alpha_t x_0 + sigma_t eps."""
    alpha, sigma = (expand(v, x_0) for v in path.alpha_sigma(t_B))
    return alpha * x_0 + sigma * noise


def to_x0(path: Path, kind: Prediction, x_t: torch.Tensor, prediction: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """The x_0 estimate of a network prediction, float32.

    epsilon: (x_t - sigma eps) / alpha;  v_prediction: alpha x_t - sigma v;  velocity (v = eps - x_0): x_t - t v.
    """
    x_t, prediction = x_t.float(), prediction.float()
    alpha, sigma = (expand(v, x_t) for v in path.alpha_sigma(t_B))
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * x_t - sigma * prediction
    if kind == "velocity":
        return x_t - sigma * prediction
    raise ValueError(f"unknown prediction type {kind!r}: epsilon, v_prediction or velocity")


def target(path: Path, kind: Prediction, x_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """What a network of this prediction type is trained to output at x_t."""
    if kind == "epsilon":
        return noise
    if kind == "velocity":
        return noise - x_0
    alpha, sigma = (expand(v, x_0) for v in path.alpha_sigma(t_B))
    return alpha * noise - sigma * x_0
