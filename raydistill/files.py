"""Small files of a run, read with an error that names them; `storage.replace_text` writes them."""

from __future__ import annotations

import json
from typing import Any

from raydistill.storage import Place


class DamagedFile(ValueError):
    """A file of a run that is not what the run wrote; the message names it and says what to do."""


def read_json(file: Place, cure: str) -> Any:
    """What a JSON file holds. Raises DamagedFile, which ends with `cure`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{file} is damaged ({error}): {cure}") from error
