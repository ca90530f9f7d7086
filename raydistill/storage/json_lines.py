"""JSON-lines files of the project. Only the standard library: they are also read where the reward packages run."""

from __future__ import annotations


def lines_of(text: str) -> list[str]:
    """The lines of a file, of which `\\n` alone ends one: texts hold U+2028, U+0085 and what else `splitlines` splits at.

    Also the rest behind the last `\\n`, which a writer that was killed has left, if there is any.
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]
