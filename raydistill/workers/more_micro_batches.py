"""A trainer whose device is full in an update starts once more, with more micro-batches.

The update stays the same up to rounding, and one micro-batch is alive at once. All workers leave first, so their memory
is free. A file of the stage keeps the number: whoever goes on with the stage later has it too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from raydistill.config.reading import validate
from raydistill.config.schema import Config
from raydistill.distillation.schedule import UPDATE
from raydistill.errors import OutOfMemory
from raydistill.storage import lease
from raydistill.storage.atomic import read_json, replace_text
from raydistill.tracking.tracker import Tracker
from raydistill.workers.remedies import next_micro_batches
from raydistill.workers.stage import Stage

FILE = "more_parts.json"


@contextmanager
def noting_more_micro_batches(stage: Stage) -> Iterator[None]:
    """Around a worker's updates: where one finds the device full, write down how many micro-batches may do.

    In a file and in the MLflow run. Nothing is written where a batch has no more, or where there was a second try already. The
    error goes on either way.
    """
    try:
        yield
    except OutOfMemory as error:
        count = None if stage.path(FILE).is_file() else more_micro_batches(validate(stage.config))
        if error.doing in UPDATE and count is not None:
            lease.check(stage.path())
            replace_text(stage.path(FILE), json.dumps({"micro_batches": count, "why": str(error)}))
            tracker = Tracker(stage.mlflow_uri, stage.mlflow_run)
            tracker.tags({"out_of_memory": f"goes on with distill.micro_batches={count}. {error}"})
            tracker.close()
        raise


def more_micro_batches(config: Config) -> int | None:
    """The next number of micro-batches of an update that divides all that it takes; None: there is none."""
    batch, fake = config.distill.batch_size, config.fake_score.batch_size or config.distill.batch_size
    anchored = config.bridge.batch_size // config.distill.workers if config.bridge.trainable else batch
    count = next_micro_batches(batch, config.distill.micro_batches)
    while count is not None and (anchored % count or fake % (batch // count)):
        count = next_micro_batches(batch, count)
    return count


def in_more_micro_batches(stage: Stage) -> Stage:
    """The stage with the micro-batches that its file tells of; itself where there is none."""
    if not stage.path(FILE).is_file():
        return stage
    noted = read_json(stage.path(FILE), "remove it, and the stage goes on with distill.micro_batches as configured")
    distill = stage.config["distill"]
    if noted["micro_batches"] <= distill["micro_batches"]:
        return stage
    return replace(stage, config=stage.config | {"distill": distill | {"micro_batches": noted["micro_batches"]}})
