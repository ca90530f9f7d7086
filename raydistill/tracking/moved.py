"""A storage folder that was moved or copied: MLflow would go on writing artifacts to the old one.

MLflow makes every place of artifacts absolute, also a relative root, and has no command that changes one. So the places in
the database beside the artifacts are changed, in the columns of MLflow's schema that hold them.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from raydistill.storage.lease import runs_of_others

ARTIFACTS = "mlartifacts"  # folder beside the database
PLACES = (  # (table, column) of the database that name places below an experiment's
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def local(place: str | None) -> Path | None:
    """The folder that a place names; None: it is none of this machine."""
    uri = urlsplit(place or "")
    if uri.scheme == "file":
        return Path(url2pathname(uri.path))
    return Path(place) if place and place.startswith("/") else None


def follow(database: Path, new: Path) -> list[str]:
    """Make the places of a store follow its folder; returns lines for people.

    Artifacts that were not taken along are still found where they are. Nothing is changed while another job has a run in the
    folder: it may see one and the same folder under the old path.

    Args:
        database: MLflow's SQLite file; nobody else may be changing its schema.
        new: where artifacts belong, beside it.
    """
    lines = []
    with closing(sqlite3.connect(database)) as store, store:
        found = store.execute("select distinct artifact_location from experiments").fetchall()
        for (place,) in found:
            old = local(place)
            if old is None or old.name != ARTIFACTS or same(old, new):
                continue
            if others := runs_of_others(new.parent):
                lines.append(
                    f"MLflow's artifacts go to {old}, where {new.parent} was begun: they follow it once no other job has "
                    f"a run in it, as {others[0]} now"
                )
                continue
            store.execute(
                "update experiments set artifact_location = ? where artifact_location = ?", (new.as_uri(), place)
            )
            left = sum(_follow(store, *column, old, new) for column in PLACES)
            text = f"{new.parent} was moved or copied from {old.parent}: MLflow's artifacts now go to {new}"
            lines.append(f"{text}; {left} places that are in {old} alone stay there" if left else text)
    return lines


def _follow(store: sqlite3.Connection, table: str, column: str, old: Path, new: Path) -> int:
    """Change one column; the number of places that stay as they are, for their files were not taken along."""
    left = 0
    for (place,) in store.execute(f"select distinct {column} from {table}").fetchall():
        here = local(place)
        if here is None or not here.is_relative_to(old):
            continue
        there = new / here.relative_to(old)
        if here.exists() and not there.exists():
            left += 1
        else:
            store.execute(f"update {table} set {column} = ? where {column} = ?", (there.as_uri(), place))
    return left


def outside(place: str | None, experiment: str, root: Path) -> list[str]:
    """A line where an experiment keeps its artifacts elsewhere than where this run's belong."""
    folder = local(place)
    if folder is None or same(folder, root):
        return []
    return [
        f"MLflow keeps the artifacts of experiment {experiment} in {folder}, where it was begun, and not in {root}; "
        "with another tracking.experiment they go there"
    ]


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one folder, which need not exist."""
    return os.path.realpath(one) == os.path.realpath(other)
