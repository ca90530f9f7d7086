"""Shards of pictures, and the rows of one: a tar of a WebDataset, a parquet file, or a part of a listing of picture files.

A shard is read as a stream, from a row on, and never lies whole in memory or on a disk. Ray Data's own readers do not
serve here (2.60). `read_webdataset` names no rows, so that nothing can go on within a tar; it builds blocks of 512 samples;
one odd sample fails the whole set; a read that is tried again goes on in a stream that has advanced, and loses samples; and its
default decoder unpickles. `read_parquet` names no rows either, and its tasks take parts of files as the cluster's size
has them. `read_images` and `read_binary_files` fail with the first file that cannot be read. So Ray Data carries
the numbers of shards to its tasks, and pictures from there; what reads one shard is here.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import posixpath
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.images import SUFFIXES, holds_picture
from raydistill.data.text_files import decoded_text
from raydistill.data.texts import Texts, holds_text
from raydistill.errors import InputError
from raydistill.storage.globs import Found
from raydistill.storage.place import Place, Remote, cause

CAPTIONS = ("caption", "text", "prompt", "caption_*")  # columns or keys, where none is named
TEXT_FILES = ("txt", "text", "caption")  # of a tar, with a caption each
MOST_BYTES = 256 << 20  # of a picture, or of one file in a tar
LISTED = 256  # picture files of a listing that are one shard
READERS, AT_ONCE = 8, 32  # threads that read them, and how many lie in memory
PARQUET_ROWS, PARQUET_BUFFER = 16, 4 << 20  # read at a time; bytes of one request to a store


@dataclass(frozen=True)
class RawRow:
    """One row of a shard as it lies there."""

    name: str  # file, and key or row in it
    data: bytes = b""  # the encoded picture
    captions: tuple[str, ...] = ()  # of which one is taken
    failure: str = ""  # why there is no picture, or ""


class Shards(ABC):
    """Shards 0 … N - 1 of one kind; can be pickled."""

    kind: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, shard: int) -> str:
        """How messages call a shard."""

    @abstractmethod
    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        """Rows of a shard from number `start` on. A shard that breaks off ends with a row that says so.

        Raises:
            OSError: the store does not answer; another call may go on at the row that did not come.
        """


# -- captions -------------------------------------------------------------------------------------------


def named_captions(record: Mapping[str, Any], names: Sequence[str] | None) -> tuple[str, ...]:
    """The captions that a record of columns or keys holds, several where it has several or lists of them.

    `names`: of the columns, with `*` for any letters; None: CAPTIONS.
    """
    chosen = [key for name in names or CAPTIONS for key in record if fnmatch.fnmatchcase(key, name)]
    values = (record[key] for key in dict.fromkeys(chosen))
    flat = (text for value in values for text in (value if isinstance(value, list | tuple) else [value]))
    return tuple(one for text in flat if isinstance(text, str) and (one := " ".join(text.split())))


def _opened(place: Place) -> IO[bytes]:
    return place.filesystem.open_input_stream(place.key) if isinstance(place, Remote) else place.open("rb")


# -- tars -----------------------------------------------------------------------------------------------


class TarShards(Shards):
    """Tars of a WebDataset: files of one name, up to its first dot, stand next to each other and are one sample."""

    kind = "tars"

    def __init__(self, files: Sequence[Found], image_column: str, captions: Sequence[str] | None) -> None:
        self.files, self.image_column, self.captions = files, image_column, captions

    def __len__(self) -> int:
        return len(self.files)

    def name(self, shard: int) -> str:
        return self.files[shard].place.name

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        place, seen, last, number = self.files[shard].place, set[int](), "its beginning", 0
        try:
            with _opened(place) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
                for key, members in itertools.groupby(_members(archive), lambda member: member[0]):
                    # what is skipped is read too: a tar that breaks off does so at the same row for everybody
                    files = {suffix: _extracted(archive, member) for _, suffix, member in members}
                    if number >= start:
                        yield self._row(f"{place.name}, {key}", files, hash(key) in seen)
                    seen.add(hash(key))
                    last, number = key, number + 1
        except (tarfile.TarError, EOFError, zlib.error) as error:
            if number >= start:
                why = f"the tar breaks off ({' '.join(str(error).split())})"
                yield RawRow(f"{place.name}, after {last}", failure=why)

    def _row(self, name: str, files: dict[str, bytes | None], again: bool) -> RawRow:
        if again:
            why = "the files of its sample are not next to each other; make the tar again with `tar --sort=name`"
            return RawRow(name, failure=why)
        pictures = [suffix for suffix in files if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES]
        if not pictures:
            return RawRow(name, failure=f"no picture among its files ({', '.join(files)})")
        suffix = next((one for one in pictures if one == self.image_column), pictures[0])
        data = files[suffix]
        if data is None:
            return RawRow(name, failure=f"more than {MOST_BYTES >> 20} MiB")
        try:
            captions = self._captions(files)
        except ValueError as error:
            return RawRow(name, failure=str(error))
        return RawRow(name, data, captions)

    def _captions(self, files: Mapping[str, bytes | None]) -> tuple[str, ...]:
        """Of text files, else of the JSON file. Raises ValueError: why they cannot be read."""
        wanted = self.captions or TEXT_FILES
        texts = {s: decoded_text(data) for s, data in files.items() if data and s.lower() in {*TEXT_FILES, *wanted}}
        found = named_captions(texts, wanted)
        if any("\udcff" in text for text in found):
            raise ValueError("the caption is not valid UTF-8")
        if found or not files.get("json"):
            return found
        try:
            record = json.loads(files["json"] or b"")
        except (ValueError, RecursionError):
            raise ValueError("its JSON file is none") from None
        return named_captions(record, self.captions) if isinstance(record, dict) else ()


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes whatever is none for the end of the tar: a cut or damaged one would go unnoticed."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # its end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "end of file") from None


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, file) of each file, links and folders left out."""
    for member in archive:
        archive.members = []  # type: ignore[misc]  # it would remember all
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if member.isreg() and dot and stem:
            yield posixpath.join(folder, stem), suffix, member


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """None: it is too large."""
    if member.size > MOST_BYTES:
        return None
    stream = archive.extractfile(member)
    return stream.read() if stream else b""


# -- parquet --------------------------------------------------------------------------------------------


class ParquetShards(Shards):
    """Parquet files as the hub has them: pictures as bytes or as a struct {bytes, path}, captions in one column or several.

    The first file's columns are looked at here, those of the others when their turn comes.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[Found], image_column: str, captions: Sequence[str] | None) -> None:
        self.files, self.image_column, self.captions = files, image_column, captions
        try:
            with self._parquet(0) as parquet:
                self._columns(0, parquet.schema_arrow)
        except (pa.ArrowInvalid, OSError) as error:
            place = files[0].place
            why = cause(error, place.scheme) if isinstance(place, Remote) else " ".join(str(error).split())
            raise InputError(f"{place}: cannot be read: {why}") from None

    def __len__(self) -> int:
        return len(self.files)

    def name(self, shard: int) -> str:
        return self.files[shard].place.name

    def _parquet(self, shard: int) -> pq.ParquetFile:
        place = self.files[shard].place
        where = {"filesystem": place.filesystem} if isinstance(place, Remote) else {}
        source = place.key if isinstance(place, Remote) else place
        return pq.ParquetFile(source, buffer_size=PARQUET_BUFFER, pre_buffer=False, **where)

    def _columns(self, shard: int, schema: pa.Schema) -> tuple[str, list[str]]:
        """(column of pictures, columns of captions). Raises InputError."""
        place, names = self.files[shard].place, schema.names
        pictures = [name for name in names if holds_picture(schema.field(name).type)]
        image = self.image_column if self.image_column in names else ""
        if not image and len(pictures) == 1 and self.image_column == "image":  # the default, which names nothing
            image = pictures[0]
        listed = ", ".join(map(repr, names))
        if not image:
            raise InputError(
                f"{place}: no column {self.image_column!r} (synthesis.image_column); the file has: {listed}"
            )
        if image not in pictures:
            kind = schema.field(image).type
            raise InputError(f"{place}: column {image!r} (synthesis.image_column) holds {kind}, not bytes")
        texts = [name for name in names if name != image and _holds_texts(schema.field(name).type)]
        wanted = self.captions or CAPTIONS
        found = [name for name in texts if any(fnmatch.fnmatchcase(name, one) for one in wanted)]
        if self.captions and not found:
            said = ",".join(self.captions)
            raise InputError(
                f"{place}: no column {said!r} of strings (synthesis.caption_column); the file has: {listed}"
            )
        return image, found

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        file, number = self.name(shard), 0
        try:
            with self._parquet(shard) as parquet:
                image, texts = self._columns(shard, parquet.schema_arrow)
                for group in range(parquet.metadata.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    if (
                        number + rows < start
                    ):  # a row that was told last is looked at again, for a file that breaks off there
                        number += rows
                        continue
                    for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[image, *texts]):
                        for place in range(batch.num_rows):
                            if number >= start:
                                yield self._row(f"{file}, row {number + 1}", batch, place, image, texts)
                            number += 1
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and isinstance(self.files[shard].place, Remote):
                raise  # perhaps the store was away
            if number >= start:
                why = f"the file breaks off ({' '.join(str(error).split())[:200]})"
                yield RawRow(f"{file}, after row {number}", failure=why)

    def _row(self, name: str, batch: pa.RecordBatch, place: int, image: str, texts: list[str]) -> RawRow:
        value = batch.column(image)[place].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            return RawRow(name, failure=f"no bytes in column {image!r}")
        try:
            record = {text: _plain(batch.column(text)[place].as_py()) for text in texts}
        except UnicodeDecodeError:
            return RawRow(name, failure="the caption is not valid UTF-8")
        return RawRow(name, data, named_captions(record, self.captions))


def _holds_texts(kind: pa.DataType) -> bool:
    """Strings, or lists of them."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return holds_text(kind.value_type if listed else kind)


def _plain(value: Any) -> Any:
    """Bytes, as which some programs write strings, as strings. Raises UnicodeDecodeError."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


# -- listings -------------------------------------------------------------------------------------------


class ListedShards(Shards):
    """Picture files below a folder, as a listing names them; LISTED of them are one shard.

    Args:
        kind: what messages call them.
        base: the folder.
        entries: (path below it, captions) of each; None for captions that stand in a .txt file of the same name. A text
            instead of captions says why the entry cannot be used.
    """

    def __init__(self, kind: str, base: Place, entries: Iterable[tuple[str, Sequence[str] | str | None]]) -> None:
        self.kind, self.base = kind, base
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

    def name(self, shard: int) -> str:
        return f"pictures {shard * LISTED + 1} … {min((shard + 1) * LISTED, len(self._entries))}"

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        numbers = iter(range(shard * LISTED + start, min((shard + 1) * LISTED, len(self._entries))))
        with ThreadPoolExecutor(READERS) as readers:
            while some := list(itertools.islice(numbers, AT_ONCE)):
                yield from readers.map(self._row, some)

    def _row(self, number: int) -> RawRow:
        path, captions = json.loads(self._entries[number])
        if isinstance(captions, str):
            return RawRow(path, failure=captions)
        parts = path.replace("\\", "/").split("/")
        if path.startswith("/") or ".." in parts:
            return RawRow(path, failure="the path leads out of the folder")
        path = "/".join(part for part in parts if part not in ("", "."))
        try:
            if captions is None:
                text = decoded_text(self._read(f"{path.rpartition('.')[0]}.txt"))
                if "\udcff" in text:
                    return RawRow(path, failure="the caption is not valid UTF-8")
                captions = [text]
            return RawRow(path, self._read(path), named_captions({"": captions}, [""]))
        except (FileNotFoundError, IsADirectoryError):
            return RawRow(path, failure="no such file")
        except PermissionError:
            return RawRow(path, failure="it may not be read")

    def _read(self, path: str) -> bytes:
        with _opened(self.base / path) as stream:
            return stream.read(MOST_BYTES)
