"""Files of a run: small ones are read with an error that names them (`storage.replace_text` writes them), hashes, scratch space."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def content_hash(path: Path) -> str:
    """Of a file, or of all files below a folder in the order of their paths: their names and every byte.

    Links are followed, a folder that was seen already once only.
    """
    files, seen = [] if path.is_dir() else [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(folder, name) for name in names]
    files.sort()
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


@contextmanager
def scratch(owner: Place) -> Iterator[Path]:
    """An empty temporary folder of this machine, for the one process that works for `owner` at a time.

    A process that is killed cannot remove its folder, and a checkpoint may have 10 GB: the next one does, so that they do
    not add up.
    """
    name = hashlib.blake2b(str(owner).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir(), f"raydistill-{os.getuid()}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
