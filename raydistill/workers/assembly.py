"""What one worker is made of: its batches, its networks, and its way to the teachers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import build_objective
from raydistill.config.schema import Config
from raydistill.data.encode import TextEncoder
from raydistill.data.prompts import training_prompts
from raydistill.data.reals import RealOrder, RealSet
from raydistill.data.reward_texts import RewardTexts
from raydistill.data.stream import FakeRows, RealCaptions, conditioned_batches, own_rows
from raydistill.distillation.batches import Made, StreamedReals
from raydistill.distillation.gradients import alone
from raydistill.distillation.networks import guidance_scale, load_unet
from raydistill.distillation.reward import load_reward
from raydistill.distillation.schedule import Unchecked
from raydistill.distillation.updates import Distiller, build_distiller
from raydistill.evaluation.evaluator import FixedPrompts
from raydistill.evaluation.metrics import reward_places
from raydistill.precision import allow_tf32, sum_float16_in_float32
from raydistill.spaces import Conditioning, load_space
from raydistill.storage.resolve import input_place, resolve
from raydistill.teachers import registry
from raydistill.teachers.client import PendingScores, TeacherClient
from raydistill.teachers.request import ScoreRequest
from raydistill.workers.ray_train import Worker
from raydistill.workers.stage import Stage

LOOK_EVERY_S = 0.2


def own_slot_rows(config: Config, worker: Worker) -> range:
    """Rows of every slot that a worker reads."""
    distill = config.distill
    count, size = distill.workers * distill.micro_batches, distill.batch_size // distill.micro_batches
    return own_rows(worker.rank, worker.world, count, size)


def open_reals(stage: Stage, config: Config, worker: Worker) -> RealCaptions | None:
    """The teacher samples that a worker streams; None: it needs none."""
    if not stage.real or not config.discriminator.weight:
        return None
    rows, size = own_slot_rows(config, worker), config.distill.batch_size
    lanes = (rows.stop - 1) // size - rows.start // size + 1
    shape = load_space(resolve(config.teacher.model)).latent_shape
    samples = RealSet(input_place(stage.real), shape, config.discriminator.real_count, lanes)
    return RealCaptions(samples, RealOrder.of(config, samples))


def batches_after(config: Config, worker: Worker, first: int, reals: RealCaptions | None = None) -> Any:
    """Conditioned batches of the updates after `first`; a generator."""
    distill, prompts, own = config.distill, config.prompts, own_slot_rows(config, worker)
    places = reward_places(config)
    per_step, count = 1 + config.fake_score.updates, distill.micro_batches
    return conditioned_batches(
        training_prompts(config),
        {"student": str(resolve(config.student.model)), "teacher": str(resolve(config.teacher.model))},
        seed=config.run.seed,
        first=first * per_step,
        stop=distill.steps * per_step,
        rows=own,
        fake=FakeRows.of(own, distill.batch_size // count, count, config.fake_micro_batches, config.fake_score.updates),
        slot_size=distill.workers * distill.batch_size,
        reals=reals,
        reward=RewardTexts(config.reward.metric, places) if places else None,
        dtype={"student": "float32", "teacher": prompts.encoder_dtype},
        encoders=prompts.encoders,
        cpus_per_encoder=prompts.cpus_per_encoder,
        gpus_per_encoder=prompts.gpus_per_encoder,
        threads=prompts.threads_per_encoder,
        node_labels=prompts.node_labels,
    )


def load_distiller(
    stage: Stage,
    config: Config,
    worker: Worker,
    source: Iterator[dict[str, Any]],
    reals: RealCaptions | None = None,
) -> tuple[Distiller, Teachers | None]:
    """Load every network of a worker and connect it to its teachers.

    Args:
        source, reals: what `batches_after` gives, and was given.
    """
    device = worker.device
    allow_tf32(config.distill.tf32)
    if config.student.autocast == "float16":
        sum_float16_in_float32()
    student_space = load_space(resolve(config.student.model))
    teacher_space = load_space(resolve(config.teacher.model))
    unet = load_unet(student_space, config.student.unet, config.student.lora_start)
    if stage.bridge:
        bridge = Bridge.load(resolve(stage.bridge), student_space, teacher_space)
    else:
        bridge = Bridge.create(student_space, teacher_space, config.bridge)
    encoding = getattr(torch, config.prompts.encoder_dtype)  # texts first: the device is still empty
    text = TextEncoder(teacher_space, encoding, device) if stage.service else None
    empty = text.encode_unconditional() if text else None
    shown = None
    if text and config.evaluation.scores_grid and worker.rank == 0:
        prompts = shown_prompts(config)
        shown = prompts, text.encode(prompts.captions)
    del text
    anchor = None
    if config.bridge.trainable:
        anchor = build_objective(config, stage.pairs, device, rank=worker.rank, world_size=worker.world)
    micro_batches, fake_micro_batches = config.distill.micro_batches, config.fake_micro_batches
    count = config.distill.workers * micro_batches  # of an update, however many workers there are
    own = own_rows(worker.rank, worker.world, count, 1)
    distiller = build_distiller(
        config,
        student_space=student_space,
        teacher_space=teacher_space,
        student=unet,
        bridge=bridge,
        fake_network=teacher_space.load_network(),
        source=source,
        real=StreamedReals(source, reals.samples, reals.order) if reals else None,
        anchor=anchor,
        reward=load_reward(config, student_space, reward_places(config)),
        device=device,
        mesh=worker.mesh() if config.fake_score.shard and worker.world > 1 else None,
        average=worker.average if worker.world > 1 else alone,
        micro_batches=len(own),
        mean_micro_batches=count / worker.world,
        fake_micro_batches=[index for index, number in enumerate(own) if number % micro_batches < fake_micro_batches],
        mean_fake_micro_batches=config.distill.workers * fake_micro_batches / worker.world,
    )
    if empty is None:
        return distiller, None
    client = TeacherClient(stage.service, config.teachers, worker.rank / worker.world)  # all workers ask at once
    guidance = guidance_scale(config, teacher_space), config.vsd.guidance_rescale
    return distiller, Teachers(client, empty, guidance, shown, check_finite=config.distill.non_finite_share == 0)


def shown_prompts(config: Config) -> FixedPrompts:
    """Those whose pictures show what the scores make of them: the first of the periodic evaluation."""
    evaluation = config.evaluation
    count = min(evaluation.scores_grid, evaluation.periodic_count)
    return FixedPrompts(training_prompts(config), count, evaluation.seed + 1)


class Teachers:
    """A worker's way to its teachers: `schedule.Submit`, and how busy they are.

    Attributes:
        guidance: scale, and share of the scores that is rescaled (`vsd.guidance_rescale`).
        shown: `shown_prompts` and their conditioning; None: this worker shows nothing.
        check_finite: whether an answer that is not finite is refused; False: the update looks at it.
    """

    def __init__(
        self,
        client: TeacherClient,
        unconditional: Conditioning,
        guidance: tuple[float, float],
        shown: tuple[FixedPrompts, Conditioning] | None = None,
        check_finite: bool = True,
    ) -> None:
        self.client, self.unconditional, self.guidance = client, unconditional, guidance
        self.shown, self.check_finite = shown, check_finite

    def __call__(self, made: Made) -> PendingScores | Unchecked:
        conditioning = {name: value.cpu() for name, value in made.teacher_conditioning.items()}
        pending = self.client.submit(
            ScoreRequest(made.x_t.cpu(), made.t_B.cpu(), conditioning, self.unconditional, *self.guidance)
        )
        return pending if self.check_finite else Unchecked(pending)

    def wait_for_start(self) -> None:
        """Until the teachers are ready for the first time; the driver ends the run where they cannot be."""
        while not registry.ready(self.client.name):
            time.sleep(LOOK_EVERY_S)
