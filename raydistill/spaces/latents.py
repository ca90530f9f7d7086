"""The latents of a pipeline folder: their size, and the way between pictures and what the diffusion network sees.

Shapes: B samples, C×H×W latents on the VAE grid (normalised: what the diffusion network was trained on).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import nn

from raydistill.spaces.folder import ModelFolder, Settings


class LatentSpace(ModelFolder, ABC):
    """A folder's VAE, and the affine map from its latents to normalised ones, which its configuration gives."""

    @cached_property
    def vae_config(self) -> Settings:
        return self.part_config("vae")

    @cached_property
    def downscale(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of one sample on the VAE grid."""

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.latent_shape[1] * self.downscale

    def vae_batch(self, most: int) -> int:
        """Pictures for one pass of the VAE, at most: about a megapixel (16 of them would take 52 GB in float32)."""
        return max(1, min(most, 2**20 // self.resolution**2))

    @property
    def scaling(self) -> tuple[float, float]:
        """(shift, scale): normalised = (raw - shift) · scale."""
        return self.vae_config.get("shift_factor") or 0.0, self.vae_config["scaling_factor"]

    def normalise(self, raw: torch.Tensor) -> torch.Tensor:
        offset, scale = self.scaling
        return (raw - offset) * scale

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        offset, scale = self.scaling
        return latents / scale + offset

    def encode(self, vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, S, S] in [-1, 1] -> normalised latents (the posterior's mean)."""
        return self.normalise(vae.encode(images.to(vae.dtype)).latent_dist.mode())

    def decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents -> images [B, 3, S, S], float32, clamped to [-1, 1]; about a megapixel at a time."""
        raw = self.denormalise(latents).to(vae.dtype)
        parts = [vae.decode(part).sample.float().clamp(-1, 1) for part in raw.split(self.vae_batch(len(raw)))]
        return torch.cat(parts)

    def assume_values(self) -> None:  # noqa: B027 - most families read none
        """Stand-ins for numbers that the family reads from weight files, for counting where there are none."""
