"""Which prompts are longer than the text encoders read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydistill.spaces.base import Space


def are_cut(space: Space, text: Any, prompts: Sequence[str]) -> np.ndarray:
    """Whether each prompt is longer than every text encoder of the pipeline reads, so that its end is lost; bool [B].

    Args:
        text: what `space.load_text` gave, with its tokenizers.
    """
    cut = np.ones(len(prompts), dtype=bool)
    for part, most in space.text_lengths.items():
        tokens = getattr(text, part.replace("text_encoder", "tokenizer"))(list(prompts), verbose=False)
        cut &= [len(ids) > most for ids in tokens["input_ids"]]
    return cut
