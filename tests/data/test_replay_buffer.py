"""zarr replay buffers against golden data that zarr itself read (tests/make_data.py zarr)."""

import shutil

import numpy as np
import pytest
from make_data import LENGTHS, TOP_FRAMES, images
from openvla.data.open import open_dataset
from openvla.data.statistics import compute_statistics
from openvla.data.stream import StepStream
from reference import FIXTURES, REPOSITORY

zarr = pytest.importorskip("zarr")

TASK = {"instruction_text": "push the block"}
UMI_FIELDS = {
    **TASK,
    "cameras": ["camera0_rgb"],
    "action": ["robot0_eef_pos", "robot0_eef_rot_axis_angle", "robot0_gripper_width"],
}


@pytest.fixture
def buffer(tmp_path):
    return shutil.copytree(FIXTURES / "replay_buffer.zarr", tmp_path / "replay_buffer.zarr")


def test_diffusion_policys_buffer_equals_zarr():
    golden = np.load(FIXTURES / "replay_buffer.npz")
    reader = open_dataset(FIXTURES / "replay_buffer.zarr", fields={**TASK, "proprio": ["state"]})
    assert (reader.name, reader.format, len(reader)) == ("replay_buffer", "zarr", 3)
    assert [len(episode) for episode in reader] == list(LENGTHS)
    np.testing.assert_array_equal(np.concatenate([episode.actions for episode in reader]), golden["action"])
    np.testing.assert_array_equal(np.concatenate([episode.proprio for episode in reader]), golden["state"])
    frames = [episode.images(step)[0] for episode in reader for step in range(len(episode))]
    np.testing.assert_array_equal(np.stack(frames)[list(TOP_FRAMES)], golden["img"])
    assert {step for episode in reader for step in episode.instructions} == {TASK["instruction_text"]}


def test_umis_zip_equals_zarr():
    pytest.importorskip("imagecodecs")
    golden = np.load(FIXTURES / "umi.npz")
    with pytest.raises(ValueError, match=r"set the fields cameras and action. Images: \['camera0_rgb'\]; numbers: "):
        open_dataset(FIXTURES / "umi.zarr.zip")
    reader = open_dataset(FIXTURES / "umi.zarr.zip", fields=UMI_FIELDS)
    actions = np.concatenate([golden[name] for name in UMI_FIELDS["action"]], axis=1)
    np.testing.assert_array_equal(np.concatenate([episode.actions for episode in reader]), actions)
    frames = [episode.images(step)[0] for episode in reader for step in range(len(episode))]
    np.testing.assert_array_equal(np.stack(frames)[list(TOP_FRAMES)], golden["camera0_rgb"])


def test_the_only_buffer_of_a_folder_is_found(buffer):
    assert len(open_dataset(buffer.parent, fields=TASK)) == 3
    shutil.copytree(buffer, buffer.with_name("second.zarr"))
    with pytest.raises(ValueError, match=r"several replay buffers: \['replay_buffer.zarr', 'second.zarr'\]"):
        open_dataset(buffer.parent, fields=TASK)


@pytest.mark.filterwarnings("ignore:.*gripper-range", "ignore:.*skipped 2 of 3")
@pytest.mark.parametrize("change", ["missing", "truncated"])
@pytest.mark.parametrize("array", ["action", "img"])
def test_damaged_chunks_are_named_and_skipped(buffer, tmp_path, change, array):
    chunk = next((buffer / "data" / array).glob("1.0*"))  # steps 8 to 15: in episodes 1 and 2
    chunk.unlink() if change == "missing" else chunk.write_bytes(chunk.read_bytes()[:20])
    reader = open_dataset(buffer, fields=TASK)
    message = f"episode 1: data/{array}/1.0.* {'is not stored' if change == 'missing' else 'has 20 bytes, but its'}"
    with pytest.raises(ValueError, match=message):
        reader[1].step(4)
    stream = StepStream(reader, shuffle_buffer=0, repeat=False, skip_bad=True)
    with pytest.warns(UserWarning, match="Skipped"):
        samples = list(stream)
    assert (stream.skipped, len(samples)) == (2, LENGTHS[0])
    assert compute_statistics(reader, skip_bad=True, progress=False, cache_dir=tmp_path)["num_skipped"] == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta/episode_ends", lambda values: values[::-1], "must hold numbers of steps that increase"),
        ("data/action", lambda values: values[:18], "action has 18 steps, but the episode ends at step 21"),
        ("data/img", lambda values: values + 0.5, "grey levels that are not whole numbers"),
    ],
)
def test_unusable_content_is_refused(buffer, name, change, message):
    group = zarr.open_group(str(buffer), mode="a")
    values = change(group[name][:])
    del group[name]
    array = group.create_array if hasattr(group, "create_array") else group.create_dataset
    array(name, data=np.ascontiguousarray(values))
    with pytest.raises(ValueError, match=message):
        [episode.step(0) for episode in open_dataset(buffer, fields=TASK)]


def test_format_3_is_read(tmp_path):
    if not hasattr(zarr, "create_array"):
        pytest.skip("zarr 2 writes format 2 only")
    golden = np.load(FIXTURES / "replay_buffer.npz")
    for name in ("replay_buffer.zarr", "zeros.zarr"):
        group = zarr.open_group(str(tmp_path / name), mode="w", zarr_format=3)
        group.create_array("meta/episode_ends", data=np.cumsum(LENGTHS))
        actions = np.zeros_like(golden["action"]) if name == "zeros.zarr" else golden["action"]
        group.create_array("data/action", data=actions, chunks=(8, 7))
        frames = np.concatenate([images(episode, 0) for episode in range(3)])
        group.create_array("data/img", data=frames, chunks=(4, *frames.shape[1:]), shards=(8, *frames.shape[1:]))
    reader = open_dataset(tmp_path / "replay_buffer.zarr", fields=TASK)
    np.testing.assert_array_equal(np.concatenate([episode.actions for episode in reader]), golden["action"])
    np.testing.assert_array_equal(reader[2].images(8)[0], frames[-1])
    message = (
        r"data/action/c/0/0 is not stored, one of 3 missing chunks of 3 \(c/0/0, c/1/0, c/2/0\), and zarr would read"
    )
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "zeros.zarr", fields=TASK)[0]


def test_chunks_of_zeros_are_stored_as_the_page_says(tmp_path, monkeypatch):
    if not hasattr(zarr, "create_array"):
        pytest.skip("zarr 2 stores chunks of zeros")
    lengths = (7, 12, 37)
    random = np.random.default_rng(0)
    action, frames = random.uniform(-1, 1, (56, 7)), random.integers(0, 256, (56, 16, 16, 3), np.uint8)
    action[8:16] = 0
    frames[10:] = 0
    group = zarr.open_group(str(tmp_path / "replay_buffer.zarr"), mode="w", zarr_format=3)
    group.create_array("meta/episode_ends", data=np.cumsum(lengths))
    group.create_array("data/action", data=action, chunks=(8, 7))
    group.create_array("data/img", data=frames, chunks=(2, 16, 16, 3), shards=(4, 16, 16, 3))
    reader = open_dataset(tmp_path / "replay_buffer.zarr", fields=TASK)
    with pytest.raises(ValueError, match=r"action/c/1/0 is not stored, one of 1 missing chunks of 7 \(c/1/0\)"):
        reader[1]
    with pytest.raises(ValueError, match=r"one of 11 missing chunks of 14 \(c/3/0/0/0, .*, c/7/0/0/0, \.\.\.\)"):
        reader[2]
    page = (REPOSITORY / "docs/data.md").read_text().partition("### Missing chunks")[2]
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0])  # noqa: S102
    reader = open_dataset(tmp_path / "replay_buffer.zarr", fields=TASK)
    np.testing.assert_array_equal(np.concatenate([episode.actions for episode in reader]), action)
    shown = [episode.images(step)[0] for episode in reader for step in range(len(episode))]
    np.testing.assert_array_equal(shown, frames)
