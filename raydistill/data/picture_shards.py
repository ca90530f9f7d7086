"""Shards of pictures, and the rows of one: a tar of a WebDataset, a parquet file, or a part of a listing of picture files.

A shard is read as a stream, from a row on, and never lies whole in memory or on a disk. Ray Data's own readers do not
serve here (2.60). `read_webdataset` names no rows, so that nothing can go on within a tar; it builds blocks of 512 samples;
one odd sample fails the whole set; a read that is tried again goes on in a stream that has advanced, and loses samples; and its
default decoder unpickles. `read_parquet` names no rows either, and its tasks take parts of files as the cluster's size
has them. `read_images` and `read_binary_files` fail with the first file that cannot be read. So Ray Data carries
the numbers of shards to its tasks, and pictures from there; what reads one shard is here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.picture_columns import (
    NOT_UTF8,
    by_wider_rule,
    captions_in_words,
    columns_of,
    flat,
)
from raydistill.data.text_files import decoded_text
from raydistill.data.texts import Texts
from raydistill.errors import InputError
from raydistill.storage.globs import Found
from raydistill.storage.place import Place, Remote, as_os_errors, cause

MOST_BYTES = 256 << 20  # of a picture, or of one file in a tar
LISTED = 256  # picture files of a listing that are one shard
READERS, AT_ONCE = 8, 32  # threads that read them, and how many are read ahead
AHEAD_BYTES = 128 << 20  # of what is read ahead; above it no other picture is begun
PARQUET_ROWS, PARQUET_BUFFER = 16, 4 << 20  # read at a time; bytes of one request to a store
LONGEST_KEY = 1024  # bytes of an object's name in a bucket
OF_STORE = re.compile(
    r"AWS Error|google::cloud|HTTP status|curlCode|httpx"
)  # in errors of Arrow's and the hub's stores
NO_PATH = {
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENOTDIR: "no such file",
    errno.ELOOP: "its links lead in a circle",
}


@dataclass(frozen=True)
class RawRow:
    """One row of a shard as it lies there."""

    name: str  # file, and key or row in it
    data: bytes = b""  # the encoded picture
    captions: tuple[str, ...] = ()  # of which one is taken
    failure: str = ""  # why there is no picture, or ""


class Shards(ABC):
    """Shards 0 … N - 1 of one kind; can be pickled.

    Attributes:
        kind: what messages call them.
        about: where the first one's captions are, for people.
        wider: names of captions that earlier versions did not find, which make another set.
    """

    kind: str
    about = ""
    wider: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, shard: int) -> str:
        """How messages call a shard."""

    @abstractmethod
    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        """Rows of a shard from number `start` on.

        Raises:
            Torn: it breaks off.
            OSError: the store does not answer, or a connection was cut. Another call may go on at the row that did not come.
        """

    def where(self, shard: int) -> str:
        """The shard with its whole path or URI."""
        return self.name(shard)

    is_remote = False  # whether a shard that breaks off may come whole when it is asked for again


class Torn(OSError):
    """A part of a shard cannot be read, or its end.

    Attributes:
        stop: number of the row behind the lost ones, where reading may go on; None: nothing is behind them.
    """

    def __init__(self, name: str, why: str, lost: range, *, about: str = "", ends: bool = True) -> None:
        failure = f"{why}; {about}{len(lost):,} row{'s are' if len(lost) > 1 else ' is'} lost"
        super().__init__(f"{name}: {failure}")
        self._row, self._lost, self.stop = RawRow(name, failure=failure), lost, None if ends else lost.stop

    def rows(self, start: int) -> Iterator[RawRow]:
        """One for each lost row from number `start` on."""
        return (self._row for _ in range(max(start, self._lost.start), self._lost.stop))


class FileShards(Shards):
    """Shards that are files."""

    def __init__(self, files: Sequence[Found], image_column: str, captions: Sequence[str] | None) -> None:
        self.files, self.image_column, self.captions = files, image_column, captions

    def __len__(self) -> int:
        return len(self.files)

    def name(self, shard: int) -> str:
        return self.files[shard].place.name

    def where(self, shard: int) -> str:
        return str(self.files[shard].place)

    @property
    def is_remote(self) -> bool:
        return isinstance(self.files[0].place, Remote)

    def torn(self, shard: int, behind: str, why: str, lost: range, **more: Any) -> Torn:
        """As `Torn`, of a shard that breaks off `behind` something."""
        name = self.where(shard) if self.is_remote else self.name(shard)
        return Torn(f"{name}, after {behind}", why, lost, **more)


def opened(place: Place) -> IO[bytes]:
    return place.filesystem.open_input_stream(place.key) if isinstance(place, Remote) else place.open("rb")


# -- parquet --------------------------------------------------------------------------------------------


class ParquetShards(FileShards):
    """Parquet files as the hub has them: pictures as bytes or as a struct {bytes, path}, captions in one column or several.

    Memory holds a few rows, and the pages that they lie in. Their writer decides how large these are: at most a row group,
    about 100 MB in the hub's sets.

    The first file's columns are looked at here, those of the others when their turn comes.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[Found], image_column: str, captions: Sequence[str] | None) -> None:
        super().__init__(files, image_column, captions)
        try:
            with as_os_errors(), self._parquet(0) as parquet:
                schema = parquet.schema_arrow
                _, found = columns_of(files[0].place, schema, image_column, captions)
                self.about, self.wider = captions_in_words(found, schema.names), by_wider_rule(found, captions)
        except (pa.ArrowInvalid, OSError) as error:
            place = files[0].place
            why = cause(error, place.scheme) if isinstance(place, Remote) else " ".join(str(error).split())
            raise InputError(f"{place}: cannot be read: {why}") from None

    def _parquet(self, shard: int) -> pq.ParquetFile:
        place = self.files[shard].place
        where = {"filesystem": place.filesystem} if isinstance(place, Remote) else {}
        source = place.key if isinstance(place, Remote) else place
        return pq.ParquetFile(source, buffer_size=PARQUET_BUFFER, pre_buffer=False, **where)

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        file, number, end = self.name(shard), 0, None  # end: of the row group that is read
        try:
            with self._parquet(shard) as parquet:
                place = self.files[shard].place
                image, texts = columns_of(place, parquet.schema_arrow, self.image_column, self.captions)
                for group in range(parquet.metadata.num_row_groups):
                    end = number + parquet.metadata.row_group(group).num_rows
                    if end <= start:
                        number = end
                        continue
                    for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[image, *texts]):
                        for row in range(batch.num_rows):
                            if number >= start:
                                yield self._row(f"{file}, row {number + 1}", batch, row, image, texts)
                            number += 1
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not _is_of_file(error):
                raise
            why = f"the file breaks off ({' '.join(str(error).split())[:200]})"
            lost = range(number, number + 1 if end is None else max(end, number + 1))
            raise self.torn(shard, f"row {number}", why, lost, ends=end is None) from error

    def _row(self, name: str, batch: pa.RecordBatch, index: int, image: str, texts: list[str]) -> RawRow:
        value = batch.column(image)[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            return RawRow(name, failure=f"no bytes in column {image!r}")
        try:
            return RawRow(name, data, flat(_plain(batch.column(text)[index].as_py()) for text in texts))
        except UnicodeDecodeError:
            return RawRow(name, failure=NOT_UTF8)


def _is_of_file(error: OSError) -> bool:
    """Whether a file is damaged. Arrow says so by an OSError too, which no system, store or HTTP client has made."""
    return type(error) is OSError and error.errno is None and not OF_STORE.search(str(error))


def _plain(value: Any) -> Any:
    """Bytes, as which some programs write strings, as strings. Raises UnicodeDecodeError."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


# -- listings -------------------------------------------------------------------------------------------


def _enough(waiting: Sequence[Future[RawRow]]) -> bool:
    """Whether no other picture is to be begun: so many are on their way, or so much of them is here and not yet taken."""
    here = [one for one in waiting if one.done()]
    size = sum(len(one.result().data) for one in here if one.exception() is None)
    return len(waiting) >= AT_ONCE or len(waiting) - len(here) >= READERS or size > AHEAD_BYTES


class ListedShards(Shards):
    """Picture files below a folder, as a listing names them; LISTED of them are one shard.

    Args:
        kind, about: as attributes of all shards.
        base: the folder.
        entries: (path below it, captions) of each; None for captions that stand in a .txt file of the same name. A text
            instead of captions says why the entry cannot be used.
    """

    def __init__(
        self, kind: str, base: Place, entries: Iterable[tuple[str, Sequence[str] | str | None]], about: str = ""
    ) -> None:
        self.kind, self.base, self.about = kind, base, about
        digest = hashlib.blake2b(digest_size=16)

        def texts() -> Iterator[str]:
            for entry in entries:
                text = json.dumps(entry)
                digest.update(text.encode() + b"\n")
                yield text

        self._entries = Texts(texts())  # on disk
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return -(-len(self._entries) // LISTED)

    def where(self, shard: int) -> str:
        return f"{self.base}, {self.name(shard)}"

    def name(self, shard: int) -> str:
        return f"pictures {shard * LISTED + 1} … {min((shard + 1) * LISTED, len(self._entries))}"

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        numbers = iter(range(shard * LISTED + start, min((shard + 1) * LISTED, len(self._entries))))
        waiting: deque[Future[RawRow]] = deque()
        with ThreadPoolExecutor(READERS) as readers:
            for number in numbers:
                waiting.append(readers.submit(self._row, number))
                while _enough(waiting):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _row(self, number: int) -> RawRow:
        path, captions = json.loads(self._entries[number])
        if isinstance(captions, str):
            return RawRow(path, failure=captions)
        segments = path.replace("\\", "/").split("/")
        if path.startswith("/") or ".." in segments:
            return RawRow(path, failure="the path leads out of the folder")
        path = "/".join(segment for segment in segments if segment not in ("", "."))
        if why := self._no_path(path):
            return RawRow(path, failure=why)
        try:
            if captions is None:
                captions = [decoded_text(self._read(f"{path.rpartition('.')[0]}.txt"))]
            return RawRow(path, self._read(path), flat(captions))
        except (FileNotFoundError, IsADirectoryError):
            return RawRow(path, failure="no such file")
        except PermissionError:
            return RawRow(path, failure="it may not be read")
        except OSError as error:  # others may be gone at the next attempt
            if isinstance(self.base, Remote) or error.errno not in NO_PATH:
                raise
            return RawRow(path, failure=NO_PATH[error.errno])

    def _no_path(self, path: str) -> str:
        """Why no store has such a name, or ""."""
        is_remote = isinstance(self.base, Remote)
        try:
            encoded = path.encode(
                errors="strict" if is_remote else "surrogateescape"
            )  # as local names of odd bytes are
        except UnicodeEncodeError:
            return "the path is not valid UTF-8"
        too_long = is_remote and len(f"{self.base.key}/".encode() + encoded) > LONGEST_KEY
        return "the path has a null character" if b"\0" in encoded else NO_PATH[errno.ENAMETOOLONG] if too_long else ""

    def _read(self, path: str) -> bytes:
        place, most = self.base / path, MOST_BYTES
        with opened(place) as stream:
            if isinstance(place, Path):  # Python sets aside as much memory as it is asked to read
                most = min(most, os.fstat(stream.fileno()).st_size)
            return stream.read(most)
