"""Convolutions whose weights and maps have the channels last in memory: what a GPU's kernels for 16-bit UNets take.

torch's "channels last" memory format. A convolution with such weights answers in it, so the maps of a UNet follow. The numbers
are the same up to the kernels' own rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from raydistill.spaces.base import Space


def lay_out(space: Space, network: nn.Module) -> bool:
    """Change a UNet's weights in place; False: it is a transformer, of which nothing is changed."""
    if space.blocks(network):
        return False
    network.to(memory_format=torch.channels_last)
    return True


def untouched(network: nn.Module, key: str) -> str:
    """What to say of a transformer."""
    return f"{key}: a {type(network).__name__} is no UNet; it stays as it is"
