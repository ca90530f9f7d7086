"""The losses of one-step distillation in teacher space (DMD2 protocol), each a few lines.

Shapes: B samples of C×H×W teacher latents; everything float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def vsd_gradient(x: torch.Tensor, x0_real: torch.Tensor, x0_fake: torch.Tensor) -> torch.Tensor:
    """g = (x0_fake - x0_real) / (mean_{c,h,w} |x - x0_real| + 1e-6), per sample [B, C, H, W], no graph."""
    with torch.no_grad():
        scale = (x - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6
        return (x0_fake - x0_real) / scale


def vsd_loss(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½ mean (x - stop_grad(x - g))²: its gradient with respect to x is g / numel."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """Non-saturating: softplus(-D(fake))."""
    return F.softplus(-logits_fake).mean()


def real_logits_loss(logits_real: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss on real samples: softplus(-D(real))."""
    return F.softplus(-logits_real).mean()


def fake_logits_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss on the student's samples: softplus(D(fake)); both are added."""
    return F.softplus(logits_fake).mean()


def approximate_r1(logits_real: torch.Tensor, logits_near: torch.Tensor, sigma: float) -> torch.Tensor:
    """Finite differences of R1: mean (D(real) - D(real + sigma n))² / sigma², with n ~ N(0, I) (arXiv 2501.08316)."""
    return F.mse_loss(logits_real, logits_near) / sigma**2
