"""Importing a library without optional packages of its that cost every process a second and are of no use here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Whatever is imported in the block finds these packages not installed; one that is imported already stays.

    Only for libraries that do without them: any other raises ImportError.
    """
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None is Python's own way to say that there is none
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
