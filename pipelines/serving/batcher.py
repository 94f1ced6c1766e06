"""Dynamic batching: drawings of different requests that share their settings are drawn as one network batch.

A request waits until its batch is full, or the batch wait is over, or longer where the network is busy; in that time
more requests gather. Batches are drawn one at a time, the one that has waited longest first, so that no request is
overtaken for ever. What a request gets does not depend on who else was in its batch, up to float rounding.

Ray Serve's `@serve.batch` is not enough for that: it has no groups (requests are told apart by the name of a model
only, after a batch is full), closes a batch though the network is still busy, puts what does not fit behind what came
later, refuses a request larger than a batch, and fails all of a batch with one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field

from ddpm.inference import Drawing, Drawn, cut, join

Draw = Callable[[Drawing], Drawn]


@dataclass(eq=False)
class Waiting:
    """A drawing that waits for its batch.

    Attributes:
        drawing: what is to be drawn.
        arrived: when it came, in seconds of the loop's clock.
        answer: what comes of it; cancelled where nobody waits for it any more.
    """

    drawing: Drawing
    arrived: float
    answer: asyncio.Future[BatchShare]


@dataclass(frozen=True)
class DrawnBatch:
    """A network batch that was drawn.

    Attributes:
        pictures: in it.
        requests: in it.
        waited_s: how long its first request had waited.
    """

    pictures: int
    requests: int
    waited_s: float


@dataclass(frozen=True)
class BatchShare:
    """A request's part of a batch.

    Attributes:
        drawn: its pictures.
        batch: that they were drawn in.
        first: whether it was the first one of the batch, so that each batch is counted once.
    """

    drawn: Drawn
    batch: DrawnBatch
    first: bool


def next_batch(
    queue: Sequence[Waiting], now: float, *, batch_size: int, wait_s: float
) -> tuple[list[Waiting], float | None]:
    """Return the drawings that are due as one batch, and when to ask again.

    Args:
        queue: in order of arrival.
        now: seconds of the clock of `arrived`.
        batch_size: pictures of a batch; a drawing of more is a batch of its own.
        wait_s: how long a drawing waits for others.

    Returns:
        The batch, or none where every group may still grow; and the time at which one is due by waiting, None where
        nothing waits.
    """
    groups: dict[Hashable, list[Waiting]] = {}
    for waiting in queue:
        groups.setdefault(waiting.drawing.shared, []).append(waiting)
    full: list[Waiting] = []
    for group in groups.values():
        batch, pictures = [group[0]], len(group[0].drawing)
        for waiting in group[1:]:
            if pictures + len(waiting.drawing) > batch_size:
                break  # its turn is next: a later and smaller one does not overtake it
            batch.append(waiting)
            pictures += len(waiting.drawing)
        if now >= group[0].arrived + wait_s:
            return batch, None
        if not full and (pictures >= batch_size or len(batch) < len(group)):
            full = batch
    due = min((group[0].arrived + wait_s for group in groups.values()), default=None)
    return full, due


@dataclass
class Batcher:
    """Draws the drawings of many requests in batches; belongs to one event loop.

    Attributes:
        draw: draws a batch; called in a thread of `executor`.
        executor: of one thread.
        batch_size: pictures of a batch, at most.
        wait_s: how long a request waits for others.
    """

    draw: Draw
    executor: Executor
    batch_size: int
    wait_s: float
    _queue: list[Waiting] = field(default_factory=list)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of requests that wait for their batch."""
        return len(self._queue)

    async def __call__(self, drawing: Drawing) -> BatchShare:
        """Return the pictures of a drawing; cancelling it takes it out of the queue.

        Raises:
            Exception: what `draw` raised for it.
        """
        loop = asyncio.get_running_loop()
        waiting = Waiting(drawing, loop.time(), loop.create_future())
        self._queue.append(waiting)
        self._arrival.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await waiting.answer
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)

    async def _work(self) -> None:
        """Draw one batch after another, until nothing waits; whatever ends it early, nobody is left waiting."""
        try:
            await self._draw_all()
        except BaseException as error:
            for waiting in self._queue:
                waiting.answer.set_exception(RuntimeError(f"the drawing of batches has ended: {error!r}"))
            raise

    async def _draw_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            self._arrival.clear()
            batch, due = next_batch(self._queue, loop.time(), batch_size=self.batch_size, wait_s=self.wait_s)
            if batch:
                self._queue = [waiting for waiting in self._queue if waiting not in batch]
                await self._answer(batch)
            elif due is not None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrival.wait(), max(0.0, due - loop.time()))

    async def _answer(self, batch: list[Waiting]) -> None:
        """Draw a batch and give each request its part."""
        loop = asyncio.get_running_loop()
        counts = [len(waiting.drawing) for waiting in batch]
        done = DrawnBatch(sum(counts), len(batch), loop.time() - batch[0].arrived)
        try:
            joined = await loop.run_in_executor(self.executor, join, [waiting.drawing for waiting in batch])
            drawn = await loop.run_in_executor(self.executor, self.draw, joined)
        except Exception as error:  # noqa: BLE001 - whatever it is, the requests have to hear of it
            if len(batch) > 1:  # one request's failure is no other's
                for waiting in batch:
                    await self._answer([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for i, (waiting, part) in enumerate(zip(batch, cut(drawn, counts), strict=True)):
            if not waiting.answer.done():
                waiting.answer.set_result(BatchShare(part, done, first=i == 0))
