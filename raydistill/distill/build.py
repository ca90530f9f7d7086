"""One worker's Distiller from its parts: networks, batches and updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raydistill.bridge.objective import Objective
from raydistill.config.schema import Config
from raydistill.distill.batches import Batches, Real
from raydistill.distill.gradients import Average, alone
from raydistill.distill.networks import Networks
from raydistill.distill.updates import Distiller


def build_distiller(
    config: Config,
    *,
    source: Iterator[dict[str, Any]],
    real: Real | None = None,
    anchor: Objective | None = None,
    average: Average = alone,
    parts: int | None = None,
    mean_parts: float | None = None,
    **networks: Any,
) -> Distiller:
    """See `Batches` and `Distiller` for the arguments; the others are those of `Networks`.

    Args:
        parts: micro-batches of this worker; None: `distill.micro_batches`.
    """
    batches = Batches(source, parts or config.distill.micro_batches)
    own = Networks(config, real=real, **networks)
    return Distiller(config, own, batches, real=real, anchor=anchor, average=average, mean_parts=mean_parts)
