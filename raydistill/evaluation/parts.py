"""The unit of an evaluation's work: one batch of pictures, scored by one metric, kept in one small file.

Imports nothing beyond the standard library and Ray's exceptions: it is also read inside the environments of the
reward packages, whose versions of everything else clash with this project's.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydistill.data.stage_error import StageError
from raydistill.storage.atomic import replace_text

SETTINGS_FILE, ITEMS_FILE, PICTURES, PARTS = "evaluation.json", "items.jsonl", "pictures", "parts"
DRAW = "draw"  # the stage before all metrics

Scores = Mapping[str, Sequence[float | None]]  # column -> a number for each picture; None where it has none


class Parts:
    """Files of an evaluation's folder: items.jsonl, pictures/ and parts/<metric>/<batch>.json."""

    def __init__(self, folder: str | Path, batch_size: int) -> None:
        self.folder, self.batch_size = Path(folder), batch_size
        lines = (self.folder / ITEMS_FILE).read_text(encoding="utf-8").splitlines()
        self.items: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def batches(self) -> range:
        return range(-(-len(self.items) // self.batch_size))

    def rows(self, batch: int) -> list[dict[str, Any]]:
        """Items of a batch."""
        return self.items[batch * self.batch_size : (batch + 1) * self.batch_size]

    def picture(self, item: Mapping[str, Any]) -> Path:
        return self.folder / PICTURES / f"{item['prompt_id']:05d}-seed{item['seed']}.png"

    def file(self, metric: str, batch: int) -> Path:
        return self.folder / PARTS / metric / f"{batch:05d}.json"

    def has(self, metric: str, batch: int) -> bool:
        if metric == DRAW:
            return all(self.picture(item).is_file() for item in self.rows(batch))
        return self.file(metric, batch).is_file()

    def missing(self, metric: str) -> list[int]:
        return [batch for batch in self.batches if not self.has(metric, batch)]

    def write(self, metric: str, batch: int, scores: Scores) -> None:
        """Raises ValueError where a column has not one number for each picture of the batch."""
        count = len(self.rows(batch))
        columns = {name: [None if v is None or v != v else float(v) for v in values] for name, values in scores.items()}
        for name, values in columns.items():
            if len(values) != count:
                raise ValueError(f"{metric}: {len(values)} values of {name} for {count} pictures")
        replace_text(self.file(metric, batch), json.dumps(columns))

    def read(self, metric: str) -> dict[str, list[float | None]]:
        """All columns of a metric whose batches are complete, in the order of the items."""
        columns: dict[str, list[float | None]] = {}
        for batch in self.batches:
            for name, values in json.loads(self.file(metric, batch).read_text()).items():
                columns.setdefault(name, []).extend(values)
        return columns

    def write_set(self, metric: str, value: float) -> None:
        """Keep the one number that a metric has for all pictures together; an earlier one is replaced."""
        replace_text(self._set_file(metric), json.dumps(value))

    def read_set(self, metric: str) -> float | None:
        """What `write_set` kept; None where it was never computed."""
        file = self._set_file(metric)
        return json.loads(file.read_text()) if file.is_file() else None

    def _set_file(self, metric: str) -> Path:
        return self.folder / PARTS / metric / "set.json"


Scorer = Callable[[list[str], list[str]], Scores]  # picture files, prompts -> scores


class Stage:
    """One stage of the Ray Data stream: batch numbers in, the same out, files written; for an actor pool.

    What is there already is not made again, and the model is loaded at the first batch that needs it.
    """

    def __init__(self, folder: str, batch_size: int, metric: str, make: Callable[..., Any], arguments: dict) -> None:
        """`make(**arguments)` -> a Scorer; for DRAW, a callable that writes the pictures of the items given."""
        self.parts, self.metric = Parts(folder, batch_size), metric
        self._make, self._arguments, self._work = make, arguments, None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        for batch in rows["batch"].tolist():
            if not self.parts.has(self.metric, batch):
                try:
                    self._run(batch)
                except Exception as error:
                    kind = type(error).__name__
                    raise StageError(f"{self.metric}: {error}", kind, traceback.format_exc()) from error
        return rows

    def _run(self, batch: int) -> None:
        if self._work is None:
            self._work = self._make(**self._arguments)
        items = self.parts.rows(batch)
        if self.metric == DRAW:
            self._work(items, [str(self.parts.picture(item)) for item in items])
            return
        files = [str(self.parts.picture(item)) for item in items]
        self.parts.write(self.metric, batch, self._work(files, [item["prompt"] for item in items]))
