"""Seconds from `python jobs/distill.py` to the first student update of the miniature world, by phase."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

EVENTS = {  # a file that appears in the run's folder, or a line that the job prints
    "checked": ("file", "config.yaml"),
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
    parser.add_argument("--repeats", type=int, default=2, help="starts; the second finds files in the page cache")
    parser.add_argument("--evaluated", type=int, default=16, help="pictures of the evaluations, which are no start-up")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    starts = []
    for i in range(arguments.repeats):
        print(f"start {i + 1} …", flush=True)
        starts.append(_start(arguments.evaluated))
    return {"starts": starts, "imports": _imports()}


def _start(evaluated: int) -> dict[str, tuple[float, float]]:
    """Seconds from the command to the beginning and the end of each phase of one run of one step."""
    script = Path(__file__).parents[2] / "jobs" / "distill.py"
    with tempfile.TemporaryDirectory(prefix="raydistill-startup-") as storage:
        folder = Path(storage, "start")
        command = [
            sys.executable, str(script), f"storage={storage}", "run.name=start", "distill.steps=1", "controls=[]",
            f"evaluation.count={evaluated}", f"evaluation.periodic_count={evaluated}", "evaluation.grid=4",
        ]  # fmt: skip
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
        }
        started, lines = time.perf_counter(), []
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        reader = threading.Thread(target=lambda: lines.extend((time.perf_counter(), line) for line in job.stdout))
        reader.start()
        waiting, ends = dict(EVENTS), {}
        while waiting and job.poll() is None:
            for event, (kind, name) in list(waiting.items()):
                if kind == "file" and (folder / name).is_file():
                    ends[event] = time.perf_counter()
                elif kind == "line":
                    found = next((at for at, line in list(lines) if line.startswith(name)), None)
                    if found is not None:
                        ends[event] = found
                if event in ends:
                    del waiting[event]
            time.sleep(0.02)
        code = job.wait()
        reader.join()
        ended = time.perf_counter()
    if code or waiting:
        raise RuntimeError(f"the run ended with {code}:\n" + "".join(line for _, line in lines[-20:]))
    at = {None: 0.0} | {event: end - started for event, end in ends.items()}
    at["all ready"] = max(at["teachers ready"], at["start evaluated"])
    phases = {phase: (at[first], at[last]) for phase, (first, last) in PHASES.items()}
    return phases | {
        "to the first step": (0.0, at["first update"]),
        "the whole run of one step": (0.0, ended - started),
    }


def _imports() -> dict[str, float]:
    """Seconds to import what each kind of process imports, in a fresh interpreter; medians of three."""
    from raydistill.benchmark.measure import median, timed

    kinds = {
        "nothing": "pass",
        "the job": "import raydistill.driver.preflight, raydistill.driver.pipeline",
        "a trainer": "import raydistill.workers.distill, raydistill.distill.updates",
        "a teacher rank": "import raydistill.spaces, raydistill.teachers.zero3",
        "a text encoder": "import raydistill.data.encode",
    }
    return {
        name: median([timed(lambda c=code: subprocess.run([sys.executable, "-c", c], check=True)) for _ in range(3)])
        for name, code in kinds.items()
    }


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown

    names = list(result["starts"][0])
    first = markdown(
        ("phase", *(f"start {i + 1}" for i in range(len(result["starts"])))),
        [(name, *("{:.1f} – {:.1f} s".format(*start[name]) for start in result["starts"])) for name in names],
    )
    second = markdown(
        ("imports of", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in result["imports"].items()]
    )
    notes = (
        "A run of one step with few pictures; seconds since the command. Phases go on beside each other where they can."
    )
    return f"{first}\n\n{second}\n\n{notes}"


def main() -> None:
    """For `python -m`: one start, as JSON."""
    print(json.dumps(_start(16), indent=1))


if __name__ == "__main__":
    main()
