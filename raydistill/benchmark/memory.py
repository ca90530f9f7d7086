"""Peak memory of every role against the plan, and of loading a network in ZeRO-3 shards.

Every role runs in a process of its own on the CPU; what it holds beyond its imports is compared with the bytes of tensors
that the planner counts. The network is generated, random, and large enough that tensors outweigh the interpreter's own noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from raydistill.storage.atomic import replace_text

TOLERANCE = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, default=10, help="heads of 64 of the generated transformer")
    parser.add_argument("--layers", type=int, default=12, help="its blocks")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a trainer's step and of a score request")
    parser.add_argument("--shards", type=int, nargs="*", default=[2, 4], help="sizes of ZeRO-3 groups")


class Peak:
    """Context that samples this process's resident memory; `bytes` is the most above what it was before.

    Args:
        mapped: count pages of mapped files, which is where weights lie that a network on the CPU has loaded.
    """

    def __init__(self, mapped: bool) -> None:
        from raydistill.benchmark.measure import resident

        self._resident = functools.partial(resident, kinds=("RssAnon", "RssFile") if mapped else ("RssAnon",))

    def __enter__(self) -> Peak:
        self._end = threading.Event()
        self._before = self.bytes = self._resident()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._end.wait(0.002):
            self.bytes = max(self.bytes, self._resident())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._resident()) - self._before


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raydistill-memory-") as folder:
        folders = generate(Path(folder), arguments.width, arguments.layers)
        common = {**folders, "batch_size": arguments.batch_size}
        rows = [_processes(1, {"role": role, **common})[0] for role in ("trainer", "teacher")]
        loads = [_load(shards, common) for shards in arguments.shards]
    return {"rows": rows, "loads": loads, "batch_size": arguments.batch_size}


def generate(folder: Path, heads: int, layers: int) -> dict[str, str]:
    """A student's and a FLUX teacher's folder: the miniature world's with a larger, random transformer."""
    import shutil

    import torch
    from diffusers import FluxTransformer2DModel

    from raydistill.storage.resolve import local_path

    teacher, student = folder / "teacher", local_path("shapes:sd15")
    shutil.copytree(local_path("shapes:flux"), teacher)
    config = json.loads((teacher / "transformer/config.json").read_text())
    config |= {"num_attention_heads": heads, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    config |= {"num_layers": layers // 3, "num_single_layers": layers - layers // 3}
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config(config).save_pretrained(teacher / "transformer")
    return {"teacher": str(teacher), "student": str(student)}


def _load(shards: int, common: dict[str, Any]) -> dict[str, Any]:
    """The worst rank of a group, against its share of the network."""
    print(f"ZeRO-3, {shards} shards …", flush=True)
    with tempfile.TemporaryDirectory() as meeting:
        ranks = _processes(shards, {"role": "rank", "meeting": meeting, **common})
    return max(ranks, key=lambda rank: rank["measured"]) | {"shards": shards}


def _processes(count: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run this module `count` times at once, as ranks 0 … count - 1; what each prints last."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "raydistill.benchmark.memory",
                json.dumps(settings | {"rank": rank, "world": count}),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in range(count)
    ]
    results = [worker.communicate() for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"the process of the {settings['role']} failed; see above")
    return [json.loads(text.splitlines()[-1]) for text, _ in results]


# -- inside such a process --------------------------------------------------------------------------------


def _trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps of the real Distiller; the plan is counting.py's."""
    import itertools

    import numpy as np
    import torch

    from raydistill.bridge.model import Bridge
    from raydistill.distill.batches import Real
    from raydistill.distill.schedule import distillation_step
    from raydistill.distill.updates import build_distiller
    from raydistill.planning import counting
    from raydistill.spaces import meta

    config = _config(settings)
    planned = counting.count_trainer(
        config, meta.open_space(settings["student"]), meta.open_space(settings["teacher"])
    ).peak
    student, teacher = _spaces(settings)
    batch = settings["batch_size"]
    columns = {
        f"{role}.{name}": np.zeros((batch, *shape), torch.empty(0, dtype=kind).numpy().dtype)
        for role, space in (("student", student), ("teacher", teacher))
        for name, (shape, kind) in space.conditioning_layout.items()
    }
    conditioning = {
        name: torch.zeros(1, *shape, dtype=kind) for name, (shape, kind) in teacher.conditioning_layout.items()
    }
    _warm_up()
    with Peak(mapped=True) as peak:
        worker = build_distiller(
            config,
            student_space=student,
            teacher_space=teacher,
            student=student.load_network(),
            bridge=Bridge.create(student, teacher, config.bridge),
            fake_network=teacher.load_network(),
            source=({"sample_id": np.arange(batch) + i * batch, **columns} for i in itertools.count()),
            real=Real(torch.randn(1, *teacher.latent_shape), conditioning, torch.zeros(1, dtype=torch.long)),
        )

        def submit(made: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(result=lambda: torch.zeros_like(made.x_t))

        for _ in range(2):
            distillation_step(worker, submit, 1, overlap=True)
    return {"role": "trainer", "planned": planned, "measured": peak.bytes}


def _teacher(settings: dict[str, Any]) -> dict[str, Any]:
    """A score request on a whole network."""
    import torch

    from raydistill.planning import counting
    from raydistill.spaces import meta

    config, (_, teacher), batch = _config(settings), _spaces(settings), settings["batch_size"]
    counted = counting.count_teacher(config, meta.open_space(settings["teacher"]), 3.5)
    planned = 4 * (counted.parameters + counted.buffers) + counted.score.peak
    layout = teacher.conditioning_layout
    conditioning, empty = (
        {name: torch.zeros(rows, *shape, dtype=kind) for name, (shape, kind) in layout.items()} for rows in (batch, 1)
    )
    _warm_up()
    with Peak(mapped=True) as peak, torch.no_grad():
        network = teacher.load_network()
        teacher.predict_x0(
            network, torch.randn(batch, *teacher.latent_shape), torch.full((batch,), 0.5), conditioning, empty, 3.5
        )
    return {"role": "teacher, one shard", "planned": planned, "measured": peak.bytes}


def _rank(settings: dict[str, Any]) -> dict[str, Any]:
    """One rank of a ZeRO-3 group while it loads."""
    import torch

    rank, world = settings["rank"], settings["world"]
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    from raydistill import spaces
    from raydistill.spaces import meta
    from raydistill.teachers import zero3

    file = Path(settings["meeting"], "port")
    if rank == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        replace_text(file, str(store.port), durable=False)
    while not file.is_file():
        time.sleep(0.05)
    os.environ["MASTER_PORT"] = file.read_text()
    if rank:
        store = torch.distributed.TCPStore("127.0.0.1", int(file.read_text()), world, False)
    zero3.init_process_group(rank, world, store, torch.device("cpu"))
    space = spaces.load_space(settings["teacher"])
    network = meta.open_space(settings["teacher"]).load_network()
    layer = max(
        sum(p.numel() for p in block.parameters()) for block in (*network.transformer_blocks, *network.single_transformer_blocks)
    )  # fmt: skip
    numel = meta.numel(network)
    _warm_up()
    torch.distributed.barrier()
    with Peak(mapped=False) as peak:
        engine = zero3.load_partitioned(space, torch.float32, torch.device("cpu"), rank, world)
        torch.distributed.barrier()
    held = zero3.partition_numel(engine)
    torch.distributed.destroy_process_group()
    return {
        "role": "rank", "numel": numel, "layer": layer, "held": 4 * held,
        "planned": 4 * (numel / world + layer), "measured": peak.bytes,
    }  # fmt: skip


def _config(settings: dict[str, Any]) -> Any:
    from raydistill.config.reading import load

    return load(
        overrides=[
            f"teacher.model={settings['teacher']}", f"student.model={settings['student']}", "bridge.checkpoint=null",
            f"distill.batch_size={settings['batch_size']}", f"teachers.slice={settings['batch_size']}", "fake_score.updates=1",
        ]
    )  # fmt: skip


def _spaces(settings: dict[str, Any]) -> tuple[Any, Any]:
    from raydistill.spaces import load_space

    return load_space(settings["student"]), load_space(settings["teacher"])


def _warm_up() -> None:
    """Import and start what a first step would, on next to nothing, so that it is not counted as the role's memory."""
    import diffusers
    import torch

    with tempfile.TemporaryDirectory() as folder:
        tiny = diffusers.UNet2DModel(8, 3, 3, block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
        tiny.save_pretrained(folder)
        tiny = diffusers.UNet2DModel.from_pretrained(folder)
    optimizer = torch.optim.AdamW(tiny.parameters())
    tiny(torch.zeros(1, 3, 8, 8), 1).sample.sum().backward()
    optimizer.step()


def main() -> None:
    settings = json.loads(sys.argv[1])
    role = {"trainer": _trainer, "teacher": _teacher, "rank": _rank}[settings["role"]]
    print("\n" + json.dumps(role(settings)), flush=True)


def table(result: dict[str, Any]) -> str:
    from raydistill.benchmark.measure import markdown, megabytes

    first = markdown(
        ("role", "planned", "measured peak", "measured / planned"),
        [
            (row["role"], megabytes(row["planned"]), megabytes(row["measured"]), f"{row['measured'] / row['planned']:.3f}")
            for row in result["rows"]
        ],
    )  # fmt: skip
    second = markdown(
        ("shards", "network", "its share", "largest layer", "share + layer", "measured load peak, worst rank", "ratio"),
        [
            (
                row["shards"],
                megabytes(4 * row["numel"]),
                megabytes(4 * row["numel"] / row["shards"]),
                megabytes(4 * row["layer"]),
                megabytes(row["planned"]),
                megabytes(row["measured"]),
                f"{row['measured'] / row['planned']:.3f}",
            )
            for row in result["loads"]
        ],
    )
    notes = (
        f"Resident memory beyond imports, float32 on the CPU, {result['batch_size']} samples; the plan counts live tensors, the "
        "process also holds what the allocator keeps. While loading in shards, pages of mapped files are not counted: the "
        f"kernel shares them among ranks and can drop them. Target: within {TOLERANCE:.0%}."
    )
    return f"{first}\n\n{second}\n\n{notes}"


if __name__ == "__main__":
    main()
