"""The thread behind a `Tracker`: it sends what waits to the run's store, and tries again while the store is away.

MLflow takes seconds to import, so it is imported inside functions, which run in the thread.
"""

from __future__ import annotations

import json
import logging
import math
import posixpath
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raydistill.errors import mask, reason
from raydistill.tracking.store import REFUSALS, client_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


log = logging.getLogger(__name__)

METRICS_KEPT, JOBS_KEPT = 200_000, 1000  # what waits in memory while the store is away
AT_ONCE = 1000  # values of one request: MLflow's limit
EARLIER_AT_ONCE = 20  # steps of one request, some thirty values each
TRIES = 5  # of a job, while the store itself answers

Row = tuple[str, float, int, int]  # key, value, timestamp (ms), step
Job = Callable[["MlflowClient"], None]


class Sender:
    """Sends values, and jobs for a client, to one run from a background thread. Only `flush` and `close` wait.

    Attributes:
        lost: entries that were dropped or refused.
    """

    def __init__(self, uri: str, run_id: str, interval: float) -> None:
        """`interval`: seconds over which values are gathered into one request."""
        self.uri, self.run_id, self.interval = uri, run_id, interval
        self.lost = 0
        self.metrics: deque[Row] = deque()
        self._earlier: deque[tuple[int, Mapping[str, float]]] = deque()  # step, values; sent before all others
        self._jobs: deque[tuple[str, Job]] = deque()
        self._pending = 0  # includes what the thread is sending
        self._nudged = self._closed = self._away = False
        self._last_step: dict[str, int] | None = None  # None: not read from the store yet
        self._failures = 0  # of the first job, while the store itself answered
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="raydistill-tracker", daemon=True)
        self._thread.start()

    # -- what callers use --------------------------------------------------------------------------
    def add_metrics(self, rows: Sequence[Row]) -> None:
        """Values of the latest step. Of too many the oldest are dropped."""
        self._add(self.metrics, rows, METRICS_KEPT)

    def add_earlier(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Values of earlier steps, in their order. What the run has is left out."""
        self._add(self._earlier, list(steps.items()), sys.maxsize)

    def add_job(self, what: str, job: Job) -> None:
        """Anything else. `what` names it in warnings. Of too many the oldest are dropped."""
        self._add(self._jobs, [(what, job)], JOBS_KEPT)

    def flush(self, timeout: float) -> int:
        """Wait until everything is sent; the number of entries still waiting after `timeout` seconds."""
        with self._condition:
            self._nudged = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._pending == 0, timeout)
            return self._pending

    def close(self, timeout: float) -> int:
        """Flush and stop; the number of entries that were lost."""
        self.flush(timeout)
        with self._condition:
            self._drop(self._pending)
            for queue in (self.metrics, self._earlier, self._jobs):
                queue.clear()
            self._closed = True
            self._condition.notify_all()
        if self.lost:
            log.warning("tracking: %d entries of run %s could not be logged", self.lost, self.run_id)
        return self.lost

    def _add(self, queue: deque[Any], entries: Sequence[Any], kept: int) -> None:
        with self._condition:
            queue.extend(entries)
            self._pending += len(entries)
            while len(queue) > kept:
                queue.popleft()
                self._drop(1)
            self._condition.notify_all()

    def _drop(self, count: int) -> None:
        self.lost += count
        self._pending -= count

    # -- the thread --------------------------------------------------------------------------------
    def _work(self) -> None:
        client, delay = None, 0.0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._earlier or self.metrics or self._jobs or self._closed)
                if self._closed:
                    return
                if self._condition.wait_for(lambda: self._nudged or self._closed, delay or self.interval):
                    self._nudged, delay = False, 0.0
            try:
                client = client or client_of(self.uri)
                self._send_all(client)
                if self._away:
                    log.warning("tracking: %s answers again", mask("uri", self.uri))
                self._away, delay = False, 0.0
            except Exception as error:  # noqa: BLE001 (tracking must not stop training, whatever its store raises)
                delay = min(60.0, max(1.0, 2 * delay))
                if not self._away:
                    log.warning(
                        "tracking: %s does not answer, will retry: %s", mask("uri", self.uri), reason(error, self.uri)
                    )
                self._away = True

    def _send_all(self, client: MlflowClient) -> None:
        """Earlier steps go first: the last step that a run has for a key says that it has all before it."""
        earlier, latest, job = (partial(log, client) for log in (self._log_earlier, self._log, self._run))
        self._send(
            self._earlier, EARLIER_AT_ONCE, earlier, lambda steps: f"the values of {len(steps)} steps were refused"
        )
        self._send(self.metrics, AT_ONCE, latest, lambda rows: f"{len(rows)} values were refused")
        hopeless = partial(self._job_is_hopeless, client)
        self._send(self._jobs, 1, job, lambda jobs: f"{jobs[0][0]} could not be logged", hopeless)

    def _send(
        self,
        queue: deque[Any],
        at_once: int,
        send: Callable[[list[Any]], None],
        loss: Callable[[list[Any]], str],
        hopeless: Callable[[Exception], bool] | None = None,
    ) -> None:
        """Send all that waits in a queue, `at_once` entries at a time.

        Args:
            loss: what the warning says where entries are lost.
            hopeless: whether an error of `send` means that (None: `_hopeless`). Otherwise they wait again, and it is
                raised.
        """
        hopeless = hopeless or _hopeless
        while True:
            with self._condition:
                some = [queue.popleft() for _ in range(min(at_once, len(queue)))]
            if not some:
                return
            try:
                send(some)
            except Exception as error:
                if not hopeless(error):
                    with self._condition:
                        if not self._closed:
                            queue.extendleft(reversed(some))
                    raise
                log.warning("tracking: %s: %s", loss(some), reason(error, self.uri))
                self._done(len(some), lost=True)
            else:
                self._done(len(some))

    def _done(self, count: int, lost: bool = False) -> None:
        with self._condition:
            if not self._closed:
                self._pending -= count
                self.lost += count if lost else 0
                self._condition.notify_all()

    def _log_earlier(self, client: MlflowClient, steps: list[tuple[int, Mapping[str, float]]]) -> None:
        now, rows = int(time.time() * 1000), []
        for step, values in steps:
            named = ((metric_name(key), float(value)) for key, value in values.items())
            rows += [(key, value, now, step) for key, value in named if math.isfinite(value)]
        self._log(client, rows)

    def _log(self, client: MlflowClient, rows: list[Row]) -> None:
        """Log what the run does not have yet."""
        from mlflow.entities import Metric

        new = [Metric(*row) for row in rows if row[3] > self._logged_until(client, row[0])]
        for start in range(0, len(new), AT_ONCE):
            client.log_batch(self.run_id, metrics=new[start : start + AT_ONCE])

    def _logged_until(self, client: MlflowClient, key: str) -> int:
        """Last step that the run had for `key` before this tracker wrote to it; -1 if none."""
        if self._last_step is None:
            self._last_step = {key: sys.maxsize for key in client.get_run(self.run_id).data.metrics}
        if self._last_step.get(key) == sys.maxsize:  # known to exist, step not read yet
            self._last_step[key] = max(entry.step for entry in client.get_metric_history(self.run_id, key))
        return self._last_step.setdefault(key, -1)

    def _run(self, client: MlflowClient, jobs: list[tuple[str, Job]]) -> None:
        jobs[0][1](client)
        self._failures = 0

    def _job_is_hopeless(self, client: MlflowClient, error: Exception) -> bool:
        """Whether a failed job was refused, or has failed TRIES times although the store itself answered."""
        try:
            client.get_run(self.run_id)
        except Exception:  # noqa: BLE001 (away, for whatever reason)
            return False
        self._failures += 1
        hopeless = _hopeless(error) or self._failures >= TRIES
        if hopeless:
            self._failures = 0
        return hopeless


def metric_name(key: str) -> str:
    """The nearest name MLflow accepts; one bad name would get a whole batch refused."""
    return posixpath.normpath(re.sub(r"[^\w\-. /]", "_", key)).lstrip("./") or "_"


def _hopeless(error: Exception) -> bool:
    """Whether sending the same again cannot help."""
    if isinstance(error, (OSError, json.JSONDecodeError)):  # requests' own ValueErrors are OSErrors: the network
        return isinstance(error, FileNotFoundError)
    return getattr(error, "error_code", None) in REFUSALS or isinstance(error, (ValueError, TypeError))
