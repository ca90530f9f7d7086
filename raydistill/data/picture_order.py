"""The order in which one worker is given a set's pictures, and which of them nobody trains on. No Ray, no networks.

An epoch visits the worker's shards in an order that depends on (seed, epoch). What is read is mixed in windows: so many
consecutive rows are shuffled among themselves. A `Position` is the beginning of a window and how many of its rows were
handed out: going on there reads the window once more, and gives the same rows.

A window's memory is bounded, however large its pictures are: what is above WINDOW_BYTES waits in a file without a name, in $TMPDIR.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO

import numpy as np

from raydistill.data.pictures import Cursor, Filters, PictureRow, Pictures
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError

LOOKED_AT = 256  # rows among which those that are held out are looked for at once
WINDOW_BYTES = 512 << 20  # of pictures of a window that are in memory


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
            while (window := _Window(itertools.islice(rows, self.window))).rows:
                after = window.rows[-1].after
                with contextlib.closing(window):
                    for number, index in self._mixed(window.rows, cursor.epoch):
                        if number >= taken:
                            row = window.read(index)
                            any_good |= row.usable
                            last = number + 1 == len(window.rows)
                            yield row, Position(after) if last else Position(cursor, number + 1)
                cursor, taken = after, 0
            if whole and not any_good:
                raise InputError(
                    f"{self.pictures.source}: nothing to train on in reader {self.share[0]}'s share of {self.share[1]}"
                )
            cursor = Cursor(cursor.epoch + 1)

    def _mixed(self, window: list[PictureRow], epoch: int) -> Iterator[tuple[int, int]]:
        """(place, index in the window) of the rows that are trained on; places count all rows of the window."""
        keys = [row.key for row in window]
        order = np.argsort(uniform(self.seed, keys, "picture_window", epoch).numpy(), kind="stable").tolist()
        is_held_out = self._is_held_out(keys)
        for number, index in enumerate(order):
            if not (window[index].left_out or is_held_out[index]):
                yield number, index

    def validation(self, most: int) -> Iterator[PictureRow]:
        """The first `most` pictures that are held out: the same ones for every worker of every life.

        Raises:
            InputError: there is none.
        """
        rows, found = self.pictures.rows(self.seed, filters=self.filters), 0
        while found < most and (some := _Window(itertools.islice(rows, LOOKED_AT))).rows:
            with contextlib.closing(some):
                for index in np.flatnonzero(self._is_held_out([row.key for row in some.rows])).tolist():
                    if some.rows[index].usable and found < most:
                        found += 1
                        yield some.read(index)
        if not found:
            raise InputError(
                f"{self.pictures.source}: no picture is held out (bridge.validation_share={self.held_out:g}); raise the share, or "
                "use a larger set"
            )

    def _is_held_out(self, keys: list[int]) -> np.ndarray:
        return uniform(self.seed, keys, "picture_split").numpy() < self.held_out


class _Window:
    """Rows that are mixed, of which at most WINDOW_BYTES of pictures, and one picture, are in memory.

    Attributes:
        rows: the rows, some without their bytes, which `read` gives.

    Raises:
        OSError: the disk is full; names the folder.
    """

    def __init__(self, rows: Iterable[PictureRow]) -> None:
        self.rows: list[PictureRow] = []
        self._places: dict[int, tuple[int, int]] = {}  # (offset, bytes) of what waits in the file, by index
        self._file: IO[bytes] | None = None
        held = 0
        for row in rows:
            if row.left_out:  # nobody needs it
                row = replace(row, data=b"")
            elif held + len(row.data) > WINDOW_BYTES:
                row = self._set_aside(row)
            held += len(row.data)
            self.rows.append(row)

    def _set_aside(self, row: PictureRow) -> PictureRow:
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (`close` ends it)
            self._places[len(self.rows)] = (self._file.tell(), self._file.write(row.data))
            self._file.flush()
        except OSError as error:
            self.close()
            raise OSError(
                f"{row.name}: {tempfile.gettempdir()} has no room for pictures that wait for their turn ({error}); name "
                "another folder in TMPDIR, or lower bridge.shuffle"
            ) from error
        return replace(row, data=b"")

    def read(self, index: int) -> PictureRow:
        """A row with its bytes."""
        if index not in self._places:
            return self.rows[index]
        offset, size = self._places[index]
        self._file.seek(offset)
        return replace(self.rows[index], data=self._file.read(size))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
