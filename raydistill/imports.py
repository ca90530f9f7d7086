"""Imports of libraries without their optional packages, which would cost every process a second for nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """To what the block imports, these packages seem not installed. A package that is imported already stays.

    Only for libraries that can do without them. Others raise ImportError.
    """
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # None makes Python say that there is no such package
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]
