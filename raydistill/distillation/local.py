"""Distillation in this process, without Ray: for a notebook, a test, or a comparison of settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raydistill.bridge.model import Bridge
from raydistill.config.schema import Config
from raydistill.data.encode import Batch, PromptTable, TextEncoder
from raydistill.data.local_teacher import LocalTeacher
from raydistill.data.prompts import PromptSet, training_prompts
from raydistill.data.reward_texts import REWARD, RewardTexts
from raydistill.distillation.batches import Made
from raydistill.distillation.networks import guidance_scale, load_real, load_unet
from raydistill.distillation.reward import load_reward
from raydistill.distillation.schedule import Unchecked
from raydistill.distillation.updates import Distiller, build_distiller
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning
from raydistill.storage.resolve import resolve


@dataclass(frozen=True)
class LocalScores(LocalTeacher):
    """A teacher in this process as `schedule.Submit`."""

    unconditional: Conditioning
    guidance_scale: float
    guidance_rescale: float = 0.0

    def __call__(self, made: Made) -> Unchecked:
        inputs = made.x_t, made.t_B, made.teacher_conditioning
        guidance = self.guidance_scale, self.guidance_rescale
        return Unchecked(self.predict_x0(*inputs, self.unconditional, *guidance))


def local_batches(prompts: PromptSet, tables: Mapping[str, PromptTable], size: int, seed: int) -> Iterator[Batch]:
    """What `conditioned_batches` gives a single worker: `size` samples, from each role's table of every prompt."""
    for slot in itertools.count():
        positions = range(slot * size, (slot + 1) * size)
        captions = prompts.at(seed, positions)[1]
        columns = {
            f"{role}.{name}": value.numpy() for role, table in tables.items() for name, value in table(captions).items()
        }
        yield {"sample_id": list(positions)} | columns


def local_distillation(config: Config, reward_places: Mapping[str, str] | None = None) -> tuple[Distiller, LocalScores]:
    """The Distiller that a run of one worker has, and its teacher; for `schedule.distillation_step`.

    The conditioning of every prompt is kept in memory, and so are both copies of the teacher.

    Args:
        reward_places: `evaluation.metrics.reward_places` of the configuration; None: it asks for no reward.
    """
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    prompts = training_prompts(config)
    reward, texts = load_reward(config, student, reward_places), {"student": student, "teacher": teacher}
    if reward is not None:
        texts[REWARD] = RewardTexts(config.reward.metric, reward_places)
    tables = {role: PromptTable(one, prompts.prompts) for role, one in texts.items()}
    gan = config.discriminator
    real = load_real(resolve(gan.real_data), teacher, gan.real_count) if gan.weight > 0 else None
    distiller = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=load_unet(student, config.student.unet, config.student.lora_start),
        bridge=Bridge.load(resolve(config.bridge.checkpoint), student, teacher),
        fake_network=teacher.load_network(),
        source=local_batches(prompts, tables, config.distill.batch_size, config.run.seed),
        real=real,
        reward=reward,
    )
    empty = TextEncoder(teacher).encode_unconditional()
    guidance = guidance_scale(config, teacher), config.vsd.guidance_rescale
    return distiller, LocalScores(teacher, teacher.load_network(), empty, *guidance)
