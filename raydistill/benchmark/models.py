"""What sections measure on: networks of any size with random weights, score requests, the default run's trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from raydistill.config.reading import load
from raydistill.distillation.local import LocalScores, local_distillation
from raydistill.distillation.updates import Distiller
from raydistill.spaces import Conditioning, Space


def random_weights(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """A module of the meta device, frozen: matrices random and scaled by their inputs, norms 1, biases and buffers 0."""
    module = module.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        for buffer in module.buffers():
            buffer.zero_()
    return module.eval().requires_grad_(False)


def random_conditioning(
    space: Space, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Conditioning:
    """As the text encoders give it, [B, …]: random numbers in `dtype`, or ones where the layout has integers."""
    return {
        name: torch.randn(batch, *shape, device=device).to(dtype)
        if kind.is_floating_point
        else torch.ones(batch, *shape, dtype=kind, device=device)
        for name, (shape, kind) in space.conditioning_layout.items()
    }


def score_inputs(
    space: Space, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, Conditioning, Conditioning]:
    """Of a guided score: x_t [B, C, H, W] and t [B] in float32, conditioning and one unconditional row in `dtype`."""
    x_t, t_B = torch.randn(batch, *space.latent_shape, device=device), torch.full((batch,), 0.5, device=device)
    return x_t, t_B, *(random_conditioning(space, rows, dtype, device) for rows in (batch, 1))


def default_trainer(batch_size: int, fake_updates: int) -> tuple[Distiller, LocalScores]:
    """The default run's Distiller and its teacher, fed from memory: the loop alone is measured, not its data.

    The student does not learn: the scores of a teacher that sleeps teach nothing.
    """
    sizes = {"distill.batch_size": batch_size, "fake_score.updates": fake_updates, "discriminator.real_count": 64}
    distiller, teacher = local_distillation(load(overrides=[f"{key}={value}" for key, value in sizes.items()]))
    distiller.gradients.optimizers["student"].param_groups[0]["lr"] = 0.0
    return distiller, teacher


@contextlib.contextmanager
def zero3_group(rank: int, world: int, store: torch.distributed.TCPStore, device: torch.device) -> Iterator[ModuleType]:
    """`raydistill.teachers.zero3` in a process group that meets in `store`."""
    os.environ |= {"DS_ACCELERATOR": device.type, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    from raydistill.teachers import zero3  # DeepSpeed reads the environment when it is imported

    zero3.init_process_group(rank, world, store, device)
    try:
        yield zero3
    finally:
        torch.distributed.destroy_process_group()
