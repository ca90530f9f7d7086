"""Tensors as numpy arrays and back. numpy has no bfloat16: such tensors travel, and are stored, as uint16."""

from __future__ import annotations

import numpy as np
import torch


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """Of a tensor on the CPU; shares its memory."""
    return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()


def to_torch(column: np.ndarray) -> torch.Tensor:
    """Shares its memory where that can be written to."""
    # what Ray hands out lies read-only in the object store, and torch has no read-only tensors
    value = torch.from_numpy(column if column.flags.writeable else column.copy())
    return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value
