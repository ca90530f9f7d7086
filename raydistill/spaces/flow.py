"""What the rectified-flow transformers share: velocity prediction, 2×2 patches, shifted sampling schedules.

Shapes: B samples, C×H×W latents on the VAE grid, N = (H/2)(W/2) image tokens, D features a token.
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from raydistill.diffusion.path import FlowPath
from raydistill.spaces.base import Space

# A LoRA's linear layers in blocks of text and image tokens (MMDiT): the joint attention, and the two feed-forwards.
JOINT_ATTENTION = (
    *(f"attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
    *(f"attn.add_{name}_proj" for name in ("q", "k", "v")),
)
JOINT_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def as_map(tokens: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Image tokens [B, N, D], row by row -> [B, D, H/2, W/2] for latents `x_t` [B, C, H, W]."""
    height, width = x_t.shape[-2:]
    return tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))


def image_tokens_behind_text(output: Any, x_t: torch.Tensor) -> torch.Tensor:
    """`as_map` of a block's output: double blocks return (text, image) tokens, single ones text and then image tokens."""
    tokens = output[1] if isinstance(output, tuple) else output
    height, width = x_t.shape[-2:]
    return as_map(tokens[:, -(height // 2) * (width // 2) :], x_t)


class FlowSpace(Space):
    """A family whose network predicts the velocity eps - x_0 on the straight path, from 2×2 patches of latents."""

    network_name = "transformer"
    prediction = "velocity"
    path = FlowPath()
    pipeline_steps: ClassVar[int] = 50  # where the schedule's shift depends on the number of steps

    # -- schedule ----------------------------------------------------------------------------------
    @property
    def image_tokens(self) -> int:
        """N at this folder's resolution."""
        _, height, width = self.latent_shape
        return height // 2 * (width // 2)

    def mu(self, steps: int) -> float:
        """Argument of the scheduler's dynamic shifting: linear in the number of image tokens (SD 3, FLUX.1)."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (self.image_tokens - config.base_image_seq_len)

    def shift_arguments(self, steps: int) -> dict[str, float]:
        """What `scheduler.set_timesteps` needs besides its sigmas."""
        return {"mu": self.mu(steps)} if self.scheduler.config.use_dynamic_shifting else {}

    @cached_property
    def default_shift(self) -> float:
        """The scheduler's own shift factor; with dynamic shifting, the one it gives at this resolution."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        mu = self.mu(self.pipeline_steps)
        return math.exp(mu) if config.time_shift_type == "exponential" else mu

    def start_sampling(self, steps: int) -> Any:
        """Sigmas evenly spaced from 1 to 1/steps, then the scheduler's shift: the choice of most pipelines."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **self.shift_arguments(steps))
        return scheduler
