"""The order in which a replica works on what several users ask of it."""

from __future__ import annotations

import asyncio

from raydistill.teachers.fair_queue import FairQueue


class Queue:
    """Requests, each of which works until the test lets it finish."""

    def __init__(self) -> None:
        self.queue, self.began = FairQueue(), []
        self._tasks: dict[str, asyncio.Task] = {}
        self._finish: dict[str, asyncio.Event] = {}

    async def ask(self, *names: str) -> None:
        """A name is its user's letter and a number."""
        for name in names:
            self._finish[name] = asyncio.Event()
            self._tasks[name] = asyncio.ensure_future(self._request(name))
        await self.settle()

    async def _request(self, name: str) -> None:
        await self.queue.acquire(name[0])
        try:
            self.began.append(name)
            await self._finish[name].wait()
        finally:
            self.queue.release()

    async def finish(self, name: str | None = None) -> None:
        self._finish[name or self.began[-1]].set()
        await self.settle()

    def cancel(self, *names: str) -> None:
        for name in names:
            self._tasks[name].cancel()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_a_modest_user_waits_for_one_request_of_a_greedy_one():
    async def scene() -> None:
        queue = Queue()
        await queue.ask("a1", "a2", "a3", "a4")
        await queue.ask("b1")
        assert queue.queue.waiting == 4
        await queue.finish()
        assert queue.began == ["a1", "b1"]
        await queue.ask("b2", "c1")
        for _ in range(5):
            await queue.finish()
        assert queue.began == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        assert queue.queue.waiting == 0
        await queue.finish()
        await queue.ask("d1")
        assert queue.began[-1] == "d1"

    asyncio.run(scene())


def test_a_cancelled_request_leaves_the_line_and_costs_nobody_a_turn():
    async def scene() -> None:
        queue = Queue()
        await queue.ask("a1", "a2", "b1", "b2", "c1")
        queue.cancel("b1", "c1")
        await queue.settle()
        assert queue.queue.waiting == 2
        queue.cancel("a2")  # and the turn ends before it has left
        await queue.finish()
        assert queue.began == ["a1", "b2"]
        await queue.ask("a3")
        queue._finish["b2"].set()
        while not queue._tasks["b2"].done():
            await asyncio.sleep(0)
        queue.cancel("a3")  # whose turn has come, but which has not yet begun
        await queue.ask("c2")
        assert queue.began == ["a1", "b2", "c2"]
        assert queue.queue.waiting == 0

    asyncio.run(scene())
