"""Results of an evaluation: parquet of scores, means in all and by category, and what MLflow gets of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from raydistill.evaluation.promptsets import Item
from raydistill.storage.atomic import replacing

ALL = "all prompts"
_NOT_IN_A_NAME = re.compile(r"[^\w\-. ]")

Columns = Mapping[str, Sequence[float | None]]


def write_scores(file: Path, items: Sequence[Item], columns: Columns) -> None:
    """Parquet, one row a picture: index, prompt_id, prompt, seed, category, file, then the scores as float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {
        "index": pa.array([i.index for i in items], pa.int64()),
        "prompt_id": pa.array([i.prompt_id for i in items], pa.int64()),
        "prompt": pa.array([i.prompt for i in items], pa.string()),
        "seed": pa.array([i.seed for i in items], pa.int64()),
        "category": pa.array([i.category or None for i in items], pa.string()),
        "file": pa.array([f"pictures/{i.file_name}" for i in items], pa.string()),
    }
    table |= {name: pa.array(values, pa.float64()) for name, values in columns.items()}
    with replacing(file) as fresh:
        pq.write_table(pa.table(table), fresh)


def mean_table(items: Sequence[Item], columns: Columns) -> dict[str, dict[str, float]]:
    """« all prompts» and every category in order of appearance -> column -> mean of the pictures that have a number.

    A row lacks a column in which none of its pictures has one.
    """
    rows = {ALL: list(range(len(items)))}
    for place, item in enumerate(items):
        if item.category:
            rows.setdefault(item.category, []).append(place)
    table: dict[str, dict[str, float]] = {}
    for who, places in rows.items():
        table[who] = {}
        for name, values in columns.items():
            numbers = [values[place] for place in places if values[place] is not None]
            if numbers:
                table[who][name] = sum(numbers) / len(numbers)
    return table


def mlflow_names(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """eval/<column> as in training, and eval/<category>/<column>; what MLflow takes in no name becomes _."""
    return {
        f"eval/{column}" if who == ALL else f"eval/{_NOT_IN_A_NAME.sub('_', who)}/{column}": value
        for who, scores in table.items()
        for column, value in scores.items()
    }
