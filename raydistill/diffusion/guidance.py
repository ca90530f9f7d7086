"""Classifier-free guidance, with diffusers' convention for the scale: 0 to 1 are no guidance.

Does without torch: configuration and requests ask here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydistill.errors import InputError

if TYPE_CHECKING:
    import torch

MOST = 100.0  # far above any model's


def is_guided(scale: float) -> bool:
    """Whether a guidance scale asks for guidance. Raises InputError where it is not between 0 and 100."""
    if not 0 <= scale <= MOST:
        raise InputError(f"guidance scale {scale:g}: must lie between 0 and {MOST:g}; 0 to 1 are no guidance")
    return scale > 1


def classifier_free(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """u + s (c - u), in float32. A scale of 1 is the conditional prediction (Ho & Salimans 2022)."""
    conditional, unconditional = conditional.float(), unconditional.float()
    return unconditional + scale * (conditional - unconditional)


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, share: float) -> torch.Tensor:
    """A guided prediction [B, C, H, W] of which `share` has the conditional one's spread (Lin et al. 2023, arXiv 2305.08891).

    share · guided · std(conditional) / std(guided) + (1 - share) · guided, each std over one sample
    """
    dims = tuple(range(1, guided.ndim))
    factor = conditional.float().std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * factor + 1 - share)
