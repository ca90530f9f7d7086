"""Public models at their real widths, with few blocks: what no shape depends on, and all that takes time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raydistill.spaces.published import write_folder

FEWER = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_hidden_layers": 2,
    "transformer_layers_per_block": [1, 1, 1],
    "dual_attention_layers": [0],
}


def write_shortened(name: str, folder: str | Path, fewer: dict[str, Any] | None = None) -> Path:
    """As `write_folder`; of the network's settings, those that say how many blocks it has are `fewer` (default FEWER)."""
    path = write_folder(name, folder)
    for part in ("transformer", "unet"):
        file = path / part / "config.json"
        if file.is_file():
            config = json.loads(file.read_text())
            known = {key: value for key, value in (fewer or FEWER).items() if config.get(key)}
            file.write_text(json.dumps(config | known))
    return path
