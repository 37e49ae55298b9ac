"""Request queue of the policy server: bounded, first in first out, batched, with a deadline for every request."""

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
    """A request that gets no result.

    Attributes:
        status: HTTP status of the reply.
    """

    status = 500


class OverloadedError(QueueError):
    """The queue is full, or the server is shutting down; the client may retry."""

    status = 503


class SupersededError(QueueError):
    """A newer frame of the same client arrived before this request was started."""

    status = 409


class DeadlineExceededError(QueueError):
    """The request was not completed before its deadline."""

    status = 504


class QueueEntry(Generic[Item]):
    """A request in the queue, from its arrival to its reply.

    Attributes:
        number: Sequence number of the arrival.
        arrived: ``time.monotonic()`` at arrival.
        deadline: ``time.monotonic()`` by which the result is needed.
        item: The prepared request; None until it is prepared.
        started: True once the request was put into a batch.
        outcome: Resolves to the result or to an exception instance.
    """

    def __init__(self, number: int, timeout_s: float) -> None:
        self.number, self.arrived = number, time.monotonic()
        self.deadline = self.arrived + timeout_s
        self.item: Item | None = None
        self.client_id: str | None = None
        self.latest_only = self.started = False
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def set_result(self, outcome: object) -> None:
        """Set the outcome, a result or an exception instance, unless one is set already."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class BatchQueue(Generic[Item, Result]):
    """Queue in front of the model; requests that wait while the model is busy are predicted in one batch.

    All methods run on one event loop. ``predict_batch`` runs on a thread of its own, one batch at a time.

    Args:
        predict_batch: Returns a result or an exception instance for each item of a batch.
        can_batch: Tells if two items may share a batch.
        max_queue_size: Maximum number of requests in the queue, those in the running batch included.
        max_batch_size: Maximum number of requests in one call of ``predict_batch``.
        timeout_s: Seconds from arrival to result, for requests that set no shorter time.
    """

    def __init__(
        self,
        predict_batch: Callable[[list[Item]], Sequence[Result | Exception]],
        *,
        can_batch: Callable[[Item, Item], bool],
        max_queue_size: int,
        max_batch_size: int,
        timeout_s: float,
    ) -> None:
        self.max_queue_size, self.max_batch_size, self.timeout_s = max_queue_size, max_batch_size, timeout_s
        self.draining = False
        self._predict_batch, self._can_batch = predict_batch, can_batch
        self._numbers = itertools.count()
        self._entries: dict[int, QueueEntry[Item]] = {}  # in order of arrival
        self._ready, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def start(self) -> None:
        """Start the worker task on the running event loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Stop the worker; requests that still wait get an ``OverloadedError``."""
        self.draining = True
        if self._worker is not None:
            self._worker.cancel()
        for entry in list(self._entries.values()):
            entry.set_result(OverloadedError("The server is stopping."))
        await asyncio.to_thread(self._model_thread.shutdown, cancel_futures=True)

    async def drain(self, timeout_s: float) -> bool:
        """Accept no new requests and wait until the queue is empty; return False on timeout."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def acquire(self) -> QueueEntry[Item]:
        """Return a queue entry for a request that has arrived; the caller must ``release`` it in the end.

        Raises:
            OverloadedError: The queue is full or draining.
        """
        if self.draining:
            raise OverloadedError("The server is draining: it completes accepted requests and accepts no new ones.")
        if len(self._entries) >= self.max_queue_size:
            raise OverloadedError(f"{len(self._entries)} requests are waiting, as many as are allowed; try again.")
        entry: QueueEntry[Item] = QueueEntry(next(self._numbers), self.timeout_s)
        self._entries[entry.number] = entry
        self._empty.clear()
        return entry

    def release(self, entry: QueueEntry[Item]) -> None:
        """Remove an entry from the queue."""
        self._entries.pop(entry.number, None)
        entry.set_result(None)
        if not self._entries:
            self._empty.set()

    def set_client(
        self, entry: QueueEntry[Item], client_id: str | None, latest_only: bool, timeout_s: float | None
    ) -> None:
        """Set an entry's client and timeout, and drop older ``latest_only`` frames of the same client."""
        entry.client_id, entry.latest_only = client_id, latest_only
        entry.deadline = entry.arrived + min(self.timeout_s, timeout_s or self.timeout_s)
        if client_id is None:
            return
        frames = [other for other in self._entries.values() if other.client_id == client_id]  # oldest first
        for older, newer in zip(frames, frames[1:]):
            if older.latest_only and not older.started:
                seconds = newer.arrived - older.arrived
                message = f"A newer frame of client {client_id!r} came {seconds:.3f} s after this one."
                older.set_result(SupersededError(message))

    async def result(self, entry: QueueEntry[Item], item: Item) -> Result:
        """Enqueue the prepared request and wait for its result.

        Raises:
            SupersededError: The request was dropped for a newer frame.
            DeadlineExceededError: The deadline has passed.
            Exception: The exception that ``predict_batch`` returned for this item.
        """
        entry.item = item
        self._ready.set()
        try:
            outcome = await asyncio.wait_for(asyncio.shield(entry.outcome), entry.deadline - time.monotonic())
        except asyncio.TimeoutError:
            timeout_ms = (entry.deadline - entry.arrived) * 1000
            error = DeadlineExceededError(
                f"Not completed within its deadline of {timeout_ms:.0f} ms; try again, or allow more time."
            )
            entry.set_result(error)
            raise error from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._ready.wait()
            entries, items = self._next_batch()
            if not entries:
                self._ready.clear()
                continue
            outcomes: Sequence[Result | Exception]
            try:
                outcomes = await loop.run_in_executor(self._model_thread, self._predict_batch, items)
            except Exception as error:
                outcomes = [error] * len(entries)
            for entry, outcome in zip(entries, outcomes):
                entry.set_result(outcome)

    def _next_batch(self) -> tuple[list[QueueEntry[Item]], list[Item]]:
        """Return the oldest ready request and the later ones that can share its batch: entries and their items."""
        entries: list[QueueEntry[Item]] = []
        items: list[Item] = []
        for entry in self._entries.values():
            if entry.item is None or entry.started or entry.outcome.done() or len(entries) == self.max_batch_size:
                continue
            if not items or self._can_batch(items[0], entry.item):
                entry.started = True
                entries.append(entry)
                items.append(entry.item)
        return entries, items
