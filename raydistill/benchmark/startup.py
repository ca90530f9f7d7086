"""Seconds from `python3 jobs/distill.py` to the first student update of the miniature world, by phase."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.background import in_background
from raydistill.benchmark.measure import interleaved, markdown, option

EVENTS = {  # a file that appears in the run's folder, or a line that the job prints
    "checked": ("file", "owner.json"),
    "connected": ("line", "run "),
    "teachers begun": ("line", "— start teacher"),
    "teachers ready": ("line", "— teacher evaluation"),
    "teachers drew": ("file", "teacher.json"),
    "trainers begun": ("line", "— distill"),
    "start evaluated": ("file", "distill/before.json"),
    "first update": ("file", "distill/progress.json"),
}
PHASES = {  # begins and ends with; some go on beside each other
    "imports, configuration and checks": (None, "checked"),
    "Ray, MLflow": ("checked", "connected"),
    "teacher service": ("teachers begun", "teachers ready"),
    "teacher's pictures": ("teachers ready", "teachers drew"),
    "workers, networks, first evaluation": ("trainers begun", "start evaluated"),
    "first student update": ("all ready", "first update"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--repeats", 2, "starts; the second finds files in the page cache")
    option(parser, "--evaluated", 16, "pictures of the evaluations, which are no start-up")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    starts = []
    for i in range(arguments.repeats):
        print(f"start {i + 1} …", flush=True)
        starts.append(_start(arguments.evaluated))
    return {"starts": starts, "imports": _imports()}


def _start(evaluated: int) -> dict[str, tuple[float, float]]:
    """Seconds from the command to the beginning and the end of each phase of one run of one step."""
    with tempfile.TemporaryDirectory(prefix="raydistill-startup-") as storage:
        folder = Path(storage, "start")
        command = [
            sys.executable, "-m", "raydistill.commands", "distill", f"storage={storage}", "run.name=start", "distill.steps=1",
            "controls=[]",            f"evaluation.count={evaluated}", f"evaluation.periodic_count={evaluated}", "evaluation.grid=4",
        ]  # fmt: skip
        variables = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        started, lines, at = time.perf_counter(), [], {None: 0.0}
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
        reader = in_background(lambda: lines.extend((time.perf_counter() - started, line) for line in job.stdout))
        while len(at) <= len(EVENTS) and job.poll() is None:
            for event in EVENTS.keys() - at.keys():
                kind, name = EVENTS[event]
                if kind == "file" and (folder / name).is_file():
                    at[event] = time.perf_counter() - started
                elif kind == "line" and (found := [seconds for seconds, line in lines if line.startswith(name)]):
                    at[event] = found[0]
            time.sleep(0.02)
        code = job.wait()
        reader.result()
        ended = time.perf_counter() - started
    if code or len(at) <= len(EVENTS):
        raise RuntimeError(f"the run ended with {code}:\n" + "".join(line for _, line in lines[-20:]))
    at["all ready"] = max(at["teachers ready"], at["start evaluated"])
    phases = {phase: (at[first], at[last]) for phase, (first, last) in PHASES.items()}
    return phases | {"to the first step": (0.0, at["first update"]), "the whole run of one step": (0.0, ended)}


def _imports() -> dict[str, float]:
    """Seconds to import what each kind of process imports, in a fresh interpreter; medians of three."""
    kinds = {
        "nothing": "pass",
        "the job": "import raydistill.driver.preflight, raydistill.driver.pipeline",
        "a trainer": "import raydistill.workers.distill, raydistill.distillation.updates",
        "a teacher rank": "import raydistill.spaces, raydistill.teachers.zero3",
        "a text encoder": "import raydistill.data.encode",
    }
    starts = {name: partial(subprocess.run, [sys.executable, "-c", code], check=True) for name, code in kinds.items()}
    return interleaved(starts, 3, warm_up=0)


def table(result: dict[str, Any]) -> str:
    starts = result["starts"]
    columns, cells = "phase", "{}"
    for i in range(len(starts)):
        columns, cells = f"{columns} | start {i + 1}", cells + " | {:.1f} – {:.1f} s"
    phases = markdown(columns, cells, [(name, *(at for start in starts for at in start[name])) for name in starts[0]])
    imports = markdown("imports of | seconds", "{} | {:.1f}", result["imports"].items())
    notes = (
        "A run of one step with few pictures; seconds since the command. Phases go on beside each other where they can."
    )
    return f"{phases}\n\n{imports}\n\n{notes}"
