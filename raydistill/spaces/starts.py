"""What a student starts from: the pipeline's own network or a published one in its place, and a LoRA that is merged into it.

A LoRA is read from safetensors alone. diffusers reads its names (its own, peft's, kohya's) and merges it, as
`load_lora_weights` and `fuse_lora` of a pipeline do. Nothing of it stays beside the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from raydistill.errors import InputError
from raydistill.spaces.base import Space
from raydistill.spaces.meta import empty_part
from raydistill.spaces.published_students import load_student
from raydistill.spaces.weights import read_header
from raydistill.storage.hub import LORA_FILE
from raydistill.storage.resolve import resolve, resolve_file

_OF_LORA = re.compile(r"[._]lora[._].*")  # what follows the name of an adapted layer


def load_start(space: Space, unet: str | None, lora: str | None = None) -> nn.Module:
    """The student's starting network, float32, on the CPU, frozen.

    Args:
        unet: `student.unet`; None: the pipeline's own.
        lora: `student.lora_start`; None: none.

    Raises:
        InputError: the checkpoint is no student of this family, the LoRA does not fit it, or one cannot be read safely.
    """
    network = space.load_network() if unet is None else load_student(space, resolve(unet))
    if lora is not None:
        _add(space, network, lora_file(resolve_file(lora)))
        network.fuse_lora()
        network.unload_lora()
        broken = next((name for name, value in network.state_dict().items() if not value.isfinite().all()), None)
        if broken is not None:
            raise InputError(f"student.lora_start: {lora}: with it, {broken} holds NaN or infinity")
    return network.eval().requires_grad_(False)


def check_lora(space: Space, lora: str) -> str:
    """See that a LoRA fits the student, without the student's weights; returns a line that says which file it is.

    Raises:
        InputError: names key and file.
    """
    file = lora_file(resolve_file(lora))
    layers = _add(space, empty_part(space, space.network_name), file)
    return f"student starts with the LoRA {file} merged into {layers} layers"


def lora_file(path: Path) -> Path:
    """The LoRA that a file or folder holds. Raises InputError: none in safetensors, or several."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        usual = [file for file in found if file.name == LORA_FILE]
        if len(usual or found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise InputError(f"student.lora_start: {path}: name one file; its .safetensors: {names}")
        return (usual or found)[0]
    if path.suffix != ".safetensors":
        raise InputError(f"student.lora_start: {path}: a LoRA is read from .safetensors alone, never from a pickle")
    return path


def _add(space: Space, network: nn.Module, file: Path) -> int:
    """Add a file's LoRA to a network, by diffusers; returns how many layers it adapts. Raises InputError."""

    def wrong(why: str) -> InputError:
        return InputError(f"student.lora_start: {file}: {why}")

    space.check_takes_lora("student.lora_start")
    kind = space.student_noun.split()[-1]
    part, names = space.network_name, read_header(file).tensors
    if stray := next((name for name in names if "lora" not in name.lower() and not name.endswith("alpha")), None):
        raise wrong(f"no LoRA ({stray} is not a tensor of one)")
    pipeline_class: Any = getattr(diffusers, space.pipeline_class)
    try:
        state, *alphas, about = pipeline_class.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
            **{f"{part}_config": network.config},
        )
        if stray := next((name for name in state if name.startswith("text_encoder")), None):
            raise wrong(f"it changes a text encoder too ({stray}), which a student has of its base")
        given = {part: network, "metadata": about, "low_cpu_mem_usage": True}
        given |= {"network_alphas": alphas[0]} if alphas else {}  # only UNets' loaders read those of kohya
        getattr(pipeline_class, f"load_lora_into_{part}")(state, **given)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:  # of diffusers and peft
        if isinstance(error, InputError):
            raise
        raise wrong(
            f"does not fit the {kind} of {space.folder} ({str(error).strip().splitlines()[-1].strip()})"
        ) from None
    wanted = {_OF_LORA.sub("", name) for name in state}
    adapted = sum(isinstance(layer, BaseTunerLayer) for layer in network.modules())
    if adapted != len(wanted):
        raise wrong(f"does not fit the {kind} of {space.folder}: {adapted} of its {len(wanted)} layers are there")
    return adapted
