"""Configuration files of the public models: all that planning and tests need of them, without weights or network.

Each JSON file holds the small files of one model's folder by their path in it. Of tokenizer_config.json it has the
longest input, of text encoders the sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def write_folder(sizes: str | Path, folder: str | Path) -> Path:
    """Write the files of one model into `folder`, which may exist; returns it.

    Args:
        sizes: a file of this folder by its name (`sd15`, `flux1-dev`, …), or the path of such a JSON file elsewhere.
    """
    source = sizes if isinstance(sizes, Path) else FOLDER / f"{sizes}.json"
    for path, content in json.loads(source.read_text()).items():
        file = Path(folder, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return Path(folder)
