"""Pictures between and beside given ones: two blended in soft regions, their colours mixed, and mottled.

A student under training draws such pictures. A Bridge that has seen clean ones alone changes their colours, so that the
teacher judges other pictures than the student's (raydistill/bridge/README.md).

Shapes: B pictures [B, 3, S, S] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from raydistill.diffusion.noise import normal, uniform

REGIONS, MOTTLE = 3, 8  # cells a side of the coarse noise that becomes soft regions, and mottle
TURN, SPOTS = 0.5, 0.15  # standard deviations, at most: of the entries of a colour's mix, and of the mottle
VIEWS = 7  # turned and mirrored copies of a picture, besides itself


def soft(coarse: torch.Tensor, pixels: int) -> torch.Tensor:
    """Noise of a few cells [B, C, k, k] as a smooth field [B, C, pixels, pixels]."""
    return F.interpolate(coarse, size=(pixels, pixels), mode="bicubic")


def blended(pictures: torch.Tensor, others: torch.Tensor, regions: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Each picture with another one in soft regions.

    Args:
        regions: standard normal [B, 1, k, k]; where it is high, the other one is seen.
        bias: standard normal [B, 1, 1, 1]; how much of the other one is seen in all.
    """
    return torch.lerp(pictures, others, torch.sigmoid(3 * soft(regions, pictures.shape[-1]) + 2 * bias))


def recoloured(pictures: torch.Tensor, turn: torch.Tensor, mottle: torch.Tensor, spots: torch.Tensor) -> torch.Tensor:
    """Channels mixed, which changes contrast, saturation and hue, and a coarse field added, for brightness and tint.

    Args:
        turn: [B, 3, 3], what is added to the unit matrix.
        mottle: standard normal [B, 3, k, k].
        spots: strength of the mottle, [B, 1, 1, 1].
    """
    mixed = torch.einsum("bij,bjhw->bihw", torch.eye(3).to(turn) + turn, pictures)
    return (mixed + SPOTS * soft(mottle, pictures.shape[-1]) * spots).clamp(-1, 1)


def view(picture: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight turned and mirrored copies of a square picture [..., S, S]; 0 is itself."""
    turned = picture.rot90(number % 4, (-2, -1))
    return turned.flip(-1) if number >= 4 else turned


def augmented(pictures: torch.Tensor, seed: int, rows: Sequence[int] | np.ndarray, share: float) -> torch.Tensor:
    """Some of the pictures changed: about `share` of them, the same ones in whatever company they come.

    A changed picture is blended with a turned or mirrored copy of itself in other colours, then its own colours are
    mixed. So it is a function of (picture, seed, row) alone. A larger share changes the same rows alike, and more.

    Args:
        rows: B positions in the set.
        share: 0 returns the pictures as they are.

    Raises:
        ValueError: `share` is not in [0, 1], or there are not as many rows as pictures.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    if len(rows) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures need as many rows, not {len(rows)}")
    if share == 0:
        return pictures
    chosen = np.flatnonzero(uniform(seed, rows, "augment").numpy() < share)
    if not len(chosen):
        return pictures
    result = pictures.clone()
    for index in chosen.tolist():  # one by one: in a batch of another size the last bits may differ
        result[index] = _changed(pictures[index : index + 1], seed, rows[index])[0]
    return result


def _changed(picture: torch.Tensor, seed: int, row: int) -> torch.Tensor:
    """[1, 3, S, S]."""
    choice, *strengths = uniform(seed, [row], "augment_strength", shape=(5,))[0].tolist()

    def draw(what: str, *shape: int) -> torch.Tensor:
        return normal(seed, [row], shape, f"augment_{what}").to(picture)

    def colours(source: torch.Tensor, which: int) -> torch.Tensor:
        turn = TURN * strengths[2 * which] * draw(f"turn_{which}", 3, 3)
        spots = torch.full((1, 1, 1, 1), strengths[2 * which + 1]).to(picture)
        return recoloured(source, turn, draw(f"mottle_{which}", 3, MOTTLE, MOTTLE), spots)

    other = colours(view(picture, 1 + int(choice * VIEWS)), 0)
    regions, bias = draw("regions", 1, REGIONS, REGIONS), draw("bias", 1, 1, 1)
    return colours(blended(picture, other, regions, bias), 1)
