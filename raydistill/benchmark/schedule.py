"""A step of the real distillation loop against its critical path; sequential and in one process against overlapped.

Trainer: the miniature world's networks, the run's own `distillation_step`. Simulated teachers are replicas of the service
that sleep, which stand for GPUs; the real miniature teacher computes on the second core. It is also put into the trainer's
process, as in a trainer without any service. The kinds of steps take turns.
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
    from raydistill.config.schema import TeacherServiceConfig
    from raydistill.data.encode import TextEncoder
    from raydistill.distill.local import LocalScores
    from raydistill.distill.networks import guidance_scale
    from raydistill.teachers import service
    from raydistill.teachers.client import TeacherClient
    from raydistill.workers.parts import Teachers as Submit

    torch.set_num_threads(1)
    config, worker = trainer(arguments.batch_size, arguments.fake_updates)
    space = worker.teacher_space
    empty, scale, rows = TextEncoder(space).encode_unconditional(), guidance_scale(config, space), []
    with ray_cluster(4):
        with idle_service(TeacherServiceConfig(shards=1, slice=4, cpus_per_rank=0.1)) as idle:
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
            settings = TeacherServiceConfig(shards=1, slice=arguments.batch_size, cpus_per_rank=0.1)
            local = LocalScores(space, space.load_network(), empty, scale)
            service.start(space.folder, settings, "real")
            try:
                submit = Submit(TeacherClient("real", settings), empty, scale)
                _measure(worker, submit, argparse.Namespace(**vars(arguments) | {"steps": 1}), local)
                row = {"teacher": "real miniature", "sleeps_s": None} | _measure(worker, submit, arguments, local)
            finally:
                service.stop("real")
            rows.append(row | _on_all_cores(worker, local, arguments))
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
    from raydistill.config.reading import load
    from raydistill.data.encode import TextEncoder
    from raydistill.data.prompts import training_prompts
    from raydistill.distill.build import build_distiller
    from raydistill.distill.networks import load_real, load_unet
    from raydistill.spaces import load_space
    from raydistill.storage.resolve import resolve

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
    worker = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=unet,
        bridge=bridge,
        fake_network=network,
        source=batches,
        real=real,
    )
    worker.gradients.optimizers["student"].param_groups[0]["lr"] = 0.0  # scores of a sleeping teacher teach nothing
    torch.manual_seed(0)
    return config, worker


def _measure(worker: Any, submit: Any, arguments: argparse.Namespace, local: Any = None) -> dict[str, float]:
    """Medians of steps that take turns. T_make, T_fake and T_student are those of the sequential steps.

    Args:
        local: a teacher in this process, whose sequential steps are measured too.
    """
    from raydistill.benchmark.measure import median
    from raydistill.distill.schedule import distillation_step

    kinds = {"sequential": (submit, False), "overlapped": (submit, True)}
    kinds |= {"in_process": (local, False)} if local is not None else {}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.steps):
        for kind, (scores, overlap) in kinds.items():
            distillation_step(worker, scores, arguments.fake_updates, overlap)
            found[kind].append(worker.pop_metrics())

    def of(kind: str, name: str) -> float:
        return median([metrics[f"time/{name}"] for metrics in found[kind]])

    make, fake, student, teacher = (of("sequential", name) for name in ("make", "fake", "student", "wait_teacher"))
    bound, overlapped = make + max(fake, teacher) + student, of("overlapped", "step")
    return {
        "make_s": make,
        "fake_s": fake,
        "student_s": student,
        "teacher_s": teacher,
        "bound_s": bound,
        **{f"{kind}_s": of(kind, "step") for kind in kinds},
        "wait_s": of("overlapped", "wait_teacher"),
        "over_bound": overlapped / bound,
        "speedup": of("sequential", "step") / overlapped,
    }


def _on_all_cores(worker: Any, local: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step with the teacher in this process, on as many threads as there are cores."""
    import torch

    from raydistill.benchmark.measure import cores, median
    from raydistill.distill.schedule import distillation_step

    threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(cores())
    for _ in range(1 + arguments.steps):  # the first starts the threads
        distillation_step(worker, local, arguments.fake_updates, overlap=False)
        taken.append(worker.pop_metrics()["time/step"])
    torch.set_num_threads(threads)
    return {"in_process_all_s": median(taken[1:]), "cores": cores()}


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, milliseconds

    columns = (
        "teacher", "T_teacher", "k T_fake", "T_make + T_student", "bound", "overlapped", "over the bound", "sequential",
        "sequential / overlapped", "in process", "in process / overlapped",
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
            *_in_process(row),
        )
        for row in result["rows"]
    ]
    notes = (
        f"Medians of {result['steps']} steps of {result['batch_size']} samples, k = {result['fake_updates']}. Bound: T_make + "
        "max(k T_fake, T_teacher) + T_student, each measured in the sequential steps, T_teacher from sending a request to "
        "having its answer. A teacher that sleeps is a replica of the real service whose rank sleeps instead of computing: "
        "it stands for a GPU. The real teacher shares the machine with the trainer. Sequential steps ask the service too; in "
        f"process: the teacher's network in the trainer, and no service, both on one thread.{_all_cores(result)} Target: {TARGET}."
    )
    return f"{markdown(columns, rows)}\n\n{notes}"


def _in_process(row: dict[str, Any]) -> tuple[str, str]:
    from raydistill.benchmark.measure import milliseconds

    if "in_process_s" not in row:
        return "–", "–"
    return milliseconds(row["in_process_s"]), f"{row['in_process_s'] / row['overlapped_s']:.2f}"


def _all_cores(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import milliseconds

    return "".join(
        f" On {row['cores']} threads, when the service was gone, such a step takes {milliseconds(row['in_process_all_s'])}, "
        f"{row['in_process_all_s'] / row['overlapped_s']:.2f} of the overlapped one."
        for row in result["rows"]
        if "in_process_all_s" in row
    )
