"""Connecting a job to Ray: the cluster it was submitted to, or a local one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """Runs first in every worker process: keeps what concerns nobody off the driver's screen."""
    for name in ("ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Asks the dashboard once a second, and complains once a second where there is none, as on a cluster of our own.
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


@contextmanager
def connected() -> Iterator[None]:
    """Ray for the length of the block.

    Inside `ray job submit`, or with RAY_ADDRESS set, the job joins that cluster; otherwise it starts a cluster on this
    machine and takes it down again.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    quiet()
    joins = bool(os.environ.get("RAY_ADDRESS"))
    ray.init(
        address="auto" if joins else "local",
        include_dashboard=None if joins else False,
        logging_level=logging.WARNING,
        log_to_driver=True,
        runtime_env={"worker_process_setup_hook": "raydistill.cluster.quiet"},
    )
    try:
        yield
    finally:
        from ray import serve

        if not joins:
            serve.shutdown()
        ray.shutdown()
