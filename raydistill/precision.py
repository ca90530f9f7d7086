"""In which precision networks compute: 16-bit autocast around forward passes, and TF32 for what stays float32.

Weights, losses and updates are float32 in either case.
"""

from __future__ import annotations

import warnings
from types import MethodType

import torch
from torch import nn

# Under autocast RMS norms get bfloat16 values and float32 weights, as they should: torch says that it uses no fused kernel.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)


def autocast(device: torch.device, enabled: bool, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """16-bit autocast; `enabled=False` switches it off within a block where it is on."""
    kind = "cpu" if device.type == "meta" else device.type  # the planner counts on meta tensors, as if on a CPU
    return torch.autocast(kind, dtype, enabled=enabled)


def stay_float32(layer: nn.Module) -> None:
    """A layer computes in float32 from now on, also under autocast. So do its copies."""
    layer.forward = MethodType(_in_float32, layer)


def _in_float32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with autocast(x.device, enabled=False):
        return type(layer).forward(layer, x.float())


def sum_float16_in_float32() -> None:
    """This process sums no products of float16 matrices in float16, as torch's default allows cuBLAS to do."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def allow_tf32(allowed: bool | None) -> None:
    """Whether this process rounds the factors of float32 matrix products and convolutions on CUDA to TF32.

    TF32 has 10 bits of mantissa instead of 23. Sums stay float32. It is several times as fast.
    None: torch's default, which is convolutions alone.
    """
    if allowed is None:
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
