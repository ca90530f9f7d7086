"""Which prompts are longer than a pipeline's text encoders read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from raydistill.spaces.base import Space


def are_cut(space: Space, text: Any, prompts: Sequence[str]) -> np.ndarray:
    """Whether each prompt is longer than every text encoder of the pipeline reads, so that its end is lost; bool [B].

    A tokenizer_config.json may name a word as `trained_without_ending`: the encoder was trained on prompts that lost just
    this word at their end, so losing it there is not counted. Only the embedded world's CLIP tokenizer has the key.
    transformers keeps the key when it saves, and makes the same tokens with it.

    Args:
        text: what `space.load_text` gave, with its tokenizers.
    """
    cut = np.ones(len(prompts), dtype=bool)
    for part, most in space.text_lengths.items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        ending = space.tokenizer_config(tokenizer).get("trained_without_ending")
        needed = list(prompts)
        if ending:
            at_its_end = rf"\s+{re.escape(ending)}\s*$"
            needed = [re.sub(at_its_end, "", prompt, flags=re.IGNORECASE) for prompt in prompts]
        tokens = getattr(text, tokenizer)(needed, verbose=False)
        cut &= [len(ids) > most for ids in tokens["input_ids"]]
    return cut
