"""Order, sharding, chunks, mixtures and resumption of streams."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from make_data import CHUNK, LENGTHS, TASKS, numbers
from openvla.demonstration_stream import DemonstrationStream
from openvla.sequence_reader import SequenceReader
from torch.utils.data import DataLoader

LONG = (7, 5, 9, 3, 12, 8, 6, 4)
FIELDS = {"cameras": ["image"], "action": "action", "instruction": "task"}
DATA = Path(__file__).parent / "data"


def reader(name="mine", lengths=LONG, width=7, bad_image=None, nan=None):
    """Episodes in memory whose action says which step it is of."""
    rows = []
    for episode, length in enumerate(lengths):
        for step in range(length):
            image = np.full((4, 6, 3), episode, np.uint8)
            action = np.full(width, np.nan if episode == nan else 100 * episode + step)
            image = "no image" if (episode, step) == bad_image else image
            rows.append({"image": image, "action": action, "task": "go"})
    return SequenceReader(rows, name, FIELDS, episode_lengths=lengths)


def batched(rows):
    return rows


def load(stream, workers=0, batch_size=4):
    return DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=batched)


def seen(samples):
    return [(sample.dataset, int(sample.action[0])) for sample in samples]


ALL = sorted(("mine", 100 * episode + step) for episode, length in enumerate(LONG) for step in range(length))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_sample_is_seen_once(workers, world_size):
    streams = [
        DemonstrationStream(reader(), repeat=False, shuffle_buffer=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    samples = [sample for stream in streams for batch in load(stream, workers) for sample in batch]
    assert sorted(seen(samples)) == ALL
    assert seen(samples) != ALL


def test_order_follows_from_the_seed_alone():
    def order(seed, buffer=8):
        return seen(DemonstrationStream(reader(), repeat=False, shuffle_buffer=buffer, seed=seed))

    assert order(1) == order(1) != order(2)
    assert order(1, buffer=0) == ALL


def test_epochs_differ_and_each_is_whole():
    stream = iter(DemonstrationStream(reader(), shuffle_buffer=2, seed=3))
    samples = seen(next(stream) for _ in range(5 * len(ALL)))
    first, second = samples[: len(ALL)], samples[len(ALL) : 2 * len(ALL)]
    assert first != second
    counts = Counter(samples)
    assert set(counts.values()) <= {4, 5, 6}  # epochs overlap by the buffer
    assert set(counts) == set(ALL)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_resumes_exactly(workers, skip_bad):
    bad = {"bad_image": (2, 3), "nan": 5} if skip_bad else {}

    def stream():
        both = [reader(**bad), reader("other", lengths=(5, 6, 7, 8))]
        return DemonstrationStream(both, [1.0, 2.0], shuffle_buffer=7, chunk_length=2, seed=5, skip_bad=skip_bad)

    iterator = iter(load(stream(), workers))
    whole = [seen(next(iterator)) for _ in range(40)]
    for stopped in (1, 6, 33):
        resumed = stream()
        resumed.resume(stopped, batch_size=4)
        iterator = iter(load(resumed, workers))
        assert [seen(next(iterator)) for _ in range(40 - stopped)] == whole[stopped:]


def test_replaying_decodes_no_image():
    rows, asked = [], []

    class Watched(dict):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    for row in reader().data:
        rows.append(Watched(row))
    watched = SequenceReader(rows, "mine", FIELDS, episode_lengths=LONG)
    stream = DemonstrationStream(watched, shuffle_buffer=4)
    stream.resume(10, batch_size=4)
    asked.clear()
    sample = next(iter(stream))
    assert len(sample.images) == 1
    assert asked.count("image") <= 1


def test_chunks_equal_openvla_oft():
    oft = np.load(DATA / "presets.npz")
    rows = [{"image": np.zeros((4, 6, 3), np.uint8), "action": row, "task": "go"} for row in numbers(2, 7)]
    data = SequenceReader(rows, "mine", FIELDS, episode_lengths=[len(rows)])
    samples = list(DemonstrationStream(data, chunk_length=CHUNK, repeat=False, shuffle_buffer=0))
    assert [sample.index for sample in samples] == oft["chunks.steps"].tolist()
    np.testing.assert_array_equal([sample.actions for sample in samples], oft["chunks.actions"])


def test_chunks_at_the_end_are_dropped_as_oft_does_or_repeat():
    dropped = list(DemonstrationStream(reader(), chunk_length=4, repeat=False, shuffle_buffer=0))
    assert len(dropped) == sum(max(0, length - 3) for length in LONG)
    assert not any(sample.is_padding.any() for sample in dropped)
    repeated = list(DemonstrationStream(reader(), chunk_length=4, repeat=False, shuffle_buffer=0, ends="repeat"))
    assert len(repeated) == sum(LONG)
    last = repeated[6]
    assert last.actions[:, 0].tolist() == [6, 6, 6, 6]
    assert last.is_padding.tolist() == [False, True, True, True]
    assert last.actions.shape == (4, 7)


def test_mixtures_draw_by_weight_and_size():
    def share(weights, balance):
        both = [reader(), reader("other", lengths=(9, 9))]
        stream = iter(DemonstrationStream(both, weights, shuffle_buffer=4, balance=balance))
        return np.mean([next(stream).dataset == "other" for _ in range(3000)])

    assert share([1, 1], balance=False) == pytest.approx(0.5, abs=0.03)
    assert share([3, 1], balance=False) == pytest.approx(0.25, abs=0.03)
    assert share([1, 1], balance=True) == pytest.approx(18 / (18 + sum(LONG)), abs=0.03)


def test_a_mixture_read_once_holds_all():
    both = [reader(), reader("other", lengths=(9, 9))]
    samples = seen(DemonstrationStream(both, repeat=False, shuffle_buffer=4))
    assert len(samples) == len(set(samples)) == sum(LONG) + 18


def test_bad_data_raises_or_is_counted():
    bad = reader(bad_image=(2, 3), nan=5)
    with pytest.raises(ValueError, match=r"mine, episode 5: action\[0\] at step 0 is nan"):
        list(DemonstrationStream(reader(nan=5), repeat=False))
    with pytest.raises(ValueError, match="mine, episode 2: no image at step 3"):
        list(DemonstrationStream(reader(bad_image=(2, 3)), repeat=False))
    stream = DemonstrationStream(bad, repeat=False, shuffle_buffer=3, skip_bad=True)
    with pytest.warns(UserWarning, match="Skipped, [12] so far"):
        samples = list(stream)
    assert stream.skipped == 2
    assert len(samples) == sum(LONG) - LONG[5] - 1


def test_impossible_streams():
    with pytest.raises(ValueError, match=r"8 episodes, too few for 9 readers"):
        next(iter(DemonstrationStream(reader(), world_size=9)))
    with pytest.raises(ValueError, match="no episode has 13 steps"):
        next(iter(DemonstrationStream(reader(), chunk_length=13)))
    with pytest.raises(ValueError, match="one action_dim"):
        DemonstrationStream([reader(), reader("other", width=6)])
    with pytest.raises(ValueError, match="different names"):
        DemonstrationStream([reader(), reader()])
    with pytest.raises(ValueError, match="Weights must be positive"):
        DemonstrationStream(reader(), [0])
    with pytest.raises(ValueError, match="rank must be in"):
        DemonstrationStream(reader(), rank=1)


@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21", "bridge_orig", "hdf5"])
def test_workers_read_every_format(name):
    for package in ("av", "h5py", "pyarrow"):
        pytest.importorskip(package)
    from openvla.demonstrations import open_demonstrations

    data = open_demonstrations(DATA / name)
    data[0].step(0)  # files are open already when workers start
    stream = DemonstrationStream(data, repeat=False, shuffle_buffer=6)
    samples = [sample for batch in load(stream, workers=2) for sample in batch]
    assert len({(sample.episode_id, sample.index) for sample in samples}) == len(samples) == sum(map(len, data))
    assert {sample.instruction for sample in samples} <= set(TASKS)
    if name.startswith("lerobot"):
        for sample in samples:
            np.testing.assert_array_equal(sample.action, numbers(int(sample.episode_id), 7)[sample.index])
        assert len(samples) == sum(LENGTHS)
