"""Imports that do without an optional package."""

from __future__ import annotations

import sys

import pytest

from raydistill.imports import left_out


def test_a_package_is_left_out_of_the_block_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with left_out("sys", "wave"), pytest.raises(ImportError):
        import wave
    import wave

    assert sys.modules["wave"] is wave


def test_what_is_imported_already_stays():
    with left_out("sys"):
        import sys as again
    assert again is sys.modules["sys"]
