"""What a worker loads besides the pipelines' own networks."""

from __future__ import annotations

from pathlib import Path

import torch

from raydistill.config.schema import Config
from raydistill.data.encode import encode_table
from raydistill.data.pairs import read_pairs
from raydistill.distill.distiller import Real
from raydistill.spaces.base import Space
from raydistill.spaces.published_students import load_student
from raydistill.storage.resolve import resolve


def guidance_scale(config: Config, teacher_space: Space) -> float:
    """The configured guidance, else the teacher family's default."""
    configured = config.teacher.guidance_scale
    return teacher_space.default_guidance_scale if configured is None else configured


def load_unet(space: Space, checkpoint: str | None) -> torch.nn.Module:
    """The student's starting network, float32: a one-step checkpoint (`student.unet`), or the pipeline's own UNet.

    Raises:
        InputError: the checkpoint is no student of this family, or cannot be read safely.
    """
    return space.load_network() if checkpoint is None else load_student(space, resolve(checkpoint))


def load_real(
    folder: Path,
    teacher_space: Space,
    count: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Real:
    """The first `count` teacher samples, in memory, with the conditioning of their own captions.

    Args:
        dtype: of the text encoders and of the conditioning.
        device: where they run, before anything else is there.
    """
    pairs = read_pairs(folder, z_T_shape=teacher_space.latent_shape)
    pairs = pairs.rows(range(min(count, len(pairs))))
    table, row = encode_table(teacher_space, pairs.prompts, dtype, device)
    return Real(pairs.z_T, table, torch.tensor([row[prompt] for prompt in pairs.prompts]))
