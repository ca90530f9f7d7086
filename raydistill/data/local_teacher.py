"""A teacher in this process, with the methods of the service's client: for notebooks, tests and small sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raydistill.errors import NonFiniteError
from raydistill.spaces.base import Conditioning, Space


@dataclass(frozen=True)
class LocalAnswer:
    """What a teacher computes when it is asked for."""

    compute: Callable[..., torch.Tensor]
    arguments: tuple[Any, ...]

    def ready(self) -> bool:
        return True

    @torch.no_grad()
    def result(self, check_finite: bool = True) -> torch.Tensor:
        """[B, C, H, W] float32 on the CPU. Raises NonFiniteError unless check_finite is off."""
        answer = self.compute(*self.arguments).float().cpu()
        if check_finite and not bool(torch.isfinite(answer).all()):
            raise NonFiniteError("the teacher's answer is not finite")
        return answer


@dataclass(frozen=True)
class LocalTeacher:
    """Computes on the device of its network."""

    space: Space
    network: nn.Module

    def generate(
        self,
        noise: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        steps: int,
        guidance_scale: float,
    ) -> LocalAnswer:
        """Multi-step samples from noise [B, C, H, W]."""
        inputs = (self._moved(value) for value in (noise, conditioning, unconditional))
        return LocalAnswer(self.space.sample, (self.network, *inputs, steps, guidance_scale))

    def predict_x0(
        self,
        x_t: torch.Tensor,
        t_B: torch.Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> LocalAnswer:
        """Guided estimates of x_0 from x_t [B, C, H, W]."""
        inputs = (self._moved(value) for value in (x_t, t_B, conditioning, unconditional))
        return LocalAnswer(self.space.predict_x0, (self.network, *inputs, guidance_scale, guidance_rescale))

    def _moved(self, value: torch.Tensor | Conditioning | None) -> Any:
        device = next(self.network.parameters()).device
        if isinstance(value, dict):
            return {name: tensor.to(device) for name, tensor in value.items()}
        return value if value is None else value.to(device)
