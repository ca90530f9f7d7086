"""Copies between main memory and a CUDA device that the processor does not wait for. On the CPU nothing is copied.

A copy runs beside the computation where its side in main memory is pinned. torch keeps pinned memory until the copies
out of it are done, and uses it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`value` on `device`; nothing waits for the copy but what is computed with it there."""
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def download(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`values` in main memory, after one wait for all that their device has been given."""
    copies, devices = [], set()
    for value in values:
        if value.device.type != "cuda":
            copies.append(value.cpu())
            continue
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        copies.append(copy.copy_(value.detach(), non_blocking=True))
        devices.add(value.device)
    for device in devices:  # which need not be the current one
        torch.cuda.current_stream(device).synchronize()
    return copies
