"""A frozen copy that two workers share: the numbers of two whole copies, up to rounding, in little more than half the memory.

Bits differ because the processor's kernels sum in another order where a gathered weight does not lie on a cache line.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from answers import Answer

from raydistill.bridge.model import Bridge
from raydistill.config.reading import load
from raydistill.distillation.batches import Real
from raydistill.distillation.schedule import distillation_step
from raydistill.distillation.updates import build_distiller
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.workers.ray_train import Worker

WORLD, BATCH = 2, 2
SETTINGS = (
    "bridge.embed_dim=16", "bridge.depths=[1]", "bridge.heads=2", "fake_score.rank=4", "fake_score.updates=2",
    "discriminator.width=8", "student.lr=1e-3", "fake_score.lr=1e-3", "distill.workers=2",
    "discriminator.depths=[0.3,1]", "discriminator.standardize=true",
)  # fmt: skip
CAPTIONS = ["a small red circle at the left", "a large blue square at the top"]


def train(rank: int, config, student, teacher) -> tuple[dict, list, int]:
    """Two updates of one worker: its state, its metrics, and how many parameters of the fake score it held."""
    tables = [space.encode_prompts(space.load_text(), CAPTIONS) for space in (student, teacher)]

    def batches():
        for slot in itertools.count():
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
        mesh=own.mesh() if config.fake_score.shard else None,
    )
    metrics = []
    for _ in range(2):
        distillation_step(distiller, lambda made: Answer(torch.zeros_like(made.x_t)), config.fake_score.updates, True)
        metrics.append({k: v for k, v in distiller.pop_metrics().items() if not k.startswith("time/")})
    # once all is computed no block is left gathered
    held = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() for p in distiller.networks.fake.network.parameters()
    )
    return distiller.state_dict(), metrics, held


def worker(rank: int, folders, overrides, results) -> None:
    """The same with a whole copy and with a shared one."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(results / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    student, teacher = (load_space(folder) for folder in folders)
    for shard in (False, True):
        config = load(overrides=[*SETTINGS, *overrides, f"fake_score.shard={shard}"])
        torch.save(train(rank, config, student, teacher), results / f"{shard}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("flux", ()),
        pytest.param("flux", ("student.kind=lora", "student.rank=2"), marks=pytest.mark.full),
        pytest.param("sdxl", ("distill.gradient_checkpointing=true",), marks=pytest.mark.full),
        pytest.param(
            "flux", ("distill.mixed_precision=true", "fake_score.base_dtype=bfloat16"), marks=pytest.mark.full
        ),
    ],
)
@pytest.mark.full
def test_a_shared_copy_gives_the_numbers_of_a_whole_one(
    sd_folder, flux_folder, diffusion_folders, tmp_path, family, overrides
):
    folders = (sd_folder, flux_folder if family == "flux" else diffusion_folders[family])
    torch.multiprocessing.spawn(worker, (folders, overrides, tmp_path), nprocs=WORLD)
    for rank in range(WORLD):
        (state, metrics, whole), (other, others, part) = (
            torch.load(tmp_path / f"{shard}-{rank}.pt", weights_only=True) for shard in (False, True)
        )
        assert state.keys() == other.keys()
        for name in ("student", "fake"):
            assert state[name].keys() == other[name].keys()
            for key, value in state[name].items():  # AdamW turns a gradient's rounding near 0 into a step of lr
                assert (other[name][key] - value).norm() <= 1e-3 * (value.norm() + 1e-3), key
        for one, two in zip(metrics, others, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
            assert one["loss/fake"] > 0
        assert metrics[0] != metrics[1]
        assert part < 0.75 * whole


@pytest.mark.parametrize("other", ["fake_score.kind=full", "distill.min_workers=1"])
def test_what_cannot_be_shared_is_refused(other):
    with pytest.raises(InputError, match=r"fake_score\.shard"):
        load(overrides=["distill.workers=2", "fake_score.shard=true", other])
