"""How deep a network is: its blocks, a network with fewer of them, and where the discriminator reads.

Shapes: B samples, D features, h×w of a block's map.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from raydistill.spaces.folder import ModelFolder


class Depth(ModelFolder):
    """What a family says of its network's blocks."""

    block_lists: ClassVar[tuple[str, ...]] = ()  # the network's lists of transformer blocks, in order of execution

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The transformer blocks that image tokens pass, in order; none in a UNet, which is no plain list of blocks."""
        return [block for name in self.block_lists for block in getattr(network, name)]

    def large_blocks(self, network: nn.Module) -> list[nn.Module]:
        """Modules that run one after another and hold nearly all of the network: its blocks, also those of a UNet."""
        return self.blocks(network)

    def truncated(self, network: nn.Module, first: int, last: int) -> nn.Module:
        """The network without the blocks between its first `first` and its last `last` ones.

        It is changed in place and returned, so that the dropped blocks' memory is free once nobody else holds them.
        At least one block stays at either end: the embedding needs the first, the output layer is made for the last.

        Raises:
            ValueError: a UNet, or numbers that are below 1 or more than its blocks.
        """
        blocks = self.blocks(network)
        if not blocks:
            raise ValueError(
                f"the network of a {self.pipeline_class} is a UNet, whose skip connections need every block"
            )
        if first < 1 or last < 1 or first + last > len(blocks):
            raise ValueError(
                f"the first {first} and the last {last} blocks of {len(blocks)}, which the network of this "
                f"{self.pipeline_class} has: each must be at least 1, and both together at most {len(blocks)}"
            )
        dropped = {id(block) for block in blocks[first : len(blocks) - last]}
        for name in self.block_lists:
            kept = [block for block in getattr(network, name) if id(block) not in dropped]
            setattr(network, name, nn.ModuleList(kept))
        return network

    # -- features for the discriminator --------------------------------------------------------------
    def feature_block(self, network: nn.Module, depth_fraction: float) -> nn.Module:
        """The block whose output is read, at this share of the network's depth."""
        blocks = self.blocks(network)
        if not blocks:
            raise NotImplementedError(
                f"{type(self).__name__} names no block_lists, and has no feature_block of its own"
            )
        return blocks[max(1, round(depth_fraction * len(blocks))) - 1]

    def feature_blocks(self, network: nn.Module, depths: Sequence[float]) -> list[nn.Module]:
        """Those at several depths, which increase."""
        return [self.feature_block(network, depth) for depth in depths]

    @abstractmethod
    def feature_map(self, output: Any, x_t: torch.Tensor) -> torch.Tensor:
        """That block's output as an image [B, D, h, w]."""
