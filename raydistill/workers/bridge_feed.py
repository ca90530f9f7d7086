"""Where a worker's pairs come from while it trains a Bridge: a stored set, or a stream of pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from raydistill.bridge.objective import Objective, StreamedObjective
from raydistill.bridge.trainer import VALIDATION_PAIRS
from raydistill.config.schema import Config
from raydistill.data.pair_stream import Encoding, StreamedPairs, encoded_chunks, position_of
from raydistill.data.pairs import Pairs
from raydistill.data.picture_order import PictureOrder
from raydistill.data.pictures import Filters, Pictures
from raydistill.workers.ray_train import Worker


class Feed(Protocol):
    """Gives a worker its batches."""

    def batches(self, first: int, stop: int) -> Iterator[Pairs]:
        """Those of steps first … stop - 1."""

    def cursors(self, worker: Worker) -> list[dict[str, int]] | None:
        """Where every worker goes on behind its last batch, for a checkpoint; None: that follows from the step."""

    def metrics(self, worker: Worker) -> dict[str, float]:
        """What is logged of it. All workers call this at the same step."""

    def close(self) -> None:
        """End what runs beside the worker."""


class Stored:
    """Batches of a stored set; the next one is read while the last one is trained on."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def batches(self, first: int, stop: int) -> Iterator[Pairs]:
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._objective.batch, first) if first < stop else None
            for step in range(first, stop):
                batch = ahead.result()
                ahead = reader.submit(self._objective.batch, step + 1) if step + 1 < stop else None
                yield batch

    def cursors(self, worker: Worker) -> None:
        return None

    def metrics(self, worker: Worker) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Streamed:
    """Batches of pictures that are encoded in actors beside this worker.

    Args:
        objective: which gets the held-out pairs, on rank 0.
        held_out: prompts whose pictures are left out.
        cursors: of a checkpoint, by rank; None: at the beginning.
    """

    def __init__(
        self,
        config: Config,
        objective: StreamedObjective,
        pictures: Pictures,
        held_out: Collection[str],
        cursors: list[dict[str, int]] | None,
    ) -> None:
        bridge, synthesis, seed = config.bridge, config.synthesis, config.run.seed
        order = PictureOrder(
            pictures=pictures,
            seed=seed,
            share=(objective.rank, objective.world_size),
            held_out=bridge.validation_share,
            window=bridge.shuffle,
            filters=Filters(min_pixels=synthesis.min_pixels, captions=held_out),
        )
        state = cursors[objective.rank] if cursors else None
        validation = VALIDATION_PAIRS if objective.rank == 0 else 0
        self._chunks = encoded_chunks(order, Encoding.of(config), synthesis, position_of(state), validation)
        self._pairs = StreamedPairs(self._chunks, seed=seed, max_failed_rows=synthesis.max_failed_rows, state=state)
        self._objective, self._validates = objective, bool(validation)

    def batches(self, first: int, stop: int) -> Iterator[Pairs]:
        if self._validates:
            self._objective.kept = self._pairs.held_out()
        share, batch = self._objective.share, self._objective.settings.batch_size
        for step in range(first, stop):
            number = step * batch + self._objective.rank * share
            yield self._pairs.next(np.arange(number, number + share))

    def cursors(self, worker: Worker) -> list[dict[str, int]]:
        return worker.from_all(self._pairs.state())

    def metrics(self, worker: Worker) -> dict[str, float]:
        failed = torch.tensor([float(self._pairs.failed)], device=worker.device)
        if worker.world > 1:
            torch.distributed.all_reduce(failed)
        return {"data/failed_pictures": failed.item()}

    def close(self) -> None:
        self._chunks.close()
