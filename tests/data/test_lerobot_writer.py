"""Datasets of the LeRobot writer are read by our reader, and by LeRobot if it is installed."""

import json

import numpy as np
import pytest
from encoded_images import png
from openvla.data.open import open_dataset

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
from openvla.data.lerobot_statistics import QUANTILES, level_counts, sampled_steps  # noqa: E402
from openvla.data.lerobot_writer import _EPISODES, _INDICES, LeRobotWriter  # noqa: E402

LAYOUT = {
    "fps": 20,
    "numbers": {"action": list("abcdefg"), "observation.state": list("12345678")},
    "cameras": {"observation.image": (32, 48), "observation.wrist_image": (16, 16)},
    "texts": ("language_instruction",),
    "robot_type": "panda",
}
# Statistics of images are summed level by level, numpy's pixel by pixel.
ROUNDING = 1e-12
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
    name, shown = next(iter(frames.items()))
    height, width = shown[1].shape[:2]
    encoded = [png(shown[0]), png(np.ascontiguousarray(shown[1][:, :2])), png(shown[2])]
    with pytest.raises(ValueError, match=rf"{name} must have .* {height} x {width} .*, got {height} x 2 at step 1"):
        writer.add_episode("go", numbers, {**images, name: encoded}, texts)
    assert len(open_dataset(folder)) == 3


def read_json(file):
    return json.loads(file.read_text())


def test_statistics_are_numpys_over_all_frames_and_pixels(folder):
    LeRobotWriter(folder, **LAYOUT).write_statistics()
    written = read_json(folder / "meta/stats.json")
    assert list(written) == [*LAYOUT["numbers"], "timestamp", *_INDICES, *LAYOUT["cameras"]]
    numbers, frames = zip(*(episode(seed, 3 + seed) for seed in range(3)))
    columns = {name: np.concatenate([columns[name] for columns in numbers]) for name in LAYOUT["numbers"]}
    columns["index"] = np.arange(12)[:, None]
    for name, values in columns.items():
        values = values.astype(np.float32).astype(np.float64)
        expected = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
        expected |= {key: np.quantile(values, q, axis=0) for key, q in QUANTILES.items()}
        assert written[name] == {**{key: value.tolist() for key, value in expected.items()}, "count": [12]}
    for name in LAYOUT["cameras"]:
        pixels = np.concatenate([shown[name] for shown in frames]).reshape(-1, 3) / 255
        expected = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
        expected |= {key: np.quantile(pixels, q, axis=0) for key, q in QUANTILES.items()}
        assert written[name].pop("count") == [12]
        assert list(written[name]) == list(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(written[name][key], value[:, None, None], rtol=ROUNDING)
    assert open_dataset(folder)[2].actions.shape == (5, 7)


def test_a_new_episode_removes_the_statistics(folder):
    writer = LeRobotWriter(folder, **LAYOUT)
    writer.write_statistics()
    columns = pyarrow.parquet.read_schema(folder / _EPISODES).names
    assert {"stats/action/q01", "stats/observation.image/std", "stats/task_index/count"} <= set(columns)
    add(LeRobotWriter(folder, **LAYOUT), 0)
    assert not (folder / "meta/stats.json").exists()
    columns = pyarrow.parquet.read_schema(folder / _EPISODES).names
    assert not [name for name in columns if name.startswith("stats/")]
    with pytest.raises(ValueError, match="has no episode; add one"):
        LeRobotWriter(folder / "new", **LAYOUT).write_statistics()


def test_long_episodes_and_large_images_are_sampled_as_lerobot_does():
    lengths = {1: 1, 99: 99, 500: 105, 1000: 177, 20_000: 1681, 10**6: 10_000}
    assert {length: len(sampled_steps(length)) for length in lengths} == lengths
    assert sampled_steps(401)[:3] == [0, 4, 8]
    assert sampled_steps(401)[-1] == 400
    image = np.random.default_rng(0).integers(0, 256, (240, 640, 3), np.uint8)
    np.testing.assert_array_equal(
        level_counts(png(image)), [np.bincount(image[::4, ::4, c].ravel(), minlength=256) for c in range(3)]
    )
    assert level_counts(png(image[:, :299])).sum() == 3 * 240 * 299
