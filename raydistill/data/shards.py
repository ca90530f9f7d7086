"""A set of pairs in the making: what it is made with, which rows are missing, and the writer that completes shards.

Rows come in any order; a shard is written in one move once its last row is here. A row that failed is recorded in its
shard, so the two can never disagree, and in failures.jsonl, which is written anew from the shards.

Shapes: B rows, C×H×W normalised latents, float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from raydistill.data.pairs import about_shard, existing_shards, write_pairs
from raydistill.errors import InputError, StageFailed
from raydistill.storage.atomic import remove_abandoned, replace_text
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place

SETTINGS_FILE, FAILURES_FILE = "synthesis.json", "failures.jsonl"

Batch = dict[str, np.ndarray]
# Columns of encoded rows: row int64 [B]; z_T, z_S [B, C, H, W] float16; preview (PNG bytes) and failure (why there is
# no such row, or "") as objects [B].


@dataclass(frozen=True, order=True)
class Failure:
    """A row that the set lacks; failures are ordered by row."""

    row: int
    prompt_id: int
    prompt: str
    reason: str


@dataclass(frozen=True)
class Request:
    """Rows first … first + kept - 1 of the set."""

    first: int
    kept: int

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.kept)


@dataclass
class _Shard:
    """Rows start … stop - 1, as far as they are here."""

    start: int
    stop: int
    here: np.ndarray = field(init=False)  # [stop - start] bool
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # [stop - start, …] each
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.here = np.zeros(self.stop - self.start, dtype=bool)

    def put(self, batch: Batch, pick: np.ndarray) -> None:
        """Copy: what Ray hands out lies in the object store, and would stay there for as long as it is referred to."""
        places = batch["row"][pick] - self.start
        for name in ("z_T", "z_S", "preview"):
            values = batch[name]
            if name not in self.columns:
                self.columns[name] = np.zeros((len(self.here), *values.shape[1:]), values.dtype)
            self.columns[name][places] = values[pick]
        self.here[places] = True


class PairWriter:
    """Completes the set in a folder.

    Args:
        folder: of the set.
        count, shard_size: rows in all, and per file.
        at: rows -> (prompt ids, prompts).
        seed: of the set; a column.
        teacher: (name, revision) of the model whose VAE encodes z_T; two columns.
        max_failed_rows: how many rows may fail in the whole set.
        settings: what decides the rows. Rows of other settings are never mixed into a folder.

    Raises:
        InputError: the folder's set was made with other settings, or a shard cannot be read.
    """

    def __init__(
        self,
        folder: str | Place,
        *,
        count: int,
        shard_size: int,
        at: Callable[[Sequence[int] | np.ndarray], tuple[np.ndarray, list[str]]],
        seed: int,
        teacher: tuple[str, str],
        max_failed_rows: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder, self.count, self.shard_size = to_place(str(folder)), count, shard_size
        self.at, self.seed, self.teacher, self.max_failed_rows = at, seed, teacher, max_failed_rows
        check_settings(self.folder, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        remove_abandoned(self.folder, "pairs-*.parquet")
        self.failures: list[Failure] = []
        self._open = {}  # shards that are to be made
        present = set(existing_shards(self.folder))
        for index, start in enumerate(range(0, count, shard_size)):
            stop = min(start + shard_size, count)
            about = about_shard(self.folder, index) if index in present else {"rows": 0}
            if about["rows"] >= stop - start:
                self.failures += [Failure(**entry) for entry in about["failed"]]
            else:  # not there, or left short by a smaller count
                self._open[index] = _Shard(start, stop)
        self.missing = sum(shard.stop - shard.start for shard in self._open.values())
        self._record_failures()

    @property
    def done(self) -> int:
        """Rows that are here, failed ones among them."""
        return self.count - self.missing

    def requests(self, batch_size: int) -> Iterator[Request]:
        """All missing rows, at most `batch_size` at once and never of two shards."""
        for shard in self._open.values():
            for first in range(shard.start, shard.stop, batch_size):
                yield Request(first, min(batch_size, shard.stop - first))

    def add(self, batch: Batch) -> list[Place]:
        """Take encoded rows; the shards that they complete are written and returned.

        Raises:
            StageFailed: more than `max_failed_rows` rows failed.
        """
        written = []
        owner = batch["row"] // self.shard_size
        for index in np.unique(owner).tolist():
            shard = self._open.get(index)
            if shard is None:
                continue
            pick = owner == index
            pick &= ~shard.here[np.clip(batch["row"] - shard.start, 0, len(shard.here) - 1)]
            self.missing -= int(pick.sum())
            shard.put(batch, pick)
            self._note_failures(shard, batch, pick)
            if shard.here.all():
                written.append(self._write(index, shard))
        return written

    def finish(self) -> None:
        """Raises StageFailed if rows are missing."""
        if self.missing:
            first = next(iter(self._open.values()))
            row = first.start + int(np.argmin(first.here))
            raise StageFailed(f"{self.folder}: {self.missing} rows were not made, the first of them row {row}")

    def _note_failures(self, shard: _Shard, batch: Batch, pick: np.ndarray) -> None:
        failed = np.flatnonzero(pick & (batch["failure"] != ""))
        if not len(failed):
            return
        ids, prompts = self.at(batch["row"][failed])
        reasons = batch["failure"][failed].tolist()
        new = [
            Failure(int(row), int(prompt_id), prompt, str(reason))
            for row, prompt_id, prompt, reason in zip(batch["row"][failed], ids, prompts, reasons, strict=True)
        ]
        shard.failures += new
        self.failures += new
        if len(self.failures) > self.max_failed_rows:
            self._record_failures()
            raise StageFailed(
                f"{len(self.failures)} rows failed, more than synthesis.max_failed_rows={self.max_failed_rows}; the last "
                f"one: row {new[-1].row}: {new[-1].reason}. All of them: {self.folder / FAILURES_FILE}"
            )

    def _write(self, index: int, shard: _Shard) -> Place:
        failed = {failure.row for failure in shard.failures}
        good = np.array([row for row in range(shard.start, shard.stop) if row not in failed], dtype=np.int64)
        kept = {name: values[good - shard.start] for name, values in shard.columns.items()}
        ids, prompts = self.at(good)
        file = write_pairs(
            self.folder,
            index,
            prompts=prompts,
            prompt_ids=ids,
            seeds=[self.seed] * len(good),
            z_teacher=torch.from_numpy(kept["z_T"]),
            z_student=torch.from_numpy(kept["z_S"]),
            previews=kept["preview"].tolist(),
            rows=good,
            teacher=self.teacher,
            about={
                "rows": shard.stop - shard.start,
                "failed": [asdict(failure) for failure in sorted(shard.failures)],
            },
        )
        del self._open[index]
        if failed:
            self._record_failures()
        return file

    def _record_failures(self) -> None:
        """failures.jsonl: one object a line, by row; no failures, no file."""
        lines = [json.dumps(asdict(failure), ensure_ascii=False) for failure in sorted(self.failures)]
        if lines:
            replace_text(self.folder / FAILURES_FILE, "\n".join(lines) + "\n")
        else:
            (self.folder / FAILURES_FILE).unlink(missing_ok=True)


def changed_share(folder: str | Place) -> float:
    """Share of a set's pictures that were changed before they were encoded (`synthesis.augment_share`).

    0 where nothing says so: sets of other writers have no file of settings.

    Raises:
        InputError: the file is damaged.
    """
    file = to_place(str(folder)) / SETTINGS_FILE
    if not file.is_file():
        return 0.0
    try:
        return float(dict(json.loads(file.read_text(encoding="utf-8"))).get("augment_share", 0.0))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: cannot be read, so nobody knows what its pictures are ({error})") from None


def check_settings(folder: str | Place, settings: Mapping[str, Any]) -> None:
    """Refuse to mix two kinds of rows in one folder.

    Raises:
        InputError: the folder has shards that were made with other settings, each of which is named, or with
            settings that nobody knows.
    """
    file = to_place(str(folder)) / SETTINGS_FILE
    if not existing_shards(folder):
        return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder}: holds shards, but {file.name}, which says how they were made, cannot be read ({error}); "
            "use another folder, or name this one in bridge.pairs if its pairs are complete"
        ) from None
    if "text_dtype" in settings:
        found.setdefault("text_dtype", "float32")  # of sets that were begun before it was a setting
    found.setdefault("augment_share", 0.0)  # likewise
    changed = [
        f"{key} was {found.get(key)!r}, now {settings[key]!r}" for key in settings if found.get(key) != settings[key]
    ]
    if changed:
        raise InputError(f"{folder}: holds rows of other settings ({'; '.join(changed)}); use another folder")
