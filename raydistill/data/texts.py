"""Long columns on disk: what a file of a million prompts needs, without a million Python objects.

They lie in files without a name, in the folder of temporary files ($TMPDIR, better a disk than memory), which end with
their last reader. Memory holds the pages that were just read, and the system drops those as it likes.
"""

from __future__ import annotations

import mmap
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

CHUNK = 1 << 16  # numbers that are in memory at a time


class Spill:
    """A column that is written once, from its first value to its last, and then read anywhere.

    Raises OSError where the disk is full.
    """

    def __init__(self, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (`array` closes it)

    def append(self, number: int) -> None:
        self._file.write(number.to_bytes(self.dtype.itemsize, sys.byteorder, signed=True))

    def write(self, values: bytes | np.ndarray) -> None:
        self._file.write(values)

    def array(self) -> np.ndarray:
        """All of it, mapped from the file; ends the writing."""
        with self._file as file:
            file.flush()
            size = file.tell()
            # an empty file cannot be mapped
            return np.frombuffer(mmap.mmap(file.fileno(), size), self.dtype) if size else np.empty(0, self.dtype)


class Texts(Sequence[str]):
    """Texts of any length, as UTF-8 in a file.

    A copy in Ray's object store is not unpacked by its readers.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        content, ends, end = Spill(np.uint8), Spill(np.int64), 0
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")  # which a command line may have
            content.write(encoded)
            end += len(encoded)
            ends.append(end)
        self._content, self._ends = content.array(), ends.array()  # uint8 [bytes], int64 [N]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # raises IndexError; takes negative ones
        return str(self._content[self._ends[i - 1] if i else 0 : self._ends[i]].data, "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), CHUNK):
            for end in self._ends[first : first + CHUNK].tolist():
                yield str(self._content[start:end].data, "utf-8", "surrogatepass")
                start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Texts({self[:3]!r}{', …' if len(self) > 3 else ''})"


def repeated(hashes: Spill) -> int:
    """How many of these int64 have an equal one before them, in memory of a constant size."""
    ordered = hashes.array()
    ordered.sort()  # on disk
    chunks = (ordered[first : first + CHUNK + 1] for first in range(0, len(ordered), CHUNK))  # one ends the next begins
    return sum(int((chunk[1:] == chunk[:-1]).sum()) for chunk in chunks)


def permutation(count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count], read-only: the numbers of `generator.permutation(count)`, on disk."""
    numbers = Spill(np.int64)
    for first in range(0, count, CHUNK):
        numbers.write(np.arange(first, min(first + CHUNK, count), dtype=np.int64))
    order = numbers.array()
    generator.shuffle(order)
    order.flags.writeable = False  # shared by everybody who asks for it
    return order
