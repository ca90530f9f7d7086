"""One worker's Distiller from its parts: networks, batches and updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from raydistill.bridge.model import Bridge
from raydistill.bridge.objective import Objective
from raydistill.config.schema import Config
from raydistill.distill.batches import Batches, Real
from raydistill.distill.gradients import Average, alone
from raydistill.distill.networks import Networks
from raydistill.distill.updates import Distiller
from raydistill.spaces import Space


def build_distiller(
    config: Config,
    *,
    student_space: Space,
    teacher_space: Space,
    student: nn.Module,
    bridge: Bridge,
    fake_network: nn.Module,
    source: Iterator[dict[str, Any]],
    real: Real | None = None,
    anchor: Objective | None = None,
    device: torch.device | str = "cpu",
    mesh: DeviceMesh | None = None,
    average: Average = alone,
    parts: int | None = None,
    mean_parts: float | None = None,
) -> Distiller:
    """See `Networks`, `Batches` and `Distiller` for the arguments.

    Args:
        parts: micro-batches of this worker; None: `distill.micro_batches`.
    """
    networks = Networks(
        config,
        student_space=student_space,
        teacher_space=teacher_space,
        student=student,
        bridge=bridge,
        fake_network=fake_network,
        real=real,
        device=device,
        mesh=mesh,
    )
    batches = Batches(source, parts or config.distill.micro_batches)
    return Distiller(config, networks, batches, real=real, anchor=anchor, average=average, mean_parts=mean_parts)
