"""Counting without computing: the project's own step on tensors that have shapes but no numbers ("meta" tensors).

Parameters, FLOPs and live bytes are those of the networks and of the code that trains them, at any size, in seconds.
What they hold and what they leave out is said in meter.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from raydistill.bridge.attention import AttentionProbe
from raydistill.bridge.model import Bridge, read_description
from raydistill.bridge.objective import Objective
from raydistill.bridge.trainer import DECODE_BATCH, BridgeTrainer
from raydistill.config import schema
from raydistill.config.reading import needs_pairs, trains_bridge
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs
from raydistill.data.vae import VAE_BATCH
from raydistill.diffusion.guidance import is_guided
from raydistill.distillation.batches import Real
from raydistill.distillation.gradients import alone
from raydistill.distillation.networks import guidance_scale
from raydistill.distillation.updates import Distiller, build_distiller
from raydistill.planning.meter import Cost, Meter, counted
from raydistill.spaces import meta
from raydistill.spaces.base import Space
from raydistill.spaces.meta import empty_conditioning, empty_text_encoders, nbytes, numel
from raydistill.storage.resolve import local_path

# -- parts of a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of one trainer's state, which it holds between steps."""

    student: int  # with its EMA
    fake_frozen: int
    fake_block: int  # of it, its largest block
    fake_trained: int
    bridge: int
    discriminator: int
    optimizers: int


@dataclass(frozen=True)
class Trainer:
    """One worker's step: its state, and what make, one fake update and the student update do."""

    weights: Weights
    held: int  # bytes between steps
    make: Cost
    fake: Cost
    student: Cost
    gradients: dict[str, int]  # bytes that are averaged over the workers, by optimizer

    @property
    def peak(self) -> int:
        return max(self.make.peak, self.fake.peak, self.student.peak)


def bridge_settings(config: Config) -> schema.BridgeConfig:
    """Architecture of the Bridge that is used: the saved one's where bridge.checkpoint names one that is here."""
    checkpoint = config.bridge.checkpoint
    if checkpoint is None or not local_path(checkpoint).exists():
        return config.bridge
    return config.bridge.model_copy(update=read_description(local_path(checkpoint))["architecture"])


def empty_bridge(config: Config, student: Space, teacher: Space, device: str = "meta") -> Bridge:
    with torch.device(device):
        return Bridge.create(student, teacher, bridge_settings(config))


def distiller(config: Config, student: Space, teacher: Space, batch: int, device: str = "meta") -> Distiller:
    """The worker's Distiller, fed with endless batches of zeros; on another device than meta with a fresh Bridge."""
    layouts = {"student": student.conditioning_layout, "teacher": teacher.conditioning_layout}
    columns = {"sample_id": np.arange(batch)} | {
        f"{role}.{name}": np.zeros((batch, *shape), torch.empty(0, dtype=kind).numpy().dtype)
        for role, layout in layouts.items()
        for name, (shape, kind) in layout.items()
    }
    table = {
        name: torch.zeros(1, *shape, dtype=kind, device=device) for name, (shape, kind) in layouts["teacher"].items()
    }
    real = Real(torch.zeros(1, *teacher.latent_shape, device=device), table, torch.zeros(1, dtype=torch.long))
    share = config.bridge.batch_size // config.distill.workers
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=empty_bridge(config, student, teacher, device),
        fake_network=teacher.load_network(),
        source=itertools.repeat(columns),
        real=real if config.discriminator.weight > 0 else None,
        anchor=_Losses(config, student, teacher, share) if config.bridge.trainable else None,
        device=device,
        average=torch._utils._flatten_dense_tensors if config.distill.workers > 1 else alone,
    )


def count_trainer(config: Config, student: Space, teacher: Space, batch: int | None = None) -> Trainer:
    """One worker's step at `batch` samples (default distill.batch_size), counted by running it on meta tensors.

    `batch` must be a multiple of distill.micro_batches.
    """
    with counted() as meter:
        worker = distiller(config, student, teacher, batch or config.distill.batch_size)
        probe = worker.anchor.probe.network if worker.anchor and worker.anchor.probe else None
        networks = worker.networks
        meter.hold(networks.student, networks.bridge, networks.fake, networks.ema, probe)
        part = (batch or config.distill.batch_size) // config.distill.micro_batches
        x0_real = torch.empty(part, *teacher.latent_shape, device="meta")
        scores = [x0_real] * config.distill.micro_batches if config.vsd.weight > 0 else None

        made: list[Any] = []
        works, before = [], []
        for part in (
            lambda: made.extend(worker.make()),
            worker.fake_update,
            lambda: worker.student_update(made, scores),
        ):
            before.append(meter.live)
            works.append(meter.count(part))
        held = meter.live
        # Later steps start with the optimizers' state that this first one has built up.
        make, fake, updated = (replace(w, peak=w.peak + held - b) for w, b in zip(works, before, strict=True))
        trained = list(networks.fake.trainable().values())
        frozen = {id(parameter) for parameter in trained}
        ema = [] if networks.ema is None else networks.ema.parameters()
        discriminator = [] if networks.discriminator is None else list(networks.discriminator.parameters())
        weights = Weights(
            student=nbytes(networks.student.parameters()) + nbytes(ema),
            fake_frozen=nbytes(p for p in networks.fake.parameters() if id(p) not in frozen),
            fake_block=max(
                nbytes(p for p in block.parameters() if id(p) not in frozen)
                for block in teacher.large_parts(networks.fake.network)
            ),
            fake_trained=nbytes(trained),
            bridge=nbytes(networks.bridge.parameters()),
            discriminator=nbytes(discriminator),
            optimizers=sum(
                nbytes(value for value in state.values() if isinstance(value, torch.Tensor))
                for optimizer in worker.gradients.optimizers.values()
                for state in optimizer.state.values()
            ),
        )
        gradients = {"student": nbytes(networks.student.parameters()), "fake": nbytes(trained)}
        if discriminator:
            gradients["discriminator"] = nbytes(discriminator)
        return Trainer(weights, held, make, fake, updated, gradients)


@dataclass(frozen=True)
class Teacher:
    """The frozen teacher: its size, and one forward of `samples` scored samples (two networks' rows with CFG)."""

    parameters: int
    buffers: int  # elements
    piece: int  # elements of the largest part that ZeRO-3 gathers at once
    samples: int
    score: Cost  # one guided x0 estimate; the peak is without weights
    evaluations: int  # rows the network sees for one sample: 2 with classifier-free guidance


def count_teacher(config: Config, teacher: Space, guidance_scale: float) -> Teacher:
    """One forward of teachers.slice samples in teachers.dtype, as a rank computes it."""
    from raydistill.teachers.zero3 import PIECE_NUMEL, PIECE_SHARE  # it imports deepspeed, which takes seconds

    dtype, samples = getattr(torch, config.teachers.dtype), config.teachers.slice
    layout = teacher.conditioning_layout
    with counted() as meter:
        network = teacher.load_network(dtype)
        before = meter.hold(network)
        x_t, t_B = torch.empty(samples, *teacher.latent_shape, device="meta"), torch.empty(samples, device="meta")
        conditioning, empty = empty_conditioning(layout, samples, dtype), empty_conditioning(layout, 1, dtype)
        rows: list[int] = []
        network.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )
        with torch.no_grad():
            score = meter.count(lambda: teacher.predict_x0(network, x_t, t_B, conditioning, empty, guidance_scale))
        return Teacher(
            parameters=numel(network),
            buffers=sum(buffer.numel() for buffer in network.buffers()),
            piece=_largest_piece(network, min(PIECE_NUMEL, numel(network) * PIECE_SHARE)),
            samples=samples,
            score=replace(score, peak=score.peak - before),
            evaluations=rows[0] // samples,
        )


def _largest_piece(module: nn.Module, limit: float) -> int:
    """Elements of the largest module that zero3.py gathers in one piece, by the same rule as there."""
    largest = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    for child in module.children():
        container = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        fits = not container and numel(child) <= limit
        largest = max(largest, numel(child) if fits else _largest_piece(child, limit))
    return largest


@dataclass(frozen=True)
class BridgeTraining:
    """One Bridge step of one worker."""

    parameters: int  # of the projector, which is trained
    prior: int  # elements of the frozen decoder blocks
    probe: int  # elements of the teacher's first blocks
    step: Cost
    validation: Cost  # pictures through the teacher's VAE
    text: int  # bytes of the teacher's text encoders, which stay where the prompts are too many for a table

    @property
    def peak(self) -> float:
        """Most bytes of tensors at any time."""
        return max(self.step.peak, self.validation.peak) + self.text


class _Losses(Objective):
    """The Bridge's own losses, on `share` pairs that have shapes but no numbers."""

    def __init__(self, config: Config, student: Space, teacher: Space, share: int) -> None:
        self.settings, self.seed, self.device, self.world_size = bridge_settings(config), 0, torch.device("meta"), 1
        self.probe = None
        if self.settings.attention.weight > 0:
            network = teacher.load_network(getattr(torch, config.teachers.dtype))
            self.probe = AttentionProbe(teacher, network, self.settings.attention)
            if self.settings.gradient_checkpointing:
                self.probe.network.enable_gradient_checkpointing()
        layout = teacher.conditioning_layout
        self.captions = lambda prompts: empty_conditioning(layout, len(prompts))
        numbers = torch.arange(share)
        z_teacher, z_student = (torch.empty(share, *space.latent_shape, device="meta") for space in (teacher, student))
        self.pairs = Pairs(
            ids=numbers.numpy(),
            prompts=[""] * share,
            prompt_ids=numbers,
            seeds=numbers,
            z_teacher=z_teacher,
            z_student=z_student,
            previews=[None] * share,
        )

    def batch(self, step: int) -> Pairs:
        return self.pairs


def count_bridge(config: Config, student: Space, teacher: Space, share: int) -> BridgeTraining:
    """One step of a worker with `share` pairs, as it takes it, and its validation."""
    settings, encoding = bridge_settings(config), getattr(torch, config.prompts.encoder_dtype)
    attends = settings.attention.weight > 0
    text = sum(numel(encoder) for encoder in empty_text_encoders(teacher).values()) if attends else 0
    with counted() as meter:
        bridge, losses = empty_bridge(config, student, teacher), _Losses(config, student, teacher, share)
        bridge.projector.gradient_checkpointing = settings.gradient_checkpointing
        trainer, vae = BridgeTrainer(bridge, losses), teacher.load_vae()
        before = meter.hold(bridge, vae, losses.probe.network if attends else None)
        first = meter.count(lambda: trainer.step(losses.batch(0)))
        work = replace(first, peak=first.peak + meter.live - before)  # as the next step, which has Adam's state
        latents = torch.empty(teacher.vae_batch(DECODE_BATCH), *teacher.latent_shape, device="meta")
        with torch.no_grad():
            validation = meter.count(lambda: teacher.decode(vae, latents))
        trained = sum(p.numel() for p in bridge.trainable_parameters())
        prior, probed = numel(bridge) - trained, numel(losses.probe.network) if attends else 0
        return BridgeTraining(trained, prior, probed, work, validation, text * encoding.itemsize)


@dataclass(frozen=True)
class Text:
    """A text encoder, and what one prompt of full length takes; the peak without weights, in float32."""

    parameters: int
    prompt: Cost


def count_text(space: Space) -> dict[str, Text]:
    """Each text encoder."""
    lengths, result = space.text_lengths, {}
    for part, encoder in empty_text_encoders(space).items():
        with counted() as meter, torch.no_grad():
            ids = torch.zeros(1, lengths[part], dtype=torch.long, device="meta")
            result[part] = Text(numel(encoder), _without_weights(meter, encoder, lambda e=encoder, i=ids: e(i)))
    return result


def _without_weights(meter: Meter, module: nn.Module, part: Callable[[], Any]) -> Cost:
    """Of a part that runs a module, what is alive beside the module's tensors."""
    before, work = meter.hold(module), meter.count(part)
    return replace(work, peak=work.peak - before)


@dataclass(frozen=True)
class Vae:
    """A VAE, and what encoding and decoding `batch` pictures take, as many as go through it at once; peaks without weights."""

    parameters: int
    side: int  # pixels of a picture's side
    batch: int
    encode: Cost
    decode: Cost


def count_vae(space: Space) -> Vae:
    vae, batch = space.load_vae(), space.vae_batch(VAE_BATCH)
    with counted() as meter, torch.no_grad():
        pictures = torch.empty(batch, 3, space.resolution, space.resolution, device="meta")
        latents = torch.empty(batch, *space.latent_shape, device="meta")
        encode = _without_weights(meter, vae, lambda: space.encode(vae, pictures))
        decode = _without_weights(meter, vae, lambda: space.decode(vae, latents))
    return Vae(numel(vae), space.resolution, batch, encode, decode)


# -- all of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Everything about a configuration that does not depend on the hardware. Bytes, FLOPs."""

    student: str  # pipeline classes
    teacher: str
    batch: int
    trainer: Trainer  # at `batch` samples
    small_batch: int
    small_trainer: Trainer  # at `small_batch` samples
    recomputing: Trainer  # at `batch`, with distill.gradient_checkpointing
    network: Teacher
    bridge: BridgeTraining | None  # one worker's share; None: nothing is trained
    text: dict[str, Text]  # "role part"
    vae: dict[str, Vae]  # by role
    request_bytes: int
    answer_bytes: int
    real_row_bytes: int  # one teacher sample in a worker's memory: latents and conditioning

    @property
    def text_flops(self) -> float:
        """One prompt through all text encoders."""
        return sum(encoder.prompt.flops for encoder in self.text.values())


def conditioning_bytes(teacher: Space, dtype: torch.dtype = torch.float32) -> int:
    """One prompt's conditioning as it travels: real numbers in the text encoders' `dtype`, and integers."""
    layout = teacher.conditioning_layout.values()
    return sum(math.prod(shape) * (dtype if kind.is_floating_point else kind).itemsize for shape, kind in layout)


def request_bytes(teacher: Space, batch: int, guided: bool, dtype: torch.dtype = torch.float32) -> int:
    """Tensors of a ScoreRequest: x_t and t in float32, the conditioning, and with guidance one unconditional row."""
    latents, row = 4 * math.prod(teacher.latent_shape), conditioning_bytes(teacher, dtype)
    return batch * (latents + 4 + row) + (row if guided else 0)


def synthesises(config: Config) -> bool:
    """Whether a run makes pairs."""
    return config.bridge.pairs is None and needs_pairs(config)


def samples(config: Config) -> bool:
    """Whether it makes them from the teacher's samples, not from real images."""
    return synthesises(config) and config.synthesis.images is None


def changed(config: Config, **distill: Any) -> Config:
    """The configuration with other values in its distill section."""
    return config.model_copy(update={"distill": config.distill.model_copy(update=distill)})


def count_roles(config: Config, roles: Sequence[str] | None = None) -> dict[str, Any]:
    """Those fields of Counts that these roles need (None: all roles); seconds to minutes."""
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
    spaces, found = {"student": student, "teacher": teacher}, {}

    def needed(*by: str) -> bool:
        return roles is None or not set(by).isdisjoint(roles)

    if needed("trainer"):
        found |= {"batch": config.distill.batch_size, "trainer": count_trainer(config, student, teacher)}
    if needed("teacher rank"):
        found["network"] = count_teacher(config, teacher, guidance_scale(config, teacher))
    if needed("Bridge training"):
        share = max(1, config.bridge.batch_size // config.distill.fewest)
        found["bridge"] = count_bridge(config, student, teacher, share) if trains_bridge(config) else None
    if needed("text encoder", "synthesis, prompts"):
        texts = {role: count_text(space) for role, space in spaces.items()}
        found["text"] = {f"{role} {part}": value for role, parts in texts.items() for part, value in parts.items()}
    if needed("synthesis, pictures"):
        found["vae"] = {role: count_vae(space) for role, space in spaces.items()}
    return found


def count_growth(config: Config, trainer: Trainer) -> dict[str, Any]:
    """The fields of Counts that say how a trainer's memory grows; `trainer` is it at the configured sizes."""
    batch, parts = config.distill.batch_size, config.distill.micro_batches
    small = parts if batch > parts else 2 * parts  # one sample a part, or two
    spaces = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
    recomputing = trainer
    if not config.distill.gradient_checkpointing:
        recomputing = count_trainer(changed(config, gradient_checkpointing=True), *spaces)
    small_trainer = count_trainer(config, *spaces, small)
    return {"small_batch": small, "small_trainer": small_trainer, "recomputing": recomputing}


def count_run(config: Config) -> Counts:
    """Count a configuration: half a minute for the miniature world, minutes for 12 B parameters. Downloads nothing.

    Raises InputError: models that are unknown, or do not fit each other.
    """
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
    part, guided = config.distill.batch_size // config.distill.micro_batches, is_guided(guidance_scale(config, teacher))
    latents, encoding = 4 * math.prod(teacher.latent_shape), getattr(torch, config.prompts.encoder_dtype)
    found = count_roles(config)
    return Counts(
        student=student.pipeline_class,
        teacher=teacher.pipeline_class,
        **found,
        **count_growth(config, found["trainer"]),
        request_bytes=request_bytes(teacher, part, guided, encoding),
        answer_bytes=part * latents,
        real_row_bytes=latents + conditioning_bytes(teacher, encoding),
    )
