"""Real images with captions: a folder (captions in .txt files of the same name) or parquet (a caption column).

Listing opens no image: it reads names, sizes and captions, so that what is wrong with the set as a whole is said before
anything starts, while one bad image is a row that fails (`BadImage`).

Row i of a set is image i in the order of file names, then of rows. A caption's id is the 1-based row of its first
occurrence; an image without a caption has an id of its own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from raydistill.data.picture_columns import NOT_UTF8, captions_in_words, choice, columns_of, flat, names_of, texts_of
from raydistill.data.text_files import printable, read_text, undecodable
from raydistill.data.texts import holds_text
from raydistill.errors import InputError, reason
from raydistill.storage.place import Place, Remote
from raydistill.storage.resolve import to_place
from raydistill.storage.staging import on_this_machine

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
READERS = 16  # threads that read captions
_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")
DEEP_MODES = ("I", "F")  # beyond 8 bits a channel: their range is anybody's guess

Listing = list[tuple[str, int]]  # (name, what else tells one version from another: bytes or rows)


class BadImage(Exception):
    """Why one row has no picture; the text names the file, and the row where a file has several."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))  # it is written to a file


class ImageSet(ABC):
    """Images as rows 0 … N - 1.

    Attributes:
        source: path of the set.
        prompts: N captions, "" where there is none.
        ids: int64 [N], see the top of this file.
        bad_captions: row -> why its caption cannot be read.
        about: where the captions are, for people, or "".
    """

    source: str
    about = ""

    def __init__(self, source: Place, listing: Listing, captions: Sequence[str | None], bad: dict[int, str]) -> None:
        self.source = str(source)
        self.prompts = [" ".join((caption or "").split()) for caption in captions]
        self.bad_captions = bad
        first: dict[str, int] = {}
        ids = [first.setdefault(text, row) if text else row for row, text in enumerate(self.prompts, start=1)]
        self.ids = np.asarray(ids, dtype=np.int64)
        digest = hashlib.blake2b(repr(listing).encode(), digest_size=8)
        for prompt in self.prompts:
            digest.update(prompt.encode() + b"\n")
        self.fingerprint = digest.hexdigest()  # of names, sizes and captions

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On another node, which may not have staged the source yet."""
        remote = isinstance(to_place(state["source"]), Remote)
        self.__dict__ |= state | ({} if remote else {"source": str(on_this_machine(state["source"]))})

    @property
    def root(self) -> Place:
        return to_place(self.source)

    def __len__(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        about = self.about and f"; {self.about}"
        return f"{self.source}: {len(self)} images, {sum(map(bool, self.prompts))} with captions{about}"

    def at(self, seed: int, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(ids [B], captions) of some rows; as `PromptSet.at`, but the order has no seed."""
        rows = np.asarray(rows, dtype=np.int64)
        return self.ids[rows], [self.prompts[row] for row in rows]

    def picture(self, row: int, pixels: int) -> np.ndarray:
        """One picture [3, pixels, pixels], uint8: upright, on white, centre-cropped to a square.

        Raises:
            BadImage: it, or its caption, cannot be read.
        """
        name = self.name(row)
        if row in self.bad_captions:
            raise BadImage(f"{name}: {self.bad_captions[row]}")
        return decoded(self.read(row), name, pixels)

    @abstractmethod
    def name(self, row: int) -> str:
        """How messages call a row."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded image. Raises BadImage."""


def decoded(data: bytes, name: str, pixels: int) -> np.ndarray:
    """An encoded image as uint8 [3, pixels, pixels]. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.split(";")[0] in DEEP_MODES:
                raise BadImage(f"{name}: {image.mode} has more than 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            square = ImageOps.fit(upright.convert("RGB"), (pixels, pixels), Image.Resampling.BICUBIC)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise BadImage(f"{name}: {decoders_reason(error)}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def decoders_reason(error: Exception) -> str:
    """Why an image cannot be decoded, in one line that is the same at each attempt."""
    return f"{type(error).__name__}: {' '.join(_ADDRESS.sub('its bytes', str(error)).split())[:200]}"


# -- a folder -------------------------------------------------------------------------------------------


class FolderImages(ImageSet):
    """Images in a folder and its subfolders, or below a prefix; hidden files are left out."""

    def __init__(self, folder: Place) -> None:
        found = _files(folder)
        listing = sorted((name, size) for name, size in found.items() if name.lower().endswith(SUFFIXES))
        if not listing:
            raise InputError(f"{folder}: no images ({', '.join(SUFFIXES)}) and no parquet files")
        self.files = [name for name, _ in listing]
        with ThreadPoolExecutor(READERS) as readers:
            read = list(readers.map(lambda name: _caption(folder, _text_file(name), found), self.files))
        bad = {row: why for row, (_, why) in enumerate(read) if why}
        super().__init__(folder, listing, [caption for caption, _ in read], bad)

    def name(self, row: int) -> str:
        return self.files[row]

    def read(self, row: int) -> bytes:
        try:
            return (self.root / self.files[row]).read_bytes()
        except OSError as error:
            raise BadImage(f"{self.files[row]}: {error.strerror or reason(error)}") from None


def _text_file(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(".txt"))


def _caption(folder: Place, name: str, found: Mapping[str, int]) -> tuple[str | None, str | None]:
    """(caption, why it cannot be read) from a text file beside a picture."""
    if name not in found:
        return None, None
    try:
        return _text(read_text(folder / name))
    except OSError as error:
        return None, f"the caption cannot be read ({type(error).__name__})"


def _files(folder: Place) -> dict[str, int]:
    """Files below a folder, by name relative to it, with their bytes; -1: a link that leads nowhere. No hidden ones."""
    if isinstance(folder, Remote):
        entries = ((name, size) for name, size, _ in folder.entries())
        return {name: size for name, size in entries if not any(one.startswith(".") for one in name.split("/"))}
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if not name.startswith("."):
                found[file.relative_to(folder).as_posix()] = file.stat().st_size if file.exists() else -1
    return found


# -- parquet --------------------------------------------------------------------------------------------


class ParquetImages(ImageSet):
    """Images in a column of one or more parquet files: bytes, or structs with a field `bytes`.

    Captions are found as in streams (`picture_columns`); of several a hash of the row chooses one. But a column `caption`
    of strings is taken alone, as earlier versions did: the rows of their sets stay.
    """

    def __init__(self, source: Place, files: Sequence[Place], image_column: str, caption_column: str | None) -> None:
        self.files = ["." if file == source else file.name for file in files]
        self.columns: list[str] = []  # of the pictures, of each file
        lengths, captions, names = [], [], names_of(caption_column)
        for file in files:
            before = len(captions)
            captions += self._read_captions(file, image_column, names, before)
            lengths.append(len(captions) - before)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        if not captions:
            raise InputError(f"{source}: no rows")
        listing = list(zip((file.name for file in files), lengths, strict=True))
        bad = {row: why for row, (_, why) in enumerate(captions) if why}
        super().__init__(source, listing, [text for text, _ in captions], bad)

    def _read_captions(
        self, file: Place, image_column: str, names: Sequence[str] | None, before: int
    ) -> Iterator[tuple[str | None, str | None]]:
        """(caption, why it cannot be read) of each row of one file, whose columns are checked. `before`: rows of other files."""
        try:
            with _parquet(file) as parquet:
                schema = parquet.schema_arrow
                image, found = columns_of(file, schema, image_column, names)
                if names is None and "caption" in found and holds_text(schema.field("caption").type):
                    found = ["caption"]
                if not self.columns:
                    self.about = captions_in_words(found, schema.names)
                self.columns.append(image)
                if not found:
                    yield from [(None, None)] * parquet.metadata.num_rows
                    return
                table = parquet.read(columns=found)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
        for row, values in enumerate(zip(*(texts_of(table[name]) for name in found), strict=True), start=before):
            captions = flat(values)
            if any(map(undecodable, captions)):
                yield None, NOT_UTF8
            else:
                yield (captions[choice((row,), len(captions))] if captions else None), None

    def _position(self, row: int) -> tuple[int, Place, int]:
        """(number of the file, file, row in it)."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        name = self.files[index]
        return index, self.root if name == "." else self.root / name, int(row - self.starts[index])

    def name(self, row: int) -> str:
        _, file, inside = self._position(row)
        return f"{file.name}, row {inside + 1}"

    def read(self, row: int) -> bytes:
        index, file, inside = self._position(row)
        column = self.columns[index]
        try:
            starts = _group_starts(file)
            group = int(np.searchsorted(starts, inside, side="right")) - 1
            value = _group(file, group, column)[inside - int(starts[group])].as_py()
        except (pa.ArrowInvalid, OSError) as error:
            raise BadImage(f"{self.name(row)}: {' '.join(str(error).split())[:200]}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise BadImage(f"{self.name(row)}: no bytes in column {column!r}")
        return data


def _text(caption: str | None) -> tuple[str | None, str | None]:
    """(caption, why it cannot be used)."""
    return (None, NOT_UTF8) if caption and undecodable(caption) else (caption, None)


def _parquet(file: Place) -> pq.ParquetFile:
    return pq.ParquetFile(file.key, filesystem=file.filesystem) if isinstance(file, Remote) else pq.ParquetFile(file)


@functools.lru_cache(maxsize=64)
def _group_starts(file: Place) -> np.ndarray:
    """First row of each row group, and the number of rows."""
    with _parquet(file) as parquet:
        metadata = parquet.metadata
        return np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])


@functools.lru_cache(maxsize=2)  # neighbouring rows are read one after the other
def _group(file: Place, group: int, column: str) -> pa.ChunkedArray:
    with _parquet(file) as parquet:
        return parquet.read_row_group(group, columns=[column])[column]


# -- either ---------------------------------------------------------------------------------------------


def open_images(path: str | Place, image_column: str = "image", caption_column: str | None = None) -> ImageSet:
    """List a folder of image files, a parquet file, or a folder of parquet files; what a URI names stays there.

    Args:
        image_column, caption_column: of parquet files; see `ParquetImages`.

    Raises:
        InputError: nothing there, both kinds there, an unreadable file, or a missing or wrong column.
        OSError: the store does not answer.
    """
    path = to_place(str(path))
    if path.is_file():
        if not path.name.lower().endswith(".parquet"):
            raise InputError(f"{path}: neither a folder nor a .parquet file")
        return ParquetImages(path, [path], image_column, caption_column)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    tables = sorted(
        (file for file in path.iterdir() if file.name.endswith(".parquet") and not file.name.startswith(".")), key=str
    )
    if not tables:  # those that are being written are hidden
        return FolderImages(path)
    if any(name.lower().endswith(SUFFIXES) for name in _files(path)):
        raise InputError(f"{path}: has parquet files and image files; name one kind")
    return ParquetImages(path, tables, image_column, caption_column)
