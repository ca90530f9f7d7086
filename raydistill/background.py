"""Work in a background thread. Its failure reaches the caller where the caller waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Begin `work` in a daemon thread. A process can end without it, which an executor's threads would not allow."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever asks for the result gets it)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def result_of(wanted: Future[T], others: Iterable[Future[Any]]) -> T:
    """The result of `wanted`. Raises at once what one of the `others` raises before that."""
    running = {wanted, *others}
    while not wanted.done():
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            future.result()
    return wanted.result()
