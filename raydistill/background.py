"""Work that goes on beside the caller's own, in a thread, and whose failure the caller meets where it waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Begin `work` in a daemon thread: unlike an executor's, no process that has given up on it waits for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks for the result gets it)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def result_of(wanted: Future[T], others: Iterable[Future[Any]]) -> T:
    """What `wanted` gives, once it does; or, before that, the first failure of what runs beside it."""
    running = {wanted, *others}
    while not wanted.done():
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            future.result()
    return wanted.result()
