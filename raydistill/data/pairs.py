"""Pairs of latents of one picture, in both spaces: sharded parquet of (prompt, prompt_id, seed, z_T, z_S, preview).

A shard is one file, pairs-NNNNN.parquet, written under another name and renamed when complete; whatever carries the
final name is whole, so an interrupted writer goes on with the shards that `existing_shards` lacks. Sets made by
synthesis also have the columns row (position in the set), teacher and teacher_revision (whose VAE encoded z_T), and
each of their shards says in its parquet metadata how many rows it covers, which of them failed (`about_shard`), and by
which VAEs its latents were encoded (`open_pairs`).

Shapes: N rows, C×H×W normalised latents on the VAE grids, float16 or bfloat16; parquet holds bfloat16 as uint16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.data.bits import to_numpy, to_torch
from raydistill.data.texts import without_views
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError
from raydistill.pictures.files import load_image
from raydistill.spaces.base import Space
from raydistill.spaces.loaded import has_vae, vae_fingerprint
from raydistill.storage.atomic import replacing
from raydistill.storage.place import Place, Remote
from raydistill.storage.resolve import to_place

SHARD_NAME = re.compile(r"pairs-(\d{5,})\.parquet")
LATENT_COLUMNS = ("z_T", "z_S")
READERS = 32  # threads that read a little of each shard
END_BYTES = 1 << 16  # of `fingerprint`: at the end of a shard
ROW_GROUP = 64  # rows of a shard that are read together: random access within a window costs few bytes
ABOUT = b"raydistill"  # key of the parquet metadata under which a shard describes itself
VAES = b"raydistill.vaes"  # and under which it says whose latents it holds: JSON, role -> sha256 of the VAE
STORED = {pa.float16(): torch.float16, pa.uint16(): torch.bfloat16}  # numbers of a latent column


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of a pair set; `ids` are their positions in the whole set."""

    ids: np.ndarray  # [N] int64
    prompts: list[str]
    prompt_ids: torch.Tensor  # [N] int64
    seeds: torch.Tensor  # [N] int64
    z_teacher: torch.Tensor  # [N, Ct, H, W] float16 or bfloat16
    z_student: torch.Tensor  # [N, Cs, h, w], the same
    previews: list[bytes | None]

    def __len__(self) -> int:
        return len(self.prompts)

    def micro_batch(self, index: int, count: int) -> Pairs:
        """The rows of one of `count` equal micro-batches. Raises ValueError where they cannot be equal."""
        if len(self) % count:
            raise ValueError(f"micro_batches: {len(self)} pairs have no {count} equal parts")
        size = len(self) // count
        return self.rows(index * size, (index + 1) * size)

    def rows(self, start: int, stop: int) -> Pairs:
        """Rows start … stop - 1."""
        some = slice(start, stop)
        return Pairs(**{field.name: getattr(self, field.name)[some] for field in dataclasses.fields(self)})

    @classmethod
    def joined(cls, sets: Sequence[Pairs]) -> Pairs:
        """The rows of all sets, in their order."""
        columns = {}
        for name in (field.name for field in dataclasses.fields(cls)):
            values = [getattr(one, name) for one in sets]
            join = {np.ndarray: np.concatenate, torch.Tensor: torch.cat}.get(type(values[0]))
            columns[name] = join(values) if join else [value for some in values for value in some]
        return cls(**columns)


# -- writing --------------------------------------------------------------------------------------------


def shard_file(folder: str | Place, shard_index: int) -> Place:
    return to_place(str(folder)) / f"pairs-{shard_index:05d}.parquet"


def existing_shards(folder: str | Place) -> list[int]:
    """Indices of the complete shards, ascending; empty for a folder that does not exist."""
    folder = to_place(str(folder))
    names = (SHARD_NAME.fullmatch(file.name) for file in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(name[1]) for name in names if name)


def captioned_previews(files: Sequence[Place], count: int) -> tuple[torch.Tensor, list[str]]:
    """At most `count` previews spread over some shards, [N, 3, H, W] in [-1, 1], and their prompts.

    Shards must have previews. Only these two columns are read, of `count` shards at most.
    """
    chosen = [files[index * len(files) // min(count, len(files))] for index in range(min(count, len(files)))]
    images, prompts = [], []
    for number, file in enumerate(chosen):
        share = (number + 1) * count // len(chosen) - number * count // len(chosen)
        table = pq.read_table(**_where(file), columns=["prompt", "preview"])
        share = min(share, len(table))
        rows = table.take([index * len(table) // share for index in range(share)]) if share else table
        prompts += rows["prompt"].to_pylist()
        images += [load_image(io.BytesIO(data)) for data in rows["preview"].to_pylist()]
    return torch.stack(images) if images else torch.zeros(0, 3, 1, 1), prompts


def _where(file: Place) -> dict[str, Any]:
    """How pyarrow is told which file is meant."""
    return {"source": file.key, "filesystem": file.filesystem} if isinstance(file, Remote) else {"source": file}


def _latent_column(latents: torch.Tensor, name: str, count: int) -> pa.Array:
    if latents.ndim != 4 or len(latents) != count:
        raise ValueError(f"{name} must be [{count}, C, H, W], not {list(latents.shape)}")
    dtype = torch.bfloat16 if latents.dtype == torch.bfloat16 else torch.float16
    stored = latents.detach().to("cpu", dtype)
    if not stored.isfinite().all():
        raise ValueError(f"{name} has values that are not finite in {str(dtype).removeprefix('torch.')}")
    values = np.ascontiguousarray(to_numpy(stored))
    if not count:  # `from_numpy_ndarray` takes no empty array
        kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
        return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values)


def write_pairs(
    folder: str | Place,
    shard_index: int,
    *,
    prompts: Sequence[str],
    prompt_ids: Sequence[int] | torch.Tensor,
    seeds: Sequence[int] | torch.Tensor,
    z_teacher: torch.Tensor,
    z_student: torch.Tensor,
    previews: Sequence[bytes | None] | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    teacher: tuple[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
    vaes: Mapping[str, str] | None = None,
) -> Place:
    """Write one shard atomically, replacing an older one of this index.

    Args:
        prompts, prompt_ids, seeds: N of each.
        z_teacher, z_student: [N, C, H, W] normalised latents, in the columns z_T and z_S: bfloat16 as it is, all else
            as float16.
        previews: PNG bytes of the pictures, or None.
        rows: positions in the whole set, N integers, or None for no such column.
        teacher: name and revision of the model whose VAE encoded z_T, or None for no such columns.
        about: what the shard says of itself, JSON (see `about_shard`); a shard with it may be empty.
        vaes: sha256 (`vae_fingerprint`) of the VAEs that encoded it, by role: teacher, student.

    Raises:
        ValueError: lengths differ, a latent is not finite, or the shard is empty.
    """
    count = len(prompts)
    given = [column for column in (prompt_ids, seeds, previews, rows) if column is not None]
    if any(len(column) != count for column in given) or not (count or about):
        raise ValueError(f"a shard needs as many prompt_ids, seeds, previews and rows as prompts ({count}, at least 1)")
    columns = {
        "prompt": pa.array(list(prompts), pa.string()),
        "prompt_id": pa.array(np.asarray(prompt_ids, dtype=np.int64)),
        "seed": pa.array(np.asarray(seeds, dtype=np.int64)),
        "z_T": _latent_column(z_teacher, "z_T", count),
        "z_S": _latent_column(z_student, "z_S", count),
    }
    if previews is not None:
        columns["preview"] = pa.array(list(previews), pa.binary())
    if rows is not None:
        columns["row"] = pa.array(np.asarray(rows, dtype=np.int64))
    if teacher is not None:
        columns |= {
            name: pa.array([text] * count, pa.string())
            for name, text in zip(("teacher", "teacher_revision"), teacher, strict=True)
        }
    table = pa.table(columns)
    said = {ABOUT: about, VAES: vaes}
    said = {key: json.dumps(value, sort_keys=True) for key, value in said.items() if value is not None}
    table = table.replace_schema_metadata(said or None)
    file = shard_file(folder, shard_index)
    with replacing(file) as fresh:
        pq.write_table(table, fresh, compression="zstd", row_group_size=ROW_GROUP, **_encodings(table))
    return file


def _encodings(table: pa.Table) -> dict[str, list[str]]:
    """First and second bytes of latents in streams of their own, where zstd finds something: a tenth less of Gaussian
    float16, a quarter less of bfloat16. Nothing is lost."""
    latents = [f"{name}.list.element" for name in LATENT_COLUMNS]
    return {
        "use_byte_stream_split": latents,
        "use_dictionary": [name for name in table.column_names if name not in LATENT_COLUMNS],
    }


def about_shard(folder: str | Place, shard_index: int) -> dict[str, Any]:
    """What a shard says of itself: "rows", how many it covers, and "failed", those of them it lacks, with reasons.

    A shard from another writer, which says nothing, covers the rows that it has.

    Raises:
        InputError: not a parquet file.
    """
    with _open(shard_file(folder, shard_index)) as parquet:
        said = (parquet.metadata.metadata or {}).get(ABOUT)
        return json.loads(said) if said else {"rows": parquet.metadata.num_rows, "failed": []}


def covered_rows(folder: str | Place) -> int:
    """Rows that the shards cover, those that failed among them. Raises InputError."""
    return sum(about_shard(folder, index)["rows"] for index in existing_shards(folder))


# -- reading --------------------------------------------------------------------------------------------


def count_rows(folder: str | Place) -> int:
    """Rows of all shards. Raises InputError."""
    files = [shard_file(folder, index) for index in existing_shards(folder)]
    return sum(_open(file).metadata.num_rows for file in files)


def fingerprint(folder: str | Place) -> str:
    """Of a set of pairs: names, sizes and ends of its shards, whose parquet footers say how large each column is.

    Raises:
        InputError: a shard cannot be read.
    """
    files = [shard_file(folder, index) for index in existing_shards(folder)]
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(READERS) as readers:
        for file, end in zip(files, readers.map(_end, files), strict=True):
            digest.update(file.name.encode() + b"\0" + end)
    return digest.hexdigest()


def _end(file: Place) -> bytes:
    """Size of a shard, and its last bytes: the footer, however long it is."""
    try:
        with file.filesystem.open_input_file(file.key) if isinstance(file, Remote) else file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - END_BYTES))
            end = stream.read()
            footer = int.from_bytes(end[-8:-4], "little") + 8  # as parquet ends: the footer, its length, PAR1
            if footer > len(end):
                stream.seek(max(0, size - footer))
                end = stream.read()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    return size.to_bytes(8) + hashlib.blake2b(end).digest()


def _open(file: Place) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(**_where(file))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{file}: not a readable parquet file: {error}") from None


def _footer(file: Place) -> tuple[Place, pa.Schema, pq.FileMetaData]:
    with _open(file) as parquet:
        return file, parquet.schema_arrow, parquet.metadata


def read_latents(file: Place, group: int) -> torch.Tensor:
    """Teacher latents [N, C, H, W] of a row group, as they are stored.

    Raises:
        OSError: the store does not answer; unlike `InputError`, this may be gone at the next attempt.
    """
    with pq.ParquetFile(**_where(file), pre_buffer=True) as parquet:
        table = parquet.read_row_group(group, columns=["prompt", "prompt_id", "seed", *LATENT_COLUMNS])
    return PairSet._pairs(np.arange(len(table)), table).z_teacher


def read_captions(file: Place, group: int) -> list[str]:
    """Captions of a row group. Raises as `read_latents`."""
    with pq.ParquetFile(**_where(file)) as parquet:
        return parquet.read_row_group(group, columns=["prompt"])["prompt"].to_pylist()


class PairSet:
    """All shards of a folder as one sequence of rows, read shard by shard when needed.

    Args:
        folder: holds pairs-*.parquet.
        z_teacher_shape, z_student_shape: C, H, W each latent must have, or None for any (but the same in all shards).
        cached_shards: shards kept in memory; also the window within which `order` mixes rows.

    Attributes:
        vaes: role -> sha256 of each VAE that encoded some of it -> the first shard that says so.
        silent: shards that do not say which VAEs encoded them.
        groups: rows of each row group of each file.

    Raises:
        InputError: no shards, or one with a missing column, another shape or another kind of number; names file and
            column.
    """

    def __init__(
        self,
        folder: str | Place,
        z_teacher_shape: tuple[int, int, int] | None = None,
        z_student_shape: tuple[int, int, int] | None = None,
        cached_shards: int = 16,
    ) -> None:
        self.folder = to_place(str(folder))
        self.files = [shard_file(folder, index) for index in existing_shards(folder)]
        if not self.files:
            raise InputError(f"{folder}: no pairs-*.parquet files; make them with jobs/synthesize.py")
        expected: dict[str, tuple[int, ...] | None] = {"z_T": z_teacher_shape, "z_S": z_student_shape}
        self.vaes: dict[str, dict[str, Place]] = {}
        self.silent = 0
        self._numbers: set[pa.DataType] = set()
        with ThreadPoolExecutor(READERS) as readers:  # a bucket answers each request after a while
            self.groups = [self._check(*footer, expected) for footer in readers.map(_footer, self.files)]
        self.shapes = expected
        self.cached_shards = cached_shards
        self._starts = np.concatenate([[0], np.cumsum([sum(sizes) for sizes in self.groups])])
        self._shard = lru_cache(maxsize=cached_shards)(self._read)

    def _check(
        self, file: Place, schema: pa.Schema, metadata: pq.FileMetaData, expected: dict[str, tuple[int, ...] | None]
    ) -> list[int]:
        """Rows of each row group of a shard whose columns are as they should be."""
        missing = [c for c in ("prompt", "prompt_id", "seed", *LATENT_COLUMNS) if c not in schema.names]
        if missing:
            raise InputError(f"{file}: column {missing[0]} is missing (it has {', '.join(schema.names)})")
        for column in LATENT_COLUMNS:
            kind = schema.field(column).type
            if not isinstance(kind, pa.FixedShapeTensorType) or kind.value_type not in STORED:
                raise InputError(
                    f"{file}: column {column} must be a fixed-shape tensor of float16, or of uint16 for bfloat16, not {kind}"
                )
            self._numbers.add(kind.value_type)
            if len(self._numbers) > 1:
                raise InputError(f"{file}: column {column} holds {kind.value_type}, others of the set do not")
            shape = tuple(kind.shape)
            if expected[column] is None:
                expected[column] = shape
            elif shape != tuple(expected[column]):
                raise InputError(f"{file}: column {column} has shape {shape}, but {tuple(expected[column])} is needed")
        vaes = json.loads((metadata.metadata or {}).get(VAES, "{}"))
        self.silent += not vaes
        for role, sha256 in vaes.items():
            self.vaes.setdefault(role, {}).setdefault(sha256, file)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _read(self, shard: int) -> pa.Table:
        return without_views(pq.read_table(**_where(self.files[shard]))).combine_chunks()

    def _column(self, name: str) -> list:
        """One small column of all rows."""

        def read(file: Place) -> list:
            return pq.read_table(**_where(file), columns=[name])[name].to_pylist()

        with ThreadPoolExecutor(READERS) as readers:
            return [value for values in readers.map(read, self.files) for value in values]

    def prompts(self) -> list[str]:
        """The prompts of all rows."""
        return self._column("prompt")

    def prompt_ids(self) -> np.ndarray:
        """The prompt ids of all rows, int64."""
        return np.asarray(self._column("prompt_id"), dtype=np.int64)

    def rows(self, ids: Sequence[int] | np.ndarray) -> Pairs:
        """The rows at these positions, in this order."""
        ids = np.asarray(ids, dtype=np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= len(self):
            raise IndexError(f"{self.folder}: rows must be 0 … {len(self) - 1}, at least one")
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        tables, positions = [], []
        for shard in np.unique(shards):
            (where,) = np.nonzero(shards == shard)
            tables.append(self._shard(int(shard)).take(pa.array(ids[where] - self._starts[shard])))
            positions.append(where)
        back = np.argsort(np.concatenate(positions))
        table = pa.concat_tables(tables, promote_options="default").combine_chunks().take(pa.array(back))
        return self._pairs(ids, table.combine_chunks())

    @staticmethod
    def _pairs(ids: np.ndarray, table: pa.Table) -> Pairs:
        def latents(name: str) -> torch.Tensor:
            return to_torch(table[name].combine_chunks().to_numpy_ndarray().copy())

        has_preview = "preview" in table.column_names
        return Pairs(
            ids=ids,
            prompts=table["prompt"].to_pylist(),
            prompt_ids=torch.tensor(table["prompt_id"].to_numpy().copy()),
            seeds=torch.tensor(table["seed"].to_numpy().copy()),
            z_teacher=latents("z_T"),
            z_student=latents("z_S"),
            previews=table["preview"].to_pylist() if has_preview else [None] * len(table),
        )

    def order(self, ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """A permutation of `ids` (ascending positions) that depends on seed and epoch only.

        Shards are shuffled, and rows among `cached_shards` neighbouring shards: a set that does not fit into memory is
        still read file by file; one of at most that many shards is shuffled completely.
        """
        draws = uniform(seed, [epoch], "pair_order", shape=(len(ids),))[0].numpy()
        ranks = (
            uniform(seed, [epoch], "shard_order", shape=(len(self.files),))[0].numpy().argsort(kind="stable").argsort()
        )
        windows = ranks[np.searchsorted(self._starts, ids, side="right") - 1] // self.cached_shards
        return ids[np.lexsort((draws, windows))]


def open_pairs(folder: str | Place, teacher: Space, student: Space | None = None) -> PairSet:
    """The pairs of these spaces; where no student is given, of the teacher's side alone.

    A set that says by which VAEs it was encoded is for those. Sets of earlier versions, and other people's, need not
    say so; their shapes are looked at.

    Raises:
        InputError: as `PairSet`, or the set was encoded by another VAE.
    """
    pairs = PairSet(folder, teacher.latent_shape, None if student is None else student.latent_shape)
    for role, column, space in (("teacher", "z_T", teacher), ("student", "z_S", student)):
        for sha256, file in pairs.vaes.get(role, {}).items() if space is not None else ():
            if not has_vae(space, sha256):
                raise InputError(
                    f"{file}: column {column} was encoded by another VAE (sha256 {sha256[:12]}…) than the {role}'s, "
                    f"{space.folder} ({vae_fingerprint(space)[:12]}…); make pairs for it with jobs/synthesize.py"
                )
    return pairs
