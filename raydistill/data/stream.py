"""Conditioned batches for trainers: text encoders in Ray Data actors, in an order that can be resumed anywhere.

The cursor is a slot number. Slot s is one batch of all workers together, G rows: the positions s G … s G + G - 1 of the
prompt set's endless order (`PromptSet.at`), of which each worker reads its own (`own_rows`). Each position is read
exactly once by construction, whatever the number of restarts, and of workers after each; a resume encodes nothing that
was consumed before. See `encode` for the columns.

With a GAN the captions of teacher samples ride along: behind each slot of the fake score comes a batch of as many rows, the
same rows of the reals' own endless order (`reals.RealOrder`). The latents do not: their reader is the worker itself.
Bytes of a worker's update with k = 2 and a batch of 32, conditioning in bfloat16, latents in float16:

                                 FLUX.1 [dev]   SD 3.5 Medium   SDXL
    conditioning of prompts      403 MB         263 MB          30 MB    3 batches, through the object store
    conditioning of captions     269 MB         175 MB          20 MB    2 batches, the same way
    latents                       34 MB          34 MB           8 MB    2 batches, from storage to the worker

`in_flight_bytes` bounds what waits in the object store either way. In rows of prompts, latents would be holes of as many
bytes as in rows of captions, and encoders would hold the window of row groups once more.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from raydistill.background import in_background
from raydistill.data.encode import CHUNK, REAL, Batch, PromptEncoder
from raydistill.data.prompts import PromptSet
from raydistill.data.ray_data import dataset_of, fetched
from raydistill.data.reals import RealOrder, RealSet
from raydistill.data.reward_texts import RewardTexts

IDLE_S = 0.02  # pause of the executor's loop while the trainer has batches waiting


def own_rows(rank: int, world: int, count: int, size: int) -> range:
    """Rows of every slot that worker `rank` of `world` reads: micro-batches of `size`, in a row, out of `count`."""
    return range(rank * count // world * size, (rank + 1) * count // world * size)


def slot_positions(slot: int, rows: Sequence[int], slot_size: int) -> np.ndarray:
    """Positions [B] of a slot's `rows`, int64."""
    return np.asarray(rows, dtype=np.int64) + slot * slot_size


@dataclass(frozen=True)
class FakeRows:
    """Which rows of a slot of the fake score a worker reads, where these are not all of its own (`fake_score.batch_size`).

    Attributes:
        rows: of the slot, in order; at least one.
        updates: of the fake score for each of the student, whose own slot comes first.
    """

    rows: tuple[int, ...]
    updates: int

    @classmethod
    def of(cls, own: range, size: int, count: int, fake_count: int, updates: int) -> FakeRows | None:
        """Those of the first `fake_count` of each `count` micro-batches of a slot. None: all of the worker's own."""
        if fake_count == count:
            return None
        return cls(tuple(row for row in own if row // size % count < fake_count), updates)


@dataclass(frozen=True)
class RealCaptions:
    """Captions of teacher samples, in the order in which the discriminator sees these.

    Attributes:
        samples: the set.
        order: in which it is read.
    """

    samples: RealSet
    order: RealOrder

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(rows [B] of the set, their captions) at positions of the order."""
        rows = self.order.rows(positions)
        return rows, self.samples.captions(rows)


class _Reader:
    """Slot numbers -> sample_id, prompt_id, prompt and real of their rows; of a teacher sample, prompt_id is its row.

    It lives in an encoder's process.
    """

    def __init__(
        self,
        prompts: ray.ObjectRef,
        reals: ray.ObjectRef | None,
        seed: int,
        size: int,
        *,
        rows: range,
        fake: FakeRows | None,
    ) -> None:
        self.prompts, self.reals, self.seed, self.slot_size = prompts, reals, seed, size
        self.rows, self.fake = rows, fake

    def read(self, slots: Batch) -> Batch:
        rows = [self._rows(*slot) for slot in zip(slots["slot"].tolist(), slots["real"].tolist(), strict=True)]
        return {name: np.concatenate([columns[name] for columns in rows]) for name in rows[0]}

    def _rows(self, slot: int, real: bool) -> Batch:
        positions = slot_positions(slot, _read_rows(slot, real, self.rows, self.fake), self.slot_size)
        ids, texts = fetched(self.reals).at(positions) if real else fetched(self.prompts).at(self.seed, positions)
        prompts = np.array(texts, dtype=object)
        return {"sample_id": positions, "prompt_id": ids, "prompt": prompts, REAL: np.full(len(ids), real)}


def conditioned_batches(
    prompts: PromptSet,
    folders: Mapping[str, str],
    *,
    seed: int,
    first: int,
    stop: int,
    rows: range,
    slot_size: int,
    fake: FakeRows | None = None,
    reals: RealCaptions | None = None,
    reward: RewardTexts | None = None,
    dtype: str | Mapping[str, str] = "float32",
    chunk: int = CHUNK,
    encoders: int = 1,
    cpus_per_encoder: float = 0.1,
    gpus_per_encoder: float = 0.0,
    threads: int = 1,
    node_labels: Mapping[str, str] | None = None,
    prefetch: int = 2,
    in_flight_bytes: int = 256 << 20,
) -> Generator[Batch]:
    """Batches of the slots first … stop - 1 for one worker, in order; see `encode` for the columns.

    Call it inside the worker that consumes the batches; closing the generator ends the encoders.

    Args:
        prompts: the prompt set; stored once in the object store.
        folders, dtype, chunk, threads, reward: see `PromptEncoder`. Folders must exist on every node.
        seed: of the order of prompts.
        first, stop: slots to read; a resume starts at the first slot that was not consumed.
        rows: of each slot, those of this worker: B of them.
        slot_size: rows G of a slot, of all workers together.
        fake: those of the fake score's slots; None: the same.
        reals: teacher samples, whose captions come behind each slot of the fake score; their `sample_id` is the position
            in their order and their `prompt_id` the row. None: prompts alone.
        encoders: actors of this worker that encode.
        cpus_per_encoder, gpus_per_encoder: Ray resources of each; with a GPU share they encode on "cuda".
        node_labels: of the nodes that may hold them; None: any.
        prefetch: batches fetched ahead into this process.
        in_flight_bytes: object store memory within which the encoders run ahead.

    Raises:
        ValueError: a number is out of range.
    """
    batch_size = len(rows)
    if not 0 <= rows.start < rows.stop <= slot_size or rows.step != 1:
        raise ValueError(f"rows must lie within 0 … {slot_size} and be at least one, not {rows}")
    if not 0 <= first <= stop:
        raise ValueError(f"need 0 <= first <= stop, not {first} and {stop}")
    if first == stop:
        return
    stored = ray.put(prompts), ray.put(reals) if reals else None
    reader = _Reader(*stored, seed, slot_size, rows=rows, fake=fake)
    encoder = {
        "folders": {role: str(folder) for role, folder in folders.items()},
        "dtype": dtype,
        "device": "cuda" if gpus_per_encoder else "cpu",
        "chunk": chunk,
        "threads": threads,
        "reward": reward,
    }
    share = {"num_cpus": cpus_per_encoder, "num_gpus": gpus_per_encoder, "label_selector": node_labels or None}
    conditioned = (
        _slots(_read_in_order(first, stop, reals), in_flight_bytes)
        .map_batches(reader.read, batch_size=None, batch_format="numpy", **share)  # fused into the encoders
        .map_batches(
            PromptEncoder,
            fn_constructor_kwargs=encoder,
            batch_size=batch_size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=encoders, max_tasks_in_flight_per_actor=2),
            **share,
        )
    )
    # the largest pieces of which batches of both sizes are made
    size = batch_size if fake is None else math.gcd(batch_size, len(fake.rows))
    pieces = iter(conditioned.iter_batches(batch_size=size, prefetch_batches=prefetch, batch_format="numpy"))
    try:
        if fake is None:
            yield from pieces
        else:
            for item in _read_in_order(first, stop, reals):
                count = len(_read_rows(item["slot"], item[REAL], rows, fake)) // size
                own = list(itertools.islice(pieces, count))
                yield {name: np.concatenate([piece[name] for piece in own]) for name in own[0]} if count > 1 else own[0]
    finally:
        pieces.close()


class Early(Iterator[Batch]):
    """The batches of a generator, whose first is fetched from now on, in a thread, while the caller does other things."""

    def __init__(self, batches: Generator[Batch]) -> None:
        self._batches = batches
        self._first: Future[Batch | None] | None = in_background(lambda: next(batches, None))  # until it was asked for

    def __next__(self) -> Batch:
        """Raises StopIteration after the last one."""
        if self._first is None:
            return next(self._batches)
        first, self._first = self._first.result(), None
        if first is None:
            raise StopIteration
        return first

    def close(self) -> None:
        """End the generator; one whose first batch is still under way ends with the process, as nothing can stop it."""
        if self._first is None or self._first.done():
            self._batches.close()


def _read_rows(slot: int, real: bool, rows: range, fake: FakeRows | None) -> Sequence[int]:
    """Rows that a worker reads of a slot: of its teacher samples, of the fake score's prompts, or of the student's."""
    return rows if fake is None or not (real or slot % (1 + fake.updates)) else fake.rows


def _read_in_order(first: int, stop: int, reals: RealCaptions | None) -> Iterator[dict[str, Any]]:
    """Slots of prompts, and behind each of the fake score's the slot of its teacher samples."""
    for slot in range(first, stop):
        yield {"slot": slot, REAL: False}
        of_fake = None if reals is None else reals.order.slot(slot)
        if of_fake is not None:
            yield {"slot": of_fake, REAL: True}


def _slots(slots: Iterator[dict[str, Any]], in_flight_bytes: int) -> ray.data.Dataset:
    slots = dataset_of(list(slots), in_order=True)
    options = slots.context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=in_flight_bytes)
    slots.context.custom_execution_callback_classes = [Unhurried]
    return slots


class Unhurried(ExecutionCallback):
    """Slows the executor's loop down while nobody waits for it.

    Ray Data's executor runs in a thread of the process that consumes, and its loop spins without a pause while the
    encoders are held back by a full buffer: it would take half of the trainer's time from under the interpreter's lock.
    """

    def on_execution_step(self, executor: Any) -> None:
        _, output = executor._output_node
        if len(output.output_queue) > 0:
            time.sleep(IDLE_S)
