"""What must be finite: noted on the device while it is computed, and looked at once, before anything is stepped on.

`note` asks the device for nothing. `look` waits for it once and names the first value that was not finite: later ones
follow from it.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raydistill.errors import NonFiniteError
from raydistill.transfer import download


class Finite:
    """The values of one worker that were noted since the last look, in their order."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, bool, torch.Tensor]] = []  # source, elsewhere, [B]: samples that are not finite

    def note(self, value: torch.Tensor, source: str, elsewhere: bool = False) -> torch.Tensor:
        """Return `value` [B, …] or a scalar; `look` will say so where it is not finite.

        Args:
            elsewhere: see `NonFiniteError`.
        """
        flat = value.detach()
        flat = flat.reshape(len(flat), -1) if flat.ndim else flat.reshape(1, 1)
        self._noted.append((source, elsewhere, ~torch.isfinite(flat).all(1)))
        return value

    @contextmanager
    def aside(self) -> Iterator[None]:
        """In the block nothing is noted: what is computed there is shown, and nothing is stepped on because of it."""
        kept = list(self._noted)
        try:
            yield
        finally:
            self._noted = kept

    def look(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """Wait for the device, once.

        Args:
            values: that are wanted in main memory as well.

        Returns:
            Copies of `values` on the CPU.

        Raises:
            NonFiniteError: names the first source that was not finite, and the samples concerned.
        """
        noted, self._noted = self._noted, []
        flags = [torch.cat([bad for *_, bad in noted])] if noted else []
        copies = download([*values, *flags])
        if noted and (bad := copies.pop()).any():
            parts = bad.split([len(part) for *_, part in noted])
            raise _error(*next((*of, part) for (*of, _), part in zip(noted, parts, strict=True) if part.any()))
        return copies


def _error(source: str, elsewhere: bool, bad: torch.Tensor) -> NonFiniteError:
    rows = bad.nonzero().flatten().tolist()
    message = f"{source}: not finite in samples {rows[:8]} of {len(bad)}"
    return NonFiniteError(message, len(rows), rows, elsewhere)
