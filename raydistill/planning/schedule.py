"""Seconds, GPU-hours and price of a run, modelled from what was counted and from the table of GPUs.

Seconds are FLOPs / (peak · share of it, by kind of GPU and role), never below the time of the bytes that must move. Not in it: start-up,
evaluation, controls, loading, stragglers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydistill.config.reading import drawing_config, draws_pairs, draws_samples
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge
from raydistill.planning.counts import ITEMSIZE, Counts, Weights, makes_pairs, pairs_made
from raydistill.planning.gpus import Gpu
from raydistill.planning.memory import ROLES, encoder_gpu, is_whole


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Seconds of one student update. The teachers' are of all workers' requests, on all replicas."""

    make: float
    fake: float  # one update
    updates: int
    student: float
    teacher: float
    text: float  # encoding the prompts of a step, which runs ahead of the trainers
    overlap: bool
    replicas_needed: int | None  # so that trainers never wait; None: no number of such replicas is enough

    @property
    def wait(self) -> float:
        """Seconds the trainers wait for teachers."""
        return max(0.0, self.teacher - self.updates * self.fake) if self.overlap else self.teacher

    @property
    def work(self) -> float:
        return self.make + self.updates * self.fake + self.student

    @property
    def step(self) -> float:
        """make + max(k fake, teacher) + student, or the sum without overlap; never faster than the prompts come."""
        return max(self.work + self.wait, self.text)

    @property
    def sequential(self) -> float:
        return max(self.work + self.teacher, self.text)


def _link(gpu: Gpu, ranks: int, config: Config) -> float:
    """Bytes per second at which one of `ranks` GPUs receives from the others."""
    return 1e9 * (gpu.link_gbytes if ranks <= gpu.per_node else config.plan.network_gbits / 8)


def _all_reduce(nbytes: int, gpu: Gpu, config: Config) -> float:
    workers = config.distill.workers
    return 2 * (workers - 1) / workers * nbytes / _link(gpu, workers, config)


def replicas(config: Config, ongoing: int = 0) -> int:
    """Replicas of the teacher service while so many requests are under way all the time.

    Trainers ask in bursts, of which Serve follows the mean of half a minute: for a distillation no more are counted on than
    the service keeps (`ongoing` 0).
    """
    teachers = config.teachers
    if teachers.max_replicas is None:
        return teachers.replicas
    wanted = math.ceil(ongoing / teachers.target_ongoing_requests)
    return min(max(wanted, teachers.min_replicas or teachers.replicas), teachers.max_replicas)


def asked_at_once(config: Config) -> int:
    """Score requests that all workers have under way at most."""
    distill = config.distill
    return distill.workers * min(distill.in_flight, distill.micro_batches) if config.vsd.weight > 0 else 0


def request_seconds(counts: Counts, config: Config, gpu: Gpu, shards: int) -> float:
    """One micro-batch on one replica: equally many forwards on every rank, and the way there and back."""
    network, plan = counts.network, config.plan
    rounds = -(-counts.batch // config.distill.micro_batches // (network.samples * shards))
    compute = gpu.seconds(network.score, gpu.share("teacher", config))
    moved = counts.models.request_bytes + counts.models.answer_bytes
    return rounds * max(compute, gather_seconds(counts, config, gpu, shards)) + moved / (1e9 * plan.network_gbits / 8)


def gather_seconds(counts: Counts, config: Config, gpu: Gpu, shards: int, drawer: bool = False) -> float:
    """Seconds in which a rank receives the rest of the network, once a forward; overlaps with computing. None of a whole one."""
    if is_whole(counts, config, gpu, drawer):
        return 0.0
    element, network = ITEMSIZE[config.teachers.dtype], counts.drawer if drawer else counts.network
    return network.parameters * element * (1 - 1 / shards) / _link(gpu, shards, config)


def text_rate(config: Config, gpus: dict[str, Gpu]) -> float:
    """FLOP/s of one worker's text encoders; those with a share of a GPU run beside the teachers."""
    plan, prompts = config.plan, config.prompts
    if not prompts.gpus_per_encoder:
        return prompts.encoders * prompts.threads_per_encoder * 1e9 * plan.cpu_gflops
    gpu = gpus[encoder_gpu(config)]
    whole = gpu.flops_per_s(prompts.encoder_dtype, gpu.share("text", config))
    return prompts.encoders * min(1.0, prompts.gpus_per_encoder) * whole


def schedule(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> Schedule:
    """Seconds of a step on the configured kinds of GPU."""
    plan, trainer, distill, workers = config.plan, counts.trainer, config.distill, config.distill.workers
    gpu, teacher_gpu, updates = gpus[plan.trainer_gpu], gpus[plan.teacher_gpu], config.fake_score.updates
    make, fake, student = (
        gpu.seconds(work, gpu.share("trainer", config), bool(distill.tf32))
        for work in (trainer.make, trainer.fake, trainer.student)
    )
    gathered = distill.micro_batches * shared_gather_seconds(trainer.weights, gpu, config)
    gan = config.discriminator.weight > 0
    passes = 2 + gan + (gan and config.discriminator.r1_weight > 0)
    reduced = {name: _all_reduce(nbytes, gpu, config) for name, nbytes in trainer.gradients.items()}
    # FSDP2 gathers a block when it is reached, and each block is a root of its own: nothing hides it. Forwards and backwards
    # of the fake loss, and the real samples' features, with R1 once more; the student's fake score, and its features there
    # and back.
    of_fake = passes * gathered * config.fake_micro_batches / distill.micro_batches
    fake += of_fake + reduced["fake"] + reduced.get("discriminator", 0.0)
    shared = config.discriminator.shared_pass and config.vsd.weight > 0
    student += (1 if not gan else 2 if shared else 3) * gathered + reduced["student"]
    one = request_seconds(counts, config, teacher_gpu, config.teachers.shards) if config.vsd.weight > 0 else 0.0
    requests, at_once = workers * distill.micro_batches, asked_at_once(config)
    rounds = [-(-requests // count) for count in range(1, at_once + 1)]
    needed = next((r for r, n in enumerate(rounds, 1) if n * one <= updates * fake), None)
    used = min(replicas(config), at_once)
    return Schedule(
        make=make,
        fake=fake,
        updates=updates,
        student=student,
        teacher=rounds[used - 1] * one if used else 0.0,
        text=counts.texts_of_update(config) / text_rate(config, gpus),
        overlap=config.distill.overlap,
        replicas_needed=needed,
    )


def shared_gather_seconds(weights: Weights, gpu: Gpu, config: Config) -> float:
    """Seconds in which a trainer receives the other workers' parts of the frozen teacher copy, once."""
    workers = config.distill.workers
    if not config.fake_score.shard or workers == 1:
        return 0.0
    return weights.fake_frozen * (1 - 1 / workers) / _link(gpu, workers, config)


@dataclass(frozen=True)
class Phase:
    """A part of the run: how long, and which GPUs it holds, by kind of GPU."""

    name: str
    hours: float
    gpus: dict[str, float]
    bound: str  # what decides its length

    @property
    def gpu_hours(self) -> float:
        return self.hours * sum(self.gpus.values())


def _gpus_by_kind(*groups: tuple[str, float]) -> dict[str, float]:
    """GPUs of each kind."""
    gpus_by_kind: dict[str, float] = {}
    for kind, count in groups:
        gpus_by_kind[kind] = gpus_by_kind.get(kind, 0.0) + count
    return {kind: count for kind, count in gpus_by_kind.items() if count}


def phases(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Phase]:
    """The run in order. What draws pictures is there while they are drawn, the teachers while they score.

    A teacher that draws, in a run whose Bridge is not trained, goes on with scoring.
    """
    plan, timing, distill = config.plan, schedule(counts, config, gpus), config.distill
    trainers = plan.trainer_gpu, distill.workers * distill.gpus_per_worker
    result = []
    if makes_pairs(config):
        result.append(_set("synthesis", counts, config, gpus, drawn=draws_pairs(config)))
    if draws_samples(config):
        result.append(_set("samples", counts, config, gpus, drawn=True))
    if (bridge := bridge_schedule(counts, config, gpus)) is not None:
        encoders = distill.fewest * config.synthesis.encoders * config.synthesis.gpus_per_encoder
        gpus_by_kind = _gpus_by_kind(
            (trainers[0], distill.fewest * distill.gpus_per_worker),
            (encoder_gpu(config), encoders if streams_bridge(config) else 0),
        )
        bound = "VAE encoders" if bridge.encoders > bridge.trainers else "trainers"
        result.append(Phase("Bridge training", config.bridge.steps * bridge.step / 3600, gpus_by_kind, bound))
    bound = "teachers" if timing.wait > 0 else "trainers"
    bound = "text encoders" if timing.text >= timing.work + timing.wait else bound
    texts = encoder_gpu(config), distill.workers * config.prompts.encoders * config.prompts.gpus_per_encoder
    scoring = config if ROLES["teacher rank"].used(config) else None
    gpus_by_kind = _gpus_by_kind(trainers, (plan.teacher_gpu, 0 if scoring is None else _ranks(scoring)), texts)
    result.append(Phase("distillation", distill.steps * timing.step / 3600, gpus_by_kind, bound))
    return result


def _ranks(config: Config, ongoing: int = 0) -> float:
    """GPUs of the service while so many requests are under way."""
    return replicas(config, ongoing) * config.teachers.shards * config.teachers.gpus_per_rank


def _set(name: str, counts: Counts, config: Config, gpus: dict[str, Gpu], *, drawn: bool) -> Phase:
    """A set of pairs: hours, and what decides them. What draws, VAEs and text encoders work side by side."""
    synthesis, asked = config.synthesis, config.synthesis.encoders * config.synthesis.in_flight
    kind, gpu = encoder_gpu(config), gpus[encoder_gpu(config)]
    seconds = {"VAEs": picture_seconds(counts, config, gpus, drawn=drawn)}
    gpus_by_kind = [(kind, synthesis.encoders * (2 if drawn else 1) * synthesis.gpus_per_encoder)]
    if drawn:
        drawers, network, teacher_gpu = drawing_config(config), counts.drawer, gpus[config.plan.teacher_gpu]
        ranks = min(replicas(drawers, asked), asked) * drawers.teachers.shards
        forward = max(
            teacher_gpu.seconds(network.score, teacher_gpu.share("teacher", config)),
            gather_seconds(counts, drawers, teacher_gpu, drawers.teachers.shards, drawer=True),
        )
        steps = synthesis.sampling_steps or network.own_steps or config.teacher.sampling_steps
        seconds["teachers"] = steps * forward / network.samples / ranks
        float32 = config.prompts.encoder_dtype == "float32"
        text = sum(encoder.prompt.flops for encoder in counts.drawer_text().values())
        tflops = gpu.fp32_tflops if float32 else gpu.bf16_tflops
        seconds["text encoders"] = _on_encoders("text", text, tflops, config, gpu)
        gpus_by_kind.append((config.plan.teacher_gpu, _ranks(drawers, asked)))
    bound = max(seconds, key=seconds.get)
    rows = config.synthesis.count if drawn else pairs_made(config)
    return Phase(name, rows * seconds[bound] / 3600, _gpus_by_kind(*gpus_by_kind), bound)


def _on_encoders(role: str, flops: float, tflops: float, config: Config, gpu: Gpu) -> float:
    """Seconds of so many operations on `synthesis.encoders` actors."""
    synthesis = config.synthesis
    rate = min(1.0, synthesis.gpus_per_encoder) * 1e12 * gpu.share(role, config) * tflops
    return flops / (synthesis.encoders * (rate or 1e9 * config.plan.cpu_gflops * synthesis.threads_per_encoder))


def picture_seconds(counts: Counts, config: Config, gpus: dict[str, Gpu], *, drawn: bool = False) -> float:
    """Seconds in which `synthesis.encoders` actors encode one picture with both VAEs; one that is drawn is decoded first."""
    vae_T, vae_S, gpu = counts.vae["teacher"], counts.vae["student"], gpus[encoder_gpu(config)]
    picture = vae_T.encode.flops / vae_T.batch + vae_S.encode.flops / vae_S.batch
    picture += vae_T.decode.flops / vae_T.batch if drawn else 0
    # in float32, whose convolutions torch runs in TF32
    return _on_encoders("vae", picture, gpu.float32(tf32=True), config, gpu)


@dataclass(frozen=True)
class BridgeSchedule:
    """Seconds of one step of the Bridge's training.

    Attributes:
        trainers: that its networks take.
        encoders: that the VAEs take to encode its pictures, beside the trainers; 0 where pairs are stored.
        batch: pictures of a step.
        actors: that encode, of each worker.
    """

    trainers: float
    encoders: float
    batch: int
    actors: int

    @property
    def step(self) -> float:
        return max(self.trainers, self.encoders)

    @property
    def taken(self) -> float:
        """Pictures a second that the trainers could take."""
        return self.batch / self.trainers

    @property
    def given(self) -> float:
        """Pictures a second that the encoders could give."""
        return self.batch / self.encoders

    @property
    def enough(self) -> int:
        """Actors of each worker from which on the trainers never wait."""
        return math.ceil(self.actors * self.encoders / self.trainers)


def bridge_schedule(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> BridgeSchedule | None:
    """None: no Bridge is trained."""
    if counts.bridge is None:
        return None
    gpu, batch, actors = gpus[config.plan.trainer_gpu], config.bridge.batch_size, config.synthesis.encoders
    trainers = gpu.seconds(counts.bridge.step, gpu.share("trainer", config), bool(config.distill.tf32))
    picture = picture_seconds(counts, config, gpus) if streams_bridge(config) else 0.0
    return BridgeSchedule(trainers, batch * picture / config.distill.fewest, batch, actors)


def rented(gpu: Gpu, count: float) -> int:
    """GPUs of this kind that are rented for so many: nodes are whole."""
    return gpu.per_node * math.ceil(count / gpu.per_node)


def price(phases: list[Phase], config: Config, gpus: dict[str, Gpu]) -> float:
    """US dollars: nodes of the usual size, which are rented whole, and the head node."""

    def per_hour(kind: str, count: float) -> float:
        gpu = gpus[kind]
        return rented(gpu, count) * (gpu.spot_price if config.plan.spot else gpu.price)

    return sum(
        phase.hours * (config.plan.head_price + sum(per_hour(kind, count) for kind, count in phase.gpus.items()))
        for phase in phases
    )
