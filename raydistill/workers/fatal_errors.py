"""Errors that a restart would meet again: workers write them down, so that Ray Train does not repeat them forever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place
from raydistill.teachers.request import TeacherError, TeacherUnavailable
from raydistill.workers.checkpoint import CheckpointError

FATAL_FILE = "fatal.txt"


def is_fatal(error: BaseException) -> bool:
    """Whether the same inputs would fail again.

    Wrong input, numbers that are not finite and a GPU that is too small would; lost processes, nodes, files and services
    may come back.
    """
    if isinstance(error, TeacherUnavailable):
        return False
    lasting = (
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        torch.OutOfMemoryError,
        CheckpointError,
        TeacherError,
    )
    return isinstance(error, lasting)


@contextmanager
def recording_fatal_errors(folder: Place) -> Iterator[None]:
    """Around a worker's body: a lasting error is raised, and kept in the folder for the driver and for restarts."""
    try:
        yield
    except Exception as error:
        if is_fatal(error):
            replace_text(folder / FATAL_FILE, f"{type(error).__name__}: {error}")
        raise


def fatal_error(folder: Place) -> str | None:
    """The lasting error of an earlier attempt, if there was one."""
    file = folder / FATAL_FILE
    return file.read_text() if file.is_file() else None


def forget_fatal_error(folder: Place) -> None:
    """Whoever starts again has mended it."""
    (folder / FATAL_FILE).unlink(missing_ok=True)
