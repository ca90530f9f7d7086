"""What a job shows of itself: numbered stages, bars on a terminal, lines that carry the time in a log.

A process has one screen, `screen`. On a terminal its bars stay below whatever is printed.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table

WINDOW, WINDOW_S = 30, 60.0  # sightings, and seconds, over which a rate is measured: the longer of both
LOG_EVERY_S = 15.0  # between two lines of a stage in a log


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _writable(text: str) -> str:
    """What the output can hold of a text; the rest becomes `?`."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _write(text: str) -> None:
    """In one piece, for lines of other threads come in between: `print` writes the end of a line apart."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Pace:
    """Seconds that a step takes, over the last sightings; work that goes back to a checkpoint starts anew.

    A sighting may be many steps after the one before: rows of pairs come by the batch.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque()

    def see(self, step: int, now: float) -> None:
        """`now`: seconds of a clock that never goes back."""
        if self._seen and step < self._seen[-1][0]:
            self._seen.clear()
        if not self._seen or step > self._seen[-1][0]:
            self._seen.append((step, now))
        while len(self._seen) > WINDOW + 1 and self._seen[1][1] <= now - WINDOW_S:
            self._seen.popleft()

    def takes(self, steps: int) -> float | None:
        """Seconds that so many steps take; None before two sightings."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, now) = self._seen[0], self._seen[-1]
        return (now - before) / (last - first) * steps

    def left(self, total: int) -> float | None:
        """Seconds until step `total`; None before two sightings."""
        return self.takes(total - self._seen[-1][0]) if self._seen else None


class Screen:
    """Stages of a job with their numbers and times, and the bars of what is under way."""

    def __init__(self) -> None:
        self.stages: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._live: Progress | None = None

    # -- lines ---------------------------------------------------------------------------------------
    def plan(self, stages: Sequence[str]) -> None:
        """Number these stages. Those that `alike` names later take as long as the first of them."""
        self.stages = tuple(stages)

    def say(self, text: str) -> None:
        """A line, above the bars; in a log it carries the time. A character that the output cannot hold becomes `?`."""
        for line in _writable(str(text)).splitlines() or [""]:
            _write(line if self.terminal else f"{time.strftime('%H:%M:%S')} {line}")

    def show(self, table: Table, width: int) -> None:
        """A table; `width` is that of a log, where no terminal says it."""
        console = Console(width=None if self.terminal else width)
        with console.capture() as drawn:
            console.print(table)
        _write(_writable(drawn.get()).rstrip("\n"))

    def numbered(self, stage: str) -> str:
        """`3/5 distill`, or the stage alone where it was not planned."""
        return f"{self.stages.index(stage) + 1}/{len(self.stages)} {stage}" if stage in self.stages else stage

    @contextmanager
    def stage(self, name: str, words: Callable[[BaseException], str] = lambda _: "failed after") -> Iterator[None]:
        """Say when a stage begins, and when it ends how long it took.

        Args:
            words: what the screen says of a stage that ends with this, before the time.
        """
        self.say(self.numbered(name))
        started, ended = time.monotonic(), "done in"
        try:
            yield
        except BaseException as error:
            ended = words(error)
            raise
        finally:
            self.say(f"{self.numbered(name)}: {ended} {duration(time.monotonic() - started)}")

    def time_left(self, stage: str, left: float | None, whole: float = 0.0, alike: Sequence[str] = ()) -> str:
        """`5 min 10 s left`, of the whole job where it is known, else `… left of this stage`; empty where nothing is.

        Args:
            left: seconds until the stage ends.
            whole: seconds that all of the stage takes, also where an earlier attempt has done a part.
            alike: stages that take as long as this one; those planned after it are counted.
        """
        if left is None:
            return ""
        if stage in self.stages:
            later = self.stages[self.stages.index(stage) + 1 :]
            if all(name in alike for name in later):
                return f"{duration(left + whole * len(later))} left"
        return f"{duration(left)} left of this stage"

    # -- bars ----------------------------------------------------------------------------------------
    @property
    def terminal(self) -> bool:
        return sys.stdout.isatty() if self._live is None else True

    @contextmanager
    def bar(self, name: str, unit: str = "step") -> Iterator[Bar]:
        """A bar for the length of the block; in a log a line now and then."""
        bar = Bar(self, name, unit)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def count(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar of work that is not a stage; what is yielded is called with how much more is done."""
        pace, done = Pace(), 0

        def more(amount: int) -> None:
            nonlocal done
            done += amount
            pace.see(done, time.monotonic())
            left = pace.left(total)
            bar.update(done, total, left="" if left is None else f"{duration(left)} left")

        with self.bar(name, unit) as bar:
            yield more

    def _add(self, name: str, total: int) -> TaskID:
        with self._lock:
            if self._live is None:
                self._live = Progress(
                    TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                    BarColumn(bar_width=12),
                    TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
                    TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                    TextColumn(
                        "{task.fields[details]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
                    ),
                    console=Console(),
                    transient=True,
                    expand=True,
                    refresh_per_second=4,
                )
                self._live.start()
            return self._live.add_task(escape(name), total=total, details="", left="")

    def _remove(self, task: TaskID) -> None:
        with self._lock:
            if self._live is None:
                return
            self._live.remove_task(task)
            if not self._live.tasks:
                live, self._live = self._live, None
                live.stop()

    def _update(self, task: TaskID, step: int, total: int, details: str, left: str) -> None:
        with self._lock:
            if self._live is not None:
                self._live.update(task, completed=step, total=total, details=escape(details), left=left, refresh=True)


class Bar:
    """Progress of one piece of work. It appears with its first step."""

    def __init__(self, screen: Screen, name: str, unit: str) -> None:
        self._screen, self._name, self._unit = screen, name, unit
        self._task: TaskID | None = None
        self._line, self._step = float("-inf"), -1  # when the last line was written, and the step of the last update

    def update(self, step: int, total: int, details: str = "", left: str = "") -> None:
        """Show that `step` of `total` is done; the same step again changes nothing."""
        if step == self._step:
            return
        self._step = step
        if self._screen.terminal:
            if self._task is None:
                self._task = self._screen._add(self._name, total)
            self._screen._update(self._task, step, total, details, left)
        elif step == total or time.monotonic() - self._line >= LOG_EVERY_S:
            self._line = time.monotonic()
            self._screen.say(", ".join(filter(None, (f"{self._name}: {self._unit} {step}/{total}", left, details))))

    def close(self) -> None:
        if self._task is not None:
            self._screen._remove(self._task)
            self._task = None


screen = Screen()
