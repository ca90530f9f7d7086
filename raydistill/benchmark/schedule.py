"""A step of the real distillation loop against its critical path; sequential and in one process against overlapped.

Trainer: the miniature world's networks, the run's own `distillation_step`. Simulated teachers are replicas of the service
that sleep, which stand for GPUs; the real miniature teacher computes on the second core. It is also put into the trainer's
process, as in a trainer without any service. The kinds of steps take turns.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from raydistill.benchmark.idle import idle_service
from raydistill.benchmark.measure import cores, markdown, median, milliseconds, option
from raydistill.benchmark.models import default_trainer
from raydistill.config.networks import TeacherServiceConfig
from raydistill.distillation.local import LocalScores
from raydistill.distillation.schedule import Submit, distillation_step
from raydistill.distillation.updates import Distiller
from raydistill.driver.cluster import connected
from raydistill.teachers import service
from raydistill.teachers.client import TeacherClient
from raydistill.workers.assembly import Teachers

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TARGET = 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--steps", 5, "steps of each kind and latency")
    option(parser, "--batch-size", 8, "samples per student update")
    option(parser, "--fake-updates", 2, "fake-score updates per student update (k)")
    option(parser, "--factors", FACTORS, "latencies in k fake updates")
    option(parser, "--no-real-teacher", False, "simulated teachers only")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    worker, local = default_trainer(arguments.batch_size, arguments.fake_updates)
    common, steps, rows = (local.unconditional, local.guidance_scale), arguments.steps, []
    with connected(num_cpus=4, log_to_driver=False):
        with idle_service(TeacherServiceConfig(shards=1, slice=4, cpus_per_rank=0.1)) as idle:
            submit = Teachers(idle.client(), *common)
            idle.set(0.0)
            fake = _measure(worker, submit, steps)["fake_s"]  # k updates; also warms up
            for factor in arguments.factors:
                idle.set(factor * fake)
                print(f"sleeping teacher, {factor:g} times the fake updates …", flush=True)
                row = {"teacher": f"sleeps {factor:g} x", "sleeps_s": factor * fake}
                rows.append(row | _measure(worker, submit, steps))
        if not arguments.no_real_teacher:
            print("real miniature teacher …", flush=True)
            settings = TeacherServiceConfig(shards=1, slice=arguments.batch_size, cpus_per_rank=0.1)
            service.start(local.space.folder, settings, "real")
            try:
                submit = Teachers(TeacherClient("real", settings), *common)
                _measure(worker, submit, 1, local)
                row = {"teacher": "real miniature", "sleeps_s": None} | _measure(worker, submit, steps, local)
            finally:
                service.stop("real")
            rows.append(row | _on_all_cores(worker, local, steps))
    return {"rows": rows} | {name: getattr(arguments, name) for name in ("steps", "batch_size", "fake_updates")}


def _measure(worker: Distiller, submit: Submit, steps: int, local: LocalScores | None = None) -> dict[str, float]:
    """Medians of steps that take turns. T_make, T_fake and T_student are those of the sequential steps.

    Args:
        local: a teacher in this process, whose sequential steps are measured too.
    """
    kinds = {"sequential": (submit, False), "overlapped": (submit, True)}
    kinds |= {"in_process": (local, False)} if local is not None else {}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(steps):
        for kind, (scores, overlap) in kinds.items():
            found[kind].append(_step(worker, scores, overlap))

    def of(kind: str, name: str) -> float:
        return median(metrics[f"time/{name}"] for metrics in found[kind])

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


def _step(worker: Distiller, submit: Submit, overlap: bool) -> dict[str, float]:
    """The metrics of one step."""
    distillation_step(worker, submit, worker.config.fake_score.updates, overlap)
    return worker.pop_metrics()


def _on_all_cores(worker: Distiller, local: LocalScores, steps: int) -> dict[str, float]:
    """Seconds of a step with the teacher in this process, on as many threads as there are cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    taken = [_step(worker, local, overlap=False)["time/step"] for _ in range(1 + steps)]
    torch.set_num_threads(threads)
    return {"in_process_all_s": median(taken[1:]), "cores": cores()}  # the first starts the threads


def table(result: dict[str, Any]) -> str:
    columns = (
        "teacher | T_teacher | k T_fake | T_make + T_student | bound | overlapped | over the bound | sequential | "
        "sequential / overlapped | in process | in process / overlapped"
    )
    cells = (
        "{teacher} | {teacher_s:ms} | {fake_s:ms} | {own_s:ms} | {bound_s:ms} | {overlapped_s:ms} | {over_bound:.3f} | "
        "{sequential_s:ms} | {speedup:.2f} | {in_process_s:ms} | {in_process:.2f}"
    )
    rows, all_cores = [], ""
    for row in result["rows"]:
        row = {"own_s": row["make_s"] + row["student_s"], "in_process_s": None, "in_process": None} | row
        if row["in_process_s"] is not None:
            row["in_process"] = row["in_process_s"] / row["overlapped_s"]
        if (taken := row.get("in_process_all_s")) is not None:
            all_cores += (
                f" On {row['cores']} threads, when the service was gone, such an update takes {milliseconds(taken)}, "
                f"{taken / row['overlapped_s']:.2f} of the overlapped one."
            )
        rows.append(row)
    notes = (
        f"Medians of {result['steps']} updates of {result['batch_size']} samples, k = {result['fake_updates']}. Bound: T_make + "
        "max(k T_fake, T_teacher) + T_student, each measured in the sequential steps, T_teacher from sending a request to "
        "having its answer. A teacher that sleeps is a replica of the real service whose rank sleeps instead of computing: "
        "it stands for a GPU. The real teacher shares the machine with the trainer. Sequential steps ask the service too; in "
        f"process: the teacher's network in the trainer, and no service, both on one thread.{all_cores} Target: {TARGET}."
    )
    return f"{markdown(columns, cells, rows)}\n\n{notes}"
