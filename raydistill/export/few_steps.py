"""Students of a few steps in diffusers: the scheduler that draws exactly what the student draws, and how it is called.

LCMScheduler (arXiv 2310.04378) noises each estimate of the picture again, and its first input is plain noise. Its
boundary condition c_skip x_t + c_out x_0 is exact in the limit of a large `timestep_scaling` s: with t s = 1e12 or more,
c_out is 1 and c_skip below 1e-24. Its timesteps are `student_timesteps` where `original_inference_steps` is the number of
steps. More steps than that it refuses, so that a call with a prompt alone, which takes 50, draws no grey picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import LCMScheduler

from raydistill.diffusion.timesteps import least_start, student_timesteps
from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.settings import read_settings

SCALING = 1e10  # `timestep_scaling`
STEPS = (2, 4)  # of a student of several


def few_step_scheduler(space: Space, start_timestep: int, steps: int) -> LCMScheduler:
    """The scheduler that takes a student's steps where there are several.

    Raises:
        InputError: the start timestep is not on the path, or the student is no diffusion model on discrete steps.
    """
    if space.prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{space.folder}: no scheduler of few steps for a network that predicts {space.prediction}")
    last = space.path.num_train_timesteps - 1
    if not least_start(steps) <= start_timestep <= last:
        raise InputError(
            f"start_timestep {start_timestep} is outside {least_start(steps)} … {last}, of {steps} steps on {space.folder}"
        )
    first = student_timesteps(start_timestep, steps)[0]
    if first == last:
        config, names = space.part_config("scheduler"), ("beta_start", "beta_end", "beta_schedule", "trained_betas")
        betas = {name: config[name] for name in names if config.get(name) is not None}
    else:
        betas = {"trained_betas": space.path.betas[: first + 1].tolist()}
    return LCMScheduler(
        num_train_timesteps=first + 1,
        original_inference_steps=steps,
        timestep_scaling=SCALING,
        prediction_type=space.prediction,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # it is not read here, and StableDiffusionPipeline warns of another
        **betas,
    )


def is_few_step(name: str, config: Any) -> bool:
    """Whether a scheduler of this class and configuration is a `few_step_scheduler`."""
    return (
        name == "LCMScheduler"
        and config.get("timestep_scaling") == SCALING
        and config.get("original_inference_steps") in STEPS
        and not config.get("clip_sample")
        and not config.get("thresholding")
    )


def steps_of(config: Any) -> int:
    """The steps that an exported student takes, of its scheduler's configuration."""
    return config["original_inference_steps"] if config.get("timestep_scaling") == SCALING else 1


def steps_of_folder(folder: Path) -> int:
    """The same of a pipeline's folder."""
    return steps_of(read_settings(Path(folder, "scheduler", "scheduler_config.json")))


_FEW = """
> **Call it with `{arguments}`.** With a prompt alone, diffusers asks for 50 guided steps, and
> the scheduler refuses them. A folder cannot change these defaults.

The folder is an ordinary `{pipeline}`; nothing else is needed to run it.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("PATH_OF_THIS_FOLDER", dtype=torch.{dtype})
image = pipe("a prompt", {arguments}).images[0]
```

The scheduler's configuration belongs to the model. After each step but the last it noises the student's estimate again.
The folder has no safety checker.
"""


def few_step_usage(arguments: str, pipeline: str, dtype: str) -> str:
    """How an export of several steps is called, for its model card."""
    return _FEW.format(arguments=arguments, pipeline=pipeline, dtype=dtype)
