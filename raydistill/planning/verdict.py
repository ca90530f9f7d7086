"""The verdict of a plan: does it fit, on what, for how long and how much; what would save most; what is needed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from raydistill.config.networks import REWARD_MODELS
from raydistill.config.reading import draws, draws_pairs, flatten, get, needs_pairs, other_drawer
from raydistill.config.schema import Config
from raydistill.config.stages import streams_bridge
from raydistill.errors import InputError
from raydistill.planning.counts import Counts, makes_pairs, pairs_made
from raydistill.planning.gpus import GIB, Gpu, is_compiled
from raydistill.planning.memory import ROLES, encoder_gpu, keeping_micro_batches, memory
from raydistill.planning.schedule import (
    Phase,
    Schedule,
    asked_at_once,
    bridge_schedule,
    phases,
    price,
    rented,
    replicas,
    schedule,
)
from raydistill.storage.globs import expand, is_pattern
from raydistill.storage.hub import is_hub_file, is_hub_id
from raydistill.storage.place import is_uri
from raydistill.storage.resolve import FILE_KEYS, HUB_KEYS, SHAPES_PREFIX, local_path
from raydistill.tracking.screen import duration

WIDTH = 80  # columns of all that a plan prints
LABEL = 10  # columns of what stands before a line
FEWER_PAIRS = 100_000
WORTH_SAYING = 0.98  # of the price; what saves less is not said
WHO = {
    "trainer": "trainers",
    "Bridge training": "trainers",
    "teacher rank": "teachers",
    "drawer rank": "drawers",
}  # all others encode
PATHS = (
    "student.model", "student.unet", "student.lora_start", "teacher.model", "synthesis.teacher", "bridge.checkpoint",
    "bridge.pairs", "discriminator.real_data", "synthesis.images", "prompts.path", "evaluation.prompts", "evaluation.judge",
)  # fmt: skip


def wrapped(label: str, text: str, indent: int = LABEL) -> str:
    """A line that begins with a label, in as many lines of WIDTH as it takes. Only what has no blank is longer."""
    return textwrap.fill(
        text, WIDTH, initial_indent=f"{label:<{indent}}", subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def title(config: Config) -> str:
    """What is planned, before anything is counted."""
    distill = config.distill
    run = f"{config.teacher.model} teaches {config.student.model}; {distill.steps:,} updates of "
    return wrapped("plan", f"{run}{distill.workers} x {distill.batch_size} samples")


def verdict(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    """A handful of lines, each with what it says at its beginning."""
    all_phases, timing = phases(counts, config, gpus), schedule(counts, config, gpus)
    rents = any(phase.gpus for phase in all_phases)
    lines = {
        "fits": _fits(counts, config, gpus, all_phases),
        "watch": "; ".join(_watch(counts, config, gpus, timing)) if rents else "",
        "money": _money(config, gpus, all_phases) if rents else "no GPU is rented",
        "savings": _saved(counts, config, gpus) if rents else "",
        "speeds": speeds(config, gpus) if rents else "",
        "needs": _needs(counts, config),
        "terms": _terms(counts),
    }
    return "\n".join(wrapped(label, text) for label, text in lines.items() if text)


def _fits(counts: Counts, config: Config, gpus: dict[str, Gpu], all_phases: list[Phase]) -> str:
    """Whether, on what, hours and price; of what does not fit, what would help."""
    hours = sum(phase.hours for phase in all_phases)
    if not any(phase.gpus for phase in all_phases):
        return f"no GPU is asked for; on one {config.plan.trainer_gpu} the arithmetic takes {_time(hours)}"
    nodes = "; ".join(
        f"{_nodes(gpus[kind], kind, count)} ({', '.join(dict.fromkeys(who))})"
        for kind, (count, who) in _gpus_by_kind(config, all_phases).items()
    )
    total, market = price(all_phases, config, gpus), "spot" if config.plan.spot else "on-demand"
    run = f"{nodes}: {_time(hours)}, ${total:,.0f} at {market} prices"
    small = [fit for fit in memory(counts, config, gpus) if not fit.fits]
    if not small:
        return f"yes, on {run}"
    lacking = [
        f"{fit.role}: needs {fit.needs / GIB:.1f} GiB, gets {fit.has / GIB:.1f} of a {fit.gpu}; {fit.advice}"
        for fit in small
    ]
    others = [kind for kind in gpus if all_fits(counts, on_one_kind(config, kind), gpus)]
    helps = f"All of it fits {', '.join(others)}" if others else "No kind of GPU that is known holds all of it"
    return f"NO. {'. '.join(lacking)}. {helps}. It would be {run}"


def _nodes(gpu: Gpu, kind: str, count: float) -> str:
    """GPUs that are rented for so many; where more than half of them idle, also how many are used."""
    whole, used = rented(gpu, count), math.ceil(count)
    return f"{whole} {kind}" if 2 * used >= whole else f"{used} of the {whole} {kind} of whole nodes"


def all_fits(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> bool:
    return all(fit.fits for fit in memory(counts, config, gpus))


def _gpus_by_kind(config: Config, all_phases: list[Phase]) -> dict[str, tuple[float, list[str]]]:
    """Kind of GPU -> (the most that is held at a time, who holds them)."""
    roles = [(it.kind(config), WHO.get(role, "encoders")) for role, it in ROLES.items() if _asks(config, role)]
    kinds = dict.fromkeys(kind for phase in all_phases for kind in phase.gpus)
    return {
        kind: (max(phase.gpus.get(kind, 0) for phase in all_phases), [who for of, who in roles if of == kind])
        for kind in sorted(kinds, key=lambda kind: kind != config.plan.trainer_gpu)
    }


def _asks(config: Config, role: str) -> bool:
    return ROLES[role].used(config) and get(config, ROLES[role].key) > 0


def _time(hours: float) -> str:
    return (
        duration(3600 * hours) if hours < 1 else f"{hours:,.1f} h" + (f" ({hours / 24:.0f} days)" if hours > 72 else "")
    )


def _watch(counts: Counts, config: Config, gpus: dict[str, Gpu], timing: Schedule) -> Iterator[str]:
    """What slows the run down for no use, or keeps it from beginning."""
    if counts.network.own_steps is not None and config.vsd.weight > 0:
        yield "teacher.model is step-distilled and gives no scores: name it in synthesis.teacher, and its base there"
    bridge = bridge_schedule(counts, config, gpus)
    if bridge is not None and bridge.encoders > bridge.trainers:
        yield (
            f"the Bridge's trainers wait for pictures: they take {bridge.taken:.3g} a second, the VAE encoders give "
            f"{bridge.given:.3g} (raise synthesis.encoders, from {bridge.enough} a worker on they do not wait)"
        )
    if timing.text >= timing.work + timing.wait:
        yield "the trainers wait for the text encoders (raise prompts.encoders or prompts.gpus_per_encoder)"
    elif config.vsd.weight > 0 and timing.replicas_needed is None:
        yield "a score request takes longer than the fake score's updates (raise teachers.shards)"
    elif timing.wait > 0:
        yield (
            f"the trainers wait {timing.wait:.1f} of {timing.step:.1f} s of an update for teachers; from "
            f"teachers.replicas={timing.replicas_needed} on they do not"
        )
    size, rows = filled_up(counts, config)
    if rows > size and config.vsd.weight > 0:
        yield f"score requests of {size} samples are filled up to {rows} (lower teachers.slice)"


def filled_up(counts: Counts, config: Config) -> tuple[int, int]:
    """(samples of a score request, rows that the ranks compute for it: equally many slices on each)."""
    size, at_once = counts.batch // config.distill.micro_batches, counts.network.samples * config.teachers.shards
    return size, -(-size // at_once) * at_once


def _money(config: Config, gpus: dict[str, Gpu], all_phases: list[Phase]) -> str:
    total = price(all_phases, config, gpus)
    return "; ".join(
        f"{phase.name} ${price([phase], config, gpus):,.0f} ({price([phase], config, gpus) / total:.0%}, {phase.hours:,.1f} h, "
        f"decided by {phase.bound})"
        for phase in all_phases
    )


def speeds(config: Config, gpus: dict[str, Gpu]) -> str:
    """The share of the peak that each role is planned with, and where it comes from."""
    plan, lines = config.plan, []
    kinds = {
        "teacher": plan.teacher_gpu,
        "trainer": plan.trainer_gpu,
        "text": encoder_gpu(config),
        "vae": encoder_gpu(config),
    }
    names = {"teacher": "teachers", "trainer": "trainers", "text": "text encoders", "vae": "VAEs"}
    for role, kind in kinds.items():
        speed = gpus[kind].of(role, config)
        how = ", compiled" if is_compiled(role, config) else ""
        lines.append(f"{names[role]} {speed.share:.0%} on {kind} ({speed.source}{how})")
    return ", ".join(lines)


# -- savings ----------------------------------------------------------------------------------------------


def _saved(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> str:
    cheaper = savings(counts, config, gpus)
    return "; ".join(f"{change} → ${cost:,.0f} in all" for cost, change in cheaper[:3]) or "no setting that is known"


def savings(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> list[tuple[float, str]]:
    """(price of the run, change) of changes that make it cheaper, each alone; the cheapest first.

    Of other kinds of GPU, on which all of it fits, the cheapest is among them.
    """
    now = price(phases(counts, config, gpus), config, gpus)

    def cost(other: Config, its: Counts = counts) -> float:
        return price(phases(its, other, gpus), other, gpus)

    others = [
        (f"plan.{key}={kind}", _with(config, "plan", **{key: kind}))
        for key in ("trainer_gpu", "teacher_gpu")
        for kind in gpus
    ]
    found = [(cost(other), change) for change, other in _changes(counts, config, gpus)]
    if count := keeping_micro_batches(counts, config, gpus):
        change = "distill.gradient_checkpointing=false" + (
            f" distill.micro_batches={count}" if count > config.distill.micro_batches else ""
        )
        other = _with(config, "distill", gradient_checkpointing=False, micro_batches=count)
        found.append((cost(other, replace(counts, trainer=counts.keeping)), change))
    kinds = [(cost(other), change) for change, other in others if all_fits(counts, other, gpus)]
    return sorted(it for it in [*found, min(kinds, default=(now, ""))] if it[0] <= WORTH_SAYING * now)


def _changes(counts: Counts, config: Config, gpus: dict[str, Gpu]) -> Iterator[tuple[str, Config]]:
    """Settings that may save, whatever they save."""
    timing = schedule(counts, config, gpus)
    if makes_pairs(config):
        yield "bridge.pairs=… (pairs that you have)", _with(config, "bridge", pairs="…")
    if draws_pairs(config):
        yield "synthesis.images=… (pictures that you have)", _with(config, "synthesis", images="…")
    if makes_pairs(config) and (made := pairs_made(config)) > FEWER_PAIRS:
        key = "count" if config.synthesis.images is None else "image_count"
        yield f"synthesis.{key}={FEWER_PAIRS} (of {made:,})", _with(config, "synthesis", **{key: FEWER_PAIRS})
    if not config.distill.compile:
        yield "distill.compile=true", _with(config, "distill", compile=True)
    if config.teachers.backend != "zero3" and not config.teachers.compile:  # which need it whole
        compiled = _with(config, "teachers", compile=True)
        if all_fits(counts, compiled, gpus):
            yield "teachers.compile=true", compiled
    if not config.plan.spot:
        yield "plan.spot=true", _with(config, "plan", spot=True)
    bridge = bridge_schedule(counts, config, gpus)
    if bridge is not None and bridge.encoders > bridge.trainers and config.synthesis.gpus_per_encoder:
        yield f"synthesis.encoders={bridge.enough}", _with(config, "synthesis", encoders=bridge.enough)
    needed, fixed = timing.replicas_needed, config.teachers.max_replicas is None
    if needed and fixed and needed != min(replicas(config), asked_at_once(config)):
        yield f"teachers.replicas={needed}", _with(config, "teachers", replicas=needed)
    if timing.text > timing.work + timing.wait and config.prompts.gpus_per_encoder:  # CPUs have no price in the plan
        enough = -(-config.prompts.encoders * timing.text // (timing.work + timing.wait))
        yield f"prompts.encoders={enough:g}", _with(config, "prompts", encoders=int(enough))


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def on_one_kind(config: Config, kind: str) -> Config:
    """All its GPUs of one kind."""
    return _with(config, "plan", trainer_gpu=kind, teacher_gpu=kind, encoder_gpu=None)


# -- needs and terms --------------------------------------------------------------------------------------


def _needs(counts: Counts, config: Config) -> str:
    """Files, weights and tokens that do not come with the package."""
    gated = {terms.model for terms in counts.models.terms if terms.gated}
    here, away, hub, values = [], [], [], flatten(config)
    for key in PATHS:
        value = values[key]
        if value is None or value.startswith(SHAPES_PREFIX) or not _used(config, key):
            continue
        if _is_here(value):
            here.append(f"{value} ({key})")
        elif (key in HUB_KEYS and is_hub_id(value)) or (key in FILE_KEYS and is_hub_file(value)):
            hub.append(f"{value}{' (gated)' if value in gated else ''}")
        else:
            away.append(f"{value} ({key})")
    for name, place in config.evaluation.weights.items():
        if name.partition(".")[0] not in config.evaluation.measured:
            continue
        if is_hub_id(place) and not local_path(place).exists():
            hub.append(f"{place} (evaluation.metrics)")
        else:
            (here if _is_here(place) else away).append(f"{place} (evaluation.weights.{name})")
    if config.reward.is_on and (of_reward := config.reward.metric) != "judge":
        place = (config.evaluation.weights | config.reward.weights).get(of_reward, REWARD_MODELS[of_reward])
        on_hub = is_hub_id(place) and not local_path(place).exists()
        (hub if on_hub else here if _is_here(place) else away).append(f"{place} (reward.metric)")
    found = [", ".join(here)] if here else []
    found += [f"not on this machine: {', '.join(away)}"] if away else []
    found += [f"from the hub: {', '.join(hub)}"] if hub else []
    found += (
        ["for what is gated, accept its licence, then `hf auth login` or HF_TOKEN"] if " (gated)" in str(hub) else []
    )
    return "; ".join(found) or "nothing more: models and prompts come with the package"


def _is_here(value: str) -> bool:
    """Whether this machine sees it; of URIs nobody asks the store."""
    if is_uri(value) or not is_pattern(value):
        return is_uri(value) or local_path(value).exists()
    try:
        return bool(expand(value))
    except InputError:
        return False


def _used(config: Config, key: str) -> bool:
    """Whether a run reads what this key names."""
    if key == "synthesis.teacher":
        return draws(config) and other_drawer(config)
    if key == "discriminator.real_data":
        return config.discriminator.weight > 0
    if key == "synthesis.images" and streams_bridge(config):
        return True
    return key not in ("bridge.pairs", "synthesis.images") or needs_pairs(config)


def _terms(counts: Counts) -> str:
    roles: dict[str, list[str]] = {}
    for terms in counts.models.terms:
        roles.setdefault(terms.licence, []).append(terms.role.lower())
    return "; ".join(f"{', '.join(who)}: {licence}" for licence, who in roles.items()) + " (--full says more)"
