"""Samples whose values are not finite are left out of an update, instead of ending the run.

A phase computes gradients and steps on them. Its look comes before its step, so where a value was not finite nothing has
changed. Then the phase is done again without the samples that have such a value. They count as zero in the mean over the
batch. All workers do it again together, for the mean of their gradients was spoilt for all.

One sample may always be left out, and `distill.non_finite_share` of a worker's batch for the student. More is an error,
and so is a batch of which nothing is left. So are weights, gradients and means that are not finite although every sample
is. Where nothing is left of a micro-batch, a sample of another one stands in and counts as zero: workers that share the
fake score or the student (`fake_score.shard`, `student.shard`) must all run equally many passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

import torch

from raydistill.distillation.batches import MicroBatch
from raydistill.distillation.finite import Finite
from raydistill.distillation.gradients import Gradients
from raydistill.errors import NonFiniteError

T = TypeVar("T")


class Waiting:
    """The teachers' answers for each micro-batch of an update, kept for when the update is done again.

    Args:
        scores: in the order of the micro-batches; None: no teachers.

    Attributes:
        seconds: that were waited.
    """

    def __init__(self, scores: Iterable[torch.Tensor] | None) -> None:
        self._coming, self._there = None if scores is None else iter(scores), list[torch.Tensor]()
        self.seconds = 0.0

    def of(self, index: int, micro_batch: MicroBatch) -> torch.Tensor | None:
        """Those of a micro-batch, or of what is left of it; zeros for what stands in for it."""
        if self._coming is None:
            return None
        started = time.perf_counter()
        while index >= len(self._there):
            self._there.append(next(self._coming))
        self.seconds += time.perf_counter() - started
        scores = self._there[index]
        if not micro_batch.weight:
            return torch.zeros_like(scores[:1])
        return scores if micro_batch.rows is None else scores[micro_batch.rows]


class LeavingOut:
    """What one worker leaves out.

    Args:
        most: share of this worker's batch for the student, or one sample; 0: none, every such value is an error.
        micro_batches: that it is made of.
        gradients: of the phases.
        device: of the networks.

    Attributes:
        left_out: of what was left out since it was taken last: the error's words, and the sample ids.
        count: samples of it, since it was taken last.
    """

    def __init__(
        self, most: float, micro_batches: int, gradients: Gradients, finite: Finite, device: torch.device
    ) -> None:
        self.most, self.micro_batches, self.gradients = most, micro_batches, gradients
        self.finite, self.device = finite, device
        gradients.tolerant = most > 0
        self.left_out: list[tuple[str, list[int]]] = []
        self.count = 0

    def run(
        self,
        phase: Callable[[list[MicroBatch]], T],
        batch: Sequence[MicroBatch],
        names: Sequence[str],
        *,
        left: Collection[int] = (),
        undo: Callable[[], None] = lambda: None,
    ) -> T:
        """`phase` on the micro-batches of a batch, again without what is not finite.

        Args:
            names: optimizers whose gradients the phase takes or adds to.
            left: sample ids that are left out from the start.
            undo: what else a phase that failed has left behind.

        Raises:
            NonFiniteError: it is no matter of single samples, or of too many.
        """
        if not self.most:
            return phase(list(batch))
        restore, without = self.gradients.taken(names), set(left)
        while True:
            try:
                return phase(_left(batch, without))
            except NonFiniteError as error:
                if error.samples is None:
                    raise
                more = set(error.samples) - without
                without |= more
                why = self._too_many(without, batch[0], len(batch))
                if self._of_any(bool(why)):
                    raise _with(error, why) from error
                if not self._of_any(bool(more)):  # it would come again
                    raise
                if error.samples:
                    self._leave_out(error)
                restore()
                undo()

    def look(self, micro_batch: MicroBatch, left: set[int], count: int, *values: torch.Tensor) -> list[torch.Tensor]:
        """As `Finite.look`, of one of a batch's equal micro-batches, on which nothing is stepped.

        Args:
            left: sample ids that are left out of the batch; those of this micro-batch come to it.
            values: [B, …], of which the copies are zero in the samples that are left out.
        """
        try:
            return self.finite.look(*values)
        except NonFiniteError as error:
            if not self.most or not error.samples:
                raise
            left |= set(error.samples)
            if why := self._too_many(left, micro_batch, count):
                raise _with(error, why) from error
            self._leave_out(error)
            return [self.zeroed(micro_batch, left, value.cpu()) for value in values]

    def zeroed(self, micro_batch: MicroBatch, left: set[int], value: torch.Tensor) -> torch.Tensor:
        """A value [B, …] of a micro-batch in main memory, zero in the samples that are left out; whole numbers stay."""
        bad = torch.tensor([number in left for number in micro_batch.sample_ids.tolist()])
        if not bad.any() or not value.is_floating_point():
            return value
        return value.masked_fill(bad.view(-1, *[1] * (value.ndim - 1)), 0.0)

    def left_of(self, micro_batch: MicroBatch, left: set[int], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of values [B, …] of a micro-batch, those of the samples that are not left out; perhaps none."""
        rows = micro_batch.without(left).rows
        return values if rows is None else tuple(value[rows.to(value.device)] for value in values)

    def pop_left_out(self) -> list[tuple[str, list[int]]]:
        """What was left out since the last call."""
        left_out, self.left_out = self.left_out, []
        return left_out

    def pop_count(self) -> int:
        """How many samples were left out since the last call."""
        count, self.count = self.count, 0
        return count

    def _leave_out(self, error: NonFiniteError) -> None:
        self.left_out.append((str(error), list(error.samples)))
        self.count += len(error.samples)

    def _of_any(self, mine: bool) -> bool:
        """Whether it is so for any worker."""
        found = torch.tensor([float(mine)], device=self.device)
        self.gradients.average([found])
        return found.item() > 0

    def _too_many(self, left: set[int], micro_batch: MicroBatch, count: int) -> str:
        """Why so many sample ids may not be left out of a batch of `count` micro-batches like this one; else nothing.

        The share is that of the student's batch: that of the fake score may be smaller (`fake_score.batch_size`).
        """
        size = len(micro_batch.sample_ids)
        share = len(left) / (self.micro_batches * size)
        if len(left) > 1 and share > self.most:
            return f"{share:.1%} of the samples are more than distill.non_finite_share={self.most:g} allows"
        return "nothing is left of the batch" if len(left) >= count * size else ""


def _left(batch: Sequence[MicroBatch], without: Collection[int]) -> list[MicroBatch]:
    """The micro-batches without these sample ids, of which some must stay; as many of them."""
    left = [micro_batch.without(without) for micro_batch in batch]
    if all(micro_batch.weight for micro_batch in left):
        return left
    stand_in = next(micro_batch for micro_batch in left if micro_batch.weight).stand_in()
    return [micro_batch if micro_batch.weight else stand_in for micro_batch in left]


def _with(error: NonFiniteError, why: str) -> NonFiniteError:
    """The error of a value, and why it ends the run."""
    text = f"{error}; {why or 'another worker has too many such samples'}"
    return NonFiniteError(text, error.count, error.rows, error.elsewhere or not why)
