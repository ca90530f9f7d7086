"""The end of a run in numbers: a table for people, a JSON file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place

WIDTH = 80  # characters of a table


def table(rows: Mapping[str, Mapping[str, float]], title: str | None = None, first: str = "mean") -> Table:
    """Who (student before, student after, teacher, controls) × metric; `first` leads, then order of appearance.

    A value that a row lacks shows as –. Where the metrics are too many for `WIDTH`, they are the rows.
    """
    columns = _columns(rows, first)
    result = Table(title=title, box=None, title_justify="left", padding=(0, 2, 0, 0), pad_edge=False)
    cells = {name: [_cells(means, [name])[0] for means in rows.values()] for name in columns}
    if max(map(len, rows), default=0) + sum(2 + max(map(len, [name, *cells[name]])) for name in columns) > WIDTH:
        for name in ("", *rows):
            result.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for name in columns:
            result.add_row(name, *cells[name], style="bold" if name == first else None)
        return result
    result.add_column("", no_wrap=True)
    for name in columns:
        result.add_column(name, justify="right", style="bold" if name == first else None)
    for who, means in rows.items():
        result.add_row(who, *_cells(means, columns))
    return result


def markdown(rows: Mapping[str, Mapping[str, float]], first: str = "mean") -> str:
    """The same table in Markdown, for a run's description."""
    columns = _columns(rows, first)
    body = [[who, *_cells(means, columns)] for who, means in rows.items()]
    lines = [" | ".join(["", *cells]) + " |" for cells in (["", *columns], *body)]
    lines.insert(1, "|---" * (len(columns) + 1) + "|")
    return "\n".join(line.strip() for line in lines)


def _cells(means: Mapping[str, float], columns: list[str]) -> list[str]:
    return [f"{means[name]:.3f}" if name in means else "–" for name in columns]


def _columns(rows: Mapping[str, Mapping[str, float]], first: str) -> list[str]:
    columns = dict.fromkeys(name for means in rows.values() for name in means)
    return sorted(columns, key=lambda name: name != first)


def write_summary(path: str | Place, summary: Mapping[str, Any]) -> Place:
    """Write JSON in one move: a reader sees the old file or the new one, whole.

    Numbers of torch and NumPy become plain ones, paths become text; NaN and infinities become null, which JSON lacks.
    """
    path = to_place(str(path))
    replace_text(path, json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # tensors and arrays of any size
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
