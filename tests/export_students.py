"""One-step exports of the miniature world's trained students, for tests of what is made of an export."""

from __future__ import annotations

from pathlib import Path

import torch

from raydistill.export.pipeline import ModelCard, export_student
from raydistill.export.source import Export
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.published_students import load_student

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}


def one_step_of(model: str) -> tuple[Path, Path]:
    """(UNet folder of the base, UNet folder of the one-step student) of sd15 or sd21."""
    return WEIGHTS / model / "unet", WEIGHTS / f"{model}-onestep" / "unet"


def export_of(model: str, start_timestep: int, folder: Path, dtype: torch.dtype = torch.float16) -> Export:
    """The export of the one-step student that the package ships; its name is that of the folder above `export`."""
    space = load_space(WEIGHTS / model)
    unet = load_student(space, WEIGHTS / f"{model}-onestep")
    card = ModelCard(teacher="shapes:flux", teacher_class="FluxPipeline", student=f"shapes:{model}", steps=120)
    export_student(space, unet, start_timestep, folder, card, dtype)
    return Export(folder, folder.parent.name, folder.parent)
