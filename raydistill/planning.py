"""What a run needs, before it is started: memory, floating point operations, bytes, teacher replicas, hours, price.

Counted (counting.py): parameters, FLOPs, live tensors of the project's own step at the configured sizes. Modelled from
those and the table of GPUs: seconds (FLOPs / (peak · plan.efficiency), never below the time of the bytes that must
move), memory beside the tensors (plan.reserve), prices. Not in it: start-up, evaluation, controls, loading, stragglers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from raydistill import counting
from raydistill.config import Config, ConfigError, Count, Positive, Section, get, needs_pairs, trains_bridge
from raydistill.data.encode import CHUNK
from raydistill.distill.load import guidance_scale
from raydistill.spaces import Space

GIB = 1 << 30
GPU_TABLE = Path(__file__).with_name("gpus.yaml")
SHARDS = (1, 2, 4, 8, 16, 32)  # replica sizes that are tried
PREFETCHED = 50_000_000  # elements DeepSpeed gathers ahead (its default stage3_prefetch_bucket_size)


class Gpu(Section):
    """One row of gpus.yaml; the units are explained there."""

    memory_gib: Positive
    bf16_tflops: Positive
    fp32_tflops: Positive
    tf32_tflops: Positive | None = None
    link_gbytes: Positive
    per_node: Count
    price: Positive
    spot_price: Positive

    def float32(self, tf32: bool) -> float:
        """TFLOP/s at the peak of what is computed in float32."""
        return (tf32 and self.tf32_tflops) or self.fp32_tflops

    def seconds(self, work: counting.Work, efficiency: float, tf32: bool = False) -> float:
        """Of a piece of work, whose float32 operations run at that peak."""
        at_peak = (work.flops - work.flops_32) / self.bf16_tflops + work.flops_32 / self.float32(tf32)
        return at_peak / (1e12 * efficiency)

    def flops_per_s(self, dtype: str, efficiency: float) -> float:
        return 1e12 * efficiency * (self.fp32_tflops if dtype == "float32" else self.bf16_tflops)


def read_gpus(further: str | None = None) -> dict[str, Gpu]:
    """The table of the package, and over it that of `further`. Raises ConfigError naming file and kind."""
    kinds: dict[str, Gpu] = {}
    for file in (GPU_TABLE, *([Path(further).expanduser()] if further else [])):
        try:
            table = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"plan.gpus: {file}: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError(f"plan.gpus: {file}: must map kinds of GPU to their numbers, as {GPU_TABLE}")
        for name, row in table.items():
            try:
                kinds[str(name)] = Gpu.model_validate(row)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ConfigError(f"plan.gpus: {file}: {name}: {where}: {first['msg']}") from None
    return kinds


def known_gpus(config: Config) -> dict[str, Gpu]:
    """The table, in which the configured kinds are. Raises ConfigError."""
    gpus = read_gpus(config.plan.gpus)
    for key in ("trainer_gpu", "teacher_gpu", "encoder_gpu"):
        kind = getattr(config.plan, key)
        if kind is not None and kind not in gpus:
            raise ConfigError(f"plan.{key}: {kind} is not in the table ({', '.join(gpus)})")
    return gpus


# -- what is counted --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Everything about a configuration that does not depend on the hardware. Bytes, FLOPs; see counting.py."""

    student: str  # pipeline classes
    teacher: str
    batch: int
    trainer: counting.Trainer  # at `batch` samples
    small_batch: int
    small_trainer: counting.Trainer  # at `small_batch` samples
    recomputing: counting.Trainer  # at `batch`, with distill.gradient_checkpointing
    network: counting.Teacher
    bridge: counting.BridgeTraining | None  # one worker's share; None: nothing is trained
    text: dict[str, counting.Text]  # "role part"
    vae: dict[str, counting.Vae]  # by role
    request_bytes: int
    answer_bytes: int
    real_row_bytes: int  # one teacher sample in a worker's memory: latents and conditioning

    @property
    def text_flops(self) -> float:
        """One prompt through all text encoders."""
        return sum(encoder.prompt.flops for encoder in self.text.values())


def conditioning_bytes(teacher: Space, dtype: torch.dtype = torch.float32) -> int:
    """One prompt's conditioning as it travels: real numbers in the text encoders' `dtype`, and integers."""
    layout = counting.conditioning_layout(teacher).values()
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


def count_run(config: Config) -> Counts:
    """Count a configuration: half a minute for the miniature world, minutes for 12 B parameters. Downloads nothing.

    Raises:
        ConfigError, ModelFolderError, BridgeError: models that are unknown, or do not fit each other.
    """
    student, teacher = counting.open_space(config.student.model), counting.open_space(config.teacher.model)
    spaces = {"student": student, "teacher": teacher}
    batch, scale = config.distill.batch_size, guidance_scale(config, teacher)
    parts = config.distill.micro_batches
    share = max(1, config.bridge.batch_size // config.distill.fewest)
    latents, encoding = 4 * math.prod(teacher.latent_shape), getattr(torch, config.prompts.encoder_dtype)
    return Counts(
        student=student.pipeline_class,
        teacher=teacher.pipeline_class,
        **_count_trainers(config, counting.count_trainer(config, student, teacher)),
        network=counting.count_teacher(config, teacher, scale),
        bridge=counting.count_bridge(config, student, teacher, share) if trains_bridge(config) else None,
        text=_count_texts(spaces),
        vae={role: counting.count_vae(space) for role, space in spaces.items()},
        request_bytes=request_bytes(teacher, batch // parts, scale != 1.0, encoding),
        answer_bytes=batch // parts * latents,
        real_row_bytes=latents + conditioning_bytes(teacher, encoding),
    )


def _count_trainers(config: Config, trainer: counting.Trainer) -> dict[str, Any]:
    """The fields of Counts that say how a trainer's memory grows; `trainer` is it at the configured sizes."""
    batch, parts = config.distill.batch_size, config.distill.micro_batches
    small = parts if batch > parts else 2 * parts  # one sample a part, or two
    student, teacher = counting.open_space(config.student.model), counting.open_space(config.teacher.model)

    def recomputing() -> counting.Trainer:
        return counting.count_trainer(changed(config, gradient_checkpointing=True), student, teacher)

    return {
        "batch": batch,
        "trainer": trainer,
        "small_batch": small,
        "small_trainer": counting.count_trainer(config, student, teacher, small),
        "recomputing": trainer if config.distill.gradient_checkpointing else recomputing(),
    }


def _count_texts(spaces: Mapping[str, Space]) -> dict[str, counting.Text]:
    return {
        f"{role} {part}": value for role, space in spaces.items() for part, value in counting.count_text(space).items()
    }


# -- memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """One role on one kind of GPU."""

    role: str
    gpu: str
    needs: float  # bytes of tensors at the configured sizes
    has: float  # bytes, without plan.reserve
    advice: str

    @property
    def fits(self) -> bool:
        return self.needs <= self.has


def teacher_bytes(counts: Any, config: Config, shards: int) -> int:
    """Most bytes of tensors on one of `shards` ranks: its part, what is gathered at once, and a forward's activations."""
    network = counts.network
    element = torch.empty(0, dtype=getattr(torch, config.teachers.dtype)).element_size()
    gathered = 0 if shards == 1 else min(network.parameters, network.piece + PREFETCHED)
    elements = -(-network.parameters // shards) + gathered + network.buffers
    return elements * element + network.score.peak


def trainer_bytes(counts: Counts, batch: int) -> float:
    """Most bytes of tensors on a trainer at up to the configured number of samples, in distill.micro_batches parts.

    Straight lines through the two counted batch sizes: the truth bends upwards, so between them they never say less.
    """
    small, large = counts.small_trainer, counts.trainer
    step = (batch - counts.small_batch) / (counts.batch - counts.small_batch)
    pairs = ((small.make, large.make), (small.fake, large.fake), (small.student, large.student))
    return max(a.peak + (b.peak - a.peak) * step for a, b in pairs)


def shared_bytes(weights: counting.Weights, config: Config) -> float:
    """Of the frozen teacher copy, what `fake_score.shard` leaves to the other workers; two gathered blocks stay."""
    workers, frozen = config.distill.workers, weights.fake_frozen
    return max(0, frozen - frozen // workers - 2 * weights.fake_block) if workers > 1 else 0


@dataclass(frozen=True)
class Role:
    """Processes that hold a GPU, or a share of one: which key asks for it, of which kind it is, and whether a run has them."""

    key: str
    kind: Callable[[Config], str]
    used: Callable[[Config], bool]


def encoder_gpu(config: Config) -> str:
    return config.plan.encoder_gpu or config.plan.teacher_gpu


ROLES = {
    "teacher rank": Role(
        "teachers.gpus_per_rank", lambda c: c.plan.teacher_gpu, lambda c: c.vsd.weight > 0 or samples(c)
    ),
    "trainer": Role("distill.gpus_per_worker", lambda c: c.plan.trainer_gpu, lambda c: True),
    "Bridge training": Role("distill.gpus_per_worker", lambda c: c.plan.trainer_gpu, trains_bridge),
    "text encoder": Role("prompts.gpus_per_encoder", encoder_gpu, lambda c: True),
    "synthesis, prompts": Role("synthesis.gpus_per_encoder", encoder_gpu, samples),
    "synthesis, pictures": Role("synthesis.gpus_per_encoder", encoder_gpu, synthesises),
}


def _has(config: Config, role: str, gpu: Gpu) -> float:
    """Bytes of tensors that one process of a role may have on a kind of GPU."""
    share = get(config, ROLES[role].key) or 1.0
    return min(1.0, share) * gpu.memory_gib * GIB * (1 - config.plan.reserve)


def memory(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Fit]:
    """Every role on every kind of GPU; those that ask for none are left out, but for the networks that train and teach."""
    always = ("teacher rank", "trainer", "Bridge training")
    roles = [role for role, it in ROLES.items() if it.used(config) and (role in always or get(config, it.key) > 0)]
    return [_fit(role, counts, config, name, _has(config, role, gpu)) for name, gpu in gpus.items() for role in roles]


def _fit(role: str, counts: Any, config: Config, gpu: str, has: float) -> Fit:
    """Args: counts: a Counts, or anything with those of its fields that the role needs."""
    if role == "trainer":
        return _fit_trainer(counts, config, gpu, has)
    if role == "teacher rank":
        least = next((s for s in SHARDS if teacher_bytes(counts, config, s) <= has), None)
        advice = (
            f"teachers.shards={least} is enough"
            if least
            else f"not even with {SHARDS[-1]} shards; lower teachers.slice"
        )
        return Fit(role, gpu, teacher_bytes(counts, config, config.teachers.shards), has, advice)
    if role == "Bridge training":
        needs = counts.bridge.peak
        return Fit(role, gpu, needs, has, _bridge_advice(config, fits=needs <= has))
    needs = encoder_bytes(counts, config, role)
    key = ROLES[role].key
    return Fit(role, gpu, needs, has, f"with {key}={get(config, key):g}" if needs <= has else f"raise {key}")


def encoder_bytes(counts: Any, config: Config, role: str) -> float:
    """Most bytes of tensors of an actor that encodes prompts or pictures."""
    if role == "synthesis, pictures":
        vaes = counts.vae.values()
        pictures = 2 * 4 * 3 * config.synthesis.batch_size * counts.vae["teacher"].side ** 2  # in parts, and joined
        held = 4 * sum(vae.parameters for vae in vaes) + pictures
        return held + max(work.peak for vae in vaes for work in (vae.encode, vae.decode))
    size = getattr(torch, config.prompts.encoder_dtype).itemsize
    texts = [t for name, t in counts.text.items() if role == "text encoder" or name.startswith("teacher")]
    prompts = min(CHUNK, config.distill.batch_size if role == "text encoder" else config.synthesis.batch_size)
    return size * (sum(text.parameters for text in texts) + prompts * max(text.prompt.peak for text in texts) / 4)


def _fit_trainer(counts: Any, config: Config, gpu: str, has: float) -> Fit:
    saved, sharded = shared_bytes(counts.trainer.weights, config), config.fake_score.shard

    needs = counts.trainer.peak - (saved if sharded else 0)
    if needs <= has:
        return Fit("trainer", gpu, needs, has, f"with distill.batch_size={counts.batch}")

    def need(batch: int) -> float:
        return trainer_bytes(counts, batch) - (saved if sharded else 0)

    parts = config.distill.micro_batches
    # what is alive at once is one part, so more parts need what a smaller batch in as many parts as now would
    more = [m for m in range(parts + 1, counts.batch + 1) if counts.batch % m == 0]
    more = [m for m in more if need(counts.batch // m * parts) <= has]
    fitting = [batch for batch in range(parts, counts.batch, parts) if need(batch) <= has]
    would = [f"distill.micro_batches={more[0]}"] if more else []
    would += [f"distill.batch_size={fitting[-1]}"] if fitting else []
    recomputing = counts.recomputing.peak - (saved if sharded else 0)
    would += ["distill.gradient_checkpointing=true"] if recomputing <= has else []
    would += ["fake_score.shard=true"] if saved and not sharded and needs - saved <= has else []
    return Fit("trainer", gpu, needs, has, f"{' or '.join(would)} would" if would else "not even one sample would")


def trainer_remedies(counts: Counts, config: Config) -> list[tuple[str, float]]:
    """(what, bytes that remain) of measures that are not taken yet and add up, at the configured batch; the last is no
    setting.

    Recomputing is counted; the others take away what they move: the frozen base to the other workers' GPUs (a gathered
    piece stays), AdamW's two moments to the host.
    """
    needs, weights, steps = counts.recomputing.peak, counts.trainer.weights, []
    if not config.distill.gradient_checkpointing:
        steps.append(("distill.gradient_checkpointing", needs))
    if saved := shared_bytes(weights, config):
        needs -= saved
        steps += [] if config.fake_score.shard else [("fake_score.shard", needs)]
    needs -= weights.optimizers
    return [*steps, ("optimizers on the host", needs)]


def _bridge_advice(config: Config, fits: bool) -> str:
    bridge = config.bridge
    if fits:
        return f"with bridge.micro_batches={bridge.micro_batches}"
    share = bridge.batch_size // config.distill.fewest
    more = [count for count in range(bridge.micro_batches + 1, share + 1) if share % count == 0]
    recompute = [] if bridge.gradient_checkpointing else ["set bridge.gradient_checkpointing=true"]
    parts = [f"raise bridge.micro_batches ({', '.join(map(str, more))})"] if more else []
    return " or ".join([*recompute, *parts, "lower bridge.batch_size or bridge.attention.depth_fraction"])


def host_bytes(counts: Counts, config: Config) -> dict[str, int]:
    """Main memory of one trainer, by what fills it: its text encoders on CPUs, and the discriminator's teacher samples."""
    size = getattr(torch, config.prompts.encoder_dtype).itemsize
    encoders = size * sum(encoder.parameters for encoder in counts.text.values())
    encoders *= 0 if config.prompts.gpus_per_encoder else config.prompts.encoders
    gan = config.discriminator.weight > 0 and config.discriminator.real_data is None
    return {"text encoders": encoders} | (
        {"real samples": min(config.synthesis.count, config.discriminator.real_count) * counts.real_row_bytes}
        if gan
        else {}
    )


# -- before a launch --------------------------------------------------------------------------------------


def check_launch(config: Config, roles: Sequence[str] | None = None) -> list[str]:
    """See before a launch that every role fits the GPUs it asks for; counts nothing where none are asked for.

    Args:
        roles: of ROLES, those that this job runs; None: all.

    Returns:
        Lines to print: what was checked, and with plan.launch=warn what does not fit.

    Raises:
        ConfigError: a role does not fit and plan.launch is refuse; names key and remedy. Also what `count_run` raises.
    """
    used = [role for role in roles or ROLES if get(config, ROLES[role].key) > 0 and ROLES[role].used(config)]
    if not used or config.plan.launch == "ignore":
        return []
    gpus, counts = known_gpus(config), _count_roles(config, used)
    lines, wrong = [], []
    for role in used:
        key, kind = ROLES[role].key, ROLES[role].kind(config)
        has = _has(config, role, gpus[kind])
        if role == "trainer" and counts.trainer.peak > has:  # the advice needs more than the verdict
            counts.__dict__.update(_count_trainers(config, counts.trainer))
        fit = _fit(role, counts, config, kind, has)
        text = (
            f"{role}: needs {fit.needs / GIB:.1f} GiB of tensors, {key}={get(config, key):g} {kind} has "
            f"{fit.has / GIB:.1f}"
        )
        if fit.fits:
            lines.append(f"fits: {text}")
        else:
            wrong.append(f"{text}; {fit.advice}")
    if not wrong:
        return lines
    if config.plan.launch == "warn":
        return [*lines, *(f"WARNING: {text}" for text in wrong)]
    raise ConfigError(
        f"{'; '.join(wrong)}. For another kind of GPU set plan.trainer_gpu, plan.teacher_gpu and plan.encoder_gpu; "
        "plan.launch=warn starts all the same"
    )


def _count_roles(config: Config, roles: Sequence[str]) -> SimpleNamespace:
    """Those fields of Counts that these roles need; seconds to a minute."""
    student, teacher = counting.open_space(config.student.model), counting.open_space(config.teacher.model)
    spaces = {"student": student, "teacher": teacher}
    found: dict[str, Any] = {}
    if "trainer" in roles:
        found |= {"batch": config.distill.batch_size, "trainer": counting.count_trainer(config, student, teacher)}
    if "teacher rank" in roles:
        found["network"] = counting.count_teacher(config, teacher, guidance_scale(config, teacher))
    if "Bridge training" in roles:
        share = max(1, config.bridge.batch_size // config.distill.fewest)
        found["bridge"] = counting.count_bridge(config, student, teacher, share)
    if {"text encoder", "synthesis, prompts"} & set(roles):
        found["text"] = _count_texts(spaces)
    if "synthesis, pictures" in roles:
        found["vae"] = {role: counting.count_vae(space) for role, space in spaces.items()}
    return SimpleNamespace(**found)


# -- time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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


def trainer_dtype(config: Config) -> str:
    """What most of a trainer's arithmetic runs in."""
    return "bfloat16" if config.distill.mixed_precision else "float32"


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
    compute = gpu.seconds(network.score, plan.efficiency)
    moved = counts.request_bytes + counts.answer_bytes
    return rounds * max(compute, gather_seconds(counts, config, gpu, shards)) + moved / (1e9 * plan.network_gbits / 8)


def gather_seconds(counts: Counts, config: Config, gpu: Gpu, shards: int) -> float:
    """Seconds in which a rank receives the rest of the network, once a forward; overlaps with computing."""
    element = torch.empty(0, dtype=getattr(torch, config.teachers.dtype)).element_size()
    return counts.network.parameters * element * (1 - 1 / shards) / _link(gpu, shards, config)


def text_rate(config: Config, gpus: dict[str, Gpu]) -> float:
    """FLOP/s of one worker's text encoders; those with a share of a GPU run beside the teachers."""
    plan, prompts = config.plan, config.prompts
    if not prompts.gpus_per_encoder:
        return prompts.encoders * prompts.threads_per_encoder * 1e9 * plan.cpu_gflops
    whole = gpus[encoder_gpu(config)].flops_per_s(prompts.encoder_dtype, plan.efficiency)
    return prompts.encoders * min(1.0, prompts.gpus_per_encoder) * whole


def schedule(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> Schedule:
    """Seconds of a step on the configured kinds of GPU."""
    plan, trainer, distill, workers = config.plan, counts.trainer, config.distill, config.distill.workers
    gpu, teacher_gpu, updates = gpus[plan.trainer_gpu], gpus[plan.teacher_gpu], config.fake_score.updates
    make, fake, student = (
        gpu.seconds(work, plan.efficiency, bool(distill.tf32)) for work in (trainer.make, trainer.fake, trainer.student)
    )
    gathered = distill.micro_batches * shared_gather_seconds(trainer.weights, gpu, config)
    gan = config.discriminator.weight > 0
    reduced = {name: _all_reduce(nbytes, gpu, config) for name, nbytes in trainer.gradients.items()}
    # FSDP2 gathers a block when it is reached, and each block is a root of its own: nothing hides it. Forwards and backwards
    # of the fake loss, and the real samples' features; the student's fake score, and its features there and back.
    fake += (3 if gan else 2) * gathered + reduced["fake"] + reduced.get("discriminator", 0.0)
    student += (3 if gan else 1) * gathered + reduced["student"]
    one = request_seconds(counts, config, teacher_gpu, config.teachers.shards) if config.vsd.weight > 0 else 0.0
    requests, at_once = workers * distill.micro_batches, asked_at_once(config)
    rounds = [-(-requests // count) for count in range(1, at_once + 1)]
    needed = next((r for r, n in enumerate(rounds, 1) if n * one <= updates * fake), None)
    prompts = (1 + updates) * counts.batch
    used = min(replicas(config), at_once)
    return Schedule(
        make=make,
        fake=fake,
        updates=updates,
        student=student,
        teacher=rounds[used - 1] * one if used else 0.0,
        text=prompts * counts.text_flops / text_rate(config, gpus),
        overlap=config.distill.overlap,
        replicas_needed=needed,
    )


def shared_gather_seconds(weights: counting.Weights, gpu: Gpu, config: Config) -> float:
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


def _held(*groups: tuple[str, float]) -> dict[str, float]:
    """GPUs of each kind."""
    held: dict[str, float] = {}
    for kind, count in groups:
        held[kind] = held.get(kind, 0.0) + count
    return {kind: count for kind, count in held.items() if count}


def phases(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Phase]:
    """The run in order. The teacher service is there from the first phase to the last, if it is needed at all."""
    plan, timing, distill = config.plan, schedule(counts, config, gpus), config.distill
    a_replica = config.teachers.shards * config.teachers.gpus_per_rank
    uses_teachers = ROLES["teacher rank"].used(config)

    def teachers(ongoing: int) -> tuple[str, float]:
        return plan.teacher_gpu, replicas(config, ongoing) * a_replica * uses_teachers

    trainers = plan.trainer_gpu, distill.workers * distill.gpus_per_worker
    result = []
    if synthesises(config):
        actors = config.synthesis.encoders * (2 if samples(config) else 1)
        hours, bound = _synthesis(counts, config, gpus)
        held = _held((encoder_gpu(config), actors * config.synthesis.gpus_per_encoder), teachers(_asked(config)))
        result.append(Phase("synthesis", hours, held, bound))
    if counts.bridge is not None:
        one = gpus[plan.trainer_gpu].seconds(counts.bridge.step, plan.efficiency, bool(distill.tf32))
        seconds = config.bridge.steps * one
        held = _held((trainers[0], distill.fewest * distill.gpus_per_worker), teachers(0))
        result.append(Phase("Bridge training", seconds / 3600, held, "trainers"))
    bound = "teachers" if timing.wait > 0 else "trainers"
    bound = "text encoders" if timing.text >= timing.work + timing.wait else bound
    texts = encoder_gpu(config), distill.workers * config.prompts.encoders * config.prompts.gpus_per_encoder
    held = _held(trainers, teachers(0), texts)
    result.append(Phase("distillation", distill.steps * timing.step / 3600, held, bound))
    return result


def _asked(config: Config) -> int:
    """Requests for samples that are under way during synthesis."""
    return config.synthesis.encoders * config.synthesis.in_flight if samples(config) else 0


def _synthesis(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> tuple[float, str]:
    """Hours, and what decides them: teachers, VAEs and text encoders work side by side. Of real images, as many as samples."""
    plan, synthesis, teachers = config.plan, config.synthesis, config.teachers
    gpu, share = gpus[encoder_gpu(config)], min(1.0, synthesis.gpus_per_encoder)

    def on_encoders(flops: float, tflops: float) -> float:
        rate = share * 1e12 * plan.efficiency * tflops
        return flops / (synthesis.encoders * (rate or 1e9 * plan.cpu_gflops * synthesis.threads_per_encoder))

    drawn, vae_T, vae_S = samples(config), counts.vae["teacher"], counts.vae["student"]
    picture = vae_T.encode.flops / vae_T.batch + vae_S.encode.flops / vae_S.batch
    picture += vae_T.decode.flops / vae_T.batch if drawn else 0
    seconds = {"VAEs": on_encoders(picture, gpu.float32(tf32=True))}  # float32, whose convolutions torch runs in TF32
    if drawn:
        teacher_gpu = gpus[plan.teacher_gpu]
        ranks = min(replicas(config, _asked(config)), _asked(config)) * teachers.shards
        forward = max(
            teacher_gpu.seconds(counts.network.score, plan.efficiency),
            gather_seconds(counts, config, teacher_gpu, teachers.shards),
        )
        text = sum(encoder.prompt.flops for name, encoder in counts.text.items() if name.startswith("teacher"))
        seconds["teachers"] = config.teacher.sampling_steps * forward / counts.network.samples / ranks
        seconds["text encoders"] = on_encoders(
            text, gpu.fp32_tflops if config.prompts.encoder_dtype == "float32" else gpu.bf16_tflops
        )
    bound = max(seconds, key=seconds.get)
    return synthesis.count * seconds[bound] / 3600, bound


def price(phases: list[Phase], config: Config, gpus: dict[str, Gpu]) -> float:
    """US dollars: nodes of the usual size, which are rented whole, and the head node."""

    def per_hour(kind: str, count: float) -> float:
        gpu = gpus[kind]
        whole = gpu.per_node * math.ceil(count / gpu.per_node)
        return whole * (gpu.spot_price if config.plan.spot else gpu.price)

    return sum(
        phase.hours * (config.plan.head_price + sum(per_hour(kind, count) for kind, count in phase.gpus.items()))
        for phase in phases
    )
