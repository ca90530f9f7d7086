"""SwinIR-style projector: residual groups of Swin transformer layers (Liang et al. 2021, arXiv 2108.10257).

Shapes: B batch, H×W grid, C embedding, M window side, N = M·M tokens of a window, W windows, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raydistill.bridge.resampling import downsampler, upsampler
from raydistill.transfer import upload


def relative_position_index(window: int) -> torch.Tensor:
    """[N, N]: for query i and key j, the row of the bias table that belongs to their offset."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    offset_NN2 = torch.stack([rows, columns], -1).reshape(-1, 1, 2) - torch.stack([rows, columns], -1).reshape(1, -1, 2)
    return (offset_NN2[..., 0] + window - 1) * (2 * window - 1) + offset_NN2[..., 1] + window - 1


def partition(x_BHWC: torch.Tensor, window: int) -> torch.Tensor:
    """Cut a map whose sides are multiples of the window into windows [B, W, N, C]."""
    tiles = x_BHWC.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # B, rows, M, columns, M, C
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(x_BWNC: torch.Tensor, height: int, width: int, window: int) -> torch.Tensor:
    """Inverse of `partition`: [B, H, W, C]."""
    tiles = x_BWNC.unflatten(2, (window, window)).unflatten(1, (height // window, width // window))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _region_labels(size: int, window: int, shift: int) -> torch.Tensor:
    """Labels along one axis, padded to a multiple of the window and rolled by -shift; padding is labelled -1.

    A token may only look at tokens of its own label: rolling brings both ends of the map into one window.
    """
    padded = -(-size // window) * window
    labels = torch.zeros(padded, dtype=torch.long)
    labels[size:] = -1
    rolled = labels.roll(-shift)
    if shift:
        wrapped = rolled[-shift:]
        wrapped[wrapped == 0] = 1
    return rolled


def window_mask(
    height: int, width: int, window: int, shifts: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """[W, N, N] True where a query may see a key; None where every query of a window sees every key."""
    if not any(shifts) and not height % window and not width % window:
        return None
    rows, columns = (_region_labels(size, window, s) for size, s in zip((height, width), shifts, strict=True))
    labels = rows[:, None] * 2 + columns[None, :]
    labels[(rows < 0)[:, None] | (columns < 0)[None, :]] = -1
    labels_WN = partition(upload(labels, device)[None, :, :, None], window)[0, ..., 0]
    return labels_WN[:, :, None] == labels_WN[:, None, :]


def shifts_of(height: int, width: int, window: int) -> tuple[int, int]:
    """Shift of the odd layers; an axis that fits into one window is not shifted."""
    return tuple(0 if size <= window else window // 2 for size in (height, width))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softmax(q k' / sqrt(d) + bias) v of q, k, v [B, W·h, N, d] and bias [1, W·h, N, N]."""
    return padded_attention(q, k, v, bias) if q.is_cuda else F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same with heads filled up with zeros to a multiple of 8.

    CUDA's memory-efficient kernel, the one that takes a bias, asks for that. The other one would store all attention maps.
    """
    width = q.shape[-1]
    filled = [F.pad(x, (0, -width % 8)) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*filled, attn_mask=bias, scale=width**-0.5)[..., :width]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside (shifted) windows with a learned relative position bias."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, x_BHWC: torch.Tensor, shifts: tuple[int, int], mask_WNN: torch.Tensor | None) -> torch.Tensor:
        _, height, width, _ = x_BHWC.shape
        bottom, right = -height % self.window, -width % self.window
        x = F.pad(x_BHWC, (0, 0, 0, right, 0, bottom)).roll([-s for s in shifts], dims=(1, 2))
        windows = partition(x, self.window)
        # Windows ride along the head axis, so that bias and mask broadcast over the batch and are never copied for it.
        q, k, v = (
            value.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2)
            for value in self.qkv(windows).chunk(3, dim=-1)
        )
        attended = attend(q, k, v, self._bias(windows.shape[1], mask_WNN).to(q.dtype))
        attended = attended.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3)
        x = merge(self.proj(attended), height + bottom, width + right, self.window).roll(shifts, dims=(1, 2))
        return x[:, :height, :width]

    def _bias(self, windows: int, mask_WNN: torch.Tensor | None) -> torch.Tensor:
        """Additive logits [1, W·h, N, N]."""
        bias_hNN = self.bias_table[self.index].permute(2, 0, 1)
        bias = bias_hNN.expand(windows, -1, -1, -1)
        if mask_WNN is not None:
            bias = bias.masked_fill(~mask_WNN[:, None], float("-inf"))
        return bias.flatten(0, 1)[None]


class SwinLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, shifted: bool) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor, shifts: tuple[int, int], masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), shifts if self.shifted else (0, 0), masks[self.shifted])
        return x + self.mlp(self.norm2(x))


class ResidualGroup(nn.Module):
    """Swin layers, alternately shifted, then a convolution, around a skip connection."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwinLayer(dim, heads, window, mlp_ratio, bool(i % 2)) for i in range(depth))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor, shifts: tuple[int, int], masks: Sequence[torch.Tensor | None]) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y, shifts, masks)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinIR(nn.Module):
    """[B, in_channels, H, W] -> [B, out_channels, H·scale, W·scale], any H and W; sides are rounded.

    Args:
        in_channels, out_channels: channels of both ends; only the last convolution depends on the output.
        embed_dim: width C, a multiple of `heads`.
        depths: Swin layers of each residual group.
        window: side of the attention windows; maps of other sizes are padded, and padding is never attended to.
        mlp_ratio: hidden width of the MLPs over C.
        scale: of the grid, above 0; the layers run on the smaller of both grids.

    Raises:
        ValueError: `embed_dim` is not a multiple of `heads`, or `scale` not above 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embed_dim: int = 120,
        depths: Sequence[int] = (6, 6, 6, 6, 6),
        heads: int = 6,
        window: int = 8,
        mlp_ratio: float = 2.0,
        scale: Fraction | int = 1,
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of heads ({heads})")
        self.window = window
        self.gradient_checkpointing = False
        self.conv_first = nn.Conv2d(in_channels, embed_dim, 3, padding=1)
        self.downsample = downsampler(embed_dim, scale)
        self.groups = nn.ModuleList(ResidualGroup(embed_dim, depth, heads, window, mlp_ratio) for depth in depths)
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = upsampler(embed_dim, scale)
        self.conv_last = nn.Conv2d(embed_dim, out_channels, 3, padding=1)
        self.apply(_initialise)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        first = self.downsample(self.conv_first(x_BCHW))
        height, width = first.shape[-2:]
        shifts = shifts_of(height, width, self.window)
        masks = [window_mask(height, width, self.window, s, first.device) for s in ((0, 0), shifts)]
        x = first.permute(0, 2, 3, 1)
        for group in self.groups:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(group, x, shifts, masks, use_reentrant=False)
            else:
                x = group(x, shifts, masks)
        body = self.conv_body(self.norm(x).permute(0, 3, 1, 2)) + first
        return self.conv_last(self.upsample(body))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
