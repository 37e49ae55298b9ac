"""Stream shuffled training samples from one dataset or a mixture, for any number of workers and ranks.

Only positions (episode and step numbers) are held in the shuffle buffer. An episode is read when its first step is
drawn and dropped after its last; an image is decoded when it is drawn. The order depends on the seed alone, so a stream
resumes exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from ..errors_openvla import OpenVLAValueError
from .episodes import DatasetError, Episode, EpisodeReader, Step


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


class StepStream(IterableDataset):
    """An iterable dataset of :class:`~openvla.data.episodes.Step` samples, for a torch DataLoader.

    In every epoch the episodes are distributed anew over ranks and workers, so that each sample is seen once per epoch.

    Args:
        readers: The datasets. If cameras of the same names have another order, the first dataset's order is used.
        weights: Sampling weight of every dataset; with ``balance`` relative to its number of steps. Default: all 1.
        chunk_length: Number of actions per sample.
        pad_last_chunk: If False, a chunk starts only where the episode still has all its actions, as OpenVLA-OFT
            trains; shorter episodes then give no sample, which is warned about. If True, a chunk starts at every step,
            and the last action repeats beyond the episode's end (``Step.is_padding``).
        shuffle_buffer: Number of steps to shuffle among; 0 or 1 keeps the stored order, also of episodes.
        seed: Seed of every random choice.
        repeat: Start the next epoch when all samples were seen; each dataset of a mixture does so on its own.
        rank: Index of this process in ``world_size``.
        world_size: Number of processes that train together.
        balance: Multiply weights by the datasets' numbers of steps, as the reference does.
        skip_bad: Skip, count and warn about episodes and images that cannot be used; otherwise they raise.
        history_length: Number of moments whose images a sample has (``Episode.step``).

    Raises:
        ValueError: An option is out of range, names collide, datasets differ in action or proprio dimensions or in
            the number of cameras, or cameras of the same name are at different positions.

    Attributes:
        readers: The datasets, with their cameras in one order.
        position: Where the stream begins.
        skipped: Number of different bad episodes and steps skipped so far in this process (every worker has its own).
    """

    def __init__(
        self,
        readers: Sequence[EpisodeReader] | EpisodeReader,
        weights: Sequence[float] | None = None,
        *,
        chunk_length: int = 1,
        pad_last_chunk: bool = False,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        repeat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        balance: bool = True,
        skip_bad: bool = False,
        history_length: int = 1,
    ) -> None:
        self.readers = [readers] if isinstance(readers, EpisodeReader) else list(readers)
        self.weights = [1.0] * len(self.readers) if weights is None else [float(weight) for weight in weights]
        self.chunk_length, self.pad_last_chunk = chunk_length, pad_last_chunk
        self.history_length = history_length
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self.repeat, self.rank, self.world_size, self.skip_bad = repeat, rank, world_size, skip_bad
        self._errors: set[str] = set()
        self.position = StreamPosition(world_size=world_size)
        self._validate()
        self.readers = align_cameras(self.readers)
        if rank == 0:
            self._warn_of_frame_rates()
            if not pad_last_chunk and chunk_length > 1:
                self._warn_of_short_episodes()
        if balance and len(self.readers) > 1:
            self.weights = [weight * self._num_samples(reader) for weight, reader in zip(self.weights, self.readers)]

    def _validate(self) -> None:
        if not self.readers or len(self.weights) != len(self.readers):
            raise OpenVLAValueError(f"Got {len(self.weights)} weights for {len(self.readers)} datasets; give each one.")
        if any(not weight > 0 or weight == float("inf") for weight in self.weights):
            raise OpenVLAValueError(f"Weights must be positive and finite, got {self.weights}.")
        if min(self.chunk_length, self.history_length) < 1 or self.shuffle_buffer < 0:
            raise OpenVLAValueError(
                f"chunk_length and history_length must be at least 1 and shuffle_buffer at least 0, got "
                f"{self.chunk_length}, {self.history_length} and {self.shuffle_buffer}."
            )
        if not 0 <= self.rank < self.world_size:
            raise OpenVLAValueError(f"rank must be in [0, {self.world_size}), got {self.rank}.")
        names = [reader.name for reader in self.readers]
        if len(set(names)) != len(names):
            raise OpenVLAValueError(f"Datasets of a mixture need different names, got {names}; pass name=.")
        for attribute in ("action_dim", "proprio_dim"):
            sizes = {reader.name: getattr(reader, attribute) for reader in self.readers}
            if len(set(sizes.values())) > 1:
                field = attribute.removesuffix("_dim")
                raise OpenVLAValueError(
                    f"Datasets of a mixture must have the same {attribute}, got {sizes}. Set their field {field}"
                    f"{' (proprio: [] for none)' if field == 'proprio' else ''}."
                )
        cameras = {reader.name: len(reader.fields.cameras) for reader in self.readers}
        if len(set(cameras.values())) > 1:
            raise OpenVLAValueError(
                f"Datasets of a mixture must have the same number of cameras, got {cameras}. Set their field cameras."
            )

    def _warn_of_frame_rates(self) -> None:
        rates = {reader.name: reader.frame_rate for reader in self.readers if reader.frame_rate}
        if len(set(rates.values())) > 1:
            warnings.warn(
                f"The datasets of this mixture have different frame rates (Hz): {rates}. An action is the movement of "
                "one step, so the policy will move faster or slower depending on which dataset a frame resembles; use "
                "datasets of one frame rate.",
                stacklevel=3,
            )

    def _warn_of_short_episodes(self) -> None:
        for reader in self.readers:
            counts = self._sample_counts(reader)
            if num_short := counts.count(0):
                warnings.warn(
                    f"{reader.name}: {num_short} of {len(counts)} episodes are shorter than a chunk of "
                    f"{self.chunk_length} actions and give no sample. Set pad_last_chunk=True to train on them, or use "
                    "a shorter chunk.",
                    stacklevel=3,
                )

    def _sample_counts(self, reader: EpisodeReader) -> list[int | None]:
        """Return the number of samples of every episode; None for a bad episode."""
        counts: list[int | None] = []
        for index in range(len(reader)):
            try:
                counts.append(self.num_samples_of(reader, index))
            except DatasetError:  # raised when the episode is read
                counts.append(None)
        return counts

    def summary(self) -> list[dict[str, Any]]:
        """Return, for every dataset, what it contributes and what is left out, as JSON-serializable dictionaries."""
        summaries = []
        for reader in self.readers:
            counts = self._sample_counts(reader)
            left_out = {
                "bad_episodes": counts.count(None),
                "episodes_shorter_than_the_chunk": counts.count(0),
                "steps_that_do_nothing": reader.num_noop_steps,
            }
            summaries.append(
                {
                    "name": reader.name,
                    "format": reader.format,
                    "path": str(reader.root),
                    "cameras": list(reader.fields.cameras),
                    "episodes": sum(1 for count in counts if count),
                    "samples": sum(count for count in counts if count),
                    "left_out": left_out,
                    "notes": reader.notes(),
                }
            )
        return summaries

    def _num_samples(self, reader: EpisodeReader) -> int:
        return sum(self.num_samples_of(reader, index) or 0 for index in range(len(reader)))

    def num_samples_of(self, reader: EpisodeReader, index: int) -> int | None:
        """Return the number of samples of an episode; None if it is bad and ``skip_bad`` is set.

        Raises:
            DatasetError: The episode is bad and ``skip_bad`` is not set.
        """
        try:
            length = reader.length(index, validate=self.skip_bad)
        except DatasetError:
            if self.skip_bad:
                return None
            raise
        return length if self.pad_last_chunk else max(0, length - self.chunk_length + 1)

    def resume(self, num_batches: int, batch_size: int) -> None:
        """Continue after some batches of this rank; workers, seed and options must be the same as before.

        The order is replayed without reading images (with ``skip_bad`` they are read, because only reading shows which
        samples were skipped).

        Args:
            num_batches: Batches that this rank has consumed.
            batch_size: Samples per batch.

        Raises:
            ValueError: ``num_batches`` is negative or ``batch_size`` is below 1.
        """
        if num_batches < 0 or batch_size < 1:
            raise OpenVLAValueError(
                f"num_batches must be at least 0 and batch_size at least 1, got {num_batches}, {batch_size}."
            )
        self.resume_at(StreamPosition(num_batches * self.world_size, batch_size, self.world_size))

    def resume_at(self, position: StreamPosition) -> None:
        """Continue a run's batches from a position on; this stream's ranks and workers take them in turn.

        The numbers of ranks and workers may differ from those when the run began. A rank replays the batches of others
        from the same shard without reading images (with ``skip_bad`` they are read).
        """
        self.position = position

    def __iter__(self) -> Iterator[Step]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        position = dataclasses.replace(self.position, workers=self.position.workers or num_workers)
        num_shards = position.world_size * (position.workers or 1)
        self.require_episodes(num_shards, f"{position.world_size} ranks of {position.workers} workers")
        # DataLoader takes batches from its workers in turn, beginning with the first one.
        first, stride = position.batches + self.rank + self.world_size * worker, self.world_size * num_workers
        if stride != num_shards and not self.repeat:
            raise OpenVLAValueError("A stream that ends (repeat=False) resumes with as many ranks and workers only.")

        def is_drawn_here(sample: int, shard: int) -> bool:
            batch = position.batch_of(sample, shard)
            return batch >= first and (batch - first) % stride == 0

        samples: dict[int, Iterator[Step]] = {}
        for batch in itertools.count(first, stride):
            shard = position.shard(batch)
            if shard not in samples:
                is_needed = functools.partial(is_drawn_here, shard=shard)
                samples[shard] = MixtureShard(self, shard, num_shards).samples(is_needed)
            for _ in range(position.batch_size):
                sample = next(samples[shard], None)
                if sample is None:
                    return
                yield sample

    def require_episodes(self, num_shards: int, reason: str) -> None:
        """Raise OpenVLAValueError if an endless stream has fewer episodes of a dataset than shards."""
        for reader in self.readers if self.repeat else ():
            if len(reader) < num_shards:
                raise OpenVLAValueError(
                    f"{reader.name} has {len(reader)} episodes, too few for {num_shards} readers ({reason}); use fewer."
                )

    def record_error(self, error: DatasetError) -> None:
        """Count a skipped episode or step and warn about it, once."""
        if str(error) not in self._errors:  # the same error occurs in every epoch
            self._errors.add(str(error))
            warnings.warn(f"Skipped, {self.skipped} so far: {error}", stacklevel=2)

    @property
    def skipped(self) -> int:
        return len(self._errors)


def align_cameras(readers: Sequence[EpisodeReader]) -> list[EpisodeReader]:
    """Return the datasets of a mixture with cameras of the same names in the first dataset's order.

    Cameras are identified by the last parts of their names (``observation.images.top`` and ``obs.top`` are the same).
    Cameras with different names at the same position are warned about.

    Raises:
        ValueError: A camera of the same name is at another position and cannot be moved, because the other cameras have
            different names.
    """
    if len(readers) < 2:
        return list(readers)
    camera_names = [[camera.rpartition(".")[2] for camera in reader.fields.cameras] for reader in readers]
    if any(len(set(names)) < len(names) for names in camera_names):
        camera_names = [list(reader.fields.cameras) for reader in readers]
    first, expected = readers[0], camera_names[0]
    aligned, differently_named = [first], []
    for reader, names in zip(readers[1:], camera_names[1:]):
        if sorted(names) == sorted(expected) and names != expected:
            cameras = tuple(reader.fields.cameras[names.index(name)] for name in expected)
            warnings.warn(
                f"{reader.name} stores its cameras in another order than {first.name}; they are reordered to "
                f"{list(cameras)}.",
                stacklevel=3,
            )
            reader = copy.copy(reader)
            reader.fields = dataclasses.replace(reader.fields, cameras=cameras)
        elif names != expected:
            if moved := [name for i, name in enumerate(names) if name in expected and expected[i] != name]:
                raise OpenVLAValueError(
                    f"Cameras of a mixture must be in one order: {moved} are at other positions in {reader.name} "
                    f"{names} than in {first.name} {expected}. Set the field cameras of one of them."
                )
            differently_named.append(reader)
        aligned.append(reader)
    if differently_named:
        listed = "; ".join(f"{reader.name} {list(reader.fields.cameras)}" for reader in [first, *differently_named])
        warnings.warn(
            "The cameras of these datasets have different names; cameras at the same position are assumed to have the "
            f"same view: {listed}. Set the field cameras if they do not.",
            stacklevel=3,
        )
    return aligned


class _Position(NamedTuple):
    """A sample of a dataset."""

    epoch: int
    episode: int
    step: int


@dataclasses.dataclass
class _OpenEpisode:
    """An episode with samples in the shuffle buffer.

    Attributes:
        episode: Read when its first sample is drawn.
        num_left: Number of its samples that are not drawn yet.
    """

    episode: Episode | None
    num_left: int


class MixtureShard:
    """One worker's share of a mixture: chooses a dataset, then one of its samples."""

    def __init__(self, stream: StepStream, shard: int, num_shards: int) -> None:
        self.stream = stream
        self.random = random.Random(f"{stream.seed} mixture {shard}")
        self.datasets = [_DatasetShard(stream, reader, shard, num_shards) for reader in stream.readers]

    def samples(self, is_needed: Callable[[int], bool]) -> Iterator[Step]:
        """Yield those samples, in order, whose numbers are needed; the others are only counted."""
        active = [(dataset.positions(), dataset, weight) for dataset, weight in zip(self.datasets, self.stream.weights)]
        num_drawn = 0
        while active:
            index = self.random.choices(range(len(active)), [weight for *_, weight in active])[0]
            positions, dataset, _ = active[index]
            position = next(positions, None)
            if position is None:
                del active[index]
                continue
            needed = is_needed(num_drawn)
            try:
                sample = dataset.draw(position, load=needed or self.stream.skip_bad)
            except DatasetError as error:
                if not self.stream.skip_bad:
                    raise
                self.stream.record_error(error)
                dataset.require_usable_images(error)
                continue
            num_drawn += 1
            if needed and sample is not None:
                yield sample


class _DatasetShard:
    """One worker's share of one dataset."""

    def __init__(self, stream: StepStream, reader: EpisodeReader, shard: int, num_shards: int) -> None:
        self.stream, self.reader, self.shard, self.num_shards = stream, reader, shard, num_shards
        self.random = random.Random(f"{stream.seed} {reader.name} {shard}")
        self.open_episodes: dict[tuple[int, int], _OpenEpisode] = {}
        self.has_usable_images = False

    def positions(self) -> Iterator[_Position]:
        """Yield positions in the order of drawing: each new one replaces a random one of the shuffle buffer."""
        buffer: list[_Position] = []
        for position in self._unshuffled_positions():
            if self.stream.shuffle_buffer <= 1:
                yield position
            elif len(buffer) < self.stream.shuffle_buffer:
                buffer.append(position)
            else:
                index = self.random.randrange(len(buffer))
                buffer[index], position = position, buffer[index]
                yield position
        self.random.shuffle(buffer)
        yield from buffer

    def _unshuffled_positions(self) -> Iterator[_Position]:
        """Yield the steps of one episode after the other; the order of episodes is shuffled per epoch."""
        epoch = 0
        while True:
            order = list(range(len(self.reader)))
            if self.stream.shuffle_buffer > 1:
                random.Random(f"{self.stream.seed} {self.reader.name} epoch {epoch}").shuffle(order)
            has_sample = False
            for index in order[self.shard :: self.num_shards]:
                num_samples = self.stream.num_samples_of(self.reader, index)
                if num_samples is None:
                    self.stream.record_error(_error_of(self.reader, index))
                    continue
                if num_samples:
                    self.open_episodes[epoch, index] = _OpenEpisode(None, num_samples)
                    has_sample = True
                for step in range(num_samples):
                    yield _Position(epoch, index, step)
            if not has_sample and not self._has_any_sample():
                raise OpenVLAValueError(
                    f"{self.reader.name}: no episode has {self.stream.chunk_length} steps; set pad_last_chunk=True or "
                    "use a shorter chunk."
                )
            if not self.stream.repeat:
                return
            epoch += 1

    def _has_any_sample(self) -> bool:
        return any(self.stream.num_samples_of(self.reader, index) for index in range(len(self.reader)))

    def draw(self, position: _Position, load: bool) -> Step | None:
        """Return the sample at a position; None without ``load``, which only counts it."""
        key = position.epoch, position.episode
        opened = self.open_episodes[key]
        opened.num_left -= 1
        try:
            if not load:
                return None
            if opened.episode is None:
                opened.episode = self.reader[position.episode]
            sample = opened.episode.step(position.step, self.stream.chunk_length, self.stream.history_length)
            self.has_usable_images = True
            return sample
        finally:
            if not opened.num_left:
                del self.open_episodes[key]

    def require_usable_images(self, error: DatasetError) -> None:
        """Raise OpenVLAValueError if no image can be read, where a stream that skips bad samples would never end.

        Of every episode the first, middle and last sample are tried, until one can be read.
        """
        if self.has_usable_images:
            return
        for index in range(len(self.reader)):
            num_samples = self.stream.num_samples_of(self.reader, index)
            if not num_samples:
                continue
            episode = self.reader[index]
            for step in (0, num_samples // 2, num_samples - 1):
                with contextlib.suppress(DatasetError):
                    episode.step(step, self.stream.chunk_length, self.stream.history_length)
                    self.has_usable_images = True
                    return
        raise OpenVLAValueError(
            f"{self.reader.name}: no image can be read at the first, middle and last step of any episode, so skip_bad "
            f"would leave out the whole dataset. The first: {error}"
        )


def _error_of(reader: EpisodeReader, index: int) -> DatasetError:
    """Return the error that reading a bad episode raises."""
    try:
        reader[index]
    except DatasetError as error:
        return error
    return DatasetError(f"{reader.name}, episode {index}")
