"""The check before a launch: does every role fit the GPUs that it asks for? Counts nothing where none are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from raydistill.config.reading import get
from raydistill.config.schema import Config
from raydistill.distill.networks import guidance_scale
from raydistill.errors import InputError
from raydistill.planning import counting
from raydistill.planning.counts import _count_texts, _count_trainers
from raydistill.planning.gpus import GIB, known_gpus
from raydistill.planning.memory import ROLES, _fit, _has
from raydistill.spaces import meta

# -- before a launch --------------------------------------------------------------------------------------


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
    raise InputError(
        f"{'; '.join(wrong)}. For another kind of GPU set plan.trainer_gpu, plan.teacher_gpu and plan.encoder_gpu; "
        "plan.launch=warn starts all the same"
    )


def _count_roles(config: Config, roles: Sequence[str]) -> SimpleNamespace:
    """Those fields of Counts that these roles need; seconds to a minute."""
    student, teacher = meta.open_space(config.student.model), meta.open_space(config.teacher.model)
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
