"""What a Bridge is trained towards: the losses of arXiv 2606.32020 on batches of pairs, in plain torch.

Noise, sampled rows and the order of batches follow from (seed, step). Used by the Bridge's own training and, as its
anchor, by a distillation that trains the Bridge along.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raydistill.bridge.attention import AttentionProbe, sample_rows
from raydistill.bridge.losses import bridge_loss
from raydistill.config.networks import BridgeConfig
from raydistill.config.reading import trains_bridge
from raydistill.config.schema import Config
from raydistill.data.encode import PromptTable, TextEncoder
from raydistill.data.pairs import Pairs, PairSet, open_pairs
from raydistill.diffusion.noise import normal, uniform
from raydistill.errors import InputError
from raydistill.precision import autocast
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space
from raydistill.storage.place import Place, Remote
from raydistill.storage.resolve import input_place, resolve
from raydistill.storage.staging import fetch, has_room
from raydistill.transfer import upload

TABLE_BYTES = 2 << 30  # of conditioning that each worker keeps in main memory
FEW_EPOCHS = 2.0  # for so many a set in a bucket is read there


Captions = Callable[[Sequence[str]], Conditioning]  # the teacher's conditioning of a batch of prompts


class Losses(ABC):
    """alpha L1 + beta attention fidelity of a Bridge, on batches of pairs, wherever they come from.

    Args:
        settings: the `bridge` section of the configuration.
        seed: of noise and rows.
        rank, world_size: this worker among all; a step's batch is divided evenly between them.
        probe: the teacher's attention; None trains on L1 alone.
        captions: gives the teacher's conditioning of a batch's prompts, for the probe.

    Raises:
        ValueError: the batch cannot be divided, or probe and weight disagree.
    """

    def __init__(
        self,
        settings: BridgeConfig,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        probe: AttentionProbe | None = None,
        captions: Captions | None = None,
    ) -> None:
        if settings.batch_size % world_size:
            raise ValueError(f"bridge.batch_size ({settings.batch_size}) must be a multiple of {world_size} workers")
        if settings.attention.weight > 0 and (probe is None or captions is None):
            raise ValueError("bridge.attention.weight is above 0: the trainer needs an attention probe and captions")
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.probe, self.captions = probe, captions

    @property
    def share(self) -> int:
        """Pairs of a step that are this worker's."""
        return self.settings.batch_size // self.world_size

    @abstractmethod
    def held_out(self, most: int, size: int) -> Iterator[Pairs]:
        """At most `most` pairs that are never trained on, `size` at a time."""

    def __call__(self, bridge: nn.Module, batch: Pairs, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and its terms (see `bridge_loss`) of step `step`, as float32 scalars with gradients.

        With `bridge.mixed_precision` the networks run in bfloat16 where that is safe; weights and losses stay float32.
        """
        z_student, z_teacher = (upload(z, self.device).float() for z in (batch.z_student, batch.z_teacher))
        weight = self.settings.attention.weight
        teacher_inputs: dict[str, Any] = {}
        if weight > 0:
            noise = normal(self.seed, batch.ids, z_teacher.shape[1:], "bridge_noise", step)
            teacher_inputs = {
                "probe": self.probe,
                "noise": upload(noise, self.device),
                "conditioning": {k: upload(v, self.device) for k, v in self.captions(batch.prompts).items()},
                "rows": sample_rows(self.seed, step, self.settings.attention.rows),
            }
        with autocast(self.device, self.settings.mixed_precision):
            return bridge_loss(bridge(z_student), z_teacher, weight, **teacher_inputs)


class Objective(Losses):
    """The losses on a stored set of pairs, in an order that follows from (seed, step).

    Args:
        pairs: latents of the same pictures in both spaces.
        settings: the `bridge` section of the configuration.
        seed: of noise, rows, order and the split into training and held-out pairs.
        split_seed: of the split alone, where runs of several seeds must hold out the same pairs.
        rest: as of `Losses`, and so are the errors.
    """

    def __init__(
        self, pairs: PairSet, settings: BridgeConfig, *, seed: int, split_seed: int | None = None, **rest: Any
    ) -> None:
        super().__init__(settings, seed=seed, **rest)
        self.pairs = pairs
        self.training_ids, self.held_out_ids = split(
            pairs, settings.validation_share, seed if split_seed is None else split_seed
        )
        self._order = lru_cache(maxsize=2)(lambda epoch: pairs.order(self.training_ids, seed, epoch))

    def batch(self, step: int) -> Pairs:
        """This worker's share of step `step` (from 0). Epochs follow each other without a gap."""
        first = step * self.settings.batch_size + self.rank * self.share
        epochs, offsets = np.divmod(np.arange(first, first + self.share), len(self.training_ids))
        return self.pairs.rows([self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])

    def held_out(self, most: int, size: int) -> Iterator[Pairs]:
        ids = self.held_out_ids
        # of all kinds: rows may be sorted
        ids = ids[np.linspace(0, len(ids) - 1, min(len(ids), most)).astype(int)]
        for start in range(0, len(ids), size):
            yield self.pairs.rows(ids[start : start + size])


class StreamedObjective(Losses):
    """The losses on pairs that are encoded while training goes on.

    Attributes:
        kept: pairs that are never trained on; None: nobody has given this worker any.
    """

    kept: Pairs | None = None

    def held_out(self, most: int, size: int) -> Iterator[Pairs]:
        for start in range(0, min(most, len(self.kept)), size):
            yield self.kept.rows(start, min(start + size, most))


def split(pairs: PairSet, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) positions, ascending. No prompt is in both, also where a text stands on several lines.

    Sets with fewer distinct prompts than 1 / share (all captions empty, say) are split by row instead.

    Raises:
        InputError: fewer than two rows.
    """
    if len(pairs) < 2:
        raise InputError(f"{pairs.folder}: {len(pairs)} pair cannot be split into training and held-out ones")
    first: dict[str, int] = {}  # id of each text
    ids = [first.setdefault(text, i) for text, i in zip(pairs.prompts(), pairs.prompt_ids().tolist(), strict=True)]
    _, group = np.unique(ids, return_inverse=True)
    if group.max() + 1 < 1 / share:
        group = np.arange(len(pairs))
    count = int(group.max()) + 1
    held_out = max(1, min(count - 1, round(share * count)))
    rank = uniform(seed, [0], "pair_split", shape=(count,))[0].numpy().argsort(kind="stable").argsort()
    is_held_out = rank[group] < held_out
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def build_objective(
    config: Config, pairs_folder: str | Path, device: torch.device | str = "cpu", **share: int | None
) -> Objective:
    """The losses that a configuration describes, on one worker's share of the pairs.

    Args:
        share: rank, world_size and split_seed, as of `Objective`.

    Raises:
        InputError: the pairs are not of these spaces.
    """
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    pairs = open_pairs(_nearest(config, pairs_folder), teacher, student)
    probe = captions = None
    if config.bridge.attention.weight > 0:
        probe = _probe(config, teacher, device)
        dtype = getattr(torch, config.prompts.encoder_dtype)
        captions = PromptTable(teacher, sorted(set(pairs.prompts())), dtype, device, max_bytes=TABLE_BYTES)
    settings, seed = config.bridge, config.run.seed
    return Objective(pairs, settings, seed=seed, device=device, probe=probe, captions=captions, **share)


def _nearest(config: Config, folder: str | Path) -> Place:
    """Where a worker reads its pairs: of a bucket the set as it lies there, or a copy that its node fetches once.

    A worker reads the shards of every epoch. A set that is read through several times is worth a copy, where it has room.
    """
    place = input_place(str(folder))
    if not isinstance(place, Remote):
        return place
    pairs = PairSet(place)
    steps = max(config.bridge.steps * trains_bridge(config), config.distill.steps * config.bridge.trainable)
    epochs = steps * config.bridge.batch_size / len(pairs)
    in_memory = len(pairs.files) <= pairs.cached_shards  # each shard is read once
    return fetch(str(place)) if not in_memory and epochs > FEW_EPOCHS and has_room(place) else place


def build_streamed(config: Config, device: torch.device | str = "cpu", **share: int) -> StreamedObjective:
    """The losses on pairs of a stream, whose captions nobody knows beforehand: the text encoders stay.

    Args:
        share: rank and world_size, as of `Losses`.
    """
    probe = captions = None
    if config.bridge.attention.weight > 0:
        teacher = load_space(resolve(config.teacher.model))
        probe = _probe(config, teacher, device)
        captions = TextEncoder(teacher, getattr(torch, config.prompts.encoder_dtype), device).encode
    return StreamedObjective(
        config.bridge, seed=config.run.seed, device=device, probe=probe, captions=captions, **share
    )


def _probe(config: Config, teacher: Space, device: torch.device | str) -> AttentionProbe:
    network = teacher.load_network(getattr(torch, config.teachers.dtype))
    probe = AttentionProbe(teacher, network, config.bridge.attention).to(device)
    if config.bridge.gradient_checkpointing:
        teacher.recompute_activations(probe.network)
    return probe
