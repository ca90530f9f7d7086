"""Score requests of one worker, through the teacher service."""

from __future__ import annotations

import time

from raydistill.distill.batches import Made
from raydistill.spaces import Conditioning
from raydistill.teachers import registry
from raydistill.teachers.client import PendingScores, TeacherClient
from raydistill.teachers.request import ScoreRequest

LOOK_EVERY_S = 0.2


class Teachers:
    """A worker's way to its teachers: `schedule.Submit`, and how busy they are."""

    def __init__(self, client: TeacherClient, unconditional: Conditioning, guidance_scale: float) -> None:
        self.client, self.unconditional, self.guidance_scale = client, unconditional, guidance_scale

    def __call__(self, made: Made) -> PendingScores:
        conditioning = {name: value.cpu() for name, value in made.teacher_conditioning.items()}
        return self.client.submit(
            ScoreRequest(made.x_t.cpu(), made.t_B.cpu(), conditioning, self.unconditional, self.guidance_scale)
        )

    def wait_for_start(self) -> None:
        """Until the teachers are ready for the first time; the driver ends the run where they cannot be."""
        while not registry.ready(self.client.name):
            time.sleep(LOOK_EVERY_S)

    def metrics(self) -> dict[str, float]:
        """Latency, busy fraction and queue of the service as this worker saw them, and its requests."""
        return self.client.metrics()
