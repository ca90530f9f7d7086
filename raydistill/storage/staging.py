"""Inputs by URI: each node fetches them once into a cache, and reads them as local files.

The cache is $RAYDISTILL_CACHE, by default $XDG_CACHE_HOME/raydistill, which is ~/.cache/raydistill.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from filelock import FileLock

from raydistill.errors import InputError
from raydistill.storage.atomic import replacing
from raydistill.storage.hub import counterpart
from raydistill.storage.place import DENIED, Place, Remote, cause, remote

STAGED = re.compile(r".*/staged/(?P<digest>[0-9a-f]{16})/(?P<scheme>s3|gs|hf)/(?P<key>.+)")


def cache_folder() -> Path:
    around = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    default = (
        around if around.is_absolute() else Path.home() / ".cache"
    ) / "raydistill"  # XDG: a relative one is ignored
    return Path(os.environ.get("RAYDISTILL_CACHE") or default).expanduser().absolute()


def fetch(uri: str) -> Path:
    """The local copy of an object, or of all objects below a prefix, as they are now. It is fetched where it is missing.

    Its last name is the URI's. Of several processes one fetches, and the others wait for it.

    Raises:
        InputError: a wrong URI, nothing there, or no credentials.
        OSError: the store does not answer, or the disk is full.
    """
    source = remote(uri)
    entries = _entries(source)
    return _staged(source, _digest(source, entries), entries)


def has_room(source: Remote) -> bool:
    """Whether a copy is here already, or would take no more than half of what is free. Raises as `fetch`."""
    entries = _entries(source)
    cache = cache_folder()
    if (cache / "staged" / _digest(source, entries)).exists():
        return True
    cache.mkdir(parents=True, exist_ok=True)
    return 2 * sum(size for _, size, _ in entries) <= shutil.disk_usage(cache).free


def on_this_machine(path: str | Path) -> Path:
    """A path as another node gave it. What that node fetched, from a bucket or the hub, this one fetches too, unchanged.

    Raises as `fetch`; InputError also where the objects have changed meanwhile.
    """
    path = Path(path)
    match = STAGED.fullmatch(str(path))
    if path.exists():
        return path
    if match is None:
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
        raise (InputError if DENIED.search(text) else OSError)(f"{source}: cannot be read: {text}") from error
    if not entries:
        raise InputError(f"{source}: no such object, and none below it")
    for name, *_ in entries:
        if ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: the name of {name!r} leads out of the folder")
    return entries


def _digest(source: Remote, entries: list[tuple[str, int, int]]) -> str:
    return hashlib.sha256(json.dumps([str(source), entries]).encode()).hexdigest()[:16]


def _staged(source: Remote, digest: str, entries: list[tuple[str, int, int]]) -> Path:
    """`<cache>/staged/<digest>/<scheme>/<bucket>/<key>`, whole: `<digest>` is moved there in one step."""
    cache = cache_folder() / "staged"
    whole = cache / digest
    target = Path(source.scheme, source.key)
    if (whole / target).exists():
        return whole / target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{digest}.lock", fallback_to_soft=False):
        if not (whole / target).exists():
            with replacing(whole, alone=True) as fresh:
                _fetch(source, fresh / target, entries)
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


def local_copy(source: Place) -> Path:
    """A path to read from. A `Remote` is fetched; raises as `fetch`."""
    return fetch(str(source)) if isinstance(source, Remote) else source
