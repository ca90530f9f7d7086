"""A set of pairs in the making: what it is made with, which rows are missing, and the writer that completes shards.

Rows come in any order; a shard is written in one move once its last row is here. A row that failed is recorded in its
shard, so the two can never disagree, and in failures.jsonl, which is written anew from the shards.

Shapes: B rows, C×H×W normalised latents, float16, or bfloat16 as uint16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raydistill.data.bits import to_torch
from raydistill.data.pairs import about_shard, existing_shards, write_pairs
from raydistill.errors import InputError, StageFailed
from raydistill.storage.atomic import remove_abandoned, replace_text
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place

SETTINGS_FILE, FAILURES_FILE = "synthesis.json", "failures.jsonl"

# Settings that sets begun by earlier versions do not name, and what those had; None: nobody knows, whatever it is now.
SINCE = {"text_dtype": "float32", "dtype": "float16", "augment_share": 0.0, "teacher_vae": None, "student_vae": None}
LONGEST = 60  # characters of a setting in a message

Batch = dict[str, np.ndarray]
# Columns of encoded rows: row int64 [B]; z_T, z_S [B, C, H, W] float16, or bfloat16 as uint16; preview (PNG bytes) and failure (why
# there is no such row, or "") as objects [B].


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
        rows = batch["row"][pick] - self.start
        for name in ("z_T", "z_S", "preview"):
            values = batch[name]
            if name not in self.columns:
                self.columns[name] = np.zeros((len(self.here), *values.shape[1:]), values.dtype)
            self.columns[name][rows] = values[pick]
        self.here[rows] = True


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
        vaes: sha256 of the VAEs that encode, by role, which every shard then names.
        notes: what is known besides, as of whose pictures they are.

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
        vaes: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.count, self.shard_size = to_place(str(folder)), count, shard_size
        self.at, self.seed, self.teacher, self.max_failed_rows = at, seed, teacher, max_failed_rows
        self.vaes = vaes
        begin_set(self.folder, settings, notes or {})
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
        write_failures(self.folder, self.failures)

    @property
    def done(self) -> int:
        """Rows that are here, failed ones among them."""
        return self.count - self.missing

    left_out = 0  # rows that a filter passed over: here there are none

    @property
    def complete(self) -> bool:
        return not self.missing

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

    def finish(self) -> list[Place]:
        """Nothing is left to be written. Raises StageFailed if rows are missing."""
        if self.missing:
            first = next(iter(self._open.values()))
            row = first.start + int(np.argmin(first.here))
            raise StageFailed(f"{self.folder}: {self.missing} rows were not made, the first of them row {row}")
        return []

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
            write_failures(self.folder, self.failures)
            raise too_many_failures(self.folder, self.failures, self.max_failed_rows)

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
            z_teacher=to_torch(kept["z_T"]),
            z_student=to_torch(kept["z_S"]),
            previews=kept["preview"].tolist(),
            rows=good,
            teacher=self.teacher,
            about={
                "rows": shard.stop - shard.start,
                "failed": [asdict(failure) for failure in sorted(shard.failures)],
            },
            vaes=self.vaes,
        )
        del self._open[index]
        if failed:
            write_failures(self.folder, self.failures)
        return file


def begin_set(folder: Place, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Make the folder, and say in it what the set is made with. Raises as `check_settings`."""
    check_settings(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / SETTINGS_FILE, json.dumps({**settings, **notes}, indent=1) + "\n")
    remove_abandoned(folder, "pairs-*.parquet")


def notes_of(folder: str | Place) -> dict[str, Any]:
    """What a set says of how it was made; {}: nothing."""
    try:
        return dict(json.loads((to_place(str(folder)) / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # of another writer
        return {}


def write_failures(folder: Place, failures: Sequence[Failure]) -> None:
    """failures.jsonl: one object a line, by row; no failures, no file."""
    lines = [json.dumps(asdict(failure), ensure_ascii=False) for failure in sorted(failures)]
    if lines:
        replace_text(folder / FAILURES_FILE, "\n".join(lines) + "\n")
    else:
        (folder / FAILURES_FILE).unlink(missing_ok=True)


def too_many_failures(folder: Place, failures: Sequence[Failure], most: int) -> StageFailed:
    """The error where more rows failed than may; the last of `failures` is the newest."""
    last = failures[-1]
    return StageFailed(
        f"{len(failures)} rows failed, more than synthesis.max_failed_rows={most}; the last one: row {last.row}: "
        f"{last.reason}. All of them: {folder / FAILURES_FILE}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


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
    for key, value in SINCE.items():
        if key in settings:
            found.setdefault(key, settings[key] if value is None else value)
    changed = [
        f"{key} was {_short(found.get(key))}, now {_short(settings[key])}"
        for key in settings
        if found.get(key) != settings[key]
    ]
    if changed:
        raise InputError(f"{folder}: holds rows of other settings ({'; '.join(changed)}); use another folder")
