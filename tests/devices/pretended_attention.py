"""F.scaled_dot_product_attention on pretended tensors: it takes the kernel that torch's CUDA build takes, and notes which.

The choice is that of sdp_utils.cpp on an H100. `flash` knows no mask; `efficient` wants head dimensions that are multiples
of 8 (of 4 in float32); `math` is left, which stores the attention map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pretended_tensors import Notes, aten, module_on_stack, shadow
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = F.scaled_dot_product_attention
HALF = (torch.float16, torch.bfloat16)


def kernel_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """flash, efficient or math."""
    half, widths = query.dtype in HALF, (query.shape[-1], value.shape[-1])
    if query.ndim != 4:
        return "math"
    if half and mask is None and widths[0] == widths[1] <= 256:
        return "flash"
    alignment = 8 if half else 4
    return "math" if any(width % alignment for width in widths) else "efficient"


def install(notes_of: Any) -> None:
    """Exchange torch's function for good. `notes_of()` -> where to write."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        others = [x for x in (key, value, attn_mask) if x is not None]
        if not any(isinstance(x, FakeTensor) for x in (query, *others)):
            return PLAIN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if wrong := {str(x.device) for x in (query, *others)} - {"cuda:0"}:
            raise RuntimeError(f"attention: an operand is on {', '.join(wrong)}")
        if torch.is_autocast_enabled("cuda"):
            low = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(low) if x.is_floating_point() else x for x in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(low)
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            raise RuntimeError(f"attention: a mask of {attn_mask.dtype} for a query of {query.dtype}")
        kernel = kernel_of(query, key, value, attn_mask)
        _note(notes_of(), kernel, query, key, attn_mask)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast("cuda", enabled=False):
            if kernel == "math" or shadow(query) is not None:  # the CPU has none of the others, for the shadow
                return _math(query, key, value, attn_mask, is_causal, scale)
            return _fused(kernel, query, key, value, attn_mask, is_causal, scale)

    F.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = attend


def _note(notes: Notes, kernel: str, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    masked = "" if mask is None else ", mask"
    kind = f"{str(query.dtype).removeprefix('torch.')}, head {query.shape[-1]}{masked}"
    notes.kernels[f"{module_on_stack()}: {kernel} ({kind})"] += 1


def _fused(kernel: str, query, key, value, mask, is_causal: bool, scale: float) -> torch.Tensor:
    """The operator's own kernel for tensors without numbers: it stores no attention map."""
    width = query.shape[-1]
    if kernel == "flash":
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0][..., :width]
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        mask = mask.expand(*query.shape[:-1], key.shape[-2])
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    arguments = (query, key, value, mask, graph, 0.0, is_causal)
    return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]


def _math(query, key, value, mask, is_causal: bool, scale: float) -> torch.Tensor:
    """As torch's: what is bfloat16 is computed in float32."""
    dtype = query.dtype
    if dtype in HALF:
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
    root = math.sqrt(scale)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    logits = (query * root) @ (key * root).transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1) @ value).to(dtype)
