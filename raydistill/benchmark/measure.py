"""What the sections share: options, the machine, medians, processes of their own, tables."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.config.command_line import program


def option(parser: argparse.ArgumentParser, name: str, default: Any, help: str, **more: Any) -> None:
    """An option of its default's type: False makes a flag, a sequence any number of values."""
    if default is False:
        more["action"] = "store_true"
    elif isinstance(default, (list, tuple)):
        more = {"nargs": "*", "type": type(default[0])} | more
    elif default is not None:
        more = {"type": type(default)} | more
    parser.add_argument(name, default=default, help=help, **more)


def machine() -> str:
    """CPU, usable cores and GPU in one line."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cores()} cores of {found.group(1).strip() if found else 'an unknown CPU'}, {gpu}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command() -> str:
    """What was typed."""
    return f"{program()} {shlex.join(sys.argv[1:])}"


def resident(pid: int | str = "self", kinds: Sequence[str] = ("RssAnon",)) -> int:
    """Resident bytes of a process, of these kinds of /proc/PID/status."""
    found = re.findall(r"^(Rss\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return sum(1024 * int(size) for kind, size in found if kind in kinds)


def timed(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, until the device has done its work."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - started


def median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def interleaved(
    actions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that what disturbs the machine disturbs all alike."""
    rounds = [{name: timed(action, device) for name, action in actions.items()} for _ in range(warm_up + repeats)]
    return {name: median(taken[name] for taken in rounds[warm_up:]) for name in actions}


def copy_seconds(nbytes: int, repeats: int = 5) -> float:
    """Median seconds of one memory copy of this size, both buffers touched before."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    return median(timed(lambda: np.copyto(target, source)) for _ in range(repeats))


def in_processes(module: str, tasks: Sequence[Mapping[str, Any]], **variables: str) -> list[dict[str, Any]]:
    """What `python -m MODULE` answers to each task (see `answer`); all run at once, with these environment variables.

    Peak memory is the highest since a process began, so what measures it has a process of its own.

    Raises:
        RuntimeError: one failed.
    """
    commands = [[sys.executable, "-m", module, json.dumps(task)] for task in tasks]
    started = [
        subprocess.Popen(line, env=os.environ | variables, stdout=subprocess.PIPE, text=True) for line in commands
    ]
    answers = [process.communicate()[0] for process in started]
    for task, process in zip(tasks, started, strict=True):
        if process.returncode:
            raise RuntimeError(f"{module}: the process that measures {task} failed (see above)")
    return [json.loads(text.splitlines()[-1]) for text in answers]


def answer(measure: Callable[..., dict[str, Any]]) -> None:
    """Call a function with the task of the command line, and print what it returns."""
    print("\n" + json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


class _Cells(string.Formatter):
    """`str.format` with `ms` and `+ms` for seconds and `MB` for bytes. None shows as –, text as it is."""

    UNITS = {"ms": (1e3, ".3g", "ms"), "+ms": (1e3, "+.3g", "ms"), "MB": (1e-6, ".3g", "MB")}

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or isinstance(value, str):
            return "–" if value is None else value
        factor, number, unit = self.UNITS.get(format_spec, (None, format_spec, ""))
        return f"{factor * value:{number}} {unit}" if unit else super().format_field(value, number)


def markdown(columns: str, cells: str, rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> str:
    """A table.

    Args:
        columns: the headings, as in "one | two".
        cells: a format (see `_Cells`) of a row's keys, as in "{one:ms} | {two:.2f}", or of its entries.
    """
    fill = _Cells().format
    filled = [fill(cells, **row) if isinstance(row, Mapping) else fill(cells, *row) for row in rows]
    head, *lines = [f"| {line} |" for line in (columns, *filled)]
    return "\n".join([head, "|---" * (columns.count("|") + 1) + "|", *lines])
