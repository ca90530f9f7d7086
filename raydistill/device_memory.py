"""Errors of a full device in words of the project: which role, at what work, and which keys would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from raydistill.errors import OutOfMemory

_DOING = "at work on: "  # what a note of an error begins with


@contextmanager
def doing(name: str) -> Iterator[None]:
    """What the role is doing in the block: an error of a full device is marked with it, the innermost one first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"{_DOING}{name}")
        raise


@contextmanager
def naming_out_of_memory(role: str, remedies: Sequence[str]) -> Iterator[None]:
    """Where the device is full, say so in one line.

    Args:
        role: who needs the memory, such as `trainer`.
        remedies: settings that need less, such as `distill.micro_batches=2`.

    Raises:
        OutOfMemory: in the place of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(out_of_memory(error, role, remedies), _marked(error)) from error


def _marked(error: BaseException) -> str:
    """What was being done, of the innermost block that has marked an error; empty: none has."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_DOING)]
    return notes[0].removeprefix(_DOING) if notes else ""


def out_of_memory(error: BaseException, role: str, remedies: Sequence[str], what: str = "") -> str:
    """The line.

    Args:
        what: was being done, where no block has marked the error.
    """
    where = _marked(error) or what
    said = " ".join(str(error).split()).partition(" If reserved but unallocated")[0]  # a hint for torch's own allocator
    at = f" at {where}" if where else ""
    helps = f"set {' or '.join(remedies)}" if remedies else "it needs a larger GPU"
    return f"{role}: out of device memory{at}; {helps} ('raydistill plan' counts what fits). torch: {said[:400]}"
