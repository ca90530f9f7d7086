"""Collapse alarm on the student's latents in teacher space: their statistics leave those of the teacher's samples.

Shapes: B samples, C×H×W teacher latents; statistics are per channel, over samples and positions, in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SMOOTHING = 0.9  # of the drift's moving average, which starts at 0: what lasts for some ten updates counts
CHUNK = 64  # samples of the reference at once


def moments(x: torch.Tensor) -> torch.Tensor:
    """Mean and mean square of each channel of x [B, C, H, W]: [2, C] float64."""
    x = x.detach().double()
    return torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])


def mean_and_std(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `moments`: each [C]."""
    return m[0], (m[1] - m[0].square()).clamp_min(0).sqrt()


def drift(m: torch.Tensor, reference: torch.Tensor) -> float:
    """mean over channels of |mean - mean_ref| / std_ref + |ln(std / std_ref)|; 0 for equal statistics.

    1 says, for example, that every channel has moved by its own standard deviation, or that its spread has grown
    or shrunk by a factor of e.
    """
    (mean, std), (mean_ref, std_ref) = mean_and_std(m), mean_and_std(reference)
    std, std_ref = std.clamp_min(1e-6), std_ref.clamp_min(1e-6)
    return ((mean - mean_ref).abs() / std_ref + (std / std_ref).log().abs()).mean().item()


class CollapseAlarm:
    """Follows the student's latents from update to update; changes no number of the training."""

    def __init__(self, limit: float | None, teacher_samples: torch.Tensor | None) -> None:
        """
        Args:
            limit: of the drift's moving average; None: measure only.
            teacher_samples: normalised latents [N, C, H, W]; None: the first update's batch is the reference.
        """
        self.limit, self.average = limit, 0.0
        self.begin()
        self.reference: torch.Tensor | None = None
        self.of_teacher = teacher_samples is not None
        if teacher_samples is not None:
            chunks = teacher_samples.split(CHUNK)
            sizes = torch.tensor([len(chunk) for chunk in chunks]).double()
            weights = (sizes / sizes.sum())[:, None, None]
            self.reference = (torch.stack([moments(chunk).cpu() for chunk in chunks]) * weights).sum(0)

    def begin(self) -> None:
        """A new update's batch is made."""
        self._moments: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """An equal part of the batch: the student's latents in teacher space [B, C, H, W]."""
        self._moments.append(moments(x))

    def of_update(
        self, mean_micro_batches: float, average: Callable[[list[torch.Tensor]], None] = lambda tensors: None
    ) -> torch.Tensor:
        """`moments` of the update whose batch was added, [2, C] on its device.

        Args:
            mean_micro_batches: micro-batches of a worker, on average over all workers.
            average: mean of tensors over the workers, in place.
        """
        total = torch.stack(self._moments).sum(0) / mean_micro_batches
        average([total])
        return total

    def observe(self, m: torch.Tensor) -> dict[str, float]:
        """Take one update's `moments` and return its metrics."""
        if self.reference is None:
            self.reference = m.clone()
        now = drift(m, self.reference)
        self.average = SMOOTHING * self.average + (1 - SMOOTHING) * now
        mean, variance = m[0].mean(), m[1].mean() - m[0].mean().square()
        return {
            "latents/mean": mean.item(),
            "latents/std": math.sqrt(max(0.0, variance.item())),
            "guard/latent_drift": now,
            "guard/latent_drift_average": self.average,
        }

    @property
    def reason(self) -> str | None:
        """Why the student counts as collapsing, if it does."""
        if self.limit is None or self.average <= self.limit:
            return None
        whose = "the teacher's samples" if self.of_teacher else "its start"
        return (
            f"the latents' drift from {whose} is {self.average:.3f} on average, above "
            f"distill.drift_limit={self.limit:g}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average} | ({} if self.of_teacher else {"reference": self.reference})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]
        if not self.of_teacher:
            self.reference = state["reference"]
