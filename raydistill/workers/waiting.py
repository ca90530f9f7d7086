"""Who keeps the others waiting: a worker that hangs is named, with its node, before its collective runs into the timeout.

Workers meet in the same order. Before each meeting a worker writes its number to the store of torch's process group. One that
has waited for LONG of `distill.collective_timeout_s` reads who has not come so far. NCCL's own watchdog ends the process
soon after, without a Python error; gloo raises one, which is given the names.

Meetings inside a network, FSDP2's gathers of the fake score's blocks, are not numbered: their latecomers are those of the
last meeting.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import _get_default_store

LONG = 0.8  # of the timeout
_numbers: dict[int, int] = {}  # meetings of this process's worker, by rank
_clock: dict[int, float] = {}  # when the last one began, by rank


def _key(rank: int) -> str:
    return f"raydistill/meeting/{rank}"


@contextmanager
def meeting(rank: int, world: int) -> Iterator[None]:
    """Around a collective of all workers. A RuntimeError that it raises is given the names of those that have not come."""
    number = _numbers[rank] = _numbers.get(rank, 0) + 1
    _clock[rank] = time.monotonic()
    _get_default_store().set(_key(rank), f"{number} {socket.gethostname()}")
    try:
        yield
    except RuntimeError as error:
        if late := latecomers(world, number):
            raise RuntimeError(f"{waits_for(rank, late)}: {error}") from error
        raise


def latecomers(world: int, number: int) -> list[str]:
    """`rank R on node N` of each worker that has not begun so many meetings; empty too where the store is gone."""
    try:
        store, found = _get_default_store(), []
        for rank in range(world):
            value = store.get(_key(rank)).decode() if store.check([_key(rank)]) else "0 unknown"
            count, _, node = value.partition(" ")
            if int(count) < number:
                found.append(f"rank {rank} on node {node}")
        return found
    except RuntimeError:
        return []


def waits_for(rank: int, late: list[str]) -> str:
    return f"worker {rank} waits for {', '.join(late)}, which has not come to the meeting of all workers"


def watch(name: str, rank: int, world: int, timeout_s: float) -> None:
    """Have a thread say, once a meeting, for whom this worker has waited too long; it ends with the process."""
    limit = LONG * timeout_s
    _numbers[rank] = 0  # of this group of workers

    def look() -> None:
        said = 0
        while True:
            time.sleep(min(1.0, limit / 4))
            number = _numbers.get(rank, 0)
            if number == said or time.monotonic() - _clock.get(rank, time.monotonic()) < limit:
                continue
            if late := latecomers(world, number):
                said = number
                print(f"{name}: {waits_for(rank, late)} for {limit:.0f} s (distill.collective_timeout_s)", flush=True)

    threading.Thread(target=look, name="waiting", daemon=True).start()
