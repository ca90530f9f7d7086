"""One picture of a student in whichever form it was written, to compare with the export's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from raydistill.errors import InputError
from raydistill.export.few_steps import steps_of
from raydistill.spaces.base import Space
from raydistill.spaces.folder import without_bars

PROMPT = "a small red circle at the left on a white background"
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}


def written_arguments(family: Space | type[Space], steps: int = 1) -> str:
    """Arguments of a pipeline's call besides the prompt, as they are written, for a student of so many steps."""
    asked = ONE_STEP | {"num_inference_steps": steps} | dict(family.call_arguments)
    return ", ".join(f"{name}={value!r}" for name, value in asked.items())


def picture(space: Space, load: Callable[[], DiffusionPipeline], noise: torch.Tensor) -> torch.Tensor:
    """The picture [1, 3, S, S] in [0, 1] that an exported student draws of `PROMPT` from noise [1, C, h, w]."""
    with without_bars():
        pipe = load()
        pipe.set_progress_bar_config(disable=True)
        asked = ONE_STEP | {"num_inference_steps": steps_of(pipe.scheduler.config)} | dict(space.call_arguments)
        again = torch.Generator().manual_seed(1)  # of the noise of later steps
        return pipe(PROMPT, latents=noise, output_type="pt", generator=again, **asked).images.float()


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
