"""Results of an evaluation: parquet of scores, means in all and by category, a grid, and what MLflow gets of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn.functional import interpolate

from raydistill.evaluation.evaluation import Evaluation
from raydistill.evaluation.folder import PICTURES, EvaluationFolder
from raydistill.evaluation.metrics import SET_METRICS
from raydistill.evaluation.summary import write_summary
from raydistill.pictures.files import load_image
from raydistill.pictures.grids import grid
from raydistill.pictures.picture import Picture
from raydistill.storage.atomic import replacing

SCORES_FILE, RESULTS_FILE, GRID_FILE = "scores.parquet", "results.json", "grid.png"
ALL = "all prompts"
_NOT_IN_A_NAME = re.compile(r"[^\w\-. ]")

Columns = Mapping[str, Sequence[float | None]]


def write_columns(file: Path, pictures: Sequence[Picture], columns: Columns) -> None:
    """Parquet, one row a picture: index, prompt_id, prompt, seed, category, file, then the scores as float64."""
    table = {
        "index": pa.array([p.index for p in pictures], pa.int64()),
        "prompt_id": pa.array([p.prompt_id for p in pictures], pa.int64()),
        "prompt": pa.array([p.prompt for p in pictures], pa.string()),
        "seed": pa.array([p.seed for p in pictures], pa.int64()),
        "category": pa.array([p.category or None for p in pictures], pa.string()),
        "file": pa.array([f"{PICTURES}/{p.file_name}" for p in pictures], pa.string()),
    }
    table |= {name: pa.array(values, pa.float64()) for name, values in columns.items()}
    with replacing(file) as fresh:
        pq.write_table(pa.table(table), fresh)


def mean_table(pictures: Sequence[Picture], columns: Columns) -> dict[str, dict[str, float]]:
    """« all prompts » and every category in order of appearance -> column -> mean of the pictures that have a number.

    A row lacks a column in which none of its pictures has one.
    """
    rows = {ALL: list(range(len(pictures)))}
    for index, picture in enumerate(pictures):
        if picture.category:
            rows.setdefault(picture.category, []).append(index)
    table: dict[str, dict[str, float]] = {}
    for who, indices in rows.items():
        table[who] = {}
        for name, values in columns.items():
            numbers = [values[index] for index in indices if values[index] is not None]
            if numbers:
                table[who][name] = sum(numbers) / len(numbers)
    return table


def mlflow_names(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """eval/<column> as in training, and eval/<category>/<column>; what MLflow takes in no name becomes _."""
    return {
        f"eval/{column}" if who == ALL else f"eval/{_NOT_IN_A_NAME.sub('_', who)}/{column}": value
        for who, means in table.items()
        for column, value in means.items()
    }


def collect(
    evaluation: Evaluation, folder: EvaluationFolder
) -> tuple[dict[str, dict[str, float]], dict[str, list[float | None]]]:
    """(table, columns of picture metrics) of all that is complete in the folder, this call's metrics and earlier ones."""
    columns: dict[str, list[float | None]] = {}
    for name in evaluation.settings["metrics"]:
        if name not in SET_METRICS and not folder.missing(name):
            columns |= folder.read(name)
    table = mean_table(evaluation.pictures, columns)
    for name in evaluation.settings["metrics"]:
        if name in SET_METRICS and (value := folder.read_set(name)) is not None:
            table[ALL][name] = value
    return table, columns


def finish(evaluation: Evaluation, table: dict[str, dict[str, float]], columns: dict[str, list[float | None]]) -> None:
    """scores.parquet, results.json and grid.png."""
    write_columns(evaluation.folder / SCORES_FILE, evaluation.pictures, columns)
    about = {
        "model": evaluation.subject.title,
        "prompts": evaluation.prompts.name,
        "pictures": len(evaluation.pictures),
    }
    write_summary(evaluation.folder / RESULTS_FILE, about | {"settings": evaluation.settings, "results": table})
    _grid(evaluation).save(evaluation.folder / GRID_FILE)


def _grid(evaluation: Evaluation, shown: int = 32) -> Image.Image:
    pictures = evaluation.pictures[:shown]
    images = torch.stack([load_image(evaluation.folder / PICTURES / picture.file_name) for picture in pictures])
    if images.shape[-1] > 256:
        images = interpolate(images, size=(256, 256), mode="area")
    return grid(
        images, [picture.prompt for picture in pictures], title=f"{evaluation.subject.title}: {evaluation.prompts.name}"
    )
