"""What a worker's updates are fed with: its share of the prompts in micro-batches, teacher samples, random numbers.

A worker's device gets a batch's conditioning once, and keeps it for the length of an update. Noise comes micro-batch by
micro-batch, so that the device computes with that of one while that of the next is drawn.

Shapes: B samples of a micro-batch, C×H×W teacher latents, c×h×w student latents.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch

from raydistill.background import in_background
from raydistill.config.schema import Config
from raydistill.data.encode import CUT
from raydistill.data.encode import conditioning as columns_of
from raydistill.data.reals import Grouped, RealOrder, RealSet
from raydistill.data.reward_texts import REWARD
from raydistill.diffusion.noise import normal, uniform
from raydistill.diffusion.path import Path, expand
from raydistill.diffusion.timesteps import sample_t
from raydistill.spaces import Conditioning
from raydistill.transfer import upload

T_MIN, T_MAX = 1e-3, 1 - 1e-3  # the whole range of t but its ill-conditioned ends


class Reals(Grouped, Protocol):
    """Teacher samples for the discriminator."""

    def take(self, rows: np.ndarray, positions: np.ndarray) -> tuple[torch.Tensor, Conditioning]:
        """Latents [B, C, H, W] float32 and the conditioning of these rows' own captions; `positions`: of them in the order."""
        ...

    def first(self, count: int) -> torch.Tensor:
        """Latents of the first `count` samples, or of all."""
        ...

    def pop_metrics(self) -> dict[str, float]:
        """Metrics since the last call."""
        ...


@dataclass
class Real:
    """Teacher samples that all lie in memory: normalised latents and their own captions' conditioning."""

    latents: torch.Tensor  # [N, C, H, W]
    table: Conditioning  # one row per distinct caption
    rows: torch.Tensor  # [N] row of each sample's caption
    groups: np.ndarray | None = None  # `starts` of the set that they are of; None: they are one group

    @property
    def starts(self) -> np.ndarray:
        """See `data.reals.Grouped`."""
        return np.array([0, len(self.rows)]) if self.groups is None else self.groups

    @property
    def row_bytes(self) -> int:
        """See `data.reals.Grouped`."""
        return 2 * self.latents[0].numel()

    def take(self, rows: np.ndarray, positions: np.ndarray | None = None) -> tuple[torch.Tensor, Conditioning]:
        """See `Reals`."""
        pick = torch.as_tensor(rows)
        return self.latents[pick].float(), {name: value[self.rows[pick]] for name, value in self.table.items()}

    def first(self, count: int) -> torch.Tensor:
        """See `Reals`."""
        return self.latents[:count]

    def pop_metrics(self) -> dict[str, float]:
        """None."""
        return {}


class StreamedReals:
    """Teacher samples whose captions come with the stream of prompts, and whose latents are read from storage.

    The latents of the next update are read in a thread meanwhile.

    Args:
        source: conditioned batches, which `Batches` reads too: a slot of the fake score, then its teacher samples.
        samples: the set.
        order: in which the stream reads it.
    """

    def __init__(self, source: Iterator[dict[str, Any]], samples: RealSet, order: RealOrder) -> None:
        self.source, self.samples, self.order = source, samples, order
        self.starts, self.row_bytes = samples.starts, samples.row_bytes
        # positions and rows of a batch that were not taken yet, their latents and conditioning
        self._left: tuple[np.ndarray, np.ndarray, torch.Tensor, Conditioning] | None = None
        self._ahead: tuple[np.ndarray, Future[torch.Tensor]] | None = None
        self._waited, self._reads = 0.0, 0

    def take(self, rows: np.ndarray, positions: np.ndarray) -> tuple[torch.Tensor, Conditioning]:
        """See `Reals`. What lies before these positions is left out: an update may take a part of what the stream brings.

        Raises RuntimeError where the stream brings others than are asked for.
        """
        streamed, had, latents, conditioning = self._left or self._next()
        if positions[0] > streamed[-1]:
            streamed, had, latents, conditioning = self._next()
        first = int(np.searchsorted(streamed, positions[0]))
        stop = first + len(rows)
        if not np.array_equal(had[first:stop], rows):
            raise RuntimeError(f"the stream brings teacher samples {had[first:stop]}, and the update asks for {rows}")
        left = {name: value[stop:] for name, value in conditioning.items()}
        self._left = (streamed[stop:], had[stop:], latents[stop:], left) if len(had) > stop else None
        return latents[first:stop].float(), {name: value[first:stop] for name, value in conditioning.items()}

    def _next(self) -> tuple[np.ndarray, np.ndarray, torch.Tensor, Conditioning]:
        started = time.perf_counter()
        batch = next(self.source)
        rows = np.asarray(batch["prompt_id"])
        expected, reading = self._ahead or (None, None)
        read = reading.result() if reading is not None else None  # before another read begins
        latents = read if read is not None and np.array_equal(rows, expected) else self.samples.latents(rows)
        following = self.order.rows(np.asarray(batch["sample_id"]) + self.order.slot_size)
        self._ahead = following, in_background(lambda: self.samples.latents(following))
        self._waited += time.perf_counter() - started
        return np.asarray(batch["sample_id"]), rows, latents, columns_of(batch, "teacher")

    def first(self, count: int) -> torch.Tensor:
        """See `Reals`."""
        return self.samples.first(count)

    def pop_metrics(self) -> dict[str, float]:
        """time/data (seconds), and data/real_groups: row groups of the set that were read."""
        reads = self.samples.reads
        metrics = {"time/data": self._waited, "data/real_groups": float(reads - self._reads)}
        self._waited, self._reads = 0.0, reads
        return metrics


class RealFeed:
    """Teacher samples, each in its turn.

    Args:
        config: decides the order.
        reals: where they come from.
    """

    def __init__(self, config: Config, reals: Reals) -> None:
        self.reals, self.order = reals, RealOrder.of(config, reals)
        self._position = 0

    def of(self, sample_ids: torch.Tensor) -> tuple[torch.Tensor, Conditioning]:
        """Those that the fake score's update of these sample ids [B] sees, see `Reals.take`."""
        positions = self.order.positions(sample_ids)
        self._position = int(positions[-1])
        return self.reals.take(self.order.rows(positions), positions)

    def pop_metrics(self) -> dict[str, float]:
        """data/real_epoch: how often this worker has read its share of the set. And those of `Reals`."""
        return self.reals.pop_metrics() | {"data/real_epoch": self.order.epoch(self._position)}


@dataclass(kw_only=True)
class MicroBatch:
    """An equal part of a worker's batch. `teacher_conditioning` is in main memory; the rest is on the device."""

    sample_ids: torch.Tensor  # [B] int64, in main memory
    student_conditioning: Conditioning
    teacher_conditioning: Conditioning  # as it is sent to the teachers
    fake_conditioning: Conditioning  # the same for the fake score
    reward_conditioning: Conditioning = field(default_factory=dict)  # what the student's reward knows of the prompts
    rows: torch.Tensor | None = None  # [B] positions in the whole micro-batch of what is left of it; None: all is there
    weight: float = (
        1.0  # share of the whole micro-batch that is left; 0: these stand in for one of which nothing is left
    )

    def without(self, samples: Collection[int]) -> Self:
        """The micro-batch without these sample ids; perhaps of none, with the weight 0."""
        kept = torch.tensor([number not in samples for number in self.sample_ids.tolist()])
        if bool(kept.all()):
            return self
        rows = kept.nonzero().flatten()
        return self._of(rows, self.weight * len(rows) / len(kept))

    def stand_in(self) -> Self:
        """Its first sample, with the weight 0."""
        return self._of(torch.tensor([0]), 0.0)

    def _of(self, rows: torch.Tensor, weight: float) -> Self:
        own = {name: _rows(value, rows) for name, value in vars(self).items() if name not in ("rows", "weight")}
        return type(self)(**own, rows=rows if self.rows is None else self.rows[rows], weight=weight)


@dataclass(kw_only=True)
class Made(MicroBatch):
    """A micro-batch of the student before its update: what the teachers get to see, and what stays on the device."""

    seen: torch.Tensor  # [B, c, h, w]: what the student's trained evaluation sees (`rollout.py`)
    timestep_B: torch.Tensor | None  # of it; None: the start timestep, for all
    x_t: torch.Tensor  # [B, C, H, W] in main memory
    t_B: torch.Tensor  # in main memory
    on_device: tuple[torch.Tensor, torch.Tensor]  # x_t and t_B on the device

    def with_graph(self, path: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`on_device`: its own numbers, and the gradient of x_t = alpha x + sigma eps with respect to the student's x."""
        x_t, t_B = self.on_device
        return x_t + expand(path.alpha_sigma(t_B)[0], x) * (x - x.detach()), t_B


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

    def normal(self, ids: torch.Tensor, shape: tuple[int, ...], purpose: str, step: int = 0) -> torch.Tensor:
        """N(0, I), [B, *shape] float32; `step`: of the student, for samples that are drawn for more than once."""
        return upload(normal(self.seed, ids, shape, purpose, step), self.device)

    def uniform(self, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """U[0, 1), [B] float32."""
        return upload(uniform(self.seed, ids, purpose), self.device)

    def of_groups(self, groups: torch.Tensor, purpose: str) -> torch.Tensor:
        """U[0, 1) of each sample's group [B], float32 in main memory; those of one group are equal."""
        return uniform(self.seed, groups, purpose)

    def t(self, ids: torch.Tensor, purpose: str, t_min: float = T_MIN, t_max: float = T_MAX) -> torch.Tensor:
        """Shifted diffusion times in [t_min, t_max], [B]."""
        return sample_t(self.uniform(ids, purpose), t_min, t_max, self.shift)


def _rows(value: Any, rows: torch.Tensor) -> Any:
    """These rows of a tensor, or of all tensors of a mapping or a tuple; None stays."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _rows(one, rows) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(one, rows) for one in value)
    return value[rows.to(value.device)]


class Batches:
    """The batches of one worker, k + 1 for each update, the student's first.

    Attributes:
        source: conditioned batches (`data.encode.conditioned_batches`).
        micro_batches: equal micro-batches that each of them is cut into.
        device: of the worker's networks.
        rewarded: whether the source brings what a reward knows of the prompts.
    """

    def __init__(
        self,
        source: Iterator[dict[str, Any]],
        micro_batches: int,
        device: torch.device | str = "cpu",
        rewarded: bool = False,
    ) -> None:
        self.source, self.micro_batches, self.device = source, micro_batches, torch.device(device)
        self.roles = ("student", "teacher", *((REWARD,) if rewarded else ()))
        self._consumed: list[list[int]] = []
        self._metrics: dict[str, float] = defaultdict(float)
        self._size = 0  # of the last whole batch; 0: there was none yet

    def next(self, chosen: Sequence[int] | None = None) -> list[MicroBatch]:
        """The next batch in micro-batches, or the chosen ones of them, which may be all that the source brings.

        Raises ValueError where it cannot be divided.
        """
        started = time.perf_counter()
        batch = next(self.source)
        self._metrics["time/data"] += time.perf_counter() - started
        if CUT in batch:
            self._metrics["data/cut_prompts"] += float(np.sum(batch[CUT]))
        ids = torch.tensor(batch["sample_id"], dtype=torch.long)
        columns = {role: columns_of(batch, role) for role in self.roles}
        size, some = self._size, chosen is not None and len(chosen) < self.micro_batches
        if not (some and len(ids) == len(chosen) * size):  # it is whole
            if len(ids) % self.micro_batches:
                raise ValueError(
                    f"distill.micro_batches: a batch of {len(ids)} samples has no {self.micro_batches} equal parts"
                )
            self._size = size = len(ids) // self.micro_batches
        if some and len(ids) == self.micro_batches * size:
            kept = torch.cat([torch.arange(number * size, (number + 1) * size) for number in chosen])
            ids = ids[kept]
            columns = {role: {name: value[kept] for name, value in it.items()} for role, it in columns.items()}
        self._consumed.append(ids.tolist())
        on_device = {
            role: {name: upload(value, self.device) for name, value in it.items()} for role, it in columns.items()
        }

        def cut(it: Conditioning, rows: slice) -> Conditioning:
            return {name: value[rows] for name, value in it.items()}

        return [
            MicroBatch(
                sample_ids=ids[rows],
                student_conditioning=cut(on_device["student"], rows),
                teacher_conditioning=cut(columns["teacher"], rows),
                fake_conditioning=cut(on_device["teacher"], rows),
                reward_conditioning=cut(on_device.get(REWARD, {}), rows),
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
