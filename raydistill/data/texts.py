"""Long columns on disk: what a file of a million prompts needs, without a million Python objects.

They lie in files without a name, in the folder of temporary files ($TMPDIR, better a disk than memory), which end with
their last reader. Memory holds the pages that were just read, and the system drops those as it likes.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, overload

import numpy as np
import pyarrow as pa

CHUNK = 1 << 16  # numbers that are in memory at a time
TEXT_CHUNK = 1 << 12  # texts that are in memory at a time
# Not a column of strings: those are strict UTF-8, and a command line may have lone surrogates.
_SCHEMA = pa.schema([("text", pa.large_binary())])


def _mapped(file: IO[bytes]) -> mmap.mmap:
    file.flush()
    return mmap.mmap(file.fileno(), 0)


class Texts(Sequence[str]):
    """Texts of any length in a memory-mapped Arrow file, as UTF-8.

    A copy in Ray's object store is not unpacked by its readers. Raises OSError where the disk is full.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        texts = iter(texts)
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                while chunk := [text.encode("utf-8", "surrogatepass") for text in itertools.islice(texts, TEXT_CHUNK)]:
                    writer.write(
                        pa.record_batch(
                            [pa.array(chunk, pa.large_binary(), memory_pool=pa.system_memory_pool())], schema=_SCHEMA
                        )
                    )
            self._column = pa.ipc.open_file(pa.py_buffer(_mapped(file))).read_all().column("text")

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return str(self._column[int(index)].as_buffer(), "utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for value in itertools.chain.from_iterable(self._column.chunks):
            yield str(value.as_buffer(), "utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Texts({self[:3]!r}{', …' if len(self) > 3 else ''})"


class Numbers:
    """int64 numbers that are written once, from the first to the last, and then read anywhere.

    Raises OSError where the disk is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (`array` closes it)

    def append(self, number: int) -> None:
        self._file.write(number.to_bytes(8, sys.byteorder, signed=True))

    def extend(self, numbers: np.ndarray) -> None:
        self._file.write(numbers)

    def __del__(self) -> None:
        # Python writes what is left as the file goes: on a full disk that fails again, and from 3.13 on it is printed.
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: there was no room even for the file
            self._file.close()

    def array(self) -> np.ndarray:
        """All of them, mapped from the file; ends the writing."""
        with self._file as file:  # an empty file cannot be mapped
            return np.frombuffer(_mapped(file), np.int64) if file.tell() else np.empty(0, np.int64)


def repeated(hashes: Numbers) -> int:
    """How many of these have an equal one before them, in memory of a constant size."""
    ordered = hashes.array()
    ordered.sort()  # on disk
    chunks = (ordered[first : first + CHUNK + 1] for first in range(0, len(ordered), CHUNK))  # one ends the next begins
    return sum(int((chunk[1:] == chunk[:-1]).sum()) for chunk in chunks)


def permutation(count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count], read-only: the numbers of `generator.permutation(count)`, on disk."""
    numbers = Numbers()
    for first in range(0, count, CHUNK):
        numbers.extend(np.arange(first, min(first + CHUNK, count), dtype=np.int64))
    order = numbers.array()
    generator.shuffle(order)
    order.flags.writeable = False  # shared by everybody who asks for it
    return order


_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _is_any(kind: pa.DataType, kinds: Iterable[Callable[[pa.DataType], bool]]) -> bool:
    """Also behind dictionaries and extension types, as of JSON."""
    while (extended := isinstance(kind, pa.BaseExtensionType)) or pa.types.is_dictionary(kind):
        kind = kind.storage_type if extended else kind.value_type
    return any(is_one(kind) for is_one in kinds)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    return _is_any(kind, _BYTES)


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, or bytes, as which many programs write strings."""
    return _is_any(kind, _STRINGS + _BYTES)


def without_views(table: pa.Table) -> pa.Table:
    """The same table without views, of which Arrow takes no rows."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    for index, column in enumerate(table.schema):
        if column.type in plain:
            table = table.set_column(index, column.name, table[index].cast(plain[column.type]))
    return table


def undecoded(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    """Strings as bytes: one that is no UTF-8 would otherwise spoil the whole column."""
    return [text for chunk in getattr(column, "chunks", [column]) for text in _as_bytes(chunk).to_pylist()]


def _as_bytes(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ExtensionArray):
        return _as_bytes(column.storage)
    if isinstance(column, pa.DictionaryArray):  # whose cast does not know views
        return _as_bytes(column.dictionary).take(column.indices)
    return column.cast(pa.large_binary())
