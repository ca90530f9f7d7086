"""Fingerprints: name and version of a model's folder, and a hash of all bytes of a file or folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

SNAPSHOT = re.compile(r"models--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")  # Hugging Face's cache
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
PIECES, PIECE_BYTES = 16, 65536  # of each file that are read: weights are too large to hash whole
# Where from, with what, and of which prompts it says that they are cut: none of them changes what the model draws.
NOT_THE_MODEL = ("_name_or_path", "_diffusers_version", "transformers_version", "trained_without_ending")


def identify(folder: str | Path) -> tuple[str, str]:
    """(name, revision) of a model folder.

    In Hugging Face's cache they are the repository and its commit. Elsewhere the name is the folder's, and the revision
    a fingerprint of its JSON and safetensors files. Files of up to a megabyte count with their contents, larger ones with
    their size and 16 pieces spread over them. Training changes nearly every byte of the weights, so it shows. An edit
    of a few tensors may not.
    """
    folder = Path(folder).absolute()
    cached = SNAPSHOT.search(folder.as_posix())
    if cached:
        return cached["name"].replace("--", "/"), cached["commit"]
    return folder.name, _digest(folder, ("*.json", "*.safetensors"))


def fingerprint(path: Path, pattern: str | None = None) -> str:
    """Of what a file, or a folder's files of one pattern, hold; None: of a model, with its tokenizers' files.

    Large files count as in `identify`, and so does Hugging Face's cache.
    """
    path = path.absolute()
    if path.is_file():
        return hashlib.blake2b(_contents(path), digest_size=8).hexdigest()
    cached = SNAPSHOT.search(path.as_posix())
    return cached["commit"] if cached else _digest(path, (pattern,) if pattern else MODEL_FILES)


def _digest(folder: Path, patterns: Sequence[str]) -> str:
    """Hash of names and contents of the files of these patterns; hidden ones do not count."""
    digest = hashlib.blake2b(digest_size=8)
    files = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    for file in sorted(files):
        name = file.relative_to(folder)
        if any(map(name.match, patterns)) and not any(part.startswith(".") for part in name.parts):
            digest.update(name.as_posix().encode() + b"\0" + _contents(file))
    return digest.hexdigest()


def _contents(file: Path) -> bytes:
    if file.name.endswith(("config.json", "index.json")) and isinstance(config := _parsed(file), dict):
        return json.dumps({k: v for k, v in config.items() if k not in NOT_THE_MODEL}, sort_keys=True).encode()
    size = file.stat().st_size
    with file.open("rb") as stream:
        return size.to_bytes(8) + (stream.read() if size <= PIECES * PIECE_BYTES else _pieces(stream, size))


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # whoever opens the model says so
        return None


def _pieces(stream: BinaryIO, size: int) -> bytes:
    pieces = []
    for index in range(PIECES):
        stream.seek(index * (size - PIECE_BYTES) // (PIECES - 1))
        pieces.append(stream.read(PIECE_BYTES))
    return b"".join(pieces)


def content_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder in the order of their paths: their names and every byte.

    Links are followed. A folder counts once.
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
