"""Distillation in this process, without Ray: for a notebook, a test, or a comparison of settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from raydistill.bridge.model import Bridge
from raydistill.config.schema import Config
from raydistill.data.encode import Batch, encode_table, encode_unconditional
from raydistill.data.prompts import PromptSet, training_prompts
from raydistill.distill.batches import Made
from raydistill.distill.build import build_distiller
from raydistill.distill.networks import guidance_scale, load_real, load_unet
from raydistill.distill.updates import Distiller
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space
from raydistill.storage.resolve import resolve


class LocalScores:
    """Teacher in this process, with the interface of the service's client."""

    def __init__(self, space: Space, network: nn.Module, unconditional: Conditioning, guidance_scale: float) -> None:
        self.space, self.network = space, network
        self.unconditional, self.guidance_scale = unconditional, guidance_scale

    def __call__(self, made: Made) -> LocalScores:
        self._made = made
        return self

    @torch.no_grad()
    def result(self) -> torch.Tensor:
        made = self._made
        return self.space.predict_x0(
            self.network, made.x_t, made.t_B, made.teacher_conditioning, self.unconditional, self.guidance_scale
        )


def local_batches(
    prompts: PromptSet, tables: Mapping[str, tuple[Conditioning, Mapping[str, int]]], size: int, seed: int
) -> Iterator[Batch]:
    """What `conditioned_batches` gives a single worker, from tables that hold every prompt.

    Args:
        tables: role -> what `encode_table` returns.
        size: samples of a batch.
    """
    for slot in itertools.count():
        positions = range(slot * size, (slot + 1) * size)
        captions = prompts.at(seed, positions)[1]
        columns = {
            f"{role}.{name}": value[[rows[caption] for caption in captions]].numpy()
            for role, (table, rows) in tables.items()
            for name, value in table.items()
        }
        yield {"sample_id": list(positions)} | columns


def local_distillation(config: Config) -> tuple[Distiller, LocalScores]:
    """The Distiller that a run of one worker has, and its teacher; for `schedule.distillation_step`.

    The conditioning of every prompt is kept in memory, and so are both copies of the teacher.
    """
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    prompts = training_prompts(config)
    tables = {
        role: encode_table(space, prompts.prompts) for role, space in (("student", student), ("teacher", teacher))
    }
    gan = config.discriminator
    real = load_real(resolve(gan.real_data), teacher, gan.real_count) if gan.weight > 0 else None
    distiller = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=load_unet(student, config.student.unet),
        bridge=Bridge.load(resolve(config.bridge.checkpoint), student, teacher),
        fake_network=teacher.load_network(),
        source=local_batches(prompts, tables, config.distill.batch_size, config.run.seed),
        real=real,
    )
    scale = guidance_scale(config, teacher)
    return distiller, LocalScores(teacher, teacher.load_network(), encode_unconditional(teacher), scale)
