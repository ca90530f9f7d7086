"""A stream of real pictures on Ray: tasks that read shards, tasks that decode pictures, and actors that hold the VAEs.

    numbers of shards, in the epoch's order ──► readers ──► decoders ──► encoders ──► driver, in the same order

Ray Data keeps the order, whatever finishes first, and holds readers back that run ahead of the object store. So nothing is
staged, and memory does not grow with the set. Why its own readers do not serve is said in `picture_shards`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data

from raydistill.config.stages import SynthesisConfig
from raydistill.data.ray_data import dataset_of
from raydistill.data.shards import Batch
from raydistill.data.synthesis import Recipe, decode_rows, streamed_rows

AHEAD = 2  # shards that are read besides one for each encoder


@functools.lru_cache(maxsize=2)
def _fetch(recipe: ray.ObjectRef) -> Recipe:
    """One copy per process."""
    return ray.get(recipe)


def read_shard(places: Batch, recipe: ray.ObjectRef) -> Iterator[Batch]:
    """The rows of one shard, from row `first` on, as `streamed_rows`. `places`: one row (shard, first)."""
    told, place, first = _fetch(recipe), int(places["shard"][0]), int(places["first"][0])
    rows = told.source.rows(told.seed, start=(place, first), filters=told.filters, stop=place + 1)
    yield from streamed_rows(rows)


def _decode(batch: Batch, recipe: ray.ObjectRef) -> Batch:
    return decode_rows(batch, _fetch(recipe).teacher.resolution)


def decoded_stream(
    told: ray.ObjectRef,
    recipe: Recipe,
    cursor: tuple[int, int],
    settings: SynthesisConfig,
    telling: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> ray.data.Dataset:
    """Batches of decoded pictures from a cursor on, in order.

    Args:
        told: the recipe in the object store.
        telling: wraps what tasks call, so that the driver learns why one failed.
    """
    places = range(cursor[0], len(recipe.source.shards))
    rows = [{"shard": place, "first": cursor[1] if place == cursor[0] else 0} for place in places]
    data = dataset_of(rows, in_order=True)
    data.context.raise_original_map_exception = True  # a StageError
    task = {"fn_kwargs": {"recipe": told}, "num_cpus": settings.cpus_per_encoder, "batch_format": "numpy"}
    task |= {"label_selector": settings.node_labels or None}
    read = data.map_batches(telling(read_shard), batch_size=1, concurrency=settings.encoders + AHEAD, **task)
    return read.map_batches(telling(_decode), batch_size=None, **task)
