"""The teacher's self-attention as a differentiable measure of structure (arXiv 2606.32020).

Queries and keys are read where the module itself normalises them, from the first blocks of a frozen copy; the later
blocks are not kept. Shapes: B samples, h heads, d head width, K image tokens (keys), R sampled query rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from raydistill.config import schema
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError
from raydistill.precision import autocast
from raydistill.spaces.base import Conditioning, Space

RowSampler = Callable[[int, int], torch.Tensor]  # (layer, image tokens) -> indices [R] of query rows
NORMALISATION_EPS = 1e-6


def sample_rows(seed: int, step: int, count: int) -> RowSampler:
    """Query rows without replacement, at most `count`, that depend on (seed, step, layer) only."""

    def rows(layer: int, tokens: int) -> torch.Tensor:
        draws = uniform(seed, [layer], "attention_rows", step, shape=(tokens,))[0]
        return draws.argsort(stable=True)[:count].sort().values

    return rows


def log_probabilities(q_BRhd: torch.Tensor, k_BKhd: torch.Tensor, temperature: float, normalize: bool) -> torch.Tensor:
    """log softmax(logits / τ) over keys [B, h, R, K], in float32 or better.

    Logits are q·k / sqrt(d); with `normalize` each row has zero mean and unit (population) variance.
    """
    precision = torch.promote_types(q_BRhd.dtype, torch.float32)
    q, k = q_BRhd.to(precision), k_BKhd.to(precision)
    with autocast(q.device, enabled=False):  # differences of logits would drown in bfloat16
        logits = torch.einsum("brhd,bkhd->bhrk", q, k) / math.sqrt(q.shape[-1])
        if normalize:
            logits = F.layer_norm(logits, logits.shape[-1:], eps=NORMALISATION_EPS)
        return (logits / temperature).log_softmax(dim=-1)


def spaced(count: int, layers: int) -> list[int]:
    """`layers` of `count` positions, evenly spaced and ending with the last; all where there are fewer."""
    layers = min(layers, count)
    return [-(-(i + 1) * count // layers) - 1 for i in range(layers)]


# -- families ---------------------------------------------------------------------------------------------


@dataclass
class _Recording:
    """What one attention module computed: [B, tokens, h, d], and its rotary embedding of all tokens."""

    q: torch.Tensor
    k: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def image_part(self, tokens: int | None, first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of the image tokens, which come last unless they come `first`, with their positions applied."""
        place = slice(None) if tokens is None else slice(0, tokens) if first else slice(-tokens, None)
        q, k = self.q[:, place], self.k[:, place]
        if self.rotary is not None:
            rotary = tuple(table[-q.shape[1] :] for table in self.rotary)
            q, k = (apply_rotary_emb(value, rotary, sequence_dim=1) for value in (q, k))
        return q, k


@dataclass(frozen=True)
class _Family:
    """How to cut a network after a share of its blocks, and to read its self-attention.

    cut: (network, depth_fraction) -> frozen copy without the later blocks, and its self-attentions in order.
    watch: (attention, sink) installs hooks that hand every forward's recording to `sink`.
    image_tokens: latents -> number of image tokens at the end of a sequence; None: all tokens.
    image_first: they are at its beginning.
    """

    cut: Callable[[nn.Module, float], tuple[nn.Module, list[nn.Module]]]
    watch: Callable[[nn.Module, Callable[[_Recording], None]], None]
    image_tokens: Callable[[torch.Tensor], int | None]
    image_first: bool = False


def _patches(x_t: torch.Tensor) -> int:
    """2×2 patches of latents [B, C, H, W]."""
    return x_t.shape[-2] // 2 * (x_t.shape[-1] // 2)


def _copy_without(network: nn.Module, dropped: list[nn.Module]) -> nn.Module:
    """A deep copy in which the dropped blocks are empty, so that their weights are not copied first."""
    return copy.deepcopy(network, {id(block): nn.Identity() for block in dropped})


def _cut_flux(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """FLUX.1 and FLUX.2: double blocks, then single ones."""
    double, single = network.transformer_blocks, network.single_transformer_blocks
    keep = math.ceil(depth_fraction * (len(double) + len(single)))
    dropped = [*double[keep:], *single[max(0, keep - len(double)) :]]
    network = _copy_without(network, dropped)
    network.transformer_blocks = network.transformer_blocks[:keep]
    network.single_transformer_blocks = network.single_transformer_blocks[: max(0, keep - len(double))]
    return network, [block.attn for block in (*network.transformer_blocks, *network.single_transformer_blocks)]


def _watch_flux(attention: nn.Module, sink: Callable[[_Recording], None]) -> None:
    """norm_q and norm_k see image tokens only in double blocks, and text then image in single ones."""
    seen: dict[str, torch.Tensor] = {}

    def finish(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sink(_Recording(seen.pop("q"), seen.pop("k"), kwargs["image_rotary_emb"]))

    attention.norm_q.register_forward_hook(lambda module, args, output: seen.__setitem__("q", output))
    attention.norm_k.register_forward_hook(lambda module, args, output: seen.__setitem__("k", output))
    attention.register_forward_hook(finish, with_kwargs=True)


def _cut_joint(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """SD 3: joint attention of image and text in every block; the second attention of some (attn2) is not read."""
    keep = math.ceil(depth_fraction * len(network.transformer_blocks))
    network = _copy_without(network, list(network.transformer_blocks[keep:]))
    network.transformer_blocks = network.transformer_blocks[:keep]
    return network, [block.attn for block in network.transformer_blocks]


def _watch_joint(attention: nn.Module, sink: Callable[[_Recording], None]) -> None:
    """Image tokens only, whose projections and norms are their own: [B, h, tokens, d] behind the norms of SD 3.5."""
    normalised = attention.norm_q is not None
    seen: dict[str, torch.Tensor] = {}

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        q, k = (
            value.transpose(1, 2) if normalised else value.unflatten(-1, (attention.heads, -1))
            for value in (seen.pop("q"), seen.pop("k"))
        )
        sink(_Recording(q, k))

    q, k = (attention.norm_q, attention.norm_k) if normalised else (attention.to_q, attention.to_k)
    q.register_forward_hook(lambda module, args, output: seen.__setitem__("q", output))
    k.register_forward_hook(lambda module, args, output: seen.__setitem__("k", output))
    attention.register_forward_hook(finish)


def _cut_z_image(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """The refiner of image tokens, then the blocks that see image and text."""
    refiner, layers = network.noise_refiner, network.layers
    keep = math.ceil(depth_fraction * (len(refiner) + len(layers)))
    network = _copy_without(network, [*refiner[keep:], *layers[max(0, keep - len(refiner)) :]])
    network.noise_refiner = network.noise_refiner[:keep]
    network.layers = network.layers[: max(0, keep - len(refiner))]
    return network, [block.attention for block in (*network.noise_refiner, *network.layers)]


def _watch_z_image(attention: nn.Module, sink: Callable[[_Recording], None]) -> None:
    """The positions of every token come as unit complex numbers [B, tokens, d/2]."""
    seen: dict[str, torch.Tensor] = {}

    def finish(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        turn = kwargs["freqs_cis"].unsqueeze(2)
        pairs = (seen.pop(name).unflatten(-1, (-1, 2)) for name in ("q", "k"))
        precise = (value.to(torch.promote_types(value.dtype, torch.float32)).contiguous() for value in pairs)
        sink(_Recording(*(torch.view_as_real(torch.view_as_complex(value) * turn).flatten(-2) for value in precise)))

    attention.norm_q.register_forward_hook(lambda module, args, output: seen.__setitem__("q", output))
    attention.norm_k.register_forward_hook(lambda module, args, output: seen.__setitem__("k", output))
    attention.register_forward_hook(finish, with_kwargs=True)


def _unet_attention_blocks(network: nn.Module) -> list[tuple[nn.Module, int, int]]:
    """(block, index of its transformer, index inside it) of every self-attention, in order of execution."""
    blocks = [*network.down_blocks, *([network.mid_block] if network.mid_block is not None else []), *network.up_blocks]
    return [
        (block, i, j)
        for block in blocks
        for i, transformer in enumerate(getattr(block, "attentions", ()))
        for j in range(len(transformer.transformer_blocks))
    ]


def _cut_unet(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """Transformer blocks down, middle, up: everything after the last one kept is removed."""
    keep = math.ceil(depth_fraction * len(_unet_attention_blocks(network)))
    network = copy.deepcopy(network)
    places = _unet_attention_blocks(network)[:keep]
    if not places:
        raise InputError("this UNet has no transformer blocks to compare")
    last, i, j = places[-1]
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
    return network, [block.attentions[i].transformer_blocks[j].attn1 for block, i, j in places]


def _watch_attn1(attention: nn.Module, sink: Callable[[_Recording], None]) -> None:
    """Self-attention without normalised queries and keys: the projections' outputs are what is multiplied."""
    seen: dict[str, torch.Tensor] = {}

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        q, k = (seen.pop(name).unflatten(-1, (attention.heads, -1)) for name in ("q", "k"))
        sink(_Recording(q, k))

    attention.to_q.register_forward_hook(lambda module, args, output: seen.__setitem__("q", output))
    attention.to_k.register_forward_hook(lambda module, args, output: seen.__setitem__("k", output))
    attention.register_forward_hook(finish)


def _cut_dit(network: nn.Module, depth_fraction: float) -> tuple[nn.Module, list[nn.Module]]:
    """Blocks of self-attention (attn1) and cross-attention; the self-attention sees image tokens only."""
    keep = math.ceil(depth_fraction * len(network.transformer_blocks))
    network = _copy_without(network, list(network.transformer_blocks[keep:]))
    network.transformer_blocks = network.transformer_blocks[:keep]
    return network, [block.attn1 for block in network.transformer_blocks]


FAMILIES: dict[str, _Family] = {
    "FluxTransformer2DModel": _Family(_cut_flux, _watch_flux, _patches),
    "Flux2Transformer2DModel": _Family(_cut_flux, _watch_flux, _patches),
    "SD3Transformer2DModel": _Family(_cut_joint, _watch_joint, lambda x_t: None),
    "ZImageTransformer2DModel": _Family(_cut_z_image, _watch_z_image, _patches, image_first=True),
    "UNet2DConditionModel": _Family(_cut_unet, _watch_attn1, lambda x_t: None),
    "PixArtTransformer2DModel": _Family(_cut_dit, _watch_attn1, lambda x_t: None),
}


def _check_known(space: Space, network_class: str) -> None:
    if network_class not in FAMILIES:
        raise InputError(
            f"{space.folder}: the attention fidelity does not know {network_class} (known: "
            f"{', '.join(sorted(FAMILIES))}); set bridge.attention.weight=0 to train on L1 alone"
        )


def check_network(space: Space) -> None:
    """Raises InputError where there is no reader for this folder's network; loads nothing."""
    _check_known(space, space.part_config(space.network_name)["_class_name"])


class AttentionProbe:
    """Attention maps of a teacher's first blocks.

    Args:
        space: the teacher's.
        network: the teacher's network; copied up to the last block that is needed, and left alone.
        settings: the `bridge.attention` section of the configuration.

    Raises:
        InputError: the network's class is not known here.
    """

    def __init__(self, space: Space, network: nn.Module, settings: schema.AttentionConfig) -> None:
        name = type(network).__name__
        _check_known(space, name)
        self.space, self.temperature, self.normalize = space, settings.temperature, settings.normalize
        self._family = FAMILIES[name]
        network, attentions = self._family.cut(network, settings.depth_fraction)
        self.network = network.eval().requires_grad_(False)
        self._recordings: dict[int, _Recording] | None = None
        self.layers = spaced(len(attentions), settings.layers)
        for layer in self.layers:
            self._family.watch(attentions[layer], self._sink(layer))

    def _sink(self, layer: int) -> Callable[[_Recording], None]:
        def sink(recording: _Recording) -> None:
            if self._recordings is not None:  # a checkpointed block runs again in the backward pass: not recorded
                self._recordings[layer] = recording

        return sink

    def _cast(self, conditioning: Conditioning) -> Conditioning:
        """Text encoders may run in another precision than the network."""
        dtype = next(self.network.parameters()).dtype
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in conditioning.items()}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AttentionProbe:
        """Move the copied blocks."""
        self.network.to(device=device, dtype=dtype)
        return self

    def maps(
        self, x_t: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning, rows: RowSampler
    ) -> list[torch.Tensor]:
        """log P_l [B, h, R, K] of each compared layer; gradients flow into `x_t`.

        Args:
            x_t: noised latents [B, C, H, W] in the teacher's normalised space.
            t_B: their times [B].
            conditioning: of the pictures' own captions.
            rows: which image tokens' rows are read in each layer; the same sampler gives the same rows.
        """
        self._recordings = {}
        try:
            self.space.predict(self.network, x_t, t_B, self._cast(conditioning))
            recordings = self._recordings
        finally:
            self._recordings = None
        tokens = self._family.image_tokens(x_t)
        result = []
        for layer in self.layers:
            q, k = recordings.pop(layer).image_part(tokens, self._family.image_first)
            q = q[:, rows(layer, q.shape[1]).to(q.device)]
            result.append(log_probabilities(q, k, self.temperature, self.normalize))
        return result
