"""``openvla convert-data``: what is read equals what is read back; LeRobot itself opens it; it arrives on the Hub."""

import itertools
import shutil

import numpy as np
import pytest
from encoded_images import shown_level, write_video
from memory_dataset import memory_reader
from openvla.__main__ import main
from openvla.data.convert import camera_names, convert_dataset
from openvla.data.episodes import DatasetError
from openvla.data.lerobot_statistics import QUANTILES
from openvla.data.open import open_dataset
from openvla.data.video import TIME_TOLERANCE, Video
from PIL import Image
from reference import FIXTURES

for package in ("av", "google_crc32c", "h5py", "pyarrow"):
    pytest.importorskip(package)
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

# LeRobot's variance is the mean of squares less the squared mean: the root of float64's rounding may remain.
LEROBOT_ROUNDING = 1e-7
SOURCES = {
    "lerobot_v21": {},
    "lerobot_v3": {},
    "lerobot_v3_files": {},
    "bridge_orig": {"fps": 5},
    "fractal20220817_data": {"fps": 3},
    "hdf5": {"fps": 20},
    "replay_buffer.zarr": {"fps": 10, "fields": {"instruction_text": "push"}},
}


def source(name):
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    return open_dataset(FIXTURES / name, fields=SOURCES[name].get("fields"))


def assert_equal(episode, read_back):
    np.testing.assert_array_equal(read_back.actions, episode.actions)
    assert (read_back.proprio is None) == (episode.proprio is None)
    if episode.proprio is not None:
        np.testing.assert_array_equal(read_back.proprio, episode.proprio)
    assert list(read_back.instructions) == [text.strip() for text in episode.instructions]
    for step in range(len(episode)):
        for frame, frame_back in zip(episode.images(step), read_back.images(step), strict=True):
            np.testing.assert_array_equal(frame_back, frame)


def test_an_episode_with_frames_of_another_size_is_an_error_or_left_out(tmp_path):
    reader = memory_reader(lengths=(3, 2, 4))
    reader.data[4]["image"] = np.zeros((5, 6, 3), np.uint8)
    message = r"mine, episode 1: the frames of step 1 are \[\(5, 6\)\] high and wide, those before \[\(4, 6\)\]"
    with pytest.raises(DatasetError, match=message):
        convert_dataset(reader, tmp_path / "new", fps=5, progress=False)
    assert not any(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=f"skipped 1 of 3 episodes. The first: {message}"):
        counts = convert_dataset(reader, tmp_path / "new", fps=5, skip_bad=True, progress=False)
    assert counts == {"episodes": 2, "steps": 7, "skipped": 1}


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_is_read_back_equal(tmp_path, name):
    reader = source(name)
    counts = convert_dataset(reader, tmp_path / "new", fps=SOURCES[name].get("fps"), progress=False)
    assert counts == {"episodes": len(reader), "steps": sum(map(len, reader)), "skipped": 0}
    written = open_dataset(tmp_path / "new")
    assert written.frame_rate == (SOURCES[name].get("fps") or reader.frame_rate)
    assert list(written.fields.cameras) == camera_names(reader)
    for episode, read_back in zip(reader, written, strict=True):
        assert_equal(episode, read_back)


@pytest.mark.parametrize("name", ["lerobot_v3", "bridge_orig", "hdf5"])
def test_lerobot_opens_what_is_written(tmp_path, name):
    library = pytest.importorskip(
        "lerobot.datasets.lerobot_dataset", reason="needs lerobot (ci/integration_lerobot_data.sh)"
    )
    reader = source(name)
    convert_dataset(reader, tmp_path / "new", fps=SOURCES[name].get("fps"), progress=False)
    dataset = library.LeRobotDataset("test/new", root=tmp_path / "new")
    index = 0
    for episode in reader:
        for step in range(len(episode)):
            row = dataset[index]
            np.testing.assert_array_equal(row["action"], episode.actions[step].astype(row["action"].numpy().dtype))
            assert row["task"] == episode.instructions[step].strip()
            for camera, frame in zip(camera_names(reader), episode.images(step)):
                shown = (row[camera].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
                np.testing.assert_array_equal(shown, frame)
            index += 1
    assert index == dataset.num_frames


@pytest.fixture
def lerobot_folder(tmp_path):
    """The folder of a dataset of three episodes with two cameras that convert-data wrote."""
    pytest.importorskip("lerobot.datasets", reason="needs lerobot (ci/integration_lerobot_data.sh)")
    convert_dataset(source("lerobot_v3"), tmp_path / "new", progress=False)
    return tmp_path / "new"


def test_statistics_are_those_that_lerobot_computes(lerobot_folder, tmp_path, monkeypatch):
    from lerobot.datasets import LeRobotDatasetMetadata, compute_stats

    sample_images = compute_stats.sample_images  # in float32, its sums over pixels differ by 3e-5
    monkeypatch.setattr(compute_stats, "sample_images", lambda files: sample_images(files).astype(np.float64))
    meta = LeRobotDatasetMetadata("test/new", root=lerobot_folder)
    reader, episodes = open_dataset(lerobot_folder), []
    for episode in reader:
        data = {"action": episode.actions, "observation.state": episode.proprio}
        for number, camera in enumerate(reader.fields.cameras):
            data[camera] = [str(tmp_path / f"{camera}-{episode.id}-{step}.png") for step in range(len(episode))]
            for step, file in enumerate(data[camera]):
                Image.fromarray(episode.images(step)[number]).save(file)
        episodes.append(compute_stats.compute_episode_stats(data, meta.features))
    assert set(meta.stats) == {name for name, feature in meta.features.items() if feature["dtype"] != "string"}
    for name, expected in compute_stats.aggregate_stats(episodes).items():
        assert set(meta.stats[name]) == set(expected)
        for key, value in expected.items():
            assert meta.stats[name][key].shape == value.shape
            if not key.startswith("q"):
                np.testing.assert_allclose(meta.stats[name][key], value, rtol=LEROBOT_ROUNDING, atol=LEROBOT_ROUNDING)
    row = pyarrow.parquet.read_table(lerobot_folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[-1]
    last = episodes[-1]  # LeRobot's quantiles are those of histograms: near with as many values as an image has
    for camera, key in itertools.product(reader.fields.cameras, QUANTILES):
        np.testing.assert_allclose(row[f"stats/{camera}/{key}"], last[camera][key], atol=1 / 255)


def test_lerobot_trains_on_what_is_written_and_edits_it(lerobot_folder, tmp_path):
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.dataset_tools import delete_episodes
    from lerobot.datasets.factory import make_dataset
    from lerobot.policies.act.configuration_act import ACTConfig

    config = TrainPipelineConfig(DatasetConfig("test/new", root=str(lerobot_folder)), policy=ACTConfig(device="cpu"))
    assert config.dataset.use_imagenet_stats
    dataset = make_dataset(config)  # as lerobot-train does
    assert {camera: dataset.meta.stats[camera]["mean"].shape for camera in dataset.meta.camera_keys} == dict.fromkeys(
        open_dataset(lerobot_folder).fields.cameras, (3, 1, 1)
    )
    shorter = delete_episodes(LeRobotDataset("test/new", root=lerobot_folder), [0], tmp_path / "less", "test/less")
    actions = np.concatenate([open_dataset(lerobot_folder)[index].actions for index in (1, 2)])
    np.testing.assert_array_equal(shorter.meta.stats["action"]["max"], actions.max(0))
    assert shorter.meta.stats["action"]["count"] == [len(actions)]


def test_lerobot_refuses_a_camera_without_frames_at_the_steps_times_too(tmp_path):
    video_utils = pytest.importorskip(
        "lerobot.datasets.video_utils", reason="needs lerobot (ci/integration_lerobot_data.sh)"
    )
    write_video(tmp_path / "15.mp4", range(0, 250, 5), 15)
    tolerance = {"tolerance_s": TIME_TOLERANCE, "backend": "pyav", "return_uint8": True}
    (frame,) = video_utils.decode_video_frames(tmp_path / "15.mp4", [0.2], **tolerance)
    assert shown_level(frame, 5) == 15  # the fourth frame, as ours
    assert shown_level(Video(tmp_path / "15.mp4").frame(0.2), 5) == 15
    with pytest.raises(video_utils.FrameTimestampError, match="violate the tolerance"):
        video_utils.decode_video_frames(tmp_path / "15.mp4", [0.1], **tolerance)
    with pytest.raises(ValueError, match="no frame at 0.1000 s"):
        Video(tmp_path / "15.mp4").frame(0.1)


def test_instructions_may_differ_from_step_to_step(tmp_path):
    reader = memory_reader()
    for index, row in enumerate(reader.data):
        row["task"] = f"task {index % 3}"
    convert_dataset(reader, tmp_path / "new", fps=10, progress=False)
    for episode, read_back in zip(reader, open_dataset(tmp_path / "new"), strict=True):
        assert_equal(episode, read_back)


def test_numbers_beyond_float32_stay_exact(tmp_path):
    reader = memory_reader()
    reader.data[5]["action"] = np.full(7, 0.1)
    convert_dataset(reader, tmp_path / "new", fps=10, progress=False)
    assert open_dataset(tmp_path / "new")[0].actions[5, 0] == 0.1


def test_bad_episodes_raise_or_are_counted(tmp_path):
    reader = memory_reader(bad_image=(2, 3), nan=5)
    with pytest.raises(ValueError, match="mine, episode 2: no image at step 3"):
        convert_dataset(reader, tmp_path / "new", fps=10, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="mine: skipped 2 of 8 episodes"):
        counts = convert_dataset(reader, tmp_path / "new", fps=10, skip_bad=True, progress=False)
    assert (counts["episodes"], counts["skipped"], len(open_dataset(tmp_path / "new"))) == (6, 2, 6)


def test_a_rate_that_is_not_known_or_contradicts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stores no steps per second"):
        convert_dataset(memory_reader(), tmp_path / "new")
    with pytest.raises(ValueError, match=r"that of the dataset \(10.0\), got 30"):
        convert_dataset(source("lerobot_v3"), tmp_path / "new", fps=30)
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="exists; give a new folder"):
        convert_dataset(memory_reader(), tmp_path / "new", fps=10)


def test_a_dataset_is_pushed_with_card_and_tag(here, tmp_path, capsys):
    arguments = ["convert-data", str(FIXTURES / "hdf5"), str(tmp_path / "new"), "--fps", "20"]
    assert main([*arguments, "--push", "me/demos", "--private"]) == 0
    assert "4 episodes, 28 steps, 0 skipped" in capsys.readouterr().out
    files = here.files("me/demos")
    assert here.files("me/demos", "v3.0") == files
    assert "me/demos" in here.private
    local = {file.relative_to(tmp_path / "new").as_posix() for file in (tmp_path / "new").rglob("*") if file.is_file()}
    assert local <= set(files)
    card = files["README.md"].decode()
    assert card.startswith("---\ntask_categories: [robotics]\ntags: [LeRobot, openvla]\nconfigs:")
    assert "4 episodes, 28 steps at 20 per second" in card
    shutil.rmtree(tmp_path / "new")
    assert main([*arguments, "--private"]) == 2
    assert "--private and --token are for --push" in capsys.readouterr().err
