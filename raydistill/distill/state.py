"""Checkpoint folders: one torch file of tensors and plain values, and a small JSON that people can read.

Written whole or not at all; read with `weights_only=True`, so that a checkpoint can never run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged or does not belong here."""


def save_state(folder: Path, state: dict[str, Any], about: dict[str, Any]) -> None:
    """Write `state.pt` and `about.json` into an existing folder."""
    torch.save(state, folder / "state.pt")
    (folder / "about.json").write_text(json.dumps(about, indent=1))


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, about) of a checkpoint folder. Raises CheckpointError naming the folder."""
    try:
        about = json.loads((folder / "about.json").read_text())
        return torch.load(folder / "state.pt", weights_only=True, map_location="cpu"), about
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{folder}: damaged or incomplete checkpoint ({error})") from error
