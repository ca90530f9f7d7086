"""What is watched of the updates: the collapse alarm, the student's latents, and how the fake score keeps up with it.

It changes no number of the training. Every figure is of all workers together.

Shapes: B samples, C×H×W teacher latents, c×h×w student latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raydistill.distillation.collapse import CollapseAlarm

RUNNING = 0.99  # of the fake score's running loss: about its last 100 updates count
REFERENCE = 256  # teacher samples, the first of the set, whose statistics the alarm compares with

Average = Callable[[list[torch.Tensor]], None]


class FakeLag:
    """The fake score's loss on the newest student samples over its running loss.

    With l_1 … l_k, the losses of the k fake updates since the student's last one, each on fresh samples of the student as
    it is now, and L, the running mean of all fake losses before these:

        lag = l_1 / L        L <- 0.99 L + 0.01 l_j for j = 1 … k

    L is corrected for its start, as Adam's moments are; the first lag is 1.
    """

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def observe(self, losses: Sequence[float]) -> float:
        """Take the losses of one student update's fake updates, in order, and return the lag."""
        lag = losses[0] * self._weight / self._sum if self._sum > 0 else 1.0
        for loss in losses:
            self._sum = RUNNING * self._sum + (1 - RUNNING) * loss
            self._weight = RUNNING * self._weight + (1 - RUNNING)
        return lag

    def state_dict(self) -> dict[str, float]:
        return {"fake_loss": self._sum, "fake_weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of checkpoints that have none, it begins anew."""
        self._sum, self._weight = state.get("fake_loss", 0.0), state.get("fake_weight", 0.0)


class Watch:
    """Of one worker; its numbers are averaged over all.

    Args:
        alarm: on the student's latents in teacher space.

    Attributes:
        left_out: samples that a worker has left out of the update that was observed last, on average over all workers.
    """

    def __init__(self, alarm: CollapseAlarm) -> None:
        self.alarm, self.lag, self.left_out = alarm, FakeLag(), 0.0
        self.begin()

    def begin(self) -> None:
        """A new update's batch is made."""
        self.alarm.begin()
        self._latents: list[torch.Tensor] = []  # mean and mean square of each micro-batch of which samples are left
        self._micro_batches = 0
        self._losses: list[torch.Tensor] = []  # of each fake update, summed over the micro-batches

    def made(self, z_student: torch.Tensor, x: torch.Tensor) -> None:
        """An equal part of the batch: latents of the student [B, c, h, w], and in teacher space [B, C, H, W].

        One without samples counts as the mean of the others.
        """
        self._micro_batches += 1
        if not len(x):
            return
        z = z_student.detach().double()
        self._latents.append(torch.stack([z.mean(), z.square().mean()]))
        self.alarm.add(x)

    def faked(self, losses: Sequence[torch.Tensor]) -> None:
        """Losses of a fake update's micro-batches."""
        self._losses.append(torch.stack([loss.detach().double() for loss in losses]).sum())

    def of_update(
        self, mean_micro_batches: float, average: Average = lambda tensors: None, left_out: int = 0
    ) -> list[torch.Tensor]:
        """What `observe` takes of the update that was begun last, on its device. It waits for nothing.

        Args:
            mean_micro_batches: micro-batches of a worker, on average over all workers.
            average: mean of tensors over the workers, in place.
            left_out: samples that this worker has left out of it.
        """
        share = len(self._latents) / self._micro_batches
        moments = self.alarm.of_update(share * mean_micro_batches, average)
        latents = torch.stack(self._latents).sum(0) / share
        numbers = torch.cat([latents, *(loss[None] for loss in self._losses)]) / mean_micro_batches
        numbers = torch.cat([numbers, numbers.new_full((1,), left_out)])
        average([numbers])
        return [moments, numbers]

    def observe(self, moments: torch.Tensor, numbers: torch.Tensor) -> dict[str, float]:
        """Take an update's figures, on the CPU, and return its metrics.

        Args:
            moments: see `collapse.moments`.
            numbers: mean and mean square of the student's latents, the loss of each fake update, and the samples that a
                worker has left out, on average; float64 [2 + k + 1].
        """
        metrics = self.alarm.observe(moments)
        mean, square, *losses, self.left_out = numbers.tolist()
        metrics |= {"student/latent_mean": mean, "student/latent_std": math.sqrt(max(0.0, square - mean * mean))}
        return metrics | ({"fake/lag": self.lag.observe(losses)} if losses else {})

    def state_dict(self) -> dict[str, Any]:
        return self.alarm.state_dict() | self.lag.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alarm.load_state_dict(state)
        self.lag.load_state_dict(state)
