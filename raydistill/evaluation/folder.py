"""An evaluation's folder, and the actor that fills it: a batch of pictures, scored by one metric, is one small file.

Imports nothing beyond the standard library and Ray's exceptions: it is also read inside the environments of the
reward packages, whose versions of everything else clash with this project's.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raydistill.data.stage_error import StageError
from raydistill.pictures.picture import Picture
from raydistill.storage.atomic import replace_text
from raydistill.storage.json_lines import lines_of

SETTINGS_FILE, LIST_FILE, PICTURES, SCORES = "evaluation.json", "items.jsonl", "pictures", "parts"
DRAW = "draw"  # what is done before all metrics

Values = Mapping[str, Sequence[float | None]]  # column -> a number for each picture; None where it has none


class EvaluationFolder:
    """Files of an evaluation: items.jsonl, pictures/ and parts/<metric>/<batch>.json.

    Attributes:
        pictures: what is to be drawn, in order.
    """

    def __init__(self, path: str | Path, batch_size: int) -> None:
        self.path, self.batch_size = Path(path), batch_size
        lines = lines_of((self.path / LIST_FILE).read_text(encoding="utf-8"))
        self.pictures = [Picture(**json.loads(line)) for line in lines]

    @classmethod
    def create(cls, path: Path, pictures: Sequence[Picture], settings: Mapping[str, Any]) -> EvaluationFolder:
        """Write what the actors read. Settings may change between two calls, the pictures never do."""
        (path / PICTURES).mkdir(parents=True, exist_ok=True)
        if not (path / LIST_FILE).is_file():
            lines = [json.dumps(asdict(picture), ensure_ascii=False) + "\n" for picture in pictures]
            replace_text(path / LIST_FILE, "".join(lines))
        replace_text(path / SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return cls(path, settings["batch_size"])

    @property
    def batches(self) -> range:
        return range(-(-len(self.pictures) // self.batch_size))

    def batch(self, index: int) -> list[Picture]:
        return self.pictures[index * self.batch_size : (index + 1) * self.batch_size]

    def file_of(self, picture: Picture) -> Path:
        return self.path / PICTURES / picture.file_name

    def file(self, metric: str, batch: int) -> Path:
        return self.path / SCORES / metric / f"{batch:05d}.json"

    def has(self, metric: str, batch: int) -> bool:
        if metric == DRAW:
            return all(self.file_of(picture).is_file() for picture in self.batch(batch))
        return self.file(metric, batch).is_file()

    def missing(self, metric: str) -> list[int]:
        return [batch for batch in self.batches if not self.has(metric, batch)]

    def write(self, metric: str, batch: int, columns: Values) -> None:
        """Raises ValueError where a column has not one number for each picture of the batch."""
        count = len(self.batch(batch))
        columns = {
            name: [None if v is None or v != v else float(v) for v in values] for name, values in columns.items()
        }
        for name, values in columns.items():
            if len(values) != count:
                raise ValueError(f"{metric}: {len(values)} values of {name} for {count} pictures")
        replace_text(self.file(metric, batch), json.dumps(columns))

    def read(self, metric: str) -> dict[str, list[float | None]]:
        """All columns of a metric whose batches are complete, in the order of the pictures."""
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
        return self.path / SCORES / metric / "set.json"


Scorer = Callable[[list[str], list[str]], Values]  # picture files, prompts -> columns


class BatchActor:
    """One actor of the Ray Data stream: batch numbers in, the same out, files written.

    What is there already is not made again. The model is loaded at the first batch that needs it.
    """

    def __init__(self, path: str, batch_size: int, metric: str, make: Callable[..., Any], arguments: dict) -> None:
        """`make(**arguments)` -> a Scorer; for DRAW, a callable that writes the files of the pictures given."""
        self.folder, self.metric = EvaluationFolder(path, batch_size), metric
        self._make, self._arguments, self._work = make, arguments, None

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        for batch in rows["batch"].tolist():
            if not self.folder.has(self.metric, batch):
                try:
                    self._run(batch)
                except Exception as error:
                    kind = type(error).__name__
                    raise StageError(f"{self.metric}: {error}", kind, traceback.format_exc()) from error
        return rows

    def _run(self, batch: int) -> None:
        if self._work is None:
            self._work = self._make(**self._arguments)
        pictures = self.folder.batch(batch)
        files = [str(self.folder.file_of(picture)) for picture in pictures]
        if self.metric == DRAW:
            self._work(pictures, files)
        else:
            self.folder.write(self.metric, batch, self._work(files, [picture.prompt for picture in pictures]))
