"""One living job for each run. A driver holds the run's folder; a second driver is told who holds it.

On one machine a file lock says so. It ends with its holder, however that ends. Other machines may not see the lock, and a
bucket has none, so the holder also touches the file every few seconds. Who finds another machine's name in it watches the
file for a while. A holder that finds another's name there was away for too long: it leaves, and writes nothing more.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raydistill.errors import RunLost
from raydistill.storage.lease import LEASE_FILE, TOUCHED_WITHIN_S, Lease, holding, owner_of
from raydistill.storage.place import Place, Remote
from raydistill.tracking.screen import screen
from raydistill.workers.stop_signal import leave_at_once

READ_BACK_S = 2.0
BEAT_EVERY_S, WATCHED_FOR_S = 5.0, TOUCHED_WITHIN_S  # six beats that fail to come say that the holder is gone


class RunLocked(ValueError):
    """Another living job has this run."""


@contextmanager
def lock_run(folder: Place) -> Iterator[None]:
    """Hold a run's folder, which exists, for the length of the block. Another job that takes it over ends the block.

    Raises:
        RunLocked: a living job has it; the message says which. Nothing was changed then.
        RunLost: another job has taken it over.
    """
    with _lock_file(folder) as lock:
        locked, owner = lock(), owner_of(folder)
        here = owner is None or owner.get("host") == socket.gethostname()
        if locked is False and here:
            raise _taken(folder, owner)
        if owner is not None and not (locked and here):
            _watch(folder, owner)
        lease = Lease(folder, uuid.uuid4().hex)
        me = _me() | {"token": lease.token}
        _write(folder, me)
        if not locked:
            time.sleep(READ_BACK_S)  # of two that came at once, the one that wrote last has it
            if not lease.is_mine():
                raise _taken(folder, owner_of(folder))
        numbers = itertools.count(1)

        def beat() -> None:
            lease.check()
            lock()  # which one that is gone by now may have had
            if isinstance(folder, Remote):
                _write(folder, me | {"beat": next(numbers)})
            else:
                os.utime(folder / LEASE_FILE)

        try:
            with _beating(beat), holding(lease):
                yield
        finally:
            with contextlib.suppress(OSError):  # whoever comes next watches it then
                if lease.is_mine():
                    _clear(folder)


@contextmanager
def _lock_file(folder: Place) -> Iterator[Callable[[], bool | None]]:
    """Locks the file for this process, or says that another has it; None: there are no locks."""
    if isinstance(folder, Remote):
        yield lambda: None
        return
    with (folder / LEASE_FILE).open("ab") as file:

        def lock() -> bool | None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                return None
            return True

        yield lock


def _me() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _write(folder: Place, owner: dict[str, Any]) -> None:
    """In place, since the file is the lock; no reader finds it empty meanwhile."""
    text = json.dumps(owner).encode()
    if isinstance(folder, Remote):
        (folder / LEASE_FILE).write_bytes(text)
        return
    with (folder / LEASE_FILE).open("r+b") as file:
        file.write(text)
        file.truncate()


def _clear(folder: Place) -> None:
    """Left in order: nobody needs to watch."""
    if isinstance(folder, Remote):
        (folder / LEASE_FILE).unlink(missing_ok=True)
    else:
        os.truncate(folder / LEASE_FILE, 0)


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """`beat` every few seconds for the length of the block; storage may be away for a moment."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_EVERY_S):
            try:
                beat()
            except OSError:
                continue
            except RunLost as lost:
                screen.say(str(lost))
                leave_at_once(lost)
                return

    heart = threading.Thread(target=run, name="raydistill-lease", daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


def _watch(folder: Place, owner: dict[str, Any]) -> None:
    """Raises RunLocked as soon as the owner writes its file anew."""
    screen.say(f"{folder} was held by {_named(folder, owner)}: watching for {WATCHED_FOR_S:.0f} s whether that lives")
    deadline, seen = time.monotonic() + WATCHED_FOR_S, _seen(folder)
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if _seen(folder) not in (seen, None):
            raise _taken(folder, owner)


def _seen(folder: Place) -> object:
    """Changes with every beat; None: the file is gone."""
    try:
        if isinstance(folder, Remote):
            return (folder / LEASE_FILE).read_bytes()
        with (folder / LEASE_FILE).open("rb") as file:  # opened anew: NFS then asks its server
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _named(folder: Place, owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    if not owner:
        return f"a process that {folder / LEASE_FILE}, which is damaged, does not name"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _taken(folder: Place, owner: dict[str, Any] | None) -> RunLocked:
    return RunLocked(
        f"run.name={folder.name} is under way: {_named(folder, owner)}, has {folder}. Wait for it, stop it, or use another run.name"
    )
