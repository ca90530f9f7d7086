"""How the self-attention of a diffusion network is read: where the network can be cut, and what an attention multiplies.

A family names its reader (`Space.attention_reader`). Here are those that several families share, by the layout of the
network. Shapes: B samples, h heads, d head width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from raydistill.errors import InputError


@dataclass
class Recording:
    """What one attention module computed: [B, tokens, h, d], and its rotary embedding of all tokens."""

    q: torch.Tensor
    k: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def of_image(self, tokens: int | None, first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of the image tokens, which come last unless they come `first`, with their positions applied."""
        rows = slice(None) if tokens is None else slice(0, tokens) if first else slice(-tokens, None)
        q, k = self.q[:, rows], self.k[:, rows]
        if self.rotary is not None:
            rotary = tuple(table[-q.shape[1] :] for table in self.rotary)
            q, k = (apply_rotary_emb(value, rotary, sequence_dim=1) for value in (q, k))
        return q, k


Cut = Callable[[nn.Module, float], tuple[nn.Module, list[nn.Module]]]
Sink = Callable[[Recording], None]


@dataclass(frozen=True, kw_only=True)
class AttentionReader:
    """How to cut a network after a share of its blocks, and to read its self-attention.

    Args:
        cut: (network, depth_fraction) -> frozen copy without the later blocks, and its self-attentions in order.
        watch: (attention, sink) installs hooks that hand every forward's recording to `sink`.
        image_tokens: latents [B, C, H, W] -> number of image tokens at the end of a sequence; None: all tokens.
        image_first: they are at its beginning.
    """

    cut: Cut
    watch: Callable[[nn.Module, Sink], None]
    image_tokens: Callable[[torch.Tensor], int | None] = lambda x_t: None
    image_first: bool = False


def patches(x_t: torch.Tensor) -> int:
    """2×2 patches of latents [B, C, H, W]."""
    return x_t.shape[-2] // 2 * (x_t.shape[-1] // 2)


# -- where a network is cut -------------------------------------------------------------------------------


def first_blocks(block_lists: Sequence[str], attention: str) -> Cut:
    """Cut a network whose blocks stand in lists, in order of execution.

    Args:
        block_lists: the lists' names (`Space.block_lists`).
        attention: name of the self-attention in every block.
    """

    def cut(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
        blocks = [block for name in block_lists for block in getattr(network, name)]
        keep = math.ceil(depth_fraction * len(blocks))
        # In the copy the later blocks are empty, so that their weights are not copied first.
        network = copy.deepcopy(network, {id(block): nn.Identity() for block in blocks[keep:]})
        kept: list[nn.Module] = []
        for name in block_lists:
            setattr(network, name, getattr(network, name)[: keep - len(kept)])
            kept += getattr(network, name)
        return network, [getattr(block, attention) for block in kept]

    return cut


def cut_unet(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """Transformer blocks down, middle, up: everything after the last one kept is removed."""
    keep = math.ceil(depth_fraction * len(_unet_attention_blocks(network)))
    network = copy.deepcopy(network)
    found = _unet_attention_blocks(network)[:keep]
    if not found:
        raise InputError("this UNet has no transformer blocks to compare")
    last, i, j = found[-1]
    last.attentions[i].transformer_blocks = last.attentions[i].transformer_blocks[: j + 1]
    last.attentions = last.attentions[: i + 1]
    # The middle block has one residual block before its first transformer.
    last.resnets = last.resnets[: i + 1 + (last is network.mid_block)]
    for samplers in ("downsamplers", "upsamplers"):
        if hasattr(last, samplers):
            setattr(last, samplers, None)
    order = [*network.down_blocks, network.mid_block, *network.up_blocks]
    position = next(n for n, block in enumerate(order) if block is last)
    downs = len(network.down_blocks)
    network.down_blocks = network.down_blocks[: position + 1]
    network.mid_block = network.mid_block if position >= downs else None
    network.up_blocks = network.up_blocks[: max(0, position - downs)]
    network.conv_norm_out, network.conv_out = None, nn.Identity()
    return network, [block.attentions[i].transformer_blocks[j].attn1 for block, i, j in found]


def _unet_attention_blocks(network: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """(block, index of its transformer, index inside it) of every self-attention, in order of execution."""
    blocks = [*network.down_blocks, *([network.mid_block] if network.mid_block is not None else []), *network.up_blocks]
    return [
        (block, i, j)
        for block in blocks
        for i, transformer in enumerate(getattr(block, "attentions", ()))
        for j in range(len(transformer.transformer_blocks))
    ]


# -- what an attention multiplies -------------------------------------------------------------------------


def record(
    attention: nn.Module,
    q: nn.Module,
    k: nn.Module,
    read: Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], Recording],
    sink: Sink,
) -> None:
    """After every forward of `attention`, hand `sink` what `read` makes of the outputs of its modules `q` and `k`.

    Args:
        read: (q's output, k's output, keyword arguments of the attention's forward) -> what is multiplied.
    """
    seen: dict[str, torch.Tensor] = {}

    def finish(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sink(read(seen.pop("q"), seen.pop("k"), kwargs))

    q.register_forward_hook(lambda module, args, output: seen.__setitem__("q", output))
    k.register_forward_hook(lambda module, args, output: seen.__setitem__("k", output))
    attention.register_forward_hook(finish, with_kwargs=True)


def watch_norms(attention: nn.Module, sink: Sink) -> None:
    """norm_q and norm_k answer [B, tokens, h, d], and no positions follow."""
    record(attention, attention.norm_q, attention.norm_k, lambda q, k, kwargs: Recording(q, k), sink)


def watch_rotary_norms(attention: nn.Module, sink: Sink) -> None:
    """norm_q and norm_k answer [B, tokens, h, d]; the forward's `image_rotary_emb` is applied behind them."""
    record(
        attention,
        attention.norm_q,
        attention.norm_k,
        lambda q, k, kwargs: Recording(q, k, kwargs["image_rotary_emb"]),
        sink,
    )


def watch_projections(attention: nn.Module, sink: Sink) -> None:
    """Queries and keys are not normalised: what to_q and to_k answer, [B, tokens, h·d], is multiplied."""

    def read(q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Recording:
        return Recording(q.unflatten(-1, (attention.heads, -1)), k.unflatten(-1, (attention.heads, -1)))

    record(attention, attention.to_q, attention.to_k, read, sink)
