"""What every step consumed and gave: one JSON line a step, in a file for each worker, beside the checkpoints.

A bucket has no files that grow: there a worker's log is a folder of that name, one object for each checkpoint's steps.

It proves what a run that was killed and resumed has seen: a step that is done again after a restart has a line again.
That line counts, and nothing that was written before it for this step or a later one: the weights do not rest on it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.storage import lease
from raydistill.storage.place import Place, Remote

LINES_NAMED = 5  # of those that are damaged


def step_file(folder: Place, rank: int) -> Place:
    """The log of one worker of a stage."""
    return folder / f"steps-{rank}.jsonl"


def ranges(ids: Iterable[int]) -> list[list[int]]:
    """Runs of consecutive ids as [first, last], in their order: 4 5 6 9 -> [[4, 6], [9, 9]]."""
    found: list[list[int]] = []
    for value in map(int, ids):
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return found


class StepLog:
    """Appends lines; each is with the system before `add` returns, so that a SIGKILL loses none."""

    def __init__(self, file: Path) -> None:
        self._place = file
        cut = file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n")
        self._file = file.open("ab", buffering=0)  # what a full disk refused is not tried again by `close`
        if cut:  # a full disk ended an earlier line
            self._write(b"\n")

    def add(self, step: int, world: int, sample_ids: Iterable[Iterable[int]], values: Mapping[str, Any]) -> None:
        """Keep one step: its number (from 1), how many workers did it, its batches' sample ids, and its numbers."""
        line = {"step": step, "world": world, "samples": [ranges(ids) for ids in sample_ids]}
        line |= {"values": {name: float(value) for name, value in values.items()}}
        self._write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        lease.check(self._place)
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def keep(self) -> None:
        """Called before a checkpoint that counts the steps so far as done: they are written."""

    def close(self) -> None:
        self._file.close()


class BucketLog(StepLog):
    """Objects 00000.jsonl, 00001.jsonl … in the order of writing, each written whole by `keep`.

    Between two checkpoints the lines wait in memory: a SIGKILL loses those of steps that are done again anyway.
    """

    def __init__(self, folder: Remote) -> None:
        self._folder, self._lines = folder, []
        numbers = (file.name.partition(".")[0] for file in folder.iterdir())
        self._next = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1

    def _write(self, data: bytes) -> None:
        self._lines.append(data)

    def keep(self) -> None:
        if self._lines:
            (self._folder / f"{self._next:05d}.jsonl").write_bytes(b"".join(self._lines))
            self._next, self._lines = self._next + 1, []

    def close(self) -> None:
        self.keep()


def open_log(folder: Place, rank: int) -> StepLog:
    """The log of one worker of a stage, which goes on after what is there."""
    file = step_file(folder, rank)
    return BucketLog(file) if isinstance(file, Remote) else StepLog(file)


def read_lines(file: Place) -> list[dict[str, Any]]:
    """Every whole line in the order of writing. A line that was cut or damaged is left out, and named on the screen."""
    lines = []
    for one in file.iterdir() if isinstance(file, Remote) else [file] if file.is_file() else []:
        damaged = []
        for number, text in enumerate(one.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
            if (line := _line_of(text)) is not None:
                lines.append(line)
            elif text.strip():
                damaged.append(str(number))
        if damaged:
            more = ", …" if len(damaged) > LINES_NAMED else ""
            print(f"{one}: damaged lines are left out ({', '.join(damaged[:LINES_NAMED])}{more})", flush=True)
    return lines


def _line_of(text: bytes) -> dict[str, Any] | None:
    """What `StepLog.add` has written; None: it is not whole."""
    try:
        line = json.loads(text)
        whole = (
            all(type(line[key]) is int and line[key] > 0 for key in ("step", "world"))
            and all(type(value) in (int, float) for value in line["values"].values())
            and all(type(end) is int for batch in line["samples"] for first, last in batch for end in (first, last))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return line if whole else None


def steps_of(lines: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Step number -> the line that counts, in the order of steps."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        while found and next(reversed(found)) >= line["step"]:
            found.popitem()
        found[line["step"]] = line
    return found


def consumed_by_all(folder: Place) -> np.ndarray:
    """Sample ids that the final weights of a stage rest on, of all its workers and however many there were, int64."""
    whole = steps_of(read_lines(step_file(folder, 0)))
    found = []
    for rank in range(max((line["world"] for line in whole.values()), default=0)):
        own = steps_of(read_lines(step_file(folder, rank)))
        # a worker that is no longer there has lines of steps that the others did again without it
        kept = (line for step, line in own.items() if step in whole and rank < whole[step]["world"] == line["world"])
        found.append(consumed(kept))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def consumed(lines: Iterable[dict[str, Any]]) -> np.ndarray:
    """Sample ids of one worker that the final weights rest on, in the order in which they were consumed, int64."""
    ids = [
        np.arange(first, last + 1)
        for line in steps_of(lines).values()
        for batch in line["samples"]
        for first, last in batch
    ]
    return np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
