"""Whose request a replica works on next: those who use it take turns, however much each of them asks."""

from __future__ import annotations

import asyncio


class FairQueue:
    """One request at a time; next is the user whose last turn is longest ago, with its oldest request.

    For one event loop.
    """

    def __init__(self) -> None:
        self._taken = False
        self._line: list[tuple[str, asyncio.Future[None]]] = []  # (user, its turn has come), as they arrived
        self._turns: dict[str, int] = {}  # of each user so far: the number of its last turn
        self._count = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(not come.done() for _, come in self._line)

    async def take(self, user: str) -> None:
        """Wait for a turn of `user`, which `pass_on` ends. A request that is cancelled while it waits leaves the line."""
        if not self._taken:
            self._begin(user)
            return
        come = asyncio.get_running_loop().create_future()
        self._line.append((user, come))
        try:
            await come
        except asyncio.CancelledError:
            if not come.cancelled():  # it had just come
                self.pass_on()
            raise

    def pass_on(self) -> None:
        """End this turn; the next one begins."""
        self._line = [(user, come) for user, come in self._line if not come.done()]
        if not self._line:
            self._taken = False
            return
        user, come = min(self._line, key=lambda waits: self._turns.get(waits[0], 0))  # of equals the first
        self._begin(user)
        come.set_result(None)

    def _begin(self, user: str) -> None:
        self._taken = True
        self._count += 1
        self._turns[user] = self._count
