"""Concurrent requests share forward passes: whatever arrived while the model was busy is answered in its next pass.

A request that finds the model idle is answered at once, alone: there is no timer, so no request waits for others that may not come. The
model runs in one thread of its own, and the event loop stays free. More rows than may wait are refused, rather than all become slow.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from pipeline.serving.predictor import Prediction

Answer = Callable[[Sequence[Any]], list[Prediction]]


class OverloadedError(Exception):
    """Too many rows are waiting; try again later."""


class Batcher:
    """Answers rows through `answer`, at most `batch_rows` rows a call, or one request where that has more; at most `waiting_rows` wait."""

    def __init__(self, answer: Answer, batch_rows: int, waiting_rows: int, on_batch: Callable[[int], object] | None = None) -> None:
        self._answer = answer
        self._batch_rows = batch_rows
        self._waiting_rows = waiting_rows
        self._on_batch = on_batch
        self._queue: deque[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]] = deque()
        self._arrived = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Rows that wait for a pass."""
        return sum(len(rows) for rows, _ in self._queue)

    def submit(self, rows: Sequence[Any]) -> Awaitable[list[Prediction]]:
        """The predictions of `rows`, in order, once they are there. Raises OverloadedError at once where too many wait."""
        if self._queue and self.waiting + len(rows) > self._waiting_rows:
            raise OverloadedError
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, future))
        self._arrived.set()
        return future

    @asynccontextmanager
    async def running(self):
        """Answer requests until the block ends."""
        with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
            worker = asyncio.create_task(self._work(thread))
            try:
                yield self
            finally:
                worker.cancel()
                await asyncio.wait([worker])

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while True:
            await self._arrived.wait()
            requests = self._next()
            if not requests:
                continue
            rows = [row for asked, _ in requests for row in asked]
            if self._on_batch is not None:
                self._on_batch(len(rows))
            call = asyncio.get_running_loop().run_in_executor(thread, self._answer, rows)
            await asyncio.wait([call])
            failure = call.exception()
            found = iter([] if failure else call.result())
            for asked, future in requests:
                own = [next(found) for _ in asked] if failure is None else []
                if future.done():  # whoever asked has gone
                    continue
                if failure is None:
                    future.set_result(own)
                else:
                    future.set_exception(failure)

    def _next(self) -> list[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]]:
        """The requests of the next pass, in the order of their arrival."""
        taken: list[tuple[Sequence[Any], asyncio.Future[list[Prediction]]]] = []
        count = 0
        while self._queue and (not taken or count + len(self._queue[0][0]) <= self._batch_rows):
            taken.append(self._queue.popleft())
            count += len(taken[-1][0])
        if not self._queue:
            self._arrived.clear()
        return taken
