"""bfloat16 autocast around forward passes of networks, and nothing else: weights, losses and updates stay float32."""

from __future__ import annotations

import torch


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """On, or off within a block where it is on."""
    kind = "cpu" if device.type == "meta" else device.type  # the planner counts on meta tensors, as if on a CPU
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)
