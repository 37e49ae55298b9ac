"""Numbered batches: the same for every number of processes and workers, and resumed from a state."""

import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch
from memory_dataset import EPISODE_LENGTHS, FIELDS, memory_reader
from openvla.data.augmentation import ImageAugmentation
from openvla.data.batches import BatchStream
from openvla.data.statistics import as_norm_stats
from openvla.data.stream import StepStream
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.tiny import build_tiny
from openvla.training.collator import ActionCollator
from torch.utils.data import DataLoader

BATCH_SIZE = 4


def batches(rank=0, world_size=1, num_shards=1, **options):
    both = [memory_reader(), memory_reader("other", lengths=(9, 5, 6, 7))]
    stream = StepStream(both, [1.0, 2.0], shuffle_buffer=7, seed=5, rank=rank, world_size=world_size, **options)
    return BatchStream(stream, BATCH_SIZE, num_shards=num_shards)


def load(stream, workers=0):
    return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=content)


def content(batch):
    """Return a batch's number and samples."""
    return batch.number, [(sample.dataset, int(sample.action[0])) for sample in batch]


def first(loader, count):
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (3, 0), (2, 2)])
def test_processes_and_workers_share_the_batches_of_one_process(num_shards, world_size, workers):
    whole = first(load(batches(num_shards=num_shards)), 24)
    assert [number for number, _ in whole] == list(range(24))
    parts = [
        first(load(batches(rank, world_size, num_shards), workers), 24 // world_size) for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*parts)) == whole
    for rank, part in enumerate(parts):
        assert part == whole[rank::world_size]


def test_every_sample_is_drawn_once_where_the_stream_ends():
    parts = [list(load(batches(rank, 2, num_shards=3, repeat=False))) for rank in range(2)]
    numbers = [number for part in parts for number, _ in part]
    samples = Counter(sample for part in parts for _, samples in part for sample in samples)
    assert len(set(numbers)) == len(numbers)
    assert set(samples.values()) == {1}
    assert len(samples) == sum(EPISODE_LENGTHS) + 27


def test_batches_are_found_by_number():
    stream = batches(num_shards=2)
    whole = first(load(batches(num_shards=2)), 12)
    assert [content(stream[number]) for number in (3, 11, 4, 0)] == [whole[number] for number in (3, 11, 4, 0)]
    with pytest.raises(IndexError, match="no batch -1"):
        stream[-1]
    with pytest.raises(IndexError, match="no batch 500"):
        batches(repeat=False)[500]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_run_is_continued_by_other_numbers_of_processes(skip_bad):
    """6 batches of 2 processes, 6 of 3, the rest of 1 with 2 workers: nothing is lost, nothing repeated."""
    options = {"num_shards": 2, "skip_bad": skip_bad}
    used = [batch for rank in range(2) for batch in first(load(batches(rank, 2, **options)), 3)]
    for rank in range(3):
        stream = batches(rank, 3, **options)
        stream.continue_at(6)
        used += first(load(stream), 2)
    stream = batches(**options)
    stream.continue_at(12)
    used += first(load(stream, workers=2), 12)
    assert sorted(used) == first(load(batches(**options)), 24)


def test_a_state_continues_the_same_process():
    whole = first(load(batches(1, 2)), 12)
    for stopped in (0, 1, 7):
        stream = batches(1, 2)
        iterator = iter(load(stream))
        assert first(iterator, stopped) == whole[:stopped]
        resumed = batches(1, 2)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert resumed.state_dict() == stream.state_dict()
        assert first(load(resumed), 12 - stopped) == whole[stopped:]


def test_a_state_of_one_process_continues_any_number():
    stream = batches(1, 2)
    used = first(load(stream), 3) + first(load(batches(0, 2)), 3)
    for rank in range(3):
        resumed = batches(rank, 3)
        resumed.load_state_dict(stream.state_dict())
        used += first(load(resumed), 2)
    assert sorted(used) == first(load(batches()), 12)


def test_a_new_iteration_begins_again():
    stream = batches()
    assert first(load(stream), 5) == first(load(stream), 5)


class CountingReader(TorchDatasetReader):
    """Reader that counts the images that it loads."""

    loaded = 0

    def read_raw(self, index):
        raw = super().read_raw(index)

        def load_image(camera, step):
            self.loaded += 1
            return raw.load_image(camera, step)

        return dataclasses.replace(raw, load_image=load_image)


def test_resuming_decodes_only_images_of_its_batches():
    reader = CountingReader(memory_reader().data, "mine", FIELDS, episode_lengths=EPISODE_LENGTHS)
    stream = BatchStream(StepStream(reader, shuffle_buffer=4, world_size=2, rank=1), BATCH_SIZE)
    stream.continue_at(10)
    next(iter(stream))
    assert reader.loaded == BATCH_SIZE


@pytest.mark.filterwarnings("ignore:.*(absolute-pose|degrees|millimetres)")
def test_augmentation_depends_on_the_number_alone():
    model, processor = build_tiny()
    both = batches().stream.readers
    for key, statistics in as_norm_stats(both).items():
        model.add_norm_stats(key, statistics)

    def load(rank, world_size, workers, start):
        stream = batches(rank, world_size)
        stream.continue_at(start)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            collate_fn=ActionCollator(processor, model, ImageAugmentation(), seed=1),
        )

    whole = [batch["pixel_values"] for batch in first(load(0, 1, 0, 0), 6)]
    assert not torch.equal(whole[0], whole[1])
    resumed = [batch["pixel_values"] for batch in first(load(1, 2, 2, 2), 2)]
    for batch, expected in zip(resumed, whole[3::2], strict=True):
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shards": 0}, "at least 1"),
        ({"num_shards": 5}, r"other has 4 episodes, too few for 5 readers \(num_shards=5\)"),
    ],
)
def test_invalid_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(**arguments)


def test_a_stream_at_a_position_is_refused():
    stream = batches().stream
    stream.resume(2, BATCH_SIZE)
    with pytest.raises(ValueError, match="use continue_at"):
        BatchStream(stream, BATCH_SIZE)
    with pytest.raises(ValueError, match="at least 0"):
        batches().continue_at(-1)


def test_a_state_of_other_data_is_refused():
    state = batches().state_dict()
    with pytest.raises(ValueError, match="The state has num_shards 1, this stream 2"):
        batches(num_shards=2).load_state_dict(state)
    with pytest.raises(ValueError, match="has changed: use a new loader and continue_at"):
        batches().load_state_dict({**state, "stride": 2})
