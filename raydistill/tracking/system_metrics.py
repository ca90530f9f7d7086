"""CPU, memory, disk, network and GPU of a node in its MLflow run. MLflow is slow, so it is imported inside functions."""

from __future__ import annotations

import logging
import threading
from typing import Any

from raydistill.errors import reason
from raydistill.tracking.store import client_of

log = logging.getLogger(__name__)


class SystemMetrics:
    """MLflow's own monitor of CPU, memory, disk, network and GPU for a run; a context manager.

    Monitoring is a convenience: where it cannot run (no psutil, store away) a warning says so and nothing else fails.
    """

    def __init__(self, uri: str, run_id: str, *, interval: float = 10.0, node: str | None = None) -> None:
        """`interval`: seconds between samples; `node`: name in the metrics' keys when several nodes report."""
        self._arguments = {"run_id": run_id, "sampling_interval": interval, "node_id": node, "tracking_uri": uri}
        self._monitor: Any = None

    def start(self) -> SystemMetrics:
        try:
            client_of(self._arguments["tracking_uri"])  # quiet loggers, short retries
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(resume_logging=True, **self._arguments)
            logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)
            self._monitor.start()
        except Exception as error:  # noqa: BLE001 (psutil, drivers and the store all have their own)
            log.warning("system metrics are not recorded: %s", reason(error))
            self._monitor = None
        return self

    def stop(self, timeout: float = 10.0) -> None:
        """Stop and send the last values, waiting `timeout` seconds at most."""
        if self._monitor is not None:
            stopping = threading.Thread(target=self._monitor.finish, daemon=True)  # blocks while the store is away
            stopping.start()
            stopping.join(timeout)
            self._monitor = None

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()
