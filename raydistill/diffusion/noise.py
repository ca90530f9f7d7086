"""Counter-based random numbers: a sample's draw depends on (seed, purpose, step, sample id) and on nothing else.

Retries, restarts, other batch sizes and other numbers of workers see the same numbers, because no generator
state is carried from draw to draw. The key of Philox (Salmon et al. 2011) is a hash of seed, purpose and step; the
sample id is the high half of its counter, so two samples never share a number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

SampleIds = torch.Tensor | np.ndarray | Sequence[int]


def _key(seed: int, purpose: str, step: int) -> np.ndarray:
    """Philox's 128-bit key as two uint64."""
    text = f"{int(seed)}/{int(step)}/{purpose}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)


def _draw(
    seed: int,
    sample_ids: SampleIds,
    shape: Sequence[int],
    purpose: str,
    step: int,
    fill: Callable[[np.random.Generator, np.ndarray], object],
) -> torch.Tensor:
    """Fill each row of [B, *shape] float32 from that sample's own generator."""
    ids = np.asarray(sample_ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"sample_ids must be one-dimensional, not of shape {ids.shape}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"sample_ids must not be negative; the smallest is {ids.min()}")
    rows = np.empty((len(ids), math.prod(shape)), dtype=np.float32)
    key = _key(seed, purpose, step)
    for row, sample_id in zip(rows, ids.tolist(), strict=True):
        fill(np.random.Generator(np.random.Philox(key=key, counter=[0, 0, sample_id, 0])), row)
    return torch.from_numpy(rows.reshape(len(ids), *shape))


def normal(seed: int, sample_ids: SampleIds, shape: Sequence[int], purpose: str, step: int = 0) -> torch.Tensor:
    """Standard normal draws [B, *shape], float32 on the CPU.

    Args:
        sample_ids: B integers >= 0; a repeated id repeats its draw.
        shape: of one sample.
        purpose: what the draw is for ("latents", "score_noise", …); different purposes are independent.
        step: update or epoch for samples that are drawn for more than once.

    Raises:
        ValueError: sample_ids is not one-dimensional, or has a negative id.
    """
    return _draw(seed, sample_ids, shape, purpose, step, lambda g, row: g.standard_normal(dtype=np.float32, out=row))


def uniform(seed: int, sample_ids: SampleIds, purpose: str, step: int = 0, shape: Sequence[int] = ()) -> torch.Tensor:
    """Uniform draws in [0, 1) of shape [B, *shape] (default [B]), float32 on the CPU. See `normal`."""
    return _draw(seed, sample_ids, shape, purpose, step, lambda g, row: g.random(dtype=np.float32, out=row))
