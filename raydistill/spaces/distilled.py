"""Step-distilled models: they draw a picture in a few evaluations, and give no scores.

Their networks no longer estimate x0 of a noised latent as a diffusion model does, so they cannot teach. They may draw.
What tells them: their name on the hub, or a value of their configuration files (`Space.distilled_sign`).
"""

from __future__ import annotations

from raydistill.config.schema import Config
from raydistill.errors import InputError
from raydistill.spaces import hub_models
from raydistill.spaces.base import Space
from raydistill.storage.hub import SNAPSHOT

MOST_STEPS = 8  # that step-distilled models are made for
USUAL_STEPS = 4  # where nothing says what a model's own are


def _hub_id(model: str) -> str:
    """The name on the hub, without its revision; of a folder of the hub's cache, the model that it holds."""
    found = SNAPSHOT.fullmatch(model)
    return f"{found['org']}/{found['name']}" if found else model.partition("@")[0]


def step_distilled(space: Space, model: str) -> str | None:
    """What says that a model is step-distilled; None: nothing does.

    Args:
        model: as the configuration names it.
    """
    known = hub_models().get(_hub_id(model))
    if known is not None and known.distilled_steps:
        return "its page on the hub says so"
    return space.distilled_sign


def own_steps(space: Space, model: str) -> int | None:
    """The evaluations of a picture, of a step-distilled model; None: it is none."""
    if step_distilled(space, model) is None:
        return None
    known = hub_models().get(_hub_id(model))
    return (known.distilled_steps if known else None) or USUAL_STEPS


def check_scores(config: Config, teacher: Space) -> None:
    """Raises InputError where the teacher of a distillation is step-distilled, and gives no scores; or not the asked ones."""
    if config.vsd.weight > 0 and config.vsd.guidance_rescale and getattr(teacher, "embeds_guidance", False):
        raise InputError(
            f"vsd.guidance_rescale: {config.teacher.model} takes its guidance scale as an input, so there is no unguided score "
            "whose spread its scores could get; set it to 0"
        )
    sign = step_distilled(teacher, config.teacher.model) if config.vsd.weight > 0 else None
    if sign is not None:
        raise InputError(
            f"teacher.model: {config.teacher.model} is step-distilled ({sign}): it draws pictures, but gives no scores. "
            "Name it in synthesis.teacher, and in teacher.model the base model with its VAE"
        )


def drawing_guidance(config: Config, drawer: Space) -> float:
    """Guidance scale with which synthesis samples its pictures.

    Args:
        drawer: the Space of `synthesis.teacher`, or the teacher's where that is null.

    Raises:
        InputError: a step-distilled model is asked for guidance.
    """
    synthesis, model = config.synthesis, config.synthesis.teacher or config.teacher.model
    distilled, scale = step_distilled(drawer, model) is not None, synthesis.guidance_scale
    if scale is None and not distilled and synthesis.teacher is None:
        scale = config.teacher.guidance_scale
    if scale is None:
        scale = 0.0 if distilled else drawer.default_guidance_scale
    if distilled and scale > 1:
        raise InputError(
            f"synthesis.guidance_scale: {model} is step-distilled and takes no guidance (0 to 1), not {scale:g}"
        )
    return scale


def drawing(config: Config, drawer: Space) -> tuple[int, float]:
    """(steps, guidance scale) with which synthesis samples its pictures.

    Args:
        drawer: as of `drawing_guidance`.

    Raises:
        InputError: a step-distilled model is asked for more steps than it is made for, or for guidance.
    """
    model = config.synthesis.teacher or config.teacher.model
    own = own_steps(drawer, model)
    steps = config.synthesis.sampling_steps or own or config.teacher.sampling_steps
    if own is not None and steps > MOST_STEPS:
        raise InputError(
            f"synthesis.sampling_steps: {model} is step-distilled and draws in 1 to {MOST_STEPS} steps, not {steps}"
        )
    return steps, drawing_guidance(config, drawer)
