"""A step of the real distillation loop against its critical path, and sequential against overlapped.

Trainer: the miniature world's networks, the run's own `distillation_step`. Simulated teachers are replicas of the service
that sleep, which stand for GPUs; the real miniature teacher computes on the second core. Sequential and overlapped
steps take turns.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TARGET = 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind and latency")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per student update")
    parser.add_argument("--fake-updates", type=int, default=2, help="fake-score updates per student update (k)")
    parser.add_argument("--factors", type=float, nargs="*", default=FACTORS, help="latencies in k fake updates")
    parser.add_argument("--no-real-teacher", action="store_true", help="simulated teachers only")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from raydistill.benchmark.idle import idle_service
    from raydistill.benchmark.measure import ray_cluster
    from raydistill.config import Teachers
    from raydistill.data.encode import encode_unconditional
    from raydistill.distill.load import guidance_scale
    from raydistill.distill.loop import Teachers as Submit
    from raydistill.teachers import service
    from raydistill.teachers.client import TeacherClient

    torch.set_num_threads(1)
    config, worker = trainer(arguments.batch_size, arguments.fake_updates)
    space = worker.teacher_space
    empty, scale, rows = encode_unconditional(space), guidance_scale(config, space), []
    with ray_cluster(4):
        with idle_service(Teachers(shards=1, slice=4, cpus_per_rank=0.1)) as idle:
            submit = Submit(idle.client(), empty, scale)
            idle.set(0.0)
            fake = _measure(worker, submit, arguments)["fake_s"]  # k updates; also warms up
            for factor in arguments.factors:
                idle.set(factor * fake)
                print(f"sleeping teacher, {factor:g} times the fake updates …", flush=True)
                row = {"teacher": f"sleeps {factor:g} x", "sleeps_s": factor * fake}
                rows.append(row | _measure(worker, submit, arguments))
        if not arguments.no_real_teacher:
            print("real miniature teacher …", flush=True)
            settings = Teachers(shards=1, slice=arguments.batch_size, cpus_per_rank=0.1)
            service.start(space.folder, settings, "real")
            try:
                submit = Submit(TeacherClient("real", settings), empty, scale)
                _measure(worker, submit, argparse.Namespace(**vars(arguments) | {"steps": 1}))
                rows.append({"teacher": "real miniature", "sleeps_s": None} | _measure(worker, submit, arguments))
            finally:
                service.stop("real")
    return {
        "rows": rows,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "fake_updates": arguments.fake_updates,
    }


def trainer(batch_size: int, fake_updates: int) -> tuple[Any, Any]:
    """The default run's configuration and Distiller, fed from memory: the loop alone is measured, not its data."""
    import numpy as np
    import torch

    from raydistill.bridge.model import Bridge
    from raydistill.config import load, resolve
    from raydistill.data.encode import TextEncoder
    from raydistill.data.prompts import training_prompts
    from raydistill.distill.distiller import Distiller
    from raydistill.distill.load import load_real, load_unet
    from raydistill.spaces import load_space

    config = load(
        overrides=[
            f"distill.batch_size={batch_size}",
            f"fake_score.updates={fake_updates}",
            "discriminator.real_count=64",
        ]
    )
    student, teacher = load_space(resolve(config.student.model)), load_space(resolve(config.teacher.model))
    captions = training_prompts(config).prompts[:batch_size]
    columns = {
        f"{role}.{name}": value.numpy()
        for role, space in (("student", student), ("teacher", teacher))
        for name, value in TextEncoder(space).encode(captions).items()
    }
    batches = ({"sample_id": np.arange(batch_size) + i * batch_size, **columns} for i in itertools.count())
    real = load_real(resolve(config.discriminator.real_data), teacher, config.discriminator.real_count)
    bridge = Bridge.load(resolve(config.bridge.checkpoint), student, teacher)
    unet, network = load_unet(student, config.student.unet), teacher.load_network()
    worker = Distiller(config, student, teacher, unet, bridge, network, real, batches)
    worker.optimizers["student"].param_groups[0]["lr"] = 0.0  # scores of a sleeping teacher teach nothing
    torch.manual_seed(0)
    return config, worker


def _measure(worker: Any, submit: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians of steps that take turns. T_make, T_fake and T_student are those of the sequential steps."""
    from raydistill.benchmark.measure import median
    from raydistill.distill.schedule import distillation_step

    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(arguments.steps):
        for overlap in (False, True):
            distillation_step(worker, submit, arguments.fake_updates, overlap)
            found[overlap].append(worker.pop_metrics())

    def of(overlap: bool, name: str) -> float:
        return median([metrics[f"time/{name}"] for metrics in found[overlap]])

    make, fake, student, teacher = (of(False, name) for name in ("make", "fake", "student", "wait_teacher"))
    bound = make + max(fake, teacher) + student
    return {
        "make_s": make,
        "fake_s": fake,
        "student_s": student,
        "teacher_s": teacher,
        "bound_s": bound,
        "sequential_s": of(False, "step"),
        "overlapped_s": of(True, "step"),
        "wait_s": of(True, "wait_teacher"),
        "over_bound": of(True, "step") / bound,
        "speedup": of(False, "step") / of(True, "step"),
    }


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, milliseconds

    columns = (
        "teacher", "T_teacher", "k T_fake", "T_make + T_student", "bound", "overlapped", "over the bound", "sequential",
        "sequential / overlapped",
    )  # fmt: skip
    rows = [
        (
            row["teacher"],
            *(milliseconds(row[name]) for name in ("teacher_s", "fake_s")),
            milliseconds(row["make_s"] + row["student_s"]),
            *(milliseconds(row[name]) for name in ("bound_s", "overlapped_s")),
            f"{row['over_bound']:.3f}",
            milliseconds(row["sequential_s"]),
            f"{row['speedup']:.2f}",
        )
        for row in result["rows"]
    ]
    notes = (
        f"Medians of {result['steps']} steps of {result['batch_size']} samples, k = {result['fake_updates']}. Bound: T_make + "
        "max(k T_fake, T_teacher) + T_student, each measured in the sequential steps, T_teacher from sending a request to "
        "having its answer. A teacher that sleeps is a replica of the real service whose rank sleeps instead of computing: "
        f"it stands for a GPU. The real teacher shares the machine with the trainer. Target: {TARGET}."
    )
    return f"{markdown(columns, rows)}\n\n{notes}"
