"""Files of a run: small ones are read with an error that names them (`storage.replace_text` writes them), hashes, scratch space."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydistill.errors import InputError
from raydistill.storage.place import Place, Remote


@contextlib.contextmanager
def writing(target: Place) -> Iterator[Path]:
    """A local path to write a file or folder to: `target` itself, or one that is stored there at the block's end."""
    if isinstance(target, Path):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
        yield Path(folder, target.name)
        target.upload(Path(folder, target.name))


@contextlib.contextmanager
def reading(source: Place) -> Iterator[Path]:
    """A local path to read a file or folder from, for the length of the block: `source` itself, or a copy."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
        source.download(Path(folder, source.name))
        yield Path(folder, source.name)


def replace_text(file: Place, text: str) -> None:
    """Write a small file in one move, and the folder it lies in.

    A reader sees the old file or the new one, whole, also after a kill or on a full disk.
    """
    if isinstance(file, Remote):
        file.write_text(text)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def move_folder(source: Place, target: Place) -> None:
    """Move a folder's files into another folder, where they replace those of their names."""
    with reading(source) as local:
        if isinstance(target, Remote):
            target.upload(local)
        else:
            shutil.copytree(local, target, dirs_exist_ok=True)
    if isinstance(source, Remote):
        source.filesystem.delete_dir(source.key)
    else:
        shutil.rmtree(source)


def read_json(file: Place, cure: str) -> Any:
    """What a JSON file holds. Raises InputError, which ends with `cure`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): {cure}") from error


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
