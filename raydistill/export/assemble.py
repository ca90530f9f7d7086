"""A step-distilled model as a pipeline folder: a base model with a published network, or a LoRA, in its place.

SDXL-Lightning (arXiv 2402.13929), Hyper-SD (arXiv 2404.13686) and others publish these alone. Their cards give such models Euler
steps on trailing timesteps, and no guidance. In a folder they can be named wherever a model can, as in `synthesis.teacher`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from raydistill.errors import InputError
from raydistill.export.parts import STEMS, copy_part, forget_origin, rounded
from raydistill.spaces import load_space
from raydistill.spaces.discrete import DiscreteSpace
from raydistill.spaces.distilled import MOST_STEPS, STEPS_KEY, step_distilled
from raydistill.spaces.starts import load_start
from raydistill.storage.resolve import resolve, resolve_file


def open_base(model: str, steps: int) -> DiscreteSpace:
    """The base model. Raises InputError: it cannot be one, or the steps are none of a step-distilled model."""
    if not 1 < steps <= MOST_STEPS:
        raise InputError(
            f"--steps {steps}: step-distilled models that predict noise draw in 2 to {MOST_STEPS}; those of one step predict the "
            "picture, and are students (student.unet)"
        )
    space = load_space(resolve(model))
    if not isinstance(space, DiscreteSpace):
        raise InputError(f"{model}: a {space.pipeline_class} draws on a flow, not in Euler steps on betas")
    if (sign := step_distilled(space, model)) is not None:
        raise InputError(f"{model}: is step-distilled already ({sign})")
    return space


def assemble(
    space: DiscreteSpace, folder: Path, *, steps: int, network: str | None, lora: str | None, dtype: str = "float16"
) -> None:
    """Write the pipeline to an empty folder.

    Args:
        steps: evaluations of a picture.
        network: file or folder of the weights, also org/name[@revision]/file.safetensors; None: the base's.
        lora: is merged into them.
        dtype: of the network's weights.

    Raises:
        InputError: the weights do not fit the base, or one cannot be read safely.
    """
    weights = _start(space, network and str(resolve_file(network)), lora)
    named = space.parts()
    for part in named.keys() - {space.network_name, "scheduler", *space.unused_parts}:
        copy_part(Path(space.folder, part), folder / part)
    place = folder / space.network_name
    weights.save_config(place)
    forget_origin(place / "config.json")
    kept = rounded(weights.state_dict(), getattr(torch, dtype), network or lora or "")
    save_file(kept, place / f"{STEMS[0]}.safetensors", {"format": "pt"})
    scheduler = EulerDiscreteScheduler.from_config(space.scheduler.config, timestep_spacing="trailing")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads(Path(space.folder, "model_index.json").read_text(encoding="utf-8"))
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"], STEPS_KEY: steps}
    index |= {part: [None, None] for part in space.unused_parts if part in index}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _start(space: DiscreteSpace, network: str | None, lora: str | None) -> torch.nn.Module:
    """Errors name the options instead of the student's keys."""
    try:
        return load_start(space, network, lora)
    except InputError as error:
        raise InputError(
            str(error).replace("student.lora_start", "--lora").replace("student.unet", "--network")
        ) from None
