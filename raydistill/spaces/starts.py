"""What a student starts from: the pipeline's own UNet, or a published one-step UNet in its place."""

from __future__ import annotations

from torch import nn

from raydistill.spaces.base import Space
from raydistill.spaces.published_students import load_student
from raydistill.storage.resolve import resolve


def load_start(space: Space, unet: str | None) -> nn.Module:
    """The student's starting network, float32, on the CPU.

    Args:
        unet: `student.unet`; None: the pipeline's own.

    Raises:
        InputError: the checkpoint is no student of this family, or cannot be read safely.
    """
    return space.load_network() if unet is None else load_student(space, resolve(unet))
