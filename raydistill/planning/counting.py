"""Counting without computing: the project's own step on tensors that have shapes but no numbers ("meta" tensors).

Parameters, FLOPs and live bytes are those of the networks and of the code that trains them, at any size, in seconds.
What they hold and what they leave out is said in meter.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from raydistill.bridge.attention import AttentionProbe
from raydistill.bridge.model import Bridge, read_description
from raydistill.bridge.objective import Objective
from raydistill.bridge.trainer import DECODE_BATCH, BridgeTrainer
from raydistill.config.networks import BridgeConfig
from raydistill.config.reading import other_drawer
from raydistill.config.schema import Config
from raydistill.data.encode import CHUNK
from raydistill.data.pairs import Pairs
from raydistill.data.reals import most_bytes
from raydistill.data.reward_texts import REWARD, RewardTexts, clip_config, empty_clip
from raydistill.data.vae import VAE_BATCH
from raydistill.diffusion.guidance import is_guided
from raydistill.distillation.batches import Real
from raydistill.distillation.gradients import alone
from raydistill.distillation.networks import guidance_scale
from raydistill.distillation.optimizers import moments_bytes
from raydistill.distillation.reward import Reward
from raydistill.distillation.reward_models import empty_model_of
from raydistill.distillation.updates import Distiller, build_distiller
from raydistill.export.licences import student_licences
from raydistill.planning.counts import (
    BridgeTraining,
    Cost,
    Counts,
    Models,
    Teacher,
    Terms,
    Text,
    Trainer,
    Vae,
    Wanted,
    Weights,
    as_counts,
    wanted,
)
from raydistill.planning.meter import Meter, counted
from raydistill.spaces import adapter, hub_models, meta
from raydistill.spaces.base import Space
from raydistill.spaces.distilled import drawing_guidance, own_steps
from raydistill.spaces.meta import empty_conditioning, empty_text_encoders, nbytes, numel
from raydistill.storage.resolve import local_path
from raydistill.teachers.speed import quantised_layers

# -- parts of a run ---------------------------------------------------------------------------------------


def bridge_settings(config: Config) -> BridgeConfig:
    """Architecture of the Bridge that is used: the saved one's where bridge.checkpoint names one that is here."""
    checkpoint = config.bridge.checkpoint
    if checkpoint is None or not local_path(checkpoint).exists():
        return config.bridge
    return config.bridge.model_copy(update=read_description(local_path(checkpoint))["architecture"])


def empty_bridge(config: Config, student: Space, teacher: Space, device: str = "meta") -> Bridge:
    with torch.device(device):
        return Bridge.create(student, teacher, bridge_settings(config))


def reward_places(config: Config) -> dict[str, str]:
    """Where the weights of the student's reward are, as the configuration names them; here or not."""
    return config.evaluation.weights | config.reward.weights


def distiller(config: Config, student: Space, teacher: Space, batch: int, device: str = "meta") -> Distiller:
    """The worker's Distiller, fed with endless batches of zeros; on another device than meta with a fresh Bridge."""
    layouts = {"student": student.conditioning_layout, "teacher": teacher.conditioning_layout}
    reward = None
    if config.reward.is_on:
        metric, places = config.reward.metric, reward_places(config)
        layouts[REWARD] = RewardTexts(metric, places).layout
        model = empty_model_of(metric, places, student.resolution)
        reward = Reward(student, model, config.distill.gradient_checkpointing)
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
        reward=reward,
        device=device,
        average=torch._utils._flatten_dense_tensors if config.distill.workers > 1 else alone,
    )


def in_32_bits(config: Config) -> Config:
    """With AdamW's moments in float32: those in 8 bits are counted without torchao, which need not be where a plan is made."""
    kept = {"optimizer": "adamw"}
    sections = {name: getattr(config, name).model_copy(update=kept) for name in ("student", "fake_score")}
    return config.model_copy(update=sections)


def count_trainer(
    config: Config,
    student: Space,
    teacher: Space,
    batch: int | None = None,
    begins: Callable[[str], None] = lambda what: None,
) -> Trainer:
    """One worker's step, counted by running it on meta tensors.

    Args:
        batch: samples; a multiple of distill.micro_batches. None: distill.batch_size.
        begins: called with the name of each phase before it is counted.
    """
    with counted() as meter:
        begins(", its networks")
        worker = distiller(in_32_bits(config), student, teacher, batch or config.distill.batch_size)
        probe = worker.anchor.probe.network if worker.anchor and worker.anchor.probe else None
        networks = worker.networks
        if networks.discriminator is not None:
            networks.discriminator.measured = True  # the first update alone measures, and needs no more than an update
        reward = None if worker.reward is None else worker.reward.model
        meter.hold(networks.student, networks.bridge, networks.fake, networks.ema, reward, probe)
        size = (batch or config.distill.batch_size) // config.distill.micro_batches
        x0_real = torch.empty(size, *teacher.latent_shape, device="meta")
        scores = [x0_real] * config.distill.micro_batches if config.vsd.weight > 0 else None

        make_moments(worker)
        made: list[Any] = []
        works = []
        for name, call in {
            "make": lambda: made.extend(worker.make()),
            "fake score": worker.fake_update,
            "student": lambda: worker.student_update(made, scores),
        }.items():
            begins(f", {name}")
            works.append(meter.count(call))
        saved = sum(
            moments_bytes(worker.gradients.parameters(name), "adamw")
            - moments_bytes(worker.gradients.parameters(name), kind)
            for name, kind in (("student", config.student.optimizer), ("fake", config.fake_score.optimizer))
        )
        resident = meter.live - saved
        make, fake, updated = (replace(work, peak=work.peak - saved) for work in works)
        trained = list(networks.fake.trainable().values())
        frozen = {id(parameter) for parameter in trained}
        learning = list(adapter.trained(networks.student).values())
        ema = [] if networks.ema is None else adapter.trained(networks.ema).values()
        discriminator = [] if networks.discriminator is None else list(networks.discriminator.parameters())
        weights = Weights(
            student=nbytes(networks.student.parameters()) + nbytes(ema),
            student_frozen=nbytes(networks.student.parameters()) - nbytes(learning),
            fake_frozen=nbytes(p for p in networks.fake.parameters() if id(p) not in frozen),
            fake_block=max(
                nbytes(p for p in block.parameters() if id(p) not in frozen)
                for block in teacher.large_blocks(networks.fake.network)
            ),
            fake_trained=nbytes(trained),
            bridge=nbytes(networks.bridge.parameters()),
            discriminator=nbytes(discriminator),
            optimizers=sum(
                nbytes(value for value in state.values() if isinstance(value, torch.Tensor))
                for optimizer in worker.gradients.optimizers.values()
                for state in optimizer.state.values()
            )
            - saved,
            reward=0 if reward is None else nbytes(reward.parameters()),
        )
        gradients = {"student": nbytes(learning), "fake": nbytes(trained)}
        if discriminator:
            gradients["discriminator"] = nbytes(discriminator)
        kept = [value for value in tree_leaves(worker.state_dict()) if isinstance(value, torch.Tensor)]
        return Trainer(
            weights=weights,
            resident=resident,
            make=make,
            fake=fake,
            student=updated,
            gradients=gradients,
            checkpoint=nbytes(kept),
        )


def make_moments(worker: Distiller) -> None:
    """The optimizers' state, which every step but the first one finds."""
    for optimizer in worker.gradients.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


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
            large_linear=sum(layer.weight.numel() for layer in quantised_layers(network).values()),
        )


def _largest_piece(module: nn.Module, limit: float) -> int:
    """Elements of the largest module that zero3.py gathers in one piece, by the same rule as there."""
    largest = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    for child in module.children():
        container = isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        fits = not container and numel(child) <= limit
        largest = max(largest, numel(child) if fits else _largest_piece(child, limit))
    return largest


class _Losses(Objective):
    """The Bridge's own losses, on `share` pairs that have shapes but no numbers."""

    def __init__(self, config: Config, student: Space, teacher: Space, share: int) -> None:
        self.settings, self.seed, self.device, self.world_size = bridge_settings(config), 0, torch.device("meta"), 1
        self.probe = None
        if self.settings.attention.weight > 0:
            network = teacher.load_network(getattr(torch, config.teachers.dtype))
            self.probe = AttentionProbe(teacher, network, self.settings.attention)
            if self.settings.gradient_checkpointing:
                teacher.recompute_activations(self.probe.network)
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


def count_text(space: Space) -> dict[str, Text]:
    """Each text encoder."""
    lengths, result = space.text_lengths, {}
    for part, encoder in empty_text_encoders(space).items():
        with counted() as meter, torch.no_grad():
            ids = torch.zeros(1, lengths[part] + space.tokens_in_front, dtype=torch.long, device="meta")
            prompt = _without_weights(meter, encoder, lambda e=encoder, i=ids: e(i))
            result[part] = Text(numel(encoder), prompt, CHUNK)
    return result


def count_reward_text(config: Config) -> dict[str, Text]:
    """The text tower of the student's reward; none of the judge, which reads captions by their grammar."""
    if not config.reward.is_on or config.reward.metric == "judge":
        return {}
    settings = clip_config(config.reward.metric, reward_places(config).get(config.reward.metric))
    tower = empty_clip(settings, vision=False)
    with counted() as meter, torch.no_grad():
        ids = torch.zeros(1, settings.text_config.max_position_embeddings, dtype=torch.long, device="meta")
        prompt = _without_weights(meter, tower, lambda: tower.get_text_features(ids))
    return {"reward text_encoder": Text(numel(tower), prompt, CHUNK)}


def _without_weights(meter: Meter, module: nn.Module, call: Callable[[], Any]) -> Cost:
    """Of a call that runs a module, what is alive beside the module's tensors."""
    before, work = meter.hold(module), meter.count(call)
    return replace(work, peak=work.peak - before)


def count_vae(space: Space) -> Vae:
    vae, batch = space.load_vae(), space.vae_batch(VAE_BATCH)
    with counted() as meter, torch.no_grad():
        pictures = torch.empty(batch, 3, space.resolution, space.resolution, device="meta")
        latents = torch.empty(batch, *space.latent_shape, device="meta")
        encode = _without_weights(meter, vae, lambda: space.encode(vae, pictures))
        decode = _without_weights(meter, vae, lambda: space.decode(vae, latents))
    return Vae(numel(vae), space.resolution, batch, encode, decode)


# -- all of a run ------------------------------------------------------------------------------------------


def conditioning_bytes(teacher: Space, dtype: torch.dtype = torch.float32) -> int:
    """One prompt's conditioning as it travels: real numbers in the text encoders' `dtype`, and integers."""
    layout = teacher.conditioning_layout.values()
    return sum(math.prod(shape) * (dtype if kind.is_floating_point else kind).itemsize for shape, kind in layout)


def request_bytes(teacher: Space, batch: int, guided: bool, dtype: torch.dtype = torch.float32) -> int:
    """Tensors of a ScoreRequest: x_t and t in float32, the conditioning, and with guidance one unconditional row."""
    latents, row = 4 * math.prod(teacher.latent_shape), conditioning_bytes(teacher, dtype)
    return batch * (latents + 4 + row) + (row if guided else 0)


def count_models(config: Config, student: Space, teacher: Space) -> Models:
    """Facts of the models, and bytes of what travels."""
    latents, encoding = 4 * math.prod(teacher.latent_shape), getattr(torch, config.prompts.encoder_dtype)
    size, guided = config.distill.batch_size // config.distill.micro_batches, is_guided(guidance_scale(config, teacher))
    models = config.teacher.model, config.student.model
    drawer = config.synthesis.teacher if other_drawer(config) else None
    terms = student_licences(
        models[0],
        teacher.pipeline_class,
        models[1],
        student.pipeline_class,
        config.student.unet,
        drawer,
        config.student.lora_start,
    )
    known = hub_models()
    gated = {
        name for name in (*models, drawer or "") if (hub := known.get(name.partition("@")[0])) is not None and hub.gated
    }
    return Models(
        student=student.pipeline_class,
        teacher=teacher.pipeline_class,
        terms=[Terms(role, model, it.name, it.terms, model in gated) for role, model, it in terms],
        request_bytes=request_bytes(teacher, size, guided, encoding),
        answer_bytes=size * latents,
        real_row_bytes=latents // 2,
        real_window_bytes=most_bytes(latents // 2),
    )


def count(it: Wanted, begins: Callable[[str], None] = lambda what: None) -> Any:
    """Count one thing: seconds to a minute. Downloads nothing. `begins` is called with the name of each phase.

    Raises InputError: models that are unknown, or do not fit each other.
    """
    config = it.config
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
    spaces = {"student": student, "teacher": teacher}
    if it.kind == "trainer":
        return count_trainer(config, student, teacher, it.batch, begins)
    begins("")
    if it.kind == "teacher":
        own = own_steps(teacher, config.teacher.model)
        return replace(count_teacher(config, teacher, guidance_scale(config, teacher)), own_steps=own)
    if it.kind == "drawer":
        drawer = meta.open_space(config.synthesis.teacher) if other_drawer(config) else teacher
        own = own_steps(drawer, config.synthesis.teacher or config.teacher.model)
        return replace(count_teacher(config, drawer, drawing_guidance(config, drawer)), own_steps=own)
    if it.kind == "bridge":
        return count_bridge(config, student, teacher, max(1, config.bridge.batch_size // config.distill.fewest))
    if it.kind == "text":
        spaces |= {"drawer": meta.open_space(config.synthesis.teacher)} if other_drawer(config) else {}
        own = {f"{role} {part}": one for role, space in spaces.items() for part, one in count_text(space).items()}
        return own | count_reward_text(config)
    if it.kind == "vae":
        return {role: count_vae(space) for role, space in spaces.items()}
    return count_models(config, student, teacher)


def count_run(config: Config) -> Counts:
    """Count a whole configuration anew: seconds for the miniature world, minutes for 12 B parameters. Raises as `count`."""
    return as_counts(config, {name: count(it) for name, it in wanted(config).items()})
