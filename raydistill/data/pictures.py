"""Sets of real pictures of any size, read as streams: WebDatasets, parquet files of the hub, listings, folders.

    pictures = open_pictures("hf://datasets/org/name/data/*.parquet")
    for row in pictures.rows(seed=0, share=(rank, world), start=(shard, row)):
        if row.usable: image = row.picture(512)        # uint8 [3, 512, 512]; raises BadImage

A set consists of shards: its tars or parquet files, or every 256 picture files of a listing. An epoch's order is a permutation of
the shards that depends on (seed, epoch) alone; rows of a shard keep its order. A `Cursor` names the next row, and
reading goes on there with the same rows, whatever was read in parallel. A bad picture is a row with a `failure`, which
names file and key: none is lost silently.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydistill.config.stages import SynthesisConfig
from raydistill.data.holdout import key_of
from raydistill.data.images import SUFFIXES, BadImage, ImageSet, decoded, decoders_reason, open_images
from raydistill.data.picture_columns import NOT_UTF8, choice, names_of
from raydistill.data.picture_shards import ListedShards, ParquetShards, RawRow, Shards, Torn
from raydistill.data.picture_tables import TABLES, about_table, table_entries
from raydistill.data.picture_tars import TarShards
from raydistill.data.text_files import printable, undecodable
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError
from raydistill.storage.globs import Found, expand, is_pattern
from raydistill.storage.hub_sets import is_hub_set, pinned_set
from raydistill.storage.place import DENIED, Place, Remote, as_os_errors, cause
from raydistill.storage.resolve import to_place

TARS = (".tar", ".tar.gz", ".tgz")
ATTEMPTS, PAUSE_S = 4, 2.0  # of a store that does not answer; the pause doubles


@dataclass(frozen=True, order=True)
class Cursor:
    """The row that comes next: epoch, place of its shard in the epoch's order (of a reader's own share), row in the shard."""

    epoch: int = 0
    shard: int = 0
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One picture as it lies in its shard.

    Attributes:
        shard, row: which shard of the set, in the order of names, and which row in it, both from 0.
        name: file, and key or row in it, for messages.
        data: the encoded picture.
        caption: "" where there is none; of several, the one that (seed, epoch, shard, row) chooses.
        failure: why there is no picture, or "".
        left_out: why the row is passed over by a filter, or "".
        after: where reading goes on behind this row.
    """

    shard: int
    row: int
    name: str
    data: bytes
    caption: str
    failure: str
    left_out: str
    after: Cursor

    @property
    def usable(self) -> bool:
        return not (self.failure or self.left_out)

    @property
    def key(self) -> int:
        """A number of the row that no other row of the set has, whatever the order."""
        return self.shard << 32 | self.row

    def picture(self, pixels: int) -> np.ndarray:
        """uint8 [3, pixels, pixels]: upright, on white, centre-cropped to a square. Raises BadImage."""
        if self.failure:
            raise BadImage(f"{self.name}: {self.failure}")
        return decoded(self.data, self.name, pixels)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What is passed over, and told as `left_out`.

    Args:
        min_pixels: pictures whose smaller side has fewer pixels.
        captions: pictures with one of these captions: held-out prompts. They are kept by `key_of`.
    """

    min_pixels: int = 0
    captions: Collection[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", frozenset(map(key_of, self.captions)))

    def why(self, raw: RawRow, caption: str) -> str:
        """Why a row is left out, or ""; raises whatever a broken picture leads Pillow to."""
        if self.captions and caption and key_of(caption) in self.captions:
            return "held-out caption"
        if self.min_pixels and not raw.failure:
            with Image.open(io.BytesIO(raw.data)) as image:  # reads the head alone
                if min(image.size) < self.min_pixels:
                    return "small"
        return ""


class Pictures:
    """A set of pictures; travels to other nodes, which read the same places.

    Attributes:
        source: what it was opened by.
        shards: its shards, in the order of names.
        bytes: of its files.
        fingerprint: of names and sizes of its files, and of what a table says.
    """

    def __init__(self, source: str, shards: Shards, size: int, fingerprint: str) -> None:
        self.source, self.shards, self.bytes, self.fingerprint = source, shards, size, fingerprint

    def __str__(self) -> str:
        return f"{self.source}: {len(self.shards)} {self.shards.kind}, {self.bytes / 1e9:.3g} GB; {self.shards.about}"

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's permutation of the shards, int64 [N]."""
        draws = uniform(seed, [epoch], "picture_shards", shape=(len(self.shards),))[0].numpy()
        return np.argsort(draws, kind="stable")

    def own_shards(self, seed: int, epoch: int, share: tuple[int, int]) -> np.ndarray:
        """Shards that reader `rank` of `world` reads in an epoch: every world-th; where they are fewer, all, for every world-th row."""
        rank, world = share
        order = self.order(seed, epoch)
        return order[rank::world] if len(order) >= world else order

    def rows(
        self,
        seed: int,
        epoch: int = 0,
        share: tuple[int, int] = (0, 1),
        start: tuple[int, int] = (0, 0),
        filters: Filters = Filters(),  # noqa: B008 (frozen)
        stop: int | None = None,
    ) -> Iterator[PictureRow]:
        """The rest of one epoch of one reader, failed and left-out rows among the others.

        Args:
            share: (rank, world).
            start: (shard, row) of the cursor.
            stop: shard of the cursor before which to stop; None: read all.

        Raises:
            OSError: a store does not answer, for as long as it was asked.
            InputError: a parquet file lacks a column that the first one has.
        """
        rank, world = share
        own = self.own_shards(seed, epoch, share)
        by_row = len(self.shards) < world
        for index in range(start[0], len(own) if stop is None else stop):
            first = start[1] if index == start[0] else 0
            for row, raw in enumerate(self._patient(int(own[index]), first), start=first):
                if not by_row or row % world == rank:
                    yield self._picture_row(
                        int(own[index]), row, raw, (seed, epoch), Cursor(epoch, index, row + 1), filters
                    )

    def endless(
        self,
        seed: int,
        share: tuple[int, int] = (0, 1),
        start: Cursor = Cursor(),  # noqa: B008 (frozen)
        filters: Filters = Filters(),  # noqa: B008 (frozen)
    ) -> Iterator[PictureRow]:
        """Epoch after epoch, from a cursor on. Raises as `rows`; InputError also where an epoch has no usable row."""
        while True:
            used, whole = False, (start.shard, start.row) == (0, 0)
            for row in self.rows(seed, start.epoch, share, (start.shard, start.row), filters):
                used |= row.usable
                yield row
            if whole and not used:
                raise InputError(f"{self.source}: no usable picture in all of reader {share[0]}'s share of {share[1]}")
            start = Cursor(start.epoch + 1)

    def _picture_row(
        self, shard: int, row: int, raw: RawRow, drawn: tuple[int, int], after: Cursor, filters: Filters
    ) -> PictureRow:
        if any(map(undecodable, raw.captions)):  # no tokenizer takes it, and no file
            raw = RawRow(raw.name, failure=raw.failure or NOT_UTF8)
        caption = raw.captions[choice((*drawn, shard, row), len(raw.captions))] if raw.captions else ""
        try:
            left_out = filters.why(raw, caption)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            left_out, raw = "", replace(raw, data=b"", failure=decoders_reason(error))
        name, failure = printable(raw.name), printable(raw.failure)
        return PictureRow(
            shard=shard,
            row=row,
            name=name,
            data=raw.data,
            caption=caption,
            failure=failure,
            left_out=left_out,
            after=after,
        )

    def _patient(self, shard: int, start: int) -> Iterator[RawRow]:
        """Rows of a shard; a store that does not answer is asked again, at the row that did not come.

        Rows that are lost, since a shard breaks off whenever it is read, are told as failed ones.
        """
        attempt = 0
        while True:
            rows = self.shards.rows(shard, start)
            try:
                while (raw := _next(rows)) is not None:
                    yield raw
                    start, attempt = start + 1, 0
                return
            except OSError as error:
                attempt += 1
                if isinstance(error, Torn) and (attempt == ATTEMPTS or not self.shards.is_remote):
                    yield from error.rows(start)
                    if error.stop is None:
                        return
                    start, attempt = error.stop, 0
                    continue
                if attempt == ATTEMPTS or isinstance(error, FileNotFoundError):
                    where = f"{self.shards.where(shard)}, row {start + 1}"
                    raise OSError(f"{where}: {' '.join(str(error).split())[:300]}") from error
                time.sleep(PAUSE_S * 2 ** (attempt - 1))


def _next(rows: Iterator[RawRow]) -> RawRow | None:
    with as_os_errors():
        return next(rows, None)


# -- opening --------------------------------------------------------------------------------------------


def is_stream(synthesis: SynthesisConfig) -> bool:
    """Whether the configuration alone says that images are a stream; tars and tables by themselves are so too."""
    path = synthesis.images or ""
    bounded = synthesis.image_count is not None or synthesis.min_pixels > 0
    named = path.startswith("hf://") or is_pattern(path) or _kind(path) in ("tar", "table")
    return synthesis.images is not None and (bounded or named)


def open_source(
    path: str, image_column: str = "image", caption_column: str | None = None, *, streamed: bool = False
) -> ImageSet | Pictures:
    """What synthesis reads real images from.

    A plain folder of images or parquet files, or one parquet file, is listed whole, and its rows are in the order of
    names (`ImageSet`). All else is a stream (`Pictures`), whose shards are shuffled.

    Args:
        path, image_column, caption_column: as of `open_pictures`.
        streamed: read folders and parquet files as a stream too, for a part of them is enough.

    Raises as `open_pictures`.
    """
    if not (streamed or is_pattern(path) or path.startswith("hf://")):
        place = to_place(path)
        lone = place.is_file() and _kind(place.name) not in ("tar", "table")
        if lone or not place.exists() or (place.is_dir() and not _streams(place)):
            return open_images(place, image_column, caption_column)
    return open_pictures(path, image_column, caption_column)


def _streams(folder: Place) -> bool:
    """Whether a folder holds tars, pictures that a table names, or parquet files in folders alone.

    One with parquet files right in it is listed, whatever lies further down.
    """
    here = [file for file in folder.iterdir() if not _hidden(file.name)]
    if any(_kind(file.name) == "tar" or _is_metadata(file) for file in here):
        return True
    if any(_kind(file.name) == "parquet" for file in here):
        return False
    below = [one.place for one in _files(str(folder))[1]]
    kinds = {_kind(place.name) for place in below}
    return "tar" in kinds or any(map(_is_metadata, below)) or ("parquet" in kinds and "picture" not in kinds)


def open_pictures(path: str, image_column: str = "image", caption_column: str | None = None) -> Pictures:
    """List a set of pictures and look into its first file; no picture is read, and nothing is fetched.

    A data set of the hub is opened at the commit that its revision is at now; `source` names it.

    Args:
        path: a file or folder, a pattern of files (`storage.globs`), by path, s3://, gs:// or hf://. Files are tars
            (WebDataset), parquet files, pictures, or one table (.csv, .tsv, .jsonl) that names pictures beside it. In a folder tars count
            before all else, then parquet files, then metadata.csv or metadata.jsonl, then pictures.
        image_column: column of a parquet file or table, or the suffix in a tar where a sample has several pictures.
        caption_column: one name or several, separated by commas, with `*` for any letters; None: see
            `picture_columns`.

    Raises:
        InputError: nothing there, kinds that do not go together, an unreadable file, or a missing column.
        OSError: the store does not answer.
    """
    captions = names_of(caption_column)
    path = pinned_set(path) if is_hub_set(path) else path  # which every node then reads
    base, found = _files(path)
    kinds: dict[str, list[Found]] = {}
    for one in found:
        kinds.setdefault(_kind(one.place.name), []).append(one)
    tables = [one for one in kinds.get("table", []) if is_pattern(path) or one.place == base or _is_metadata(one.place)]
    if tars := kinds.get("tar"):
        shards, files = TarShards(tars, image_column, captions), tars
        _look(path, shards)
    elif parquet := kinds.get("parquet"):
        if kinds.get("picture"):
            raise InputError(
                f"{path}: has parquet files and image files; name one kind, as in {path.rstrip('/')}/*.parquet"
            )
        shards, files = ParquetShards(parquet, image_column, captions), parquet
    elif tables:
        folder = base if base not in {one.place for one in tables} else base.parent
        entries = (entry for one in tables for entry in table_entries(one.place, folder, image_column, captions))
        about = about_table(tables[0].place, image_column, captions)
        shards, files = ListedShards("parts of a table of pictures", folder, entries, about), tables
        if not len(shards):
            raise InputError(f"{path}: no rows")
    elif pictures := kinds.get("picture"):
        beside = {str(one.place) for one in kinds.get("text", [])}
        have = [_caption_file(one.place) in beside for one in pictures]
        names = ((_below(base, one.place), None if has else []) for one, has in zip(pictures, have, strict=True))
        about = (
            f"captions of {sum(have)} in .txt files" if any(have) else "no captions: no .txt files of the same names"
        )
        shards = ListedShards("parts of a folder of pictures", base, names, about)
        files = [*pictures, *kinds.get("text", [])]
    else:
        raise InputError(f"{path}: no tars, parquet files, tables of pictures or pictures ({', '.join(SUFFIXES)})")
    said = [shards.digest if isinstance(shards, ListedShards) else "", image_column, captions]
    said += [list(shards.wider)] if shards.wider else []
    return Pictures(path, shards, sum(one.size for one in files), _fingerprint(base, files, said))


def _look(path: str, shards: TarShards) -> None:
    """Raises InputError where the first tar begins with something else than a sample."""
    try:
        with as_os_errors():
            first = shards.look()
    except Torn as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        place = shards.files[0].place
        why = cause(error, place.scheme) if isinstance(place, Remote) else error.strerror or str(error)
        raise InputError(f"{path}: {shards.name(0)}: cannot be read: {why}") from error
    if first is None:
        raise InputError(f"{path}: {shards.name(0)} has no files")


def _files(path: str) -> tuple[Place, list[Found]]:
    """(folder or file that all lie in, files by name). Raises InputError."""
    if is_pattern(path):
        found = expand(path)
        return _common(found), found
    place = to_place(path)
    if isinstance(place, Remote):
        try:
            entries = place.entries()
        except FileNotFoundError as error:
            raise InputError(f"{path}: {cause(error, place.scheme)}") from error
        except OSError as error:
            text = cause(error, place.scheme)
            raise (InputError if DENIED.search(text) else OSError)(f"{path}: cannot be read: {text}") from error
        found = [Found(place / name if name else place, size) for name, size, _ in entries if not _hidden(name)]
    elif place.is_dir():
        files = (Path(folder, name) for folder, _, names in os.walk(place, followlinks=True) for name in names)
        seen = (file for file in files if not _hidden(file.relative_to(place).as_posix()) and file.exists())
        found = [Found(file, file.stat().st_size) for file in seen]
    else:
        found = [Found(place, place.stat().st_size)] if place.is_file() else []
    if not found:
        raise InputError(f"{path}: no such file or folder, or nothing in it")
    return place, sorted(found, key=lambda one: str(one.place))


def _hidden(name: str) -> bool:
    return any(segment.startswith(".") for segment in name.split("/"))


def _common(found: Sequence[Found]) -> Place:
    """The folder that all files lie in."""
    folder = posixpath.commonpath([posixpath.dirname(_key(one.place)) for one in found])
    first = found[0].place
    return Remote(first.scheme, folder) if isinstance(first, Remote) else Path(folder)


def _key(place: Place) -> str:
    return place.key if isinstance(place, Remote) else place.absolute().as_posix()


def _below(base: Place, place: Place) -> str:
    return posixpath.relpath(_key(place), _key(base))


def _caption_file(place: Place) -> str:
    return str(place.parent / (place.name.rpartition(".")[0] + ".txt"))


def _kind(name: str) -> str:
    lower = name.lower()
    if lower.endswith(TARS):
        return "tar"
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(TABLES):
        return "table"
    return "picture" if lower.endswith(SUFFIXES) else "text" if lower.endswith(".txt") else ""


def _is_metadata(place: Place) -> bool:
    return place.name.lower().startswith("metadata.") and _kind(place.name) == "table"


def _fingerprint(base: Place, files: Sequence[Found], said: list[Any]) -> str:
    """Of names below their common folder, of sizes, of what a table says, and of the columns that are read."""
    root = base if len(files) > 1 else files[0].place.parent
    listing = [(_below(root, one.place), one.size) for one in files]
    return hashlib.blake2b(json.dumps([listing, said]).encode(), digest_size=16).hexdigest()
