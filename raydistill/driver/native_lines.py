"""What Ray's C++ side writes in the driver's own process: straight to file descriptor 2, past Python and past all loggers.

For the length of a block the descriptor leads into a pipe. A thread reads it, and passes on all lines but Ray's narration.
Python's own standard error stays where it was, and so do tracebacks and what `faulthandler` says of a crash.
What Ray says when it ends the process itself may be lost here, and is in Ray's own log files.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STDERR = 2
PARTIAL_S = 0.2  # how long a line without its end is waited for
JOIN_S = 1.0  # a process that was started inside the block may hold the pipe open for longer


@contextmanager
def native_lines(rewrite: Callable[[str], str]) -> Iterator[None]:
    """Pass on what `rewrite` leaves of each line that is written to descriptor 2; an empty text is dropped.

    Where standard error is closed nothing is changed.
    """
    try:
        real = os.dup(STDERR)
    except OSError:
        yield
        return
    read, write = os.pipe()
    sys.stderr.flush()
    kept, ours, crashes = sys.stderr, _apart(real), faulthandler.is_enabled()
    if ours is not None:
        sys.stderr = ours
    os.dup2(write, STDERR)
    os.close(write)
    reader = threading.Thread(target=_pass_on, args=(read, rewrite), name="native-lines", daemon=True)
    reader.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            kept.flush()  # what was written to the object of before goes through the pipe
        os.dup2(real, STDERR)
        reader.join(JOIN_S)
        if ours is not None:
            ours.flush()
            if sys.stderr is ours:
                sys.stderr = kept
            if faulthandler.is_enabled() and not crashes:  # by Ray, which took the descriptor that is closed here
                faulthandler.enable(kept, all_threads=False)
            ours.detach()
        os.close(real)


def _apart(descriptor: int) -> io.TextIOWrapper | None:
    """Standard error on another descriptor; None where Python's does not lead to descriptor 2, as under a notebook."""
    try:
        if sys.stderr.fileno() != STDERR:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115 (is detached, and its descriptor closed apart)
    return io.TextIOWrapper(raw, sys.stderr.encoding, sys.stderr.errors, line_buffering=True, write_through=True)


def _pass_on(descriptor: int, rewrite: Callable[[str], str]) -> None:
    rest = b""
    while True:
        whole = bool(select.select([descriptor], [], [], PARTIAL_S if rest else None)[0])
        if whole and not (data := os.read(descriptor, 65536)):
            break
        rest += data if whole else b""
        *lines, rest = rest.split(b"\n")
        for line in lines:
            _write(line, rewrite, "\n")
        if not whole:  # a prompt, or a bar of a library
            _write(rest, rewrite, "")
            rest = b""
    if rest:
        _write(rest, rewrite, "")
    os.close(descriptor)


def _write(line: bytes, rewrite: Callable[[str], str], end: str) -> None:
    """To Python's standard error, which a bar of the screen keeps above itself."""
    text = line.decode(errors="replace")
    shown = rewrite(text)
    if shown or not text:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            sys.stderr.write(shown + end)  # in one piece: a line of another thread may come in between
            sys.stderr.flush()
