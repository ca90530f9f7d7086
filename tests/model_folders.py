"""A model folder that tests change, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raydistill.errors import InputError
from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder

VAE, UNET, INDEX, SCHEDULER = (
    "vae/config.json",
    "unet/config.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
)
TEXT = "text_encoder/config.json"
VAE_WEIGHTS, UNET_WEIGHTS = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet"))
TEXT_WEIGHTS = "text_encoder/model.safetensors"


def sd15_copy(target: Path) -> Path:
    """A copy of the miniature SD 1.5."""
    return shutil.copytree(WEIGHTS / "sd15", target)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lose(file: Path, key: str) -> None:
    content = json.loads(file.read_text())
    content.pop(key, None)
    file.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    """The one line of an error about this folder."""
    with pytest.raises(InputError) as error:
        check_folder(load_space(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def said(*calls: Callable[[], object]) -> str:
    """The errors of these calls, one a line; other kinds of errors are raised."""
    lines = []
    for call in calls:
        try:
            call()
        except InputError as error:
            lines.append(str(error))
    assert all("\n" not in line for line in lines)
    return "\n".join(lines)


def used(folder: Path) -> None:
    """Check a folder and load all of it."""
    space = load_space(folder)
    check_folder(space)
    space.load_text(), space.load_network(), space.load_vae()
