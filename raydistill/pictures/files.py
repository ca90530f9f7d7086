"""Files of pictures: uint8 safetensors of a few pictures [N, 3, S, S] in [-1, 1]."""

from __future__ import annotations

import torch

from raydistill.storage.atomic import reading, replacing
from raydistill.storage.place import Place


def save_pictures(file: Place, pictures: torch.Tensor) -> None:
    """Write pictures, rounded to 256 levels."""
    from safetensors.torch import save_file

    with replacing(file) as local:
        save_file({"pictures": ((pictures + 1) * 127.5).round().to(torch.uint8).contiguous()}, local)


def load_pictures(file: Place) -> torch.Tensor:
    """What `save_pictures` wrote, back in [-1, 1]."""
    from safetensors.torch import load_file

    with reading(file) as local:
        return load_file(local)["pictures"].float() / 127.5 - 1
