"""Pairs that are encoded while a Bridge is trained on them: both VAEs in Ray Data actors beside each worker.

    reader (an actor) ──► tasks that decode pictures ──► encoders (both VAEs) ──► the worker: pairs, failures, position

The reader follows `PictureOrder`, order is kept, and a picture's numbers do not depend on its neighbours. So a worker
that goes on at a position sees the pairs that it would have seen. Nothing is stored, and memory is bounded: a window of
picture files in the reader (`picture_order`), IN_FLIGHT_BYTES in the object store.

What goes through the stages is a `Chunk`, one a row: Ray Data hands on a block when it is full, and an endless reader of
small pictures would fill one for a long time.

Shapes: n pictures of a chunk, S pixels a side, C×H×W normalised latents, B pairs of a batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.extensions import ArrowPythonObjectArray
from ray.exceptions import RayError

from raydistill.config.schema import Config
from raydistill.config.stages import LatentDtype, Posterior, SynthesisConfig
from raydistill.data.bits import to_torch
from raydistill.data.images import BadImage
from raydistill.data.pairs import Pairs
from raydistill.data.picture_order import PictureOrder, Position
from raydistill.data.picture_probe import check_first
from raydistill.data.pictures import Cursor, PictureRow
from raydistill.data.ray_data import dataset_of, telling
from raydistill.data.stage_error import StageError
from raydistill.data.stream import Unhurried
from raydistill.data.synthesis import encode_rows
from raydistill.data.vae import PairEncoder
from raydistill.errors import InputError, StageFailed
from raydistill.spaces import load_space
from raydistill.spaces.base import Space
from raydistill.storage.resolve import resolve
from raydistill.teachers import placement
from raydistill.teachers.request import one_line

CHUNK, CHUNK_BYTES = 16, 64 << 20  # pictures that go through the stages together, at most; above so many bytes, fewer
IN_FLIGHT_BYTES = 512 << 20  # object store memory within which the stages run ahead
PREFETCHED = 2  # chunks, in the worker's process


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What decides a picture's pair. `settings` also say how many actors encode, and what each reserves."""

    teacher: Space
    student: Space
    seed: int
    posterior: Posterior
    dtype: LatentDtype
    augment_share: float = 0.0  # of the pictures, which are changed before both VAEs encode them

    @classmethod
    def of(cls, config: Config) -> Encoding:
        synthesis = config.synthesis
        return cls(
            teacher=load_space(resolve(config.teacher.model)),
            student=load_space(resolve(config.student.model)),
            seed=config.run.seed,
            posterior=synthesis.posterior,
            dtype=synthesis.dtype,
            augment_share=synthesis.augment_share,
        )

    def encoder(self, device: str) -> PairEncoder:
        kept = {"dtype": getattr(torch, self.dtype), "with_previews": False, "augment_share": self.augment_share}
        return PairEncoder(self.teacher, self.student, device, self.posterior, self.seed, **kept)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some pictures, from bytes to latents."""

    rows: list[PictureRow]  # without their bytes once they are decoded
    after: list[Position] | None  # where the worker goes on behind each; None: they are held out
    failure: np.ndarray  # of str [n]: why there is no pair, or ""
    pixels: np.ndarray | None = None  # [n, 3, S, S] uint8
    z_T: np.ndarray | None = None  # [n, C, H, W] float16, or bfloat16 as uint16
    z_S: np.ndarray | None = None


# -- the stages -----------------------------------------------------------------------------------------


def read(order: PictureOrder, start: Position, validation: int, size: int) -> Iterator[Chunk]:
    """Chunks of at most `size` pictures: the first `validation` that are held out, then those to train on, endlessly."""
    if validation:
        if start == Position():
            check_first(order.pictures, order.seed, order.filters)
        for some in _some(((row, None) for row in order.validation(validation)), size):
            rows = [row for row, _ in some]
            yield Chunk(rows=rows, after=None, failure=_failures(rows))
    for some in _some(order.rows(start), size):
        rows, after = zip(*some, strict=True)
        yield Chunk(rows=list(rows), after=list(after), failure=_failures(rows))


def _some(rows: Iterable[tuple[PictureRow, Any]], size: int) -> Iterator[list[tuple[PictureRow, Any]]]:
    """At most `size` rows at a time, and about CHUNK_BYTES of pictures."""
    some: list[tuple[PictureRow, Any]] = []
    held = 0
    for one in rows:
        some.append(one)
        held += len(one[0].data)
        if len(some) == size or held >= CHUNK_BYTES:
            yield some
            some, held = [], 0
    if some:
        yield some


def _failures(rows: Any) -> np.ndarray:
    return np.array([row.failure and f"{row.name}: {row.failure}" for row in rows], dtype=object)


def decode(chunk: Chunk, pixels: int) -> Chunk:
    """Pictures at `pixels` a side; those that cannot be decoded are black, and say why."""
    pictures, failure = np.zeros((len(chunk.rows), 3, pixels, pixels), np.uint8), chunk.failure.copy()
    for index, row in enumerate(chunk.rows):
        try:
            pictures[index] = row.picture(pixels)
        except BadImage as bad:
            failure[index] = str(bad)
    rows = [dataclasses.replace(row, data=b"") for row in chunk.rows]
    return dataclasses.replace(chunk, rows=rows, pixels=pictures, failure=failure)


def encode(chunk: Chunk, encoder: PairEncoder) -> Chunk:
    """Pictures to latents."""
    keys = np.array([row.key for row in chunk.rows], dtype=np.int64)
    made = encode_rows(encoder, {"row": keys, "pixels": chunk.pixels, "failure": chunk.failure})
    bad = (chunk.failure == "") & (made["failure"] != "")  # whose reason names no picture yet
    failure = [
        f"{row.name}: {why}" if new else why for row, why, new in zip(chunk.rows, made["failure"], bad, strict=True)
    ]
    return dataclasses.replace(
        chunk, pixels=None, z_T=made["z_T"], z_S=made["z_S"], failure=np.array(failure, dtype=object)
    )


def _packed(chunk: Chunk) -> pa.Table:
    return pa.table({"chunk": ArrowPythonObjectArray.from_objects([chunk])})


class _Reader:
    def __init__(self, order: ray.ObjectRef, start: Position, validation: int, size: int) -> None:
        self._arguments = order, start, validation, size

    @telling
    def __call__(self, _: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        order, *rest = self._arguments
        for chunk in read(ray.get(order), *rest):
            yield _packed(chunk)


@telling
def _decode(batch: dict[str, np.ndarray], pixels: int) -> pa.Table:
    return _packed(decode(batch["chunk"][0], pixels))


class _Encoder:
    """Loads its VAEs at the first call: what a constructor raises, Ray prints four times over."""

    def __init__(self, encoding: Encoding, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load = functools.partial(encoding.encoder, device)

    @functools.cached_property
    def _encoder(self) -> PairEncoder:
        return self._load()

    @telling
    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        return _packed(encode(batch["chunk"][0], self._encoder))


def encoded_chunks(
    order: PictureOrder, encoding: Encoding, settings: SynthesisConfig, start: Position, validation: int
) -> Generator[Chunk]:
    """Encoded chunks of one worker, in order. Call it inside the worker; closing the generator ends the actors.

    Args:
        settings: `encoders` actors hold the VAEs; with a GPU share they encode on "cuda".
        start: where the worker goes on.
        validation: held-out pictures that come first.

    Raises:
        InputError: the pictures cannot be used.
        StageFailed: a stage failed.
    """
    where = {"label_selector": settings.node_labels or None, "num_cpus": settings.cpus_per_encoder}
    one_by_one = {"batch_size": 1, "batch_format": "numpy"}
    reader = {
        "order": ray.put(order),
        "start": start,
        "validation": validation,
        "size": min(CHUNK, settings.batch_size),
    }
    encoder = {
        "encoding": encoding,
        "device": "cuda" if settings.gpus_per_encoder else "cpu",
        "threads": settings.threads_per_encoder,
    }
    chunks = (
        _beginning()
        .map_batches(
            _Reader,
            fn_constructor_kwargs=reader,
            compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),
            **one_by_one,
            **where,
        )
        .map_batches(_decode, fn_kwargs={"pixels": encoding.teacher.resolution}, **one_by_one, **where)
        .map_batches(
            _Encoder,
            fn_constructor_kwargs=encoder,
            compute=ray.data.ActorPoolStrategy(size=settings.encoders, max_tasks_in_flight_per_actor=2),
            num_gpus=settings.gpus_per_encoder,
            **one_by_one,
            **where,
        )
    )
    batches = iter(chunks.iter_batches(batch_size=1, prefetch_batches=PREFETCHED, batch_format="numpy"))
    try:
        for batch in batches:
            yield batch["chunk"][0]
    except RayError as error:
        raise _plain(error) from error
    finally:
        batches.close()


def _beginning() -> ray.data.Dataset:
    data = dataset_of([{"begin": 0}], in_order=True)
    context = data.context
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=IN_FLIGHT_BYTES)
    context.custom_execution_callback_classes = [Unhurried]
    context.target_max_block_size = 1  # a chunk is a block
    context.raise_original_map_exception = True  # a StageError
    return data


def _plain(error: RayError) -> Exception:
    """What a stage raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, StageError):
        return StageFailed(f"the encoders of pictures failed: {one_line(error)}")
    if cause.kind == InputError.__name__:
        return InputError(cause.text)
    return StageFailed(f"the encoders of pictures failed: {cause.kind}: {cause.text}")


def stream_needs(settings: SynthesisConfig, workers: int) -> list[placement.Need]:
    """The actors of so many workers, and for each a task that decodes."""
    keys = "synthesis.encoders, synthesis.cpus_per_encoder or synthesis.gpus_per_encoder"
    cpus, labels = {"CPU": settings.cpus_per_encoder}, settings.node_labels
    both = cpus | {"GPU": settings.gpus_per_encoder}
    return [
        placement.Need("the encoders of pictures", workers * settings.encoders, both, keys, labels),
        placement.Need("the readers of pictures", 2 * workers, cpus, keys, labels),
    ]


# -- the worker -----------------------------------------------------------------------------------------


class StreamedPairs:
    """One worker's pairs, batch after batch.

    Args:
        chunks: of its stream.
        seed: a column.
        max_failed_rows: pictures that may fail in an epoch of this worker.
        state: of a checkpoint; None: at the beginning.

    Attributes:
        failed: pictures that have failed in the present epoch.
    """

    def __init__(
        self, chunks: Iterator[Chunk], *, seed: int, max_failed_rows: int, state: dict[str, int] | None = None
    ) -> None:
        self._chunks, self._seed, self._limit = chunks, seed, max_failed_rows
        self._position, self.failed = position_of(state), state["failed"] if state else 0
        self._waiting: deque[tuple[Chunk, int]] = deque()

    def held_out(self) -> Pairs:
        """The held-out pairs, which the stream begins with. Raises InputError where none can be used."""
        sets, why, chunk = [], "", next(self._chunks)
        while chunk.after is None:
            good = np.flatnonzero(chunk.failure == "")
            sets += [self._pairs([(chunk, int(index)) for index in good], good)] if len(good) else []
            why, chunk = chunk.failure[-1], next(self._chunks)
        self._put(chunk)
        if not sets:
            raise InputError(f"synthesis.images: no picture that is held out can be used; the last one: {why}")
        pairs = Pairs.joined(sets)
        return dataclasses.replace(pairs, ids=np.arange(len(pairs)))

    def next(self, ids: np.ndarray) -> Pairs:
        """The next pairs, which get these `ids` [B].

        Raises:
            InputError: too many pictures have failed, or as `encoded_chunks`.
        """
        return self._pairs([self._good() for _ in ids], ids)

    def state(self) -> dict[str, int]:
        """Where the worker goes on behind the last batch."""
        return dataclasses.asdict(self._position.window) | {"taken": self._position.taken, "failed": self.failed}

    def _good(self) -> tuple[Chunk, int]:
        while True:
            if not self._waiting:
                self._put(next(self._chunks))
            chunk, index = self._waiting.popleft()
            after = chunk.after[index]
            if after.window.epoch != self._position.window.epoch:
                self.failed = 0
            self._position = after
            if not chunk.failure[index]:
                return chunk, index
            self.failed += 1
            if self.failed > self._limit:
                raise InputError(
                    f"synthesis.images: {self.failed} pictures of this worker's epoch cannot be used, more than "
                    f"synthesis.max_failed_rows={self._limit}; the last one: {chunk.failure[index]}"
                )

    def _put(self, chunk: Chunk) -> None:
        self._waiting.extend((chunk, index) for index in range(len(chunk.rows)))

    def _pairs(self, chosen: list[tuple[Chunk, int]], ids: np.ndarray) -> Pairs:
        rows = [chunk.rows[index] for chunk, index in chosen]
        return Pairs(
            ids=ids,
            prompts=[row.caption for row in rows],
            prompt_ids=torch.tensor([row.key for row in rows]),
            seeds=torch.full((len(rows),), self._seed),
            z_teacher=to_torch(np.stack([chunk.z_T[index] for chunk, index in chosen])),
            z_student=to_torch(np.stack([chunk.z_S[index] for chunk, index in chosen])),
            previews=[None] * len(rows),
        )


def position_of(state: dict[str, int] | None) -> Position:
    """Where a worker of this state goes on."""
    if state is None:
        return Position()
    return Position(Cursor(state["epoch"], state["shard"], state["row"]), state["taken"])
