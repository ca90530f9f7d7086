"""Evaluation of one-step students and multi-step teachers: fixed prompts, fixed noise, a table of means.

Shapes: N pictures [N, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from raydistill.config.schema import Config
from raydistill.config.stages import EvaluationConfig
from raydistill.data.encode import PromptTable
from raydistill.data.prompts import PromptSet
from raydistill.data.synthesis import in_order
from raydistill.diffusion.noise import normal
from raydistill.distillation.compiled import as_it_is
from raydistill.distillation.schedule import Unchecked
from raydistill.evaluation.png_scorer import Columns
from raydistill.shapes.judge import Judge, columns_of, table_of
from raydistill.spaces.base import Space
from raydistill.spaces.one_step import student_x0
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

    def noise(self, space: Space, start: int, stop: int, step: int = 0) -> torch.Tensor:
        """Of these pictures; `step`: of a student of several."""
        return normal(self.seed, range(start, stop), space.latent_shape, "evaluation", step)

    def batches(self, size: int) -> Iterator[tuple[int, int, list[str]]]:
        for start in range(0, len(self.captions), size):
            captions = self.captions[start : start + size]
            yield start, start + len(captions), captions


Scorers = Callable[[torch.Tensor, Sequence[str]], Columns]  # pictures, captions -> columns of metrics


@dataclass(frozen=True)
class Measured:
    """What was measured of a set of pictures.

    Attributes:
        table: mean of each column, over the pictures that have a number.
        spread: standard deviation of its numbers.
        each: the numbers themselves, picture by picture; None: the metric has none for it.
    """

    table: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    each: dict[str, list[float | None]] = field(default_factory=dict)

    def with_columns(self, columns: Mapping[str, Sequence[float | None]]) -> Measured:
        """With these besides; columns without any number are left out."""
        table, spread, each = dict(self.table), dict(self.spread), dict(self.each)
        for name, values in columns.items():
            if numbers := [value for value in values if value is not None]:
                table.setdefault(name, math.fsum(numbers) / len(numbers))
                spread[name] = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
                each[name] = list(values)
        return Measured(table, spread, each)


def measure(pictures: torch.Tensor, captions: Sequence[str], judge: Judge | None, scorers: Scorers | None) -> Measured:
    """By the judge and by other metrics, where there are any."""
    found = Measured()
    if judge is not None:
        judged = judge.compare(pictures, captions)
        columns = {name: values.tolist() for name, values in columns_of(judged).items()}
        found = Measured(table_of(judged)).with_columns(columns)
    return found if scorers is None else found.with_columns(scorers(pictures, captions))


def judge_of(config: EvaluationConfig) -> Judge | None:
    """None: the configuration asks for none."""
    return Judge.load(resolve(config.judge)) if config.judge is not None and config.judged else None


class StudentEvaluator:
    """Draws a student's pictures of a fixed set and has them judged."""

    def __init__(
        self,
        space: Space,
        fixed: FixedPrompts,
        config: EvaluationConfig,
        device: torch.device | str,
        scorers: Scorers | None = None,
        *,
        table: PromptTable | None = None,
    ) -> None:
        """
        Args:
            scorers: of the metrics beside the judge; None: they are left out.
            table: the student's conditioning of the set; None: it is made here, on the CPU.
        """
        self.scorers = scorers
        self.space, self.fixed, self.config, self.device = space, fixed, config, torch.device(device)
        self.table = PromptTable(space, fixed.captions) if table is None else table
        self.vae = space.load_vae().to(device)
        self.judge = judge_of(config)

    @torch.no_grad()
    def draw(self, unet: nn.Module, start_timestep: int, steps: int = 1) -> torch.Tensor:
        """One picture a prompt, in all of the student's steps, on the CPU."""
        pictures = []
        for start, stop, captions in self.fixed.batches(self.config.batch_size):
            conditioning = {name: value.to(self.device) for name, value in self.table(captions).items()}
            noise = self.fixed.noise(self.space, start, stop).to(self.device)
            again = partial(self.fixed.noise, self.space, start, stop)
            with as_it_is(unet):
                latents = student_x0(self.space, unet, noise, conditioning, start_timestep, steps, again)
            pictures.append(self.space.decode(self.vae, latents).cpu())
        return torch.cat(pictures)

    def measured(self, pictures: torch.Tensor) -> Measured:
        """Empty where nothing is measured."""
        return measure(pictures, self.fixed.captions, self.judge, self.scorers)

    def accuracy(self, pictures: torch.Tensor) -> dict[str, float]:
        """The table of means."""
        return self.measured(pictures).table


@torch.no_grad()
def draw_teacher(
    generate: Callable[..., Any],
    space: Space,
    fixed: FixedPrompts,
    config: Config,
    guidance_scale: float,
    scorers: Scorers | None = None,
    steps: int | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(pictures [N, 3, S, S], table of means), by `TeacherClient.generate`. Two requests are under way at any time.

    Without a metric only those are drawn that the grid shows. A picture that is not finite is black, is said, and counts
    in no mean. Raises NonFiniteError where none is finite.

    Args:
        steps: of a picture; None: `teacher.sampling_steps`.
    """
    steps = steps or config.teacher.sampling_steps
    if not config.evaluation.measured:
        fixed = fixed.first(config.evaluation.grid)
    table = PromptTable(space, ["", *fixed.captions], getattr(torch, config.prompts.encoder_dtype))
    empty = space.unconditional(table([""]))
    vae = space.load_vae()

    def ask(batch: tuple[int, int, list[str]]) -> Any:
        start, stop, captions = batch
        noise = fixed.noise(space, start, stop)
        return Unchecked(generate(noise, table(captions), empty, steps, guidance_scale))

    batches, images = list(fixed.batches(config.evaluation.batch_size)), []
    with screen.bar("teacher draws", "batch") as bar:
        for latents in in_order(batches, ask, ahead=1):
            images.append(space.decode_each(vae, latents))
            bar.update(len(images), len(batches))
    images = torch.cat(images)
    finite = images.isfinite().flatten(1).all(1)
    if not finite.any():
        space.decode(vae, latents)  # says which part it was
    if bad := (~finite).nonzero().flatten().tolist():
        screen.say(f"teacher   {len(bad)} of {len(images)} pictures are not finite, and left out of its row: {bad}")
    captions = [caption for caption, good in zip(fixed.captions, finite.tolist(), strict=True) if good]
    measured = measure(images[finite], captions, judge_of(config.evaluation), scorers)
    return images.nan_to_num(-1.0), measured.table
