"""Teacher samples for the discriminator: an endless order over a set of pairs, read one parquet row group at a time.

The cursor is a position. Position p belongs to the fake score's update p // G, row p % G of its G samples. Rows of an
update are cut into lanes of equal size, one for each configured worker. A lane has rows of the set for itself, which lie
together, and reads all of them once in an epoch of its own. Row groups are shuffled by (seed, epoch); rows are mixed among
neighbours in that order. So a position's row follows from the set and the settings alone, whoever reads it and whenever.

A worker holds the row groups that its lanes are reading: `WINDOW_BYTES` of latents a lane, and two groups more.

Shapes: B rows, C×H×W normalised teacher latents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from raydistill.config.schema import Config
from raydistill.data.pairs import ROW_GROUP, PairSet, read_captions, read_latents
from raydistill.storage.place import Place

WINDOW_BYTES = 256 << 20  # latents among which the rows of a lane are mixed
CAPTION_GROUPS = 256  # row groups whose captions are kept in memory

Rows = Sequence[int] | np.ndarray


class Grouped(Protocol):
    """A set of rows that lie in groups.

    Attributes:
        starts: first row of each group, and the number of rows; int64 [M + 1].
        row_bytes: of one row's latents on disk.
    """

    starts: np.ndarray
    row_bytes: int


def window_of(starts: np.ndarray, row_bytes: int) -> int:
    """Row groups among which the rows of a lane are mixed, at least 1."""
    return max(1, WINDOW_BYTES // (int(np.diff(starts).max()) * row_bytes))


def most_bytes(row_bytes: int, lanes: int = 1) -> int:
    """Most bytes of latents that the readers of some lanes hold, of a set with row groups of `ROW_GROUP` rows."""
    group = ROW_GROUP * row_bytes
    return lanes * (max(1, WINDOW_BYTES // group) + 2) * group


class RealOrder:
    """The endless order.

    Args:
        starts: of the set's row groups, see `Grouped`.
        window: row groups among which rows are mixed.
        seed: of the order.
        lanes: configured workers.
        size: samples of a lane in an update.
        fakes: fake-score updates for each update of the student.
    """

    def __init__(self, starts: np.ndarray, *, window: int, seed: int, lanes: int, size: int, fakes: int) -> None:
        self.starts, self.window, self.seed = starts, window, seed
        self.lanes, self.size, self.fakes = lanes, size, fakes
        self._orders = functools.lru_cache(maxsize=2 * lanes)(self._order)  # of each lane two at the seam

    @classmethod
    def of(cls, config: Config, reals: Grouped) -> RealOrder:
        """The order in which a run reads a set."""
        return cls(
            reals.starts,
            window=window_of(reals.starts, reals.row_bytes),
            seed=config.run.seed,
            lanes=config.distill.workers,
            size=config.distill.batch_size,
            fakes=config.fake_score.updates,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {name: getattr(self, name) for name in ("window", "seed", "lanes", "size", "fakes")}
        return functools.partial(RealOrder, **settings), (self.starts,)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def slot_size(self) -> int:
        """Samples of all workers in an update."""
        return self.lanes * self.size

    def slot(self, slot: int) -> int | None:
        """Number of the fake score's update that a slot of prompts belongs to; None: the slot is the student's."""
        update, turn = divmod(slot, 1 + self.fakes)
        return update * self.fakes + turn - 1 if turn else None

    def positions(self, sample_ids: Rows) -> np.ndarray:
        """Positions [B] of the teacher samples that the fake score's update of these sample ids sees.

        Ids of the student's own slots, which see none, count as those of the slot behind them.
        """
        slot, row = np.divmod(np.asarray(sample_ids, dtype=np.int64), self.slot_size)
        update, turn = np.divmod(slot, 1 + self.fakes)
        return (update * self.fakes + np.maximum(turn, 1) - 1) * self.slot_size + row

    def rows(self, positions: Rows) -> np.ndarray:
        """Rows [B] of the set at these positions, int64."""
        lane, epoch, offset = self._lanes(np.asarray(positions, dtype=np.int64))
        rows = np.empty_like(lane)
        for one in np.unique(np.stack([lane, epoch]), axis=1).T:
            here = (lane == one[0]) & (epoch == one[1])
            rows[here] = self._orders(int(one[0]), int(one[1]))[offset[here]]
        return rows

    def epoch(self, position: int) -> float:
        """How often this position's lane has read its rows when it has read this one."""
        lane, epoch, offset = self._lanes(np.asarray([position], dtype=np.int64))
        first, stop = self._bounds(int(lane[0]))
        return float(epoch[0] + (offset[0] + 1) / (stop - first))

    def _lanes(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lane, epoch, offset in the epoch) of positions."""
        slot, row = np.divmod(positions, self.slot_size)
        lane, within = np.divmod(row, self.size)
        lengths = np.array([stop - first for first, stop in map(self._bounds, range(self.lanes))])
        epoch, offset = np.divmod(slot * self.size + within, lengths[lane])
        return lane, epoch, offset

    def _bounds(self, lane: int) -> tuple[int, int]:
        """A lane's rows [first, stop): all where there are fewer rows than lanes."""
        count = len(self)
        return (lane * count // self.lanes, (lane + 1) * count // self.lanes) if count >= self.lanes else (0, count)

    def _order(self, lane: int, epoch: int) -> np.ndarray:
        """A lane's rows in the order of an epoch.

        Each row's key is the rank of its group plus a draw below the window: so the rows of a group are spread over the
        `window` groups behind it, and groups are begun and ended one by one. Few groups are mixed completely.
        """
        first, stop = self._bounds(lane)
        rows = np.arange(first, stop, dtype=np.int64)
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        groups -= groups[0]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, lane, 7])))
        ranks = generator.permutation(groups[-1] + 1)
        keys = self.window * generator.random(len(rows))
        return rows[np.argsort(keys if len(ranks) <= self.window else keys + ranks[groups], kind="stable")]


class RealSet:
    """The first rows of a set of pairs, wherever it lies, read row group by row group and held while they are needed.

    Args:
        folder: of the set; nothing of it is staged.
        shape: C, H, W of its teacher latents.
        count: rows; None: all.
        lanes: of this process, whose row groups it holds.

    Attributes:
        starts, row_bytes: see `Grouped`.
        reads: row groups that were read, so far.

    Raises:
        InputError: as `PairSet`.
    """

    def __init__(
        self, folder: str | Place, shape: tuple[int, int, int], count: int | None = None, lanes: int = 1
    ) -> None:
        pairs = PairSet(folder, z_teacher_shape=shape)
        sizes = [(file, group, size) for file, own in enumerate(pairs.groups) for group, size in enumerate(own) if size]
        ends = np.cumsum([size for _, _, size in sizes])
        total = len(pairs) if count is None else min(count, len(pairs))
        used = int(np.searchsorted(ends, total)) + 1
        self.files: list[Place] = pairs.files
        self.groups = [(file, group) for file, group, _ in sizes[:used]]
        self.starts = np.concatenate([[0], np.minimum(ends[:used], total)]).astype(np.int64)
        self.row_bytes = 2 * math.prod(shape)
        self._begin(lanes)

    def _begin(self, lanes: int) -> None:
        self.lanes, self.reads = lanes, 0
        groups = lanes * (window_of(self.starts, self.row_bytes) + 2)
        self._latents = functools.lru_cache(maxsize=groups)(self._read_latents)
        self._captions = functools.lru_cache(maxsize=CAPTION_GROUPS)(self._read_captions)

    def __getstate__(self) -> dict[str, Any]:
        """Without what it holds: another process reads for itself."""
        return {name: getattr(self, name) for name in ("files", "groups", "starts", "row_bytes", "lanes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(self.lanes)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def latents(self, rows: Rows) -> torch.Tensor:
        """Teacher latents [B, C, H, W] of these rows, as they are stored."""
        return torch.stack([self._latents(group)[index] for group, index in self._groups(rows)])

    def captions(self, rows: Rows) -> list[str]:
        """Captions of these rows."""
        return [self._captions(group)[index] for group, index in self._groups(rows)]

    def first(self, count: int) -> torch.Tensor:
        """Latents of the first `count` rows, or of all."""
        return self.latents(range(min(count, len(self))))

    def _groups(self, rows: Rows) -> list[tuple[int, int]]:
        """(group, index in it) of each row. Raises IndexError."""
        rows = np.asarray(rows, dtype=np.int64)
        if not rows.size or rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows of the teacher samples must be 0 … {len(self) - 1}, at least one")
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        return list(zip(groups.tolist(), (rows - self.starts[groups]).tolist(), strict=True))

    def _read_latents(self, group: int) -> torch.Tensor:
        self.reads += 1
        file, number = self.groups[group]
        return read_latents(self.files[file], number)

    def _read_captions(self, group: int) -> list[str]:
        file, number = self.groups[group]
        return read_captions(self.files[file], number)
