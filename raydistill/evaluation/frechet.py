"""Fréchet distance between two sets of features: |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (Heusel et al. 2017)."""

from __future__ import annotations

import torch


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Of Gaussians fitted to [N, D] and [M, D]; float64, unbiased covariances.

    (Σ₁ Σ₂)^½ has the trace of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: no complex square root is needed.

    Raises:
        ValueError: fewer than two rows, or different D.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {list(features.shape)} and {list(reference.shape)}")
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"two pictures at least on either side, not {len(features)} and {len(reference)}")
    x, y = features.double(), reference.double()
    cov_x, cov_y = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + cov_x.trace() + cov_y.trace() - 2 * middle
    return max(float(distance), 0.0)
