"""Updates of what follows the student: the fake score, and the discriminator on its features.

Without the discriminator there is one phase. With it there are two, and each may leave samples out (`leaving_out.py`):

    student samples    gradients of the fake score's loss, and of the discriminator's; the fake score's step
    teacher samples    gradients of the discriminator's loss; its step

Where the fake score's step has to wait for both (`Adversary.waits`), they are one phase.

Shapes: B samples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from raydistill.diffusion.path import add_noise, target
from raydistill.distillation.adversary import Adversary
from raydistill.distillation.batches import Draws, MicroBatch
from raydistill.distillation.gradients import Gradients
from raydistill.distillation.leaving_out import LeavingOut
from raydistill.distillation.networks import Networks
from raydistill.distillation.readings import Row
from raydistill.distillation.rollout import Rollout

NAMES = {  # of the metrics in a row
    "fake": "loss/fake",
    "discriminator": "loss/discriminator",
    "accuracy": "discriminator/accuracy",
    "r1": "discriminator/r1",
}


class FakeSide:
    """One worker's part of these updates.

    Args:
        adversary: the discriminator's losses; None: there is none.
    """

    def __init__(
        self,
        networks: Networks,
        draws: Draws,
        gradients: Gradients,
        leaving_out: LeavingOut,
        adversary: Adversary | None,
    ) -> None:
        self.networks, self.draws, self.gradients = networks, draws, gradients
        self.rollout = Rollout(networks, draws)
        self.leaving_out, self.adversary = leaving_out, adversary
        self.config, self.space = networks.config, networks.teacher_space

    def update(self, batch: Sequence[MicroBatch]) -> list[Row]:
        """One update of the fake score on fresh student samples, and one of the discriminator. Metrics of each micro-batch."""
        adversary = self.adversary
        if adversary is None:
            return self.leaving_out.run(self._student_half, batch, ["fake"])
        both = ["fake", "discriminator"]
        adversary.begin(batch)
        if adversary.waits:
            rows = self.leaving_out.run(
                lambda batch: self._teacher_half(batch, self._student_half(batch)), batch, both, undo=adversary.undo
            )
        else:
            first = self.leaving_out.run(self._student_half, batch, both, undo=adversary.undo)
            rows = self.leaving_out.run(lambda batch: self._teacher_half(batch, first), batch, both)
        adversary.begin([])
        return rows

    def _student_half(self, batch: Sequence[MicroBatch]) -> list[Row]:
        if self.adversary is not None:
            self.adversary.measure(batch)
        rows = [self.student_gradients(micro_batch) for micro_batch in batch]
        if self.adversary is None or not self.adversary.waits:
            self.gradients.step(fake=self.config.fake_score.max_grad_norm)
        return rows

    def _teacher_half(self, batch: Sequence[MicroBatch], rows: Sequence[Row]) -> list[Row]:
        """Returns the rows of both halves."""
        rows = [dict(row) for row in rows]
        for row, micro_batch in zip(rows, batch, strict=True):
            self.adversary.real_gradients(row, micro_batch)
        norms = {"fake": self.config.fake_score.max_grad_norm} if self.adversary.waits else {}
        self.gradients.step(**norms, discriminator=self.config.student.max_grad_norm)
        return rows

    def student_gradients(self, micro_batch: MicroBatch) -> Row:
        """Of the fake score's loss, and of the discriminator's on its features of student samples."""
        ids, path = micro_batch.sample_ids, self.space.path
        self.networks.finite.of(ids)
        with torch.no_grad():
            seen, timestep_B = self.rollout.seen(micro_batch)
            x = self.networks.x(seen, micro_batch.student_conditioning, timestep_B)
            eps, t_B = self.draws.normal(ids, x.shape[1:], "fake_noise"), self.draws.t(ids, "fake_t")
            x_t = add_noise(path, x, eps, t_B)
        prediction, features = self.networks.fake_score(x_t, t_B, micro_batch.fake_conditioning)
        loss = F.mse_loss(prediction.float(), target(path, self.space.prediction, x, eps, t_B))
        row = {"fake": loss.detach()}
        if self.adversary is not None:
            loss = loss + self.adversary.fake_gradients(row, features, micro_batch.weight)
        self.gradients.accumulate(loss, "fake", weight=micro_batch.weight)
        return row
