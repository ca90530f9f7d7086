"""Two lanes: `pytest` runs the short one; `pytest -m "full or not full"` runs everything (tests/README.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def full_but(values: Iterable[Any], *short: Any) -> list[Any]:
    """Parameters of a test, of which only those named `short` run in the short lane."""
    values = list(values)
    missing = set(short) - set(values)
    assert not missing, missing
    return [value if value in short else pytest.param(value, marks=pytest.mark.full) for value in values]
