"""A set of pairs whose length is unknown until its pictures are read: rows come in order and are counted as they come.

Each parquet shard says in its metadata which row of the pictures comes after it. So the next job goes on behind the last
complete shard, and makes the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from raydistill.data.bits import to_torch
from raydistill.data.pairs import about_shard, covered_rows, existing_shards, write_pairs
from raydistill.data.shards import Batch, Failure, begin_set, too_many_failures, write_failures
from raydistill.errors import InputError, StageFailed
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place

FEW = 1000  # failures that are listed anew with each shard; more are listed at the end, and each shard has its own
COLUMNS = ("z_T", "z_S", "preview", "name", "caption", "failure", "row", "shard", "next")


def caption_id(caption: str, key: int) -> int:
    """The id of a caption: equal ones have equal ids. A picture without one has an id of its own."""
    text = caption or f"\0{key}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def fewer_than_asked(folder: str | Place, limit: int | None) -> str | None:
    """How a whole set falls short of the pictures that were asked for; None: it does not. Raises InputError."""
    shards, rows = existing_shards(folder), covered_rows(folder)
    if limit is None or rows >= limit or not shards:
        return None
    left_out = about_shard(folder, shards[-1]).get("left_out", 0)
    return (
        f"there are {rows:,} pictures, and synthesis.image_count asks for {limit:,}; {left_out:,} were left out (held-out "
        "captions, synthesis.min_pixels)"
    )


class OrderedWriter:
    """Completes the set in a folder, as `PairWriter` does for sets of a known length.

    Args:
        folder: of the set.
        limit: rows in all, failed ones among them; None: as many as there are.
        shard_size: rows per file.
        seed, teacher, max_failed_rows, settings, vaes, notes: as of `PairWriter`.
        shards: of the pictures.

    Attributes:
        done: rows that are here, failed ones among them.
        cursor: (shard in the order of the pictures, row in it) that comes next.
        left_out: pictures that filters passed over.

    Raises:
        InputError: the folder's set was made with other settings, or a shard cannot be read.
    """

    def __init__(
        self,
        folder: str | Place,
        *,
        limit: int | None,
        shard_size: int,
        shards: int,
        seed: int,
        teacher: tuple[str, str],
        max_failed_rows: int,
        settings: Mapping[str, Any],
        notes: Mapping[str, Any],
        vaes: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.limit, self.shard_size, self.shards = to_place(str(folder)), limit, shard_size, shards
        self.seed, self.teacher, self.max_failed_rows, self.vaes = seed, teacher, max_failed_rows, vaes
        begin_set(self.folder, settings, notes)
        self.failures: list[Failure] = []
        self.done, self.cursor, self.left_out, self._next_shard, self._ended = 0, (0, 0), 0, 0, False
        present = set(existing_shards(self.folder))
        while self._next_shard in present and self._take(about_shard(self.folder, self._next_shard)):
            self._next_shard += 1
        self._open: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        write_failures(self.folder, self.failures)

    def _take(self, about: dict[str, Any]) -> bool:
        """Count a shard that is there, unless it was left short by a smaller limit."""
        if "next" not in about:
            raise InputError(f"{self.folder}: holds shards of another kind of source; use another folder")
        enough = self.limit is not None and self.done + about["rows"] >= self.limit
        if self.complete or not (about["rows"] == self.shard_size or about["end"] or enough):
            return False
        self.done += about["rows"]
        self.cursor, self.left_out, self._ended = tuple(about["next"]), about["left_out"], about["end"]
        self.failures += [Failure(**entry) for entry in about["failed"]]
        return True

    @property
    def complete(self) -> bool:
        return self._ended or (self.limit is not None and self.done >= self.limit)

    @property
    def count(self) -> int:
        """Rows in all, as far as it can be told: the limit, or what the shards that were read lead to expect."""
        expected = int(self.done * self.shards / max(1.0, self.cursor[0] + 0.5))
        return self.done if self.complete else max(self.done + 1, min(self.limit or expected, expected))

    def add(self, batch: Batch) -> list[Place]:
        """Take encoded rows, which follow the last ones; the shards that they complete are written and returned.

        Columns besides those of `shards`: row (`PictureRow.key`), name, caption, shard and next (the cursor behind the row), and
        left_out, how many were passed over before it. A row without a picture that only tells these has shard -1.

        Raises:
            StageFailed: more than `max_failed_rows` rows failed.
        """
        written = []
        for i in range(len(batch["row"])):
            if self.complete:
                break
            self.left_out += int(batch["left_out"][i])
            if batch["shard"][i] < 0:
                continue
            for name in COLUMNS:
                self._open[name].append(np.array(batch[name][i]) if name in ("z_T", "z_S") else batch[name][i])
            self.done += 1
            self.cursor = (int(batch["shard"][i]), int(batch["next"][i]))
            self._note_failure()
            if len(self._open["row"]) == self.shard_size or self.complete:
                written.append(self._write(end=False))
        return written

    def finish(self) -> list[Place]:
        """The pictures have ended, or the limit is reached: what is left is written and returned.

        Raises:
            StageFailed: not one picture could be used.
        """
        if self.done == len(self.failures):
            write_failures(self.folder, self.failures)
            why = f"{len(self.failures)} rows failed, {self.left_out} were left out (held-out captions, synthesis.min_pixels)"
            raise StageFailed(f"{self.folder}: no picture could be used: {why}")
        rest = bool(self._open["row"])
        written = [self._write(end=not self.complete)] if rest else []
        self._ended = True
        write_failures(self.folder, self.failures)
        return written

    def _note_failure(self) -> None:
        reason = str(self._open["failure"][-1])
        if not reason:
            return
        caption, key = str(self._open["caption"][-1]), int(self._open["row"][-1])
        self.failures.append(Failure(self.done - 1, caption_id(caption, key), caption, reason))
        if len(self.failures) > self.max_failed_rows:
            write_failures(self.folder, self.failures)
            raise too_many_failures(self.folder, self.failures, self.max_failed_rows)

    def _write(self, end: bool) -> Place:
        rows = len(self._open["row"])
        first = self.done - rows
        good = [i for i in range(rows) if not self._open["failure"][i]]
        captions = [str(self._open["caption"][i]) for i in good]
        keys = [int(self._open["row"][i]) for i in good]
        failed = [failure for failure in self.failures if failure.row >= first]

        def latents(name: str) -> torch.Tensor:
            values = np.stack(self._open[name])
            return to_torch(values[good])

        file = write_pairs(
            self.folder,
            self._next_shard,
            prompts=captions,
            prompt_ids=[caption_id(caption, key) for caption, key in zip(captions, keys, strict=True)],
            seeds=[self.seed] * len(good),
            z_teacher=latents("z_T"),
            z_student=latents("z_S"),
            previews=[self._open["preview"][i] for i in good],
            rows=[first + i for i in good],
            teacher=self.teacher,
            about={
                "rows": rows,
                "failed": [asdict(failure) for failure in failed],
                "next": list(self.cursor),
                "left_out": self.left_out,
                "end": end,
            },
            vaes=self.vaes,
        )
        self._next_shard += 1
        self._open = {name: [] for name in COLUMNS}
        if failed and len(self.failures) <= FEW:
            write_failures(self.folder, self.failures)
        return file
