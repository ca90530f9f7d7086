"""The exact overlap of teachers and trainers.

Between two student updates the student is constant, so its next batch can be made and sent to the teachers before the
k fake-score updates instead of after them. Every number is the same either way: same weights, same noise, same order of
updates. A step then costs T_make + max(k T_fake, T_teacher) + T_student instead of the sum.

Each micro-batch is a request of its own, so that several replicas share a batch; the first is sent while the second is
made, and the student's gradients of the first are computed while the others are still awaited.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from raydistill.device_memory import doing
from raydistill.distillation.batches import Made
from raydistill.distillation.updates import Distiller

UPDATE = ("the student's next batch", "the fake score's update", "the student's update")  # its phases, in errors


class Pending(Protocol):
    """A score request under way."""

    def result(self) -> torch.Tensor: ...

    def ready(self) -> bool:
        """Whether it is under way no longer. Only asked when there are more micro-batches than `distill.in_flight`."""
        ...


Submit = Callable[[Made], Pending]


@dataclass(frozen=True)
class Unchecked:
    """An answer that may be not finite: the update looks at it, and may leave samples out."""

    pending: Any  # whose `result` takes check_finite

    def result(self, check_finite: bool = False) -> torch.Tensor:
        return self.pending.result(check_finite=check_finite)

    def ready(self) -> bool:
        return self.pending.ready()


class Requests:
    """The score requests of one student update: at most `in_flight` under way, answers in their order."""

    def __init__(self, submit: Submit, in_flight: int) -> None:
        self._submit, self._in_flight = submit, in_flight
        self._unsent: deque[Made] = deque()
        self._sent: deque[Pending] = deque()  # whose answers were not taken yet

    def add(self, made: Made) -> None:
        self._unsent.append(made)

    def send(self) -> None:
        """Send what may be sent; waits for nothing."""
        while self._unsent:
            full = len(self._sent) >= self._in_flight
            if full and sum(not pending.ready() for pending in self._sent) >= self._in_flight:
                return
            self._sent.append(self._submit(self._unsent.popleft()))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Scores [B, C, H, W] of each micro-batch, waited for one by one."""
        while self._unsent or self._sent:
            self.send()
            scores = self._sent.popleft().result()
            self.send()  # before the caller's own work
            yield scores


def distillation_step(distiller: Distiller, submit: Submit | None, fake_updates: int, overlap: bool) -> None:
    """One student update with its `fake_updates` fake-score updates.

    Args:
        submit: sends a micro-batch to the teachers; None when VSD is off.
    """
    started = time.perf_counter()
    requests = Requests(submit, distiller.config.distill.in_flight) if submit is not None else None
    batch = []
    with doing(UPDATE[0]):
        for made in distiller.make():
            batch.append(made)
            if requests is not None:
                requests.add(made)
                if overlap:
                    requests.send()
    for _ in range(fake_updates):
        with doing(UPDATE[1]):
            distiller.fake_update()
        if requests is not None and overlap:
            requests.send()
    with doing(UPDATE[2]):
        distiller.student_update(batch, requests)
    distiller.metrics["time/step"] = time.perf_counter() - started
