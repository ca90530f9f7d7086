"""The memory that each role of a run needs of its GPU, as counted (counting.py), and the check before a launch.

Memory beside the tensors is modelled: `plan.reserve`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from raydistill.config.reading import drawing_config, draws, get, other_drawer, trains_bridge
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge
from raydistill.errors import InputError
from raydistill.planning.counts import (
    GROWTH,
    ITEMSIZE,
    Counts,
    Trainer,
    Weights,
    changed,
    drawer_text,
    pairs_made,
    small_batch,
    synthesises,
)
from raydistill.planning.gpus import GIB, Gpu, known_gpus
from raydistill.planning.kept import find_counts

EIGHT_BITS = 0.74  # of AdamW's moments, what 8 bits save; of SD 1.5's 0.745, for small parameters keep 32
STUDENT_SHARD = "student.shard=true"
SHARDS = (1, 2, 4, 8, 16, 32)  # replica sizes that are tried
PREFETCHED = 50_000_000  # elements DeepSpeed gathers ahead (its default stage3_prefetch_bucket_size)


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


def teacher_bytes(counts: Any, config: Config, shards: int, drawer: bool = False) -> int:
    """Most bytes of tensors on one of `shards` ranks: its shard, what is gathered at once, and a forward's activations.

    `drawer`: of what draws pictures, instead of the teacher.
    """
    network = counts.drawer if drawer else counts.network
    element = ITEMSIZE[config.teachers.dtype]
    gathered = 0 if shards == 1 else min(network.parameters, network.piece + PREFETCHED)
    elements = -(-network.parameters // shards) + gathered + network.buffers
    return elements * element + network.score.peak


def whole_bytes(counts: Any, config: Config, drawer: bool = False) -> int:
    """Most bytes of tensors on a rank that holds all of the teacher: weights, 8-bit ones as such, and activations."""
    network, element = counts.drawer if drawer else counts.network, ITEMSIZE[config.teachers.dtype]
    small = network.large_linear if config.teachers.quantize != "none" else 0
    return (network.parameters - small + network.buffers) * element + small + network.score.peak


def is_whole(counts: Any, config: Config, gpu: Gpu, drawer: bool = False) -> bool:
    """Whether ranks on this kind of GPU hold the whole teacher; with teachers.backend=auto, where it fits."""
    teachers = config.teachers
    if teachers.backend != "auto" or teachers.plain or teachers.gpus_per_rank == 0:
        return teachers.plain
    return whole_bytes(counts, config, drawer) <= room_of(config, "teacher rank", gpu)


def trainer_bytes(counts: Counts, batch: int, config: Config | None = None) -> float:
    """Most bytes of tensors on a trainer at up to the configured number of samples, in distill.micro_batches.

    Straight lines through the two counted batch sizes: the truth bends upwards, so between them they never say less.

    Args:
        config: whose workers may share networks; None: they share none.
    """
    small, large = counts.small_trainer, counts.trainer
    step = (batch - counts.small_batch) / (counts.batch - counts.small_batch)
    pairs = {name: (getattr(small, name).peak, getattr(large, name).peak) for name in ("make", "fake", "student")}
    found = max(a + (b - a) * step - saved_by_sharing(large, config, name) for name, (a, b) in pairs.items())
    return max(found, _gathered_bytes(large, config))


def trainer_needs(trainer: Trainer, config: Config) -> float:
    """Most bytes of tensors on a trainer, without what the other workers hold of the networks that they share."""
    phases = ("make", "fake", "student")
    found = max(getattr(trainer, name).peak - saved_by_sharing(trainer, config, name) for name in phases)
    return max(found, _gathered_bytes(trainer, config))


def _gathered_bytes(trainer: Trainer, config: Config | None) -> float:
    """What rank 0 has while it evaluates a student that lies on all workers: student and average whole beside its own share."""
    if config is None or not config.student.shard:
        return 0
    return trainer.resident - saved_by_sharing(trainer, config, "make") + trainer.weights.student


def saved_by_sharing(trainer: Trainer, config: Config | None, phase: str) -> float:
    """Bytes that other workers hold for this one during make, fake or student (`fake_score.shard`, `student.shard`)."""
    if config is None:
        return 0
    fake = shared_bytes(trainer.weights, config) if config.fake_score.shard else 0
    return fake + (shared_student_bytes(trainer.weights, config, phase) if config.student.shard else 0)


def keeping_micro_batches(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> int | None:
    """The fewest distill.micro_batches with which a trainer need not recompute; None: it does not, or there are none.

    By straight lines, as `trainer_bytes`.
    """
    if counts.keeping is None or counts.small_keeping is None:
        return None
    kept = replace(counts, trainer=counts.keeping, small_trainer=counts.small_keeping)
    count, has = config.distill.micro_batches, room_of(config, "trainer", gpus[config.plan.trainer_gpu])
    for more in range(count, counts.batch + 1):
        if counts.batch % more == 0 and trainer_bytes(kept, counts.batch // more * count, config) <= has:
            return more
    return None


def together(counts: Any, config: Config, has: float) -> str | None:
    """Settings that make a trainer fit all together, as few as will do; None: not even all of them are enough.

    Micro-batches of one sample, recomputed activations and a copy in bfloat16 change no number but by rounding. They come first.
    """
    if counts.least is None:
        return None
    distill, fake, weights = config.distill, config.fake_score, counts.least.weights
    needs = counts.least.peak + counts.models.request_bytes * distill.micro_batches  # the inputs of more micro-batches
    taken = [f"distill.micro_batches={counts.batch}"] if distill.micro_batches < counts.batch else []
    taken += [] if distill.gradient_checkpointing else ["distill.gradient_checkpointing=true"]
    narrow = fake.kind == "lora" and distill.mixed_precision and fake.base_dtype == "float32"
    taken += ["fake_score.base_dtype=bfloat16"] if narrow else []
    shared = shared_bytes(weights, config) if fake.kind == "lora" else 0
    needs -= shared if fake.shard else 0
    of_student = shared_student_bytes(weights, changed(config, micro_batches=counts.batch), "student")
    needs -= of_student if config.student.shard else 0
    savings = {"fake_score.shard=true": 0 if fake.shard else shared}
    whole_moments = config.student.optimizer == "adamw"
    savings[STUDENT_SHARD] = of_student if whole_moments and not config.student.shard else 0
    for section, name in (("student", "student"), ("fake_score", "fake")):
        plain = getattr(config, section).optimizer == "adamw" and not (section == "student" and config.student.shard)
        savings[f"{section}.optimizer=adamw8bit"] = EIGHT_BITS * 2 * counts.least.gradients[name] if plain else 0
    able = [change for change, saved in savings.items() if saved > 0]
    for count in range(len(able) + 1):
        for chosen in itertools.combinations(able, count):
            if {STUDENT_SHARD, "student.optimizer=adamw8bit"} <= set(chosen):  # which do not go together
                continue
            if needs - sum(savings[change] for change in chosen) <= has:
                return " ".join([*taken, *chosen])
    return None


def shared_bytes(weights: Weights, config: Config) -> float:
    """Of the frozen teacher copy, what `fake_score.shard` leaves to the other workers; two gathered blocks stay."""
    workers, frozen = config.distill.workers, weights.fake_frozen
    return max(0, frozen - frozen // workers - 2 * weights.fake_block) if workers > 1 else 0


def shared_student_bytes(weights: Weights, config: Config, phase: str = "make") -> float:
    """Of the student, what `student.shard` leaves to the other workers in a phase: weights, AdamW's moments in float32, average.

    Two gathered blocks stay. In the student's update two blocks' gradients do, too, before all workers have their mean. What
    is saved of the others counts where a batch has several parts: else they are not there yet when most is.
    """
    workers, blocks, block = config.distill.workers, weights.student_blocks, weights.student_block
    copies = 4 if config.student.is_averaged else 3
    kept = 2 * block
    if phase == "student":
        copies += config.distill.micro_batches > 1
        kept += 2 * block
    return max(0, copies * blocks * (1 - 1 / workers) - kept) if workers > 1 else 0


@dataclass(frozen=True)
class Role:
    """Processes that hold a GPU, or a share of one.

    Attributes:
        key: asks for the GPU.
        counted: the field of Counts that their memory follows from.
        kind: of GPU.
        used: whether a run has them.
    """

    key: str
    counted: str
    kind: Callable[[Config], str]
    used: Callable[[Config], bool]


def encoder_gpu(config: Config) -> str:
    return config.plan.encoder_gpu or config.plan.teacher_gpu


ROLES = {
    "teacher rank": Role(
        "teachers.gpus_per_rank",
        "network",
        lambda c: c.plan.teacher_gpu,
        lambda c: c.vsd.weight > 0 or (draws(c) and not other_drawer(c)),
    ),
    "drawer rank": Role(
        "teachers.gpus_per_rank",
        "drawer",
        lambda c: c.plan.teacher_gpu,
        lambda c: draws(c) and other_drawer(c),
    ),
    "trainer": Role("distill.gpus_per_worker", "trainer", lambda c: c.plan.trainer_gpu, lambda c: True),
    "Bridge training": Role("distill.gpus_per_worker", "bridge", lambda c: c.plan.trainer_gpu, trains_bridge),
    "text encoder": Role("prompts.gpus_per_encoder", "text", encoder_gpu, lambda c: True),
    "synthesis, prompts": Role("synthesis.gpus_per_encoder", "text", encoder_gpu, draws),
    "synthesis, pictures": Role(
        "synthesis.gpus_per_encoder", "vae", encoder_gpu, lambda c: synthesises(c) or streams_bridge(c)
    ),
}


def room_of(config: Config, role: str, gpu: Gpu) -> float:
    """Bytes of tensors that one process of a role may have on a kind of GPU."""
    share = get(config, ROLES[role].key) or 1.0
    return min(1.0, share) * gpu.memory_gib * GIB * (1 - config.plan.reserve)


def memory(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[Fit]:
    """Every role on the kind of GPU that it is planned for; those that ask for none are left out, but for the networks that
    train and teach.
    """
    always = ("teacher rank", "drawer rank", "trainer", "Bridge training")
    roles = {role: it for role, it in ROLES.items() if it.used(config) and (role in always or get(config, it.key) > 0)}
    kinds = {role: it.kind(config) for role, it in roles.items()}
    return [_fit(role, counts, config, kind, gpus[kind]) for role, kind in kinds.items()]


def _fit(role: str, counts: Any, config: Config, kind: str, gpu: Gpu) -> Fit:
    """Args: counts: a Counts, or anything with those of its fields that the role needs."""
    has = room_of(config, role, gpu)
    if role == "trainer":
        return _fit_trainer(counts, config, kind, has)
    if role in ("teacher rank", "drawer rank"):
        return _fit_rank(role, counts, config, kind, gpu)
    if role == "Bridge training":
        needs = counts.bridge.peak
        return Fit(role, kind, needs, has, _bridge_advice(config, fits=needs <= has))
    needs = encoder_bytes(counts, config, role)
    key = ROLES[role].key
    return Fit(role, kind, needs, has, f"with {key}={get(config, key):g}" if needs <= has else f"raise {key}")


def _fit_rank(role: str, counts: Any, config: Config, kind: str, gpu: Gpu) -> Fit:
    drawer, has = role == "drawer rank", room_of(config, role, gpu)
    least = next((s for s in SHARDS if teacher_bytes(counts, config, s, drawer) <= has), None)
    advice = f"not even with {SHARDS[-1]} shards; lower teachers.slice"
    if least:
        advice = f"{'synthesis' if drawer else 'teachers'}.shards={least} is enough"
    if not is_whole(counts, config, gpu, drawer):
        shards = (drawing_config(config) if drawer else config).teachers.shards
        return Fit(role, kind, teacher_bytes(counts, config, shards, drawer), has, advice)
    needs = whole_bytes(counts, config, drawer)
    if needs <= has:
        advice = "with teachers.backend=plain"
    elif asked := [f"teachers.{key}" for key, value in config.teachers.of_whole.items() if value]:
        advice = f"lower teachers.slice, or do without {' and '.join(asked)}, which cannot be shared"
    elif least:
        advice = f"teachers.backend=zero3 with {advice}"
    return Fit(role, kind, needs, has, advice)


def encoder_bytes(counts: Any, config: Config, role: str) -> float:
    """Most bytes of tensors of an actor that encodes prompts or pictures."""
    if role == "synthesis, pictures":
        vaes = counts.vae.values()
        pictures = 2 * 4 * 3 * config.synthesis.batch_size * counts.vae["teacher"].side ** 2  # in chunks, and joined
        resident = 4 * sum(vae.parameters for vae in vaes) + pictures
        return resident + max(work.peak for vae in vaes for work in (vae.encode, vae.decode))
    own = {name: t for name, t in counts.text.items() if not name.startswith("drawer ")}
    texts = own if role == "text encoder" else drawer_text(counts.text)
    size = {name: _element(name, config) for name in texts}
    chunk = next(iter(texts.values())).chunk
    prompts = min(chunk, config.distill.batch_size if role == "text encoder" else config.synthesis.batch_size)
    weights = sum(size[name] * text.parameters for name, text in texts.items())
    return weights + prompts * max(size[name] * text.prompt.peak / 4 for name, text in texts.items())


def _element(name: str, config: Config) -> int:
    """Bytes of a number of a text encoder: the student's and its reward's are float32 (see `workers.assembly.batches_after`)."""
    return ITEMSIZE["float32" if name.startswith(("student", "reward")) else config.prompts.encoder_dtype]


def _fit_trainer(counts: Any, config: Config, gpu: str, has: float) -> Fit:
    needs = trainer_needs(counts.trainer, config)
    if needs <= has:
        return Fit("trainer", gpu, needs, has, f"with distill.batch_size={counts.batch}")

    def need(batch: int, settings: Config = config) -> float:
        return trainer_bytes(counts, batch, settings)

    count = config.distill.micro_batches
    # one micro-batch is alive at once, so more of them need what a smaller batch in as many as now would
    more = [m for m in range(count + 1, counts.batch + 1) if counts.batch % m == 0]
    more = [m for m in more if need(counts.batch // m * count) <= has]
    fitting = [batch for batch in range(count, counts.batch, count) if need(batch) <= has]
    would = [f"distill.micro_batches={more[0]}"] if more else []
    would += [f"distill.batch_size={fitting[-1]}"] if fitting else []
    would += ["distill.gradient_checkpointing=true"] if trainer_needs(counts.recomputing, config) <= has else []
    shares = config.distill.workers > 1 and not config.distill.channels_last
    shares = shares and config.distill.fewest == config.distill.workers
    for section, able in (
        ("fake_score", config.fake_score.kind == "lora"),
        ("student", config.student.kind == "full" and config.student.optimizer == "adamw"),
    ):
        others = with_shared(config, section)
        able = able and shares and not getattr(config, section).shard
        would += [f"{section}.shard=true"] if able and trainer_needs(counts.trainer, others) <= has else []
    if would:
        return Fit("trainer", gpu, needs, has, f"{' or '.join(would)} would")
    all_of = together(counts, config, has)
    advice = f"{all_of} together would" if all_of else "not even one sample would"
    return Fit("trainer", gpu, needs, has, advice)


def with_shared(config: Config, section: str) -> Config:
    """With fake_score.shard, or student.shard."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update={"shard": True})})


def trainer_remedies(counts: Counts, config: Config) -> list[tuple[str, float]]:
    """(what, bytes that remain) of measures that are not taken yet and add up, at the configured batch; the last is no
    setting.

    Recomputing is counted; the others take away what they move: the frozen base and the student to the other workers' GPUs
    (gathered blocks stay), AdamW's two moments to the host.
    """
    weights, steps = counts.trainer.weights, []
    if not config.distill.gradient_checkpointing:
        steps.append(("distill.gradient_checkpointing", trainer_needs(counts.recomputing, config)))
    for section, saved in (
        ("fake_score", shared_bytes(weights, config)),
        ("student", shared_student_bytes(weights, config) if config.student.optimizer == "adamw" else 0),
    ):
        if saved and not getattr(config, section).shard:
            config = with_shared(config, section)
            steps.append((f"{section}.shard", trainer_needs(counts.recomputing, config)))
    workers, moments = config.distill.workers, 2 * weights.student_blocks
    elsewhere = moments * (1 - 1 / workers) if config.student.shard and workers > 1 else 0
    needs = trainer_needs(counts.recomputing, config) - (weights.optimizers - elsewhere)
    return [*steps, ("optimizers on the host", needs)]


def _bridge_advice(config: Config, fits: bool) -> str:
    bridge = config.bridge
    if fits:
        return f"with bridge.micro_batches={bridge.micro_batches}"
    share = bridge.batch_size // config.distill.fewest
    more = [count for count in range(bridge.micro_batches + 1, share + 1) if share % count == 0]
    recompute = [] if bridge.gradient_checkpointing else ["set bridge.gradient_checkpointing=true"]
    divide = [f"raise bridge.micro_batches ({', '.join(map(str, more))})"] if more else []
    return " or ".join([*recompute, *divide, "lower bridge.batch_size or bridge.attention.depth_fraction"])


def host_bytes(counts: Counts, config: Config) -> dict[str, int]:
    """Main memory of one trainer, by what fills it: its text encoders on CPUs, and the discriminator's teacher samples."""
    own = {name: one for name, one in counts.text.items() if not name.startswith("drawer ")}
    encoders = sum(_element(name, config) * encoder.parameters for name, encoder in own.items())
    encoders *= 0 if config.prompts.gpus_per_encoder else config.prompts.encoders
    resident = {"text encoders": encoders}
    if config.discriminator.weight > 0:
        counted = [config.discriminator.real_count] if config.discriminator.real_count else []
        if config.discriminator.real_data is None:
            counted.append(config.synthesis.count if draws(config) else pairs_made(config))
        models = counts.models
        resident["real samples"] = min(
            [models.real_window_bytes, *(count * models.real_row_bytes for count in counted)]
        )
    return resident


# -- before a launch --------------------------------------------------------------------------------------


def decided_backend(config: Config) -> Literal["zero3", "plain"]:
    """What teachers.backend=auto is on the kind of GPU that is planned. Raises InputError: see `check_launch`."""
    gpus, counts = known_gpus(config), SimpleNamespace(**find_counts(config, ["network"]))
    return "plain" if is_whole(counts, config, gpus[config.plan.teacher_gpu]) else "zero3"


def check_launch(config: Config, roles: Sequence[str] | None = None) -> list[str]:
    """See before a launch that every role fits the GPUs it asks for; counts nothing where none are asked for.

    Args:
        roles: of ROLES, those that this job runs; None: all.

    Returns:
        Lines to print: what was checked, and with plan.launch=warn what does not fit.

    Raises:
        InputError: a role does not fit and plan.launch is refuse; names key and remedy. Also what `count_run` raises.
    """
    used = [role for role in roles or ROLES if get(config, ROLES[role].key) > 0 and ROLES[role].used(config)]
    if roles is not None and (other_drawer(config) or not draws(config)):  # no distillation, whose teachers score
        used = [role for role in used if role != "teacher rank"]
    if not used or config.plan.launch == "ignore":
        return []
    gpus, found = known_gpus(config), find_counts(config, [ROLES[role].counted for role in used])
    counts = SimpleNamespace(batch=config.distill.batch_size, small_batch=small_batch(config), **found)
    lines, wrong = [], []
    for role in used:
        key, kind = ROLES[role].key, ROLES[role].kind(config)
        has = room_of(config, role, gpus[kind])
        if role == "trainer" and trainer_needs(counts.trainer, config) > has:  # the advice needs more than the verdict
            counts.__dict__.update({"recomputing": counts.trainer} | find_counts(config, [*GROWTH, "models"]))
        fit = _fit(role, counts, config, kind, gpus[kind])
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
    raise InputError(
        f"{'; '.join(wrong)}. For another kind of GPU set plan.trainer_gpu, plan.teacher_gpu and plan.encoder_gpu; "
        "plan.launch=warn starts all the same"
    )
