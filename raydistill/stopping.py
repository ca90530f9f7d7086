"""SIGTERM, as a spot drain or `kubectl delete` sends it to a driver: checkpoint, then leave.

A distillation under way is asked by a file in its folder, which its workers see after the update they are at; they write
a checkpoint and end, within LEAVE_WITHIN_S, or the driver leaves without them: workers may be waiting for nodes or teachers.
Every other stage keeps what it has anyway, and is left at once, as by a second SIGTERM. `ray job stop` sends SIGTERM too, but
kills after 3 s unless RAY_JOB_STOP_WAIT_TIME_S on the head says otherwise.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raydistill.storage import Place, Remote

STOP_FILE = "stop"
LEAVE_WITHIN_S = 90  # clouds that take a spot node back give about two minutes
LOOK_EVERY_S = 2


class Stopped(BaseException):
    """The run was asked to leave, and did. Not an Exception: nothing may take it for a failure and go on."""


class _Stop:
    folder: Place | None = None  # of the distillation under way
    asked = False
    looked = float("-inf")  # when a worker last asked a bucket


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """For the length of the block SIGTERM raises Stopped, or has a `draining` distillation end. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    _Stop.asked = False
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    if _Stop.folder is None or _Stop.asked:
        raise Stopped("asked to leave by SIGTERM")
    _Stop.asked = True
    (_Stop.folder / STOP_FILE).touch()
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, LEAVE_WITHIN_S)
    # not by print: the signal may have come in the middle of one
    os.write(1, b"SIGTERM: the update under way ends, then a checkpoint; a second SIGTERM leaves at once\n")


def _too_late(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"asked to leave by SIGTERM; no checkpoint came within {LEAVE_WITHIN_S} s, the last one counts")


@contextmanager
def draining(folder: Place) -> Iterator[None]:
    """Around a distillation. Raises Stopped at its end if it was asked to leave."""
    (folder / STOP_FILE).unlink(missing_ok=True)
    _Stop.folder = folder
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _Stop.folder = None
        (folder / STOP_FILE).unlink(missing_ok=True)
    if _Stop.asked:  # also where that came too late for this distillation, but in time for what comes after it
        raise Stopped("asked to leave by SIGTERM; a checkpoint was written")


def asked_to_stop(folder: Place) -> bool:
    """In a worker, after every update; a bucket is asked every LOOK_EVERY_S."""
    if isinstance(folder, Remote):
        if time.monotonic() - _Stop.looked < LOOK_EVERY_S:
            return False
        _Stop.looked = time.monotonic()
    return (folder / STOP_FILE).exists()
