"""The text that jobs/plan.py prints of a plan."""

from __future__ import annotations

import torch

from raydistill.config.schema import Config
from raydistill.export.licences import student_licences
from raydistill.planning.counting import Counts, count_run
from raydistill.planning.gpus import GIB, Gpu, known_gpus
from raydistill.planning.memory import encoder_gpu, host_bytes, memory, trainer_remedies
from raydistill.planning.schedule import (
    gather_seconds,
    phases,
    price,
    replicas,
    schedule,
    shared_gather_seconds,
)

PAPER_HOURS = (
    "64 GPU-hours for the Bridge and 160 for 3,000 student updates (8 H100; teachers in the trainers' processes)"
)


def report(config: Config) -> str:
    """The whole plan as text. Raises InputError for an unknown kind of GPU, and what `count_run` raises."""
    gpus = known_gpus(config)
    counts = count_run(config)
    sections = (
        _sizes(counts, config),
        _memory(counts, config, gpus),
        _requests(counts, config, gpus),
        _step(counts, config, gpus),
        _run(counts, config, gpus),
        _kinds(counts, config, gpus),
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
    licences = student_licences(
        config.teacher.model, counts.teacher, config.student.model, counts.student, config.student.unet
    )
    lines = [
        f"{config.teacher.model} ({counts.teacher}) teaches {config.student.model} ({counts.student})",
        f"{config.distill.steps} student updates of {config.distill.workers} x {counts.batch} samples, "
        f"{config.fake_score.updates} fake-score updates each",
        *(
            f"  licence of the {role.lower()}, {model}: {licence.name}. {licence.terms}"
            for role, model, licence in licences
        ),
        "",
        "PARAMETERS (exact, from the configuration files)",
        f"  teacher {network.parameters:,}; student {student:,}; trained part of the fake score "
        f"{counts.trainer.gradients['fake'] // 4:,}; Bridge {weights.bridge // 4:,} "
        f"(its frozen prior in it); discriminator {weights.discriminator // 4:,}",
        "  text encoders: " + "; ".join(f"{name} {encoder.parameters:,}" for name, encoder in counts.text.items()),
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
        f"samples at once; weights in float32, forward passes in {'bfloat16' if config.distill.mixed_precision else 'float32'}",
        f"  teacher rank: {config.teachers.shards} shard(s) in {config.teachers.dtype}, activations of "
        f"{counts.network.samples} samples {counts.network.score.peak / GIB:.1f}",
    ]
    for fit in memory(counts, config, gpus):
        verdict = "fits" if fit.fits else "DOES NOT FIT"
        lines.append(
            f"  {fit.role:<21}{fit.gpu:<9}{fit.needs / GIB:8.1f} of {fit.has / GIB:6.1f}  {verdict:<13} {fit.advice}"
        )
    remedies = ", ".join(f"{label} {size / GIB:.1f} GiB" for label, size in trainer_remedies(counts, config))
    lines.append(f"  a trainer could do with (adding up; the last is no setting): {remedies}")
    host = host_bytes(counts, config)
    lines.append(
        "  host memory of one trainer: " + ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in host.items())
    )
    return "\n".join(lines)


def _requests(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    size, shards, network = counts.batch // config.distill.micro_batches, config.teachers.shards, counts.network
    gpu = gpus[config.plan.teacher_gpu]
    rows = -(-size // (network.samples * shards)) * network.samples * shards
    lines = [
        "TRAFFIC",
        f"  one score request {_amount(counts.request_bytes, 'B')} ({_amount(counts.request_bytes / size, 'B')} "
        f"a sample), its answer {_amount(counts.answer_bytes, 'B')}; "
        f"{config.distill.workers * config.distill.micro_batches} of them a step",
    ]
    if rows > size:
        lines.append(
            f"  ITS {size} SAMPLES ARE FILLED UP TO {rows} with repeats: {shards} rank(s) take slices of "
            f"{network.samples}. Lower teachers.slice, or distill.micro_batches"
        )
    if shards > 1:
        element = getattr(torch, config.teachers.dtype).itemsize
        lines.append(
            f"  ZeRO-3: a rank receives {_amount(network.parameters * element * (1 - 1 / shards), 'B')} a forward, "
            f"{gather_seconds(counts, config, gpu, shards):.3f} s beside {gpu.seconds(network.score, config.plan.efficiency):.3f} s "
            f"of arithmetic on {config.plan.teacher_gpu}"
        )
    if config.fake_score.shard and config.distill.workers > 1:
        seconds = shared_gather_seconds(counts.trainer.weights, gpus[config.plan.trainer_gpu], config)
        lines.append(f"  fake_score.shard: a trainer receives the frozen copy's other parts in {seconds:.3f} s a pass")
    sizes = ", ".join(f"{name} {_amount(size, 'B')}" for name, size in counts.trainer.gradients.items())
    return "\n".join([*lines, f"  averaged gradients of a step: {sizes}"])


def _encoders(config: Config) -> str:
    prompts = config.prompts
    if prompts.gpus_per_encoder:
        return f"on {prompts.encoders} x {prompts.gpus_per_encoder:g} {encoder_gpu(config)} in {prompts.encoder_dtype}"
    threads = prompts.encoders * prompts.threads_per_encoder
    return "on one CPU thread" if threads == 1 else f"on {threads} CPU threads"


def _step(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    timing, trainer, network = schedule(counts, config, gpus), counts.trainer, counts.network
    k, workers, trainer_gpu = timing.updates, config.distill.workers, gpus[config.plan.trainer_gpu]
    score = network.score.flops / network.samples * counts.batch
    text = (1 + k) * counts.batch * counts.text_flops
    works = ((trainer.make, 1), (trainer.fake, k), (trainer.student, 1))
    whole, high = (sum(times * getattr(work, name) for work, times in works) for name in ("flops", "flops_32"))
    tf32, high = bool(config.distill.tf32), high / whole
    speeds = [(1 - high, "bfloat16", trainer_gpu.bf16_tflops)]
    speeds += [(high, "TF32" if tf32 else "float32", trainer_gpu.float32(tf32))]
    speeds = [f"{share:.0%} in {dtype} ({rate:g} TFLOP/s at the peak)" for share, dtype, rate in speeds if share > 0]
    lines = [
        f"ONE STUDENT UPDATE, per worker: FLOPs (counted), seconds on {config.plan.trainer_gpu} (modelled)",
        f"  make           {_amount(trainer.make.flops, 'FLOP'):>13} {timing.make:9.3f} s",
        f"  fake score     {_amount(trainer.fake.flops, 'FLOP'):>13} {timing.fake:9.3f} s, {k} times",
        f"  student        {_amount(trainer.student.flops, 'FLOP'):>13} {timing.student:9.3f} s",
        f"  teacher scores {_amount(score, 'FLOP'):>13} {timing.teacher:9.3f} s for {workers} workers on "
        f"{replicas(config)} x {config.teachers.shards} {config.plan.teacher_gpu}",
        f"  text encoders  {_amount(text, 'FLOP'):>13} {timing.text:9.3f} s {_encoders(config)}, ahead of the trainers",
        f"  trainers compute {' and '.join(speeds)}",
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
        held = " + ".join(f"{count:g} {kind}" for kind, count in phase.gpus.items()) or "no GPU"
        lines.append(
            f"  {phase.name:<16}{phase.hours:10.2f} h {phase.hours / total:5.0%}  {held:<22}{phase.gpu_hours:10.0f} GPU-h  "
            f"decided by {phase.bound}"
        )
    gpu_hours = sum(phase.gpu_hours for phase in parts)
    kind = "spot" if plan.spot else "on-demand"
    lines.append(
        f"  in all {total:.2f} h, {gpu_hours:.0f} GPU-hours, ${price(parts, config, gpus):,.0f} ({kind}, whole nodes, "
        "the head node in it)"
    )
    lines.append(f"  the paper's own: {PAPER_HOURS}")
    timing = schedule(counts, config, gpus)
    if timing.text >= timing.work + timing.wait:
        hours = config.distill.steps * (timing.work + timing.wait) / 3600
        lines.append(f"  distillation would take {hours:.2f} h if its text encoders kept up")
    return "\n".join(lines)


def _kinds(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    """The same run with all its GPUs of one kind."""
    lines = [
        "THE SAME RUN ON ONE KIND OF GPU, modelled: s a student update, replicas from which on trainers never wait, hours"
    ]
    for name in gpus:
        plan = {"trainer_gpu": name, "teacher_gpu": name, "encoder_gpu": None}
        other = config.model_copy(update={"plan": config.plan.model_copy(update=plan)})
        timing, parts = schedule(counts, other, gpus), phases(counts, other, gpus)
        lacking = [fit.role for fit in memory(counts, other, {name: gpus[name]}) if not fit.fits]
        needed = "-" if timing.replicas_needed is None else f"{timing.replicas_needed:g}"
        hours = sum(phase.hours for phase in parts)
        lines.append(
            f"  {name:<9}{timing.step:9.2f} s {needed:>4} {hours:10.1f} h  ${price(parts, other, gpus):>9,.0f}"
            + (f"  does not fit: {', '.join(lacking)}" if lacking else "")
        )
    return "\n".join(lines)


ASSUMPTIONS = """\
Counted: parameters, FLOPs, live tensors (the project's own step on tensors without numbers; attention as fused kernels).
Modelled, not measured: seconds at plan.efficiency={plan.efficiency:g} of a data-sheet peak, plan.cpu_gflops={plan.cpu_gflops:g} of a CPU thread,
{plan.network_gbits:g} Gbit/s between nodes, plan.reserve={plan.reserve:g} of the memory for everything that is no tensor. Left out: start-up,
loading, evaluation, controls, lost nodes."""
