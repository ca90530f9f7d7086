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
from typing import Any

SIZES_MB = (0.1, 1, 8, 32, 128, 256)
TARGET_S, TARGET_COPIES = 0.010, 1.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9, help="calls of each kind and size")
    parser.add_argument(
        "--sizes", type=float, nargs="*", default=SIZES_MB, metavar="MB", help="sizes of plain requests"
    )
    parser.add_argument("--no-families", action="store_true", help="leave out the real families' requests")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import ray

    from raydistill.benchmark.idle import IdleRank, idle_service, request_of
    from raydistill.benchmark.measure import ray_cluster
    from raydistill.config.schema import TeacherServiceConfig
    from raydistill.teachers.shard import actor

    requests: dict[str, Any] = {
        f"{size:g} MB": lambda size=size: request_of(int(size * 1e6)) for size in arguments.sizes
    }
    if not arguments.no_families:
        requests |= _families()
    rows = []
    with ray_cluster(4, 4 << 30):
        _use_the_store()
        bare = ray.remote(num_cpus=0.1)(_Bare).remote()
        config = TeacherServiceConfig(shards=1, slice=4, dtype="bfloat16", cpus_per_rank=0.1)
        with idle_service(config) as idle:
            idle.set(0.0, slices=True)
            client, rank = idle.client(), actor(IdleRank).options(num_cpus=0.1).remote(0, 1)
            ray.get(rank.load.remote(str(idle.folder), config.dtype, config.slice, config.threads_per_rank, ("", 0)))
            for name, make in requests.items():
                print(f"{name} …", flush=True)
                rows.append({"request": name} | _measure(make(), client, bare, rank, arguments.repeats))
    return {"rows": rows, "repeats": arguments.repeats}


def _use_the_store() -> None:
    """Fill a part of the object store that the calls then stay within."""
    import numpy as np
    import ray

    part = np.ones(256 << 20, np.uint8)
    kept = [ray.put(part) for _ in range(8)]
    del kept


class _Bare:
    """An actor that is sent arrays, and answers with the latents."""

    def answer(self, payload: dict[str, Any]) -> Any:
        return payload["latents"]


def _families() -> dict[str, Any]:
    """A maker of each real family's request at the paper's batch."""
    from raydistill.config.reading import CONFIGS, load
    from raydistill.distill.networks import guidance_scale
    from raydistill.spaces.meta import open_space

    requests = {}
    for file in sorted((CONFIGS / "teachers").glob("*.yaml")):
        config = load(CONFIGS / f"{file.stem}_sd15.yaml")
        space, batch = open_space(config.teacher.model), config.distill.batch_size
        scale = guidance_scale(config, space)
        layout, shape = space.conditioning_layout, space.latent_shape
        dtype = config.prompts.encoder_dtype
        requests[f"{file.stem}, {batch} samples"] = lambda a=(shape, layout, batch, scale, dtype): _request(*a)
    return requests


def _request(shape: tuple[int, ...], layout: dict[str, Any], batch: int, scale: float, dtype: str) -> Any:
    import torch

    from raydistill.teachers.request import ScoreRequest

    def rows(count: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(count, *part, dtype=getattr(torch, dtype) if kind.is_floating_point else kind)
            for name, (part, kind) in layout.items()
        }

    return ScoreRequest(torch.zeros(batch, *shape), torch.full((batch,), 0.5), rows(batch), rows(1), scale)


def _measure(request: Any, client: Any, bare: Any, rank: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each kind of call, and the bytes that one writes to the object store."""
    import ray

    from raydistill.benchmark.measure import copy_seconds, interleaved

    payload = request.payload()
    nbytes = sum(_nbytes(payload[name]) for name in ("latents", "t", "conditioning", "unconditional"))
    calls = {
        "service": lambda: client.submit(request).result(),
        "bare": lambda: ray.get(bare.answer.remote(payload)),
        "rank": lambda: ray.get(rank.predict_x0.remote(payload)),
    }
    taken = interleaved(calls | {"check": request.payload}, repeats, warm_up=2)
    stored = {f"{name}_stored": _stored(call) for name, call in calls.items()}
    copy = copy_seconds(nbytes)
    return {
        "nbytes": nbytes,
        "answer_nbytes": payload["latents"].nbytes,
        **stored,
        "service_s": taken["service"],
        "bare_s": taken["bare"],
        "rank_s": taken["rank"],
        "check_s": taken["check"],
        "copy_s": copy,
        "added_s": taken["service"] - taken["bare"],
        "added_copies": (taken["service"] - taken["bare"]) / copy,
        "added_to_rank_s": taken["service"] - taken["rank"],
        "added_to_rank_copies": (taken["service"] - taken["rank"]) / copy,
        "gbytes_per_s": nbytes / taken["service"] / 1e9,
    }


def _stored(call: Callable[[], Any]) -> int:
    """Bytes that a call writes to the object store."""
    from raydistill.benchmark.measure import stored_bytes

    before = stored_bytes()
    call()
    return stored_bytes() - before


def _nbytes(wire: Any) -> int:
    if wire is None:
        return 0
    if isinstance(wire, dict):
        return sum(map(_nbytes, wire.values()))
    return wire[1].nbytes if isinstance(wire, tuple) else wire.nbytes


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, megabytes, milliseconds

    columns = (
        "request", "bytes", "answer", "bare actor", "rank directly", "service", "added to the bare actor", "to the rank",
        "of it checking", "one memory copy", "added to the bare actor, in copies", "to the rank", "throughput",
        "into the store: bare actor", "rank", "service",
    )  # fmt: skip
    rows = [
        (
            row["request"],
            *(megabytes(row[name]) for name in ("nbytes", "answer_nbytes")),
            *(
                milliseconds(row[name])
                for name in ("bare_s", "rank_s", "service_s", "added_s", "added_to_rank_s", "check_s", "copy_s")
            ),
            f"{row['added_copies']:.2f}",
            f"{row['added_to_rank_copies']:.2f}",
            f"{row['gbytes_per_s']:.2f} GB/s",
            *(megabytes(row[f"{name}_stored"]) for name in ("bare", "rank", "service")),
        )
        for row in result["rows"]
    ]
    notes = (
        f"Medians of {result['repeats']} calls. Into the store: bytes that one call writes to the object store, counted by Ray; "
        "what is below 100 kB travels in messages, but for the client's requests. Every call has the request there once, put "
        "by the caller; actors read it in shared memory. The answer is there once from the bare actor and the rank; from the "
        "service twice, as the rank's and as the coordinator's. Copies outside the store: a rank's own of the request, slice "
        "by slice and in the teacher's dtype, and of the answer, out of the network's output; the coordinator's, where it "
        "joins the parts of several ranks (here is one); in the client none. Targets: "
        f"{1e3 * TARGET_S:g} ms added at 8 MB, {TARGET_COPIES} copies added at 128 MB."
    )
    return f"{markdown(columns, rows)}\n\n{notes}"
