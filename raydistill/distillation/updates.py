"""The three updates of cross-space distillation, in plain torch (METHOD.md section 3; DMD2 in teacher space).

    make            xi ~ N(0, I); z_student = student's x0; x = B(z_student); x_t = alpha_t x + sigma_t eps     no graph
    fake_update     fake score:     min  |prediction(x_t) - target|^2              on fresh student samples
                    discriminator:  min  softplus(-D(real_t)) + softplus(D(x_t))   on the fake score's features
    student_update  g = (x0_fake - x0_real) / mean|x - x0_real|
                    student:        min  1/2 |x - sg(x - g)|^2  +  w_GAN softplus(-D(x_t))

Every random number comes from (seed, purpose, sample id): nothing here keeps generator state.

Shapes: B samples of a micro-batch, C×H×W teacher latents.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from raydistill.bridge.objective import Objective
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs
from raydistill.diffusion.path import add_noise, target
from raydistill.distillation.batches import Batches, Draws, Made, MicroBatch, RealFeed, Reals
from raydistill.distillation.collapse import CollapseAlarm
from raydistill.distillation.gradients import Average, Gradients, alone, optimizers_of
from raydistill.distillation.losses import (
    fake_logits_loss,
    generator_loss,
    real_logits_loss,
    vsd_gradient,
    vsd_loss,
)
from raydistill.distillation.networks import Networks
from raydistill.distillation.readings import Readings, Row, mean_of
from raydistill.distillation.watch import REFERENCE, Watch
from raydistill.transfer import upload


class Distiller:
    """One worker's updates of its networks.

    Args:
        real: teacher samples, needed where there is a discriminator.
        anchor: the Bridge's own losses, needed where `bridge.trainable` has it trained along.
        average: mean of tensors over the workers.
        mean_parts: micro-batches of a worker, on average over all workers; None: as many as this one has.
        fake_parts: which of its micro-batches the fake score's updates take; None: all.
        fake_mean_parts: how many, on average over all workers; None: `mean_parts`.
    """

    def __init__(
        self,
        config: Config,
        networks: Networks,
        batches: Batches,
        *,
        real: Reals | None = None,
        anchor: Objective | None = None,
        average: Average = alone,
        mean_parts: float | None = None,
        fake_parts: Sequence[int] | None = None,
        fake_mean_parts: float | None = None,
    ) -> None:
        if config.bridge.trainable and anchor is None:
            raise ValueError("bridge.trainable is true, but there are no pairs to anchor the Bridge")
        if networks.discriminator is not None and real is None:
            raise ValueError("discriminator.weight is above 0, but there are no real data")
        self.config, self.networks, self.batches, self.real = config, networks, batches, real
        self.anchor = anchor if config.bridge.trainable else None
        self.finite, self.readings = networks.finite, Readings(networks.finite)
        self.fake_parts = fake_parts
        self.gradients = Gradients(
            optimizers_of(networks, config),
            mean_parts or batches.parts,
            self.finite,
            average,
            fake_mean_parts=fake_mean_parts,
            warmup=config.distill.warmup_steps,
        )
        self.teacher_space, self.path = networks.teacher_space, networks.teacher_space.path
        shift = self.teacher_space.default_shift if config.vsd.shift is None else config.vsd.shift
        self.draws = Draws(config.run.seed, shift, networks.device)
        self.feed = None if real is None else RealFeed(config, real)
        self.alarm = CollapseAlarm(config.distill.drift_limit, None if real is None else real.first(REFERENCE))
        self.watch = Watch(self.alarm)
        self.metrics: dict[str, float] = defaultdict(float)
        self.updates = 0  # of the student
        self._shares_pass = networks.discriminator is not None and config.discriminator.shared_pass
        # whether the discriminator's loss reaches the weights of the fake score, whose features it reads
        self._shapes_features = networks.discriminator is not None and config.discriminator.fake_weight > 0

    # -- make ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def make(self) -> Iterator[Made]:
        """The next student batch, noised in teacher space, micro-batch by micro-batch; the teachers score its x_t."""
        started, vsd = time.perf_counter(), self.config.vsd
        self.watch.begin()
        for batch in self.batches.next():
            ids, noise = batch.sample_ids, self._xi(batch)
            z_student = self.networks.z_student(noise, batch.student_conditioning)
            x = self.networks.bridged(z_student)
            t_B = self.draws.t(ids, "score_t", vsd.t_min, vsd.t_max)
            x_t = add_noise(self.path, x, self.draws.normal(ids, x.shape[1:], "score_noise"), t_B)
            self.watch.made(z_student, x)
            sent = self.finite.look(x_t, t_B)  # before the teachers see it
            self.metrics["time/make"] += time.perf_counter() - started
            yield Made(**vars(batch), noise=noise, x_t=sent[0], t_B=sent[1], held=(x_t, t_B))
            started = time.perf_counter()

    def _xi(self, batch: MicroBatch) -> torch.Tensor:
        """The student's noise [B, c, h, w]."""
        return self.draws.normal(batch.sample_ids, self.networks.student_space.latent_shape, "latents")

    # -- fake update ---------------------------------------------------------------------------------
    def fake_update(self) -> None:
        """One update of the fake score on fresh student samples, and one of the discriminator."""
        started, config = time.perf_counter(), self.config
        self.gradients.warm_up(self.updates)
        batches = self.batches.next(self.fake_parts)
        rows = [self._fake_gradients(batch) for batch in batches]
        if not self._shapes_features:
            self.gradients.step(fake=config.fake_score.max_grad_norm)
        self.watch.faked([row["fake"] for row in rows])
        self.readings.add({"loss/fake": mean_of(rows)["fake"]})
        if self.networks.discriminator is not None:
            for row, batch in zip(rows, batches, strict=True):
                self._real_gradients(row, batch)
            if self._shapes_features:
                self.gradients.step(fake=config.fake_score.max_grad_norm)
            self.gradients.step(discriminator=config.student.max_grad_norm)
            mean = mean_of(rows)
            self.readings.add({"loss/discriminator": mean["discriminator"], "discriminator/accuracy": mean["accuracy"]})
        self.metrics["time/fake"] += time.perf_counter() - started

    def _fake_gradients(self, batch: MicroBatch) -> Row:
        """Of the fake score's loss, and of the discriminator's on its features of student samples."""
        ids = batch.sample_ids
        with torch.no_grad():
            x = self.networks.x(self._xi(batch), batch.student_conditioning)
            eps, t_B = self.draws.normal(ids, x.shape[1:], "fake_noise"), self.draws.t(ids, "fake_t")
            x_t = add_noise(self.path, x, eps, t_B)
        prediction, features = self.networks.fake_score(x_t, t_B, batch.fake_conditioning)
        loss = F.mse_loss(prediction.float(), target(self.path, self.teacher_space.prediction, x, eps, t_B))
        row = {"fake": loss}
        if self.networks.discriminator is not None:
            logits = self.networks.logits(features if self._shapes_features else features.detach())
            row |= {"discriminator": fake_logits_loss(logits), "accuracy": (logits < 0).float().mean()}
            loss = loss + self._head_gradients(row["discriminator"])
        self.gradients.accumulate(loss, "fake")
        return row

    def _real_gradients(self, row: Row, batch: MicroBatch) -> None:
        """The discriminator's other half: teacher samples with their own captions, noised over the full range of t."""
        ids = batch.sample_ids
        with torch.no_grad():
            latents, conditioning = self.feed.of(ids)
            latents = upload(latents, self.networks.device)
            self.finite.note(latents, "the teacher samples of discriminator.real_data")
            t_B = self.draws.t(ids, "real_t")
            x_t = add_noise(self.path, latents, self.draws.normal(ids, latents.shape[1:], "real_noise"), t_B)
        with torch.set_grad_enabled(self._shapes_features):
            features = self.networks.features(x_t, t_B, conditioning)
        logits = self.networks.logits(features)
        loss = real_logits_loss(logits)
        share = self._head_gradients(loss)
        if self._shapes_features:
            self.gradients.accumulate(share, "fake")
        row["discriminator"] = loss + row["discriminator"]
        row["accuracy"] = ((logits > 0).float().mean() + row["accuracy"]) / 2

    def _head_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Of the head's own weights; returns the loss's share in the fake score's."""
        self.gradients.accumulate(loss, "discriminator", keep=self._shapes_features)
        return self.config.discriminator.fake_weight * loss if self._shapes_features else torch.zeros_like(loss)

    # -- student update ------------------------------------------------------------------------------
    def student_update(self, made: Sequence[Made], scores: Iterable[torch.Tensor] | None) -> None:
        """VSD + GAN update of the student, on what `make` gave.

        A Bridge that is trained along takes the same losses plus its own, on the pairs of this update.

        Args:
            scores: the teacher's guided x0 estimates at each part's `x_t`, in order; waited for one by one. None: no VSD.
        """
        started, waited = time.perf_counter(), 0.0
        self.gradients.warm_up(self.updates)
        answers = None if scores is None else iter(scores)
        pairs = None if self.anchor is None else self.anchor.batch(self.updates)
        rows = []
        for index, part in enumerate(made):
            waiting = time.perf_counter()
            x0_real = None if answers is None else next(answers)
            waited += time.perf_counter() - waiting
            own = None if pairs is None else pairs.part(index, len(made))
            rows.append(self._student_gradients(part, x0_real, own))
        self.readings.add(mean_of(rows))
        names = ("student",) if self.anchor is None else ("student", "bridge")
        norms = self.gradients.step(**dict.fromkeys(names, self.config.student.max_grad_norm))
        self.readings.add({f"{name}/grad_norm": norm for name, norm in norms.items()})
        self.networks.update_ema(self.updates)
        seen = self.watch.of_update(self.gradients.mean_parts, self.gradients.average)
        read, numbers = self.readings.read(*seen)
        self.metrics |= read | self.watch.observe(*numbers)
        if answers is not None:
            self.metrics["vsd/gradient_norm"] = math.sqrt(self.metrics.pop("vsd/gradient_square"))
            self.metrics["time/wait_teacher"] += waited
        self.updates += 1
        self.metrics["time/student"] += time.perf_counter() - started - waited

    def _student_gradients(self, made: Made, x0_real: torch.Tensor | None, pairs: Pairs | None) -> Row:
        """Of the student's loss, and with pairs of the Bridge's; returns the losses' parts."""
        config, row = self.config, {}
        x = self.networks.x(made.noise, made.student_conditioning)
        loss, features = x.new_zeros(()), None
        if x0_real is not None:
            x0_real = self.finite.note(upload(x0_real, x.device), "the teacher's score")
            if self._shares_pass:
                x_t, t_B = made.with_graph(self.path, x)
                x0_fake, features = self.networks.x0_fake_and_features(x_t, t_B, made.fake_conditioning)
            else:
                x0_fake = self.networks.x0_fake(*made.held, made.fake_conditioning)
            g = self.finite.note(vsd_gradient(x, x0_real, x0_fake), "the VSD gradient")
            row |= {"loss/vsd": vsd_loss(x, g), "vsd/gradient_square": g.square().mean()}
            loss = loss + config.vsd.weight * self.finite.note(row["loss/vsd"], "the VSD loss")
        if self.networks.discriminator is not None:
            if features is None:
                ids = made.sample_ids
                t_B = self.draws.t(ids, "gan_t")
                x_t = add_noise(self.path, x, self.draws.normal(ids, x.shape[1:], "gan_noise"), t_B)
                features = self.networks.features(x_t, t_B, made.fake_conditioning)
            logits = self.networks.logits(features)
            row["loss/gan"] = generator_loss(logits)
            loss = loss + config.discriminator.weight * self.finite.note(row["loss/gan"], "the GAN loss")
        names = ["student"]
        if pairs is not None:
            own, losses = self.anchor(self.networks.bridge, pairs, self.updates)
            loss = loss + config.bridge.anchor_weight * self.finite.note(own, "the Bridge's own loss")
            row |= {f"bridge/{name}": value for name, value in losses.items()}
            names.append("bridge")
        self.gradients.accumulate(loss, *names)
        return row

    # -- metrics and state ---------------------------------------------------------------------------
    def pop_metrics(self) -> dict[str, float]:
        """Metrics gathered since the last call."""
        read, metrics = self.readings.read()[0], self.metrics
        self.metrics = defaultdict(float)
        metrics |= read
        for source in (self.batches, self.feed):
            for name, value in source.pop_metrics().items() if source else ():
                metrics[name] += value
        return dict(metrics)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs besides the step."""
        own = {"updates": self.updates, "guard": self.watch.state_dict()}
        return own | self.networks.state_dict() | self.gradients.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        if "guard" in state:  # checkpoints of versions before 0.2 have none: the average begins anew
            self.watch.load_state_dict(state["guard"])
        self.networks.load_state_dict(state)
        self.gradients.load_state_dict(state)


def build_distiller(
    config: Config,
    *,
    source: Iterator[dict[str, Any]],
    real: Reals | None = None,
    anchor: Objective | None = None,
    average: Average = alone,
    parts: int | None = None,
    **others: Any,
) -> Distiller:
    """One worker's Distiller from its parts. Arguments of `Batches` and `Distiller`; the others are those of `Networks`.

    Args:
        parts: micro-batches of this worker; None: `distill.micro_batches`.
    """
    shares = {name: others.pop(name) for name in ("mean_parts", "fake_parts", "fake_mean_parts") if name in others}
    if config.fake_score.batch_size is not None and "fake_parts" not in shares:
        shares |= {"fake_parts": range(config.fake_parts), "fake_mean_parts": config.fake_parts}
    batches = Batches(source, parts or config.distill.micro_batches, others.get("device", "cpu"))
    own = Networks(config, **others)
    return Distiller(config, own, batches, real=real, anchor=anchor, average=average, **shares)
