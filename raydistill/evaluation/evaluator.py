"""Evaluation of one-step students and multi-step teachers: fixed prompts, fixed noise, the judge's table.

Shapes: N pictures [N, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from raydistill.config import Evaluation, resolve
from raydistill.data.prompts import PromptSet
from raydistill.diffusion.noise import normal
from raydistill.distill.student import one_step_x0
from raydistill.shapes.judge import Judge
from raydistill.spaces import Conditioning, Space
from raydistill.storage import Place, reading, writing

TEXT_BATCH = 64  # prompts per forward of the text encoders


class FixedPrompts:
    """`count` prompts in a seeded order, each picture with its own fixed noise.

    A file may be sorted, so its first lines say little; where it has fewer prompts, all repeat equally often (±1).
    """

    def __init__(self, prompts: PromptSet, count: int, seed: int) -> None:
        self.seed = seed
        self.captions = prompts.at(seed, range(count))[1]

    def first(self, count: int) -> FixedPrompts:
        """The same set without what comes after its first `count`."""
        shorter = copy.copy(self)
        shorter.captions = self.captions[:count]
        return shorter

    def noise(self, space: Space, start: int, stop: int) -> torch.Tensor:
        return normal(self.seed, range(start, stop), space.latent_shape, "evaluation")

    def batches(self, size: int) -> Iterator[tuple[int, int, list[str]]]:
        for start in range(0, len(self.captions), size):
            part = self.captions[start : start + size]
            yield start, start + len(part), part


def encode_table(
    space: Space, prompts: Iterable[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Conditioning, dict[str, int]]:
    """Conditioning of the distinct prompts, one row each, on the CPU, and every prompt's row.

    Args:
        dtype: of the text encoders and of the table.
        device: where they run; they are dropped afterwards.
    """
    unique = list(dict.fromkeys(prompts))
    text = space.load_text(dtype).to(device)
    parts = []
    for start in range(0, len(unique), TEXT_BATCH):
        encoded = space.encode_prompts(text, unique[start : start + TEXT_BATCH])
        parts.append({name: value.cpu() for name, value in encoded.items()})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, {p: i for i, p in enumerate(unique)}


class StudentEvaluator:
    """Draws one-step pictures of a fixed set and has them judged."""

    def __init__(self, space: Space, fixed: FixedPrompts, config: Evaluation, device: torch.device | str) -> None:
        self.space, self.fixed, self.config, self.device = space, fixed, config, torch.device(device)
        self.table, self.row = encode_table(space, fixed.captions)
        self.vae = space.load_vae().to(device)
        self.judge = Judge.load(resolve(config.judge)) if config.judge else None

    @torch.no_grad()
    def draw(self, unet: nn.Module, start_timestep: int) -> torch.Tensor:
        """One picture a prompt, on the CPU."""
        pictures = []
        for start, stop, captions in self.fixed.batches(self.config.batch_size):
            rows = torch.tensor([self.row[caption] for caption in captions])
            conditioning = {name: value[rows].to(self.device) for name, value in self.table.items()}
            noise = self.fixed.noise(self.space, start, stop).to(self.device)
            latents = one_step_x0(self.space, unet, noise, conditioning, start_timestep)
            pictures.append(self.space.decode(self.vae, latents).cpu())
        return torch.cat(pictures)

    def accuracy(self, pictures: torch.Tensor) -> dict[str, float]:
        """The judge's table; empty without a judge."""
        return self.judge.accuracy(pictures, self.fixed.captions) if self.judge else {}


def save_pictures(file: Place, pictures: torch.Tensor) -> None:
    """Lossless small store of pictures: uint8 safetensors."""
    from safetensors.torch import save_file

    with writing(file) as local:
        local.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": ((pictures + 1) * 127.5).round().to(torch.uint8).contiguous()}, local)


def load_pictures(file: Place) -> torch.Tensor:
    """What `save_pictures` wrote, back in [-1, 1]."""
    from safetensors.torch import load_file

    with reading(file) as local:
        return load_file(local)["pictures"].float() / 127.5 - 1
