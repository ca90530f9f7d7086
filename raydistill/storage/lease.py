"""Who has a run's folder, as its owner.json says. A process that works for a run asks before it writes there.

A driver may be frozen for longer than others wait for it (a suspended machine, SIGSTOP), while its workers go on. Another
driver then takes the run over. Whoever finds another holder in the file, or none, has lost the run, and must write nothing
more.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.errors import RunLost

if TYPE_CHECKING:  # place.py imports this file
    from raydistill.storage.place import Place

LEASE_FILE = "owner.json"
TOUCHED_WITHIN_S = 30.0  # by a driver that lives
NAMES = {"host", "pid", "started"}  # what a holder says of itself, beside its token


def owner_of(folder: Place) -> dict[str, Any] | None:
    """What the file says of its holder, {} where it is damaged; None: nobody holds the run. Raises OSError."""
    try:
        content = (folder / LEASE_FILE).read_bytes()
    except FileNotFoundError:
        return None
    if not content.strip():  # left in order
        return None
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):  # of JSON and of text
        return {}
    return owner if isinstance(owner, dict) and owner.keys() >= NAMES else {}


@dataclass(frozen=True)
class Lease:
    """A process's right to write below a folder, for as long as the folder's owner.json holds the token."""

    folder: Place
    token: str

    def is_mine(self) -> bool:
        """Also while the file is damaged, which names nobody else. Raises OSError: the storage is away."""
        owner = owner_of(self.folder)
        return owner is not None and (not owner or owner.get("token") == self.token)

    def check(self) -> None:
        """Raises RunLost."""
        if not self.is_mine():
            raise RunLost(f"{self.folder} was taken over by another job: leaving, and nothing more is written")

    def covers(self, target: Place) -> bool:
        return f"{target}/".startswith(f"{self.folder}/")


def runs_of_others(storage: Path) -> list[str]:
    """Names of the runs in a local folder that other living jobs hold: their drivers touch the file every few seconds."""
    now, found = time.time(), []
    for file in sorted(storage.glob(f"*/{LEASE_FILE}")):
        with contextlib.suppress(FileNotFoundError):
            fresh = now - file.stat().st_mtime < TOUCHED_WITHIN_S
            if fresh and lease_of(file) is None and owner_of(file.parent) is not None:
                found.append(file.parent.name)
    return found


_leases: list[Lease] = []  # of this process


@contextmanager
def holding(lease: Lease | None) -> Iterator[None]:
    """For the length of the block, `check` asks for this lease; None: for none."""
    leases = [] if lease is None else [lease]
    _leases.extend(leases)
    try:
        yield
    finally:
        for one in leases:
            _leases.remove(one)


def lease_of(target: Place) -> Lease | None:
    """The lease that this process writes to `target` under, if it needs one."""
    return next((lease for lease in _leases if lease.covers(target)), None)


def check(target: Place) -> None:
    """Called before every write. Raises RunLost: the run that `target` belongs to is another job's now."""
    if (lease := lease_of(target)) is not None:
        lease.check()
