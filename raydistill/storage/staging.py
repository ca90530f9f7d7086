"""Inputs by URI: fetched once a node into a cache ($RAYDISTILL_CACHE, default ~/.cache/raydistill), then read as local files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from raydistill.errors import InputError
from raydistill.storage.place import _DENIED, Place, Remote, cause, remote

STAGED = re.compile(r".*/staged/(?P<digest>[0-9a-f]{16})/(?P<scheme>s3|gs)/(?P<key>.+)")


# -- inputs: staged once a node ---------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("RAYDISTILL_CACHE", "~/.cache/raydistill")).expanduser().absolute()


def fetch(uri: str) -> Path:
    """The local copy of an object, or of all objects below a prefix, as they are now; fetched where it is missing.

    Its last name is the URI's. Of several processes one fetches, and the others wait for it.

    Raises:
        InputError: a wrong URI, nothing there, or no credentials.
        OSError: the store does not answer, or the disk is full.
    """
    source = remote(uri)
    entries = _entries(source)
    return _staged(source, _digest(source, entries), entries)


def on_this_machine(path: str | Path) -> Path:
    """A path as another node gave it: what it has staged, or fetched from the hub, is fetched here too, the same version.

    Raises as `fetch`; InputError also where the objects have changed meanwhile.
    """
    path = Path(path)
    match = STAGED.fullmatch(str(path))
    if path.exists():
        return path
    if match is None:
        from raydistill.storage.hub import counterpart

        return counterpart(path)
    source = Remote(match["scheme"], match["key"])
    entries = _entries(source)
    if _digest(source, entries) != match["digest"]:
        raise InputError(f"{source}: has changed since it was read by the process that started this one; start again")
    return _staged(source, match["digest"], entries)


def _entries(source: Remote) -> list[tuple[str, int, int]]:
    try:
        entries = source.entries()
    except OSError as error:
        text = cause(error, source.scheme)
        raise (InputError if _DENIED.search(text) else OSError)(f"{source}: cannot be read: {text}") from error
    if not entries:
        raise InputError(f"{source}: no such object, and none below it")
    for name, *_ in entries:
        if ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: the name of {name!r} leads out of the folder")
    return entries


def _digest(source: Remote, entries: list[tuple[str, int, int]]) -> str:
    return hashlib.sha256(json.dumps([str(source), entries]).encode()).hexdigest()[:16]


def _staged(source: Remote, digest: str, entries: list[tuple[str, int, int]]) -> Path:
    """`<cache>/staged/<digest>/<scheme>/<bucket>/<key>`, whole: its first folder is moved there in one step."""
    cache = cache_folder() / "staged"
    whole, unfinished = cache / digest, cache / f".{digest}"
    target = Path(source.scheme, source.key)
    if (whole / target).exists():
        return whole / target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        if not (whole / target).exists():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            _fetch(source, unfinished / target, entries)
            unfinished.replace(whole)
    return whole / target


def _fetch(source: Remote, target: Path, entries: list[tuple[str, int, int]]) -> None:
    size, free = sum(size for _, size, _ in entries), shutil.disk_usage(cache_folder()).free
    if size > free:
        raise OSError(
            f"{source}: {size / 2**20:.0f} MiB do not fit into {cache_folder()}, which has {free / 2**20:.0f}; make room, "
            "or name another folder in RAYDISTILL_CACHE"
        )
    try:
        source.download(target)
    except OSError as error:
        raise OSError(f"{source}: cannot be fetched: {cause(error, source.scheme)}") from error
    for name, size, _ in entries:
        if (found := (target / name if name else target).stat().st_size) != size:
            raise OSError(f"{source}: {name} came with {found} of {size} bytes; has it been written meanwhile?")


# -- outputs ----------------------------------------------------------------------------------------------


def local_copy(source: Place) -> Path:
    """A path to read from: a `Remote` is staged. Raises as `fetch`."""
    return fetch(str(source)) if isinstance(source, Remote) else source
