"""Numbered batches of a stream, the same for every number of processes, with a state that a data loader can save.

For training loops other than ``openvla finetune``: torchdata's StatefulDataLoader, Accelerate, Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors_openvla import OpenVLAIndexError, OpenVLAValueError
from .episodes import Step
from .stream import MixtureShard, StepStream, StreamPosition


class StepBatch(list[Step]):
    """The samples of one batch, with its number.

    Attributes:
        number: The batch's number among those of all processes, in the order of training.
        source: Shard of the episodes from which it was drawn, and its number in that shard; seeds its augmentation.
    """

    def __init__(self, steps: Sequence[Step], number: int, source: tuple[int, int]) -> None:
        super().__init__(steps)
        self.number, self.source = number, source

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with number and source, for the workers of a DataLoader."""
        return type(self), (list(self), self.number, self.source)


@dataclasses.dataclass
class _Shard:
    """Samples of one shard, drawn in order.

    Attributes:
        samples: Its samples from ``first_needed`` on.
        first_needed: Number of the first sample that is still needed; those before it are not read.
        next_batch: The next batch's number in the shard.
    """

    samples: Iterator[Step] = iter(())
    first_needed: int = 0
    next_batch: int = 0


class BatchStream(IterableDataset[StepBatch]):
    """Numbered batches of a :class:`~openvla.data.stream.StepStream`; the content depends on the number alone.

    The episodes are distributed over ``num_shards`` shards, anew in every epoch, and batch ``n`` is drawn from shard
    ``n % num_shards``. Of ``world_size`` processes, process ``rank`` takes the batches ``rank``, ``rank + world_size``
    and so on, and its DataLoader workers take these in turn. So one process and many train on the same batches in the
    same order, and a run may continue with other numbers of processes and workers.

        DataLoader(BatchStream(stream, batch_size=16), batch_size=None, collate_fn=collator)

    Args:
        stream: The samples; its ``rank`` and ``world_size`` are this process's.
        batch_size: Samples per batch.
        num_shards: Number of shards, at most the number of episodes. A process reads only the shards of its batches:
            with as many shards as workers of all processes, each worker has its own episodes. It must stay the same
            during a run; 1 mixes the samples of a batch best.

    Raises:
        OpenVLAValueError: An option is out of range, or the stream was resumed at a position.
    """

    def __init__(self, stream: StepStream, batch_size: int, *, num_shards: int = 1) -> None:
        if batch_size < 1 or num_shards < 1:
            raise OpenVLAValueError(f"batch_size and num_shards must be at least 1, got {batch_size} and {num_shards}.")
        if stream.position.batches:
            raise OpenVLAValueError("The stream was resumed at a position; give a new one, and use continue_at.")
        stream.require_episodes(num_shards, f"num_shards={num_shards}")
        self.stream = stream
        self.position = StreamPosition(batch_size=batch_size, world_size=num_shards, workers=1)
        self.num_shards = num_shards
        self._start = 0
        self._next: int | None = None  # of the current iteration, for state_dict
        self._resumed: int | None = None  # where the next iteration begins
        self._shards: dict[int, _Shard] = {}

    def __getitem__(self, number: int) -> StepBatch:
        """Return a batch by its number. Numbers that increase are fast; a smaller one replays the order of its shard.

        Raises:
            OpenVLAIndexError: The number is negative, or the stream ends (``repeat=False``) before that batch.
            DatasetError: An episode or image cannot be used.
        """
        batch = self._batch(number) if number >= 0 else None
        if batch is None:
            raise OpenVLAIndexError(f"There is no batch {number}; numbers begin at 0 and end where their shard ends.")
        return batch

    def _batch(self, number: int) -> StepBatch | None:
        """Return a batch, or None if its shard has ended."""
        shard_number, index = self.position.source(number)
        shard = self._shards.get(shard_number)
        if shard is None or index < shard.next_batch:
            shard = self._shards[shard_number] = self._open_shard(shard_number)
        shard.first_needed, shard.next_batch = index * self.position.batch_size, index + 1
        steps = list(itertools.islice(shard.samples, self.position.batch_size))
        return StepBatch(steps, number, (shard_number, index)) if steps else None

    def _open_shard(self, number: int) -> _Shard:
        shard = _Shard()
        samples = MixtureShard(self.stream, number, self.num_shards).samples
        shard.samples = samples(lambda sample: sample >= shard.first_needed)
        return shard

    def __iter__(self) -> Iterator[StepBatch]:
        first, stride = self._place()
        start = self._start + first if self._resumed is None else self._resumed
        self._resumed, self._next = None, start
        num_visited, ended = self.num_shards // math.gcd(self.num_shards, stride), set()
        for number in itertools.count(start, stride):
            batch = self._batch(number)
            if batch is not None:
                self._next = number + stride
                yield batch
                continue
            ended.add(number % self.num_shards)
            if len(ended) == num_visited:
                break
        self._next = None

    def _place(self) -> tuple[int, int]:
        """Return the number of this worker's first batch, and the distance of its batches."""
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        return self.stream.rank + self.stream.world_size * worker, self.stream.world_size * num_workers

    def continue_at(self, num_batches: int) -> None:
        """Continue after some batches, with any numbers of processes and workers.

        Args:
            num_batches: Number of batches that all processes together have used: of a loop that takes one per process
                and step, the steps times ``world_size``.

        Raises:
            OpenVLAValueError: ``num_batches`` is negative.
        """
        if num_batches < 0:
            raise OpenVLAValueError(f"num_batches must be at least 0, got {num_batches}.")
        self._start, self._resumed, self._next = num_batches, None, None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process, in a DataLoader worker that of the worker, as JSON-serializable values.

        torchdata's StatefulDataLoader calls it in every worker.
        """
        first, stride = self._place()
        return {
            **self._identity(),
            "world_size": self.stream.world_size,
            "next_batch": self._start + first if self._next is None else self._next,
            "first": first,
            "stride": stride,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was called.

        A state of a process without workers may be loaded by any number of processes, all of them from that one state.

        Raises:
            OpenVLAValueError: The state is of other data or options; or of a worker, and the number of processes or
                workers has changed (use ``continue_at``).
        """
        if different := [name for name, value in self._identity().items() if state.get(name) != value]:
            name = different[0]
            raise OpenVLAValueError(
                f"The state has {name} {state.get(name)!r}, this stream {self._identity()[name]!r}; a state continues "
                "the same data with the same options."
            )
        first, stride = self._place()
        if (state["first"], state["stride"]) == (first, stride):
            self._resumed = self._next = state["next_batch"]
        elif state["stride"] == state["world_size"]:
            self.continue_at(state["next_batch"] - state["first"])
        else:
            raise OpenVLAValueError(
                "The state is of a DataLoader worker, and the number of processes or workers has changed: use a new "
                "loader and continue_at(the number of steps * the number of processes when they were made)."
            )

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when a state is loaded."""
        stream = self.stream
        return {
            "batch_size": self.position.batch_size,
            "num_shards": self.num_shards,
            "seed": stream.seed,
            "shuffle_buffer": stream.shuffle_buffer,
            "chunk_length": stream.chunk_length,
            "pad_last_chunk": stream.pad_last_chunk,
            "weights": stream.weights,
            "datasets": {reader.name: len(reader) for reader in stream.readers},
        }
