"""Statistics equal numpy's over all steps, and openvla inspect-data shows them."""

import json

import numpy as np
import pytest
from memory_dataset import FIELDS, memory_reader
from openvla.__main__ import main
from openvla.actions_openvla import validate_norm_stats
from openvla.data.episodes import DatasetError
from openvla.data.open import open_dataset
from openvla.data.statistics import as_norm_stats, compute_statistics, require_matching
from openvla.data.torch_dataset import TorchDatasetReader
from reference import FIXTURES

for package in ("av", "google_crc32c", "h5py", "pyarrow", "yaml"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def test_statistics_equal_numpy():
    data = open_dataset(FIXTURES / "lerobot_v3")
    library = np.load(FIXTURES / "lerobot_v3.npz")
    statistics = compute_statistics(data, progress=False)
    for what, column in (("action", "action"), ("proprio", "observation.state")):
        values = library[column].astype(np.float64)
        assert statistics[what]["mean"] == values.mean(axis=0).tolist()
        assert statistics[what]["std"] == values.std(axis=0).tolist()
        assert statistics[what]["min"] == values.min(axis=0).tolist()
        assert statistics[what]["max"] == values.max(axis=0).tolist()
        assert statistics[what]["q01"] == np.quantile(values, 0.01, axis=0).tolist()
        assert statistics[what]["q99"] == np.quantile(values, 0.99, axis=0).tolist()
    assert statistics["action"]["mask"] == [True] * 6 + [False]
    assert (statistics["num_transitions"], statistics["num_trajectories"], statistics["num_skipped"]) == (21, 3, 0)
    validate_norm_stats({"mine": statistics})


def test_statistics_can_be_added_to_a_model(tiny):
    tiny.model.add_norm_stats("lerobot_v3", as_norm_stats([open_dataset(FIXTURES / "lerobot_v3")])["lerobot_v3"])
    assert tiny.model.get_action_dim("lerobot_v3") == 7
    stats = {k: v for k, v in tiny.model.norm_stats.items() if k != "lerobot_v3"}
    tiny.model.norm_stats = stats


def test_cache_depends_on_files_and_fields(cache, tmp_path):
    import shutil

    folder = shutil.copytree(FIXTURES / "bridge_orig", tmp_path / "bridge_orig")
    with pytest.warns(UserWarning, match=r"constant over the whole dataset: action\[6\] \(gripper\) = 0"):
        first = compute_statistics(open_dataset(folder), progress=False)
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    content["statistics"]["num_transitions"] = -1  # shows whether the next result comes from the cache
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="constant"):
        again = compute_statistics(open_dataset(folder), progress=False)
    assert again == {**first, "num_transitions": -1}
    raw = {"gripper": "as_is"}
    assert compute_statistics(open_dataset(folder, fields=raw), progress=False)["num_transitions"] == 15
    shard = next(folder.rglob("*train.tfrecord-00000*"))
    shard.touch()
    for damage in ("", "{"):
        with pytest.warns(UserWarning, match="constant"):
            assert compute_statistics(open_dataset(folder), progress=False) == first
        for kept in cache.iterdir():
            kept.write_text(damage or kept.read_text()[:-20])


def test_bad_episodes_raise_or_are_skipped(cache):
    with pytest.raises(DatasetError, match="episode 5"):
        compute_statistics(memory_reader(nan=5), progress=False)
    with pytest.warns(UserWarning, match=r"mine: skipped 1 of 8 episodes. The first: mine, episode 5"):
        statistics = compute_statistics(memory_reader(nan=5), skip_bad=True, progress=False)
    assert (statistics["num_trajectories"], statistics["num_skipped"]) == (7, 1)
    assert not cache.exists()  # a sequence has no digest
    with (
        pytest.raises(ValueError, match="none of its 1 episodes can be used. The first: mine, episode 0"),
    ):
        compute_statistics(memory_reader(lengths=(3,), nan=0), skip_bad=True, progress=False)


def test_cached_skip_still_warns_or_raises(tmp_path):
    import shutil

    folder = shutil.copytree(FIXTURES / "lerobot_v21", tmp_path / "lerobot_v21")
    tasks = folder / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("open the drawer", ""))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="skipped 1 of 3"):
            compute_statistics(open_dataset(folder), skip_bad=True, progress=False)
    with pytest.raises(DatasetError, match="instruction at step 0 is empty"):
        compute_statistics(open_dataset(folder), progress=False)


def masked(values, mask):
    rows = [{"image": np.zeros((4, 4, 3), np.uint8), "action": row, "task": "go"} for row in values]
    return TorchDatasetReader(rows, "mine", {**FIELDS, "action_mask": mask}, episode_lengths=[len(rows)])


def test_cache_restores_dropped_noops(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number, moves in enumerate(((0.5, 0, 0.25, 0), (0, 0, 0))):
            group = file.create_group(f"data/demo_{number}")
            group.attrs["instruction"] = f"task {number}"
            group["actions"] = np.array([[move, *[0.1 * move] * 5, 1] for move in moves])
            group["image"] = np.zeros((len(moves), 8, 8, 3), np.uint8)
    found = []
    for _ in range(2):
        reader = open_dataset(tmp_path / "a.hdf5", fields={"drop_noops": True})
        with pytest.warns(UserWarning, match=r"drop_noops leaves no episode of the tasks \['task 1'\]"):
            compute_statistics(reader, skip_bad=True, cache_dir=tmp_path / "cache", progress=False)
        found.append((reader.num_noop_steps, reader.length(0), reader.usable_lengths()))
    assert found == [(2, 2, {"0": [2, 2]})] * 2


def test_action_mask():
    values = np.random.RandomState(0).uniform(-1, 1, (20, 7))
    assert compute_statistics(masked(values, None), progress=False)["action"]["mask"] == [True] * 6 + [False]
    values[:, 6] *= 255
    assert compute_statistics(masked(values, None), progress=False)["action"]["mask"] == [True] * 7
    with pytest.raises(ValueError, match=r"action\[6\] is not normalised .* goes from -2"):
        compute_statistics(masked(values, [True] * 6 + [False]), progress=False)
    with pytest.raises(ValueError, match="action_mask has 3 entries, but the action has 7"):
        compute_statistics(masked(values, [True] * 3), progress=False)
    with pytest.raises(ValueError, match="action has 7 dimensions, but 6 in the statistics"):
        require_matching({"action": {"q01": [0] * 6}}, masked(values, None))


@pytest.mark.parametrize("name", ["lerobot_v3", "fractal20220817_data", "hdf5"])
def test_inspect_data(name, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out" / "data.png"
    assert main(["inspect-data", str(FIXTURES / name), "--out", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "pick up the red block" in table
    assert "gripper" in table
    assert picture.stat().st_size > 20_000
    assert main(["inspect-data", str(FIXTURES / name), "--json", "--check-images"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == sum(len(episode) for episode in open_dataset(FIXTURES / name))
    assert report["damaged_images"] == []
    assert len(report["statistics"]["action"]["q01"]) == report["action_dim"] == 7


def test_inspect_data_with_fields(capsys):
    fields = "{cameras: [observation.images.wrist], proprio: 'observation.state[:3]', gripper: inverted}"
    assert main(["inspect-data", str(FIXTURES / "lerobot_v3"), "--json", "--fields", fields]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["cameras"], report["proprio_dim"]) == ({"observation.images.wrist": [32, 48]}, 3)
    assert main(["inspect-data", str(FIXTURES / "lerobot_v3"), "--fields", "gripper"]) == 2
    assert main(["inspect-data", str(FIXTURES / "lerobot_v3"), "--fields", "{gripper: [}"]) == 2
    assert main(["inspect-data", str(FIXTURES / "no")]) == 2
    assert "FileNotFoundError: No dataset at" in capsys.readouterr().err


def test_overflowing_statistics_are_refused():
    steps = [{"image": np.zeros((4, 4, 3), np.uint8), "action": [1e308] * 7, "task": "go"} for _ in range(4)]
    fields = {"cameras": ["image"], "action": "action", "instruction": "task"}
    with pytest.raises(ValueError, match="the statistics of its action: .*finite"):
        compute_statistics(TorchDatasetReader(steps, "mine", fields, episode_lengths=[4]), progress=False)


def test_episode_column_must_be_text_or_whole_number():
    steps = [{"image": np.zeros((4, 4, 3), np.uint8), "action": [0.1] * 7, "task": "go"} for _ in range(4)]
    fields = {"cameras": ["image"], "action": "action", "instruction": "task"}
    named = [{**step, "episode_index": name} for step, name in zip(steps, ("a", "a", "b", "b"))]
    assert [len(episode) for episode in TorchDatasetReader(named, "mine", fields)] == [2, 2]
    for wrong in (0.5, [0, 1], None):
        with pytest.raises(ValueError, match="episode_index must be a whole number or a text"):
            TorchDatasetReader([{**steps[0], "episode_index": wrong}], "mine", fields)
    with pytest.raises(ValueError, match="episode_lengths must be whole numbers of steps, 1 or more, got -2"):
        TorchDatasetReader(steps, "mine", fields, episode_lengths=[5, -2, 1])
