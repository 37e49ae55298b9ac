"""Endless (or single-pass) shuffled samples from one dataset or a mixture, for any number of workers and ranks.

Only the order is held in memory: (episode, step) pairs in a shuffle buffer. An episode is read when its first step is
drawn and dropped after its last; an image is decoded when it is drawn. The order follows from the seed alone, so a
stream resumes exactly where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors_openvla import OpenVLAValueError
from .episodes import DemonstrationError, Episode, EpisodeReader, Step

# Where a chunk may start near an episode's end.
ENDS = ("drop", "repeat")


@dataclasses.dataclass(frozen=True)
class StreamPosition:
    """Position in a run's batches, from which any number of processes and workers can continue in the same order.

    Batches are numbered across all processes in the order of training. The samples of batch ``n`` depend only on ``n``
    and on how the run began: it is the batch ``n // world_size`` of rank ``n % world_size``, drawn by its worker
    ``n // world_size % workers``.

    Attributes:
        batches: Number of batches that all processes together have drawn.
        batch_size: Samples per batch.
        world_size: Number of processes when the run began.
        workers: DataLoader workers of each process when the run began, at least 1; None: as many as now.
    """

    batches: int = 0
    batch_size: int = 1
    world_size: int = 1
    workers: int | None = None

    def source(self, batch: int) -> tuple[int, int]:
        """Return the rank that would have drawn a batch, had nothing changed, and the batch's number in that rank."""
        return batch % self.world_size, batch // self.world_size

    def shard(self, batch: int) -> int:
        """Return the shard of the episodes, of ``world_size * workers``, from which a batch is drawn."""
        rank, index = self.source(batch)
        return rank * (self.workers or 1) + index % (self.workers or 1)

    def batch_of(self, sample: int, shard: int) -> int:
        """Return the batch that holds a sample, given the sample's number in its shard."""
        workers = self.workers or 1
        index = sample // self.batch_size * workers + shard % workers
        return index * self.world_size + shard // workers


class DemonstrationStream(IterableDataset):
    """Samples of demonstrations, for a torch DataLoader.

    Episodes are dealt out to ranks and workers anew in every epoch, so that each sample is seen once an epoch.

    Args:
        readers: The datasets. Cameras of the same names in another order are taken in the first one's.
        weights: How often each is drawn from; with ``balance`` relative to its number of steps. Default: all 1.
        chunk_length: Actions of a sample.
        ends: "drop": a chunk starts only where the episode still has all its actions, as OpenVLA-OFT trains.
            Shorter episodes give no sample then, and are warned of.
            "repeat": it starts at every step, and beyond the end the last action repeats (``Step.is_padding``).
        shuffle_buffer: Steps to shuffle among; 0 or 1 keeps the stored order, of episodes too.
        seed: Of every random choice.
        repeat: Start over when all samples were seen. A mixture needs no common end then.
        rank: This process among ``world_size``.
        world_size: Processes that train together.
        balance: Multiply weights by the datasets' numbers of steps, as the reference does.
        skip_bad: Leave out episodes and images that cannot be used, count them and warn; else they raise.

    Raises:
        ValueError: An option is out of range, names collide, action or proprio dimensions or numbers of cameras differ
            between datasets, or a camera's name stands for different places.

    Attributes:
        readers: The datasets, with their cameras in one order.
        skipped: Bad episodes and steps met so far and left out, in this process (a worker has its own); each counts,
            and is warned of, once.
    """

    def __init__(
        self,
        readers: Sequence[EpisodeReader] | EpisodeReader,
        weights: Sequence[float] | None = None,
        *,
        chunk_length: int = 1,
        ends: str = "drop",
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        repeat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        balance: bool = True,
        skip_bad: bool = False,
    ) -> None:
        self.readers = [readers] if isinstance(readers, EpisodeReader) else list(readers)
        self.weights = [1.0] * len(self.readers) if weights is None else [float(weight) for weight in weights]
        self.chunk_length, self.ends, self.shuffle_buffer, self.seed = chunk_length, ends, shuffle_buffer, seed
        self.repeat, self.rank, self.world_size, self.skip_bad = repeat, rank, world_size, skip_bad
        self._bad: set[str] = set()
        self._position = StreamPosition(world_size=world_size)
        self._check()
        self.readers = one_camera_order(self.readers)
        rates = {reader.name: reader.frame_rate for reader in self.readers if reader.frame_rate}
        if rank == 0 and len(set(rates.values())) > 1:
            warnings.warn(
                f"The datasets of this mixture have different frame rates (Hz): {rates}. An action is a movement in "
                "one step, so that the policy moves at each one's pace, whichever frames look alike; train on one "
                "rate.",
                stacklevel=2,
            )
        if rank == 0 and ends == "drop" and chunk_length > 1:
            self._warn_of_short_episodes()
        if balance and len(self.readers) > 1:
            self.weights = [weight * self._steps(reader) for weight, reader in zip(self.weights, self.readers)]

    def _check(self) -> None:
        if not self.readers or len(self.weights) != len(self.readers):
            raise OpenVLAValueError(f"Got {len(self.weights)} weights for {len(self.readers)} datasets; give each one.")
        if any(not weight > 0 or weight == float("inf") for weight in self.weights):
            raise OpenVLAValueError(f"Weights must be positive and finite, got {self.weights}.")
        if self.ends not in ENDS:
            raise OpenVLAValueError(f"ends must be one of {ENDS}, got {self.ends!r}.")
        if self.chunk_length < 1 or self.shuffle_buffer < 0:
            raise OpenVLAValueError(
                f"chunk_length must be at least 1 and shuffle_buffer at least 0, got {self.chunk_length} and "
                f"{self.shuffle_buffer}."
            )
        if not 0 <= self.rank < self.world_size:
            raise OpenVLAValueError(f"rank must be in [0, {self.world_size}), got {self.rank}.")
        names = [reader.name for reader in self.readers]
        if len(set(names)) != len(names):
            raise OpenVLAValueError(f"Datasets of a mixture need different names, got {names}; give name=.")
        for what in ("action_dim", "proprio_dim"):
            sizes = {reader.name: getattr(reader, what) for reader in self.readers}
            if len(set(sizes.values())) > 1:
                raise OpenVLAValueError(f"Datasets of a mixture need one {what}, got {sizes}.")
        cameras = {reader.name: len(reader.fields.cameras) for reader in self.readers}
        if len(set(cameras.values())) > 1:
            raise OpenVLAValueError(f"Datasets of a mixture need one number of cameras, got {cameras}.")

    def _warn_of_short_episodes(self) -> None:
        for reader in self.readers:
            lengths = self._lengths(reader)
            if short := lengths.count(0):
                warnings.warn(
                    f"{reader.name}: {short} of {len(lengths)} episodes are shorter than a chunk of "
                    f"{self.chunk_length} actions and give no sample. Take ends='repeat' to train on them, or a "
                    "shorter chunk.",
                    stacklevel=3,
                )

    def _lengths(self, reader: EpisodeReader) -> list[int | None]:
        """Steps of every episode at which a sample may start; None where the episode is bad."""
        lengths: list[int | None] = []
        for index in range(len(reader)):
            try:
                lengths.append(self._length(reader, index))
            except DemonstrationError:  # raised when it is read
                lengths.append(None)
        return lengths

    def summary(self) -> list[dict[str, Any]]:
        """Return what every dataset gives and what of it is left out, as JSON holds it."""
        out = []
        for reader in self.readers:
            lengths = self._lengths(reader)
            left_out = {
                "bad_episodes": lengths.count(None),
                "episodes_shorter_than_the_chunk": lengths.count(0),
                "steps_that_do_nothing": reader.noop_steps,
            }
            out.append(
                {
                    "name": reader.name,
                    "format": reader.format,
                    "path": str(reader.root),
                    "cameras": list(reader.fields.cameras),
                    "episodes": sum(1 for length in lengths if length),
                    "samples": sum(length for length in lengths if length),
                    "left_out": left_out,
                    "notes": reader.notes(),
                }
            )
        return out

    def _steps(self, reader: EpisodeReader) -> int:
        return sum(self._length(reader, index) or 0 for index in range(len(reader)))

    def resume(self, batches: int, batch_size: int) -> None:
        """Go on behind that many batches of this rank; workers, seed and options must be as before.

        The order is played through without reading images (with ``skip_bad``, reading them: only so it is known what
        was left out).

        Raises:
            ValueError: A number is negative or zero.
        """
        if batches < 0 or batch_size < 1:
            raise OpenVLAValueError(
                f"batches must be at least 0 and batch_size at least 1, got {batches}, {batch_size}."
            )
        self.resume_at(StreamPosition(batches * self.world_size, batch_size, self.world_size))

    def resume_at(self, position: StreamPosition) -> None:
        """Continue a run's batches from a position on; this stream's ranks and workers take them in turn.

        The numbers of ranks and workers may be others than when the run began. A rank plays through the batches of
        others from the same shard without reading images (with ``skip_bad``, reading them).
        """
        self._position = position

    def __iter__(self) -> Iterator[Step]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        position = dataclasses.replace(self._position, workers=self._position.workers or workers)
        shards = position.world_size * (position.workers or 1)
        for reader in self.readers if self.repeat else ():
            if len(reader) < shards:
                raise OpenVLAValueError(
                    f"{reader.name} has {len(reader)} episodes, too few for {shards} readers ({position.world_size} "
                    f"ranks of {position.workers} workers); take fewer workers."
                )
        # DataLoader takes batches from its workers in turn, beginning with the first one.
        first, stride = position.batches + self.rank + self.world_size * worker, self.world_size * workers
        if stride != shards and not self.repeat:
            raise OpenVLAValueError("A stream that ends (repeat=False) resumes with as many ranks and workers only.")

        def drawn_here(sample: int, shard: int) -> bool:
            batch = position.batch_of(sample, shard)
            return batch >= first and (batch - first) % stride == 0

        draws: dict[int, Iterator[Step]] = {}
        for batch in itertools.count(first, stride):
            shard = position.shard(batch)
            if shard not in draws:
                draws[shard] = _Mixture(self, shard, shards).samples(functools.partial(drawn_here, shard=shard))
            for _ in range(position.batch_size):
                sample = next(draws[shard], None)
                if sample is None:
                    return
                yield sample

    def _length(self, reader: EpisodeReader, index: int) -> int | None:
        """Steps of an episode at which a sample may start; None where the episode is bad and skipped."""
        try:
            length = reader.length(index, checked=self.skip_bad)
        except DemonstrationError:
            if self.skip_bad:
                return None
            raise
        return length if self.ends == "repeat" else max(0, length - self.chunk_length + 1)

    def _skip(self, error: DemonstrationError) -> None:
        if str(error) not in self._bad:  # which is met again in every epoch
            self._bad.add(str(error))
            warnings.warn(f"Skipped, {self.skipped} so far: {error}", stacklevel=2)

    @property
    def skipped(self) -> int:
        return len(self._bad)


def one_camera_order(readers: Sequence[EpisodeReader]) -> list[EpisodeReader]:
    """Return the datasets of a mixture, those with the first one's cameras in its order.

    Cameras are one where the last parts of their names are (``observation.images.top``, ``obs.top``). Which cameras of
    other names meet in one place is warned of.

    Raises:
        ValueError: A name stands in different places and cannot be moved, as its neighbours have other names.
    """
    if len(readers) < 2:
        return list(readers)
    last = [[camera.rpartition(".")[2] for camera in reader.fields.cameras] for reader in readers]
    if any(len(set(names)) < len(names) for names in last):
        last = [list(reader.fields.cameras) for reader in readers]
    out, expected, others = [readers[0]], last[0], []
    for reader, names in zip(readers[1:], last[1:]):
        if sorted(names) == sorted(expected) and names != expected:
            cameras = tuple(reader.fields.cameras[names.index(name)] for name in expected)
            warnings.warn(
                f"{reader.name} stores its cameras in another order than {readers[0].name}; they are taken in that "
                f"one's: {list(cameras)}.",
                stacklevel=3,
            )
            reader = copy.copy(reader)
            reader.fields = dataclasses.replace(reader.fields, cameras=cameras)
        elif names != expected:
            if moved := [name for place, name in enumerate(names) if name in expected and expected[place] != name]:
                raise OpenVLAValueError(
                    f"Cameras of a mixture must have one order: {moved} stand elsewhere in {reader.name} {names} than "
                    f"in {readers[0].name} {expected}. Give the field cameras of one of them."
                )
            others.append(reader)
        out.append(reader)
    if others:
        listed = "; ".join(f"{reader.name} {list(reader.fields.cameras)}" for reader in [readers[0], *others])
        warnings.warn(
            f"The cameras of these datasets have different names and are taken to see alike, place by place: {listed}. "
            "Give the field cameras where they do not.",
            stacklevel=3,
        )
    return out


@dataclasses.dataclass
class _Open:
    """An episode some of whose steps are in the buffer."""

    episode: Episode | None
    left: int


class _Mixture:
    """The draws of one shard: which dataset, which of its samples."""

    def __init__(self, stream: DemonstrationStream, shard: int, shards: int) -> None:
        self.stream = stream
        self.random = random.Random(f"{stream.seed} mixture {shard}")
        self.parts = [_Part(stream, reader, shard, shards) for reader in stream.readers]

    def samples(self, is_needed: Callable[[int], bool]) -> Iterator[Step]:
        """Yield those samples, in order, whose numbers are needed; the others are only counted."""
        parts = [(part.positions(), part, weight) for part, weight in zip(self.parts, self.stream.weights)]
        given = 0
        while parts:
            chosen = self.random.choices(range(len(parts)), [weight for *_, weight in parts])[0]
            positions, part, _ = parts[chosen]
            position = next(positions, None)
            if position is None:
                del parts[chosen]
                continue
            needed = is_needed(given)
            try:
                sample = part.take(*position, wanted=needed or self.stream.skip_bad)
            except DemonstrationError as error:
                if not self.stream.skip_bad:
                    raise
                self.stream._skip(error)
                continue
            given += 1
            if needed and sample is not None:
                yield sample


class _Part:
    """One dataset of a mixture, as one shard sees it."""

    def __init__(self, stream: DemonstrationStream, reader: EpisodeReader, shard: int, shards: int) -> None:
        self.stream, self.reader, self.shard, self.shards = stream, reader, shard, shards
        self.random = random.Random(f"{stream.seed} {reader.name} {shard}")
        self.open: dict[tuple[int, int], _Open] = {}

    def positions(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, episode, step) in the order of drawing: through a buffer, a random one of which comes out."""
        buffer: list[tuple[int, int, int]] = []
        for position in self._stored_order():
            if self.stream.shuffle_buffer <= 1:
                yield position
            elif len(buffer) < self.stream.shuffle_buffer:
                buffer.append(position)
            else:
                place = self.random.randrange(len(buffer))
                buffer[place], position = position, buffer[place]
                yield position
        self.random.shuffle(buffer)
        yield from buffer

    def _stored_order(self) -> Iterator[tuple[int, int, int]]:
        epoch = 0
        while True:
            order = list(range(len(self.reader)))
            if self.stream.shuffle_buffer > 1:
                random.Random(f"{self.stream.seed} {self.reader.name} epoch {epoch}").shuffle(order)
            found = False
            for index in order[self.shard :: self.shards]:
                length = self.stream._length(self.reader, index)
                if length is None:
                    self.stream._skip(_why(self.reader, index))
                    continue
                if length:
                    self.open[epoch, index] = _Open(None, length)
                    found = True
                for step in range(length):
                    yield epoch, index, step
            if not found and not self._any_sample():
                raise OpenVLAValueError(
                    f"{self.reader.name}: no episode has {self.stream.chunk_length} steps; take ends='repeat' or a "
                    "shorter chunk."
                )
            if not self.stream.repeat:
                return
            epoch += 1

    def _any_sample(self) -> bool:
        return any(self.stream._length(self.reader, index) for index in range(len(self.reader)))

    def take(self, epoch: int, index: int, step: int, wanted: bool) -> Step | None:
        """The sample of a position, or None where it is only counted."""
        opened = self.open[epoch, index]
        opened.left -= 1
        try:
            if not wanted:
                return None
            if opened.episode is None:
                opened.episode = self.reader[index]
            return opened.episode.step(step, self.stream.chunk_length)
        finally:
            if not opened.left:
                del self.open[epoch, index]


def _why(reader: EpisodeReader, index: int) -> DemonstrationError:
    try:
        reader[index]
    except DemonstrationError as error:
        return error
    return DemonstrationError(f"{reader.name}, episode {index}")
