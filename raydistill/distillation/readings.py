"""Metrics that stay on the device until they are read together, by one wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from raydistill.distillation.finite import Finite

# Scalars, of one micro-batch or of an update. They have no graph: hooks write to a row, and a graph that holds a hook that
# holds a loss of that graph is never freed.
Row = dict[str, torch.Tensor]


def mean_of(rows: Sequence[Row]) -> Row:
    """Mean of each scalar over the micro-batches, on their device."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def take_roots(metrics: dict[str, float]) -> None:
    """Each `…/gradient_square`, a mean square over micro-batches, becomes `…/gradient_norm`, its root."""
    for name in [name for name in metrics if name.endswith("/gradient_square")]:
        metrics[name.replace("square", "norm")] = math.sqrt(metrics.pop(name))


class Readings:
    """Scalars by name; a later one of the same name replaces an earlier."""

    def __init__(self, finite: Finite) -> None:
        self.finite = finite
        self._unread: Row = {}

    def add(self, row: Mapping[str, torch.Tensor]) -> None:
        """Waits for nothing."""
        self._unread |= row

    def read(self, *values: torch.Tensor) -> tuple[dict[str, float], list[torch.Tensor]]:
        """The numbers of all that was added since the last call, and `values` on the CPU.

        Raises:
            NonFiniteError: what was noted is not finite, for example the weights that an update has left.
        """
        unread, self._unread = self._unread, {}
        packed = [torch.stack([scalar.float() for scalar in unread.values()])] if unread else []
        copies = self.finite.look(*values, *packed)
        numbers = copies.pop().tolist() if unread else []
        return dict(zip(unread, numbers, strict=True)), copies
