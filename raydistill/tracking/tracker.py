"""MLflow tracking that never stops training. Rank 0 logs through a `Tracker`, to a run that the driver has opened.

MLflow takes seconds to import, so it is imported inside functions.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from raydistill.errors import mask, reason
from raydistill.storage.atomic import reading
from raydistill.storage.place import Place
from raydistill.storage.resolve import to_place
from raydistill.tracking.sender import Sender, metric_name
from raydistill.tracking.store import MAX_TAG, NOTE, client_of, describe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image


log = logging.getLogger(__name__)


class Tracker:
    """Logs to one run from a background thread.

    Nothing here blocks or raises in the caller. While the store is away everything waits in memory and is sent
    later. What cannot be sent is counted and reported by `close`. A resumed run's curves continue: values at or
    below the last step that the run already has for that key are skipped, and so are pictures it already has.
    """

    def __init__(self, uri: str, run_id: str, *, interval: float = 1.0) -> None:
        """`interval`: seconds over which values are gathered into one request."""
        self.run_id = run_id
        self._sender = Sender(uri, run_id, interval)
        self._not_finite: set[str] = set()
        self._pictures: set[tuple[str, int]] | None = None  # None: not read from the store yet

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers (also 0-dimensional tensors) under keys like loss/vsd. Values that are not finite are left out."""
        now, rows = int(time.time() * 1000), []
        for key, value in values.items():
            key, value = metric_name(key), float(value)
            if math.isfinite(value):
                rows.append((key, value, now, int(step)))
            elif key not in self._not_finite:
                self._not_finite.add(key)
                log.warning("metric %s is %s at step %d; such values are not logged", key, value, step)
        self._sender.add_metrics(rows)

    def catch_up(self, steps: Mapping[int, Mapping[str, float]]) -> None:
        """Offer the values of earlier steps, in their order, before anything else. What the run has is left out."""
        self._sender.add_earlier(steps)

    def image(self, image: Image, name: str, step: int) -> None:
        """Log a picture that the UI shows step by step under `name`; the last one also as `pictures/<name>.png`.

        MLflow's names of steps hold random letters; the comparison of runs needs equal ones.
        """
        name, copy = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name), image.copy()
        self._sender.add_job(
            f"picture {name} of step {step}", lambda client: self._send_image(client, copy, name, int(step))
        )

    def artifact(self, path: str | Place, folder: str | None = None) -> None:
        """Upload a file, or a folder with all it holds; it must stay there until `flush` or `close` returns."""
        source = to_place(str(path))

        def send(client: MlflowClient) -> None:
            with reading(source) as path:
                if path.is_dir():
                    client.log_artifacts(self.run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
                else:
                    client.log_artifact(self.run_id, str(path), folder)

        self._sender.add_job(f"artifact {source}", send)

    def dataset(self, context: str, source: str, digest: str, rows: int | None) -> None:
        """Say what the run was made from.

        Args:
            context: what for, as `training`.
            digest: what tells its content from another's; MLflow keeps 36 characters.
            rows: how many it has; None: nobody knows before it is read.
        """

        def send(client: MlflowClient) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            name, profile = PurePosixPath(source).name or source, json.dumps({} if rows is None else {"num_rows": rows})
            dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": mask("uri", source)}), profile=profile)
            client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

        self._sender.add_job(f"data set {source}", send)

    def text(self, text: str, file: str) -> None:
        """Log `text` as the artifact `file`."""
        self._sender.add_job(f"text {file}", lambda client: client.log_text(self.run_id, text, file))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run. Secrets are masked, long values cut."""
        tags = {key: mask(key, value)[:MAX_TAG] for key, value in values.items()}
        self._sender.add_job(f"tags {', '.join(tags)}", lambda client: describe(client, self.run_id, {}, tags))

    def note(self, text: str) -> None:
        """The run's description in the UI, in Markdown. Nothing is masked: a link to a picture has a query."""
        self._sender.add_job("description", lambda client: describe(client, self.run_id, {}, {NOTE: text[:MAX_TAG]}))

    def flush(self, timeout: float = 60.0) -> int:
        """Wait until everything is sent; the number of entries still waiting after `timeout` seconds."""
        return self._sender.flush(timeout)

    def close(self, timeout: float = 60.0) -> int:
        """Flush and stop, leaving the run's status alone; the number of entries that were lost."""
        return self._sender.close(timeout)

    def finish(self, status: str = "FINISHED", timeout: float = 60.0) -> int:
        """`close`, and set the run's final status: FINISHED, FAILED or KILLED."""
        self._sender.add_job(f"status {status}", lambda client: client.set_terminated(self.run_id, status))
        return self.close(timeout)

    def _send_image(self, client: MlflowClient, image: Image, name: str, step: int) -> None:
        if self._pictures is None:
            files = [Path(entry.path).name.split("+") for entry in client.list_artifacts(self.run_id, "images")]
            self._pictures = {(f[0], int(f[2])) for f in files if len(f) > 2 and f[1] == "step"}
        if (name.replace("/", "~"), step) not in self._pictures:
            client.log_image(self.run_id, image, key=name, step=step, synchronous=True)
            client.log_image(self.run_id, image, artifact_file=f"pictures/{name}.png")


class SystemMetrics:
    """MLflow's own monitor of CPU, memory, disk, network and GPU for a run.

    Monitoring is a convenience: where it cannot run (no psutil, store away) a warning says so and nothing else fails.
    """

    def __init__(self, uri: str, run_id: str, *, interval: float = 10.0) -> None:
        """`interval`: seconds between samples."""
        self._arguments = {"run_id": run_id, "sampling_interval": interval, "tracking_uri": uri}
        self._monitor: Any = None

    def start(self) -> SystemMetrics:
        try:
            client_of(self._arguments["tracking_uri"])  # quiet loggers, short retries
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(resume_logging=True, **self._arguments)
            logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)
            self._monitor.start()
        except Exception as error:  # noqa: BLE001 (psutil, drivers and the store all have their own)
            log.warning("system metrics are not recorded: %s", reason(error, self._arguments["tracking_uri"]))
            self._monitor = None
        return self

    def stop(self, timeout: float = 10.0) -> None:
        """Stop and send the last values, waiting `timeout` seconds at most."""
        if self._monitor is not None:
            stopping = threading.Thread(target=self._monitor.finish, daemon=True)  # blocks while the store is away
            stopping.start()
            stopping.join(timeout)
            self._monitor = None
