"""One worker's networks and the three updates of cross-space distillation, in plain torch.

    make            xi ~ N(0, I); z_S = student's x0; x = Bridge(z_S); x_t          (no graph)
    fake_update     the fake score follows the student; the discriminator follows both
    student_update  the same x with graph; VSD + GAN

Every random number comes from (seed, purpose, sample id): nothing here keeps generator state.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raydistill.bridge.objective import Objective
from raydistill.config import Config
from raydistill.data.encode import conditioning as columns_of
from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.path import add_noise, target, to_x0
from raydistill.diffusion.timesteps import sample_t
from raydistill.distill.discriminator import Discriminator
from raydistill.distill.fake_score import FakeScore
from raydistill.distill.losses import (
    discriminator_loss,
    generator_loss,
    require_finite,
    vsd_gradient,
    vsd_loss,
)
from raydistill.distill.student import one_step_x0
from raydistill.spaces import Conditioning, Space


@dataclass
class Real:
    """Teacher samples for the discriminator: normalised latents and their own captions' conditioning."""

    latents: torch.Tensor  # [N, C, H, W]
    table: Conditioning  # one row per distinct caption
    rows: torch.Tensor  # [N] row of each sample's caption

    def take(self, pick: torch.Tensor) -> tuple[torch.Tensor, Conditioning]:
        return self.latents[pick].float(), {name: value[self.rows[pick]] for name, value in self.table.items()}


@dataclass
class Made:
    """A student batch before its update: what the teachers get to see."""

    sample_ids: torch.Tensor
    noise: torch.Tensor
    student_conditioning: Conditioning
    teacher_conditioning: Conditioning
    x_t: torch.Tensor
    t_B: torch.Tensor


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
    ) -> None:
        """
        Args:
            batches: conditioned batches; k + 1 per update, the student's first.
            average: averages gradients over the workers in place.
            anchor: the Bridge's own losses, needed where `bridge.trainable` has it trained along.
        """
        self.config, self.student_space, self.teacher_space = config, student_space, teacher_space
        self.device, self.batches, self.average, self.real = torch.device(device), batches, average, real
        torch.manual_seed(config.run.seed)  # LoRA's and the head's initial weights
        self.student = student.to(device).eval().requires_grad_(True)
        self.bridge = bridge.to(device).eval().requires_grad_(False)
        self.anchor = anchor if config.bridge.trainable else None
        if config.bridge.trainable:
            if anchor is None:
                raise ValueError("bridge.trainable is true, but there are no pairs to anchor the Bridge")
            self.bridge.projector.requires_grad_(True)
        self.fake = FakeScore(teacher_space, fake_network, config.fake_score, config.discriminator.depth_fraction).to(
            device
        )
        self.use_gan = config.discriminator.weight > 0
        self.discriminator: Discriminator | None = None
        self.ema = copy.deepcopy(student).requires_grad_(False) if config.student.ema_decay else None
        self.shift = config.vsd.shift if config.vsd.shift is not None else teacher_space.default_shift
        self.metrics: dict[str, float] = {}
        self.consumed: list[list[int]] = []  # sample ids of the batches taken since `pop_sample_ids`
        self.updates = 0  # of the student
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
        return {name: value.to(self.device) for name, value in conditioning.items()}

    # -- random numbers ----------------------------------------------------------------------------
    def _normal(self, ids: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        return normal(self.config.run.seed, ids, shape, purpose).to(self.device)

    def _uniform(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        return uniform(self.config.run.seed, ids, purpose).to(self.device)

    def _full_range_t(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """Times for the fake score and the discriminator: the whole range but its ill-conditioned ends."""
        return sample_t(self._uniform(ids, purpose), 1e-3, 1 - 1e-3, self.shift)

    # -- forward parts -----------------------------------------------------------------------------
    def _student_latents(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        start = self.config.student.start_timestep
        z_S = one_step_x0(self.student_space, self.student, noise, conditioning, start)
        return require_finite(z_S, "the student's x0")

    def _next(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning, Conditioning]:
        """Sample ids, noise and both conditionings of the next batch."""
        started = time.perf_counter()
        batch = next(self.batches)
        self._add("time/data", time.perf_counter() - started)
        ids = torch.tensor(batch["sample_id"], dtype=torch.long)
        self.consumed.append(ids.tolist())
        noise = self._normal(ids, self.student_space.latent_shape, "latents")
        return ids, noise, self._to(columns_of(batch, "student")), self._to(columns_of(batch, "teacher"))

    def _add(self, name: str, value: float) -> None:
        self.metrics[name] = self.metrics.get(name, 0.0) + value

    # -- the three parts of a step -------------------------------------------------------------------
    @torch.no_grad()
    def make(self) -> Made:
        """The next student batch, noised in teacher space."""
        started = time.perf_counter()
        ids, noise, student_conditioning, teacher_conditioning = self._next()
        x = self.bridge(self._student_latents(noise, student_conditioning))
        vsd = self.config.vsd
        t_B = sample_t(self._uniform(ids, "score_t"), vsd.t_min, vsd.t_max, self.shift)
        x_t = add_noise(self.teacher_space.path, x, self._normal(ids, x.shape[1:], "score_noise"), t_B)
        self.metrics |= {"latents/mean": x.mean().item(), "latents/std": x.std().item()}
        self._add("time/make", time.perf_counter() - started)
        return Made(ids, noise, student_conditioning, teacher_conditioning, x_t, t_B)

    def fake_update(self) -> None:
        """One update of the fake score on fresh student samples, and one of the discriminator."""
        started = time.perf_counter()
        ids, noise, student_conditioning, conditioning = self._next()
        with torch.no_grad():
            x = self.bridge(self._student_latents(noise, student_conditioning))
            eps = self._normal(ids, x.shape[1:], "fake_noise")
            t_B = self._full_range_t(ids, "fake_t")
            x_t = add_noise(self.teacher_space.path, x, eps, t_B)
        prediction, features = self.fake(x_t, t_B, conditioning)
        require_finite(prediction, "the fake score, which starts as the teacher's copy")
        wanted = target(self.teacher_space.path, self.teacher_space.prediction, x, eps, t_B)
        loss = torch.nn.functional.mse_loss(prediction.float(), wanted)
        self._update(loss, fake=self.config.fake_score.max_grad_norm)
        self.metrics["loss/fake"] = loss.item()
        if self.discriminator is not None:
            self._discriminator_update(ids, features.detach())
        self._add("time/fake", time.perf_counter() - started)

    def _discriminator_update(self, ids: torch.Tensor, fake_features: torch.Tensor) -> None:
        """Real: teacher samples with their own captions, noised over the full range of t."""
        with torch.no_grad():
            pick = (self._uniform(ids, "real_pick").cpu() * len(self.real.rows)).long()
            latents, conditioning = self.real.take(pick)
            latents = latents.to(self.device)
            t_B = self._full_range_t(ids, "real_t")
            x_t = add_noise(self.teacher_space.path, latents, self._normal(ids, latents.shape[1:], "real_noise"), t_B)
            real_features = self.fake.features(x_t, t_B, self._to(conditioning))
        logits_real, logits_fake = self.discriminator(real_features), self.discriminator(fake_features)
        loss = discriminator_loss(logits_real, logits_fake)
        self._update(loss, discriminator=self.config.student.max_grad_norm)
        right = ((logits_real > 0).float().mean() + (logits_fake < 0).float().mean()) / 2
        self.metrics |= {"loss/discriminator": loss.item(), "discriminator/accuracy": right.item()}

    def student_update(self, made: Made, x0_real: torch.Tensor | None) -> None:
        """VSD + GAN update of the student; `x0_real` is the teacher's guided estimate at `made.x_t`.

        A Bridge that is trained along takes the same losses plus its own, on the pairs of this update.
        """
        started = time.perf_counter()
        config = self.config
        x = self.bridge(self._student_latents(made.noise, made.student_conditioning))
        loss = x.new_zeros(())
        if x0_real is not None:
            with torch.no_grad():
                prediction, _ = self.fake(made.x_t, made.t_B, made.teacher_conditioning)
                space = self.teacher_space
                x0_fake = to_x0(space.path, space.prediction, made.x_t, prediction, made.t_B)
            gradient = vsd_gradient(x, x0_real.to(self.device), x0_fake)
            vsd = vsd_loss(x, gradient)
            loss = loss + config.vsd.weight * vsd
            self.metrics |= {"loss/vsd": vsd.item(), "vsd/gradient_norm": gradient.square().mean().sqrt().item()}
        if self.discriminator is not None:
            t_B = self._full_range_t(made.sample_ids, "gan_t")
            x_t = add_noise(self.teacher_space.path, x, self._normal(made.sample_ids, x.shape[1:], "gan_noise"), t_B)
            gan = generator_loss(self.discriminator(self.fake.features(x_t, t_B, made.teacher_conditioning)))
            loss = loss + config.discriminator.weight * gan
            self.metrics["loss/gan"] = gan.item()
        clipped = {"student": config.student.max_grad_norm}
        if self.anchor is not None:
            own, parts = self.anchor(self.bridge, self.anchor.batch(self.updates), self.updates)
            loss = loss + config.bridge.anchor_weight * own
            self.metrics |= {f"bridge/{name}": value.item() for name, value in parts.items()}
            clipped["bridge"] = config.student.max_grad_norm
        self.metrics |= {f"{name}/grad_norm": norm for name, norm in self._update(loss, **clipped).items()}
        if self.ema is not None:
            with torch.no_grad():
                # warmed up, or a short run's average would still be its start
                decay = min(config.student.ema_decay, (self.updates + 1) / (self.updates + 10))
                for mean, new in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                    mean.lerp_(new, 1 - decay)
        self.updates += 1
        self._add("time/student", time.perf_counter() - started)

    def _update(self, loss: torch.Tensor, **max_grad_norms: float) -> dict[str, float]:
        """Backward, average over workers, clip and step the named optimizers.

        Returns:
            Each one's gradient norm before clipping.
        """
        names = " and ".join(max_grad_norms)
        require_finite(loss, f"the {names} loss")
        groups = {
            name: [p for group in self.optimizers[name].param_groups for p in group["params"]]
            for name in max_grad_norms
        }
        parameters = [p for group in groups.values() for p in group]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        self.average([p.grad for p in parameters])
        norms = {
            name: nn.utils.clip_grad_norm_(group, max_grad_norms[name]) for name, group in groups.items()
        }  # fmt: skip
        for name, norm in norms.items():  # before any step: a bad gradient must change nothing
            require_finite(norm, f"the {name} gradient")
        for name in groups:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
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
