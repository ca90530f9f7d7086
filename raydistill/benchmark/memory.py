"""Peak memory of every role against the plan, and of loading a network in ZeRO-3 shards.

Every role runs in a process of its own on the CPU; what it holds beyond its imports is compared with the bytes of tensors
that the planner counts. The network is generated, random, and large enough that tensors outweigh the interpreter's own noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from raydistill.background import in_background
from raydistill.benchmark.measure import answer, in_processes, markdown, option, resident
from raydistill.benchmark.models import score_inputs, zero3_group
from raydistill.config.reading import load
from raydistill.config.schema import Config
from raydistill.distillation.schedule import distillation_step
from raydistill.planning import counting
from raydistill.spaces import load_space
from raydistill.spaces.meta import numel, open_space
from raydistill.storage.resolve import local_path

TOLERANCE = 0.1
CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--width", 10, "heads of 64 of the generated transformer")
    option(parser, "--layers", 12, "its blocks")
    option(parser, "--batch-size", 4, "samples of a trainer's step and of a score request")
    option(parser, "--shards", [2, 4], "sizes of ZeRO-3 groups")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raydistill-memory-") as folder:
        generate(Path(folder), arguments.width, arguments.layers)
        common = {"teacher": folder, "batch_size": arguments.batch_size}
        rows = [_processes(1, {"role": role, **common})[0] for role in ("trainer", "teacher")]
        loads = []
        for shards in arguments.shards:
            print(f"ZeRO-3, {shards} shards …", flush=True)
            worst = max(_processes(shards, {"role": "rank", **common}), key=lambda rank: rank["measured"])
            loads.append(worst | {"shards": shards})
    return {"rows": rows, "loads": loads, "batch_size": arguments.batch_size}


def generate(folder: Path, heads: int, layers: int) -> None:
    """A FLUX teacher's folder: the miniature world's with a larger, random transformer."""
    shutil.copytree(local_path("shapes:flux"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "transformer/config.json").read_text())
    config |= {"num_attention_heads": heads, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    config |= {"num_layers": layers // 3, "num_single_layers": layers - layers // 3}
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")


def _processes(world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of `world` processes measures; ranks of a group meet in a store of this one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tasks = [settings | {"rank": rank, "world": world, "port": store.port} for rank in range(world)]
    few = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}  # the allocator keeps little
    return in_processes(__name__, tasks, OMP_NUM_THREADS="1", **few)


# -- inside such a process --------------------------------------------------------------------------------


@contextlib.contextmanager
def peak(*kinds: str) -> Iterator[SimpleNamespace]:
    """`bytes`: the most resident memory of these kinds in the block, above what it was before; sampled.

    With RssFile the pages of mapped files count, which is where weights lie that a network on the CPU has loaded.
    """
    before, end, found = resident(kinds=kinds), threading.Event(), SimpleNamespace(bytes=0)

    def sample() -> None:
        while not end.wait(0.002):
            found.bytes = max(found.bytes, resident(kinds=kinds) - before)

    sampling = in_background(sample)
    try:
        yield found
    finally:
        end.set()
        sampling.result()
        found.bytes = max(found.bytes, resident(kinds=kinds) - before)


def measure(role: str, teacher: str, batch_size: int, **of_rank: int) -> dict[str, Any]:
    """`planned` and `measured` peak bytes of a role.

    Args:
        teacher: its folder.
        of_rank: rank, world and port of the store of a ZeRO-3 group.
    """
    if role == "rank":
        return {"role": role} | _rank(teacher, **of_rank)
    keys = {"teacher.model": teacher, "bridge.checkpoint": "null", "fake_score.updates": 1}
    keys |= {"distill.batch_size": batch_size, "teachers.slice": batch_size}
    config = load(overrides=[f"{key}={value}" for key, value in keys.items()])
    return {"role": role} | _trainer(config) if role == "trainer" else {"role": "teacher, one shard"} | _teacher(config)


def _trainer(config: Config) -> dict[str, Any]:
    """Two steps of the real Distiller; the plan is counting.py's."""
    models = config.student.model, config.teacher.model
    planned = counting.count_trainer(config, *map(open_space, models)).peak
    student, teacher = (load_space(local_path(model)) for model in models)
    _warm_up()
    with peak("RssAnon", "RssFile") as found:
        worker = counting.distiller(config, student, teacher, config.distill.batch_size, "cpu")
        for _ in range(2):
            distillation_step(worker, lambda made: SimpleNamespace(result=made.x_t.clone), 1, overlap=True)
    return {"planned": planned, "measured": found.bytes}


def _teacher(config: Config) -> dict[str, Any]:
    """A score request on a whole network."""
    counted = counting.count_teacher(config, open_space(config.teacher.model), 3.5)
    teacher = load_space(config.teacher.model)
    inputs = score_inputs(teacher, config.teachers.slice)
    _warm_up()
    with peak("RssAnon", "RssFile") as found, torch.no_grad():
        teacher.predict_x0(teacher.load_network(), *inputs, 3.5)
    return {"planned": 4 * (counted.parameters + counted.buffers) + counted.score.peak, "measured": found.bytes}


def _rank(teacher: str, rank: int, world: int, port: int) -> dict[str, Any]:
    """One rank of a ZeRO-3 group while it loads, against its share of the network and the largest layer."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    with zero3_group(rank, world, store, CPU) as zero3:
        network, space = open_space(teacher).load_network(), load_space(teacher)
        layer = max(map(numel, (*network.transformer_blocks, *network.single_transformer_blocks)))
        _warm_up()
        torch.distributed.barrier()
        with peak("RssAnon") as found:
            engine = zero3.load_partitioned(space, torch.float32, CPU, rank, world)
            torch.distributed.barrier()
    planned, kept = 4 * (numel(network) / world + layer), 4 * zero3.partition_numel(engine)
    return {"numel": numel(network), "layer": layer, "held": kept, "planned": planned, "measured": found.bytes}


def _warm_up() -> None:
    """Import and start what a first step would, on next to nothing, so that it is not counted as the role's memory."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with tempfile.TemporaryDirectory() as folder:
        tiny = diffusers.UNet2DModel(8, 3, 3, block_out_channels=(32, 32), layers_per_block=1, **blocks)
        tiny.save_pretrained(folder)
        tiny = diffusers.UNet2DModel.from_pretrained(folder)
    optimizer = torch.optim.AdamW(tiny.parameters())
    tiny(torch.zeros(1, 3, 8, 8), 1).sample.sum().backward()
    optimizer.step()


def table(result: dict[str, Any]) -> str:
    rows, loads = ([row | {"ratio": row["measured"] / row["planned"]} for row in result[k]] for k in ("rows", "loads"))
    for row in loads:
        row |= {"network": 4 * row["numel"], "share": 4 * row["numel"] / row["shards"], "largest": 4 * row["layer"]}
    roles = markdown(
        "role | planned | measured peak | measured / planned",
        "{role} | {planned:MB} | {measured:MB} | {ratio:.3f}",
        rows,
    )
    shards = markdown(
        "shards | network | its share | largest layer | share + layer | measured load peak, worst rank | ratio",
        "{shards} | {network:MB} | {share:MB} | {largest:MB} | {planned:MB} | {measured:MB} | {ratio:.3f}",
        loads,
    )
    notes = (
        f"Resident memory beyond imports, float32 on the CPU, {result['batch_size']} samples; the plan counts live tensors, the "
        "process also holds what the allocator keeps. While loading in shards, pages of mapped files are not counted: the "
        f"kernel shares them among ranks and can drop them. Target: within {TOLERANCE:.0%}."
    )
    return "\n\n".join([roles, shards, notes])


if __name__ == "__main__":
    answer(measure)
