"""The three updates of cross-space distillation, in plain torch: DMD2 in teacher space (arXiv 2606.32020).

README.md of this room tells them in words, under "One update".

    make            xi ~ N(0, I); z_student = student's x0; x = B(z_student); x_t = alpha_t x + sigma_t eps     no graph
                    a later step of several sees the student's own x0 of the step before, noised again (`rollout.py`)
    fake_update     fake score:     min  |prediction(x_t) - target|^2              on fresh student samples
                    discriminator:  min  softplus(-D(real_t)) + softplus(D(x_t))   on the fake score's features
    student_update  g = (x0_fake - x0_real) / mean|x - x0_real|
                    student:        min  1/2 |x - sg(x - g)|^2  +  w_GAN softplus(-D(x_t))  -  w_r r(D_S(z_student), prompt)

Every random number comes from (seed, purpose, sample id): nothing here keeps generator state.

Shapes: B samples of a micro-batch, C×H×W teacher latents.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from raydistill.bridge.objective import Objective
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs
from raydistill.diffusion.path import add_noise
from raydistill.distillation.adversary import Adversary
from raydistill.distillation.batches import Batches, Draws, Made, RealFeed, Reals
from raydistill.distillation.collapse import CollapseAlarm
from raydistill.distillation.fake_side import NAMES, FakeSide
from raydistill.distillation.gradients import Average, Gradients, alone, optimizers_of
from raydistill.distillation.leaving_out import LeavingOut, Waiting
from raydistill.distillation.losses import vsd_gradient, vsd_loss
from raydistill.distillation.networks import Networks
from raydistill.distillation.rates import shares
from raydistill.distillation.readings import Readings, Row, mean_of, take_roots
from raydistill.distillation.reward import Reward, RewardTerm
from raydistill.distillation.rollout import Rollout
from raydistill.distillation.watch import REFERENCE, Watch
from raydistill.transfer import upload


class Distiller:
    """One worker's updates of its networks.

    Args:
        real: teacher samples, needed where there is a discriminator.
        anchor: the Bridge's own losses, needed where `bridge.trainable` has it trained along.
        average: mean of tensors over the workers.
        mean_micro_batches: micro-batches of a worker, on average over all workers; None: as many as this one has.
        fake_micro_batches: which of its micro-batches the fake score's updates take; None: all.
        mean_fake_micro_batches: how many, on average over all workers; None: `mean_micro_batches`.
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
        mean_micro_batches: float | None = None,
        fake_micro_batches: Sequence[int] | None = None,
        mean_fake_micro_batches: float | None = None,
    ) -> None:
        if config.bridge.trainable and anchor is None:
            raise ValueError("bridge.trainable is true, but there are no pairs to anchor the Bridge")
        if networks.discriminator is not None and real is None:
            raise ValueError("discriminator.weight is above 0, but there are no real data")
        self.config, self.networks, self.batches, self.real = config, networks, batches, real
        self.anchor, self.fake_micro_batches = anchor if config.bridge.trainable else None, fake_micro_batches
        self.finite, self.readings = networks.finite, Readings(networks.finite)
        self.gradients = Gradients(
            optimizers_of(networks, config),
            mean_micro_batches or batches.micro_batches,
            self.finite,
            average,
            mean_fake_micro_batches=mean_fake_micro_batches,
            share=shares(config),
            scale=networks.gradient_scale,
        )
        self.teacher_space, self.path = networks.teacher_space, networks.teacher_space.path
        shift = self.teacher_space.default_shift if config.vsd.shift is None else config.vsd.shift
        self.leaving_out = LeavingOut(
            config.distill.non_finite_share, batches.micro_batches, self.gradients, self.finite, networks.device
        )
        self._left: set[int] = set()  # sample ids of the student's batch that are left out
        self.draws = Draws(config.run.seed, shift, networks.device)
        self.rollout = Rollout(networks, self.draws)
        self.feed = None if real is None else RealFeed(config, real)
        gan = networks.discriminator is not None
        self.adversary = Adversary(networks, self.draws, self.feed, self.gradients) if gan else None
        self.reward: RewardTerm | None = None  # in the student's loss
        self.fake_side = FakeSide(networks, self.draws, self.gradients, self.leaving_out, self.adversary)
        self.alarm = CollapseAlarm(config.distill.drift_limit, None if real is None else real.first(REFERENCE))
        self.watch = Watch(self.alarm)
        self.metrics: dict[str, float] = defaultdict(float)
        self.left_out: list[tuple[str, list[int]]] = []  # words and sample ids of what was left out, until it is told
        self.updates = 0  # of the student
        # that there are now
        self.workers = config.distill.workers * config.distill.micro_batches / self.gradients.mean_micro_batches
        self._shares_pass = gan and config.discriminator.shared_pass

    # -- make ----------------------------------------------------------------------------------------
    @torch.no_grad()
    def make(self) -> Iterator[Made]:
        """The next student batch, noised in teacher space, micro-batch by micro-batch; the teachers score its x_t."""
        started, vsd = time.perf_counter(), self.config.vsd
        self.watch.begin()
        self._left = set()
        batches = self.batches.next()
        for batch in batches:
            ids = batch.sample_ids
            self.finite.of(ids)
            for name, value in batch.fake_conditioning.items():
                self.finite.note(value, f"the teacher's conditioning {name}")
            seen, timestep_B = self.rollout.seen(batch)
            z_student = self.networks.z_student(seen, batch.student_conditioning, timestep_B)
            x = self.networks.bridged(z_student)
            t_B = self.draws.t(ids, "score_t", vsd.t_min, vsd.t_max)
            x_t = add_noise(self.path, x, self.draws.normal(ids, x.shape[1:], "score_noise"), t_B)
            sent = self.leaving_out.look(batch, self._left, len(batches), x_t, t_B)  # before the teachers see it
            texts = {
                name: self.leaving_out.zeroed(batch, self._left, v) for name, v in batch.teacher_conditioning.items()
            }
            own = vars(batch) | {"teacher_conditioning": texts}
            made = Made(**own, seen=seen, timestep_B=timestep_B, x_t=sent[0], t_B=sent[1], on_device=(x_t, t_B))
            self.watch.made(*self.leaving_out.left_of(made, self._left, z_student, x))
            self.metrics["time/make"] += time.perf_counter() - started
            yield made
            started = time.perf_counter()

    # -- fake update ---------------------------------------------------------------------------------
    def fake_update(self) -> None:
        """One update of the fake score on fresh student samples, and one of the discriminator."""
        started = time.perf_counter()
        self.gradients.set_rates(self.updates)
        rows = self.fake_side.update(self.batches.next(self.fake_micro_batches))
        mean = mean_of(rows)
        self.readings.add({name: mean[row] for row, name in NAMES.items() if row in mean})
        self.watch.faked([row["fake"] for row in rows])
        self.metrics["time/fake"] += time.perf_counter() - started

    # -- student update ------------------------------------------------------------------------------
    def student_update(self, made: Sequence[Made], scores: Iterable[torch.Tensor] | None) -> None:
        """VSD + GAN update of the student, on what `make` gave.

        A Bridge that is trained along takes the same losses plus its own, on the pairs of this update.

        Args:
            scores: the teacher's guided x0 estimates at each micro-batch's `x_t`, in order; None: no VSD.
        """
        started = time.perf_counter()
        self.gradients.set_rates(self.updates)
        waiting = Waiting(scores)
        pairs = None if self.anchor is None else self.anchor.batch(self.updates)
        names = ("student",) if self.anchor is None else ("student", "bridge")

        def phase(batch: list[Made]) -> tuple[list[Row], dict[str, torch.Tensor]]:
            rows = []
            for index, micro_batch in enumerate(batch):
                own = None if pairs is None else pairs.micro_batch(index, len(batch))
                row = self._student_gradients(micro_batch, waiting.of(index, micro_batch), own)
                rows += [row] if micro_batch.weight else []
            return rows, self.gradients.step(**dict.fromkeys(names, self.config.student.max_grad_norm))

        rows, norms = self.leaving_out.run(
            lambda batch: self.gradients.scaled(lambda: phase(batch), names), made, names, left=self._left
        )
        self.readings.add(mean_of(rows))
        self.readings.add({f"{name}/grad_norm": norm for name, norm in norms.items()})
        self.networks.update_ema(self.updates)
        left_out = self.leaving_out.pop_count()
        seen = self.watch.of_update(self.gradients.mean_micro_batches, self.gradients.average, left_out)
        read, numbers = self.readings.read(*seen)
        self.metrics |= read | self.watch.observe(*numbers)
        if self.watch.left_out:
            self.metrics["guard/left_out"] += round(self.watch.left_out * self.workers)
        take_roots(self.metrics)
        if scores is not None:
            self.metrics["time/wait_teacher"] += waiting.seconds
        self.updates += 1
        self.metrics["time/student"] += time.perf_counter() - started - waiting.seconds

    def _student_gradients(self, made: Made, x0_real: torch.Tensor | None, pairs: Pairs | None) -> Row:
        """Of the student's loss, and with pairs of the Bridge's; returns each loss by itself."""
        config, row = self.config, {}
        self.finite.of(made.sample_ids)
        z_student = self.networks.z_student(made.seen, made.student_conditioning, made.timestep_B)
        x = self.networks.bridged(z_student if self.reward is None else self.reward.watched(row, z_student, made))
        judged = x if self.adversary is None else self.adversary.watched(row, x, made)
        loss, features = x.new_zeros(()), None
        if x0_real is not None:
            x0_real = self.finite.note(upload(x0_real, x.device), "the teacher's score")
            if self._shares_pass:
                x_t, t_B = made.with_graph(self.path, judged)
                x0_fake, features = self.networks.x0_fake_and_features(x_t, t_B, made.fake_conditioning)
            else:
                x0_fake = self.networks.x0_fake(*made.on_device, made.fake_conditioning)
            g = self.finite.note(vsd_gradient(x, x0_real, x0_fake), "the VSD gradient")
            vsd = self.finite.note(vsd_loss(x, g), "the VSD loss")
            row |= {"loss/vsd": vsd.detach(), "vsd/gradient_square": g.square().mean()}
            loss = loss + config.vsd.weight * vsd
        if self.adversary is not None:
            loss = loss + self.adversary.pull(row, judged, made, self.updates, features)
        if self.reward is not None:
            loss = loss + self.reward.pull(row, z_student, made, self.updates)
        names = ["student"]
        loss = loss if made.weight == 1 else made.weight * loss  # what is left out counts as 0; the pairs are all there
        if pairs is not None:
            own, losses = self.anchor(self.networks.bridge, pairs, self.updates)
            loss = loss + config.bridge.anchor_weight * self.finite.note(own, "the Bridge's own loss")
            row |= {f"bridge/{name}": value.detach() for name, value in losses.items()}
            names.append("bridge")
        self.gradients.accumulate(loss, *names)
        return row

    # -- metrics and state ---------------------------------------------------------------------------
    def pop_metrics(self) -> dict[str, float]:
        """Metrics gathered since the last call."""
        read, metrics, self.metrics = self.readings.read()[0], self.metrics, defaultdict(float)
        metrics |= read
        if left_out := self.leaving_out.pop_left_out():
            self.left_out += left_out
        for source in (self.batches, self.feed, self.gradients.scale):
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
    reward: Reward | None = None,
    micro_batches: int | None = None,
    **others: Any,
) -> Distiller:
    """One worker's Distiller. Arguments of `Batches` and `Distiller`; the others are those of `Networks`.

    Args:
        reward: of the student's pictures (`load_reward`).
        micro_batches: micro-batches of this worker; None: `distill.micro_batches`.
    """
    shares = {
        name: others.pop(name)
        for name in ("mean_micro_batches", "fake_micro_batches", "mean_fake_micro_batches")
        if name in others
    }
    if config.fake_score.batch_size is not None and "fake_micro_batches" not in shares:
        shares |= {
            "fake_micro_batches": range(config.fake_micro_batches),
            "mean_fake_micro_batches": config.fake_micro_batches,
        }
    batches = Batches(
        source, micro_batches or config.distill.micro_batches, others.get("device", "cpu"), reward is not None
    )
    own = Networks(config, **others)
    distiller = Distiller(config, own, batches, real=real, anchor=anchor, average=average, **shares)
    if reward is not None:
        distiller.reward = RewardTerm(reward, own, distiller.gradients)
    return distiller
