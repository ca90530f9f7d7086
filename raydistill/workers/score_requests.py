"""Score requests of one worker, through the teacher service."""

from __future__ import annotations

import time
from typing import Any

import torch


class Teachers:
    """A worker's way to its teachers: `schedule.Submit`, and how busy they are."""

    def __init__(self, client: Any, unconditional: dict[str, torch.Tensor], scale: float) -> None:
        self.client, self.unconditional, self.scale = client, unconditional, scale

    def __call__(self, made: Any) -> Any:
        from raydistill.teachers.request import ScoreRequest

        conditioning = {name: value.cpu() for name, value in made.teacher_conditioning.items()}
        return self.client.submit(
            ScoreRequest(made.x_t.cpu(), made.t_B.cpu(), conditioning, self.unconditional, self.scale)
        )

    def wait_for_start(self) -> None:
        """Until the teachers are ready for the first time; the driver ends the run where they cannot be."""
        from raydistill.teachers import registry

        while not registry.ready(self.client.name):
            time.sleep(0.2)

    def metrics(self) -> dict[str, float]:
        """Latency, busy fraction and queue of the service as this worker saw them, and its requests."""
        return self.client.metrics()
