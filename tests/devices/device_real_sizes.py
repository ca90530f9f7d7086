"""Roles of ready pairs at their published sizes, on networks without numbers: `python device_real_sizes.py FOLDER PAIR:ROLE …`.

As device_cells.py. Batches have two parts, each as large as the pair's configuration has them.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_cells

GIB = 2**30


class Pair:
    """`configs/NAME.yaml`: configuration, spaces, and conditioning of the right shapes."""

    def __init__(self, name: str) -> None:
        from raydistill.config.reading import CONFIGS, load
        from raydistill.spaces.meta import open_space

        config = load(CONFIGS / f"{name}.yaml")
        part = config.distill.batch_size // config.distill.micro_batches
        share = config.bridge.batch_size // config.distill.workers // config.bridge.micro_batches
        settings = ["distill.micro_batches=2", f"distill.batch_size={2 * part}", "fake_score.updates=1"]
        settings += ["distill.workers=1", "fake_score.shard=false", "bridge.micro_batches=2"]
        self.config = load(CONFIGS / f"{name}.yaml", [*settings, f"bridge.batch_size={2 * share}"])
        self.student, self.teacher = (open_space(m) for m in (self.config.student.model, self.config.teacher.model))

    def conditioning(self, space: Any, count: int) -> dict[str, Any]:
        import torch

        dtype = getattr(torch, self.config.prompts.encoder_dtype)
        return {
            name: torch.ones(count, *shape, dtype=dtype if kind.is_floating_point else kind)
            for name, (shape, kind) in space.conditioning_layout.items()
        }


def update(pair: Pair, meter: Any) -> None:
    """One of a worker's; the pair's precision, and its activations recomputed or kept as it says."""
    import torch
    from device_roles import answered
    from pretended_tensors import CUDA

    from raydistill.data.bits import to_numpy
    from raydistill.distillation.batches import Real
    from raydistill.distillation.schedule import distillation_step
    from raydistill.distillation.updates import build_distiller
    from raydistill.planning.counting import empty_bridge, make_moments

    config, size = pair.config, pair.config.distill.batch_size
    columns = {
        f"{role}.{name}": to_numpy(value)
        for role, space in (("student", pair.student), ("teacher", pair.teacher))
        for name, value in pair.conditioning(space, size).items()
    }
    real = Real(torch.zeros(2, *pair.teacher.latent_shape), pair.conditioning(pair.teacher, 1), torch.zeros(2).long())
    worker = build_distiller(
        config,
        student_space=pair.student,
        teacher_space=pair.teacher,
        student=pair.student.load_network(),
        bridge=empty_bridge(config, pair.student, pair.teacher),
        fake_network=pair.teacher.load_network(),
        real=real,
        source=({"sample_id": list(range(slot * size, (slot + 1) * size))} | columns for slot in itertools.count()),
        device=CUDA,
    )
    networks = worker.networks
    meter.hold(networks.student, networks.bridge, networks.fake, networks.discriminator, networks.ema)
    make_moments(worker)  # as every step but a run's first one finds them
    distillation_step(worker, answered, 1, overlap=True)


def score(pair: Pair, meter: Any) -> None:
    """One slice of a rank that holds the whole network, in bfloat16."""
    import torch
    from pretended_tensors import CUDA

    from raydistill.distillation.networks import guidance_scale
    from raydistill.teachers.request import Memory, ScoreRequest
    from raydistill.teachers.shard import TeacherRank

    count, dtype = pair.config.teachers.slice, getattr(torch, pair.config.teachers.dtype)
    assert dtype == torch.bfloat16
    rank = object.__new__(TeacherRank)
    rank.rank, rank.world, rank.memory, rank.device = 0, 1, Memory(), CUDA
    rank.dtype, rank.slice_size, rank.space = dtype, count, pair.teacher
    network = pair.teacher.load_network(dtype).to(CUDA)
    rank.teacher = SimpleNamespace(network=network)  # as `plain.Whole` holds it
    meter.hold(network)
    latents, t_B = torch.zeros(count, *pair.teacher.latent_shape), torch.full((count,), 0.5)
    conditioning, empty = pair.conditioning(pair.teacher, count), pair.conditioning(pair.teacher, 1)
    scale = guidance_scale(pair.config, pair.teacher)
    answer = rank.predict_x0(ScoreRequest(latents, t_B, conditioning, empty, scale).payload())
    assert answer.shape == latents.shape


def vae(pair: Pair, meter: Any) -> None:
    """Both of them, there and back."""
    import torch
    from pretended_tensors import CUDA

    from raydistill.data.vae import VAE_BATCH

    for space in (pair.student, pair.teacher):
        network, size = space.load_vae().to(CUDA), space.vae_batch(VAE_BATCH)
        meter.hold(network)
        with torch.no_grad():
            latents = space.encode(network, torch.zeros(size, 3, space.resolution, space.resolution, device=CUDA))
            assert latents.shape == (size, *space.latent_shape)
            assert space.decode_each(network, latents).shape[1:] == (3, space.resolution, space.resolution)


ROLES: dict[str, Callable[[Pair, Any], None]] = {role.__name__: role for role in (update, score, vae)}


def run(cells: list[str]) -> list[dict[str, Any]]:
    import pretended_attention
    from pretended_tensors import Notes, PretendedTensors

    from raydistill.planning.meter import Meter
    from raydistill.spaces.meta import without_initial_values

    notes, done = Notes(), []
    pretended_attention.install(lambda: notes)
    for name, role in (cell.split(":") for cell in cells):
        pair, mode, started = Pair(name), PretendedTensors(numbers=False), time.process_time()
        notes, told = mode.notes, {"family": name, "role": role, "error": None}
        try:
            with without_initial_values(), mode, Meter("cuda") as meter:
                ROLES[role](pair, meter)
            told["peak_gib"] = meter.peak / GIB
        except Exception:
            told["error"] = traceback.format_exc()
        done.append(told | {"seconds": time.process_time() - started, "notes": notes.told()})
    return done


def main(folder: str, *cells: str) -> None:
    device_cells.begin()
    Path(folder, "cells.json").write_text(json.dumps(run(list(cells)), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
