"""Small files of a run: replaced in one move, and read with an error that names them."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file of a run that is not what the run wrote; the message names it and says what to do."""


def replace_text(file: Path, text: str) -> None:
    """Write in one move: a reader sees the old file or the new one, whole, also after a kill or on a full disk."""
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def read_json(file: Path, cure: str) -> Any:
    """What a JSON file holds. Raises DamagedFile, which ends with `cure`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{file} is damaged ({error}): {cure}") from error
