"""Classifier-free guidance."""

from __future__ import annotations

import torch


def classifier_free(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """u + s (c - u), in float32. A scale of 1 is the conditional prediction (Ho & Salimans 2022)."""
    conditional, unconditional = conditional.float(), unconditional.float()
    return unconditional + scale * (conditional - unconditional)
