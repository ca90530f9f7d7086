"""Anti-aliased renderer of scenes: signed distance functions, one batch at a time.

Shapes: B images, S pixels a side. Coordinates run from 0 to 1, x to the right and y downwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from raydistill.shapes.captions import Scene

CENTERS = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "center": (0.5, 0.5),
}
RADII = {"small": 0.13, "large": 0.22}
RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.12, 0.20, 0.90),
    "yellow": (0.95, 0.88, 0.10),
    "purple": (0.60, 0.12, 0.70),
    "cyan": (0.10, 0.80, 0.85),
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
    "black": (0.05, 0.05, 0.05),
}
_SHAPE_INDEX = {"circle": 0, "square": 1, "triangle": 2, "cross": 3}


def _signed_distance(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to each of the four shapes of `radius`, negative inside: [4, B, S, S]."""

    def box(half_width: torch.Tensor, half_height: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    circle = torch.hypot(x, y) - radius
    square = box(0.88 * radius, 0.88 * radius)
    inradius, lowered = 0.62 * radius, y - 0.25 * radius
    sides = 3**0.5 / 2 * x.abs() - 0.5 * lowered - inradius
    triangle = torch.maximum(sides, lowered - inradius)
    cross = torch.minimum(box(radius, 0.33 * radius), box(0.33 * radius, radius))
    return torch.stack([circle, square, triangle, cross])


def render(scenes: Sequence[Scene], size: int, seed: int, jitter: float = 1.0) -> torch.Tensor:
    """Draw scenes.

    Args:
        size: pixels a side (64 for teachers, 32 for students).
        seed: position, radius and colour jitter; the same seed and scenes give the same picture at any size.
        jitter: 0 draws every object exactly at its nominal place, size and colour.

    Returns:
        float32 [B, 3, size, size] in [-1, 1].
    """
    rng = random.Random(seed)

    def wobble(amount: float) -> float:
        return jitter * amount * rng.uniform(-1, 1)

    def color(name: str) -> list[float]:
        return [channel + wobble(0.04) for channel in RGB[name]]

    backgrounds = torch.tensor([color(scene.background) for scene in scenes])
    image_B3SS = backgrounds[:, :, None, None].expand(-1, -1, size, size).clone()
    axis = (torch.arange(size) + 0.5) / size
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    for slot in range(max(len(scene.objects) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if slot < len(scene.objects)]
        objects = [scenes[i].objects[slot] for i in rows]
        centers = torch.tensor([[c + wobble(0.03) for c in CENTERS[o.position]] for o in objects])
        radius = torch.tensor([RADII[o.size] * (1 + wobble(0.06)) for o in objects])[:, None, None]
        colors = torch.tensor([color(o.color) for o in objects])[:, :, None, None]
        which = torch.tensor([_SHAPE_INDEX[o.shape] for o in objects])
        distances = _signed_distance(grid_x - centers[:, 0, None, None], grid_y - centers[:, 1, None, None], radius)
        distance = distances[which, torch.arange(len(rows))]
        alpha = (0.5 - distance * size).clamp(0, 1)[:, None]
        image_B3SS[rows] = (1 - alpha) * image_B3SS[rows] + alpha * colors
    return image_B3SS.clamp(0, 1) * 2 - 1
