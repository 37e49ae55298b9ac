"""Order, sharding, chunks, mixtures and resumption of streams."""

import itertools
from collections import Counter

import numpy as np
import pytest
from make_data import CHUNK, LENGTHS, TASKS, numbers
from memory_dataset import EPISODE_LENGTHS, FIELDS, memory_reader
from openvla.data.columns import find_noops
from openvla.data.statistics import compute_statistics
from openvla.data.stream import StepStream
from openvla.data.torch_dataset import TorchDatasetReader
from reference import FIXTURES
from torch.utils.data import DataLoader


def batched(rows):
    return rows


def load(stream, workers=0, batch_size=4):
    return DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=batched)


def positions(samples):
    return [(sample.dataset, int(sample.action[0])) for sample in samples]


ALL = sorted(("mine", 100 * episode + step) for episode, length in enumerate(EPISODE_LENGTHS) for step in range(length))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_sample_is_drawn_once_per_epoch(workers, world_size):
    streams = [
        StepStream(memory_reader(), repeat=False, shuffle_buffer=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    samples = [sample for stream in streams for batch in load(stream, workers) for sample in batch]
    assert sorted(positions(samples)) == ALL
    assert positions(samples) != ALL


def test_order_depends_on_the_seed_alone():
    def order(seed, buffer=8):
        return positions(StepStream(memory_reader(), repeat=False, shuffle_buffer=buffer, seed=seed))

    assert order(1) == order(1) != order(2)
    assert order(1, buffer=0) == ALL


def test_epochs_differ_and_are_complete():
    stream = iter(StepStream(memory_reader(), shuffle_buffer=2, seed=3))
    samples = positions(next(stream) for _ in range(5 * len(ALL)))
    first, second = samples[: len(ALL)], samples[len(ALL) : 2 * len(ALL)]
    assert first != second
    counts = Counter(samples)
    assert set(counts.values()) <= {4, 5, 6}  # epochs overlap by the buffer
    assert set(counts) == set(ALL)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.filterwarnings("ignore:Skipped")
def test_stream_resumes_exactly(workers, skip_bad):
    bad = {"bad_image": (2, 3), "nan": 5} if skip_bad else {}

    def stream():
        both = [memory_reader(**bad), memory_reader("other", lengths=(5, 6, 7, 8))]
        return StepStream(both, [1.0, 2.0], shuffle_buffer=7, chunk_length=2, seed=5, skip_bad=skip_bad)

    iterator = iter(load(stream(), workers))
    whole = [positions(next(iterator)) for _ in range(40)]
    for stopped in (1, 6, 33):
        resumed = stream()
        resumed.resume(stopped, batch_size=4)
        iterator = iter(load(resumed, workers))
        assert [positions(next(iterator)) for _ in range(40 - stopped)] == whole[stopped:]


def test_resuming_decodes_no_image():
    rows, keys = [], []

    class Watched(dict):
        def __getitem__(self, key):
            keys.append(key)
            return super().__getitem__(key)

    for row in memory_reader().data:
        rows.append(Watched(row))
    watched = TorchDatasetReader(rows, "mine", FIELDS, episode_lengths=EPISODE_LENGTHS)
    stream = StepStream(watched, shuffle_buffer=4)
    stream.resume(10, batch_size=4)
    keys.clear()
    sample = next(iter(stream))
    assert len(sample.images) == 1
    assert keys.count("image") <= 1


def test_chunks_equal_openvla_oft():
    oft = np.load(FIXTURES / "presets.npz")
    rows = [{"image": np.zeros((4, 6, 3), np.uint8), "action": row, "task": "go"} for row in numbers(2, 7)]
    data = TorchDatasetReader(rows, "mine", FIELDS, episode_lengths=[len(rows)])
    samples = list(StepStream(data, chunk_length=CHUNK, repeat=False, shuffle_buffer=0))
    assert [sample.index for sample in samples] == oft["chunks.steps"].tolist()
    np.testing.assert_array_equal([sample.actions for sample in samples], oft["chunks.actions"])


def test_last_chunks_are_dropped_or_padded():
    with pytest.warns(
        UserWarning, match="mine: 1 of 8 episodes are shorter than a chunk of 4 actions and give no sample"
    ):
        dropped = list(StepStream(memory_reader(), chunk_length=4, repeat=False, shuffle_buffer=0))
    assert len(dropped) == sum(max(0, length - 3) for length in EPISODE_LENGTHS)
    assert not any(sample.is_padding.any() for sample in dropped)
    repeated = list(StepStream(memory_reader(), chunk_length=4, repeat=False, shuffle_buffer=0, pad_last_chunk=True))
    assert len(repeated) == sum(EPISODE_LENGTHS)
    last = repeated[6]
    assert last.actions[:, 0].tolist() == [6, 6, 6, 6]
    assert last.is_padding.tolist() == [False, True, True, True]
    assert last.actions.shape == (4, 7)


def test_mixture_samples_by_weight_and_size():
    def share(weights, balance):
        both = [memory_reader(), memory_reader("other", lengths=(9, 9))]
        stream = iter(StepStream(both, weights, shuffle_buffer=4, balance=balance))
        return np.mean([next(stream).dataset == "other" for _ in range(3000)])

    assert share([1, 1], balance=False) == pytest.approx(0.5, abs=0.03)
    assert share([3, 1], balance=False) == pytest.approx(0.25, abs=0.03)
    assert share([1, 1], balance=True) == pytest.approx(18 / (18 + sum(EPISODE_LENGTHS)), abs=0.03)


def test_mixture_without_repeat_is_complete():
    both = [memory_reader(), memory_reader("other", lengths=(9, 9))]
    samples = positions(StepStream(both, repeat=False, shuffle_buffer=4))
    assert len(samples) == len(set(samples)) == sum(EPISODE_LENGTHS) + 18


def test_bad_data_raises_or_is_skipped():
    bad = memory_reader(bad_image=(2, 3), nan=5)
    with pytest.raises(ValueError, match=r"mine, episode 5: action\[0\] at step 0 is nan"):
        list(StepStream(memory_reader(nan=5), repeat=False))
    with pytest.raises(ValueError, match="mine, episode 2: no image at step 3"):
        list(StepStream(memory_reader(bad_image=(2, 3)), repeat=False))
    stream = StepStream(bad, repeat=False, shuffle_buffer=3, skip_bad=True)
    with pytest.warns(UserWarning, match="Skipped, [12] so far"):
        samples = list(stream)
    assert stream.skipped == 2
    assert len(samples) == sum(EPISODE_LENGTHS) - EPISODE_LENGTHS[5] - 1


@pytest.mark.parametrize("others", [[], [memory_reader("other")]], ids=["alone", "mixture"])
def test_a_dataset_without_a_usable_image_is_an_error_even_if_bad_samples_are_skipped(others):
    bad = memory_reader(lengths=(1, 1))
    for step in bad.data:
        step["image"] = "no image"
    stream = StepStream([bad, *others], skip_bad=True, balance=False)
    with (
        pytest.warns(UserWarning, match="Skipped, 1 so far"),
        pytest.raises(
            ValueError, match="mine: no image can be read at .* The first: mine, episode .: no image at step 0"
        ),
    ):
        list(itertools.islice(stream, sum(EPISODE_LENGTHS)))


def test_invalid_streams_are_refused():
    with pytest.raises(ValueError, match=r"8 episodes, too few for 9 readers"):
        next(iter(StepStream(memory_reader(), world_size=9)))
    for repeat in (True, False):
        with (
            pytest.raises(ValueError, match="no episode has 13 steps; set pad_last_chunk=True or use a shorter chunk"),
            pytest.warns(UserWarning, match="8 of 8 episodes are shorter than a chunk of 13"),
        ):
            next(iter(StepStream(memory_reader(), chunk_length=13, repeat=repeat)))
    with pytest.raises(ValueError, match="the same action_dim, got .*7.*6.*. Set their field action."):
        StepStream([memory_reader(), memory_reader("other", width=6)])
    with_state = TorchDatasetReader(
        memory_reader().data, "other", {**FIELDS, "proprio": "action"}, episode_lengths=EPISODE_LENGTHS
    )
    with pytest.raises(ValueError, match=r"same proprio_dim, .*'other': 7.*Set their field proprio \(proprio: \[\]"):
        StepStream([memory_reader(), with_state])
    with pytest.raises(ValueError, match="different names"):
        StepStream([memory_reader(), memory_reader()])
    with pytest.raises(ValueError, match="Weights must be positive"):
        StepStream(memory_reader(), [0])
    with pytest.raises(ValueError, match="rank must be in"):
        StepStream(memory_reader(), rank=1)


@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21", "bridge_orig", "hdf5"])
def test_workers_read_every_format(name):
    for package in ("av", "google_crc32c", "h5py", "pyarrow"):
        pytest.importorskip(package)
    from openvla.data.open import open_dataset

    data = open_dataset(FIXTURES / name)
    data[0].step(0)  # files are open already when workers start
    stream = StepStream(data, repeat=False, shuffle_buffer=6)
    samples = [sample for batch in load(stream, workers=2) for sample in batch]
    assert len({(sample.episode_id, sample.index) for sample in samples}) == len(samples) == sum(map(len, data))
    assert {sample.instruction for sample in samples} <= set(TASKS)
    if name.startswith("lerobot"):
        for sample in samples:
            np.testing.assert_array_equal(sample.action, numbers(int(sample.episode_id), 7)[sample.index])
        assert len(samples) == sum(LENGTHS)


def camera_reader(name, *cameras, lengths=(3, 4)):
    """Return a reader whose cameras named "...top", "...wrist" and "...side" show grey levels 1, 2 and 3."""
    grey = {"top": 1, "wrist": 2, "side": 3}
    frames = {camera: np.full((4, 6, 3), grey[camera.rpartition(".")[2]], np.uint8) for camera in cameras}
    rows = [{**frames, "action": np.zeros(7), "task": "go"} for _ in range(sum(lengths))]
    return TorchDatasetReader(rows, name, {**FIELDS, "cameras": cameras}, episode_lengths=lengths)


def grey_levels(stream):
    return {(sample.dataset, *(int(image[0, 0, 0]) for image in sample.images)) for sample in stream}


def test_cameras_of_a_mixture_are_matched_by_name():
    readers = [
        camera_reader("first", "observation.images.top", "observation.images.wrist"),
        camera_reader("other", "wrist", "top"),
    ]
    with pytest.warns(UserWarning, match=r"other stores its cameras in another order than first.*\['top', 'wrist'\]"):
        stream = StepStream(readers, repeat=False)
    assert grey_levels(stream) == {("first", 1, 2), ("other", 1, 2)}
    assert [dataset["cameras"] for dataset in stream.summary()][1] == ["top", "wrist"]
    assert readers[1].fields.cameras == ("wrist", "top")  # the caller's own is not changed


def test_cameras_of_other_names_warn_and_misplaced_ones_are_refused():
    with pytest.warns(UserWarning, match=r"assumed to have the same view: a \['top', 'wrist'\]; b \['top', 'side'\]"):
        StepStream([camera_reader("a", "top", "wrist"), camera_reader("b", "top", "side")])
    with pytest.raises(
        ValueError, match=r"must be in one order: \['wrist'\] are at other positions in b .*field cameras"
    ):
        StepStream([camera_reader("a", "top", "wrist"), camera_reader("b", "wrist", "side")])


@pytest.mark.filterwarnings("error")
def test_cameras_of_one_order_do_not_warn():
    assert grey_levels(
        StepStream([camera_reader("a", "x.top", "x.wrist"), camera_reader("b", "top", "wrist")], repeat=False)
    ) == {
        ("a", 1, 2),
        ("b", 1, 2),
    }


@pytest.mark.filterwarnings("ignore:Skipped")
def test_summary_counts_what_is_left_out():
    stream = StepStream(memory_reader(nan=5), chunk_length=4, skip_bad=True, pad_last_chunk=True)
    nothing = {"bad_episodes": 1, "episodes_shorter_than_the_chunk": 0, "steps_that_do_nothing": 0}
    (summary,) = stream.summary()
    assert (summary["left_out"], summary["episodes"], summary["samples"]) == (
        nothing,
        7,
        sum(EPISODE_LENGTHS) - EPISODE_LENGTHS[5],
    )
    with pytest.warns(UserWarning, match="1 of 8 episodes are shorter"):
        (summary,) = StepStream(memory_reader(nan=5), chunk_length=4, skip_bad=True).summary()
    assert summary["left_out"] == {**nothing, "episodes_shorter_than_the_chunk": 1}
    assert summary["samples"] == sum(max(0, length - 3) for length in EPISODE_LENGTHS if length != EPISODE_LENGTHS[5])
    assert summary["episodes"] == 6


def build_actions(*commands):
    """Return actions with dx and gripper command of every pair."""
    return np.array([[move, 0, 0, 0, 0, 0, gripper] for move, gripper in commands], np.float64)


def test_noops_equal_openvla():
    stored = build_actions(
        (0, -1), (0, 1), (0.5, -1), (9e-5, -1), (2e-4, -1), (0, 1), (0, 1), (0, -1), (0, -1), (0.1, -1)
    )
    assert find_noops(stored).tolist() == [True, True, False, True, False, False, True, False, True, False]

    def reference(rows):  # norm(action[:-1]) < 1e-4 and the gripper of the last action that was kept, if there is one
        kept = []
        for step, row in enumerate(rows):
            still = np.linalg.norm(row[:-1]) < 1e-4
            if not (still and (not kept or row[-1] == rows[kept[-1]][-1])):
                kept.append(step)
        return kept

    random = np.random.RandomState(0)
    rows = build_actions(*zip(random.choice([0, 5e-5, 1e-3, 0.4], 500), random.choice([-1, 1], 500, p=[0.9, 0.1])))
    assert np.flatnonzero(~find_noops(rows)).tolist() == reference(rows)


def with_noops(**fields):
    episodes = {
        "open": build_actions((0, -1), (0.5, -1), (0, -1), (0.25, 1), (0, 1)),
        "wait": build_actions((0, -1), (0, -1)),
        "close": build_actions((0.5, 1), (0.25, 1)),
    }
    data = [
        [
            {"image": np.full((4, 6, 3), 10 * number + step, np.uint8), "action": row, "state": [step], "task": task}
            for step, row in enumerate(rows)
        ]
        for number, (task, rows) in enumerate(episodes.items())
    ]
    return TorchDatasetReader(data, "mine", {**FIELDS, "proprio": "state", "drop_noops": True, **fields})


@pytest.mark.parametrize("gripper", ["as_is", "clipped_inverted"])
def test_drop_noops_also_drops_images_and_states(gripper):
    data = with_noops(gripper=gripper)
    episode = data[0]
    assert episode.actions[:, 0].tolist() == [0.5, 0.25]
    assert episode.actions[:, 6].tolist() == ([-1, 1] if gripper == "as_is" else [1, 0])
    assert episode.proprio[:, 0].tolist() == [1, 3]
    assert [int(episode.images(step)[0][0, 0, 0]) for step in range(2)] == [1, 3]
    assert data.length(0) == 2
    assert len(with_noops(drop_noops=False)[0]) == 5


def test_episode_of_noops_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"episode 1: all of its 2 steps do nothing \(instruction 'wait'\).*skip_bad=True"
    ):
        compute_statistics(with_noops(gripper="clipped_inverted"), progress=False)
    data = with_noops(gripper="clipped_inverted")
    with pytest.warns(
        UserWarning, match=r"mine: drop_noops leaves no episode of the tasks \['wait'\], which will not be learnt"
    ):
        statistics = compute_statistics(data, skip_bad=True, progress=False)
    assert (statistics["num_transitions"], statistics["num_skipped"]) == (4, 1)
    assert data.notes() == ["3 steps that do nothing are left out (drop_noops)"]
    (summary,) = StepStream(data, skip_bad=True).summary()
    assert summary["left_out"]["steps_that_do_nothing"] == 3
    assert (summary["left_out"]["bad_episodes"], summary["samples"]) == (1, 4)


@pytest.mark.parametrize("text", [b"go", np.bytes_("go"), np.array("go"), np.array([b"go"]), ["go"]])
def test_instructions_in_memory_may_be_bytes(text):
    rows = [{"image": np.zeros((4, 6, 3), np.uint8), "action": np.zeros(7), "task": text} for _ in range(2)]
    assert TorchDatasetReader(rows, "mine", FIELDS, episode_lengths=[2])[0].step(1).instruction == "go"
    rows[1]["task"] = None
    with pytest.raises(ValueError, match="the instruction at step 1 is empty"):
        TorchDatasetReader(rows, "mine", FIELDS, episode_lengths=[2])[0]
