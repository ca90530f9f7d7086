"""The one-step student: a single network evaluation at its start timestep, read as x_0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raydistill.diffusion.path import add_noise, to_x0
from raydistill.spaces.base import Conditioning, Space


def x0_gain(space: Space, start_timestep: int) -> float:
    """How many times larger an error of the network's prediction is in the student's x_0: |d x_0 / d prediction|."""
    t_B = space.path.t_of_timestep(torch.tensor([start_timestep], dtype=torch.float64))
    at = torch.zeros(1, 1, 1, 1)
    zero, one = (to_x0(space.path, space.prediction, at, torch.full_like(at, value), t_B) for value in (0.0, 1.0))
    return (one - zero).abs().item()


def one_step_x0(
    space: Space,
    network: Callable[..., Any],
    noise: torch.Tensor,
    conditioning: Conditioning,
    start_timestep: int,
) -> torch.Tensor:
    """The student's picture of `noise`, differentiable in the network's weights.

    A student that starts at the last step of its path (t = 999, as DMD2's) sees plain unit noise; one that starts
    earlier (t = 625, as SiD-LSG's) sees noise scaled by sigma of that step (arXiv 2606.32020), where its family has no
    `plain_start`.

    Args:
        noise: [B, C, H, W], standard normal.
        start_timestep: 1 … N - 1 of the path's N steps.

    Returns x_0 in the student's normalised latent space, [B, C, H, W] float32.

    Raises:
        ValueError: the start timestep is not on the path.
    """
    last = space.path.num_train_timesteps - 1
    if not 0 < start_timestep <= last:
        raise ValueError(f"start_timestep {start_timestep} is outside 1 … {last}, the steps of {space.folder}")
    timestep_B = torch.full((len(noise),), start_timestep, dtype=torch.float64, device=noise.device)
    t_B = space.path.t_of_timestep(timestep_B).float()
    noise = noise.float()
    plain = space.plain_start or start_timestep == last
    x_t = noise if plain else add_noise(space.path, torch.zeros_like(noise), noise, t_B)
    return to_x0(space.path, space.prediction, x_t, space.predict(network, x_t, t_B, conditioning), t_B)
