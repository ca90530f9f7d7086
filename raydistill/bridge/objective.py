"""What a Bridge is trained towards: the losses of arXiv 2606.32020 on batches of pairs, in plain torch.

Noise, sampled rows and the order of batches follow from (seed, step). Used by the Bridge's own training and, as its
anchor, by a distillation that trains the Bridge along.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.losses import bridge_loss
from raydistill.config import schema
from raydistill.config.schema import Config
from raydistill.data.pairs import Pairs, PairSet, read_pairs, split
from raydistill.diffusion.noise import normal
from raydistill.precision import autocast
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space
from raydistill.storage.resolve import resolve

TABLE_BYTES = 2 << 30  # of conditioning that each worker keeps in main memory


class Captions:
    """Teacher conditioning of prompts.

    Where the conditioning of all distinct prompts takes up to `table_bytes`, they are encoded once, in fixed chunks, and the
    text encoders are let go; otherwise each batch is encoded when needed. Either way a batch's numbers depend on it alone.

    Args:
        space: the teacher's.
        prompts: all prompts that may be asked for.
        device: where the encoders run and conditioning is returned.
        dtype: of the encoders and of the conditioning.
        chunk: prompts encoded at once.
    """

    def __init__(
        self,
        space: Space,
        prompts: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        table_bytes: int = TABLE_BYTES,
        chunk: int = 64,
    ) -> None:
        distinct = sorted(set(prompts))
        self._space, self._device = space, device
        self._text = space.load_text(dtype).to(device)
        self._row: dict[str, int] | None = None
        first = self._encode(distinct[:chunk])
        row_bytes = sum(value[0].nbytes for value in first.values())
        if len(distinct) * row_bytes <= table_bytes:
            self._table = {
                name: value.new_empty(len(distinct), *value.shape[1:], device="cpu") for name, value in first.items()
            }
            for start in range(0, len(distinct), chunk):
                part = self._encode(distinct[start : start + chunk]) if start else first
                for name, value in part.items():
                    self._table[name][start : start + chunk] = value.cpu()
            self._row = {prompt: row for row, prompt in enumerate(distinct)}
            self._text = None

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return self._space.encode_prompts(self._text, prompts)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of a batch of prompts, [B, …] each."""
        if self._row is None:
            return self._encode(prompts)
        rows = torch.tensor([self._row[prompt] for prompt in prompts])
        return {name: value[rows].to(self._device) for name, value in self._table.items()}


class Objective:
    """alpha L1 + beta attention fidelity of a Bridge, on batches of a pair set.

    Args:
        pairs: latents of the same pictures in both spaces.
        settings: the `bridge` section of the configuration.
        seed: of noise, rows, order and the split into training and held-out pairs.
        device: where everything runs.
        rank, world_size: this worker among all; a step's batch is divided evenly between them.
        probe: the teacher's attention; None trains on L1 alone.
        captions: conditioning for the probe.
        split_seed: of the split alone, where runs of several seeds must hold out the same pairs.

    Raises:
        ValueError: the batch cannot be divided, or probe and weight disagree.
    """

    def __init__(
        self,
        pairs: PairSet,
        settings: schema.BridgeConfig,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        probe: AttentionProbe | None = None,
        captions: Captions | None = None,
        split_seed: int | None = None,
    ) -> None:
        if settings.batch_size % world_size:
            raise ValueError(f"bridge.batch_size ({settings.batch_size}) must be a multiple of {world_size} workers")
        if settings.attention.weight > 0 and (probe is None or captions is None):
            raise ValueError("bridge.attention.weight is above 0: the trainer needs an attention probe and captions")
        self.pairs, self.settings, self.seed, self.device = pairs, settings, seed, torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.probe, self.captions = probe, captions
        self.training_ids, self.held_out_ids = split(
            pairs, settings.validation_share, seed if split_seed is None else split_seed
        )
        self._order = lru_cache(maxsize=2)(lambda epoch: pairs.order(self.training_ids, seed, epoch))

    def batch(self, step: int) -> Pairs:
        """This worker's share of step `step` (from 0). Epochs follow each other without a gap."""
        share = self.settings.batch_size // self.world_size
        first = step * self.settings.batch_size + self.rank * share
        epochs, offsets = np.divmod(np.arange(first, first + share), len(self.training_ids))
        return self.pairs.rows([self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])

    def __call__(self, bridge: nn.Module, batch: Pairs, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and its parts (see `bridge_loss`) of step `step`, as float32 scalars with gradients.

        With `bridge.mixed_precision` the networks run in bfloat16 where that is safe; weights and losses stay float32.
        """
        z_S, z_T = batch.z_S.to(self.device).float(), batch.z_T.to(self.device).float()
        weight = self.settings.attention.weight
        teacher_inputs: dict[str, Any] = {}
        if weight > 0:
            noise = normal(self.seed, batch.ids, z_T.shape[1:], "bridge_noise", step)
            teacher_inputs = {
                "probe": self.probe,
                "noise": noise.to(self.device),
                "conditioning": self.captions(batch.prompts),
                "rows": sample_rows(self.seed, step, self.settings.attention.rows),
            }
        with autocast(self.device, self.settings.mixed_precision):
            return bridge_loss(bridge(z_S), z_T, weight, **teacher_inputs)


def build_objective(
    config: Config,
    pairs_folder: str | Path,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    split_seed: int | None = None,
) -> Objective:
    """The losses that a configuration describes, on one worker's share of the pairs.

    Args:
        split_seed: decides which pairs are held out; None: the run's seed.

    Raises:
        InputError: the pairs are not of these spaces.
    """
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    pairs = read_pairs(resolve(str(pairs_folder)), teacher.latent_shape, student.latent_shape)
    probe = captions = None
    if config.bridge.attention.weight > 0:
        network = teacher.load_network(getattr(torch, config.teachers.dtype))
        probe = AttentionProbe(teacher, network, config.bridge.attention).to(device)
        captions = Captions(teacher, pairs.prompts(), device, getattr(torch, config.prompts.encoder_dtype))
        if config.bridge.gradient_checkpointing:
            probe.network.enable_gradient_checkpointing()
    return Objective(pairs, config.bridge, config.run.seed, device, rank, world_size, probe, captions, split_seed)
