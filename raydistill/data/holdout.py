"""Prompts that are held out of a training file, so that one file is enough: which ones, told by their text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from raydistill.errors import InputError

FEWEST = 16  # distinct prompts on either side; a mean over fewer says nothing


def key_of(text: str) -> str:
    """What a prompt or caption is compared by: its words, in whatever case and spacing."""
    return " ".join(text.casefold().split())


def also_held_out(texts: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """Held-out prompts that stand among the texts too, one of each `key_of`, in the order of letters."""
    wanted = {key_of(prompt): prompt for prompt in held_out}
    return sorted({wanted[key] for key in map(key_of, texts) if key in wanted})


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt is one of the held-out `share`, by a hash of its words in whatever case and spacing.

    So copies of a prompt are on one side, whichever files they are in, and a file that grows changes no side. A larger
    share holds out what a smaller one does, and more.
    """
    return int.from_bytes(hashlib.blake2b(key_of(prompt).encode(), digest_size=8).digest()) < share * 2**64


@dataclass(frozen=True)
class Side:
    """One of the two sides of a file: its prompts that are held out, or all others."""

    share: float
    held_out: bool

    def has(self, prompt: str) -> bool:
        return is_held_out(prompt, self.share) == self.held_out

    def check(self, source: str, here: int, elsewhere: int) -> None:
        """Raises InputError where this side is too small.

        Args:
            here: distinct prompts of this side.
            elsewhere: prompts of the other side.
        """
        if here >= FEWEST:
            return
        all_prompts, what = here + elsewhere, "held out" if self.held_out else "left to train on"
        if all_prompts < 2 * FEWEST:
            cure = (
                f"name a larger file, or held-out prompts of their own (evaluation.prompts); each side needs {FEWEST}"
            )
        else:
            fitting = min(0.5, 2 * FEWEST / all_prompts)
            cure = f"{FEWEST} are needed: {fitting:.2g} would do, for example"
        raise InputError(
            f"evaluation.holdout={self.share:g}: of {all_prompts} prompts of {source}, {here} are {what}; {cure}"
        )
