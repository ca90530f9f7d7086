"""One worker's networks and the three updates of cross-space distillation, in plain torch.

    make            xi ~ N(0, I); z_S = student's x0; x = Bridge(z_S); x_t          (no graph)
    fake_update     the fake score follows the student; the discriminator follows both
    student_update  the same x with graph; VSD + GAN

Every random number comes from (seed, purpose, sample id): nothing here keeps generator state.

A batch is computed in `distill.micro_batches` equal parts. Every loss is a mean over samples of what each sample gives
by itself, so the mean of the parts' gradients is the batch's, up to rounding. Where fewer workers than usual share the
parts of all, some have more of them than others: each divides by what they have on average, before the mean of all.

With `distill.mixed_precision` the networks' forward passes run under bfloat16 autocast, without loss scaling: bfloat16
has float32's range. What stays float32: weights, sums of gradients, optimizers, losses, the discriminator's head, the
conversions to x0, the VSD gradient (a small difference of large numbers), and a student whose x0 divides by a small
alpha: at t = 999 SD 1.5 multiplies its prediction's error 14.6 times. Its x0 in bfloat16 was off by 6 % on the miniature
world, and its gradient's cosine to float32's was 0.969; with a float32 student it is 0.9998.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raydistill.bridge.objective import Objective
from raydistill.config.schema import Config
from raydistill.data.encode import CUT
from raydistill.data.encode import conditioning as columns_of
from raydistill.data.pairs import Pairs
from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.path import add_noise, target, to_x0
from raydistill.diffusion.timesteps import sample_t
from raydistill.distill.collapse import LatentGuard, moments
from raydistill.distill.discriminator import Discriminator
from raydistill.distill.fake_score import FakeScore
from raydistill.distill.losses import (
    fake_logits_loss,
    generator_loss,
    real_logits_loss,
    require_finite,
    vsd_gradient,
    vsd_loss,
)
from raydistill.precision import autocast
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.one_step import one_step_x0, x0_gain

MAX_GAIN = 4.0  # of a prediction's error in x0: at 2.6 (SD 2.1 from t = 625) bfloat16 does no harm


@dataclass
class Real:
    """Teacher samples for the discriminator: normalised latents and their own captions' conditioning."""

    latents: torch.Tensor  # [N, C, H, W]
    table: Conditioning  # one row per distinct caption
    rows: torch.Tensor  # [N] row of each sample's caption

    def take(self, pick: torch.Tensor) -> tuple[torch.Tensor, Conditioning]:
        return self.latents[pick].float(), {name: value[self.rows[pick]] for name, value in self.table.items()}


@dataclass
class Part:
    """A micro-batch, in main memory."""

    sample_ids: torch.Tensor
    student_conditioning: Conditioning
    teacher_conditioning: Conditioning


@dataclass
class Made(Part):
    """A micro-batch of the student before its update: what the teachers get to see. In main memory too."""

    noise: torch.Tensor
    x_t: torch.Tensor
    t_B: torch.Tensor


def mean_of(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Mean of each scalar over the micro-batches."""
    return {name: torch.stack([row[name].detach() for row in rows]).mean().item() for name in rows[0]}


class Distiller:
    """Student, Bridge, fake score and discriminator of one worker, with their optimizers."""

    def __init__(
        self,
        config: Config,
        student_space: Space,
        teacher_space: Space,
        student: nn.Module,
        bridge: nn.Module,
        fake_network: nn.Module,
        real: Real | None,
        batches: Iterator[dict[str, Any]],
        average: Callable[[list[torch.Tensor]], None] = lambda gradients: None,
        device: torch.device | str = "cpu",
        anchor: Objective | None = None,
        parts: int | None = None,
        mean_parts: float | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """
        Args:
            batches: conditioned batches; k + 1 per update, the student's first.
            average: averages tensors of one dtype over the workers in place.
            anchor: the Bridge's own losses, needed where `bridge.trainable` has it trained along.
            parts: equal parts in which this worker computes its batches; default `distill.micro_batches`.
            mean_parts: those of a worker on average, where workers have batches of different sizes; default `parts`.
            mesh: of the workers that share one frozen copy of the teacher (`fake_score.shard`); None: each has its own.
        """
        self.config, self.student_space, self.teacher_space = config, student_space, teacher_space
        self.device, self.batches, self.average, self.real = torch.device(device), batches, average, real
        torch.manual_seed(config.run.seed)  # LoRA's and the head's initial weights
        self.student = student.to(device).eval().requires_grad_(True)
        self.bridge = bridge.to(device).eval().requires_grad_(False)
        self.anchor = anchor if config.bridge.trainable else None
        self.parts = parts or config.distill.micro_batches
        self.mean_parts = mean_parts or self.parts
        if config.bridge.trainable:
            if anchor is None:
                raise ValueError("bridge.trainable is true, but there are no pairs to anchor the Bridge")
            self.bridge.projector.requires_grad_(True)
        depth = config.discriminator.depth_fraction
        self.fake = FakeScore(teacher_space, fake_network, config.fake_score, depth, mesh).to(device)
        self.use_gan = config.discriminator.weight > 0
        self.discriminator: Discriminator | None = None
        self.ema = copy.deepcopy(student).requires_grad_(False) if config.student.ema_decay else None
        self.shift = config.vsd.shift if config.vsd.shift is not None else teacher_space.default_shift
        self.metrics: dict[str, float] = {}
        self.consumed: list[list[int]] = []  # sample ids of the batches taken since `pop_sample_ids`
        self.updates = 0  # of the student
        self.guard = LatentGuard(config.distill.drift_limit, real.latents if real is not None else None)
        self._moments: list[torch.Tensor] = []  # of the batch that was made last
        if config.distill.gradient_checkpointing:
            self._recompute_activations()
        self._optimizers()

    def _recompute_activations(self) -> None:
        """In backward passes, block by block, instead of keeping them: same numbers, a third more work."""
        self.student.enable_gradient_checkpointing()
        self.fake.network.enable_gradient_checkpointing()
        self.bridge.projector.gradient_checkpointing = True  # read by SwinIR; other projectors have no use for it

    def _optimizers(self) -> None:
        def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
            return torch.optim.AdamW(parameters, lr=lr, betas=(0.0, 0.999), eps=1e-8, weight_decay=0.0)

        config = self.config
        self.optimizers = {
            "student": adamw(list(self.student.parameters()), config.student.lr),
            "fake": adamw(list(self.fake.trainable().values()), config.fake_score.lr),
        }
        if self.anchor is not None:
            self.optimizers["bridge"] = adamw(self.bridge.trainable_parameters(), config.bridge.trainable_lr)
        if self.use_gan:
            if self.real is None:
                raise ValueError("discriminator.weight is above 0, but there are no real data")
            latents, conditioning = self.real.take(torch.zeros(1, dtype=torch.long))
            with torch.no_grad():
                features = self.fake.features(
                    latents.to(self.device), torch.full((1,), 0.5, device=self.device), self._to(conditioning)
                )
            self.discriminator = Discriminator(features.shape[1], config.discriminator.width).to(self.device)
            self.optimizers["discriminator"] = adamw(list(self.discriminator.parameters()), config.discriminator.lr)

    def _to(self, conditioning: Conditioning) -> Conditioning:
        """On the device, real numbers in float32 as the networks' weights are: text encoders may have had another dtype."""
        return {
            name: value.to(self.device, torch.float32 if value.is_floating_point() else value.dtype)
            for name, value in conditioning.items()
        }

    # -- random numbers ----------------------------------------------------------------------------
    def _normal(self, ids: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        return normal(self.config.run.seed, ids, shape, purpose).to(self.device)

    def _uniform(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        return uniform(self.config.run.seed, ids, purpose).to(self.device)

    def _full_range_t(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """Times for the fake score and the discriminator: the whole range but its ill-conditioned ends."""
        return sample_t(self._uniform(ids, purpose), 1e-3, 1 - 1e-3, self.shift)

    # -- forward parts -----------------------------------------------------------------------------
    def _autocast(self, wanted: bool = True) -> torch.autocast:
        return autocast(self.device, wanted and self.config.distill.mixed_precision)

    @cached_property
    def student_in_bfloat16(self) -> bool:
        """Whether mixed precision includes the student: not where its x0 multiplies a prediction's rounding too much."""
        space, start = self.student_space, self.config.student.start_timestep
        return x0_gain(space, start) <= MAX_GAIN

    def _latents(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The student's picture in teacher space, x [B, C, H, W] float32."""
        start = self.config.student.start_timestep
        noise, conditioning = noise.to(self.device), self._to(conditioning)
        with self._autocast(self.student_in_bfloat16):
            z_S = one_step_x0(self.student_space, self.student, noise, conditioning, start)
        with self._autocast():
            x = self.bridge(require_finite(z_S, "the student's x0"))
        return require_finite(x.float(), "the Bridge's output")

    def _fake(self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
        """The fake score's prediction and features."""
        with self._autocast():
            prediction, features = self.fake(x_t, t_B, self._to(conditioning))
        return require_finite(prediction, "the fake score, which starts as the teacher's copy"), features

    def _logits(self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The discriminator's view of noised latents, through the fake score's features."""
        with self._autocast():
            features = self.fake.features(x_t, t_B, self._to(conditioning))
        return self.discriminator(require_finite(features, "the fake score's features"))

    def _next(self) -> list[Part]:
        """The next batch in equal parts. Raises ValueError where it cannot be divided."""
        started = time.perf_counter()
        batch = next(self.batches)
        self._add("time/data", time.perf_counter() - started)
        count = self.parts
        ids = torch.tensor(batch["sample_id"], dtype=torch.long)
        self.consumed.append(ids.tolist())
        if CUT in batch:
            self._add("data/cut_prompts", float(np.sum(batch[CUT])))
        if len(ids) % count:
            raise ValueError(f"distill.micro_batches: a batch of {len(ids)} samples has no {count} equal parts")
        roles = [columns_of(batch, role) for role in ("student", "teacher")]
        size = len(ids) // count
        places = [slice(first, first + size) for first in range(0, len(ids), size)]
        return [
            Part(ids[rows], *({name: value[rows] for name, value in columns.items()} for columns in roles))
            for rows in places
        ]

    def _noise(self, ids: torch.Tensor) -> torch.Tensor:
        return normal(self.config.run.seed, ids, self.student_space.latent_shape, "latents")

    def _add(self, name: str, value: float) -> None:
        self.metrics[name] = self.metrics.get(name, 0.0) + value

    # -- the three parts of a step -------------------------------------------------------------------
    @torch.no_grad()
    def make(self) -> Iterator[Made]:
        """The next student batch, noised in teacher space, micro-batch by micro-batch."""
        started, vsd = time.perf_counter(), self.config.vsd
        self._moments = []
        for part in self._next():
            ids, noise = part.sample_ids, self._noise(part.sample_ids)
            x = self._latents(noise, part.student_conditioning)
            t_B = sample_t(self._uniform(ids, "score_t"), vsd.t_min, vsd.t_max, self.shift)
            x_t = add_noise(self.teacher_space.path, x, self._normal(ids, x.shape[1:], "score_noise"), t_B)
            self._moments.append(moments(x))
            conditioning = part.student_conditioning, part.teacher_conditioning
            self._add("time/make", time.perf_counter() - started)
            yield Made(ids, *conditioning, noise, x_t.cpu(), t_B.cpu())
            started = time.perf_counter()

    def fake_update(self) -> None:
        """One update of the fake score on fresh student samples, and one of the discriminator."""
        started = time.perf_counter()
        parts = self._next()
        rows = [self._fake_gradients(part) for part in parts]
        if not self._shapes_features:
            self._step(fake=self.config.fake_score.max_grad_norm)
        self.metrics["loss/fake"] = mean_of(rows)["fake"]
        if self.discriminator is not None:
            for row, part in zip(rows, parts, strict=True):
                self._real_gradients(row, part)
            if self._shapes_features:
                self._step(fake=self.config.fake_score.max_grad_norm)
            self._step(discriminator=self.config.student.max_grad_norm)
            mean = mean_of(rows)
            self.metrics |= {"loss/discriminator": mean["discriminator"], "discriminator/accuracy": mean["accuracy"]}
        self._add("time/fake", time.perf_counter() - started)

    def _fake_gradients(self, part: Part) -> dict[str, torch.Tensor]:
        """Of the fake score's loss, and of the discriminator's on its features of student samples."""
        ids = part.sample_ids
        with torch.no_grad():
            x = self._latents(self._noise(ids), part.student_conditioning)
            eps = self._normal(ids, x.shape[1:], "fake_noise")
            t_B = self._full_range_t(ids, "fake_t")
            x_t = add_noise(self.teacher_space.path, x, eps, t_B)
        prediction, features = self._fake(x_t, t_B, part.teacher_conditioning)
        wanted = target(self.teacher_space.path, self.teacher_space.prediction, x, eps, t_B)
        loss = torch.nn.functional.mse_loss(prediction.float(), wanted)
        row = {"fake": loss}
        if self.discriminator is not None:
            logits = self.discriminator(require_finite(self._seen(features), "the fake score's features"))
            row |= {"discriminator": fake_logits_loss(logits), "accuracy": (logits < 0).float().mean()}
            loss = loss + self._head_gradients(row["discriminator"])
        self._accumulate(loss, "fake")
        return row

    @property
    def _shapes_features(self) -> bool:
        """Whether the discriminator's loss reaches the weights of the fake score, whose features it reads."""
        return self.discriminator is not None and self.config.discriminator.fake_weight > 0

    def _seen(self, features: torch.Tensor) -> torch.Tensor:
        return features if self._shapes_features else features.detach()

    def _head_gradients(self, loss: torch.Tensor) -> torch.Tensor:
        """Of the head's own weights; returns the loss's share in the fake score's."""
        self._accumulate(loss, "discriminator", keep=self._shapes_features)
        return self.config.discriminator.fake_weight * loss if self._shapes_features else torch.zeros_like(loss)

    def _real_gradients(self, row: dict[str, torch.Tensor], part: Part) -> None:
        """The discriminator's other half: teacher samples with their own captions, noised over the full range of t."""
        ids = part.sample_ids
        with torch.no_grad():
            pick = (self._uniform(ids, "real_pick").cpu() * len(self.real.rows)).long()
            latents, conditioning = self.real.take(pick)
            latents = require_finite(latents.to(self.device), "the teacher samples of discriminator.real_data")
            t_B = self._full_range_t(ids, "real_t")
            x_t = add_noise(self.teacher_space.path, latents, self._normal(ids, latents.shape[1:], "real_noise"), t_B)
        with torch.set_grad_enabled(self._shapes_features), self._autocast():
            features = self.fake.features(x_t, t_B, self._to(conditioning))
        logits = self.discriminator(require_finite(features, "the fake score's features"))
        loss = real_logits_loss(logits)
        share = self._head_gradients(loss)
        if self._shapes_features:
            self._accumulate(share, "fake")
        row["discriminator"] = loss + row["discriminator"]
        row["accuracy"] = ((logits > 0).float().mean() + row["accuracy"]) / 2

    def student_update(self, parts: Sequence[Made], scores: Iterable[torch.Tensor] | None) -> None:
        """VSD + GAN update of the student, on what `make` gave.

        A Bridge that is trained along takes the same losses plus its own, on the pairs of this update.

        Args:
            scores: the teacher's guided x0 estimates at each part's `x_t`, in order; waited for one by one. None: no VSD.
        """
        started, waited = time.perf_counter(), 0.0
        config = self.config
        answers = None if scores is None else iter(scores)
        pairs = self.anchor.batch(self.updates) if self.anchor is not None else None
        rows = []
        for index, made in enumerate(parts):
            x0_real = None
            if answers is not None:
                waiting = time.perf_counter()
                x0_real = next(answers)
                waited += time.perf_counter() - waiting
            own = None if pairs is None else pairs.part(index, len(parts))
            rows.append(self._student_gradients(made, x0_real, own))
        mean = mean_of(rows)
        if answers is not None:
            mean["vsd/gradient_norm"] = math.sqrt(mean.pop("vsd/gradient_square"))
            self._add("time/wait_teacher", waited)
        self.metrics |= mean
        clipped = {"student": config.student.max_grad_norm}
        if self.anchor is not None:
            clipped["bridge"] = config.student.max_grad_norm
        self.metrics |= {f"{name}/grad_norm": norm for name, norm in self._step(**clipped).items()}
        if self.ema is not None:
            with torch.no_grad():
                # warmed up, or a short run's average would still be its start
                decay = min(config.student.ema_decay, (self.updates + 1) / (self.updates + 10))
                for mean, new in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                    mean.lerp_(new, 1 - decay)
        self._watch_latents()
        self.updates += 1
        self._add("time/student", time.perf_counter() - started - waited)

    def _student_gradients(
        self, made: Made, x0_real: torch.Tensor | None, pairs: Pairs | None
    ) -> dict[str, torch.Tensor]:
        """Of the student's loss, and with pairs of the Bridge's; returns the losses' parts."""
        config, space, row = self.config, self.teacher_space, {}
        x = self._latents(made.noise, made.student_conditioning)
        loss = x.new_zeros(())
        if x0_real is not None:
            with torch.no_grad():
                x_t, t_B = made.x_t.to(self.device), made.t_B.to(self.device)
                prediction, _ = self._fake(x_t, t_B, made.teacher_conditioning)
                x0_fake = to_x0(space.path, space.prediction, x_t, prediction, t_B)
            gradient = vsd_gradient(x, x0_real.to(self.device), x0_fake)
            row |= {"loss/vsd": vsd_loss(x, gradient), "vsd/gradient_square": gradient.square().mean()}
            loss = loss + config.vsd.weight * require_finite(row["loss/vsd"], "the VSD loss")
        if self.discriminator is not None:
            ids = made.sample_ids
            t_B = self._full_range_t(ids, "gan_t")
            x_t = add_noise(space.path, x, self._normal(ids, x.shape[1:], "gan_noise"), t_B)
            row["loss/gan"] = generator_loss(self._logits(x_t, t_B, made.teacher_conditioning))
            loss = loss + config.discriminator.weight * require_finite(row["loss/gan"], "the GAN loss")
        names = ["student"]
        if pairs is not None:
            own, losses = self.anchor(self.bridge, pairs, self.updates)
            loss = loss + config.bridge.anchor_weight * require_finite(own, "the Bridge's own loss")
            row |= {f"bridge/{name}": value for name, value in losses.items()}
            names.append("bridge")
        self._accumulate(loss, *names)
        return row

    def _watch_latents(self) -> None:
        """Statistics of this update's Bridge output over all workers, and how far they are from the teacher's."""
        total = torch.stack(self._moments).sum(0) / self.mean_parts  # parts are equally large
        self.average([total])
        self.metrics |= self.guard.observe(total.cpu())

    # -- gradients ---------------------------------------------------------------------------------
    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for group in self.optimizers[name].param_groups for p in group["params"]]

    def _accumulate(self, loss: torch.Tensor, *names: str, keep: bool = False) -> None:
        """Add a micro-batch's share of the mean gradient to that of the named optimizers' parameters.

        Args:
            keep: the graph, for another loss that shares it.
        """
        require_finite(loss, f"the {' and '.join(names)} loss")
        parameters = [p for name in names for p in self._parameters(name)]
        torch.autograd.backward(loss / self.mean_parts, inputs=parameters, retain_graph=keep)

    def _step(self, **max_grad_norms: float) -> dict[str, float]:
        """Average the gradients over workers, clip them and step the named optimizers.

        Returns:
            Each one's gradient norm before clipping.
        """
        groups = {name: self._parameters(name) for name in max_grad_norms}
        parameters = [p for group in groups.values() for p in group]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.average([p.grad for p in parameters])
        norms = {
            name: nn.utils.clip_grad_norm_(group, max_grad_norms[name]) for name, group in groups.items()
        }  # fmt: skip
        for name, norm in norms.items():  # before any step: a bad gradient must change nothing
            require_finite(norm, f"the {name} gradient")
        for name, group in groups.items():
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
            with torch.no_grad():
                require_finite(nn.utils.get_total_norm(group), f"the {name} weights after their update")
        return {name: norm.item() for name, norm in norms.items()}

    def pop_metrics(self) -> dict[str, float]:
        """Metrics gathered since the last call."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def pop_sample_ids(self) -> list[list[int]]:
        """Sample ids of each batch consumed since the last call."""
        consumed, self.consumed = self.consumed, []
        return consumed

    # -- state -------------------------------------------------------------------------------------
    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the EMA when there is one."""
        return self.ema if self.ema is not None else self.student

    def best_state(self) -> dict[str, Any]:
        """What is kept of the best update: the evaluated student, and a Bridge that is trained along."""
        state = {"student": self.evaluated.state_dict()}
        return state | ({"bridge": self.bridge.projector.state_dict()} if self.anchor is not None else {})

    def load_best_state(self, state: dict[str, Any]) -> None:
        self.evaluated.load_state_dict(state["student"])
        if self.anchor is not None:
            self.bridge.projector.load_state_dict(state["bridge"])

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs besides the step; frozen weights are not in it."""
        state: dict[str, Any] = {
            "updates": self.updates,
            "guard": self.guard.state_dict(),
            "student": self.student.state_dict(),
            "fake": {name: p.detach() for name, p in self.fake.trainable().items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
        if self.anchor is not None:
            state["bridge"] = self.bridge.projector.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        if "guard" in state:  # checkpoints of versions before 0.2 have none: the average begins anew
            self.guard.load_state_dict(state["guard"])
        self.student.load_state_dict(state["student"])
        with torch.no_grad():
            for name, parameter in self.fake.trainable().items():
                parameter.copy_(state["fake"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
        if self.anchor is not None:
            self.bridge.projector.load_state_dict(state["bridge"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
