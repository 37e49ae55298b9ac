"""The queue of a policy server: bounded, in order, with a deadline for every request and a clean end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRY_SECONDS = 1  # Retry-After counts whole seconds


class QueueError(RuntimeError):
    """A request that is not answered; ``status`` of HTTP says why."""

    status = 500


class Overloaded(QueueError):
    """There is no room, or the server is about to stop: try again."""

    status = 503


class Superseded(QueueError):
    """A newer frame of the same client came before this one's turn."""

    status = 409


class DeadlinePassed(QueueError):
    """The answer would have come too late."""

    status = 504


class Place(Generic[Item]):
    """A request's place in the queue.

    Attributes:
        number: Counts arrivals.
        arrived: ``time.monotonic()`` then.
        deadline: The same clock, when its answer is of no use any more.
        item: What is to be answered, once it is prepared.
    """

    def __init__(self, number: int, deadline: float) -> None:
        self.number, self.arrived = number, time.monotonic()
        self.deadline = self.arrived + deadline
        self.item: Item | None = None
        self.client_id: str | None = None
        self.latest_only = self.started = False
        self.outcome: asyncio.Future = asyncio.get_running_loop().create_future()

    def settle(self, outcome: Any) -> None:
        """Give the outcome, an answer or an exception, unless there is one."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class BatchQueue(Generic[Item, Result]):
    """Requests wait here for the model; those that wait when it is free are answered together.

    Everything but ``answer`` runs on one event loop; ``answer`` runs on a thread of its own, one batch at a time.

    Args:
        answer: Gives an answer, or an exception, for each of a batch.
        joins: Whether two items may share a batch.
        places: Most requests at one time.
        batch: Most requests in one call of ``answer``.
        deadline: Seconds, for requests that ask for nothing less.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        joins: Callable[[Item, Item], bool],
        places: int,
        batch: int,
        deadline: float,
    ) -> None:
        self.places, self.batch, self.deadline = places, batch, deadline
        self.draining = False
        self._answer, self._joins = answer, joins
        self._numbers = itertools.count()
        self._held: dict[int, Place[Item]] = {}  # in order of arrival
        self._ready, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._held)

    def start(self) -> None:
        """Begin to answer, on the running loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """End; what is still waiting is told."""
        self.draining = True
        self._worker.cancel()
        for place in list(self._held.values()):
            place.settle(Overloaded("The server is stopping."))
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def drained(self, seconds: float) -> bool:
        """Accept nothing more, and wait until all that was accepted is answered; False where time ran out."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    def enter(self) -> Place[Item]:
        """A place for a request that has arrived; ``leave`` it at the end, whatever happens.

        Raises:
            Overloaded: There is none.
        """
        if self.draining:
            raise Overloaded("The server is draining: it answers what it has accepted and takes nothing new.")
        if len(self._held) >= self.places:
            raise Overloaded(f"{len(self._held)} requests are waiting, as many as are allowed; try again.")
        place: Place[Item] = Place(next(self._numbers), self.deadline)
        self._held[place.number] = place
        self._empty.clear()
        return place

    def leave(self, place: Place[Item]) -> None:
        """Free a place."""
        self._held.pop(place.number, None)
        place.settle(None)
        if not self._held:
            self._empty.set()

    def identify(self, place: Place[Item], client_id: str | None, latest_only: bool, deadline: float | None) -> None:
        """Say whose frame it is: an older one of the same client that wants only the latest is dropped for it."""
        place.client_id, place.latest_only = client_id, latest_only
        place.deadline = place.arrived + min(self.deadline, deadline or self.deadline)
        if client_id is None:
            return
        same = [other for other in self._held.values() if other.client_id == client_id]  # oldest first
        for older, newer in zip(same, same[1:]):
            if older.latest_only and not older.started:
                waited = newer.arrived - older.arrived
                older.settle(Superseded(f"A newer frame of client {client_id!r} came {waited:.3f} s after this one."))

    async def result(self, place: Place[Item], item: Item) -> Result:
        """Wait for the answer.

        Raises:
            Superseded: Dropped for a newer frame.
            DeadlinePassed: Not answered in time.
            Exception: As ``answer`` gave it.
        """
        place.item = item
        self._ready.set()
        try:
            outcome = await asyncio.wait_for(asyncio.shield(place.outcome), place.deadline - time.monotonic())
        except asyncio.TimeoutError:
            allowed = place.deadline - place.arrived
            late = DeadlinePassed(f"Not answered within its deadline of {allowed * 1000:.0f} ms; try again, or later.")
            place.settle(late)
            raise late from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._ready.wait()
            batch = self._taken()
            if not batch:
                self._ready.clear()
                continue
            try:
                outcomes = await loop.run_in_executor(self._thread, self._answer, [place.item for place in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for place, outcome in zip(batch, outcomes):
                place.settle(outcome)

    def _taken(self) -> list[Place[Item]]:
        """The next batch: the oldest request, and those after it that may join."""
        batch: list[Place[Item]] = []
        for place in self._held.values():
            ready = place.item is not None and not place.started and not place.outcome.done()
            if ready and len(batch) < self.batch and (not batch or self._joins(batch[0].item, place.item)):
                place.started = True
                batch.append(place)
        return batch
