"""Scaled gradients of a student in float16, by the rule of torch.amp.GradScaler (Micikevicius et al., arXiv 1710.03740).

float16 has TF32's ten bits of mantissa, and a GPU computes with it twice as fast. But what is below 6e-8 is 0 in it, and what
is above 65,504 is infinite. A mean over a batch has smaller gradients than that. So the gradient that enters the student is
multiplied by a power of two, and that of its weights, which is float32, is divided by it: neither rounds.

Where the weights' gradient is not finite although every value of the forward pass is, the scale was too large. GradScaler
would leave the update out. Here it is done again with half the scale, so an update more or less is no matter of chance.
All workers see the same mean gradient, and decide alike. A value of a sample is another matter (`leaving_out.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from raydistill.errors import GradientOverflow

T = TypeVar("T")

START, LEAST, MOST = 2.0**16, 1.0, 2.0**24  # powers of two; START and GROWS_AFTER are GradScaler's
GROWS_AFTER = 2000  # updates without an overflow, after which the scale is doubled


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.scale * gradient, None


class GradientScale:
    """The scale, the same on all workers.

    Attributes:
        value: the scale.
        halved: how often it was since this was taken last.
    """

    def __init__(self) -> None:
        self.value, self.halved = START, 0
        self._good = 0  # updates since it has changed

    def enter(self, z_student: torch.Tensor) -> torch.Tensor:
        """The student's latents as they are; what comes back to the student is scaled."""
        return _Scaled.apply(z_student, self.value) if z_student.requires_grad else z_student

    def leave(self, gradients: list[torch.Tensor]) -> None:
        """Divide gradients of the student's weights by the scale, in place."""
        torch._foreach_mul_(gradients, 1 / self.value)

    def run(self, phase: Callable[[], T], undo: Callable[[], None]) -> T:
        """An update of the student, again with half the scale where it overflows.

        Args:
            undo: what a phase that failed has left behind.

        Raises:
            GradientOverflow: with the least scale too.
        """
        while True:
            try:
                found = phase()
            except GradientOverflow:
                if self.value <= LEAST:
                    raise
                self.value, self._good = self.value / 2, 0
                self.halved += 1
                undo()
                continue
            self._good += 1
            if self._good >= GROWS_AFTER:
                self.value, self._good = min(MOST, 2 * self.value), 0
            return found

    def pop_metrics(self) -> dict[str, float]:
        """student/gradient_scale, and guard/overflows where there were some since the last call."""
        halved, self.halved = self.halved, 0
        return {"student/gradient_scale": self.value} | ({"guard/overflows": float(halved)} if halved else {})

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._good = state["value"], state["good"]
