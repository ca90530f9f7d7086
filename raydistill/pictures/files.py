"""Files of pictures: PNG files that say how they were made, and lossless stores of a few tensors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from raydistill.storage.atomic import reading, replacing
from raydistill.storage.place import Place

# -- PNG ------------------------------------------------------------------------------------------------


def save_png(file: Path, picture: Image.Image, facts: Mapping[str, str]) -> None:
    """Write one PNG with these texts inside."""
    entries = PngInfo()
    for key, value in facts.items():
        entries.add_itxt(key, value)
    with replacing(file) as fresh:
        picture.save(fresh, format="PNG", pnginfo=entries)


def png_bytes(picture: Image.Image, compress_level: int = 6) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def load_image(file: str | Path | io.BytesIO) -> torch.Tensor:
    """A picture file of any format -> [3, H, W] in [-1, 1]."""
    with Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


# -- tensors --------------------------------------------------------------------------------------------


def save_pictures(file: Place, pictures: torch.Tensor) -> None:
    """Lossless small store of pictures [N, 3, S, S] in [-1, 1]: uint8 safetensors."""
    with replacing(file) as local:
        save_file({"pictures": ((pictures + 1) * 127.5).round().to(torch.uint8).contiguous()}, local)


def load_pictures(file: Place) -> torch.Tensor:
    """What `save_pictures` wrote, back in [-1, 1]."""
    with reading(file) as local:
        return load_file(local)["pictures"].float() / 127.5 - 1
