"""Which request a replica works on next: its users take turns, however many requests each of them sends."""

from __future__ import annotations

import asyncio


class FairQueue:
    """Admits one request at a time. The next is the oldest request of the user whose last turn is longest ago.

    For one event loop.
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []  # (user, done when admitted), in order of arrival
        self._last_turn: dict[str, int] = {}  # of each user: the number of its last turn
        self._turns = 0  # so far

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(not admitted.done() for _, admitted in self._waiting)

    async def acquire(self, user: str) -> None:
        """Wait for a turn of `user`; `release` ends it. A request that is cancelled while it waits leaves the queue."""
        if not self._busy:
            self._admit(user)
            return
        admitted = asyncio.get_running_loop().create_future()
        self._waiting.append((user, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            if not admitted.cancelled():  # it was admitted just before
                self.release()
            raise

    def release(self) -> None:
        """End this turn and admit the next request."""
        self._waiting = [(user, admitted) for user, admitted in self._waiting if not admitted.done()]
        if not self._waiting:
            self._busy = False
            return
        # of equals the first
        user, admitted = min(self._waiting, key=lambda request: self._last_turn.get(request[0], 0))
        self._admit(user)
        admitted.set_result(None)

    def _admit(self, user: str) -> None:
        self._busy = True
        self._turns += 1
        self._last_turn[user] = self._turns
