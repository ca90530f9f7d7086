"""Tars of a WebDataset as shards of pictures.

A tar says nowhere how long it is. So the bytes that came are compared with those that were listed, and what stands behind its end
is looked at: what a connection or a disk has cut off, or a program put behind, is told as rows that are lost.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from raydistill.data.images import SUFFIXES
from raydistill.data.picture_columns import IMAGE, by_wider_rule, captions_in_words, chosen, flat, named_captions
from raydistill.data.picture_shards import MOST_BYTES, FileShards, RawRow, opened
from raydistill.data.text_files import decoded_text

TEXT_FILES = ("txt", "text", "caption")  # of a tar, with a caption each
PADDING = 1 << 20  # bytes of zeros behind a tar's end, which may be as many as its writer's records have

Files = Mapping[str, bytes | None]  # of a sample in a tar, by suffix; None: it is too large


class TarShards(FileShards):
    """Tars of a WebDataset: files of one name, up to its first dot, stand next to each other and are one sample."""

    kind = "tars"

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
        place, size = self.files[shard].place, self.files[shard].size
        seen, last, number, came, ended = set[int](), "its beginning", 0, 0, False
        again = "the files of its sample are not next to each other; make the tar again with `tar --sort=name`"
        try:
            with opened(place) as stream:
                whole = _Whole(stream, size if self.is_remote else None)
                with tarfile.open(fileobj=whole, mode="r|*", tarinfo=_Header) as archive:
                    for key, members in itertools.groupby(_members(archive), lambda member: member[0]):
                        # what is skipped is read too: a tar that breaks off does so at the same row for everybody
                        files, end = {}, 0
                        for _, suffix, member in members:
                            files[suffix], end = _extracted(archive, member), member.offset_data + member.size
                        if number >= start:
                            yield f"{place.name}, {key}", files, again if hash(key) in seen else ""
                        seen.add(hash(key))
                        last, number = key, number + 1
                        came = end if archive.fileobj.comptype == "tar" else whole.count
                    ended = True
                    _check_end(archive)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            is_cut = whole.count >= size and not ended  # and nobody knows what there was
            # else the other samples are as large as those before
            lost = 0 if is_cut or not came else round((size - came) * number / came)
            why = f"the tar breaks off ({' '.join(str(error).split())})"
            rows = range(number, number + max(1, lost))
            raise self.torn(shard, last, why, rows, about="about " if lost else "at least ") from error

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


class _Whole:
    """A stream whose bytes are counted.

    Args:
        size: how many there must be; None: as many as come.
    """

    def __init__(self, stream: IO[bytes], size: int | None) -> None:
        self._stream, self._size, self.count = stream, size, 0

    def read(self, size: int) -> bytes:
        """Raises OSError: the stream ends before its time, as when a connection is cut and nobody says so."""
        data = b""
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        self.count += len(data)
        if len(data) < size and self._size is not None and self.count < self._size:
            raise OSError(f"only {self.count:,} of {self._size:,} bytes came")
        return data


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError where more than padding follows a tar's end: tarfile would pass over it."""
    with contextlib.suppress(EOFError):  # of a compressed one
        rest = archive.fileobj.read(PADDING + 1)
        if rest.strip(b"\0"):
            raise tarfile.ReadError(
                "there is more behind its end; a set's tars must not be one behind the other in a file"
            )
        if len(rest) > PADDING:
            raise tarfile.ReadError("only zeros follow")


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
