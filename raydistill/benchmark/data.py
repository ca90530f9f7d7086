"""Prompts per second through reading and encoding, memory of a large prompt file, and how long trainers wait for data."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.01  # of a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=1_000_000, help="rows of the large prompt file")
    parser.add_argument("--batches", type=int, default=300, help="batches that are streamed from it")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per batch")
    parser.add_argument("--steps", type=int, default=12, help="distillation steps, for the trainers' wait")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from raydistill.benchmark.measure import ray_cluster
    from raydistill.config.reading import CONFIGS, load
    from raydistill.data.encode import CACHE_BYTES
    from raydistill.data.stream import conditioned_batches
    from raydistill.storage.resolve import resolve

    torch.set_num_threads(1)
    config = load(CONFIGS / "shapes.yaml")
    folders = {"student": str(resolve(config.student.model)), "teacher": str(resolve(config.teacher.model))}
    with ray_cluster(4):
        wait = _wait(folders, arguments)
        reading, prompts = _read(arguments)
        stream = conditioned_batches(
            prompts, folders, seed=0, first=0, stop=arguments.batches,
            rows=range(arguments.batch_size), slot_size=arguments.batch_size,
        )  # fmt: skip
        streaming = _drain(stream, arguments)
    common = {"batch_size": arguments.batch_size, "cache_bytes": CACHE_BYTES}
    return {"reading": reading, "streaming": streaming, "wait": wait} | common


def _read(arguments: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """A text file with that many different prompts, read and checked."""
    from raydistill.benchmark.measure import resident
    from raydistill.data.prompts import read_prompts

    with tempfile.TemporaryDirectory(prefix="raydistill-data-") as folder:
        file = Path(folder, "prompts.txt")
        with file.open("w") as lines:
            for i in range(arguments.prompts):
                lines.write(f"a photograph of thing number {i}, oil on canvas, soft light, highly detailed, 35 mm\n")
        size, before = file.stat().st_size, resident()
        started = time.perf_counter()
        prompts = read_prompts(file, "prompt", "fail", 2000)
        taken = time.perf_counter() - started
    held = resident() - before
    rows = {"rows": arguments.prompts, "file_bytes": size, "held_bytes": held, "per_s": arguments.prompts / taken}
    return rows, prompts


def _drain(stream: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Encoded prompts per second without anybody else's work, and memory after a fifth of the batches and at the end."""
    early, sizes = max(1, arguments.batches // 5), {}
    for i, _ in enumerate(stream, 1):
        if i == early:
            started, sizes["early"] = time.perf_counter(), family_resident()
    taken = time.perf_counter() - started
    sizes["end"] = family_resident()
    done = (arguments.batches - early) * arguments.batch_size
    return {"per_s": done / taken, "prompts": done, "early_bytes": sizes["early"], "end_bytes": sizes["end"]}


def _wait(folders: dict[str, str], arguments: argparse.Namespace) -> dict[str, float]:
    """Share of a step that a trainer waits for its batches; without teachers, so that nothing hides it."""
    from raydistill.benchmark.measure import median
    from raydistill.benchmark.schedule import trainer
    from raydistill.data.prompts import training_prompts
    from raydistill.data.stream import conditioned_batches
    from raydistill.distill.schedule import distillation_step

    config, worker = trainer(arguments.batch_size, fake_updates=2)
    prompts = training_prompts(config)
    per_step, skipped = 1 + config.fake_score.updates, 3
    worker.batches = conditioned_batches(
        prompts, folders, seed=0, first=0, stop=(arguments.steps + skipped) * per_step,
        rows=range(arguments.batch_size), slot_size=arguments.batch_size,
    )  # fmt: skip
    waits, steps = [], []
    for i in range(arguments.steps + skipped):
        distillation_step(worker, None, config.fake_score.updates, overlap=True)
        metrics = worker.pop_metrics()
        if i >= skipped:
            waits.append(metrics["time/data"])
            steps.append(metrics["time/step"])
    worker.batches.close()
    return {"data_s": median(waits), "step_s": median(steps), "share": sum(waits) / sum(steps)}


def family_resident() -> int:
    """Bytes of anonymous memory of this process and of those it started, Ray's workers among them."""
    import contextlib

    import psutil

    from raydistill.benchmark.measure import resident

    total = resident()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):  # it ended meanwhile
            total += resident(child.pid)
    return total


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, megabytes, milliseconds

    reading, streaming, wait = result["reading"], result["streaming"], result["wait"]
    rows = [
        ("reading and checking a text file", f"{reading['per_s']:,.0f} prompts/s"),
        (
            f"memory that {reading['rows']:,} prompts take, of a file of {megabytes(reading['file_bytes'])}",
            f"{megabytes(reading['held_bytes'])} ({reading['held_bytes'] / reading['rows']:.0f} B a prompt)",
        ),
        ("encoding them for student and teacher, streamed", f"{streaming['per_s']:,.0f} prompts/s"),
        (
            f"memory of all processes after the first fifth, and {streaming['prompts']:,} prompts later",
            f"{megabytes(streaming['early_bytes'])}, {megabytes(streaming['end_bytes'])} "
            f"({streaming['end_bytes'] / streaming['early_bytes'] - 1:+.1%})",
        ),
        (
            f"a trainer's wait for data, of a step of {milliseconds(wait['step_s'])}",
            f"{milliseconds(wait['data_s'])}; {wait['share']:.2%} of all steps' time",
        ),
    ]
    notes = f"Miniature text encoders, batches of {result['batch_size']}, one encoder actor. Target: a wait below {TARGET:.0%}."
    return f"{markdown(('what', 'measured'), rows)}\n\n{notes}"
