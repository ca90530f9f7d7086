"""Cells of the lane for tests: they run in a process of their own, whose torch takes cuda:0 for a device that is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pretended_cuda
import pytest

HERE = Path(__file__).parent
needs_a_compiler = pytest.mark.skipif(pretended_cuda.compiler() is None, reason="needs a C++ compiler (c++, or $CXX)")
Cells = dict[tuple[str, str], dict[str, Any]]  # (family or pair, role) -> what device_cells.py has written


def run_cells(folder: Path, cells: Iterable[tuple[str, str]], script: str = "device_cells.py") -> Cells:
    """Run them one after another; builds the device guard where it is not there yet."""
    pretended_cuda.build()
    paths = (HERE.parents[1], HERE.parent, HERE, *filter(None, [os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(folder), *(":".join(cell) for cell in cells)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {(cell["family"], cell["role"]): cell for cell in json.loads((folder / "cells.json").read_text())}


def check(cell: dict[str, Any]) -> dict[str, Any]:
    """The notes of a cell that ran to its end, with the shapes and dtypes of real tensors."""
    assert cell["error"] is None, cell["error"]
    assert cell["notes"]["wrong"] == {}
    return cell["notes"]
