"""How much of a prompt each text encoder reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydistill.spaces.base import Space


def text_lengths(space: Space) -> dict[str, int]:
    """Tokens that each text encoder reads, as the family's `encode_prompts` asks for them."""
    family = type(space).__name__
    fixed = {"KolorsSpace": 256, "PixArtSigmaSpace": 300}
    longest = {"FluxSpace": ("tokenizer_2", 512), "StableDiffusion3Space": ("tokenizer_3", 256)}
    longest |= {"Flux2KleinSpace": ("tokenizer", 512), "ZImageSpace": ("tokenizer", 512)}
    lengths = {}
    for part, entry in space.index.items():
        if part.startswith("tokenizer") and isinstance(entry, list) and entry[1] is not None:
            length = _settings(space, part)["model_max_length"]
            if longest.get(family, (None,))[0] == part:
                length = min(length, longest[family][1])
            lengths[part.replace("tokenizer", "text_encoder")] = fixed.get(family, length)
    return lengths


def are_cut(space: Space, text: Any, prompts: Sequence[str]) -> np.ndarray:
    """Whether each prompt is longer than every text encoder of the pipeline reads, so that its end is lost; bool [B].

    A tokenizer_config.json may name a word as `trained_without_ending`: the encoder was trained on prompts that lost just
    this word at their end, so losing it there is not counted. Only the embedded world's CLIP tokenizer has the key.
    transformers keeps the key when it saves, and makes the same tokens with it.

    Args:
        text: what `space.load_text` gave, with its tokenizers.
    """
    cut = np.ones(len(prompts), dtype=bool)
    for part, most in text_lengths(space).items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        ending = _settings(space, tokenizer).get("trained_without_ending")
        needed = [_without(prompt, ending) for prompt in prompts] if ending else list(prompts)
        tokens = getattr(text, tokenizer)(needed, verbose=False)
        cut &= [len(ids) > most for ids in tokens["input_ids"]]
    return cut


def _settings(space: Space, tokenizer: str) -> dict[str, Any]:
    return json.loads(Path(space.folder, tokenizer, "tokenizer_config.json").read_text())


def _without(prompt: str, ending: str) -> str:
    """The prompt without the word `ending` at its end."""
    return re.sub(rf"\s+{re.escape(ending)}\s*$", "", prompt, flags=re.IGNORECASE)
