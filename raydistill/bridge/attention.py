"""The teacher's self-attention as a differentiable measure of structure (arXiv 2606.32020).

Queries and keys are read where the module itself normalises them, from the first blocks of a frozen copy; the later
blocks are not kept. Shapes: B samples, h heads, d head width, K image tokens (keys), R sampled query rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from raydistill.config.networks import AttentionConfig
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError
from raydistill.precision import autocast
from raydistill.spaces.attention_readers import AttentionReader, Recording
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.folder import cast
from raydistill.transfer import upload

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


def reader_of(space: Space) -> AttentionReader:
    """How this family's self-attention is read. Raises InputError where it does not say; loads nothing."""
    if space.attention_reader is None:
        raise InputError(
            f"{space.folder}: the family {type(space).__name__} has no attention_reader; set bridge.attention.weight=0 "
            "to train on L1 alone"
        )
    return space.attention_reader


class AttentionProbe:
    """Attention maps of a teacher's first blocks.

    Args:
        space: the teacher's.
        network: the teacher's network; copied up to the last block that is needed, and left alone.
        settings: the `bridge.attention` section of the configuration.

    Raises:
        InputError: the family has no attention reader.
    """

    def __init__(self, space: Space, network: nn.Module, settings: AttentionConfig) -> None:
        self.reader = reader_of(space)
        self.space, self.temperature, self.normalize = space, settings.temperature, settings.normalize
        network, attentions = self.reader.cut(network, settings.depth_fraction)
        self.network = network.eval().requires_grad_(False)
        self._recordings: dict[int, Recording] | None = None
        self.layers = spaced(len(attentions), settings.layers)
        for layer in self.layers:
            self.reader.watch(attentions[layer], self._sink(layer))

    def _sink(self, layer: int) -> Callable[[Recording], None]:
        def sink(recording: Recording) -> None:
            if self._recordings is not None:  # a checkpointed block runs again in the backward pass: not recorded
                self._recordings[layer] = recording

        return sink

    def _cast(self, conditioning: Conditioning) -> Conditioning:
        """Text encoders may run in another precision than the network."""
        dtype = next(self.network.parameters()).dtype
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in conditioning.items()}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AttentionProbe:
        """Move the copied blocks."""
        cast(self.network, dtype, device)
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
        tokens = self.reader.image_tokens(x_t)
        result = []
        for layer in self.layers:
            q, k = recordings.pop(layer).of_image(tokens, self.reader.image_first)
            q = q[:, upload(rows(layer, q.shape[1]), q.device)]
            result.append(log_probabilities(q, k, self.temperature, self.normalize))
        return result
