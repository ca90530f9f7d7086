"""Prompts per second through reading and encoding, memory of a large prompt file, and how long trainers wait for data."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from raydistill.benchmark.measure import markdown, median, option, resident, timed
from raydistill.benchmark.models import default_trainer
from raydistill.config.reading import load
from raydistill.data.encode import CACHE_BYTES
from raydistill.data.prompts import PromptSet, read_prompts, training_prompts
from raydistill.data.stream import conditioned_batches
from raydistill.distillation.schedule import distillation_step
from raydistill.driver.cluster import connected
from raydistill.storage.resolve import resolve

TARGET = 0.01  # of a step
SKIPPED = 3  # steps that warm up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--prompts", 1_000_000, "rows of the large prompt file")
    option(parser, "--batches", 300, "batches that are streamed from it")
    option(parser, "--batch-size", 16, "prompts per batch")
    option(parser, "--steps", 12, "distillation steps, for the trainers' wait")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    with connected(num_cpus=4, log_to_driver=False):
        wait = _wait(arguments)
        reading, prompts = _read(arguments.prompts)
        streaming = _drain(_stream(prompts, arguments.batches, arguments.batch_size), arguments)
    common = {"batch_size": arguments.batch_size, "cache_bytes": CACHE_BYTES}
    return {"reading": reading, "streaming": streaming, "wait": wait} | common


def _stream(prompts: PromptSet, stop: int, size: int) -> Any:
    """Encoded batches for the default run's student and teacher."""
    config = load()
    folders = {"student": str(resolve(config.student.model)), "teacher": str(resolve(config.teacher.model))}
    return conditioned_batches(prompts, folders, seed=0, first=0, stop=stop, rows=range(size), slot_size=size)


def _read(count: int) -> tuple[dict[str, float], PromptSet]:
    """A text file with that many different prompts, read and checked."""
    with tempfile.TemporaryDirectory(prefix="raydistill-data-") as folder:
        file, found = Path(folder, "prompts.txt"), []
        with file.open("w") as lines:
            for i in range(count):
                lines.write(f"a photograph of thing number {i}, oil on canvas, soft light, highly detailed, 35 mm\n")
        size, before = file.stat().st_size, resident()
        taken = timed(lambda: found.append(read_prompts(file, "prompt", "fail", 2000)))
    kept = resident() - before
    return {"rows": count, "file_bytes": size, "held_bytes": kept, "per_s": count / taken}, found[0]


def _drain(stream: Iterable[Any], arguments: argparse.Namespace) -> dict[str, float]:
    """Encoded prompts per second without anybody else's work, and memory after a fifth of the batches and at the end."""
    early = max(1, arguments.batches // 5)
    for i, _ in enumerate(stream, 1):
        if i == early:
            started, early_bytes = time.perf_counter(), family_resident()
    taken = time.perf_counter() - started
    done = (arguments.batches - early) * arguments.batch_size
    return {"per_s": done / taken, "prompts": done, "early_bytes": early_bytes, "end_bytes": family_resident()}


def _wait(arguments: argparse.Namespace) -> dict[str, float]:
    """Share of a step that a trainer waits for its batches; without teachers, so that nothing hides it."""
    worker, _ = default_trainer(arguments.batch_size, fake_updates=2)
    updates, steps = worker.config.fake_score.updates, arguments.steps + SKIPPED
    stream = _stream(training_prompts(worker.config), steps * (1 + updates), arguments.batch_size)
    worker.batches.source, metrics = stream, []
    for _ in range(steps):
        distillation_step(worker, None, updates, overlap=True)
        metrics.append(worker.pop_metrics())
    stream.close()
    waits, taken = ([row[f"time/{name}"] for row in metrics[SKIPPED:]] for name in ("data", "step"))
    return {"data_s": median(waits), "step_s": median(taken), "share": sum(waits) / sum(taken)}


def family_resident() -> int:
    """Bytes of anonymous memory of this process and of those it started, Ray's workers among them."""
    total = resident()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):  # it ended meanwhile
            total += resident(child.pid)
    return total


def table(result: dict[str, Any]) -> str:
    reading, streaming = result["reading"], result["streaming"]
    each, growth = reading["held_bytes"] / reading["rows"], streaming["end_bytes"] / streaming["early_bytes"] - 1
    lines = (
        "reading and checking a text file | {reading[per_s]:,.0f} prompts/s",
        "memory that {reading[rows]:,} prompts take, of a file of {reading[file_bytes]:MB} | "
        "{reading[held_bytes]:MB} ({each:.0f} B a prompt)",
        "encoding them for student and teacher, streamed | {streaming[per_s]:,.0f} prompts/s",
        "memory of all processes after the first fifth, and {streaming[prompts]:,} prompts later | "
        "{streaming[early_bytes]:MB}, {streaming[end_bytes]:MB} ({growth:+.1%})",
        "a trainer's wait for data, of an update of {wait[step_s]:ms} | {wait[data_s]:ms}; {wait[share]:.2%} of all updates' time",
    )
    table = markdown("what | measured", " |\n| ".join(lines), [result | {"each": each, "growth": growth}])
    notes = f"Miniature text encoders, batches of {result['batch_size']}, one encoder actor. Target: a wait below {TARGET:.0%}."
    return f"{table}\n\n{notes}"
