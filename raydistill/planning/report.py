"""The details of a plan, which `raydistill plan --full` prints below its verdict: WIDTH columns, and the GPUs asked for."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raydistill.config.reading import draws_pairs
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge
from raydistill.planning.counts import ITEMSIZE, Counts, makes_pairs
from raydistill.planning.gpus import GIB, Gpu
from raydistill.planning.memory import encoder_gpu, host_bytes, is_whole, memory, trainer_remedies
from raydistill.planning.schedule import (
    bridge_schedule,
    gather_seconds,
    phases,
    picture_seconds,
    price,
    replicas,
    schedule,
    shared_gather_seconds,
)
from raydistill.planning.verdict import WIDTH, filled_up, on_one_kind, speeds, wrapped

PAPER_HOURS = "64 GPU-hours for the Bridge, 160 for 3,000 student updates (8 H100, teachers in the trainers' processes)"


def details(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    """All sections. `gpus` is the whole table; the kinds that the plan asks for are shown."""
    sections = (
        _sizes(counts, config),
        _terms(counts),
        _memory(counts, config, gpus),
        _requests(counts, config, gpus),
        _step(counts, config, gpus),
        _run(counts, config, gpus),
        _kinds(counts, config, gpus),
        _assumptions(config, gpus),
    )
    return "\n\n".join(sections)


def _amount(number: float, unit: str) -> str:
    """1.2 T, 34 M, …"""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def _table(rows: Iterable[Sequence[str]], right: Sequence[int], heads: Sequence[str] = ()) -> str:
    """Columns of text, those of `right` set right; others are wrapped where a row is wider than WIDTH."""
    rows = [list(map(escape, row)) for row in rows]
    table = Table(box=None, padding=(0, 1), pad_edge=False, show_header=bool(heads), header_style="")
    for column in range(len(rows[0])):
        head, number = heads[column] if heads else "", column in right
        table.add_column(head, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=WIDTH - 2, color_system=None, legacy_windows=False)
    console.print(table)
    return "\n".join(f"  {line.rstrip()}" for line in console.file.getvalue().splitlines())


def _line(text: str) -> str:
    return wrapped("", text, 2)


def _sizes(counts: Counts, config: Config) -> str:
    network, trainer = counts.network, counts.trainer
    rows = {
        "teacher": network.parameters,
        "student": (trainer.weights.student_frozen + trainer.gradients["student"]) // 4,
        **({"trained part of the student": trainer.gradients["student"] // 4} if config.student.kind == "lora" else {}),
        "trained part of the fake score": trainer.gradients["fake"] // 4,
        "Bridge, with its frozen prior": trainer.weights.bridge // 4,
        "discriminator": trainer.weights.discriminator // 4,
    }
    if trainer.weights.reward:
        rows["reward, with the student's VAE decoder"] = trainer.weights.reward // 4
    rows |= {name: encoder.parameters for name, encoder in counts.text.items()}
    pipelines = f"{counts.models.teacher} teaches {counts.models.student}; {config.fake_score.updates} fake-score updates to a student's"
    return "\n".join(
        (
            "PARAMETERS, exact, from the configuration files",
            _table([(name, f"{count:,}") for name, count in rows.items()], right=[1]),
            _line(pipelines),
        )
    )


def _terms(counts: Counts) -> str:
    lines = [wrapped("", f"{it.role}, {it.model}: {it.licence}. {it.text}", 2) for it in counts.models.terms]
    return "\n".join(("LICENCES, which bind the student", *lines))


def _memory(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    weights, distill = counts.trainer.weights, config.distill
    frozen = weights.fake_frozen + weights.bridge + weights.reward
    state = weights.student + weights.fake_trained + weights.discriminator + frozen
    rows = [
        (
            fit.role,
            fit.gpu,
            f"{fit.needs / GIB:.1f} of {fit.has / GIB:.1f}",
            "fits" if fit.fits else "NO",
            fit.advice.removeprefix("with "),
        )
        for fit in memory(counts, config, gpus)
    ]
    remedies = ", ".join(f"{label} {size / GIB:.1f} GiB" for label, size in trainer_remedies(counts, config))
    host = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in host_bytes(counts, config).items())
    return "\n".join(
        (
            f"MEMORY of one GPU, GiB of tensors (counted); {config.plan.reserve:.0%} of it is reserved",
            _table(rows, right=[2], heads=("role", "GPU", "needs", "", "with")),
            _line(
                f"trainer: weights {state / GIB:.1f} (frozen teacher copy {weights.fake_frozen / GIB:.1f}), optimizers "
                f"{weights.optimizers / GIB:.1f}, activations and gradients at the peak "
                f"{(counts.trainer.peak - counts.trainer.resident) / GIB:.1f} with {counts.batch // distill.micro_batches} "
                f"samples at once; weights in float32, forward passes in {'bfloat16' if distill.mixed_precision else 'float32'}"
            ),
            _line(
                f"teacher rank: {_resident_by_rank(counts, config, gpus)} in {config.teachers.dtype}, activations of "
                f"{counts.network.samples} samples {counts.network.score.peak / GIB:.1f}"
            ),
            _line(f"a trainer could do with (adding up; the last is no setting): {remedies}"),
            _line(f"host memory of one trainer: {host}"),
            _line(
                f"a checkpoint of the distillation: {counts.trainer.checkpoint / GIB:.1f} GiB on the storage; two are kept"
            ),
        )
    )


def _resident_by_rank(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    teachers = config.teachers
    if not is_whole(counts, config, gpus[config.plan.teacher_gpu]):
        return f"{teachers.shards} shard(s)"
    small = "" if teachers.quantize == "none" else f", its blocks' linear layers in {teachers.quantize}, the rest"
    return f"the whole network, on each of {teachers.shards} rank(s) a replica{small}"


def _requests(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    size, shards, network = counts.batch // config.distill.micro_batches, config.teachers.shards, counts.network
    gpu, models = gpus[config.plan.teacher_gpu], counts.models
    lines = [
        f"one score request {_amount(models.request_bytes, 'B')} ({_amount(models.request_bytes / size, 'B')} a sample), "
        f"its answer {_amount(models.answer_bytes, 'B')}; {config.distill.workers * config.distill.micro_batches} of them "
        "a step",
    ]
    size, rows = filled_up(counts, config)
    if rows > size:
        lines.append(
            f"ITS {size} SAMPLES ARE FILLED UP TO {rows} with repeats: {shards} rank(s) take slices of "
            f"{network.samples}. Lower teachers.slice, or distill.micro_batches"
        )
    if shards > 1 and not is_whole(counts, config, gpu):
        element = ITEMSIZE[config.teachers.dtype]
        lines.append(
            f"ZeRO-3: a rank receives {_amount(network.parameters * element * (1 - 1 / shards), 'B')} a forward, "
            f"{gather_seconds(counts, config, gpu, shards):.3f} s beside "
            f"{gpu.seconds(network.score, gpu.share('teacher', config)):.3f} s of arithmetic on {config.plan.teacher_gpu}"
        )
    if config.fake_score.shard and config.distill.workers > 1:
        seconds = shared_gather_seconds(counts.trainer.weights, gpus[config.plan.trainer_gpu], config)
        lines.append(f"fake_score.shard: a trainer receives the frozen copy's other parts in {seconds:.3f} s a pass")
    sizes = ", ".join(f"{name} {_amount(size, 'B')}" for name, size in counts.trainer.gradients.items())
    return "\n".join(("TRAFFIC", *map(_line, [*lines, f"averaged gradients of a step: {sizes}"])))


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
    text = counts.texts_of_update(config)
    works = ((trainer.make, 1), (trainer.fake, k), (trainer.student, 1))
    whole, high = (sum(times * getattr(work, name) for work, times in works) for name in ("flops", "flops_32"))
    tf32, high = bool(config.distill.tf32), high / whole
    low = "bfloat16, the student in float16" if config.student.autocast == "float16" else "bfloat16"
    speeds = [(1 - high, low, trainer_gpu.bf16_tflops)]
    speeds += [(high, "TF32" if tf32 else "float32", trainer_gpu.float32(tf32))]
    speeds = [f"{share:.0%} in {dtype} ({rate:g} TFLOP/s at the peak)" for share, dtype, rate in speeds if share > 0]
    on_teachers = f"for {workers} workers on {replicas(config)} x {config.teachers.shards} {config.plan.teacher_gpu}"
    rows = [
        ("make", trainer.make.flops, timing.make, ""),
        ("fake score", trainer.fake.flops, timing.fake, f"{k} times"),
        ("student", trainer.student.flops, timing.student, ""),
        ("teacher scores", score, timing.teacher, on_teachers),
        ("text encoders", text, timing.text, f"{_encoders(config)}, ahead of the trainers"),
    ]
    lines = [
        f"trainers compute {' and '.join(speeds)}",
        f"together {timing.step:.3f} s (one after the other {timing.sequential:.3f} s); trainers wait {timing.wait:.3f} s "
        "for teachers",
    ]
    if config.vsd.weight == 0:
        lines.append("no teacher is asked: vsd.weight is 0")
    elif timing.replicas_needed is None:
        lines.append(
            f"no number of such replicas keeps the trainers from waiting: one request takes longer than {k} fake updates. "
            "Raise teachers.shards"
        )
    else:
        lines.append(f"from {timing.replicas_needed} replica(s) of {config.teachers.shards} on, trainers never wait")
    if timing.text >= timing.work + timing.wait:
        lines.append("THE TEXT ENCODERS DECIDE the pace: the trainers wait for conditioning")
    return "\n".join(
        (
            f"ONE STUDENT UPDATE, per worker: FLOPs (counted), seconds on {config.plan.trainer_gpu} (modelled)",
            _table(
                [(name, _amount(flops, "FLOP"), f"{seconds:.3f} s", note) for name, flops, seconds, note in rows],
                [1, 2],
            ),
            *map(_line, lines),
        )
    )


def _run(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    all_phases, plan = phases(counts, config, gpus), config.plan
    total = sum(phase.hours for phase in all_phases)
    rows = [
        (
            phase.name,
            f"{phase.hours:.2f} h",
            f"{phase.hours / total:.0%}",
            " + ".join(f"{count:g} {kind}" for kind, count in phase.gpus.items()) or "no GPU",
            f"{phase.gpu_hours:.0f} GPU-h",
            phase.bound,
        )
        for phase in all_phases
    ]
    gpu_hours = sum(phase.gpu_hours for phase in all_phases)
    kind = "spot" if plan.spot else "on-demand"
    lines = [
        f"in all {total:.2f} h, {gpu_hours:.0f} GPU-hours, ${price(all_phases, config, gpus):,.0f} ({kind}, whole nodes, the "
        "head node in it)",
        f"the paper's own: {PAPER_HOURS}",
    ]
    timing = schedule(counts, config, gpus)
    lines += _pictures(counts, config, gpus)
    if timing.text >= timing.work + timing.wait:
        hours = config.distill.steps * (timing.work + timing.wait) / 3600
        lines.append(f"distillation would take {hours:.2f} h if its text encoders kept up")
    return "\n".join(
        (
            f"THE RUN on {plan.trainer_gpu} (trainers) and {plan.teacher_gpu} (teachers), modelled",
            _table(rows, right=[1, 2, 4], heads=("", "", "", "", "", "decided by")),
            *map(_line, lines),
        )
    )


def _pictures(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[str]:
    """What the VAE encoders give, and what is taken of it."""
    synthesis, streams = config.synthesis, streams_bridge(config)
    if not (streams or makes_pairs(config)):
        return []
    actors = synthesis.encoders * (config.distill.fewest if streams else 1)
    on = f"{synthesis.gpus_per_encoder:g} {encoder_gpu(config)}" if synthesis.gpus_per_encoder else "CPUs"
    if not streams:
        rate = 1 / picture_seconds(counts, config, gpus, drawn=draws_pairs(config))
        return [f"both VAEs: {rate:.3g} pictures a second, on {actors} actors of {on} each"]
    bridge = bridge_schedule(counts, config, gpus)
    return [
        f"both VAEs: {bridge.given:.3g} pictures a second, on {actors} actors of {on} each, beside the Bridge's training, "
        f"which could take {bridge.taken:.3g}"
    ]


def _kinds(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    """The same run with all its GPUs of one kind, for each kind that is asked for."""
    rows = []
    for name in dict.fromkeys((config.plan.trainer_gpu, config.plan.teacher_gpu, encoder_gpu(config))):
        other = on_one_kind(config, name)
        timing, all_phases = schedule(counts, other, gpus), phases(counts, other, gpus)
        lacking = [fit.role for fit in memory(counts, other, gpus) if not fit.fits]
        needed = "-" if timing.replicas_needed is None else f"{timing.replicas_needed:g}"
        hours = sum(phase.hours for phase in all_phases)
        unfit = f"does not fit: {', '.join(lacking)}" if lacking else ""
        rows.append(
            (name, f"{timing.step:.2f} s", needed, f"{hours:.1f} h", f"${price(all_phases, other, gpus):,.0f}", unfit)
        )
    return "\n".join(
        (
            "THE SAME RUN ON ONE KIND OF GPU, modelled",
            _table(rows, right=[1, 2, 3, 4], heads=("", "an update", "replicas*", "hours", "price", "")),
            _line("* from which on trainers never wait"),
        )
    )


def _assumptions(config: Config, gpus: dict[str, Gpu]) -> str:
    plan = config.plan
    return "\n".join(
        (
            wrapped(
                "",
                "Counted: parameters, FLOPs, live tensors (the project's own step on tensors without numbers; attention as "
                "fused kernels).",
                0,
            ),
            wrapped(
                "",
                f"Modelled: seconds at a share of the data sheet's peak, {speeds(config, gpus)}; "
                f"plan.cpu_gflops={plan.cpu_gflops:g} of a CPU thread, {plan.network_gbits:g} Gbit/s between nodes, "
                f"plan.reserve={plan.reserve:g} of the memory for everything that is no tensor.",
                0,
            ),
            wrapped("", "Left out: start-up, loading, evaluation, controls, lost nodes.", 0),
        )
    )
