"""Readers return what the formats' libraries return, and bad data raises (tests/make_data.py wrote the data)."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from make_data import LENGTHS, TASKS, TOP_FRAMES, images, numbers, preset_columns

pytest.importorskip("av")
pytest.importorskip("google_crc32c")
h5py = pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

from openvla.data.columns import ColumnSpec  # noqa: E402
from openvla.data.episodes import DatasetError  # noqa: E402
from openvla.data.open import open_dataset  # noqa: E402
from openvla.data.presets import PRESETS  # noqa: E402
from openvla.data.tfrecord import masked_crc32c  # noqa: E402
from openvla.data.torch_dataset import TorchDatasetReader  # noqa: E402
from reference import FIXTURES  # noqa: E402

LEROBOT = ("lerobot_v21", "lerobot_v3")
RLDS = ("bridge_orig", "fractal20220817_data")
# tfds decodes JPEG with libjpeg's fast inverse transform, Pillow with the accurate one (equal to TensorFlow's accurate
# one in every bit): levels of 255 between them, as a mean over pixels. Measured 1.3 to 1.5 on these synthetic frames.
FAST_JPEG_LOSS = 2.0
# AV1 at LeRobot's quality against the source: what the codec loses of this picture, as a mean over pixels.
VIDEO_LOSS = 4.0
RAW = {"gripper": "as_is", "skip_first": 0, "relabel": None}


@pytest.fixture
def copy(tmp_path):
    """Return a function that copies a dataset, to damage it."""

    def copied(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copied


def expected_presets():
    names = {key.rpartition(".")[0] for key in np.load(FIXTURES / "presets.npz")}
    return sorted(names - {"chunks"})


@pytest.mark.parametrize("name", expected_presets())
def test_presets_equal_reference(name):
    """Actions and proprio are bitwise equal to the reference's float32."""
    reference, fields = np.load(FIXTURES / "presets.npz"), PRESETS[name]
    action, proprio = fields.actions_and_proprio(preset_columns(name, fields.numeric_columns()))
    np.testing.assert_array_equal(action, reference[f"{name}.action"].astype(np.float64))
    if fields.proprio:
        np.testing.assert_array_equal(proprio, reference[f"{name}.proprio"].astype(np.float64))
    assert len(fields.action_mask) == action.shape[1]


@pytest.mark.parametrize("name", RLDS)
def test_rlds_reader_equals_tfds(name):
    tfds = np.load(FIXTURES / f"{name}.npz")
    numeric = [key[2:] for key in tfds if key.startswith("0.") and tfds[key].ndim == 2 and tfds[key].dtype.kind == "f"]
    cameras = tuple(key[2:] for key in tfds if key.startswith("0.") and tfds[key].ndim == 4)
    scalars = [key[2:] for key in tfds if key.startswith("0.") and tfds[key].ndim == 1 and tfds[key].dtype.kind in "fb"]
    config = {**RAW, "cameras": cameras, "action": numeric, "proprio": scalars, "action_mask": None}
    reader = open_dataset(FIXTURES / name, fields=config)
    assert len(reader) == 3
    for number, episode in enumerate(reader):
        stored = {key[2:]: tfds[key] for key in tfds if key.startswith(f"{number}.")}
        np.testing.assert_array_equal(episode.actions, np.concatenate([stored[key] for key in numeric], axis=1))
        np.testing.assert_array_equal(episode.proprio, np.stack([stored[key] for key in scalars], axis=1))
        instructions = next(stored[key] for key in stored if key.endswith("language_instruction"))
        assert list(episode.instructions) == instructions.tolist()
        for step in range(len(episode)):
            for camera, image in zip(cameras, episode.images(step)):
                np.testing.assert_array_equal(image, stored[camera][step])
        assert np.abs(episode.images(0)[0] - tfds[f"fast.{number}"].astype(int)).mean() < FAST_JPEG_LOSS


def test_droid_equals_tfds_and_the_reference():
    tfds = np.load(FIXTURES / "droid.npz")
    reader = open_dataset(FIXTURES / "droid")  # TFDS calls the published files droid_101
    assert (reader.name, reader.preset, reader.preset_reason) == ("droid_101", "droid", "by its columns")
    assert reader.fields.cameras == ("observation.exterior_image_1_left", "observation.wrist_image_left")
    texts = [f"language_instruction{suffix}" for suffix in ("", "_2", "_3")]
    labels = []
    for number in range(3):
        stored = {key[2:]: tfds[key] for key in tfds if key.startswith(f"{number}.")}
        given = {text.item() for text in (stored[name][0] for name in texts) if text}
        labels.append(len(given))
        if not given:
            with pytest.raises(DatasetError, match="instruction at step 0 is empty"):
                reader[number]
            continue
        episode = reader[number]
        velocity, gripper = stored["action_dict.cartesian_velocity"], stored["action_dict.gripper_position"]
        np.testing.assert_array_equal(episode.actions, np.concatenate([velocity, 1 - gripper], axis=1))
        np.testing.assert_array_equal(episode.actions.astype(np.float32), stored["reference.action"])
        np.testing.assert_array_equal(episode.proprio.astype(np.float32), stored["reference.proprio"])
        assert episode.instructions[0] in TASKS  # the first that is not empty
        for step, index in ((0, 0), (len(episode) - 1, 1)):
            for camera, image in zip(reader.fields.cameras, episode.images(step), strict=True):
                np.testing.assert_array_equal(image, stored[camera][index])
    assert sorted(labels) == [0, 1, 3]


def test_every_column_of_droid_is_read_as_tfds_reads_it():
    tfds = np.load(FIXTURES / "droid.npz")
    received = {}

    def standardize(columns):
        received.update(columns)
        return columns["action"], None

    fields = {"standardize": standardize, "instruction_text": "go", "action_mask": None, "gripper": "as_is"}
    reader = open_dataset(FIXTURES / "droid", fields=fields)
    for number in range(3):
        received.clear()
        assert len(reader[number]) == len(received["action"])
        assert len(received) == 15
        for name, values in received.items():
            np.testing.assert_array_equal(values, tfds[f"{number}.{name}"])


def test_rlds_integers_of_all_sizes_and_shapes():
    tfds = np.load(FIXTURES / "fractal20220817_data.npz")
    received = {}

    def standardize(columns):
        received.update(columns)
        return columns["observation.height"][:, None], None

    reader = open_dataset(FIXTURES / "fractal20220817_data", fields={"standardize": standardize, **RAW})
    reader[1]
    np.testing.assert_array_equal(received["observation.counts"], tfds["1.observation.counts"])
    np.testing.assert_array_equal(received["is_first"], tfds["1.is_first"])


def test_rlds_splits():
    lengths = {s: [len(e) for e in open_dataset(FIXTURES / "bridge_orig", split=s)] for s in ("train", "val", "all")}
    assert (len(lengths["train"]), len(lengths["val"]), len(lengths["all"])) == (3, 2, 5)
    assert sorted(lengths["train"]) == sorted(length - 2 for length in LENGTHS)  # Bridge: without first and last
    with pytest.raises(ValueError, match=r"no split 'test'.*\['train', 'val'\]"):
        open_dataset(FIXTURES / "bridge_orig", split="test")


def test_bridge_aligns_images_with_actions():
    raw = open_dataset(FIXTURES / "bridge_orig", fields=RAW)[0]
    episode = open_dataset(FIXTURES / "bridge_orig")[0]
    assert len(episode) == len(raw) - 2
    np.testing.assert_array_equal(episode.images(0)[0], raw.images(1)[0])
    state = raw.proprio.astype(np.float32)
    np.testing.assert_array_equal(episode.actions[0, :6], state[2, :6] - state[1, :6])
    np.testing.assert_array_equal(episode.proprio[0], raw.proprio[1])


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the polynomial's usual check value
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
    ],
)
def test_masked_crc32c(data, crc):
    assert masked_crc32c(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("name", LEROBOT)
def test_lerobot_reader_equals_lerobot(name):
    library, reader = np.load(FIXTURES / f"{name}.npz"), open_dataset(FIXTURES / name)
    assert reader.fields.cameras == ("observation.images.top", "observation.images.wrist")
    assert [reader.length(index) for index in range(len(reader))] == list(LENGTHS)
    top = dict(zip(TOP_FRAMES, library["top"]))
    for number, episode in enumerate(reader):
        rows = np.flatnonzero(library["episode"] == number)
        np.testing.assert_array_equal(episode.actions, library["action"][rows])
        np.testing.assert_array_equal(episode.proprio, library["observation.state"][rows])
        assert set(episode.instructions) == {TASKS[number]}
        source = images(number, 0, (64, 96)).astype(int)
        for step in (*range(len(episode))[::-1], 2, 0, 3):  # backwards, and jumping
            video, wrist = episode.images(step)
            np.testing.assert_array_equal(wrist, np.moveaxis(library["wrist"][rows[step]], 0, -1))
            assert np.abs(video - source[step]).mean() < VIDEO_LOSS
            if rows[step] in top:
                np.testing.assert_array_equal(video, top[rows[step]])


def test_hdf5_reader_equals_h5py():
    raw = open_dataset(FIXTURES / "hdf5", preset=None)
    assert [episode.id.rpartition(":")[2] for episode in raw] == ["demo_0", "demo_0", "demo_2", "demo_10"]
    turned = open_dataset(FIXTURES / "hdf5")
    assert turned.fields == PRESETS["libero_hdf5"]
    assert [episode.instructions[0] for episode in turned] == [TASKS[1], *[TASKS[0]] * 3]
    with h5py.File(FIXTURES / "hdf5" / "pick_up_the_red_block_demo.hdf5") as file:
        stored = file["data/demo_2"]
        np.testing.assert_array_equal(raw[2].actions, stored["actions"])
        np.testing.assert_array_equal(turned[2].actions[:, :6], stored["actions"][:, :6])
        np.testing.assert_array_equal(turned[2].actions[:, 6], stored["actions"][:, 6] < 0)  # -1 opens
        states = np.concatenate([stored["obs/ee_states"], stored["obs/gripper_states"]], axis=1)
        np.testing.assert_array_equal(turned[2].proprio, states)
        np.testing.assert_array_equal(raw[2].images(3)[1], stored["obs/eye_in_hand_rgb"][3])
        np.testing.assert_array_equal(turned[2].images(3)[0], stored["obs/agentview_rgb"][3][::-1, ::-1])


def test_aloha_file(tmp_path):
    from PIL import Image

    file = tmp_path / "episode_0.hdf5"
    with h5py.File(file, "w") as h5:
        h5["action"], h5["observations/qpos"] = numbers(1, 14), numbers(1, 14, 1)
        for camera in PRESETS["aloha_hdf5"].cameras[1:]:
            h5[camera.replace(".", "/")] = images(1, 1)
        encoded = []
        for frame in images(1, 0):
            Image.fromarray(frame).save(tmp_path / "frame.png")
            encoded.append(np.frombuffer((tmp_path / "frame.png").read_bytes(), np.uint8))
        longest = max(map(len, encoded))
        padded = np.stack([np.pad(one, (0, longest - len(one))) for one in encoded])
        h5["observations/images/cam_high"] = padded
    reader = open_dataset(file, fields={"instruction_text": "fold the shirt"})
    np.testing.assert_array_equal(reader[0].images(2)[0], images(1, 0)[2])
    np.testing.assert_array_equal(reader[0].step(1).action, numbers(1, 14)[1])
    assert reader[0].step(1).instruction == "fold the shirt"


def torch_steps():
    import torch

    samples = []
    for episode in range(3):
        for step in range(LENGTHS[episode]):
            image = torch.from_numpy(images(episode, 0)[step]).permute(2, 0, 1)
            observation = {"image": image, "state": torch.from_numpy(numbers(episode, 8, 1)[step])}
            samples.append({"observation": observation, "action": numbers(episode, 7)[step], "task": TASKS[episode]})
            samples[-1]["episode_index"] = episode
    return samples


STEP_FIELDS = {
    "cameras": ["observation.image"],
    "action": "action",
    "proprio": "observation/state",
    "instruction": "task",
}


def test_sequences_of_steps_or_episodes():
    samples = torch_steps()
    bounds = np.cumsum((0, *LENGTHS))
    episodes = [samples[start:stop] for start, stop in zip(bounds, bounds[1:])]
    for data, options in ((samples, {}), (samples, {"episode_lengths": LENGTHS}), (episodes, {})):
        reader = TorchDatasetReader(data, "mine", STEP_FIELDS, **options)
        assert [len(episode) for episode in reader] == list(LENGTHS)
        step = reader[2].step(8)
        np.testing.assert_array_equal(step.images[0], images(2, 0)[8])
        np.testing.assert_array_equal(step.action, numbers(2, 7)[8])
        np.testing.assert_array_equal(step.proprio, numbers(2, 8, 1)[8])
        assert (step.instruction, step.dataset, step.episode_id, step.index) == (TASKS[2], "mine", "2", 8)
    with pytest.raises(ValueError, match="add up to 6, but there are 21"):
        TorchDatasetReader(samples, "mine", STEP_FIELDS, episode_lengths=[6])
    with pytest.raises(ValueError, match="are not consecutive"):
        TorchDatasetReader([*samples, samples[0]], "mine", STEP_FIELDS)


def counted(steps, **more):
    """Return the given steps of the first episode, each with its number."""
    samples = torch_steps()
    return [{**samples[step], "frame_index": step, "timestamp": step / 10, **more} for step in steps]


@pytest.mark.parametrize("frame", ["frame_index", "timestamp", "info/step"])
def test_steps_in_memory_are_sorted_by_their_counter(frame):
    """Numbers, relative gripper, texts and images of a shuffled torch dataset are sorted."""
    mixed = counted((5, 2, 0, 3, 1, 6, 4))
    for sample in mixed:
        step = sample.pop("frame_index")
        sample["task"] = f"do {step}"
        if frame == "info/step":
            sample["info"] = {"step": step}
            del sample["timestamp"]
        elif frame == "frame_index":
            sample["frame_index"] = np.array([step])
    in_order = [{**sample, "task": f"do {step}"} for step, sample in enumerate(torch_steps()[: LENGTHS[0]])]
    fields = {**STEP_FIELDS, "gripper": "relative"}
    option = {"frame": frame} if frame == "info/step" else {}
    right = TorchDatasetReader(in_order, "mine", fields)[0]
    for data in (mixed, [mixed]):
        read = TorchDatasetReader(data, "mine", fields, **option)[0]
        np.testing.assert_array_equal(read.actions, right.actions)
        np.testing.assert_array_equal(read.proprio, right.proprio)
        assert list(read.instructions) == [f"do {step}" for step in range(LENGTHS[0])]
        for step in range(LENGTHS[0]):
            np.testing.assert_array_equal(read.images(step)[0], images(0, 0)[step])


def test_missing_steps_in_memory_are_refused_unless_not_counted():
    for steps, message in (
        ((0, 1, 1, 2), "frame_index 1 is duplicated"),
        ((0, 1, 3, 4), "frames are missing before frame_index 3"),
    ):
        data = counted(steps)
        with pytest.raises(DatasetError, match=f"mine, episode 0: {message}.*frame=None"):
            TorchDatasetReader(data, "mine", STEP_FIELDS)[0]
        episode = TorchDatasetReader(data, "mine", STEP_FIELDS, frame=None)[0]
        np.testing.assert_array_equal(episode.actions, numbers(0, 7)[list(steps)])
    late = counted((3, 4, 5))
    np.testing.assert_array_equal(TorchDatasetReader(late, "mine", STEP_FIELDS)[0].actions, numbers(0, 7)[3:6])
    late[1]["timestamp"] = 0.0
    with pytest.raises(DatasetError, match="timestamp decreases at step 1, in the order of frame_index"):
        TorchDatasetReader(late, "mine", STEP_FIELDS)[0]
    del late[1]["frame_index"]
    with pytest.raises(DatasetError, match="frame_index must be in every step, but is in 2 of 3"):
        TorchDatasetReader(late, "mine", STEP_FIELDS)[0]


def test_steps_of_several_episodes_are_refused():
    samples = torch_steps()
    message = r"mine, episode 0: its steps belong to several episodes by .*'episode_index': \['0', '1'\]; give correct"
    with pytest.raises(DatasetError, match=message):
        TorchDatasetReader(samples, "mine", STEP_FIELDS, episode_lengths=[8, 4, 9])[0]
    with pytest.raises(DatasetError, match=message):
        TorchDatasetReader([samples[5:9]], "mine", STEP_FIELDS)[0]


@pytest.mark.parametrize("name", [*LEROBOT, *RLDS, "hdf5"])
def test_readers_can_be_pickled(name):
    reader = open_dataset(FIXTURES / name)
    before = reader[1].step(1)
    after = pickle.loads(pickle.dumps(reader))[1].step(1)
    np.testing.assert_array_equal(before.images[0], after.images[0])


@pytest.mark.parametrize("part", ["a[0:9]", "a[-8:]", "a[7:]", "a[3:3]", "a[5:2]"])
def test_dimensions_that_a_column_does_not_have_are_refused(part):
    columns = {"a": np.arange(14.0).reshape(2, 7)}
    fields = ColumnSpec(("image",), (part,))
    with pytest.raises(ValueError, match=r"'a\[.*\]' must take dimensions of 'a', which has 7"):
        fields.actions_and_proprio(columns)


@pytest.mark.parametrize(("part", "expected"), [("a[-2:]", [5, 6]), ("a[0:7]", [*range(7)]), ("a[:-5]", [0, 1])])
def test_dimensions_of_a_column_are_taken(part, expected):
    action, _ = ColumnSpec(("image",), (part,)).actions_and_proprio({"a": np.arange(7.0)[None]})
    assert action.tolist() == [expected]


def test_chunks_repeat_the_last_action():
    episode = open_dataset(FIXTURES / "lerobot_v3")[1]
    step = episode.step(3, chunk_length=4)
    np.testing.assert_array_equal(step.actions, episode.actions[[3, 4, 4, 4]])
    assert step.is_padding.tolist() == [False, False, True, True]
    with pytest.raises(IndexError, match="steps 0 to 4"):
        episode.step(5)


def test_errors_of_open_dataset(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="No dataset at"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(ValueError, match=r"not a dataset of a known format.*LeRobot.*RLDS.*HDF5.*notes\.txt"):
        open_dataset(tmp_path)
    with pytest.raises(KeyError, match=r"'observation\.image\.top'.*Did you mean 'observation\.images\.top'"):
        open_dataset(FIXTURES / "lerobot_v3", fields={"cameras": ["observation.image.top"]})
    with pytest.raises(KeyError, match=r"no numeric column .* \(it holds image data\)"):
        open_dataset(FIXTURES / "lerobot_v3", fields={"action": "observation.images.top"})
    with pytest.raises(ValueError, match="Unknown field 'camera'. Did you mean 'cameras'"):
        open_dataset(FIXTURES / "lerobot_v3", fields={"camera": "observation.images.top"})
    with pytest.raises(ValueError, match="Unknown preset 'bridge'. Did you mean 'bridge_o"):
        open_dataset(FIXTURES / "bridge_orig", preset="bridge")
    with pytest.raises(ValueError, match="Unknown gripper 'flip'"):
        ColumnSpec(("image",), ("action",), gripper="flip")
    empty = copy("lerobot_v21")
    (empty / "meta" / "episodes.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no episode"):
        open_dataset(empty)
    info = json.loads((empty / "meta" / "info.json").read_text())
    (empty / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"LeRobot v1\.6; supported versions"):
        open_dataset(empty)


def test_truncated_tfrecord_error_names_file_and_record(copy):
    folder = copy("bridge_orig")
    file = folder / "1.0.0" / "bridge_orig-train.tfrecord-00000-of-00002"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    reader = open_dataset(folder)
    assert len(reader[0])
    with pytest.raises(DatasetError, match=r"00000-of-00002, episode .*:1: it is truncated.*Copy|copy"):
        reader[1]
    (folder / "1.0.0" / "dataset_info.json").unlink()  # now nothing says how many there should be
    with pytest.raises(DatasetError, match="truncated"):
        open_dataset(folder)[1]
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(DatasetError, match="checksum"):
        open_dataset(folder)[0]
    file.unlink()
    with pytest.raises(ValueError, match="'train' lacks 1 of 2 shards"):
        open_dataset(folder)


def test_fewer_records_than_dataset_info(copy):
    folder = copy("bridge_orig")
    file = folder / "1.0.0" / "dataset_info.json"
    file.write_text(file.read_text().replace('"2"', '"3"', 1))
    reader = open_dataset(folder)
    with pytest.raises(DatasetError, match=r"has 2 records, but dataset_info\.json says 3"):
        list(reader)


def encoded(field, data):
    """Return one field of a protocol buffer that holds fewer than 16384 bytes."""
    size = len(data)
    return bytes([field << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + data


def test_rlds_episode_with_empty_columns_is_refused(copy):
    """Every column is in the record, but without values, as tfds writes an empty sequence."""
    folder = copy("bridge_orig")
    names = ["action", "observation/image_0", "observation/image_1", "observation/state", "language_instruction"]
    entries = [encoded(1, encoded(1, b"steps/" + name.encode()) + encoded(2, encoded(1, b""))) for name in names]
    record = encoded(1, b"".join(entries))
    size = struct.pack("<Q", len(record))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (size, record)]
    file = folder / "1.0.0" / "bridge_orig-train.tfrecord-00000-of-00002"
    file.write_bytes(size + checks[0] + record + checks[1])
    (folder / "1.0.0" / "dataset_info.json").unlink()
    reader = open_dataset(folder)
    assert len(reader[1])
    with pytest.raises(DatasetError, match=r"00000-of-00002:0: the episode has no steps; leave it out"):
        reader[0]


@pytest.mark.parametrize("name", LEROBOT)
def test_missing_or_corrupt_video_is_refused(copy, name):
    folder = copy(name)
    video = sorted(folder.rglob("*.mp4"))[0]
    whole = video.read_bytes()
    video.write_bytes(whole[:300])
    with pytest.raises(DatasetError, match=r"parquet, episode 0: no image at step 2: .*\.mp4|\.mp4 cannot be"):
        open_dataset(folder)[0].images(2)
    video.unlink()
    with pytest.raises(DatasetError, match=r"episode 0: its video .*\.mp4 is missing"):
        open_dataset(folder)[0]


def test_missing_video_frame_is_refused(copy):
    folder = copy("lerobot_v21")
    videos = sorted(folder.rglob("*.mp4"))
    shutil.copy(videos[1], videos[2])  # five frames where nine are promised
    episode = open_dataset(folder)[2]
    episode.images(4)
    with pytest.raises(DatasetError, match=r"no frame at 0\.5000 s: the video ends before"):
        episode.images(5)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("actions", np.full((7, 7), np.nan), r"demo_0: action\[0\] at step 0 is nan"),
        ("obs/ee_states", np.full((7, 6), np.inf), r"proprio\[0\] at step 0 is inf"),
        ("actions", np.zeros((7, 5)), r"demo_0: action has 5 dimensions, but 7 in the dataset's other episodes"),
        ("actions", np.zeros((0, 7)), "columns have different lengths"),
        ("obs/agentview_rgb", None, r"demo_0: the columns \['obs.agentview_rgb'\] are missing"),
    ],
)
def test_errors_name_the_bad_episode(copy, column, value, message):
    folder = copy("hdf5")
    with h5py.File(folder / "pick_up_the_red_block_demo.hdf5", "r+") as file:
        del file["data/demo_0"][column]
        if value is not None:
            file["data/demo_0"][column] = value
    reader = open_dataset(folder)
    assert len(reader[0])
    with pytest.raises(DatasetError, match=message):
        reader[1]


@pytest.mark.parametrize("name", LEROBOT)
def test_tasks_may_be_bytes(copy, name):
    """LeRobot v3 may store bytes; the JSON of v2.1 may hold their repr."""
    pyarrow, folder = pytest.importorskip("pyarrow"), copy(name)
    if name == "lerobot_v21":
        tasks = folder / "meta" / "tasks.jsonl"
        tasks.write_text(tasks.read_text().replace(TASKS[0], f"b'{TASKS[0]}'"))
        with pytest.raises(DatasetError, match="episode 0: the text .* is the repr of Python bytes"):
            open_dataset(folder)[0]
        return
    import pyarrow.parquet as parquet

    tasks = parquet.read_table(folder / "meta" / "tasks.parquet")
    texts = next(column for column in tasks.column_names if column != "task_index")
    changed = tasks.set_column(tasks.column_names.index(texts), texts, tasks[texts].cast(pyarrow.binary()))
    parquet.write_table(changed.replace_schema_metadata(None), folder / "meta" / "tasks.parquet")
    assert open_dataset(folder)[0].step(0).instruction == TASKS[0]


def test_empty_instruction_is_refused(copy):
    folder = copy("lerobot_v21")
    tasks = folder / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace(TASKS[1], " "))
    reader = open_dataset(folder)
    with pytest.raises(DatasetError, match="episode 1: the instruction at step 0 is empty.*skip_bad"):
        reader[1]
    assert open_dataset(folder, fields={"instruction_text": "go"})[1].step(0).instruction == "go"


def test_damaged_hdf5_file_is_refused(copy):
    folder = copy("hdf5")
    file = folder / "pick_up_the_red_block_demo.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    reader = open_dataset(folder)
    assert len(reader[0])
    with pytest.raises(DatasetError, match=r"pick_up_the_red_block_demo\.hdf5 cannot be opened"):
        reader[1]


def test_missing_packages_name_the_extra(monkeypatch):
    import openvla.data.utils as module

    def import_nothing(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", import_nothing)
    for name in ("lerobot_v3", "hdf5", "bridge_orig"):
        with pytest.raises(ImportError, match=r"openvla\[train\]"):
            open_dataset(FIXTURES / name)[0]
