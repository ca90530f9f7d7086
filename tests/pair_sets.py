"""Sets of latent pairs, as tests look at them."""

from __future__ import annotations

from pathlib import Path

from raydistill.data.pairs import Pairs, PairSet


def load_pairs(folder: str | Path) -> Pairs:
    """All rows of a folder in memory."""
    pairs = PairSet(folder)
    return pairs.rows(range(len(pairs)))
