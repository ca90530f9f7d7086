"""Fingerprints: name and version of a model's folder, and a hash of all bytes of a file or folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raydistill.errors import InputError

SNAPSHOT = re.compile(r"models--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")  # Hugging Face's cache
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.bin", "*.pt", "*.pth")
WHOLE_BYTES = 256 << 20  # files up to this size are read whole
BLOCK_BYTES, SAMPLE_BYTES = 1 << 20, 1 << 12  # of larger ones: the first block whole, then a sample of every block
PIECES, PIECE_BYTES = 16, 65536  # of each file that `identify` reads
READERS = 8  # threads: network file systems answer late
# Where from, with what, and of which prompts it says that they are cut: none of them changes what the model draws.
NOT_THE_MODEL = ("_name_or_path", "_diffusers_version", "transformers_version", "trained_without_ending")


def identify(folder: str | Path) -> tuple[str, str]:
    """(name, revision) of a model folder, as sets of pairs have kept it from the first version on.

    In Hugging Face's cache they are the repository and its commit. Elsewhere the name is the folder's, and the revision
    a fingerprint of its JSON and safetensors files. Files of up to a megabyte count with their contents, larger ones with
    their size and 16 pieces spread over them. Training changes nearly every byte of the weights, so it shows. An edit
    of a few tensors may not.

    Raises:
        InputError: a file cannot be read.
    """
    folder = Path(folder).absolute()
    cached = SNAPSHOT.search(folder.as_posix())
    if cached:
        return cached["name"].replace("--", "/"), cached["commit"]
    return folder.name, _digest(folder, _files(folder, ("*.json", "*.safetensors")), _pieces, digest_size=8)


def fingerprint(path: Path, unused: Collection[str] = ()) -> str:
    """Of what a model draws with: a file of weights, or a folder's weights, configurations and vocabularies.

    Files of up to 256 MiB count with every byte. Of larger ones the first MiB counts, which holds the names and shapes of
    all tensors, and 4 kB of every other MiB. So 24 GB take seconds, and a change to a tensor of 1 MB or more shows.
    In Hugging Face's cache the commit counts.

    Args:
        unused: parts of a pipeline folder that are never loaded. Besides them, what its model_index.json does not name
            does not count.

    Raises:
        InputError: a file cannot be read.
    """
    path = path.absolute()
    cached = SNAPSHOT.search(path.as_posix())
    if cached:
        return cached["commit"]
    if path.is_file():
        return _digest(path.parent, [path], _sampled, named=False)
    index = path / "model_index.json"
    parts = _parsed(index) if index.is_file() else None
    if not isinstance(parts, dict):
        return _digest(path, _files(path, MODEL_FILES), _sampled)
    used = sorted(name for name, entry in parts.items() if isinstance(entry, list) and entry != [None, None])
    folders = [path / name for name in used if name not in unused]
    return _digest(path, [index, *(file for part in folders for file in _files(part, MODEL_FILES))], _sampled)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of these patterns in a folder and below, by path; no hidden ones, and no links that lead nowhere or upwards."""
    real = Path(os.path.realpath(folder))
    found, above = [], {str(folder): {str(real), *map(str, real.parents)}}
    for place, folders, names in os.walk(folder, followlinks=True):
        for name in [*folders]:
            real = os.path.realpath(inner := os.path.join(place, name))
            if name.startswith(".") or real in above[place]:
                folders.remove(name)
            above[inner] = above[place] | {real}
        files = (Path(place, name) for name in names if not name.startswith("."))
        found += [file for file in files if any(map(file.match, patterns)) and file.is_file()]
    return sorted(found)


def _digest(
    folder: Path, files: Sequence[Path], read: Callable[[Path], bytes], *, digest_size: int = 16, named: bool = True
) -> str:
    """Hash of names below `folder` and contents, as `read` gives them. Raises InputError."""

    def contents(file: Path) -> bytes:
        try:
            return read(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}") from error

    digest = hashlib.blake2b(digest_size=digest_size)
    with ThreadPoolExecutor(READERS) as readers:
        for file, content in zip(files, readers.map(contents, files), strict=True):
            name = file.relative_to(folder).as_posix().encode() + b"\0" if named else b""
            digest.update(name + content)
    return digest.hexdigest()


def _configured(file: Path) -> bytes | None:
    """What a configuration says of the model; None: it is none."""
    if file.name.endswith(("config.json", "index.json")) and isinstance(config := _parsed(file), dict):
        return json.dumps({k: v for k, v in config.items() if k not in NOT_THE_MODEL}, sort_keys=True).encode()
    return None


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):  # whoever opens the model says so
        return None


def _pieces(file: Path) -> bytes:
    """Contents, or size and pieces of a large file."""
    if (said := _configured(file)) is not None:
        return said
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= PIECES * PIECE_BYTES:
            return size.to_bytes(8) + stream.read()
        pieces = [size.to_bytes(8)]
        for index in range(PIECES):
            stream.seek(index * (size - PIECE_BYTES) // (PIECES - 1))
            pieces.append(stream.read(PIECE_BYTES))
    return b"".join(pieces)


def _sampled(file: Path) -> bytes:
    """Hash of the contents, or of size and samples of a large file."""
    if (said := _configured(file)) is not None:
        return hashlib.blake2b(said).digest()
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(stream, "blake2b").digest()
        digest = hashlib.blake2b(size.to_bytes(8) + stream.read(BLOCK_BYTES))
        for start in range(BLOCK_BYTES, size, BLOCK_BYTES):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


def files_hash(path: Path, pattern: str) -> str:
    """Hash of a file, or of a folder's files of one pattern: names and every byte. Raises InputError."""
    files = [path] if path.is_file() else _files(path, (pattern,))
    return _digest(path.parent if path.is_file() else path, files, Path.read_bytes)


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
        files += [file for name in names if (file := Path(folder, name)).is_file()]
    files.sort()
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()
