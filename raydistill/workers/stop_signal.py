"""SIGTERM, as a spot drain or `kubectl delete` sends it to a driver, and Ctrl-C: write a checkpoint, then leave.

The driver asks a running distillation by a file in its folder. The workers see it after the update that they are at.
They write a checkpoint and end. The driver leaves without them after LEAVE_WITHIN_S: workers may wait for nodes or teachers.
Every other stage keeps what it has anyway. It is left at once, and so is everything at a second signal, and a run that
another job has taken over: nothing is written there any more. `ray job stop`
sends SIGTERM too, but kills after 3 s unless RAY_JOB_STOP_WAIT_TIME_S on the head says otherwise.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from raydistill.storage import lease
from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place, Remote

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_FILE = "stop"
LEAVE_WITHIN_S = 90  # clouds that take a spot node back give about two minutes
TRACKING_WITHIN_S = 10.0  # of that for a store that does not answer: once in a worker, once in the driver
LOOK_EVERY_S = 2


class Stopped(BaseException):
    """The run was asked to leave, and did. Not an Exception: nothing may take it for a failure and go on."""


class _Stop:
    folder: Place | None = None  # of the distillation under way
    asked: str | None = None  # by which signal
    lost: BaseException | None = None  # why the run must be left at once
    looked = float("-inf")  # when a worker last asked a bucket


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """For the length of the block SIGTERM and SIGINT raise Stopped, or have a `draining` distillation end.

    Main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    _Stop.asked = _Stop.lost = None
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once(error: BaseException) -> None:
    """From any thread: have the main thread raise this error now, whatever it does. Without `stop_on_signals` it ends."""
    _Stop.lost = error
    os.kill(os.getpid(), signal.SIGTERM)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Stop.lost is not None:
        raise _Stop.lost
    name = signal.Signals(number).name
    if _Stop.folder is None or _Stop.asked:
        raise Stopped(f"asked to leave by {name}")
    lease.check(_Stop.folder)  # a frozen driver may wake up with this signal
    _Stop.asked = name
    (_Stop.folder / STOP_FILE).touch()
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, LEAVE_WITHIN_S)
    # not by print: the signal may have come in the middle of one
    os.write(1, f"{name}: the update under way ends, then a checkpoint; a second {name} leaves at once\n".encode())


def _too_late(number: int, frame: FrameType | None) -> None:
    written = _written(_Stop.folder)
    raise Stopped(
        f"asked to leave by {_Stop.asked}; {written or f'no checkpoint came within {LEAVE_WITHIN_S} s, the last one counts'}"
    )


def _written(folder: Place) -> str | None:
    """What `acknowledge_stop` has said; None: nothing yet."""
    step = (folder / STOP_FILE).read_bytes().decode(errors="replace")
    return f"a checkpoint was written after update {step}" if step else None


@contextmanager
def draining(folder: Place) -> Iterator[None]:
    """Around a distillation. Raises Stopped at its end if it was asked to leave."""
    (folder / STOP_FILE).unlink(missing_ok=True)
    _Stop.folder = folder
    written = None
    try:
        yield
        written = _written(folder) if _Stop.asked else None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _Stop.folder = None
        lease.check(folder)  # or another job's request would go
        (folder / STOP_FILE).unlink(missing_ok=True)
    if _Stop.asked:  # also where that came too late for this distillation, but in time for what comes after it
        raise Stopped(f"asked to leave by {_Stop.asked}; {written or 'the distillation had ended'}")


def stop_requested(folder: Place) -> bool:
    """In a worker, after every update; a bucket is asked every LOOK_EVERY_S."""
    if isinstance(folder, Remote):
        if time.monotonic() - _Stop.looked < LOOK_EVERY_S:
            return False
        _Stop.looked = time.monotonic()
    return (folder / STOP_FILE).exists()


def acknowledge_stop(folder: Place, step: int) -> None:
    """In the worker that was asked to stop, once its checkpoint is on storage: the driver tells the user."""
    replace_text(folder / STOP_FILE, str(step))
