"""What a worker's updates are fed with: its share of the prompts in micro-batches, teacher samples, random numbers.

A worker's device gets a batch's conditioning once, and keeps it for the length of an update. Noise comes part by part, so
that the device computes with one part's while the next part's is drawn.

Shapes: B samples of a micro-batch, C×H×W teacher latents, c×h×w student latents.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydistill.data.encode import CUT
from raydistill.data.encode import conditioning as columns_of
from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.timesteps import sample_t
from raydistill.spaces import Conditioning
from raydistill.transfer import upload

T_MIN, T_MAX = 1e-3, 1 - 1e-3  # the whole range of t but its ill-conditioned ends


@dataclass
class Real:
    """Teacher samples for the discriminator: normalised latents and their own captions' conditioning."""

    latents: torch.Tensor  # [N, C, H, W]
    table: Conditioning  # one row per distinct caption
    rows: torch.Tensor  # [N] row of each sample's caption

    def take(self, pick: torch.Tensor) -> tuple[torch.Tensor, Conditioning]:
        """Latents [B, C, H, W] float32 and conditioning of the samples `pick` [B]."""
        return self.latents[pick].float(), {name: value[self.rows[pick]] for name, value in self.table.items()}


@dataclass(kw_only=True)
class MicroBatch:
    """An equal part of a worker's batch. `teacher_conditioning` is in main memory; the rest is on the device."""

    sample_ids: torch.Tensor  # [B] int64, in main memory
    student_conditioning: Conditioning
    teacher_conditioning: Conditioning  # as it is sent to the teachers
    fake_conditioning: Conditioning  # the same for the fake score


@dataclass(kw_only=True)
class Made(MicroBatch):
    """A micro-batch of the student before its update: what the teachers get to see, and what stays on the device."""

    noise: torch.Tensor  # [B, c, h, w]
    x_t: torch.Tensor  # [B, C, H, W] in main memory
    t_B: torch.Tensor  # in main memory
    held: tuple[torch.Tensor, torch.Tensor]  # x_t and t_B on the device


@dataclass(frozen=True)
class Draws:
    """Random numbers for sample ids [B], on a device.

    Each is a function of (seed, purpose, sample id), so no generator has a state.

    Attributes:
        shift: of the sampled times (`vsd.shift`, else the teacher family's).
    """

    seed: int
    shift: float
    device: torch.device

    def normal(self, ids: torch.Tensor, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """N(0, I), [B, *shape] float32."""
        return upload(normal(self.seed, ids, shape, purpose), self.device)

    def uniform(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """U[0, 1), [B] float32."""
        return upload(uniform(self.seed, ids, purpose), self.device)

    def picks(self, ids: torch.Tensor, purpose: str, count: int) -> torch.Tensor:
        """One of `count` rows for each sample, [B] int64 in main memory."""
        return (uniform(self.seed, ids, purpose) * count).long()

    def t(self, ids: torch.Tensor, purpose: str, t_min: float = T_MIN, t_max: float = T_MAX) -> torch.Tensor:
        """Shifted diffusion times in [t_min, t_max], [B]."""
        return sample_t(self.uniform(ids, purpose), t_min, t_max, self.shift)


class Batches:
    """The batches of one worker, k + 1 for each update, the student's first.

    Attributes:
        source: conditioned batches (`data.encode.conditioned_batches`).
        parts: equal micro-batches that each of them is cut into.
        device: of the worker's networks.
    """

    def __init__(self, source: Iterator[dict[str, Any]], parts: int, device: torch.device | str = "cpu") -> None:
        self.source, self.parts, self.device = source, parts, torch.device(device)
        self._consumed: list[list[int]] = []
        self._metrics: dict[str, float] = defaultdict(float)

    def next(self) -> list[MicroBatch]:
        """The next batch in equal parts. Raises ValueError where it cannot be divided."""
        started = time.perf_counter()
        batch = next(self.source)
        self._metrics["time/data"] += time.perf_counter() - started
        if CUT in batch:
            self._metrics["data/cut_prompts"] += float(np.sum(batch[CUT]))
        ids = torch.tensor(batch["sample_id"], dtype=torch.long)
        self._consumed.append(ids.tolist())
        if len(ids) % self.parts:
            raise ValueError(f"distill.micro_batches: a batch of {len(ids)} samples has no {self.parts} equal parts")
        size = len(ids) // self.parts
        student, teacher = (columns_of(batch, role) for role in ("student", "teacher"))
        held, fake = ({name: upload(value, self.device) for name, value in it.items()} for it in (student, teacher))
        return [
            MicroBatch(
                sample_ids=ids[rows],
                student_conditioning={name: value[rows] for name, value in held.items()},
                teacher_conditioning={name: value[rows] for name, value in teacher.items()},
                fake_conditioning={name: value[rows] for name, value in fake.items()},
            )
            for rows in (slice(first, first + size) for first in range(0, len(ids), size))
        ]

    def pop_metrics(self) -> dict[str, float]:
        """time/data (seconds) and data/cut_prompts since the last call."""
        metrics, self._metrics = dict(self._metrics), defaultdict(float)
        return metrics

    def pop_sample_ids(self) -> list[list[int]]:
        """Sample ids of each batch consumed since the last call."""
        consumed, self._consumed = self._consumed, []
        return consumed
