"""Fidelity of images to a reference, one number a picture.

Images are [B, C, H, W] in [-1, 1]. All metrics are float32, on the [0, 1] scale (data range 1).

torchmetrics is imported inside functions: that takes about two seconds, and only a Bridge's validation measures fidelity.
"""

from __future__ import annotations

import torch

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
BEST_PSNR = 100.0  # dB, of equal images: their ratio is infinite, and a mean could not hold it


def _unit(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"images must be two equal [B, C, H, W], not {list(images.shape)} and {list(reference.shape)}")
    return (images.float() + 1) / 2, (reference.float() + 1) / 2


def l1(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference [B] on the [0, 1] scale."""
    x, y = _unit(images, reference)
    return (x - y).abs().mean(dim=(1, 2, 3))


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in dB, at most BEST_PSNR."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = _unit(images, reference)
    return peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3)).clamp(max=BEST_PSNR)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity [B] (Wang et al. 2004): 11×11 Gaussian window of sigma 1.5, K = (0.01, 0.03), no padding.

    Raises:
        ValueError: images smaller than the window, or of different shapes.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = _unit(images, reference)
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {SSIM_WINDOW} pixels a side, not {list(x.shape[-2:])}")
    _, similarity = structural_similarity_index_measure(
        x.double(),  # in float32 the variances of flat areas are rounding errors, which cost up to 1e-4
        y.double(),
        sigma=SSIM_SIGMA,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics mirrors the image at its edges, and takes the mean of all; here no window reaches out
    edge = SSIM_WINDOW // 2
    return similarity[..., edge:-edge, edge:-edge].mean(dim=(1, 2, 3)).float()
