"""What a run needs, before it is started: memory, floating point operations, bytes, teacher replicas, hours, price.

Counted (counting.py): parameters, FLOPs, live tensors of the project's own step at the configured sizes. Modelled from
those and the table of GPUs: seconds (FLOPs / (peak · plan.efficiency), never below the time of the bytes that must
move), memory beside the tensors (plan.reserve), prices. Not in it: start-up, evaluation, controls, loading, stragglers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from raydistill import counting
from raydistill.config import Config, ConfigError, Count, Positive, Section, get
from raydistill.distill.load import guidance_scale
from raydistill.export.pipeline import licence_of
from raydistill.spaces import Space

GIB = 1 << 30
GPU_TABLE = Path(__file__).with_name("gpus.yaml")
SHARDS = (1, 2, 4, 8, 16, 32)  # replica sizes that are tried
PAPER_HOURS = (
    "64 GPU-hours for the Bridge and 160 for 3,000 student updates (8 H100; teachers in the trainers' processes)"
)
PREFETCHED = 50_000_000  # elements DeepSpeed gathers ahead (its default stage3_prefetch_bucket_size)


class Gpu(Section):
    """One row of gpus.yaml; the units are explained there."""

    memory_gib: Positive
    bf16_tflops: Positive
    fp32_tflops: Positive
    link_gbytes: Positive
    per_node: Count
    price: Positive
    spot_price: Positive

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


def _known_gpus(config: Config) -> dict[str, Gpu]:
    """The table, in which the configured kinds are. Raises ConfigError."""
    gpus = read_gpus(config.plan.gpus)
    for key in ("trainer_gpu", "teacher_gpu"):
        if getattr(config.plan, key) not in gpus:
            raise ConfigError(f"plan.{key}: {getattr(config.plan, key)} is not in the table ({', '.join(gpus)})")
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
    text: dict[str, tuple[int, float]]  # "role part" -> parameters, FLOPs of one prompt
    vae: dict[str, tuple[int, float, float]]  # role -> parameters, FLOPs of encoding and decoding one picture
    request_bytes: int
    answer_bytes: int
    real_row_bytes: int  # one teacher sample in a worker's memory: latents and conditioning

    @property
    def text_flops(self) -> float:
        """One prompt through all text encoders."""
        return sum(flops for _, flops in self.text.values())


def conditioning_bytes(teacher: Space, dtype: torch.dtype = torch.float32) -> int:
    """One prompt's conditioning as it travels: real numbers in the text encoders' `dtype`, and integers."""
    layout = counting.conditioning_layout(teacher).values()
    return sum(math.prod(shape) * (dtype if kind.is_floating_point else kind).itemsize for shape, kind in layout)


def request_bytes(teacher: Space, batch: int, guided: bool, dtype: torch.dtype = torch.float32) -> int:
    """Tensors of a ScoreRequest: x_t and t in float32, the conditioning, and with guidance one unconditional row."""
    latents, row = 4 * math.prod(teacher.latent_shape), conditioning_bytes(teacher, dtype)
    return batch * (latents + 4 + row) + (row if guided else 0)


def needs_bridge(config: Config) -> bool:
    return config.bridge.checkpoint is None and config.bridge.projector != "identity"


def needs_samples(config: Config) -> bool:
    gan = config.discriminator.weight > 0 and config.discriminator.real_data is None
    return config.bridge.pairs is None and (needs_bridge(config) or gan)


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
    small = parts if batch > parts else 2 * parts  # one sample a part, or two
    share = max(1, config.bridge.batch_size // config.distill.fewest)
    latents, encoding = 4 * math.prod(teacher.latent_shape), getattr(torch, config.prompts.encoder_dtype)
    trainer = counting.count_trainer(config, student, teacher, batch)
    return Counts(
        student=student.pipeline_class,
        teacher=teacher.pipeline_class,
        batch=batch,
        trainer=trainer,
        small_batch=small,
        small_trainer=counting.count_trainer(config, student, teacher, small),
        recomputing=trainer
        if config.distill.gradient_checkpointing
        else counting.count_trainer(changed(config, gradient_checkpointing=True), student, teacher, batch),
        network=counting.count_teacher(config, teacher, scale),
        bridge=counting.count_bridge(config, student, teacher, share) if needs_bridge(config) else None,
        text={
            f"{role} {part}": value
            for role, space in spaces.items()
            for part, value in counting.count_text(space).items()
        },
        vae={role: counting.count_vae(space) for role, space in spaces.items()},
        request_bytes=request_bytes(teacher, batch // parts, scale != 1.0, encoding),
        answer_bytes=batch // parts * latents,
        real_row_bytes=latents + conditioning_bytes(teacher, encoding),
    )


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


def teacher_bytes(counts: Counts, config: Config, shards: int) -> int:
    """Most bytes of tensors on one of `shards` ranks: its part, what is gathered at once, and a forward's activations."""
    return _rank_bytes(counts.network, config, shards)


def _rank_bytes(network: counting.Teacher, config: Config, shards: int) -> int:
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


def memory(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Fit]:
    """Every role on every kind of GPU."""
    rows = []
    for name, gpu in gpus.items():
        has = gpu.memory_gib * GIB * (1 - config.plan.reserve)
        rows.append(_fit_teacher(counts, config, name, has))
        rows.append(_fit_trainer(counts, config, name, has))
        if counts.bridge is not None:
            rows.append(_fit_bridge(counts, config, name, has))
    return rows


def _fit_teacher(counts: Counts, config: Config, gpu: str, has: float) -> Fit:
    shards = config.teachers.shards
    least = next((s for s in SHARDS if teacher_bytes(counts, config, s) <= has), None)
    return Fit("teacher rank", gpu, teacher_bytes(counts, config, shards), has, _teacher_advice(least))


def _teacher_advice(least: int | None) -> str:
    return f"teachers.shards={least} is enough" if least else f"not even with {SHARDS[-1]} shards; lower teachers.slice"


def _fit_trainer(counts: Counts, config: Config, gpu: str, has: float) -> Fit:
    saved, sharded = shared_bytes(counts.trainer.weights, config), config.fake_score.shard

    def need(batch: int) -> float:
        return trainer_bytes(counts, batch) - (saved if sharded else 0)

    needs = need(counts.batch)
    if needs <= has:
        return Fit("trainer", gpu, needs, has, f"with distill.batch_size={counts.batch}")
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
    """(what, bytes that remain) of measures that add up, at the configured batch; the last is no setting.

    Recomputing is counted; the others take away what they move: the frozen base to the other workers' GPUs (a gathered
    piece stays), AdamW's two moments to the host.
    """
    needs, weights = counts.recomputing.peak, counts.trainer.weights
    steps = [("distill.gradient_checkpointing", needs)]
    if saved := shared_bytes(weights, config):
        needs -= saved
        steps.append(("fake_score.shard", needs))
    needs -= weights.optimizers
    steps.append(("optimizers on the host", needs))
    return steps


def _fit_bridge(counts: Counts, config: Config, gpu: str, has: float) -> Fit:
    needs = counts.bridge.peak
    return Fit("Bridge training", gpu, needs, has, _bridge_advice(config, fits=needs <= has))


def _bridge_advice(config: Config, fits: bool) -> str:
    advice = "bridge.gradient_checkpointing is " + ("on" if config.bridge.gradient_checkpointing else "off")
    return advice if fits else advice + "; lower bridge.batch_size, attention.depth_fraction or attention.rows"


def host_bytes(counts: Counts, config: Config) -> dict[str, int]:
    """Main memory of one trainer, by what fills it: its text encoders on CPUs, and the discriminator's teacher samples."""
    size = getattr(torch, config.prompts.encoder_dtype).itemsize
    encoders = size * sum(parameters for parameters, _ in counts.text.values())
    encoders *= 0 if config.prompts.gpus_per_encoder else config.prompts.encoders
    gan = config.discriminator.weight > 0 and config.discriminator.real_data is None
    return {"text encoders": encoders} | (
        {"real samples": min(config.synthesis.count, config.discriminator.real_count) * counts.real_row_bytes}
        if gan
        else {}
    )


# -- before a launch --------------------------------------------------------------------------------------

ROLES = {  # role -> the key that asks for its GPUs, and the one that names their kind
    "teacher rank": ("teachers.gpus_per_rank", "plan.teacher_gpu"),
    "trainer": ("distill.gpus_per_worker", "plan.trainer_gpu"),
    "Bridge training": ("distill.gpus_per_worker", "plan.trainer_gpu"),
}


def check_launch(config: Config, roles: Sequence[str] = tuple(ROLES)) -> list[str]:
    """See before a launch that every role fits the GPUs it asks for; counts nothing where none are asked for.

    Args:
        roles: of ROLES, those that this job runs.

    Returns:
        Lines to print: what was checked, and with plan.launch=warn what does not fit.

    Raises:
        ConfigError: a role does not fit and plan.launch is refuse; names key and remedy. Also what `count_run` raises.
    """
    used = [role for role in roles if get(config, ROLES[role][0]) > 0 and _is_run(role, config)]
    if not used or config.plan.launch == "ignore":
        return []
    gpus, counts = _known_gpus(config), _count_roles(config, used)
    fine, wrong = [], []
    for role in used:
        key, kind_key = ROLES[role]
        kind, share = get(config, kind_key), get(config, key)
        has = min(1.0, share) * gpus[kind].memory_gib * GIB * (1 - config.plan.reserve)
        needs = _launch_bytes(counts, role, config)
        (fine if needs <= has else wrong).append(
            (role, has, f"{role}: needs {needs / GIB:.1f} GiB of tensors, {key}={share:g} {kind} has {has / GIB:.1f}")
        )
    lines = [f"fits: {text}" for _, _, text in fine]
    if not wrong:
        return lines
    texts = [f"{text}; {_advice(counts, role, config, has)}" for role, has, text in wrong]
    if config.plan.launch == "warn":
        return [*lines, *(f"WARNING: {text}" for text in texts)]
    raise ConfigError(
        f"{'; '.join(texts)}. For another kind of GPU set plan.trainer_gpu and plan.teacher_gpu; plan.launch=warn starts "
        "all the same"
    )


def _is_run(role: str, config: Config) -> bool:
    if role == "teacher rank":
        return config.vsd.weight > 0 or needs_samples(config)
    return role == "trainer" or needs_bridge(config)


def _count_roles(config: Config, roles: Sequence[str]) -> dict[str, Any]:
    """One count for each role at the configured sizes; seconds to a minute."""
    student, teacher = counting.open_space(config.student.model), counting.open_space(config.teacher.model)
    share = max(1, config.bridge.batch_size // config.distill.fewest)
    count = {
        "trainer": lambda: counting.count_trainer(config, student, teacher),
        "teacher rank": lambda: counting.count_teacher(config, teacher, guidance_scale(config, teacher)),
        "Bridge training": lambda: counting.count_bridge(config, student, teacher, share),
    }
    return {role: count[role]() for role in roles}


def _launch_bytes(counts: dict[str, Any], role: str, config: Config) -> float:
    """Most bytes of tensors of one role."""
    if role == "trainer":
        return counts[role].peak - (shared_bytes(counts[role].weights, config) if config.fake_score.shard else 0)
    if role == "teacher rank":
        return _rank_bytes(counts[role], config, config.teachers.shards)
    return counts[role].peak


def _advice(counts: dict[str, Any], role: str, config: Config, has: float) -> str:
    """What would fit into `has` bytes."""
    if role == "teacher rank":
        least = next((s for s in SHARDS if _rank_bytes(counts[role], config, s) <= has), None)
        return _teacher_advice(least)
    if role == "Bridge training":
        return _bridge_advice(config, fits=False)
    student, teacher = counting.open_space(config.student.model), counting.open_space(config.teacher.model)
    if config.distill.gradient_checkpointing:
        return "lower distill.batch_size (jobs/plan.py says how far)"
    recomputing = counting.count_trainer(changed(config, gradient_checkpointing=True), student, teacher)
    if recomputing.peak <= has:
        return "distill.gradient_checkpointing=true would fit"
    return "lower distill.batch_size and set distill.gradient_checkpointing=true (jobs/plan.py says how far)"


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


def request_seconds(counts: Counts, config: Config, gpu: Gpu, shards: int) -> float:
    """One micro-batch on one replica: equally many forwards on every rank, and the way there and back."""
    network, teachers, plan = counts.network, config.teachers, config.plan
    rounds = -(-counts.batch // config.distill.micro_batches // (network.samples * shards))
    compute = network.score.flops / gpu.flops_per_s(teachers.dtype, plan.efficiency)
    moved = counts.request_bytes + counts.answer_bytes
    return rounds * max(compute, _gather(counts, config, gpu, shards)) + moved / (1e9 * plan.network_gbits / 8)


def _gather(counts: Counts, config: Config, gpu: Gpu, shards: int) -> float:
    """Seconds in which a rank receives the rest of the network, once a forward; overlaps with computing."""
    element = torch.empty(0, dtype=getattr(torch, config.teachers.dtype)).element_size()
    return counts.network.parameters * element * (1 - 1 / shards) / _link(gpu, shards, config)


def text_rate(config: Config, gpus: dict[str, Gpu]) -> float:
    """FLOP/s of one worker's text encoders; those with a share of a GPU run beside the teachers."""
    plan, prompts = config.plan, config.prompts
    if not prompts.gpus_per_encoder:
        return prompts.encoders * prompts.threads_per_encoder * 1e9 * plan.cpu_gflops
    whole = gpus[plan.teacher_gpu].flops_per_s(prompts.encoder_dtype, plan.efficiency)
    return prompts.encoders * min(1.0, prompts.gpus_per_encoder) * whole


def schedule(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> Schedule:
    """Seconds of a step on the configured kinds of GPU."""
    plan, trainer, distill, workers = config.plan, counts.trainer, config.distill, config.distill.workers
    gpu, teacher_gpu = gpus[plan.trainer_gpu], gpus[plan.teacher_gpu]
    rate = gpu.flops_per_s(trainer_dtype(config), plan.efficiency)
    reduced = {name: _all_reduce(nbytes, gpu, config) for name, nbytes in trainer.gradients.items()}
    updates = config.fake_score.updates
    fake = trainer.fake.flops / rate + reduced["fake"] + reduced.get("discriminator", 0.0)
    one = request_seconds(counts, config, teacher_gpu, config.teachers.shards) if config.vsd.weight > 0 else 0.0
    requests, at_once = workers * distill.micro_batches, workers * min(distill.in_flight, distill.micro_batches)
    rounds = [-(-requests // replicas) for replicas in range(1, at_once + 1)]
    needed = next((r for r, n in enumerate(rounds, 1) if n * one <= updates * fake), None)
    prompts = (1 + updates) * counts.batch
    return Schedule(
        make=trainer.make.flops / rate,
        fake=fake,
        updates=updates,
        student=trainer.student.flops / rate + reduced["student"],
        teacher=rounds[min(config.teachers.replicas, at_once) - 1] * one,
        text=prompts * counts.text_flops / text_rate(config, gpus),
        overlap=config.distill.overlap,
        replicas_needed=needed,
    )


@dataclass(frozen=True)
class Phase:
    """A part of the run: how long, and which GPUs it holds."""

    name: str
    hours: float
    trainer_gpus: float
    teacher_gpus: float
    bound: str  # what decides its length


def phases(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Phase]:
    """The run in order. The teacher service is held from the first phase to the last."""
    plan, timing = config.plan, schedule(counts, config, gpus)
    ranks = config.teachers.replicas * config.teachers.shards
    held = ranks * config.teachers.gpus_per_rank
    trainers = config.distill.workers * config.distill.gpus_per_worker
    result = []
    if needs_samples(config):
        result.append(_synthesis(counts, config, gpus, ranks, held))
    if counts.bridge is not None:
        dtype = "bfloat16" if config.bridge.mixed_precision else "float32"
        rate = gpus[plan.trainer_gpu].flops_per_s(dtype, plan.efficiency)
        seconds = config.bridge.steps * counts.bridge.step.flops / rate
        result.append(Phase("Bridge training", seconds / 3600, trainers, held, "trainers"))
    bound = "teachers" if timing.wait > 0 else "trainers"
    bound = "text encoders" if timing.text >= timing.work + timing.wait else bound
    held += config.distill.workers * config.prompts.encoders * config.prompts.gpus_per_encoder
    result.append(Phase("distillation", config.distill.steps * timing.step / 3600, trainers, held, bound))
    return result


def _synthesis(counts: Counts, config: Config, gpus: dict[str, Gpu], ranks: int, held: float) -> Phase:
    """Teachers, VAEs and text encoders work side by side; the slowest decides."""
    plan, synthesis = config.plan, config.synthesis
    teacher_gpu = gpus[plan.teacher_gpu]
    forward = max(
        counts.network.score.flops / teacher_gpu.flops_per_s(config.teachers.dtype, plan.efficiency),
        _gather(counts, config, teacher_gpu, config.teachers.shards),
    )
    on_gpu = synthesis.gpus_per_encoder > 0
    share = min(1.0, synthesis.gpus_per_encoder)
    encoder_rate = synthesis.encoders * (
        share * gpus[plan.trainer_gpu].flops_per_s("float32", plan.efficiency)
        if on_gpu
        else 1e9 * plan.cpu_gflops * synthesis.threads_per_encoder
    )
    _, encode_T, decode_T = counts.vae["teacher"]
    _, encode_S, _ = counts.vae["student"]
    text = sum(flops for name, (_, flops) in counts.text.items() if name.startswith("teacher"))
    seconds = {
        "teachers": config.teacher.sampling_steps * forward / counts.network.samples / ranks,
        "VAEs": (decode_T + encode_T + encode_S) / encoder_rate,
        "text encoders": text / encoder_rate,
    }
    bound = max(seconds, key=seconds.get)
    hours = synthesis.count * seconds[bound] / 3600
    return Phase("synthesis", hours, 2 * synthesis.encoders * synthesis.gpus_per_encoder, held, bound)


def price(phases: list[Phase], config: Config, gpus: dict[str, Gpu]) -> float:
    """US dollars for the GPUs."""

    def per_hour(kind: str) -> float:
        return gpus[kind].spot_price if config.plan.spot else gpus[kind].price

    plan = config.plan
    return sum(
        phase.hours
        * (phase.trainer_gpus * per_hour(plan.trainer_gpu) + phase.teacher_gpus * per_hour(plan.teacher_gpu))
        for phase in phases
    )


# -- the report -------------------------------------------------------------------------------------------


def report(config: Config) -> str:
    """The whole plan as text. Raises ConfigError for an unknown kind of GPU, and what `count_run` raises."""
    gpus = _known_gpus(config)
    counts = count_run(config)
    sections = (
        _sizes(counts, config),
        _memory(counts, config, gpus),
        _requests(counts, config),
        _step(counts, config, gpus),
        _run(counts, config, gpus),
        ASSUMPTIONS.format(plan=config.plan),
    )
    return "\n\n".join(sections)


def _amount(number: float, unit: str) -> str:
    """1.2 T, 34 M, …"""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def _sizes(counts: Counts, config: Config) -> str:
    network, weights = counts.network, counts.trainer.weights
    student = counts.trainer.gradients["student"] // 4
    licences = {
        model: licence_of(model, family)
        for model, family in ((config.teacher.model, counts.teacher), (config.student.model, counts.student))
    }
    lines = [
        f"{config.teacher.model} ({counts.teacher}) teaches {config.student.model} ({counts.student})",
        f"{config.distill.steps} student updates of {config.distill.workers} x {counts.batch} samples, "
        f"{config.fake_score.updates} fake-score updates each",
        *(f"  licence of {model}: {licence.name}. {licence.terms}" for model, licence in licences.items()),
        "",
        "PARAMETERS (exact, from the configuration files)",
        f"  teacher {network.parameters:,}; student {student:,}; trained part of the fake score "
        f"{counts.trainer.gradients['fake'] // 4:,}; Bridge {weights.bridge // 4:,} "
        f"(its frozen prior in it); discriminator {weights.discriminator // 4:,}",
        "  text encoders: " + "; ".join(f"{name} {parameters:,}" for name, (parameters, _) in counts.text.items()),
    ]
    return "\n".join(lines)


def _memory(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    weights = counts.trainer.weights
    state = sum((weights.student, weights.fake_frozen, weights.fake_trained, weights.bridge, weights.discriminator))
    lines = [
        f"MEMORY of one GPU, GiB of tensors (counted), against its size less plan.reserve = {config.plan.reserve:.0%}",
        f"  trainer: weights {state / GIB:.1f} (frozen teacher copy {weights.fake_frozen / GIB:.1f}), optimizers "
        f"{weights.optimizers / GIB:.1f}, activations and gradients at the peak "
        f"{(counts.trainer.peak - counts.trainer.held) / GIB:.1f} with {counts.batch // config.distill.micro_batches} "
        f"samples at once; weights in float32, forward passes in {trainer_dtype(config)}",
        f"  teacher rank: {config.teachers.shards} shard(s) in {config.teachers.dtype}, activations of "
        f"{counts.network.samples} samples {counts.network.score.peak / GIB:.1f}",
    ]
    for fit in memory(counts, config, gpus):
        verdict = "fits" if fit.fits else "DOES NOT FIT"
        lines.append(
            f"  {fit.role:<16}{fit.gpu:<9}{fit.needs / GIB:8.1f} of {fit.has / GIB:6.1f}  {verdict:<13} {fit.advice}"
        )
    remedies = ", ".join(f"{label} {size / GIB:.1f} GiB" for label, size in trainer_remedies(counts, config))
    lines.append(f"  a trainer would need, adding up (the last is no setting): {remedies}")
    host = host_bytes(counts, config)
    lines.append(
        "  host memory of one trainer: " + ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in host.items())
    )
    return "\n".join(lines)


def _requests(counts: Counts, config: Config) -> str:
    samples = counts.batch // config.distill.micro_batches
    return (
        "TRAFFIC\n"
        f"  one score request {_amount(counts.request_bytes, 'B')} ({_amount(counts.request_bytes / samples, 'B')} "
        f"a sample), its answer {_amount(counts.answer_bytes, 'B')}; "
        f"{config.distill.workers * config.distill.micro_batches} of them a step\n"
        "  averaged gradients of a step: "
        + ", ".join(f"{name} {_amount(size, 'B')}" for name, size in counts.trainer.gradients.items())
    )


def _encoders(config: Config) -> str:
    prompts = config.prompts
    if prompts.gpus_per_encoder:
        return (
            f"on {prompts.encoders} x {prompts.gpus_per_encoder:g} {config.plan.teacher_gpu} in {prompts.encoder_dtype}"
        )
    threads = prompts.encoders * prompts.threads_per_encoder
    return "on one CPU thread" if threads == 1 else f"on {threads} CPU threads"


def _step(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    timing, trainer, network = schedule(counts, config, gpus), counts.trainer, counts.network
    k, workers, trainer_gpu = timing.updates, config.distill.workers, gpus[config.plan.trainer_gpu]
    dtype, mixed = trainer_dtype(config), config.distill.mixed_precision
    rate = trainer_gpu.bf16_tflops if mixed else trainer_gpu.fp32_tflops
    score = network.score.flops / network.samples * counts.batch
    text = (1 + k) * counts.batch * counts.text_flops
    lines = [
        f"ONE STUDENT UPDATE, per worker: FLOPs (counted), seconds on {config.plan.trainer_gpu} (modelled)",
        f"  make           {_amount(trainer.make.flops, 'FLOP'):>13} {timing.make:9.3f} s",
        f"  fake score     {_amount(trainer.fake.flops, 'FLOP'):>13} {timing.fake:9.3f} s, {k} times",
        f"  student        {_amount(trainer.student.flops, 'FLOP'):>13} {timing.student:9.3f} s",
        f"  teacher scores {_amount(score, 'FLOP'):>13} {timing.teacher:9.3f} s for {workers} workers on "
        f"{config.teachers.replicas} x {config.teachers.shards} {config.plan.teacher_gpu}",
        f"  text encoders  {_amount(text, 'FLOP'):>13} {timing.text:9.3f} s {_encoders(config)}, ahead of the trainers",
        f"  trainers compute in {dtype}: {rate:g} of {trainer_gpu.bf16_tflops:g} TFLOP/s at the peak"
        + (" (a student that starts at t = 999 stays float32, which is not in these seconds)" if mixed else ""),
        f"  together {timing.step:.3f} s (one after the other {timing.sequential:.3f} s); trainers wait "
        f"{timing.wait:.3f} s for teachers",
    ]
    if config.vsd.weight == 0:
        lines.append("  no teacher is asked: vsd.weight is 0")
    elif timing.replicas_needed is None:
        lines.append(
            f"  no number of such replicas keeps the trainers from waiting: one request takes longer than {k} fake "
            "updates. Raise teachers.shards"
        )
    else:
        lines.append(f"  from {timing.replicas_needed} replica(s) of {config.teachers.shards} on, trainers never wait")
    if timing.text >= timing.work + timing.wait:
        lines.append("  THE TEXT ENCODERS DECIDE the pace: the trainers wait for conditioning")
    return "\n".join(lines)


def _run(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    parts, plan = phases(counts, config, gpus), config.plan
    total = sum(phase.hours for phase in parts)
    lines = [f"THE RUN on {plan.trainer_gpu} (trainers) and {plan.teacher_gpu} (teachers), modelled"]
    for phase in parts:
        gpu_hours = phase.hours * (phase.trainer_gpus + phase.teacher_gpus)
        lines.append(
            f"  {phase.name:<16}{phase.hours:10.2f} h {phase.hours / total:5.0%}  {phase.trainer_gpus:g} + "
            f"{phase.teacher_gpus:g} GPUs {gpu_hours:10.0f} GPU-h  decided by {phase.bound}"
        )
    gpu_hours = sum(phase.hours * (phase.trainer_gpus + phase.teacher_gpus) for phase in parts)
    kind = "spot" if plan.spot else "on-demand"
    lines.append(f"  in all {total:.2f} h, {gpu_hours:.0f} GPU-hours, ${price(parts, config, gpus):,.0f} ({kind})")
    lines.append(f"  the paper's own: {PAPER_HOURS}")
    timing = schedule(counts, config, gpus)
    if timing.text >= timing.work + timing.wait:
        hours = config.distill.steps * (timing.work + timing.wait) / 3600
        lines.append(f"  distillation would take {hours:.2f} h if its text encoders kept up")
    return "\n".join(lines)


ASSUMPTIONS = """\
Counted: parameters, FLOPs, live tensors (the project's own step on tensors without numbers; attention as fused kernels).
Modelled, not measured: seconds at plan.efficiency={plan.efficiency:g} of a data-sheet peak, plan.cpu_gflops={plan.cpu_gflops:g} of a CPU thread,
{plan.network_gbits:g} Gbit/s between nodes, plan.reserve={plan.reserve:g} of the memory for everything that is no tensor. Left out: start-up,
loading, evaluation, controls, lost nodes."""
