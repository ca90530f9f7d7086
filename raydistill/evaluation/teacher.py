"""The teacher's own pictures of the held-out prompts, drawn through its service."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tqdm import tqdm

from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable
from raydistill.data.in_order import in_order
from raydistill.evaluation.evaluator import FixedPrompts
from raydistill.shapes.judge import Judge
from raydistill.spaces.base import Space
from raydistill.storage.resolve import resolve

Generate = Callable[..., "object"]  # TeacherClient.generate


@torch.no_grad()
def draw_teacher(
    generate: Generate, space: Space, fixed: FixedPrompts, config: Config, guidance_scale: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """(pictures [N, 3, S, S], the judge's table). Two requests are under way at any time.

    Without a judge only those are drawn that the grid shows.
    """
    if config.evaluation.judge is None:
        fixed = fixed.first(config.evaluation.grid)
    table = PromptTable(space, ["", *fixed.captions], getattr(torch, config.prompts.encoder_dtype))
    empty = space.unconditional(table([""]))
    vae = space.load_vae()

    def ask(batch: tuple[int, int, list[str]]) -> object:
        start, stop, captions = batch
        noise = fixed.noise(space, start, stop)
        return generate(noise, table(captions), empty, config.teacher.sampling_steps, guidance_scale)

    batches = list(fixed.batches(config.evaluation.batch_size))
    answers = tqdm(in_order(batches, ask, ahead=1), desc="teacher draws", total=len(batches), disable=None)
    images = torch.cat([space.decode(vae, latents) for latents in answers])
    judge = Judge.load(resolve(config.evaluation.judge)) if config.evaluation.judge else None
    return images, judge.accuracy(images, fixed.captions) if judge else {}
