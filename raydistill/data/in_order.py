"""Answers of a teacher in the order of the requests, some of which are under way while an answer is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Request = TypeVar("Request")


def in_order(requests: Iterable[Request], ask: Callable[[Request], Any], ahead: int) -> Iterator[Any]:
    """`ask(request).result()` of each request; `ahead` more are sent before an answer is handed out."""
    pending: deque[Any] = deque()
    for request in requests:
        pending.append(ask(request))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
