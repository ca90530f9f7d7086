"""What the teacher service adds to a bare Ray actor call, for requests of 0.1 to 256 MB and of every real family.

The rank has no network: it cuts, converts and answers. The bare actor is sent the same arrays and answers with as many
bytes, but reads none of them; a rank of its own is also called directly, without client, Serve and coordinator. Calls take
turns, so all see the same machine, and the object store's memory was used before, as in a run that lasts: its first use
costs the kernel several copies, whichever call happens to meet it. What each call writes to the object store is counted by
Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state
from ray.actor import ActorHandle
from torch.utils._pytree import tree_leaves

from raydistill.benchmark.idle import IdleRank, idle_service, request_of
from raydistill.benchmark.measure import copy_seconds, interleaved, markdown, option
from raydistill.benchmark.models import score_inputs
from raydistill.config.networks import TeacherServiceConfig
from raydistill.config.reading import CONFIGS, load
from raydistill.distillation.networks import guidance_scale
from raydistill.driver.cluster import connected
from raydistill.spaces.meta import open_space
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import ScoreRequest
from raydistill.teachers.shard import actor

SIZES_MB = (0.1, 1, 8, 32, 128, 256)
TARGET_S, TARGET_COPIES = 0.010, 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--repeats", 9, "calls of each kind and size")
    option(parser, "--sizes", SIZES_MB, "sizes of plain requests", metavar="MB")
    option(parser, "--no-families", False, "leave out the real families' requests")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    requests = {f"{size:g} MB": partial(request_of, int(size * 1e6)) for size in arguments.sizes}
    if not arguments.no_families:
        for file in sorted((CONFIGS / "teachers").glob("*.yaml")):
            batch, request = _of_family(f"{file.stem}_sd15")
            requests[f"{file.stem}, {batch} samples"] = request
    rows = []
    with connected(num_cpus=4, object_store_memory=4 << 30, log_to_driver=False):
        _use_the_store()
        bare = ray.remote(num_cpus=0.1)(_Bare).remote()
        config = TeacherServiceConfig(shards=1, slice=4, dtype="bfloat16", cpus_per_rank=0.1)
        with idle_service(config) as idle:
            idle.set(0.0, slices=True)
            client, rank = idle.client(), actor(IdleRank).options(num_cpus=0.1).remote(0, 1)
            ray.get(rank.load.remote(str(idle.folder), config, None))
            for name, make in requests.items():
                print(f"{name} …", flush=True)
                rows.append({"request": name} | _measure(make(), client, bare, rank, arguments.repeats))
    return {"rows": rows, "repeats": arguments.repeats}


def _use_the_store() -> None:
    """Fill a part of the object store that the calls then stay within."""
    block = np.ones(256 << 20, np.uint8)
    kept = [ray.put(block) for _ in range(8)]
    del kept


class _Bare:
    """An actor that is sent arrays, and answers with the latents."""

    def answer(self, payload: dict[str, Any]) -> Any:
        return payload["latents"]


def _of_family(name: str) -> tuple[int, Callable[[], ScoreRequest]]:
    """Batch and maker of the score request of a configuration: of a real family at the paper's batch."""
    config = load(CONFIGS / f"{name}.yaml")
    space, batch = open_space(config.teacher.model), config.distill.batch_size
    scale, dtype = guidance_scale(config, space), getattr(torch, config.prompts.encoder_dtype)
    return batch, lambda: ScoreRequest(*score_inputs(space, batch, dtype), scale)


def _measure(
    request: ScoreRequest, client: TeacherClient, bare: ActorHandle, rank: ActorHandle, repeats: int
) -> dict[str, float]:
    """Median seconds of each kind of call, and the bytes that one writes to the object store."""
    payload = request.payload()
    sent = tree_leaves([payload[name] for name in ("latents", "t", "conditioning", "unconditional")])
    nbytes = sum(array.nbytes for array in sent if isinstance(array, np.ndarray))
    calls = {
        "service": lambda: client.submit(request).result(),
        "bare": lambda: ray.get(bare.answer.remote(payload)),
        "rank": lambda: ray.get(rank.predict_x0.remote(payload)),
    }
    taken = interleaved(calls | {"check": request.payload}, repeats, warm_up=2)
    stored = {f"{name}_stored": _stored(call) for name, call in calls.items()}
    copy, added, to_rank = copy_seconds(nbytes), taken["service"] - taken["bare"], taken["service"] - taken["rank"]
    return {
        "nbytes": nbytes,
        "answer_nbytes": payload["latents"].nbytes,
        **stored,
        **{f"{name}_s": seconds for name, seconds in taken.items()},
        "copy_s": copy,
        "added_s": added,
        "added_copies": added / copy,
        "added_to_rank_s": to_rank,
        "added_to_rank_copies": to_rank / copy,
        "gbytes_per_s": nbytes / taken["service"] / 1e9,
    }


def _stored(call: Callable[[], Any]) -> int:
    """Bytes that a call writes to the cluster's object stores, as Ray counts them."""

    def so_far() -> int:
        return get_memory_info_reply(state).store_stats.cumulative_created_bytes

    before = so_far()
    call()
    return so_far() - before


def table(result: dict[str, Any]) -> str:
    columns = (
        "request | bytes | answer | bare actor | rank directly | service | added to the bare actor | to the rank | "
        "of it checking | one memory copy | added to the bare actor, in copies | to the rank | throughput | "
        "into the store: bare actor | rank | service"
    )
    cells = (
        "{request} | {nbytes:MB} | {answer_nbytes:MB} | {bare_s:ms} | {rank_s:ms} | {service_s:ms} | {added_s:ms} | "
        "{added_to_rank_s:ms} | {check_s:ms} | {copy_s:ms} | {added_copies:.2f} | {added_to_rank_copies:.2f} | "
        "{gbytes_per_s:.2f} GB/s | {bare_stored:MB} | {rank_stored:MB} | {service_stored:MB}"
    )
    notes = (
        f"Medians of {result['repeats']} calls. Into the store: bytes that one call writes to the object store, counted by Ray; "
        "what is below 100 kB travels in messages, but for the client's requests. Every call has the request there once, put "
        "by the caller; actors read it in shared memory. The answer is there once from the bare actor and the rank; from the "
        "service twice, as the rank's and as the coordinator's. Copies outside the store: a rank's own of the request, slice "
        "by slice and in the teacher's dtype, and of the answer, out of the network's output; the coordinator's, where it "
        "joins the parts of several ranks (here is one); in the client none. Targets: "
        f"{1e3 * TARGET_S:g} ms added at 8 MB, {TARGET_COPIES} copies added at 128 MB."
    )
    return f"{markdown(columns, cells, result['rows'])}\n\n{notes}"
