"""Importing a library without an optional package of its that costs every process a second and is of no use here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(package: str) -> Iterator[None]:
    """Whatever is imported in the block finds `package` not installed; one that is imported already stays.

    Only for libraries that do without it: any other raises ImportError.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules[package]
