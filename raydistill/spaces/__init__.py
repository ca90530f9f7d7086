"""One file per model family. `load_space` reads a pipeline folder's model_index.json and picks its family."""

from __future__ import annotations

from pathlib import Path

from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Space, read_settings
from raydistill.spaces.flux import FluxSpace
from raydistill.spaces.flux2 import Flux2KleinSpace
from raydistill.spaces.kolors import KolorsSpace
from raydistill.spaces.pixart import PixArtSigmaSpace
from raydistill.spaces.sd import StableDiffusionSpace
from raydistill.spaces.sd3 import StableDiffusion3Space
from raydistill.spaces.sdxl import SDXLSpace
from raydistill.spaces.z_image import ZImageSpace
from raydistill.storage.staging import on_this_machine

FAMILIES: dict[str, type[Space]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusionSpace, SDXLSpace, KolorsSpace, PixArtSigmaSpace,
        StableDiffusion3Space, FluxSpace, Flux2KleinSpace, ZImageSpace,
    )
}  # fmt: skip

__all__ = ["FAMILIES", "Conditioning", "InputError", "Space", "load_space"]


def load_space(folder: str | Path, family: str | None = None) -> Space:
    """The Space of a diffusers pipeline folder.

    Args:
        folder: a folder with model_index.json.
        family: the pipeline class it must be, or None for any known one.

    Raises:
        InputError: not a pipeline folder, or of an unknown or another family.
    """
    folder = on_this_machine(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder}: not a diffusers pipeline folder (no model_index.json)")
    found = read_settings(index).get("_class_name")
    if family is not None and found != family:
        raise InputError(f"{folder}: is a {found}, but a {family} is needed here")
    if found not in FAMILIES:
        raise InputError(f"{folder}: {found} is not a known family; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[found](folder)
