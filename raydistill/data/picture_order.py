"""The order in which one worker is given a set's pictures, and which of them nobody trains on. No Ray, no networks.

An epoch visits the worker's shards in an order that depends on (seed, epoch). What is read is mixed in windows: so many
consecutive rows are shuffled among themselves. A `Position` is the beginning of a window and how many of its rows were
handed out: going on there reads the window once more, and gives the same rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raydistill.data.pictures import Cursor, Filters, PictureRow, Pictures
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError

LOOKED_AT = 256  # rows among which those that are held out are looked for at once


@dataclass(frozen=True)
class Position:
    """Where a worker goes on: behind `taken` rows of the window that begins at `window`."""

    window: Cursor = Cursor()
    taken: int = 0


@dataclass(frozen=True, kw_only=True)
class PictureOrder:
    """Pictures of one worker, in an order that follows from the seed.

    Args:
        pictures: the set.
        seed: of the order, and of what is held out.
        share: (rank, world) of this worker.
        held_out: share of the pictures that are never trained on: those whose own draw is below it.
        window: rows that are mixed.
        filters: what is passed over.
    """

    pictures: Pictures
    seed: int
    share: tuple[int, int] = (0, 1)
    held_out: float
    window: int
    filters: Filters = Filters()

    def rows(self, start: Position = Position()) -> Iterator[tuple[PictureRow, Position]]:  # noqa: B008 (frozen)
        """Rows to train on, bad pictures among them, epoch after epoch; and where reading goes on behind each.

        Raises:
            InputError: a whole epoch of this worker has no picture to train on.
            OSError: a store does not answer.
        """
        cursor, taken = start.window, start.taken
        while True:
            whole, any_good = (cursor.shard, cursor.row, taken) == (0, 0, 0), False
            at = (cursor.shard, cursor.row)
            rows = self.pictures.rows(self.seed, cursor.epoch, self.share, at, self.filters)
            while window := list(itertools.islice(rows, self.window)):
                after = window[-1].after
                for number, row in self._mixed(window, cursor.epoch):
                    if number >= taken:
                        any_good |= row.usable
                        yield row, Position(cursor, number + 1) if number + 1 < len(window) else Position(after)
                cursor, taken = after, 0
            if whole and not any_good:
                raise InputError(
                    f"{self.pictures.source}: nothing to train on in reader {self.share[0]}'s share of {self.share[1]}"
                )
            cursor = Cursor(cursor.epoch + 1)

    def _mixed(self, window: list[PictureRow], epoch: int) -> Iterator[tuple[int, PictureRow]]:
        """(place, row) of the rows that are trained on; places count all rows of the window."""
        keys = [row.key for row in window]
        order = np.argsort(uniform(self.seed, keys, "picture_window", epoch).numpy(), kind="stable").tolist()
        is_held_out = self._is_held_out(keys)
        for number, index in enumerate(order):
            if not (window[index].left_out or is_held_out[index]):
                yield number, window[index]

    def validation(self, most: int) -> Iterator[PictureRow]:
        """The first `most` pictures that are held out: the same ones for every worker of every life.

        Raises:
            InputError: there is none.
        """
        rows, found = self.pictures.rows(self.seed, filters=self.filters), 0
        while found < most and (some := list(itertools.islice(rows, LOOKED_AT))):
            for row, is_held_out in zip(some, self._is_held_out([row.key for row in some]), strict=True):
                if is_held_out and row.usable and found < most:
                    found += 1
                    yield row
        if not found:
            raise InputError(
                f"{self.pictures.source}: no picture is held out (bridge.validation_share={self.held_out:g}); raise the share, or "
                "use a larger set"
            )

    def _is_held_out(self, keys: list[int]) -> np.ndarray:
        return uniform(self.seed, keys, "picture_split").numpy() < self.held_out
