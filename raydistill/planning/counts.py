"""Everything about a configuration that does not depend on the hardware: what the roles of a run hold, compute and send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from raydistill.config.reading import needs_pairs, trains_bridge
from raydistill.config.schema import Config
from raydistill.distill.networks import guidance_scale
from raydistill.planning import counting
from raydistill.spaces import meta
from raydistill.spaces.base import Space

# -- what is counted --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Everything about a configuration that does not depend on the hardware. Bytes, FLOPs; see counting.py."""

    student: str  # pipeline classes
    teacher: str
    batch: int
    trainer: counting.Trainer  # at `batch` samples
    small_batch: int
    small_trainer: counting.Trainer  # at `small_batch` samples
    recomputing: counting.Trainer  # at `batch`, with distill.gradient_checkpointing
    network: counting.Teacher
    bridge: counting.BridgeTraining | None  # one worker's share; None: nothing is trained
    text: dict[str, counting.Text]  # "role part"
    vae: dict[str, counting.Vae]  # by role
    request_bytes: int
    answer_bytes: int
    real_row_bytes: int  # one teacher sample in a worker's memory: latents and conditioning

    @property
    def text_flops(self) -> float:
        """One prompt through all text encoders."""
        return sum(encoder.prompt.flops for encoder in self.text.values())


def conditioning_bytes(teacher: Space, dtype: torch.dtype = torch.float32) -> int:
    """One prompt's conditioning as it travels: real numbers in the text encoders' `dtype`, and integers."""
    layout = teacher.conditioning_layout.values()
    return sum(math.prod(shape) * (dtype if kind.is_floating_point else kind).itemsize for shape, kind in layout)


def request_bytes(teacher: Space, batch: int, guided: bool, dtype: torch.dtype = torch.float32) -> int:
    """Tensors of a ScoreRequest: x_t and t in float32, the conditioning, and with guidance one unconditional row."""
    latents, row = 4 * math.prod(teacher.latent_shape), conditioning_bytes(teacher, dtype)
    return batch * (latents + 4 + row) + (row if guided else 0)


def synthesises(config: Config) -> bool:
    """Whether a run makes pairs."""
    return config.bridge.pairs is None and needs_pairs(config)


def samples(config: Config) -> bool:
    """Whether it makes them from the teacher's samples, not from real images."""
    return synthesises(config) and config.synthesis.images is None


def changed(config: Config, **distill: Any) -> Config:
    """The configuration with other values in its distill section."""
    return config.model_copy(update={"distill": config.distill.model_copy(update=distill)})


def count_run(config: Config) -> Counts:
    """Count a configuration: half a minute for the miniature world, minutes for 12 B parameters. Downloads nothing.

    Raises:
        InputError: models that are unknown, or do not fit each other.
    """
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
    spaces = {"student": student, "teacher": teacher}
    batch, scale = config.distill.batch_size, guidance_scale(config, teacher)
    parts = config.distill.micro_batches
    share = max(1, config.bridge.batch_size // config.distill.fewest)
    latents, encoding = 4 * math.prod(teacher.latent_shape), getattr(torch, config.prompts.encoder_dtype)
    return Counts(
        student=student.pipeline_class,
        teacher=teacher.pipeline_class,
        **_count_trainers(config, counting.count_trainer(config, student, teacher)),
        network=counting.count_teacher(config, teacher, scale),
        bridge=counting.count_bridge(config, student, teacher, share) if trains_bridge(config) else None,
        text=_count_texts(spaces),
        vae={role: counting.count_vae(space) for role, space in spaces.items()},
        request_bytes=request_bytes(teacher, batch // parts, scale != 1.0, encoding),
        answer_bytes=batch // parts * latents,
        real_row_bytes=latents + conditioning_bytes(teacher, encoding),
    )


def _count_trainers(config: Config, trainer: counting.Trainer) -> dict[str, Any]:
    """The fields of Counts that say how a trainer's memory grows; `trainer` is it at the configured sizes."""
    batch, parts = config.distill.batch_size, config.distill.micro_batches
    small = parts if batch > parts else 2 * parts  # one sample a part, or two
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)

    def recomputing() -> counting.Trainer:
        return counting.count_trainer(changed(config, gradient_checkpointing=True), student, teacher)

    return {
        "batch": batch,
        "trainer": trainer,
        "small_batch": small,
        "small_trainer": counting.count_trainer(config, student, teacher, small),
        "recomputing": trainer if config.distill.gradient_checkpointing else recomputing(),
    }


def _count_texts(spaces: Mapping[str, Space]) -> dict[str, counting.Text]:
    return {
        f"{role} {part}": value for role, space in spaces.items() for part, value in counting.count_text(space).items()
    }
