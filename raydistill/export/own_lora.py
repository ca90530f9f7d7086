"""The LoRA of a student that was trained as one: exactly what the run has learned, beside the merged pipeline.

`export/lora` holds the file that diffusers' `load_lora_weights` finds, the one-step scheduler, and how to load both.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
from diffusers import SchedulerMixin
from torch import nn

from raydistill.spaces.adapter import lora_state
from raydistill.spaces.base import Space
from raydistill.storage.hub import HUB_FILE

FOLDER = "lora"  # of an export
FILE = "pytorch_lora_weights.safetensors"  # diffusers' name: `load_lora_weights(folder)` finds it


def write_own_lora(space: Space, network: nn.Module, scheduler: SchedulerMixin, folder: Path, readme: str = "") -> None:
    """Write a network's LoRA in float32, as it was trained, and the scheduler that it needs, into a new folder."""
    folder.mkdir()
    state, config = lora_state(network)
    getattr(diffusers, space.pipeline_class).save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=config, safe_serialization=True
    )
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "README.md").write_text(readme, encoding="utf-8")


def usage_of(
    space: Space, base: str, unet: str | None, lora: str | None, scheduler: SchedulerMixin, start: int, report: str = ""
) -> str:
    """How to load a student's own LoRA.

    Args:
        base, unet, lora: `student.model`, `student.unet` and `student.lora_start`.
        start: timestep.
        report: what was found of it.
    """
    before = "" if unet is None else f"# it was trained on another UNet: put that of {unet} into pipe.unet here\n"
    if lora is not None:
        match = None if Path(lora).exists() else HUB_FILE.fullmatch(lora)
        place = repr(match["repo"] if match else lora)
        place += f", weight_name={match['file']!r}" if match and match["file"] else ""
        before += f"pipe.load_lora_weights({place})  # its start\npipe.fuse_lora()\npipe.unload_lora_weights()\n"
    return _USAGE.format(
        base=base,
        pipeline=space.pipeline_class,
        report=f": {report}" if report else "",
        before=before,
        scheduler=type(scheduler).__name__,
        start=start,
    )


_USAGE = """# One-step text-to-image student, LoRA

**Draw with 1 step and guidance off, and with the scheduler of this folder.** Other settings draw grey or broken pictures.

The student was trained as a LoRA on its base, {base}{report}.

```python
from diffusers import {scheduler}, {pipeline}

pipe = {pipeline}.from_pretrained("{base}")
{before}pipe.scheduler = {scheduler}.from_pretrained("PATH_OF_THIS_FOLDER", subfolder="scheduler")
pipe.load_lora_weights("PATH_OF_THIS_FOLDER")
image = pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0]
```

Start timestep: {start}. The export is the same student, merged.
"""
