"""How busy teachers are. Each replica measures it and sends it with its answers, and the client collects it.

A replica computes one request at a time. The latency of a request is its wait in the queue plus the work of the ranks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

WINDOW_S = 60.0  # of the busy fraction
RECENT_ANSWERS = 256  # that percentiles are taken of


@dataclass(frozen=True)
class Utilisation:
    """The load of a replica when it answers a request."""

    latency_s: float  # of this request: wait in the queue, and work
    busy_fraction: float  # of the last minute, or of the replica's life if that is shorter
    queue: int  # requests that wait when this one is done


class Meter:
    """Measures the work of one replica. Not thread-safe: for one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._born = clock()
        self._work: deque[tuple[float, float]] = deque()  # (start, end) of finished work, in order, not overlapping
        self._working_since: float | None = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """For the time that the ranks work on a request."""
        self._working_since = self._clock()
        try:
            yield
        finally:
            self._work.append((self._working_since, self._clock()))
            self._working_since = None

    def load(self, arrived: float, queue: int) -> Utilisation:
        """The load to send with an answer. `arrived`: of its request, on this meter's clock; `queue`: requests that wait."""
        return Utilisation(self._clock() - arrived, self.busy_fraction(), queue)

    def busy_fraction(self) -> float:
        """Share of the last minute, or of the replica's life, that the ranks worked."""
        now = self._clock()
        first = max(self._born, now - WINDOW_S)
        while self._work and self._work[0][1] <= first:
            self._work.popleft()
        busy = sum(end - max(start, first) for start, end in self._work)
        if self._working_since is not None:
            busy += now - max(self._working_since, first)
        return busy / (now - first) if now > first else 0.0


class LoadLog:
    """The loads that a client received with its answers."""

    def __init__(self) -> None:
        self._recent: deque[Utilisation] = deque(maxlen=RECENT_ANSWERS)

    def add(self, load: Utilisation) -> None:
        self._recent.append(load)

    def metrics(self) -> dict[str, float]:
        """Nearest-rank percentiles of recent latencies in seconds; busy fraction and queue of the last answer."""
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
