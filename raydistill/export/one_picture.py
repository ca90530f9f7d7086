"""One picture of a student in whichever form it was written, to compare with the export's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.folder import without_bars

PROMPT = "a small red circle at the left on a white background"
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}


def one_step_arguments(family: Space | type[Space]) -> str:
    """Arguments of a pipeline's call besides the prompt, as they are written."""
    return ", ".join(f"{name}={value}" for name, value in (ONE_STEP | dict(family.call_arguments)).items())


def picture(space: Space, load: Callable[[], DiffusionPipeline], noise: torch.Tensor) -> torch.Tensor:
    """The picture [1, 3, S, S] in [0, 1] that a pipeline draws of `PROMPT` from noise [1, C, h, w], in one step."""
    asked = ONE_STEP | dict(space.call_arguments)
    with without_bars():
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        return pipe(PROMPT, latents=noise, output_type="pt", **asked).images.float()


def difference(space: Space, load: Callable[[], DiffusionPipeline]) -> float:
    """Mean absolute difference of one picture from that of the export's folder, in 255ths of the range.

    Args:
        space: the export's.
        load: makes the other pipeline, in float32.

    Raises:
        InputError: the other picture is not finite.
    """
    noise = torch.randn(1, *space.latent_shape, generator=torch.Generator().manual_seed(0))
    own = picture(space, lambda: load_float32(Path(space.folder)), noise)
    other = picture(space, load, noise)
    if not other.isfinite().all():
        raise InputError("the picture that was drawn to check the result is not finite")
    return float((own - other).abs().mean() * 255)


def load_float32(folder: Path) -> DiffusionPipeline:
    """A pipeline folder in float32, safetensors alone."""
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
