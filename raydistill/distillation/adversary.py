"""The discriminator in the updates: its own losses on student and teacher samples, and its pull on the student.

    on features of student samples      softplus(D(x_t))
    on features of teacher samples      softplus(-D(real_t)) + r1_weight · R1
    the student                         weight · softplus(-D(x_t'))

Every loss is a mean over samples and patches, and over the heads of the depths that are read. R1 (Mescheder et al. 2018,
arXiv 1801.04406) is the squared gradient of D at teacher samples. It is approximated without a double backward pass, by
the change of D when the clean sample gets a little noise (Lin et al. 2025, arXiv 2501.08316, equation 5, divided by
sigma²):

    R1 ≈ mean (D(real_t) - D((real + sigma n)_t))² / sigma²        n ~ N(0, I); t and eps are those of real_t

Shapes: B samples of a micro-batch, C×H×W teacher latents, D channels of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from raydistill.data.reals import Rows
from raydistill.diffusion.path import add_noise
from raydistill.diffusion.timesteps import sample_t
from raydistill.distillation.batches import T_MAX, T_MIN, Draws, MicroBatch, RealFeed
from raydistill.distillation.discriminator import moments_of
from raydistill.distillation.gradients import Gradients
from raydistill.distillation.losses import approximate_r1, fake_logits_loss, generator_loss, real_logits_loss
from raydistill.distillation.networks import Networks
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
    """

    def __init__(self, networks: Networks, draws: Draws, feed: RealFeed, gradients: Gradients) -> None:
        self.networks, self.draws, self.feed, self.gradients = networks, draws, feed, gradients
        self.gan, self.path = networks.config.discriminator, networks.teacher_space.path
        self.shapes_features = self.gan.fake_weight > 0
        self._ahead: list[Reals] = []  # teacher samples that were taken before their turn

    # -- the discriminator's own losses ---------------------------------------------------------------
    def fake_gradients(self, row: Row, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of its loss on features [B, D, h, w] of student samples; returns the loss's share in the fake score's."""
        logits = self.networks.logits(features if self.shapes_features else [one.detach() for one in features])
        loss = over_heads(fake_logits_loss, logits)
        row |= {"discriminator": loss, "accuracy": share_of(logits, lambda one: one < 0)}
        return self._head_gradients(loss)

    def real_gradients(self, row: Row, batch: MicroBatch) -> None:
        """Its other half: teacher samples with their own captions, noised over the full range of t."""
        ids = batch.sample_ids
        latents, conditioning = self._ahead.pop(0) if self._ahead else self._take(ids)
        eps, t_B = self.draws.normal(ids, latents.shape[1:], "real_noise"), self.draws.t(ids, "real_t")
        logits = self._logits_at(latents, eps, t_B, conditioning)
        loss = over_heads(real_logits_loss, logits)
        row["accuracy"] = (share_of(logits, lambda one: one > 0) + row["accuracy"]) / 2
        if self.gan.r1_weight > 0:
            near = latents + self.gan.r1_sigma * self.draws.normal(ids, latents.shape[1:], "r1_noise")
            found = self._logits_at(near, eps, t_B, conditioning)
            row["r1"] = over_heads(partial(approximate_r1, sigma=self.gan.r1_sigma), logits, found)
            loss = loss + self.gan.r1_weight * row["r1"]
        share = self._head_gradients(loss)
        if self.shapes_features:
            self.gradients.accumulate(share, "fake")
        row["discriminator"] = loss + row["discriminator"]

    def _take(self, ids: Rows) -> Reals:
        """The teacher samples that an update of these sample ids sees, on the device."""
        latents, conditioning = self.feed.of(ids)
        latents = upload(latents, self.networks.device)
        return self.networks.finite.note(latents, "the teacher samples of discriminator.real_data"), conditioning

    def _logits_at(
        self, latents: torch.Tensor, eps: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> list[torch.Tensor]:
        """Each head's logits of clean latents [B, C, H, W] that are noised."""
        with torch.set_grad_enabled(self.shapes_features):
            features = self.networks.features(add_noise(self.path, latents, eps, t_B), t_B, conditioning)
        return self.networks.logits(features)

    def _head_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Of the heads' own weights; returns the loss's share in the fake score's."""
        self.gradients.accumulate(loss, "discriminator", keep=self.shapes_features)
        return self.gan.fake_weight * loss if self.shapes_features else torch.zeros_like(loss)

    # -- the student ----------------------------------------------------------------------------------
    def pull(
        self, row: Row, x: torch.Tensor, batch: MicroBatch, features: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The generator's loss of the student's x [B, C, H, W], weighted.

        Args:
            features: of x noised, from the pass that gave the VSD loss its fake score (`discriminator.shared_pass`).
        """
        if features is None:
            ids = batch.sample_ids
            t_B = self.draws.t(ids, "gan_t")
            x_t = add_noise(self.path, x, self.draws.normal(ids, x.shape[1:], "gan_noise"), t_B)
            features = self.networks.features(x_t, t_B, batch.fake_conditioning)
        logits = self.networks.logits(features)
        row["loss/gan"] = over_heads(generator_loss, logits)
        return self.gan.weight * self.networks.finite.note(row["loss/gan"], "the GAN loss")

    # -- statistics of the features -------------------------------------------------------------------
    @torch.no_grad()
    def measure(self, batches: Sequence[MicroBatch]) -> None:
        """At the start of a run, what `discriminator.standardize` needs: of the first update's teacher samples.

        Each is noised at `TIMES` times, one in every equal part of their distribution. The statistics are the mean over all
        workers. They depend on seed and samples alone, and are part of the checkpoint.
        """
        if self.networks.discriminator.measured:
            return
        self._ahead = [self._take(batch.sample_ids) for batch in batches]
        sums: list[torch.Tensor] = []
        for batch, (latents, conditioning) in zip(batches, self._ahead, strict=True):
            ids = batch.sample_ids
            for place in range(TIMES):
                u_B = (place + self.draws.uniform(ids, f"statistics_t/{place}")) / TIMES
                t_B = sample_t(u_B, T_MIN, T_MAX, self.draws.shift)
                eps = self.draws.normal(ids, latents.shape[1:], f"statistics_noise/{place}")
                features = self.networks.features(add_noise(self.path, latents, eps, t_B), t_B, conditioning)
                moments = moments_of(features)
                sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
        sums = [one / (TIMES * self.gradients.mean_parts) for one in sums]
        self.gradients.average(sums)
        self.networks.discriminator.take([self.networks.finite.note(one, "the features' statistics") for one in sums])
