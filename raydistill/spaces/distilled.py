"""Step-distilled models: they draw a picture in a few evaluations, and give no scores.

Their networks no longer estimate x0 of a noised latent as a diffusion model does, so they cannot teach. They may draw. Where no
score is asked (vsd.weight=0) one may be the teacher: the fake score starts from it and is trained on as a diffusion model, and the
discriminator reads its features.
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
STEPS_KEY = "_distilled_steps"  # of model_index.json, in folders that `export.assemble` writes


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
    told = _told_steps(space)
    return f"{STEPS_KEY}={told} in {space.index.file}" if told else space.distilled_sign


def _told_steps(space: Space) -> int | None:
    """Raises InputError: the folder says something else than a number of steps."""
    told = space.index.get(STEPS_KEY)
    if told is not None and not (type(told) is int and 1 <= told <= MOST_STEPS):
        raise space.index.wrong(STEPS_KEY, f"1 to {MOST_STEPS}")
    return told


def own_steps(space: Space, model: str) -> int | None:
    """The evaluations of a picture, of a step-distilled model; None: it is none."""
    if step_distilled(space, model) is None:
        return None
    known = hub_models().get(_hub_id(model))
    return (known.distilled_steps if known else None) or _told_steps(space) or USUAL_STEPS


def check_scores(config: Config, teacher: Space) -> None:
    """Raises InputError where the teacher of a distillation is step-distilled, and gives no scores; or not the asked ones.

    So too where it is asked to draw as it cannot.
    """
    if config.vsd.weight > 0 and config.vsd.guidance_rescale and getattr(teacher, "embeds_guidance", False):
        raise InputError(
            f"vsd.guidance_rescale: {config.teacher.model} takes its guidance scale as an input, so there is no unguided score "
            "whose spread its scores could get; set it to 0"
        )
    sign = step_distilled(teacher, config.teacher.model)
    if sign is None:
        return
    if config.vsd.weight > 0:
        raise InputError(
            f"teacher.model: {config.teacher.model} is step-distilled ({sign}): it draws pictures, but gives no scores. "
            "Name it in synthesis.teacher, and in teacher.model the base model with its VAE; or set vsd.weight=0, and the "
            "discriminator alone teaches the student"
        )
    if (config.teacher.guidance_scale or 0) > 1:
        raise InputError(
            f"teacher.guidance_scale: {config.teacher.model} is step-distilled ({sign}) and takes no guidance (0 to 1), not "
            f"{config.teacher.guidance_scale:g}"
        )


def check_shared_space(config: Config, student: Space) -> None:
    """Raises InputError where the control in the student's own space has no scores to learn from."""
    if "shared_space" not in config.controls:
        return
    if config.vsd.weight == 0:
        raise InputError(
            "controls: shared_space learns from scores alone, and vsd.weight=0 asks for none; leave it out"
        )
    if (sign := step_distilled(student, config.student.model)) is not None:
        raise InputError(
            f"controls: the teacher of shared_space is student.model={config.student.model}, which is step-distilled ({sign}) "
            "and gives no scores; leave it out"
        )


def without_scores(config: Config, teacher: Space) -> tuple[str, ...]:
    """A note where the teacher is step-distilled, and is asked for no score."""
    sign = step_distilled(teacher, config.teacher.model)
    if sign is None or config.vsd.weight > 0:
        return ()
    steps, _ = teacher_sampling(config, teacher)
    return (
        f"note: teacher.model: {config.teacher.model} is step-distilled ({sign}), and vsd.weight=0 asks it for no score: the fake "
        f"score starts from it, the discriminator reads its features, and it draws in {steps} steps without guidance",
    )


def teacher_sampling(config: Config, teacher: Space) -> tuple[int, float]:
    """(steps, guidance scale) with which the teacher draws the pictures that it is compared by."""
    steps, scale = config.teacher.sampling_steps, config.teacher.guidance_scale
    own = own_steps(teacher, config.teacher.model)
    if own is None:
        return steps, teacher.default_guidance_scale if scale is None else scale
    return steps if steps <= MOST_STEPS else own, scale or 0.0


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
