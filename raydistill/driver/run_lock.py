"""One living job for each run: whoever starts a run holds its folder, and a second driver is told who does.

On one machine a lock says it, which goes with its holder however that ends. Across machines, where a lock may not be seen,
the holder touches the file every few seconds, and whoever finds another machine's name in it watches it for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from raydistill.storage.place import Place, Remote

LEASE_FILE = "owner.json"
READ_BACK_S = 2.0
BEAT_EVERY_S, WATCHED_FOR_S = 5.0, 30.0  # six beats that fail to come say that the holder is gone


class RunLocked(ValueError):
    """Another living job has this run."""


@contextmanager
def lock_run(folder: Place) -> Iterator[None]:
    """Hold a run's folder, which exists, for the length of the block.

    Raises RunLocked: a living job has it; the message says which. Nothing was changed then.
    """
    if isinstance(folder, Remote):
        with _held_remotely(folder):
            yield
        return
    with (folder / LEASE_FILE).open("a+") as file:
        locked, owner = _lock(file), _owner(file)
        here = owner is None or owner["host"] == socket.gethostname()
        if locked is False and here:
            raise _taken(folder, owner)
        if owner is not None and not (locked and here):
            _watch(folder, owner, lambda: _touched(folder))
        file.truncate(0)
        file.write(json.dumps(_me()))
        file.flush()
        try:
            with _beating(lambda: os.utime(file.fileno())):
                yield
        finally:
            file.truncate(0)  # left in order: nobody needs to watch


@contextmanager
def _held_remotely(folder: Remote) -> Iterator[None]:
    """A bucket has no locks: the holder writes the object anew every few seconds."""
    file = folder / LEASE_FILE
    if file.is_file():
        seen = file.read_text()
        _watch(folder, json.loads(seen), lambda: file.read_text() if file.is_file() else seen)
    me = _me() | {"token": uuid.uuid4().hex}
    file.write_text(json.dumps(me))
    time.sleep(READ_BACK_S)  # of two that came at once, the one that wrote last has it
    if not _is_mine(file, me):
        raise _taken(folder, json.loads(file.read_text()))
    numbers = itertools.count(1)

    def beat() -> None:
        if _is_mine(file, me):
            file.write_text(json.dumps(me | {"beat": next(numbers)}))
        else:  # this one was away for so long that another took over
            print(f"{folder} was taken over by another job: leaving", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with _beating(beat):
            yield
    finally:
        with contextlib.suppress(OSError):  # whoever comes next watches it then
            if _is_mine(file, me):
                file.unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """`beat` every few seconds for the length of the block; storage may be away for a moment."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_EVERY_S):
            with contextlib.suppress(OSError):
                beat()

    heart = threading.Thread(target=run, name="raydistill-lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


def _is_mine(file: Remote, me: dict[str, Any]) -> bool:
    return json.loads(file.read_text()).get("token") == me["token"]


def _lock(file: TextIO) -> bool | None:
    """Whether the file is locked for this process now; None: its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _owner(file: TextIO) -> dict[str, Any] | None:
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:  # nobody, or one that was killed while it wrote
        return None


def _watch(folder: Place, owner: dict[str, Any], look: Callable[[], object]) -> None:
    """Raises RunLocked as soon as what `look` sees of the owner changes."""
    print(f"{folder} was held by {_named(owner)}: watching for {WATCHED_FOR_S:.0f} s whether that lives", flush=True)
    deadline, seen = time.monotonic() + WATCHED_FOR_S, look()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if look() != seen:
            raise _taken(folder, owner)


def _touched(folder: Path) -> int:
    with (folder / LEASE_FILE).open() as file:  # opened anew: NFS then asks its server
        return os.fstat(file.fileno()).st_mtime_ns


def _named(owner: dict[str, Any] | None) -> str:
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}" if owner else "another process"


def _taken(folder: Place, owner: dict[str, Any] | None) -> RunLocked:
    return RunLocked(
        f"run.name={folder.name} is under way: {_named(owner)}, has {folder}. Wait for it, stop it, or use another run.name"
    )
