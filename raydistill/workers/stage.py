"""One distillation, as the driver hands it to its workers."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

from raydistill.storage.atomic import read_json
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place


@dataclass(frozen=True)
class Stage:
    """One distillation, as shipped to its workers."""

    name: str
    config: dict[str, Any]
    folder: str  # of this stage, on storage that every node sees
    bridge: str | None  # trained Bridge; None for the identity
    real: str | None  # parquet of teacher samples
    pairs: str | None  # parquet of pairs that anchor a Bridge trained along
    service: str | None  # name of the teacher service; None when VSD is off
    mlflow_uri: str
    mlflow_run: str

    def path(self, *parts: str) -> Place:
        return functools.reduce(operator.truediv, parts, to_place(self.folder))

    def result(self) -> dict[str, Any]:
        return read_json(self.path("result.json"), "remove it, and the stage ends again from its last checkpoint")
