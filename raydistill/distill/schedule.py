"""The exact overlap of teachers and trainers.

Between two student updates the student is constant, so its next batch can be made and sent to the teachers before the
k fake-score updates instead of after them. Every number is the same either way: same weights, same noise, same order of
updates. A step then costs T_make + max(k T_fake, T_teacher) + T_student instead of the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from raydistill.distill.distiller import Distiller, Made


class Pending(Protocol):
    """A score request under way."""

    def result(self) -> torch.Tensor: ...


Submit = Callable[[Made], Pending]


def distillation_step(distiller: Distiller, submit: Submit | None, fake_updates: int, overlap: bool) -> None:
    """One student update with its `fake_updates` fake-score updates.

    Args:
        submit: sends a batch to the teachers; None when VSD is off.
    """
    started = time.perf_counter()
    made = distiller.make()
    pending = submit(made) if submit is not None and overlap else None
    for _ in range(fake_updates):
        distiller.fake_update()
    scores = None
    if submit is not None:
        waiting = time.perf_counter()
        scores = (pending or submit(made)).result()
        distiller.metrics["time/wait_teacher"] = time.perf_counter() - waiting
    distiller.student_update(made, scores)
    distiller.metrics["time/step"] = time.perf_counter() - started
