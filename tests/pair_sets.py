"""Sets of latent pairs, as tests make them and look at them."""

from __future__ import annotations

from pathlib import Path

import torch

from raydistill.data.pairs import Pairs, PairSet, write_pairs


def load_pairs(folder: str | Path) -> Pairs:
    """All rows of a folder in memory."""
    pairs = PairSet(folder)
    return pairs.rows(range(len(pairs)))


def write_upscaled(folder: Path, count: int = 24) -> Path:
    """One shard of random student latents (4, 8, 8); the teacher's (8, 16, 16) are the same, doubled."""
    z_student = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z_teacher = torch.nn.functional.interpolate(z_student.repeat(1, 2, 1, 1), scale_factor=2, mode="nearest")
    write_pairs(
        folder,
        0,
        prompts=[f"a red circle {row}" for row in range(count)],
        prompt_ids=range(count),
        seeds=range(count),
        z_teacher=z_teacher,
        z_student=z_student,
    )
    return folder
