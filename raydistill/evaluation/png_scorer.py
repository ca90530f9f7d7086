"""A scorer that gets pictures as bytes instead of files, wherever it runs: pictures of a run go through no shared folder.

Imports the standard library alone: it also runs in the environments of the reward packages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Columns = dict[str, list["float | None"]]  # column -> a number a picture; None where it has none


class PngScorer:
    """One metric. Its model is loaded at the first call."""

    def __init__(self, make: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        self._make, self._arguments = make, dict(arguments)
        self._work: Any = None

    def measure(self, pictures: Sequence[bytes], prompts: Sequence[str], at_once: int) -> Columns:
        """Columns of N numbers.

        Args:
            pictures: N PNG files.
            at_once: pictures per call of the scorer.
        """
        self.load()
        columns: Columns = {}
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(pictures), at_once):
                chunk = range(start, min(start + at_once, len(pictures)))
                files = [Path(folder, f"{index}.png") for index in chunk]
                for file, index in zip(files, chunk, strict=True):
                    file.write_bytes(pictures[index])
                found = self._work([str(file) for file in files], [prompts[index] for index in chunk])
                for name, values in found.items():
                    columns.setdefault(name, []).extend(values)
                for file in files:
                    file.unlink()
        return columns

    def load(self) -> None:
        if self._work is None:
            self._work = self._make(**self._arguments)

    def to(self, device: Any) -> None:
        """Move the scorer's model, where it has one that can be moved."""
        if hasattr(self._work, "to"):
            self._work.to(device)
