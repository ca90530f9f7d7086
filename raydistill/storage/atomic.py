"""Files and folders that are whole at every moment, local paths for those in a bucket, and scratch folders.

It needs no other library and is quick to import: the smallest processes use it too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydistill.errors import InputError
from raydistill.storage import lease
from raydistill.storage.place import Place, Remote, is_link

ABANDONED_S = 3600.0  # no write of one file takes that long
COPY = "raydistill-copy"  # begins the names of temporary folders that a process holds


# -- writing ----------------------------------------------------------------------------------------------


@contextmanager
def replacing(target: Place, *, alone: bool = False, durable: bool = True) -> Iterator[Path]:
    """A local path to write a file or a folder to. It takes the place of `target` when the block ends.

    A reader sees the old one or the new one, whole, also after a kill, a power cut or on a full disk. A block that fails
    leaves the old one. A folder takes two moves, and for that moment there is none. Modes follow the umask.

    Args:
        target: the folder around it is made where it is missing. What belongs into a bucket is uploaded at the end.
        alone: no other process writes to `target` meanwhile. The next write then uses up what a killed one left;
            otherwise `remove_abandoned` does.
        durable: False leaves it to the system when the bytes reach the disk. A power cut may then lose the file.
    """
    if isinstance(target, Remote):
        with writing(target) as local:
            yield local
        return
    lease.check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh = _beside(target, "new" if alone else mark)  # the name ends as the target's: writers go by its suffix
    old = _beside(target, f"{mark}.old")
    if alone and fresh.is_dir():
        shutil.rmtree(fresh)
    try:
        yield fresh
        lease.check(target)  # again: the block may have taken long
        follow_umask(fresh)
        if durable:
            _flush(fresh)
        if fresh.is_dir() and target.exists():
            target.rename(old)
        fresh.replace(target)
    finally:
        _remove(fresh)
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(old)


def _beside(target: Path, mark: str) -> Path:
    return target.with_name(f".{mark}.{target.name}")


def _files(written: Path) -> list[Path]:
    """The file itself, or all files of a folder."""
    return [file for file in (written.rglob("*") if written.is_dir() else [written]) if file.is_file()]


def follow_umask(written: Path) -> None:
    """Give what its owner alone may read, in a folder or alone, the mode of new files and folders.

    safetensors writes such files, and `tempfile` such folders. What is copied without its mode needs nothing.
    """
    paths = [path for path in (written, *written.rglob("*")) if not path.is_symlink()]
    private = [path for path in paths if not path.stat().st_mode & 0o077]
    if private:
        probe = _beside(written, uuid.uuid4().hex[:8])
        probe.mkdir()
        (probe / "file").touch()
        for path in private:
            like = probe if path.is_dir() else probe / "file"
            path.chmod(stat.S_IMODE(like.stat().st_mode))
        shutil.rmtree(probe)


def _flush(written: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    for file in _files(written):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_text(file: Place, text: str, *, durable: bool = True) -> None:
    """Write a small file as `replacing` does."""
    with replacing(file, durable=durable) as fresh:
        fresh.write_text(text, encoding="utf-8")


def remove_abandoned(folder: Place, names: str) -> None:
    """Delete what killed writers of the files `names`, a glob, left in a folder, once it is an hour old.

    A bucket holds nothing of the kind.
    """
    if isinstance(folder, Remote):
        return
    for pattern in (f".*.{names}", f".{names}.*"):  # earlier versions had the mark at the end
        for file in folder.glob(pattern):
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                _remove(file)


# -- local paths ------------------------------------------------------------------------------------------


@contextmanager
def writing(target: Place) -> Iterator[Path]:
    """A local path for a writer that replaces `target` itself: `target`, or one that is uploaded when the block ends."""
    lease.check(target)
    if isinstance(target, Path):
        yield target
        return
    with _temporary() as folder:
        yield folder / target.name
        target.upload(folder / target.name)


@contextmanager
def reading(source: Place) -> Iterator[Path]:
    """A local path to read a file or folder from, for the length of the block: `source` itself, or a copy."""
    if isinstance(source, Path):
        yield source
        return
    with _temporary() as folder:
        source.download(folder / source.name)
        yield folder / source.name


@contextmanager
def _temporary() -> Iterator[Path]:
    """A temporary folder of this process. The next one that is made here removes those of killed processes.

    A living process holds a lock of its folder, and gives the folder its name once it has it.
    """
    around = Path(tempfile.gettempdir())
    for abandoned in around.glob(f"{COPY}-{os.getuid()}-*"):
        with suppress(OSError), _locked(abandoned):
            shutil.rmtree(abandoned, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix="raydistill-"))
    with _locked(fresh):
        folder = fresh.rename(around / f"{COPY}-{os.getuid()}-{uuid.uuid4().hex[:16]}")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where the folder is gone, or another process has the lock; the kernel drops a dead one's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def move_folder(source: Place, target: Place) -> None:
    """Move a folder's files into another folder. They replace those of the same names."""
    lease.check(target)
    with reading(source) as local:
        if isinstance(target, Remote):
            target.upload(local)
        else:
            shutil.copytree(local, target, dirs_exist_ok=True)
    remove_folder(source)


def remove_folder(folder: Place) -> None:
    """Delete a folder, or all objects below a prefix; of a link, the link alone."""
    lease.check(folder)
    if isinstance(folder, Remote):
        folder.filesystem.delete_dir(folder.key)
    elif is_link(folder):
        folder.unlink()
    else:
        shutil.rmtree(folder)


def read_json(file: Place, cure: str, kind: type = dict) -> Any:
    """What a JSON file holds, a value of this kind. Raises InputError, which ends with `cure`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): {cure}") from error
    if not isinstance(value, kind):
        raise InputError(f"{file} is damaged (it holds no {kind.__name__}, but {str(value)[:40]!r}): {cure}")
    return value


@contextmanager
def scratch(owner: Place) -> Iterator[Path]:
    """An empty temporary folder of this machine, for the one process that works for `owner` at a time.

    A process that is killed cannot remove its folder, and a checkpoint may have 10 GB. The next process of this owner
    removes it.
    """
    name = hashlib.blake2b(str(owner).encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir(), f"raydistill-{os.getuid()}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
