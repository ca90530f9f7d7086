"""Counting without computing: the project's own step on tensors that have shapes but no numbers ("meta" tensors).

Parameters, FLOPs and live bytes are those of the networks and of the code that trains them, at any size, in seconds
and without meter. FLOPs are torch.utils.flop_counter's (a multiply-add is two); elementwise work is not in them. Bytes
are those of live tensors: what a CUDA allocator rounds up, kernels' workspace and the CUDA context come on top.
Attention is counted as the fused kernel that GPUs run, which stores no attention map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs
from raydistill.data.vae import VAE_BATCH
from raydistill.distill.batches import Real
from raydistill.distill.gradients import alone
from raydistill.distill.updates import Distiller, build_distiller
from raydistill.planning.meter import Cost, Meter, counted
from raydistill.spaces.base import Layout, Space
from raydistill.spaces.meta import empty_conditioning, empty_text_encoders, nbytes, numel
from raydistill.storage.resolve import local_path


def _filled(layout: Layout, role: str, batch: int) -> dict[str, np.ndarray]:
    """Columns of a batch as the encoders make them, of zeros."""
    return {
        f"{role}.{name}": np.zeros((batch, *shape), torch.empty(0, dtype=kind).numpy().dtype)
        for name, (shape, kind) in layout.items()
    }


# -- parts of a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
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

    def batches() -> Iterator[dict[str, np.ndarray]]:
        while True:
            columns = {"sample_id": np.arange(batch)}
            for role, layout in layouts.items():
                columns |= _filled(layout, role, batch)
            yield columns

    table = {
        name: torch.zeros(1, *shape, dtype=kind, device=device)
        for name, (shape, kind) in teacher.conditioning_layout.items()
    }
    real = Real(torch.zeros(1, *teacher.latent_shape, device=device), table, torch.zeros(1, dtype=torch.long))
    bridge = empty_bridge(config, student, teacher, device)
    several = config.distill.workers > 1
    share = config.bridge.batch_size // config.distill.workers
    anchor = _Losses(config, student, teacher, share) if config.bridge.trainable else None
    return build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=bridge,
        fake_network=teacher.load_network(),
        source=batches(),
        real=real if config.discriminator.weight > 0 else None,
        anchor=anchor,
        device=device,
        average=torch._utils._flatten_dense_tensors if several else alone,
    )


def count_trainer(config: Config, student: Space, teacher: Space, batch: int | None = None) -> Trainer:
    """One worker's step at `batch` samples (default distill.batch_size), counted by running it on meta tensors.

    `batch` must be a multiple of distill.micro_batches.
    """
    with counted() as meter:
        worker = distiller(config, student, teacher, batch or config.distill.batch_size)
        probe = worker.anchor.probe.network if worker.anchor and worker.anchor.probe else None
        networks = worker.networks
        for module in (networks.student, networks.bridge, networks.fake, networks.ema, probe):
            for tensor in [] if module is None else (*module.parameters(), *module.buffers()):
                meter.watch(tensor)
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
        for tensor in (*network.parameters(), *network.buffers()):
            meter.watch(tensor)
        before = meter.live
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
        for module in (bridge, vae, *([losses.probe.network] if attends else [])):
            for tensor in (*module.parameters(), *module.buffers()):
                meter.watch(tensor)
        before = meter.live
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
    for tensor in (*module.parameters(), *module.buffers()):
        meter.watch(tensor)
    before, work = meter.live, meter.count(part)
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
