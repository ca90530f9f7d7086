"""The LoRA of a student that was trained as one: exactly what the run has learned, beside the merged pipeline.

`export/lora` holds the file that diffusers' `load_lora_weights` finds, the one-step scheduler, and how to load both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn

from raydistill.export.few_steps import steps_of
from raydistill.export.one_picture import written_arguments
from raydistill.spaces.adapter import lora_state
from raydistill.spaces.base import Space
from raydistill.storage.atomic import read_json
from raydistill.storage.hub import HUB_FILE, HUB_ID

FOLDER = "lora"  # of an export
BEGINS = "begins.json"  # what the LoRA is put on
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: `load_lora_weights(folder)` finds it


@dataclass(frozen=True)
class Begins:
    """What a LoRA is put on: `student.model`, `student.unet` and `student.lora_start`, as they were configured."""

    base: str
    unet: str | None = None
    lora: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Begins | None:
        """As `write_own_lora` has noted it; None: in no such file."""
        file = folder / BEGINS
        return cls(**read_json(file, "export the run again")) if file.is_file() else None


def write_own_lora(
    space: Space, network: nn.Module, scheduler: SchedulerMixin, begins: Begins, folder: Path, readme: str = ""
) -> None:
    """Write a network's LoRA in float32, as it was trained, and what it needs: scheduler and beginning; a new folder."""
    folder.mkdir()
    state, config = lora_state(network)
    save_lora(space, state, config, folder)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / BEGINS).write_text(json.dumps(asdict(begins), indent=2), encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")


def save_lora(space: Space, state: Mapping[str, torch.Tensor], config: Mapping[str, object], folder: Path) -> None:
    """Write a LoRA of the network as diffusers' pipeline of its family loads it.

    Args:
        state: peft's tensors, without the network's name in front.
        config: peft's, as a dictionary.
    """
    part = space.network_name
    layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
    getattr(diffusers, space.pipeline_class).save_lora_weights(folder, safe_serialization=True, **layers)


def repository(model: str) -> str:
    """A model's name without its revision; a path stays."""
    match = None if Path(model).exists() else HUB_ID.fullmatch(model)
    return match["repo"] if match else model


def from_pretrained(model: str) -> str:
    """The arguments of diffusers' `from_pretrained` for a model: its name or path, and its revision where it has one."""
    match = None if Path(model).exists() else HUB_ID.fullmatch(model)
    revision = match["revision"] if match else None
    return json.dumps(repository(model)) + (f", revision={json.dumps(revision)}" if revision else "")


def usage_of(space: Space, begins: Begins, scheduler: SchedulerMixin, start: int, report: str = "") -> str:
    """How to load a student's own LoRA.

    Args:
        start: timestep.
        report: what was found of it.
    """
    before = ""
    if begins.unet is not None:
        part, noun = space.network_name, space.student_noun.split()[-1]
        before = f"# it was trained on another {noun}: put that of {begins.unet} into pipe.{part} here\n"
    if begins.lora is not None:
        match = None if Path(begins.lora).exists() else HUB_FILE.fullmatch(begins.lora)
        place = json.dumps(match["repo"] if match else begins.lora)
        for name, key in (("weight_name", "file"), ("revision", "revision")):
            place += f", {name}={json.dumps(match[key])}" if match and match[key] else ""
        before += f"pipe.load_lora_weights({place})  # its start\npipe.fuse_lora()\npipe.unload_lora_weights()\n"
    return _USAGE.format(
        base=begins.base,
        arguments=from_pretrained(begins.base),
        pipeline=space.pipeline_class,
        report=f": {report}" if report else "",
        before=before,
        scheduler=type(scheduler).__name__,
        start=start,
        steps=steps_of(scheduler.config),
        call=written_arguments(space, steps_of(scheduler.config)),
    )


_USAGE = """# Text-to-image student, LoRA

**Draw with num_inference_steps={steps} and guidance off, and with the scheduler of this folder.** Other settings draw grey or broken pictures.

The student was trained as a LoRA on its base, {base}{report}.

```python
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.from_pretrained({arguments})
{before}pipe.scheduler = {scheduler}.from_pretrained("PATH_OF_THIS_FOLDER", subfolder="scheduler")
pipe.load_lora_weights("PATH_OF_THIS_FOLDER")
image = pipe("a prompt", {call}).images[0]
```

Start timestep: {start}. The export is the same student, merged.
"""
