"""Evaluation of one-step students and multi-step teachers: fixed prompts, fixed noise, the judge's table.

Shapes: N pictures [N, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from raydistill.config.schema import Config
from raydistill.config.stages import EvaluationConfig
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import in_order
from raydistill.diffusion.noise import normal
from raydistill.shapes.judge import Judge
from raydistill.spaces.base import Space
from raydistill.spaces.one_step import one_step_x0
from raydistill.storage.resolve import resolve
from raydistill.tracking.screen import screen


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


class StudentEvaluator:
    """Draws one-step pictures of a fixed set and has them judged."""

    def __init__(self, space: Space, fixed: FixedPrompts, config: EvaluationConfig, device: torch.device | str) -> None:
        self.space, self.fixed, self.config, self.device = space, fixed, config, torch.device(device)
        self.table = PromptTable(space, fixed.captions)
        self.vae = space.load_vae().to(device)
        self.judge = Judge.load(resolve(config.judge)) if config.judge else None

    @torch.no_grad()
    def draw(self, unet: nn.Module, start_timestep: int) -> torch.Tensor:
        """One picture a prompt, on the CPU."""
        pictures = []
        for start, stop, captions in self.fixed.batches(self.config.batch_size):
            conditioning = {name: value.to(self.device) for name, value in self.table(captions).items()}
            noise = self.fixed.noise(self.space, start, stop).to(self.device)
            latents = one_step_x0(self.space, unet, noise, conditioning, start_timestep)
            pictures.append(self.space.decode(self.vae, latents).cpu())
        return torch.cat(pictures)

    def accuracy(self, pictures: torch.Tensor) -> dict[str, float]:
        """The judge's table; empty without a judge."""
        return self.judge.accuracy(pictures, self.fixed.captions) if self.judge else {}


@torch.no_grad()
def draw_teacher(
    generate: Callable[..., Any], space: Space, fixed: FixedPrompts, config: Config, guidance_scale: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """(pictures [N, 3, S, S], the judge's table), by `TeacherClient.generate`. Two requests are under way at any time.

    Without a judge only those are drawn that the grid shows.
    """
    if config.evaluation.judge is None:
        fixed = fixed.first(config.evaluation.grid)
    table = PromptTable(space, ["", *fixed.captions], getattr(torch, config.prompts.encoder_dtype))
    empty = space.unconditional(table([""]))
    vae = space.load_vae()

    def ask(batch: tuple[int, int, list[str]]) -> Any:
        start, stop, captions = batch
        noise = fixed.noise(space, start, stop)
        return generate(noise, table(captions), empty, config.teacher.sampling_steps, guidance_scale)

    batches, images = list(fixed.batches(config.evaluation.batch_size)), []
    with screen.bar("teacher draws", "batch") as bar:
        for latents in in_order(batches, ask, ahead=1):
            images.append(space.decode(vae, latents))
            bar.update(len(images), len(batches))
    images = torch.cat(images)
    judge = Judge.load(resolve(config.evaluation.judge)) if config.evaluation.judge else None
    return images, judge.accuracy(images, fixed.captions) if judge else {}
