"""The teacher's own pictures of the held-out prompts, drawn through its service."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tqdm import tqdm

from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable
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

    def request(start: int, stop: int, captions: list[str]) -> object:
        noise = fixed.noise(space, start, stop)
        return generate(noise, table(captions), empty, config.teacher.sampling_steps, guidance_scale)

    pictures, waiting = [], []
    batches = list(fixed.batches(config.evaluation.batch_size))
    for index in tqdm(range(len(batches) + 1), desc="teacher draws", disable=None):
        if index < len(batches):
            waiting.append(request(*batches[index]))
        if len(waiting) == 2 or index == len(batches):
            while waiting and (len(waiting) == 2 or index == len(batches)):
                pictures.append(space.decode(vae, waiting.pop(0).result()))
    images = torch.cat(pictures)
    judge = Judge.load(resolve(config.evaluation.judge)) if config.evaluation.judge else None
    return images, judge.accuracy(images, fixed.captions) if judge else {}
