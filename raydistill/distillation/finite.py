"""What must be finite: noted on the device while it is computed, and looked at once, before anything is stepped on.

`note` asks the device for nothing. `look` waits for it once and names the first value that was not finite: later ones
follow from it. Where that is a value of samples, the error names all samples that have one, so that they can be left out.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raydistill.errors import GradientOverflow, NonFiniteError
from raydistill.transfer import download

OTHERS_SAMPLE = "a sample of another worker"
OTHERS_VALUE = "a value of another worker"


@dataclass(frozen=True)
class _Note:
    source: str
    elsewhere: bool
    bad: torch.Tensor  # [B]: samples that are not finite
    ids: torch.Tensor | None  # of the samples [B], in main memory; None: it is no value of samples
    scaled: bool = False


class Finite:
    """The values of one worker that were noted since the last look, in their order."""

    def __init__(self) -> None:
        self._noted: list[_Note] = []
        self._ids: torch.Tensor | None = None

    def of(self, sample_ids: torch.Tensor | None) -> None:
        """What is noted from now on, and has as many rows as there are ids [B], is a value of these samples."""
        self._ids = sample_ids

    def note(self, value: torch.Tensor, source: str, elsewhere: bool = False, *, scaled: bool = False) -> torch.Tensor:
        """Return `value` [B, …] or a scalar; `look` will say so where it is not finite.

        Args:
            elsewhere: see `NonFiniteError`.
            scaled: a gradient whose scale may be too large.
        """
        flat = value.detach()
        flat = flat.reshape(len(flat), -1) if flat.ndim else flat.reshape(1, 1)
        ids = self._ids if value.ndim and self._ids is not None and len(self._ids) == len(value) else None
        self._noted.append(_Note(source, elsewhere, ~torch.isfinite(flat).all(1), ids, scaled))
        return value

    def of_samples(self) -> torch.Tensor | None:
        """1 where a value of a sample was noted that is not finite, else 0, on the device; None: nothing was noted."""
        bad = [note.bad for note in self._noted if note.ids is not None]
        return torch.cat(bad).any().float()[None] if bad else None

    def of_any(self) -> torch.Tensor | None:
        """1 where any value was noted that is not finite, else 0, on the device; None: nothing was noted."""
        return torch.cat([note.bad for note in self._noted]).any().float()[None] if self._noted else None

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
            GradientOverflow: the first that was not finite is a scaled gradient.
            NonFiniteError: names the first source that was not finite, and the samples concerned.
        """
        noted, self._noted = self._noted, []
        flags = [torch.cat([note.bad for note in noted])] if noted else []
        copies = download([*values, *flags])
        if noted and (bad := copies.pop()).any():
            each = bad.split([len(note.bad) for note in noted])
            raise _error([(note, one) for note, one in zip(noted, each, strict=True) if one.any()])
        return copies


def _error(found: list[tuple[_Note, torch.Tensor]]) -> NonFiniteError:
    """Of the notes that were not finite, with the samples [B] concerned of each."""
    own = [(note, one) for note, one in found if note.ids is not None]
    if any(note.source == OTHERS_SAMPLE for note, _ in found):  # means over workers noted before it follow from it
        if not own:
            return NonFiniteError(f"{OTHERS_SAMPLE} is not finite", 1, (), True, ())
        found = own
    first, bad = found[0]
    rows = bad.nonzero().flatten().tolist()
    message = f"{first.source}: not finite in samples {rows[:8]} of {len(bad)}"
    if first.ids is None:
        kind = GradientOverflow if first.scaled else NonFiniteError
        return kind(message, len(rows), rows, first.elsewhere)
    samples = sorted({number for note, one in own for number in note.ids[one].tolist()})
    ids = first.ids[bad].tolist()
    return NonFiniteError(f"{message} (sample ids {ids[:8]})", len(rows), rows, first.elsewhere, samples)
