"""Two workers of a distillation as processes of torch, for tests of what workers share."""

from __future__ import annotations

import itertools
import os

import torch
import torch.distributed
from answers import Answer

from raydistill.bridge.model import Bridge
from raydistill.distillation.batches import Real
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.workers.ray_train import Worker

WORLD, BATCH = 2, 2
SETTINGS = (
    "bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=4", "fake_score.updates=2",
    "discriminator.width=8", "student.lr=1e-3", "fake_score.lr=1e-3", "distill.workers=2",
    "discriminator.depths=[0.3,1]", "discriminator.standardize=true",
)  # fmt: skip
CAPTIONS = ["a small red circle at the left", "a large blue square at the top"]


def join(rank: int, folder) -> None:
    """This process is one of the workers, who meet in a file of the folder."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)


def built(rank: int, config, student, teacher, *, first: int = 0, state: dict | None = None):
    """A worker's Distiller after `first` updates, whose checkpoint is `state`."""
    tables = [space.encode_prompts(space.load_text(), CAPTIONS) for space in (student, teacher)]

    def batches():
        for slot in itertools.count(first * (1 + config.fake_score.updates)):
            ids = list(range((slot * WORLD + rank) * BATCH, (slot * WORLD + rank + 1) * BATCH))
            yield {"sample_id": ids} | {
                f"{role}.{name}": value[[i % len(CAPTIONS) for i in ids]].numpy()
                for role, table in zip(("student", "teacher"), tables, strict=True)
                for name, value in table.items()
            }

    torch.manual_seed(7)
    bridge = Bridge.create(student, teacher, config.bridge)
    latents = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(5))
    real = Real(latents, tables[1], torch.arange(4) % len(CAPTIONS))
    own = Worker(rank, WORLD, torch.device("cpu"))
    distiller = build_distiller(
        config,
        student_space=student,
        teacher_space=teacher,
        student=student.load_network(),
        bridge=bridge,
        fake_network=teacher.load_network(),
        real=real,
        source=batches(),
        average=own.average,
        mesh=own.mesh() if config.fake_score.shard or config.student.shard else None,
    )
    if state is not None:
        distiller.load_state_dict(state)
    return distiller


def trained(distiller, updates: int = 2, bad: int | None = None) -> list[dict]:
    """Metrics of each of so many updates, without times. The teacher's answer to the sample of this number is not finite."""
    metrics, config = [], distiller.config

    def answer(made):
        return Answer(
            torch.zeros_like(made.x_t).masked_fill(
                (made.sample_ids == (-1 if bad is None else bad)).view(-1, 1, 1, 1), torch.nan
            )
        )

    for _ in range(updates):
        distillation_step(distiller, answer, config.fake_score.updates, config.distill.overlap)
        metrics.append({k: v for k, v in distiller.pop_metrics().items() if not k.startswith("time/")})
    return metrics


def resident(network) -> int:
    """Numbers of a network's parameters that this worker has."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in network.parameters())
