"""Regional compilation of a worker's networks: the forward of every repeated block, one graph for all that are alike.

Compiled is `block.forward`, not the block. Hooks of a block run outside the graph then: the one that reads the
discriminator's features, and may end the pass by an exception, and those by which FSDP2 gathers a block.

Shapes are never dynamic: a graph would depend on the shapes that came before, and a resumed run would have other bits.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raydistill.bridge.swinir import SwinLayer
from raydistill.spaces.base import Space
from raydistill.teachers.speed import repeated_blocks

log = logging.getLogger(__name__)

BACKEND = "inductor"
GRAPHS = 64  # of one class of blocks: levels of a UNet, sizes of batches, with and without gradients. torch allows 8


def compile_forward(blocks: Iterable[nn.Module]) -> int:
    """Have each block's forward compiled when it first runs; a pass beyond GRAPHS graphs runs as it is, with torch's warning.

    Returns:
        how many there are.
    """
    count = 0
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND, dynamic=False, recompile_limit=GRAPHS)
        block.has_compiled_forward = True
        count += 1
    return count


@contextmanager
def as_it_is(*networks: Callable[..., Any]) -> Iterator[None]:
    """In the block these networks run without their graphs, and no graph is made for batches of other sizes.

    Pictures are drawn so: in batches of evaluation.batch_size, and a last one, once in hundreds of updates.
    """
    own = (network.modules() for network in networks if isinstance(network, nn.Module))
    if not any(hasattr(module, "has_compiled_forward") for module in itertools.chain.from_iterable(own)):
        yield  # what torch.compile needs is not imported
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def compile_network(space: Space, network: nn.Module) -> None:
    """Of a diffusion network, the blocks that diffusers or the family names; one without blocks stays as it is, with a line."""
    names = repeated_blocks(space, network)
    if not compile_forward(module for module in network.modules() if type(module).__name__ in names):
        log.warning(
            f"distill.compile: a {type(network).__name__} has no repeated blocks; it runs without being compiled"
        )


def compile_projector(projector: nn.Module) -> None:
    """A Bridge's: SwinIR's layers. Other projectors are small, and stay as they are."""
    compile_forward(module for module in projector.modules() if isinstance(module, SwinLayer))
