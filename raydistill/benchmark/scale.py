"""Throughput of 1 to 32 simulated teacher replicas, and of 1 to 8 simulated trainers.

Replicas are the real service's, with ranks that sleep instead of computing. One driver keeps two requests a replica under
way. Simulated trainers are actors that send a request, sleep for as long as their fake updates would take, wait for the
answer and sleep for the student's update.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import ray

from raydistill.benchmark.idle import IdleService, idle_service, request_of
from raydistill.benchmark.measure import markdown, milliseconds, option, timed
from raydistill.config.networks import TeacherServiceConfig
from raydistill.driver.cluster import connected
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import ScoreRequest

TARGET = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--replicas", [1, 2, 4, 8, 16, 32], "numbers of replicas")
    option(parser, "--seconds", 1.0, "a replica's work on one request")
    option(parser, "--requests", 4, "requests for each replica")
    option(parser, "--megabytes", 8.0, "size of a request")
    option(parser, "--trainers", [1, 2, 4, 8], "numbers of trainers")
    option(parser, "--steps", 6, "steps of each simulated trainer")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    replicas, trainers = [], []
    settings = TeacherServiceConfig(shards=1, cpus_per_rank=0.01)
    nbytes = int(arguments.megabytes * 1e6)
    shared = max((count for count in arguments.replicas if count <= max(arguments.trainers, default=0)), default=0)
    with connected(num_cpus=16, object_store_memory=4 << 30, log_to_driver=False):
        for count in arguments.replicas:
            print(f"{count} replicas …", flush=True)
            with idle_service(settings, f"idle-{count}", count) as idle:
                client, request = idle.client(), request_of(nbytes)
                _stream(client, request, 4 * count, 2 * count)  # every replica once, for its connections
                idle.set(arguments.seconds)
                row = {"replicas": count} | _stream(client, request, arguments.requests * count, 2 * count)
                replicas.append(row | {"of_linear": row["per_s"] * arguments.seconds / count})
                if count == shared:
                    trainers = [_trainers(n, idle, nbytes, arguments) for n in arguments.trainers]
    return {"replicas": replicas, "trainers": [row | {"replicas": shared} for row in trainers]} | {
        name: getattr(arguments, name) for name in ("seconds", "requests", "megabytes", "steps")
    }


def _stream(client: TeacherClient, request: ScoreRequest, total: int, in_flight: int) -> dict[str, float]:
    """Requests per second of one driver that keeps `in_flight` under way.

    Also the CPU seconds that each took of the driver, all threads, and of Serve's router alone.
    """
    client.describe()  # starts the router
    started, cpu, router = time.perf_counter(), time.process_time(), _router_cpu()
    pending = [client.submit(request) for _ in range(min(in_flight, total))]
    for i in range(total):
        pending[0].result()
        pending.pop(0)
        if i + in_flight < total:
            pending.append(client.submit(request))
    return {
        "per_s": total / (time.perf_counter() - started),
        "driver_cpu_s": (time.process_time() - cpu) / total,
        "router_cpu_s": (_router_cpu() - router) / total,
    }


def _router_cpu() -> float:
    """CPU seconds so far of Serve's router, which is one thread of the process that asks."""
    (router,) = (thread for thread in threading.enumerate() if "_run_router_event_loop" in thread.name)
    return time.clock_gettime(time.pthread_getcpuclockid(router.ident))


class _Trainer:
    """A worker whose own work is sleep."""

    def __init__(self, client: TeacherClient, nbytes: int) -> None:
        self.client, self.request = client, request_of(nbytes)

    def steps(self, count: int, fake_s: float, student_s: float) -> tuple[float, float]:
        """(seconds in all, seconds spent waiting for teachers)"""
        started, waited = time.perf_counter(), 0.0
        for _ in range(count):
            pending = self.client.submit(self.request)
            time.sleep(fake_s)
            waited += timed(pending.result)
            time.sleep(student_s)
        return time.perf_counter() - started, waited


def _trainers(count: int, idle: IdleService, nbytes: int, arguments: argparse.Namespace) -> dict[str, float]:
    """`count` trainers that share the replicas; their fake updates take a fifth longer than a request."""
    print(f"{count} trainers …", flush=True)
    fake, student = 1.2 * arguments.seconds, 0.3 * arguments.seconds
    actors = [ray.remote(num_cpus=0.01)(_Trainer).remote(idle.client(i / count), nbytes) for i in range(count)]
    ray.get([actor.steps.remote(1, 0.0, 0.0) for actor in actors])
    taken = ray.get([actor.steps.remote(arguments.steps, fake, student) for actor in actors])
    for actor in actors:
        ray.kill(actor)
    per_s = count * arguments.steps / max(seconds for seconds, _ in taken)
    return {
        "trainers": count,
        "per_s": per_s,
        "waited_s": sum(waited for _, waited in taken) / (count * arguments.steps),
        "of_linear": per_s * (fake + student) / count,
    }


def table(result: dict[str, Any]) -> str:
    replicas = markdown(
        "replicas | requests/s | of linear | driver's CPU a request | of it Serve's router",
        "{replicas} | {per_s:.2f} | {of_linear:.1%} | {driver_cpu_s:ms} | {router_cpu_s:ms}",
        result["replicas"],
    )
    trainers = markdown(
        "trainers | replicas | updates/s | of linear | wait for teachers an update",
        "{trainers} | {replicas} | {per_s:.2f} | {of_linear:.1%} | {waited_s:ms}",
        result["trainers"],
    )
    notes = (
        f"Simulated: a replica sleeps {result['seconds']:g} s a request of {result['megabytes']:g} MB, and stands for a GPU; "
        f"{result['requests']} requests a replica, {result['steps']} updates a trainer. Linear: replicas / "
        f"{result['seconds']:g} s, and trainers / ({1.5 * result['seconds']:g} s of their own sleep). All processes share "
        f"this machine's cores. Target: {TARGET:.0%}."
    )
    return "\n\n".join([replicas, trainers, notes, *map(_saturation, result["replicas"][-1:])])


def _saturation(row: dict[str, float]) -> str:
    """Where the process that asks would be full, from the CPU seconds that its requests took."""
    driver, router = row["driver_cpu_s"], row["router_cpu_s"]
    return (
        f"With {row['replicas']} replicas such a request took {milliseconds(driver)} of the driver's CPU, {milliseconds(router)} of "
        f"them in Serve's router, which is one thread of that process: one core of the driver is full at {1 / driver:.0f} "
        f"requests/s, the router's thread at {1 / router:.0f}. In a run each trainer is such a driver, with a router of its own, "
        f"and an update is one request for each micro-batch: at most {1 / driver:.0f} / distill.micro_batches updates/s a trainer."
    )
