"""A stream of real pictures on Ray: tasks that read shards, tasks that decode pictures, and actors that hold the VAEs.

    numbers of shards, in the epoch's order ──► readers ──► decoders ──► encoders ──► driver, in the same order

Ray Data keeps the order, whatever finishes first, and holds readers back that run ahead of the object store. So nothing is
staged, and memory does not grow with the set. Why its own readers do not serve is said in `picture_shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data

from raydistill.config.stages import SynthesisConfig
from raydistill.data.ray_data import dataset_of, fetched
from raydistill.data.shards import Batch
from raydistill.data.synthesis import STREAMED, STREAMED_BYTES, Recipe, decode_rows, streamed_rows

AHEAD = 2  # shards that are read besides one for each encoder


def read_shard(shards: Batch, stored: ray.ObjectRef) -> Iterator[Batch]:
    """The rows of one shard, from row `first` on, as `streamed_rows`. `shards`: one row (shard, first)."""
    recipe: Recipe = fetched(stored)
    shard, first = int(shards["shard"][0]), int(shards["first"][0])
    rows = recipe.source.rows(recipe.seed, start=(shard, first), filters=recipe.filters, stop=shard + 1)
    yield from streamed_rows(rows)


def _decode(batch: Batch, stored: ray.ObjectRef) -> Batch:
    return decode_rows(batch, fetched(stored).teacher.resolution)


def decoded_stream(
    stored: ray.ObjectRef,
    recipe: Recipe,
    cursor: tuple[int, int],
    settings: SynthesisConfig,
    telling: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> ray.data.Dataset:
    """Batches of decoded pictures from a cursor on, in order.

    Args:
        stored: the recipe in the object store.
        telling: wraps what tasks call, so that the driver learns why one failed.
    """
    shards = range(cursor[0], len(recipe.source.shards))
    rows = [{"shard": shard, "first": cursor[1] if shard == cursor[0] else 0} for shard in shards]
    data = dataset_of(rows, in_order=True)
    data.context.raise_original_map_exception = True  # a StageError
    data.context.target_max_block_size = STREAMED_BYTES  # what a task gathers before others see it
    task = {"fn_kwargs": {"stored": stored}, "num_cpus": settings.cpus_per_encoder, "batch_format": "numpy"}
    task |= {"label_selector": settings.node_labels or None}
    readers = ray.data.TaskPoolStrategy(size=settings.encoders + AHEAD)
    read = data.map_batches(telling(read_shard), batch_size=1, compute=readers, **task)
    return read.map_batches(telling(_decode), batch_size=STREAMED, **task)
