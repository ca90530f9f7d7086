"""One file per model family. `load_space` reads a pipeline folder's model_index.json and picks its family.

A family from outside the package is added in two steps:

1.  A module of your own defines one subclass of `Space` (or of `FlowSpace`, `DiscreteSpace`). `@register` adds it to this
    process, which is enough for a notebook or a test.
2.  A run has many processes, on many machines: trainers, teacher ranks, encoders, synthesis actors. Each of them opens
    model folders by itself. So the package of that module names the family in its metadata, by the pipeline's class:

        [project.entry-points."raydistill.families"]
        AuraFlowPipeline = "my_package.aura_flow:AuraFlowSpace"

    Install this package wherever raydistill is installed. `load_space` then imports the module where it is needed.

`tests/aura_flow_family.py` is such a module.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

from raydistill.errors import InputError
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.chroma import ChromaSpace
from raydistill.spaces.flux import FluxSpace
from raydistill.spaces.flux2 import Flux2KleinSpace
from raydistill.spaces.hub_model import HubModel
from raydistill.spaces.kolors import KolorsSpace
from raydistill.spaces.pixart import PixArtAlphaSpace, PixArtSigmaSpace
from raydistill.spaces.qwen_image import QwenImageSpace
from raydistill.spaces.sana import SanaSpace
from raydistill.spaces.sd import StableDiffusionSpace
from raydistill.spaces.sd3 import StableDiffusion3Space
from raydistill.spaces.sdxl import SDXLSpace
from raydistill.spaces.settings import read_settings
from raydistill.spaces.z_image import ZImageSpace
from raydistill.storage.resolve import resolve

Family = TypeVar("Family", bound=type[Space])
ENTRY_POINTS = "raydistill.families"
REQUIRED = ("pipeline_class", "network_name", "lora_targets", "default_guidance_scale", "path", "prediction")
FAMILIES: dict[str, type[Space]] = {}  # those that this process knows, by pipeline class

__all__ = [
    "FAMILIES",
    "Conditioning",
    "InputError",
    "Space",
    "check_everywhere",
    "find_family",
    "hub_models",
    "load_space",
    "load_student_space",
    "register",
]


def register(family: Family) -> Family:
    """Add a family to this process; also a decorator. The module's docstring says how all processes learn of it.

    Raises:
        TypeError: the class lacks a member that a family must have.
        ValueError: another class has the same `pipeline_class`.
    """
    lacking = [*sorted(family.__abstractmethods__), *(name for name in REQUIRED if not hasattr(family, name))]
    if lacking:
        raise TypeError(f"{family.__qualname__}: a family must say its {', '.join(lacking)}")
    present = FAMILIES.setdefault(family.pipeline_class, family)
    if (present.__module__, present.__qualname__) != (family.__module__, family.__qualname__):
        raise ValueError(
            f"{family.pipeline_class}: {family.__module__}.{family.__qualname__} cannot be registered, since "
            f"{present.__module__}.{present.__qualname__} is"
        )
    FAMILIES[family.pipeline_class] = family  # the newer one, where its module was loaded again
    return family


for _family in (
    StableDiffusionSpace, SDXLSpace, KolorsSpace, PixArtSigmaSpace, PixArtAlphaSpace,
    StableDiffusion3Space, FluxSpace, Flux2KleinSpace, ZImageSpace, ChromaSpace, SanaSpace, QwenImageSpace,
):  # fmt: skip
    register(_family)
OWN = frozenset(FAMILIES)  # of this package


def find_family(pipeline_class: str) -> type[Space] | None:
    """The family of a pipeline class: registered here, or named by an installed package; None: there is none.

    Raises:
        InputError: a package names it, but it cannot be loaded.
    """
    if pipeline_class not in FAMILIES:
        for entry in entry_points(group=ENTRY_POINTS, name=pipeline_class):
            _load(entry)
    return FAMILIES.get(pipeline_class)


def _load(entry: EntryPoint) -> None:
    try:
        family = register(entry.load())
    except Exception as error:  # code from anywhere may fail in any way
        raise InputError(f"entry point {entry.name} = {entry.value} of {ENTRY_POINTS}: {error}") from error
    if family.pipeline_class != entry.name:
        raise InputError(
            f"entry point {entry.name} = {entry.value} of {ENTRY_POINTS}: its pipeline_class is {family.pipeline_class}"
        )


def hub_models() -> dict[str, HubModel]:
    """Public models of all families, also of those that installed packages name; by hub id."""
    for entry in entry_points(group=ENTRY_POINTS):
        find_family(entry.name)
    return {name: model for family in FAMILIES.values() for name, model in family.hub_models.items()}


def load_space(folder: str | Path, family: str | None = None) -> Space:
    """The Space of a diffusers pipeline folder, of a part of the miniature world (`shapes:flux`), or of a hub model.

    Args:
        folder: a path, `shapes:NAME`, a URI, or `org/name[@revision]`; what is not here is fetched.
        family: the pipeline class it must be, or None for any known one.

    Raises:
        InputError: not a pipeline folder, or of an unknown or another family.
    """
    folder = resolve(str(folder))
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder}: not a diffusers pipeline folder (no model_index.json)")
    settings = read_settings(index)
    found = settings["_class_name"]
    if not isinstance(found, str):
        raise settings.wrong("_class_name", "the name of a pipeline's class")
    if family is not None and found != family:
        raise InputError(f"{folder}: is a {found}, but a {family} is needed here")
    known = find_family(found)
    if known is None:
        raise InputError(
            f"{folder}: {found} is not a known family; known: {', '.join(sorted(FAMILIES))}. Install a package whose "
            f"entry point {found} in the group {ENTRY_POINTS} is its Space (see raydistill/spaces/__init__.py)"
        )
    return known(folder)


def load_student_space(folder: str | Path) -> Space:
    """`load_space` of a family that gives students. Raises InputError besides: another family."""
    space = load_space(folder)
    if not space.student_parts:
        ours = " or ".join(name for name, family in FAMILIES.items() if family.student_parts)
        raise InputError(f"{space.folder}: is a {space.pipeline_class}, but a {ours} is needed here")
    return space


def check_everywhere(space: Space) -> None:
    """See that the other processes of a run can find this Space's family too.

    Raises:
        InputError: it is registered in this process alone, or others would load another class.
    """
    name = space.pipeline_class
    if name in OWN:
        return
    entries = entry_points(group=ENTRY_POINTS, name=name)
    if not entries:
        raise InputError(
            f"{space.folder}: {name} is registered in this process alone, and a run has others; install a package whose "
            f"entry point {name} in the group {ENTRY_POINTS} is {type(space).__module__}:{type(space).__qualname__}"
        )
    for entry in entries:
        _load(entry)
