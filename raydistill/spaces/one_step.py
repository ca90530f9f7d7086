"""The student: a network evaluation at its start timestep, read as x_0; and a few more, each of the last x_0 noised again.

Multi-step sampling of consistency models (Song et al. 2023, arXiv 2303.01469, algorithm 1), as DMD2 draws in four steps
(arXiv 2405.14867, section 4.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from raydistill.diffusion.path import add_noise, to_x0
from raydistill.diffusion.timesteps import least_start, student_timesteps
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
    noise = noise.float()
    plain = space.plain_start or start_timestep == last
    x_t = noise if plain else noised_again(space, torch.zeros_like(noise), noise, timestep_B)
    return x0_at(space, network, x_t, timestep_B, conditioning)


def x0_at(
    space: Space, network: Callable[..., Any], x_t: torch.Tensor, timestep_B: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """x_0 [B, C, H, W] float32 of one evaluation at x_t, of which each sample has its own timestep."""
    t_B = space.path.t_of_timestep(timestep_B).float()
    return to_x0(space.path, space.prediction, x_t, space.predict(network, x_t, t_B, conditioning), t_B)


def noised_again(space: Space, x0: torch.Tensor, noise: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
    """What a later evaluation sees of the x_0 of the one before it: alpha x_0 + sigma noise."""
    return add_noise(space.path, x0.float(), noise, space.path.t_of_timestep(timestep_B).float())


def through_steps(
    space: Space,
    evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    timesteps: Sequence[int],
    more_noise: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """The last x_0 of several evaluations.

    The first one sees plain noise, wherever it starts: diffusers has no scheduler that would scale it and noise x_0 again.

    Args:
        evaluate: x_0 of x_t [B, C, H, W] at timesteps [B].
        noise: [B, C, H, W], standard normal.
        timesteps: `student_timesteps`.
        more_noise: of the evaluation with this number, 1 … steps - 1.
    """
    first, *later = (torch.full((len(noise),), at, dtype=torch.float64, device=noise.device) for at in timesteps)
    x0 = evaluate(noise.float(), first)
    for number, timestep_B in enumerate(later, 1):
        x0 = evaluate(noised_again(space, x0, more_noise(number).to(noise.device), timestep_B), timestep_B)
    return x0


def student_x0(
    space: Space,
    network: Callable[..., Any],
    noise: torch.Tensor,
    conditioning: Conditioning,
    start_timestep: int,
    steps: int = 1,
    more_noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The picture of a student of so many steps, as `one_step_x0` has that of one.

    Args:
        more_noise: as of `through_steps`; needed for more than one step.

    Raises:
        ValueError: the start timestep is not on the path, or is too early for so many steps.
    """
    if steps == 1:
        return one_step_x0(space, network, noise, conditioning, start_timestep)
    last = space.path.num_train_timesteps - 1
    if not least_start(steps) <= start_timestep <= last:
        raise ValueError(f"start_timestep {start_timestep} is outside {least_start(steps)} … {last}, for {steps} steps")

    def evaluate(x_t: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        return x0_at(space, network, x_t, timestep_B, conditioning)

    return through_steps(space, evaluate, noise, student_timesteps(start_timestep, steps), more_noise)
