"""The student as one safetensors file in Stable Diffusion's original layout, for ComfyUI, A1111-style tools, diffusers.

Such a file has no place for a scheduler. Its metadata, the ComfyUI workflow and the README beside it say how to draw.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import diffusers
import torch

from raydistill.errors import InputError
from raydistill.export.cards import outside_card
from raydistill.export.comfyui import workflow
from raydistill.export.one_picture import difference
from raydistill.export.original_layout import original_names
from raydistill.export.source import Export, open_one_step
from raydistill.export.tensors import locate, read_tensor, write_safetensors
from raydistill.spaces.base import Space
from raydistill.spaces.weights import Entry

CONFIG = "config"  # folder of the pipeline's settings without weights, for `from_single_file`
TOLERANCE = 0.01  # 255ths: the same weights in float32


def start_sigma(space: Space, start_timestep: int) -> float:
    """Noise over signal at the start, which k-diffusion's samplers count in: sqrt((1 - alpha_bar) / alpha_bar)."""
    alpha_bar = float(space.scheduler.alphas_cumprod[start_timestep].double())
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def write_single_file(export: Export, folder: Path) -> float:
    """Write `<name>.safetensors`, `config/`, `<name>-comfyui.json` and README.md; then draw a picture from the file.

    Args:
        export: the student; its dtype is kept.
        folder: an empty one.

    Returns the mean difference of that picture from the export's own, in 255ths.

    Raises:
        InputError: no one-step student, a network that the layout has no place for, or another picture.
    """
    space, start = open_one_step(export, "--format single-file")
    if not space.original_layout:
        raise InputError(
            f"--format single-file: {export.folder} is a {space.pipeline_class}, whose original layout is not written; take "
            "the folder, or --format lora"
        )
    sigma, name = start_sigma(space, start), export.name.replace("/", "-")
    file = folder / f"{name}.safetensors"
    _write_weights(space, file, _metadata(space, name, start, sigma))
    _copy_settings(Path(space.folder), folder / CONFIG)
    graph = workflow(file.name, start, sigma, space.prediction, space.resolution)
    (folder / f"{name}-comfyui.json").write_text(json.dumps(graph, indent=2) + "\n", encoding="utf-8")
    usage = _USAGE.format(file=file.name, start=start, sigma=f"{sigma:.6f}", side=space.resolution, name=name)
    (folder / "README.md").write_text(outside_card(Path(space.folder), usage), encoding="utf-8")
    found = difference(space, lambda: load_single_file(file, space.pipeline_class))
    if found > TOLERANCE:
        raise InputError(f"{file}: draws another picture than {space.folder} (mean difference {found:.3g} / 255)")
    return found


def load_single_file(file: Path, pipeline_class: str = "StableDiffusionPipeline") -> diffusers.DiffusionPipeline:
    """The written file in float32, as its README says. No network."""
    return getattr(diffusers, pipeline_class).from_single_file(
        str(file), config=str(file.parent / CONFIG), local_files_only=True, dtype=torch.float32
    )


def _write_weights(space: Space, file: Path, metadata: dict[str, str]) -> None:
    located = {part: locate(Path(space.folder, part)) for part in ("unet", "vae", "text_encoder")}
    names = original_names(*located.values(), space.part_config("unet"))

    def entry(original: str) -> Entry:
        part, joined = names[original]
        (rows, *rest), dtype = located[part][joined[0]][1]
        # the original's attention in the VAE has convolutions of one pixel where diffusers has linear layers
        pixel = (1, 1) if ".attn_1." in original and len(rest) == 1 else ()
        return Entry((rows * len(joined), *rest, *pixel), dtype)

    entries = {original: entry(original) for original in names}

    def tensor(original: str) -> torch.Tensor:
        part, joined = names[original]
        rows = [read_tensor(located[part][name][0], name) for name in joined]
        return torch.cat(rows).reshape(entries[original].shape)

    write_safetensors(file, entries, tensor, metadata)


def _metadata(space: Space, name: str, start: int, sigma: float) -> dict[str, str]:
    """How to draw, for people, and what tools read of a file: the fields of Stability AI's ModelSpec."""
    second = bool(space.part_config("unet").get("use_linear_projection"))
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v2-512" if second else "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{space.resolution}x{space.resolution}",
        "modelspec.prediction_type": "v" if space.prediction == "v_prediction" else "epsilon",
        "modelspec.usage_hint": f"one step: sampler euler, 1 step, CFG 1, sigmas {sigma:.6f} and 0",
        "raydistill.start_timestep": str(start),
        "raydistill.sigmas": f"{sigma:.6f}, 0",
        "raydistill.steps": "1",
        "raydistill.cfg": "1",
        "raydistill.sampler": "euler",
    }


def _copy_settings(source: Path, target: Path) -> None:
    """Everything of a pipeline folder but weights and model card."""
    for file in source.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".txt", ".model") and ".safetensors" not in file.name:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


_USAGE = """# One-step text-to-image student, one file

**Draw with 1 step and CFG 1 (guidance off).** Other settings draw grey or broken pictures.

| setting | value |
|---|---|
| steps | 1 |
| CFG scale, guidance | 1 (diffusers: `guidance_scale=0`) |
| sampler | Euler |
| sigmas | {sigma}, 0 (start timestep {start}) |
| size | {side} × {side} |

`{file}` has Stable Diffusion's original layout. It holds no scheduler.

diffusers, without network. Without `config` diffusers downloads the settings of SD 1.5 or 2.1, whose scheduler is wrong:

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_single_file("{file}", config="config", local_files_only=True)
image = pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0]
```

ComfyUI: put the file into `models/checkpoints/` and open `{name}-comfyui.json` (API format) with *Workflow > Open*.
"""
