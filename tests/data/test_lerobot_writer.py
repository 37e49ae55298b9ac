"""Datasets of the LeRobot writer are read by our reader, and by LeRobot if it is installed."""

import numpy as np
import pytest
from encoded_images import png
from openvla.data.open import open_dataset

pytest.importorskip("pyarrow")
from openvla.data.lerobot_writer import LeRobotWriter  # noqa: E402

LAYOUT = {
    "fps": 20,
    "numbers": {"action": list("abcdefg"), "observation.state": list("12345678")},
    "cameras": {"observation.image": (32, 48), "observation.wrist_image": (16, 16)},
    "texts": ("language_instruction",),
    "robot_type": "panda",
}
TASKS = ["pick up the milk", "pick up the butter", "pick up the milk"]


def episode(seed, length):
    random = np.random.default_rng(seed)
    numbers = {"action": random.uniform(-1, 1, (length, 7)), "observation.state": random.normal(size=(length, 8))}
    numbers["action"][:, -1] = np.where(numbers["action"][:, -1] < 0, -1, 1)
    frames = {
        name: [random.integers(0, 256, (*size, 3), np.uint8) for _ in range(length)]
        for name, size in LAYOUT["cameras"].items()
    }
    return numbers, frames


def add(writer, seed):
    numbers, frames = episode(seed, 3 + seed)
    images = {name: [png(frame) for frame in shown] for name, shown in frames.items()}
    return writer.add_episode(TASKS[seed], numbers, images, {"language_instruction": TASKS[seed]})


@pytest.fixture
def folder(tmp_path):
    """A dataset of three episodes, the third appended by another writer."""
    folder = tmp_path / "libero_object_no_noops"
    writer = LeRobotWriter(folder, **LAYOUT)
    assert [add(writer, 0), add(writer, 1)] == [0, 1]
    again = LeRobotWriter(folder, **LAYOUT)
    assert len(again) == 2
    assert add(again, 2) == 2
    return folder


def test_written_dataset_is_read_with_the_preset_of_its_name(folder):
    reader = open_dataset(folder)
    assert (len(reader), reader.action_dim, reader.proprio_dim) == (3, 7, 8)
    for seed, read in enumerate(reader):
        numbers, frames = episode(seed, 3 + seed)
        np.testing.assert_array_equal(read.actions[:, :6], numbers["action"][:, :6].astype(np.float32))
        np.testing.assert_array_equal(read.actions[:, 6], numbers["action"][:, 6] < 0)  # -1 open is 1 open
        np.testing.assert_array_equal(read.proprio, numbers["observation.state"].astype(np.float32))
        assert set(read.instructions) == {TASKS[seed]}
        for step in range(len(read)):
            for shown, name in zip(read.images(step), ("observation.image", "observation.wrist_image")):
                np.testing.assert_array_equal(shown, frames[name][step])


def test_written_dataset_is_read_by_lerobot(folder):
    library = pytest.importorskip("ledataset.datasets.lerobot_dataset", reason="needs lerobot-dataset")
    dataset = library.LeRobotDataset("test/written", root=folder)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, 12, 20)
    index = 0
    for seed in range(3):
        numbers, frames = episode(seed, 3 + seed)
        for step in range(3 + seed):
            row = dataset[index]
            np.testing.assert_array_equal(row["action"], numbers["action"][step].astype(np.float32))
            np.testing.assert_array_equal(
                row["observation.state"], numbers["observation.state"][step].astype(np.float32)
            )
            for name in LAYOUT["cameras"]:
                shown = (row[name].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
                np.testing.assert_array_equal(shown, frames[name][step])
            assert (row["task"], int(row["episode_index"]), int(row["frame_index"])) == (TASKS[seed], seed, step)
            assert float(row["timestamp"]) == pytest.approx(step / 20)
            index += 1


def test_failed_write_leaves_the_dataset_intact(folder, monkeypatch):
    writer = LeRobotWriter(folder, **LAYOUT)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(writer.parquet, "write_table", fail)
    with pytest.raises(OSError, match="No space"):
        add(writer, 0)
    monkeypatch.undo()
    assert len(open_dataset(folder)) == 3
    assert add(LeRobotWriter(folder, **LAYOUT), 0) == 3


def test_mismatching_episodes_are_refused(folder):
    with pytest.raises(ValueError, match="dataset with another fps"):
        LeRobotWriter(folder, **{**LAYOUT, "fps": 10})
    writer = LeRobotWriter(folder, **LAYOUT)
    numbers, frames = episode(0, 3)
    images = {name: [png(frame) for frame in shown] for name, shown in frames.items()}
    texts = {"language_instruction": "go"}
    with pytest.raises(ValueError, match="texts must have the columns"):
        writer.add_episode("go", numbers, images)
    with pytest.raises(ValueError, match="must have the same length"):
        writer.add_episode("go", {**numbers, "action": numbers["action"][:2]}, images, texts)
    with pytest.raises(ValueError, match=r"action must be finite, of shape \(length, 7\)"):
        writer.add_episode("go", {**numbers, "action": np.full((3, 7), np.nan)}, images, texts)
    assert len(open_dataset(folder)) == 3
