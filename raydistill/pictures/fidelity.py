"""Fidelity of images to a reference, one number a picture.

Images are [B, C, H, W] in [-1, 1]; all metrics are computed in float32 on the [0, 1] scale (data range 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def _unit(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"images must be two equal [B, C, H, W], not {list(images.shape)} and {list(reference.shape)}")
    return (images.float() + 1) / 2, (reference.float() + 1) / 2


def l1(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference [B] on the [0, 1] scale."""
    x, y = _unit(images, reference)
    return (x - y).abs().mean(dim=(1, 2, 3))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in dB; at most 100 (equal images)."""
    x, y = _unit(images, reference)
    return -10 * ((x - y) ** 2).mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity [B] (Wang et al. 2004): 11×11 Gaussian window of sigma 1.5, K = (0.01, 0.03), no padding.

    Raises:
        ValueError: images smaller than the window, or of different shapes.
    """
    x, y = _unit(images, reference)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {SSIM_WINDOW} pixels a side, not {list(x.shape[-2:])}")
    channels = x.shape[1]
    offsets = torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2
    gaussian = torch.softmax(-(offsets**2) / (2 * SSIM_SIGMA**2), dim=0)
    kernel = (gaussian[:, None] * gaussian[None, :]).expand(channels, 1, -1, -1)

    def blur(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z, kernel, groups=channels)

    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mu_x * mu_y + c1) * (2 * cov + c2)) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3))
