"""How many samples a rank's forward takes (`teachers.slice`), by the memory of its kind of GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from raydistill.config.reading import changed, other_drawer
from raydistill.config.schema import Config
from raydistill.planning.gpus import Gpu, known_gpus
from raydistill.planning.kept import find_counts
from raydistill.planning.memory import ROLES, is_whole, room_of, teacher_bytes, whole_bytes


def largest_slice(counts: Any, config: Config, gpu: Gpu, drawer: bool = False) -> int | None:
    """The most samples that fit a rank; None: not even the counted ones do.

    By a straight line through 0 and the counted slice. What is there anyway counts with each sample, so above the counted
    slice it never says too many.

    Args:
        drawer: as in `memory.teacher_bytes`.
    """
    network, room = counts.drawer if drawer else counts.network, room_of(config, "teacher rank", gpu)
    whole = is_whole(counts, config, gpu, drawer)
    needs = (
        whole_bytes(counts, config, drawer) if whole else teacher_bytes(counts, config, config.teachers.shards, drawer)
    )
    if needs > room:
        return None
    return int((room - needs + network.score.peak) * network.samples // network.score.peak)


def with_slice(config: Config) -> Config:
    """With teachers.slice=auto, the largest that fits the planned GPU and that a score request fills.

    A request's samples are spread over the ranks. Each takes them in as few forwards as its memory allows, of equal size.
    Where not even one sample fits it is 1: the check before a launch says so. Other settings stay as they are.

    Raises InputError: see `memory.check_launch`.
    """
    teachers, distill = config.teachers, config.distill
    if teachers.slice != "auto":
        return config
    gpu, roles = known_gpus(config)[config.plan.teacher_gpu], ["network"]
    roles += ["drawer"] if ROLES["drawer rank"].used(config) and other_drawer(config) else []
    rows = -(-distill.batch_size // distill.micro_batches // teachers.shards)  # of a rank
    counted = teachers.counted_slice
    while True:
        config = changed(config, {"teachers": {"slice": counted}})
        most = _most(config, gpu, roles)
        if most is None and counted > 1:
            counted //= 2
            continue
        forwards = -(-rows // (most or 1))
        return changed(config, {"teachers": {"slice": -(-rows // forwards)}})


def _most(config: Config, gpu: Gpu, roles: Sequence[str]) -> int | None:
    """Of all roles that take the service's slices."""
    counts = SimpleNamespace(**find_counts(config, roles))
    found = [largest_slice(counts, config, gpu, drawer=role == "drawer") for role in roles]
    return None if None in found else min(found)
