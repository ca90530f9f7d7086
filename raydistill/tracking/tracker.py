"""MLflow tracking that never stops training: a `Tracker` that logs in the background, and system metrics.

The driver calls `open_run` (raydistill/runs.py) and passes (uri, run id) on; rank 0 logs through a `Tracker`.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.errors import mask, reason
from raydistill.storage.atomic import reading
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place
from raydistill.tracking.store import (
    MAX_TAG,
    NOTE,
    REFUSALS,
    client_of,
    describe,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image


log = logging.getLogger(__name__)

METRICS_KEPT, JOBS_KEPT = 200_000, 1000  # what waits in memory while the store is away
EARLIER_AT_ONCE = 20  # steps of one request, some thirty values each


class Tracker:
    """Logs to one run from a background thread.

    Nothing here blocks or raises in the caller. While the store is away everything waits in memory and is sent
    later; what cannot be sent is counted and reported by `close`. A resumed run's curves continue: values at or
    below the last step that the run already has for that key are skipped, and so are pictures it already has.
    """

    def __init__(self, uri: str, run_id: str, *, interval: float = 1.0) -> None:
        """`interval`: seconds over which values are gathered into one request."""
        self.uri, self.run_id, self.interval = uri, run_id, interval
        self.lost = 0
        self._metrics: deque[tuple[str, float, int, int]] = deque()  # key, value, timestamp (ms), step
        self._earlier: deque[tuple[int, Mapping[str, float]]] = deque()  # step, values; sent before all others
        self._jobs: deque[tuple[str, Callable[[MlflowClient], None]]] = deque()
        self._pending = 0  # includes what the thread is sending
        self._nudged = self._closed = self._away = False
        self._not_finite: set[str] = set()
        self._last_step: dict[str, int] | None = None  # None: not read from the store yet
        self._pictures: set[tuple[str, int]] | None = None
        self._failures = 0  # of the first job, while the store itself answered
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="raydistill-tracker", daemon=True)
        self._thread.start()

    # -- what callers use --------------------------------------------------------------------------
    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers (also 0-dimensional tensors) under keys like loss/vsd. Values that are not finite are left out."""
        now, rows = int(time.time() * 1000), []
        for key, value in values.items():
            key, value = _metric_name(key), float(value)
            if math.isfinite(value):
                rows.append((key, value, now, int(step)))
            elif key not in self._not_finite:
                self._not_finite.add(key)
                log.warning("metric %s is %s at step %d; such values are not logged", key, value, step)
        with self._condition:
            self._metrics.extend(rows)
            self._pending += len(rows)
            while len(self._metrics) > METRICS_KEPT:
                self._metrics.popleft()
                self._drop(1)
            self._condition.notify_all()

    def catch_up(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Offer the values of earlier steps, in their order, before anything else; what the run has is left out."""
        with self._condition:
            self._earlier.extend(steps.items())
            self._pending += len(steps)
            self._condition.notify_all()

    def image(self, image: Image, name: str, step: int) -> None:
        """Log a picture that the UI shows step by step under `name`."""
        name, copy = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name), image.copy()
        self._add(f"picture {name} of step {step}", lambda client: self._send_image(client, copy, name, int(step)))

    def artifact(self, path: str | Place, folder: str | None = None) -> None:
        """Upload a file, or a folder with all it holds; it must stay there until `flush` or `close` returns."""
        source = to_place(str(path))

        def send(client: MlflowClient) -> None:
            with reading(source) as path:
                if path.is_dir():
                    client.log_artifacts(self.run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
                else:
                    client.log_artifact(self.run_id, str(path), folder)

        self._add(f"artifact {source}", send)

    def text(self, text: str, file: str) -> None:
        """Log `text` as the artifact `file`."""
        self._add(f"text {file}", lambda client: client.log_text(self.run_id, text, file))

    def tags(self, values: Mapping[str, Any]) -> None:
        tags = {key: mask(key, value)[:MAX_TAG] for key, value in values.items()}
        self._add(f"tags {', '.join(tags)}", lambda client: describe(client, self.run_id, {}, tags))

    def note(self, text: str) -> None:
        """The run's description in the UI, in Markdown."""
        self.tags({NOTE: text})

    def flush(self, timeout: float = 60.0) -> int:
        """Wait until everything is sent; the number of entries still waiting after `timeout` seconds."""
        with self._condition:
            self._nudged = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._pending == 0, timeout)
            return self._pending

    def close(self, timeout: float = 60.0) -> int:
        """Flush and stop, leaving the run's status alone; the number of entries that were lost."""
        self.flush(timeout)
        with self._condition:
            self._drop(self._pending)
            self._metrics.clear()
            self._earlier.clear()
            self._jobs.clear()
            self._closed = True
            self._condition.notify_all()
        if self.lost:
            log.warning("tracking: %d entries of run %s could not be logged", self.lost, self.run_id)
        return self.lost

    def finish(self, status: str = "FINISHED", timeout: float = 60.0) -> int:
        """`close`, and set the run's final status: FINISHED, FAILED or KILLED."""
        self._add(f"status {status}", lambda client: client.set_terminated(self.run_id, status))
        return self.close(timeout)

    # -- the thread --------------------------------------------------------------------------------
    def _add(self, what: str, job: Callable[[MlflowClient], None]) -> None:
        with self._condition:
            self._jobs.append((what, job))
            self._pending += 1
            if len(self._jobs) > JOBS_KEPT:
                self._jobs.popleft()
                self._drop(1)
            self._condition.notify_all()

    def _drop(self, count: int) -> None:
        self.lost += count
        self._pending -= count

    def _work(self) -> None:
        client, delay = None, 0.0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._earlier or self._metrics or self._jobs or self._closed)
                if self._closed:
                    return
                if self._condition.wait_for(lambda: self._nudged or self._closed, delay or self.interval):
                    self._nudged, delay = False, 0.0
            try:
                client = client or client_of(self.uri)
                self._send_earlier(client)
                self._send_metrics(client)
                self._send_jobs(client)
                if self._away:
                    log.warning("tracking: %s answers again", mask("uri", self.uri))
                self._away, delay = False, 0.0
            except Exception as error:  # noqa: BLE001 (tracking must not stop training, whatever its store raises)
                delay = min(60.0, max(1.0, 2 * delay))
                if not self._away:
                    log.warning("tracking: %s does not answer, will retry: %s", mask("uri", self.uri), reason(error))
                self._away = True

    def _done(self, count: int, lost: bool = False) -> None:
        with self._condition:
            if not self._closed:
                self._pending -= count
                self.lost += count if lost else 0
                self._condition.notify_all()

    def _send_earlier(self, client: MlflowClient) -> None:
        """Nothing later goes first: the last step that a run has for a key says that it has all before it."""
        from mlflow.entities import Metric

        while True:
            with self._condition:
                some = [self._earlier.popleft() for _ in range(min(EARLIER_AT_ONCE, len(self._earlier)))]
            if not some:
                return
            now, rows = int(time.time() * 1000), []
            try:
                for step, values in some:
                    named = ((_metric_name(key), float(value)) for key, value in values.items())
                    rows += [
                        Metric(key, value, now, step)
                        for key, value in named
                        if math.isfinite(value) and step > self._logged_until(client, key)
                    ]
                for start in range(0, len(rows), 1000):  # MLflow's limit per request
                    client.log_batch(self.run_id, metrics=rows[start : start + 1000])
            except Exception as error:
                if _hopeless(error):
                    log.warning("tracking: the values of %d steps were refused: %s", len(some), reason(error))
                    self._done(len(some), lost=True)
                    continue
                with self._condition:
                    if not self._closed:
                        self._earlier.extendleft(reversed(some))
                raise
            self._done(len(some))

    def _send_metrics(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while True:
            with self._condition:
                rows = [self._metrics.popleft() for _ in range(min(1000, len(self._metrics)))]
            if not rows:
                return
            try:
                new = [Metric(*row) for row in rows if row[3] > self._logged_until(client, row[0])]
                if new:
                    client.log_batch(self.run_id, metrics=new)
            except Exception as error:
                if _hopeless(error):
                    log.warning("tracking: %d values were refused: %s", len(rows), reason(error))
                    self._done(len(rows), lost=True)
                    continue
                with self._condition:
                    if not self._closed:
                        self._metrics.extendleft(reversed(rows))
                raise
            self._done(len(rows))

    def _logged_until(self, client: MlflowClient, key: str) -> int:
        """Last step that the run had for `key` before this tracker wrote to it; -1 if none."""
        if self._last_step is None:
            self._last_step = {key: sys.maxsize for key in client.get_run(self.run_id).data.metrics}
        if self._last_step.get(key) == sys.maxsize:  # known to exist, step not read yet
            self._last_step[key] = max(entry.step for entry in client.get_metric_history(self.run_id, key))
        return self._last_step.setdefault(key, -1)

    def _send_jobs(self, client: MlflowClient) -> None:
        while True:
            with self._condition:
                if not self._jobs:
                    return
                what, job = entry = self._jobs.popleft()
            try:
                job(client)
            except Exception as error:
                if self._give_up(client, error):
                    log.warning("tracking: %s could not be logged: %s", what, reason(error))
                else:
                    with self._condition:
                        if not self._closed:
                            self._jobs.appendleft(entry)
                    raise
            self._done(1, lost=self._failures > 0)
            self._failures = 0

    def _give_up(self, client: MlflowClient, error: Exception) -> bool:
        """Whether a failed job is hopeless: refused, or failed five times although the store itself answered."""
        try:
            client.get_run(self.run_id)
        except Exception:  # noqa: BLE001 (away, for whatever reason)
            return False
        self._failures += 1
        return _hopeless(error) or self._failures >= 5

    def _send_image(self, client: MlflowClient, image: Image, name: str, step: int) -> None:
        if self._pictures is None:
            files = [Path(entry.path).name.split("+") for entry in client.list_artifacts(self.run_id, "images")]
            self._pictures = {(f[0], int(f[2])) for f in files if len(f) > 2 and f[1] == "step"}
        if (name.replace("/", "~"), step) not in self._pictures:
            client.log_image(self.run_id, image, key=name, step=step, synchronous=True)


def _metric_name(key: str) -> str:
    """The nearest name MLflow accepts; one bad name would get a whole batch refused."""
    return posixpath.normpath(re.sub(r"[^\w\-. /]", "_", key)).lstrip("./") or "_"


def _hopeless(error: Exception) -> bool:
    """Whether sending the same again cannot help."""
    if isinstance(error, (OSError, json.JSONDecodeError)):  # requests' own ValueErrors are OSErrors: the network
        return isinstance(error, FileNotFoundError)
    return getattr(error, "error_code", None) in REFUSALS or isinstance(error, (ValueError, TypeError))
