"""The discriminator in the updates: its own losses on student and teacher samples, and its pull on the student.

    on features of student samples      softplus(D(x_t))
    on features of teacher samples      softplus(-D(real_t)) + r1_weight · R1
    the student                         weight · softplus(-D(x_t'))

Every loss is a mean over samples and patches, and over the heads of the depths that are read. R1 (Mescheder et al. 2018,
arXiv 1801.04406) is the squared gradient of D at teacher samples. It is approximated without a double backward pass, by
the change of D when the clean sample gets a little noise (Lin et al. 2025, arXiv 2501.08316, which does not divide by
sigma²):

    R1 ≈ mean (D(real_t) - D((real + sigma n)_t))² / sigma²        n ~ N(0, I); t and eps are those of real_t

Shapes: B samples of a micro-batch, C×H×W teacher latents, D channels of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from raydistill.diffusion.path import add_noise
from raydistill.diffusion.timesteps import sample_t
from raydistill.distillation.batches import T_MAX, T_MIN, Draws, MicroBatch, RealFeed
from raydistill.distillation.discriminator import moments_of
from raydistill.distillation.gradients import Gradients
from raydistill.distillation.losses import approximate_r1, fake_logits_loss, generator_loss, real_logits_loss
from raydistill.distillation.networks import Networks
from raydistill.distillation.rates import gan_weight
from raydistill.distillation.readings import Row
from raydistill.spaces import Conditioning
from raydistill.transfer import upload

TIMES = 8  # of each teacher sample, at which the features' statistics are measured

Reals = tuple[torch.Tensor, Conditioning]  # latents [B, C, H, W], and the conditioning of their captions


def over_heads(loss: Callable[..., torch.Tensor], *logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over the heads of a loss of each head's logits."""
    return torch.stack([loss(*one) for one in zip(*logits, strict=True)]).mean()


def share_of(logits: Sequence[torch.Tensor], right: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Share of the patches whose logits are right, as a mean over the heads."""
    return over_heads(lambda one: right(one).float().mean(), logits)


class Adversary:
    """The discriminator's part of one worker's updates.

    Args:
        feed: teacher samples.
        gradients: the head's, and the fake score's where `discriminator.fake_weight` has the losses reach it.

    Attributes:
        shapes_features: whether the discriminator's loss reaches the weights of the fake score, whose features it reads.
        waits: whether the fake score is stepped after both halves of the discriminator's loss, which then read features of
            the same weights; else between them.
    """

    def __init__(self, networks: Networks, draws: Draws, feed: RealFeed, gradients: Gradients) -> None:
        self.networks, self.draws, self.feed, self.gradients = networks, draws, feed, gradients
        self.gan, self.path = networks.config.discriminator, networks.teacher_space.path
        self.shapes_features = self.gan.fake_weight > 0
        self.waits = self.shapes_features or self.gan.step_together
        # teacher samples of this update, by the first sample id of their micro-batch
        self._taken: dict[int, Reals] = {}
        self._micro_batches: dict[int, MicroBatch] = {}  # of this update, by sample id
        self._measures = False  # whether this update is the one that measures the features

    # -- the discriminator's own losses ---------------------------------------------------------------
    def fake_gradients(self, row: Row, features: Sequence[torch.Tensor], weight: float) -> torch.Tensor:
        """Of its loss on features [B, D, h, w] of student samples; returns the loss's share in the fake score's.

        Args:
            weight: see `Gradients.accumulate`.
        """
        logits = self.networks.logits(features if self.shapes_features else [one.detach() for one in features])
        loss = over_heads(fake_logits_loss, logits)
        row |= {"discriminator": loss.detach(), "accuracy": share_of(logits, lambda one: one < 0)}
        return self._head_gradients(loss, weight)

    def real_gradients(self, row: Row, micro_batch: MicroBatch) -> None:
        """Its other half: teacher samples with their own captions, noised over the full range of t."""
        ids = micro_batch.sample_ids
        latents, conditioning = self._reals(micro_batch)
        eps, t_B = self.draws.normal(ids, latents.shape[1:], "real_noise"), self.draws.t(ids, "real_t")
        logits = self._logits_at(latents, eps, t_B, conditioning)
        loss = over_heads(real_logits_loss, logits)
        row["accuracy"] = (share_of(logits, lambda one: one > 0) + row["accuracy"]) / 2
        if self.gan.r1_weight > 0:
            near = latents + self.gan.r1_sigma * self.draws.normal(ids, latents.shape[1:], "r1_noise")
            found = self._logits_at(near, eps, t_B, conditioning)
            r1 = over_heads(partial(approximate_r1, sigma=self.gan.r1_sigma), logits, found)
            row["r1"] = r1.detach()
            loss = loss + self.gan.r1_weight * r1
        share = self._head_gradients(loss, micro_batch.weight)
        if self.shapes_features:
            self.gradients.accumulate(share, "fake", weight=micro_batch.weight)
        row["discriminator"] = loss.detach() + row["discriminator"]

    def begin(self, batch: Sequence[MicroBatch]) -> None:
        """A new update: of which micro-batches it is made. None: it is over."""
        self._taken = {}
        self._micro_batches = {int(number): one for one in batch for number in one.sample_ids}
        self._measures = not self.networks.discriminator.measured

    def undo(self) -> None:
        """The statistics of this update are measured again."""
        self.networks.discriminator.measured = not self._measures

    def _reals(self, micro_batch: MicroBatch) -> Reals:
        """The teacher samples that the update of these sample ids sees, the latents on the device; read once an update."""
        whole = self._micro_batches.get(int(micro_batch.sample_ids[0]), micro_batch).sample_ids
        key = int(whole[0])
        if key not in self._taken:
            self._taken[key] = self.feed.of(whole)
        latents, conditioning = self._taken[key]
        if micro_batch.rows is not None:
            rows = micro_batch.rows
            latents, conditioning = latents[rows], {name: v[rows] for name, v in conditioning.items()}
        latents, finite = upload(latents, self.networks.device), self.networks.finite
        finite.of(micro_batch.sample_ids)
        return finite.note(latents, "the teacher samples of discriminator.real_data"), conditioning

    def _logits_at(
        self, latents: torch.Tensor, eps: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Each head's logits of clean latents [B, C, H, W] that are noised."""
        with torch.set_grad_enabled(self.shapes_features):
            features = self.networks.features(add_noise(self.path, latents, eps, t_B), t_B, conditioning)
        return self.networks.logits(features)

    def _head_gradients(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """Of the heads' own weights; returns the loss's share in the fake score's."""
        self.gradients.accumulate(loss, "discriminator", keep=self.shapes_features, weight=weight)
        return self.gan.fake_weight * loss if self.shapes_features else torch.zeros_like(loss)

    # -- the student ----------------------------------------------------------------------------------
    def watched(self, row: Row, x: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """The student's x [B, C, H, W] as the discriminator's loss takes it.

        A backward pass adds to the row the mean square of x's gradient of this loss alone, in the units of the VSD gradient,
        which is that of a sum over x's elements and not of their mean.
        """
        scale = x.numel() * self.gradients.mean_micro_batches / (micro_batch.weight or 1.0)
        judged = x.view_as(x)
        judged.register_hook(lambda g: row.update({"gan/gradient_square": g.float().square().mean() * scale**2}))
        return judged

    def pull(
        self,
        row: Row,
        judged: torch.Tensor,
        micro_batch: MicroBatch,
        updates: int,
        features: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The generator's loss, weighted.

        Args:
            judged: what `watched` gave.
            updates: of the student, before this one.
            features: of it noised, from the pass that gave the VSD loss its fake score (`discriminator.shared_pass`).
        """
        if features is None:
            ids = micro_batch.sample_ids
            t_B = self.draws.t(ids, "gan_t")
            x_t = add_noise(self.path, judged, self.draws.normal(ids, judged.shape[1:], "gan_noise"), t_B)
            features = self.networks.features(x_t, t_B, micro_batch.fake_conditioning)
        logits = self.networks.logits(features)
        loss = self.networks.finite.note(over_heads(generator_loss, logits), "the GAN loss")
        row["loss/gan"] = loss.detach()
        return gan_weight(self.gan, updates) * loss

    # -- statistics of the features -------------------------------------------------------------------
    @torch.no_grad()
    def measure(self, batch: Sequence[MicroBatch]) -> None:
        """At the start of a run, what `discriminator.standardize` needs: of the first update's teacher samples.

        Each micro-batch counts alike, however many of its samples are left.

        Each is noised at `TIMES` times, one in every equal part of their distribution. The statistics are the mean over all
        workers. They depend on seed and samples alone, and are part of the checkpoint.
        """
        if self.networks.discriminator.measured:
            return
        sums: list[torch.Tensor] = []
        for micro_batch in batch:
            ids, (latents, conditioning) = micro_batch.sample_ids, self._reals(micro_batch)
            for index in range(TIMES):
                u_B = (index + self.draws.uniform(ids, f"statistics_t/{index}")) / TIMES
                t_B = sample_t(u_B, T_MIN, T_MAX, self.draws.shift)
                eps = self.draws.normal(ids, latents.shape[1:], f"statistics_noise/{index}")
                features = self.networks.features(add_noise(self.path, latents, eps, t_B), t_B, conditioning)
                for one in features:
                    self.networks.finite.note(one, "the features of the teacher samples")
                moments = moments_of(features)
                sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
        sums = [one / (TIMES * self.gradients.mean_fake_micro_batches) for one in sums]
        self.gradients.average(sums)
        self.networks.finite.note(torch.stack([one.sum() for one in sums]).sum(), "the features' statistics")
        self.networks.discriminator.take(sums)
