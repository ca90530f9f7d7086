"""How busy teachers are: measured in each replica, sent along with its answers, gathered by the client.

A replica computes one request at a time; a request's latency is its wait for its turn and the ranks' work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

WINDOW_S = 60.0
KEPT = 256  # answers that percentiles are taken of


@dataclass(frozen=True)
class Utilisation:
    """What a replica says of itself with an answer."""

    latency_s: float  # of this request: wait for its turn, and work
    busy_fraction: float  # of the last minute, or of the replica's life so far
    queue: int  # requests that waited behind this one when it was done


class Meter:
    """A replica's view of its own work. Not thread-safe: for one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._born = clock()
        self._work: deque[tuple[float, float]] = deque()  # (start, end) of finished work, in order, not overlapping
        self._working_since: float | None = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around the ranks' work on it."""
        self._working_since = self._clock()
        try:
            yield
        finally:
            self._work.append((self._working_since, self._clock()))
            self._working_since = None

    def load(self, arrived: float, queue: int) -> Utilisation:
        """Of a request that arrived at `arrived` (this meter's clock) and is done now, with `queue` others behind it."""
        return Utilisation(self._clock() - arrived, self.busy_fraction(), queue)

    def busy_fraction(self) -> float:
        now = self._clock()
        first = max(self._born, now - WINDOW_S)
        while self._work and self._work[0][1] <= first:
            self._work.popleft()
        busy = sum(end - max(start, first) for start, end in self._work)
        if self._working_since is not None:
            busy += now - max(self._working_since, first)
        return busy / (now - first) if now > first else 0.0


class LoadLog:
    """A client's view of the answers it got."""

    def __init__(self) -> None:
        self._recent: deque[Utilisation] = deque(maxlen=KEPT)

    def add(self, load: Utilisation) -> None:
        self._recent.append(load)

    def metrics(self) -> dict[str, float]:
        """Nearest-rank percentiles of recent latencies (s), and the last answer's busy fraction and queue."""
        if not self._recent:
            return {}
        p50, p95 = np.quantile([load.latency_s for load in self._recent], [0.5, 0.95], method="inverted_cdf").tolist()
        last = self._recent[-1]
        return {
            "teachers/latency_p50": p50,
            "teachers/latency_p95": p95,
            "teachers/busy_fraction": last.busy_fraction,
            "teachers/queue": float(last.queue),
        }
