"""Connecting a job to Ray: the cluster it was submitted to, or a local one of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raydistill.driver.worker_lines import worker_lines
from raydistill.tracking.screen import screen

# Loggers whose level is set again by those who own them.
TALKATIVE = ("ray.serve", "mlflow.system_metrics.system_metrics_monitor")
REPORTS = "train/v2/_internal/execution/context.py"  # of Ray: this one's name is its file


def quiet() -> None:
    """Runs first in every worker process: keeps what concerns nobody off the driver's screen."""
    for name in ("ray.data", "ray.serve", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)

    for name in (*TALKATIVE, str(Path(ray.__file__).parent / REPORTS)):
        logging.getLogger(name).addFilter(_is_warning)
    logging.getLogger("DeepSpeed").addFilter(_is_no_guess)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # says twice what a worker prints
    # Asks the dashboard once a second, and complains once a second where there is none, as on a cluster of our own.
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _is_no_guess(record: logging.LogRecord) -> bool:
    """Every process that sees no GPU, as most must not, says that none was found."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


# The environment of a cluster without a dashboard, of which Ray Train asks whether its controller lives. Without an address it
# asks whichever cluster of this machine it finds, or the one that an old note names: one that is gone is waited for, which
# keeps a stage shorter than 40 s from ending for 12 s.
WITHOUT_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}

DASHBOARD_PORT = 8265  # as everywhere in Ray, where it is free

# The environment of a cluster of our own, whose processes inherit it.
OWN = {
    # What `runtime_env` says in a cluster that runs already: said there, every worker process is started twice over,
    # and none of those that Ray keeps ready can be used. (ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR)
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "raydistill.driver.cluster.quiet",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each training; nobody takes this one node away
}


@contextmanager
def connected(dashboard: bool = False, **own: Any) -> Iterator[None]:
    """Ray for the length of the block.

    Inside `ray job submit`, or with RAY_ADDRESS set, the job joins that cluster; otherwise it starts a cluster on this
    machine and takes it down again.

    Args:
        dashboard: a cluster of its own has one, whose address is said.
        own: settings of `ray.init`, as num_cpus; with any the cluster is one of its own.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    quiet()
    # It says that the cluster asks for a token, as every cluster of our own does.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    joins = not own and bool(os.environ.get("RAY_ADDRESS"))
    port = free_port(DASHBOARD_PORT) if dashboard and not joins else None
    with environment({} if joins else OWN | dashboard_of(port)), worker_lines():
        cluster = ray.init(
            address="auto" if joins else "local",
            include_dashboard=None if joins else dashboard,
            dashboard_port=port,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": "raydistill.driver.cluster.quiet"} if joins else None,
            **({"log_to_driver": True} | own),
        )
        if dashboard:
            screen.say(f"dashboard http://{cluster.dashboard_url}  (the token that it asks for: ray get-auth-token)")
        try:
            yield
        finally:
            if not joins:
                serve.shutdown()
            ray.shutdown()


def dashboard_of(port: int | None) -> dict[str, str]:
    """The environment of a cluster that has its dashboard at a port of this machine, or none."""
    return WITHOUT_DASHBOARD if port is None else {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}


def free_port(wanted: int) -> int:
    """This port of the machine, or any where another program has it."""
    for port in (wanted, 0):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return listener.getsockname()[1]
    raise OSError("no port is free for Ray's dashboard")


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those that are not set, for the length of the block."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
