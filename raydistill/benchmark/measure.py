"""What the sections share: the machine, medians, tables, a Ray cluster of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def machine() -> str:
    """CPU, usable cores and GPU in one line."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{cores()} cores of {found.group(1).strip() if found else 'an unknown CPU'}, {gpu_name() or 'no GPU'}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def command() -> str:
    """What was typed."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"jobs/{script.name}" if script.parent.name == "jobs" else script.name, *sys.argv[1:]])


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def interleaved(actions: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that what disturbs the machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(warm_up + repeats):
        for name, action in actions.items():
            taken = timed(action)
            if i >= warm_up:
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def copy_seconds(nbytes: int, repeats: int = 5) -> float:
    """Median seconds of one memory copy of this size, both buffers touched before."""
    import numpy as np

    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return median([timed(lambda: np.copyto(target, source)) for _ in range(repeats)])


def stored_bytes() -> int:
    """Bytes that all processes of the cluster have written to its object stores so far, as Ray counts them."""
    from ray._private.internal_api import get_memory_info_reply
    from ray._private.state import state

    return get_memory_info_reply(state).store_stats.cumulative_created_bytes


def resident(pid: int | str = "self", kinds: Sequence[str] = ("RssAnon",)) -> int:
    """Resident bytes of a process, of these kinds of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(
        1024 * int(size) for kind, size in re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.MULTILINE) if kind in kinds
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


@contextlib.contextmanager
def ray_cluster(cpus: float, object_store_bytes: int | None = None) -> Iterator[None]:
    """A local Ray cluster for the length of the block, with as many logical CPUs as the section needs."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import logging

    import ray

    from raydistill.driver.cluster import WITHOUT_DASHBOARD, environment, quiet

    quiet()
    with environment(WITHOUT_DASHBOARD):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "raydistill.driver.cluster.quiet"},
        )
    try:
        yield
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
