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

from raydistill.data.images import SUFFIXES
from raydistill.data.picture_columns import (
    IMAGE,
    NOT_UTF8,
    by_wider_rule,
    captions_in_words,
    chosen,
    columns_of,
    flat,
    named_captions,
)
from raydistill.data.text_files import decoded_text
from raydistill.data.texts import Texts
from raydistill.errors import InputError
from raydistill.storage.globs import Found
from raydistill.storage.place import Place, Remote, as_os_errors, cause

TEXT_FILES = ("txt", "text", "caption")  # of a tar, with a caption each
MOST_BYTES = 256 << 20  # of a picture, or of one file in a tar
LISTED = 256  # picture files of a listing that are one shard
READERS, AT_ONCE = 8, 32  # threads that read them, and how many lie in memory
PARQUET_ROWS, PARQUET_BUFFER = 16, 4 << 20  # read at a time; bytes of one request to a store
LONGEST_KEY = 1024  # bytes of an object's name in a bucket
NO_PATH = {
    errno.ENAMETOOLONG: "the path is too long",
    errno.ENOTDIR: "no such file",
    errno.ELOOP: "its links lead in a circle",
}

Files = Mapping[str, bytes | None]  # of a sample in a tar, by suffix; None: it is too large


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
        """Rows of a shard from number `start` on. A shard that breaks off ends with a row that says so.

        Raises:
            OSError: the store does not answer; another call may go on at the row that did not come.
        """


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

    def look(self) -> RawRow | None:
        """The first row, of whose sample `about` and `wider` then tell; None: the tar is empty. Raises OSError."""
        for name, files, failure in self._samples(0, 0):
            if not failure:
                self.about, self.wider = self._about(files)
            return self._row(name, files, failure)
        return None

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        for sample in self._samples(shard, start):
            yield self._row(*sample)

    def _samples(self, shard: int, start: int) -> Iterator[tuple[str, Files, str]]:
        """(name, files by suffix, why they are no sample)."""
        place, seen, last, number = self.files[shard].place, set[int](), "its beginning", 0
        again = "the files of its sample are not next to each other; make the tar again with `tar --sort=name`"
        try:
            with _opened(place) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
                for key, members in itertools.groupby(_members(archive), lambda member: member[0]):
                    # what is skipped is read too: a tar that breaks off does so at the same row for everybody
                    files = {suffix: _extracted(archive, member) for _, suffix, member in members}
                    if number >= start:
                        yield f"{place.name}, {key}", files, again if hash(key) in seen else ""
                    seen.add(hash(key))
                    last, number = key, number + 1
        except (tarfile.TarError, EOFError, zlib.error) as error:
            if number >= start:
                yield f"{place.name}, after {last}", {}, f"the tar breaks off ({' '.join(str(error).split())})"

    def _row(self, name: str, files: Files, failure: str) -> RawRow:
        if failure:
            return RawRow(name, failure=failure)
        try:
            data = files[self._picture(files)]
            if data is None:
                return RawRow(name, failure=f"more than {MOST_BYTES >> 20} MiB")
            return RawRow(name, data, self._captions(files))
        except ValueError as error:
            return RawRow(name, failure=str(error))

    def _picture(self, files: Files) -> str:
        """The suffix of the sample's picture. Raises ValueError: it has none."""
        pictures = [suffix for suffix in files if _is_picture(suffix)]
        if not pictures:
            raise ValueError(f"no picture among its files ({', '.join(files)})")
        if self.image_column == IMAGE:
            return pictures[0]
        wanted = self.image_column.lower()
        for is_it in (
            self.image_column.__eq__,
            lambda one: one.lower() == wanted,
            lambda one: _role(one) == _role(wanted),
        ):
            if (found := next(filter(is_it, pictures), None)) is not None:
                return found
        raise ValueError(f"no {self.image_column!r} (synthesis.image_column) among its files ({', '.join(files)})")

    def _captions(self, files: Files) -> tuple[str, ...]:
        """Of text files, else of the JSON file. Raises ValueError: why that cannot be read."""
        found = flat(decoded_text(files[suffix] or b"") for suffix in self._text_files(files))
        return found or named_captions(_record(files), self.captions)

    def _text_files(self, files: Files) -> list[str]:
        others = (suffix for suffix in files if not _is_picture(suffix) and suffix.lower() != "json")
        return chosen(others, self.captions, TEXT_FILES, TEXT_FILES)

    def _about(self, files: Files) -> tuple[str, list[str]]:
        """(where the captions of a sample are, and what its pictures are; names that only the wider rule finds)."""
        pictures = [f".{suffix}" for suffix in files if _is_picture(suffix)]
        several = ""
        if len(pictures) > 1 and self.image_column == IMAGE:
            several = f"; of {', '.join(pictures)} the first is taken (synthesis.image_column names another)"
        if texts := self._text_files(files):
            return captions_in_words([f".{suffix}" for suffix in texts], ()) + several, by_wider_rule(
                texts, self.captions, TEXT_FILES
            )
        try:
            record = _record(files)
        except ValueError:
            record = {}
        keys = chosen(record, self.captions)
        about = (
            captions_in_words(keys, record, "JSON file's keys")
            if record
            else captions_in_words((), (f".{one}" for one in files), "files")
        )
        return about + several, by_wider_rule(keys, self.captions)


def _is_picture(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES


def _role(suffix: str) -> str:
    """What a picture is among those of its sample, whatever its format: "depth" of depth.png, "" of jpg."""
    return suffix.lower().rpartition(".")[0] if _is_picture(suffix) else suffix.lower()


def _record(files: Files) -> Mapping[str, Any]:
    """What a sample's JSON file holds; {}: it has none, or one of something else than keys. Raises ValueError."""
    named = next((suffix for suffix in sorted(files, reverse=True) if suffix.lower() == "json" and files[suffix]), None)
    try:
        record = json.loads(files[named] or b"") if named else {}
    except (ValueError, RecursionError):
        raise ValueError("its JSON file is none") from None
    return record if isinstance(record, dict) else {}


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

    Memory holds a few rows, and the pages that they lie in. Their writer decides how large these are: at most a row group,
    about 100 MB in the hub's sets.

    The first file's columns are looked at here, those of the others when their turn comes.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[Found], image_column: str, captions: Sequence[str] | None) -> None:
        self.files, self.image_column, self.captions = files, image_column, captions
        try:
            with as_os_errors(), self._parquet(0) as parquet:
                schema = parquet.schema_arrow
                _, found = columns_of(files[0].place, schema, image_column, captions)
                self.about, self.wider = captions_in_words(found, schema.names), by_wider_rule(found, captions)
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

    def rows(self, shard: int, start: int = 0) -> Iterator[RawRow]:
        file, number = self.name(shard), 0
        try:
            with self._parquet(shard) as parquet:
                place = self.files[shard].place
                image, texts = columns_of(place, parquet.schema_arrow, self.image_column, self.captions)
                for group in range(parquet.metadata.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    # Of a group that ends at `start` the last row is read again: a file that breaks off there must say so again.
                    if number + rows < start:
                        number += rows
                        continue
                    for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[image, *texts]):
                        for row in range(batch.num_rows):
                            if number >= start:
                                yield self._row(f"{file}, row {number + 1}", batch, row, image, texts)
                            number += 1
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and isinstance(self.files[shard].place, Remote):
                raise  # perhaps the store was away
            if number >= start:
                why = f"the file breaks off ({' '.join(str(error).split())[:200]})"
                yield RawRow(f"{file}, after row {number}", failure=why)

    def _row(self, name: str, batch: pa.RecordBatch, index: int, image: str, texts: list[str]) -> RawRow:
        value = batch.column(image)[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            return RawRow(name, failure=f"no bytes in column {image!r}")
        try:
            return RawRow(name, data, flat(_plain(batch.column(text)[index].as_py()) for text in texts))
        except UnicodeDecodeError:
            return RawRow(name, failure=NOT_UTF8)


def _plain(value: Any) -> Any:
    """Bytes, as which some programs write strings, as strings. Raises UnicodeDecodeError."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


# -- listings -------------------------------------------------------------------------------------------


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
        with _opened(self.base / path) as stream:
            return stream.read(MOST_BYTES)
