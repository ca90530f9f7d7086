"""The networks of one worker: how they are loaded, and what they compute. What is kept of them: weights.py.

With `distill.mixed_precision` forward passes run under bfloat16 autocast, without loss scaling: bfloat16 has float32's
range. What stays float32: weights, sums of gradients, optimizers, losses, the discriminator's head, the conversions to
x0, the VSD gradient (a small difference of large numbers), and a student whose x0 divides by a small alpha. At t = 999
SD 1.5 multiplies its prediction's error 14.6 times. Its x0 in bfloat16 was off by 6 % on the miniature world, and its
gradient's cosine to float32's was 0.969; with a float32 student it is 0.9998. Such a student may run in float16, with
scaled gradients and a last layer in float32 (`student.autocast`).

Shapes: B samples, C×H×W teacher latents, c×h×w student latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raydistill.bridge.model import Bridge
from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable
from raydistill.data.reals import RealSet
from raydistill.diffusion.path import to_x0
from raydistill.diffusion.timesteps import student_timesteps
from raydistill.distillation.batches import Real
from raydistill.distillation.compiled import compile_network, compile_projector
from raydistill.distillation.discriminator import Discriminator
from raydistill.distillation.fake_score import FakeScore
from raydistill.distillation.finite import Finite
from raydistill.distillation.gradient_scale import GradientScale
from raydistill.distillation.sharding import Shared
from raydistill.distillation.weights import Weights
from raydistill.errors import InputError
from raydistill.precision import autocast, stay_float32
from raydistill.spaces import Conditioning, Space
from raydistill.spaces.adapter import add_lora, copy_of
from raydistill.spaces.channels_last import lay_out, untouched
from raydistill.spaces.one_step import one_step_x0, through_steps, x0_at, x0_gain
from raydistill.spaces.starts import load_start
from raydistill.transfer import upload

log = logging.getLogger(__name__)

MAX_GAIN = 4.0  # of a prediction's error in x0: at 2.6 (SD 2.1 from t = 625) bfloat16 does no harm


def guidance_scale(config: Config, teacher_space: Space) -> float:
    """The configured guidance, else the teacher family's default."""
    configured = config.teacher.guidance_scale
    return teacher_space.default_guidance_scale if configured is None else configured


def load_unet(space: Space, checkpoint: str | None, lora: str | None = None) -> nn.Module:
    """The student's starting network, float32: a one-step checkpoint (`student.unet`), or the pipeline's own.

    Args:
        lora: is merged into it (`student.lora_start`).

    Raises:
        InputError: the checkpoint is no student of this family, the LoRA does not fit, or one cannot be read safely.
    """
    return load_start(space, checkpoint, lora)


def adapted(config: Config, space: Space, network: nn.Module) -> nn.Module:
    """The student as it is trained, made of its start in place: all of it, or a LoRA on it.

    Raises:
        InputError: `student.targets` names no layer, or one that takes no LoRA; or the family's pipeline loads none.
    """
    if config.student.kind == "full":
        return network.requires_grad_(True)
    space.check_takes_lora("student.kind=lora")
    try:
        add_lora(network, config.student.rank, config.student.targets or space.lora_targets, config.run.seed)
    except InputError as error:
        raise InputError(f"student.targets: {error}") from None
    return network


def load_real(
    folder: Path,
    teacher_space: Space,
    count: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Real:
    """The first `count` teacher samples, or all, in memory, with the conditioning of their own captions.

    A run streams them instead, in the same order.

    Args:
        dtype: of the text encoders and of the conditioning.
        device: where they run, before anything else is there.
    """
    samples = RealSet(folder, teacher_space.latent_shape, count)
    captions = samples.captions(range(len(samples)))
    table = PromptTable(teacher_space, captions, dtype, device)
    return Real(samples.first(len(samples)), table.columns, table.rows(captions), samples.starts)


class Networks(Weights):
    """Student, Bridge, fake score and discriminator of one worker, on its device.

    Attributes:
        finite: what the networks answered, to be looked at.
        gradient_scale: of a student in float16; None: it is not.
        ema: moving average of the student (`student.ema`); None: none.
        discriminator: None without a GAN.
    """

    def __init__(
        self,
        config: Config,
        *,
        student_space: Space,
        teacher_space: Space,
        student: nn.Module,
        bridge: Bridge,
        fake_network: nn.Module,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
    ) -> None:
        """
        Args:
            fake_network: the teacher's, of its own copy: it is changed in place.
            mesh: of the workers that share student (`student.shard`) or the frozen copy of the teacher (`fake_score.shard`);
                None: each has its own.
        """
        self.config, self.student_space, self.teacher_space = config, student_space, teacher_space
        self.device, self.finite = torch.device(device), Finite()
        torch.manual_seed(config.run.seed)  # LoRA's and the head's initial weights
        share = mesh is not None and config.student.shard
        self.student = adapted(config, student_space, student).to("cpu" if share else device).eval()
        self.bridge = bridge.to(device).eval().requires_grad_(False)
        if config.bridge.trainable:
            self.bridge.projector.requires_grad_(True)
        depths = config.discriminator.read_depths
        self.fake = FakeScore(
            teacher_space, fake_network, config.fake_score, depths, mesh if config.fake_score.shard else None
        )
        self.fake.to(device)
        if config.distill.channels_last:
            _lay_out(self)
        self.ema = copy_of(self.student).requires_grad_(False) if config.student.is_averaged else None
        self.gradient_scale = GradientScale() if config.student.autocast == "float16" else None
        if self.gradient_scale is not None:  # whose rounding x0 multiplies at once
            stay_float32(self.student.get_submodule(student_space.last_layer))
        if config.distill.gradient_checkpointing:
            _recompute_activations(self)
        self.shared = (
            {name: Shared(student_space, it, mesh, self.device) for name, it in self.students().items()}
            if share
            else {}
        )
        self.discriminator = new_discriminator(self) if config.discriminator.weight > 0 else None
        if self.device.type != "meta" and config.distill.compile:  # the planner counts what is not compiled
            _compile(self)

    # -- forward passes ----------------------------------------------------------------------------
    def on_device(self, conditioning: Conditioning) -> Conditioning:
        """Real numbers in float32 as the networks' weights are: text encoders may have had another dtype."""
        return {
            name: upload(value, self.device).to(torch.float32 if value.is_floating_point() else value.dtype)
            for name, value in conditioning.items()
        }

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.distill.mixed_precision)

    @cached_property
    def student_in_bfloat16(self) -> bool:
        """Whether mixed precision includes the student: not where its x0 multiplies a prediction's rounding too much."""
        return x0_gain(self.student_space, self.config.student.start_timestep) <= MAX_GAIN

    def _student_autocast(self) -> torch.autocast:
        mixed = self.config.distill.mixed_precision
        if self.gradient_scale is not None:
            return autocast(self.device, mixed, torch.float16)
        return autocast(self.device, mixed and self.student_in_bfloat16)

    def z_student(
        self, seen: torch.Tensor, conditioning: Conditioning, timestep_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The student's latents: its x0 [B, c, h, w] of one evaluation.

        Args:
            seen: noise [B, c, h, w]; with timesteps, noised latents.
            timestep_B: of a student of several steps; None: the one of a single step.
        """
        seen, conditioning = upload(seen, self.device), self.on_device(conditioning)
        with self._student_autocast():
            if timestep_B is None:
                start = self.config.student.start_timestep
                z_student = one_step_x0(self.student_space, self.student, seen, conditioning, start)
            else:
                z_student = x0_at(self.student_space, self.student, seen, timestep_B, conditioning)
        z_student = z_student if self.gradient_scale is None else self.gradient_scale.enter(z_student)
        return self.finite.note(z_student, "the student's x0")

    def drawn(
        self, noise: torch.Tensor, conditioning: Conditioning, more_noise: Callable[[int], torch.Tensor]
    ) -> torch.Tensor:
        """The student's latents [B, c, h, w] after all of its steps; `more_noise`: see `through_steps`."""
        if self.config.student.steps == 1:
            return self.z_student(noise, conditioning)

        def evaluate(x_t: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
            return self.z_student(x_t, conditioning, timestep_B)

        timesteps = student_timesteps(self.config.student.start_timestep, self.config.student.steps)
        return through_steps(self.student_space, evaluate, upload(noise, self.device), timesteps, more_noise)

    def bridged(self, z_student: torch.Tensor) -> torch.Tensor:
        """Latents of the student in teacher space: B(z_student) [B, C, H, W] float32."""
        with self._autocast():
            x = self.bridge(z_student)
        return self.finite.note(x.float(), "the Bridge's output")

    def x(self, seen: torch.Tensor, conditioning: Conditioning, timestep_B: torch.Tensor | None = None) -> torch.Tensor:
        """The student's picture in teacher space [B, C, H, W] float32, of what `z_student` takes."""
        return self.bridged(self.z_student(seen, conditioning, timestep_B))

    def fake_score(
        self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The fake score's native prediction [B, C, H, W] and its features [B, D, h, w] of each depth."""
        with self._autocast():
            prediction, features = self.fake(x_t, t_B, self.on_device(conditioning))
        return self.finite.note(prediction, "the fake score, which starts as the teacher's copy"), features

    @torch.no_grad()
    def x0_fake(self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The fake score's x0 estimate [B, C, H, W] at x_t, with its newest weights."""
        x_t, t_B = upload(x_t, self.device), upload(t_B, self.device)
        prediction, _ = self.fake_score(x_t, t_B, conditioning)
        x0 = to_x0(self.teacher_space.path, self.teacher_space.prediction, x_t, prediction, t_B)
        return self.finite.note(x0, "the fake score")

    def x0_fake_and_features(
        self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`x0_fake` without a graph, and the features of the same pass with that of `x_t`."""
        with self._autocast():
            prediction, features = self.fake.shared(x_t, t_B, self.on_device(conditioning))
        x0 = to_x0(self.teacher_space.path, self.teacher_space.prediction, x_t.detach(), prediction, t_B)
        return self.finite.note(x0, "the fake score"), features

    def features(self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning) -> list[torch.Tensor]:
        """The fake score's features [B, D, h, w] of each depth alone; later blocks do not run."""
        with self._autocast():
            return self.fake.features(x_t, t_B, self.on_device(conditioning))

    def logits(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the discriminator says of the features of each depth."""
        return self.discriminator([self.finite.note(one, "the fake score's features") for one in features])


def _compile(networks: Networks) -> None:
    """The repeated blocks of all that runs forward and backward. An EMA, which is drawn with alone, stays as it is."""
    compile_network(networks.student_space, networks.student)
    compile_network(networks.teacher_space, networks.fake.network)
    compile_projector(networks.bridge.projector)


def _lay_out(networks: Networks) -> None:
    """UNets of student and fake score; a line where there is none."""
    pairs = (networks.student_space, networks.student), (networks.teacher_space, networks.fake.network)
    if not any([lay_out(space, network) for space, network in pairs]):
        log.warning(untouched(networks.student, "distill.channels_last"))


def _recompute_activations(networks: Networks) -> None:
    """In backward passes, block by block, instead of keeping them: same numbers, a third more work."""
    networks.student_space.recompute_activations(networks.student)
    networks.teacher_space.recompute_activations(networks.fake.network)
    networks.bridge.projector.gradient_checkpointing = True  # read by SwinIR; other projectors have no use for it


def new_discriminator(networks: Networks) -> Discriminator:
    """Fresh heads, as wide as the fake score's features are."""
    space, device = networks.teacher_space, networks.device
    conditioning = {  # ones: of masks and lengths, they keep a token
        name: torch.ones(1, *shape, dtype=kind, device=device)
        for name, (shape, kind) in space.conditioning_layout.items()
    }
    latents, t_B = torch.zeros(1, *space.latent_shape, device=device), torch.full((1,), 0.5, device=device)
    with torch.no_grad():
        features = networks.features(latents, t_B, conditioning)
    gan = networks.config.discriminator
    return Discriminator([one.shape[1] for one in features], gan.width, gan.standardize).to(device)
