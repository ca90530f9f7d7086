"""In which precision networks compute: bfloat16 autocast around forward passes, and TF32 for what stays float32.

Weights, losses and updates are float32 in either case.
"""

from __future__ import annotations

import warnings

import torch

# Under autocast RMS norms get bfloat16 values and float32 weights, as they should: torch says that it uses no fused kernel.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 autocast; `enabled=False` switches it off within a block where it is on."""
    kind = "cpu" if device.type == "meta" else device.type  # the planner counts on meta tensors, as if on a CPU
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def allow_tf32(allowed: bool | None) -> None:
    """Whether this process rounds the factors of float32 matrix products and convolutions on CUDA to TF32.

    TF32 has 10 bits of mantissa instead of 23. Sums stay float32. It is several times as fast.
    None: torch's default, which is convolutions alone.
    """
    if allowed is None:
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
