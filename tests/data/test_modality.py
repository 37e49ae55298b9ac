"""Names of GR00T's modality.json in the fields of a LeRobot dataset."""

import json
import shutil

import numpy as np
import pytest
from make_data import TASKS, images, numbers
from openvla.data.open import open_dataset
from reference import FIXTURES

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")

# As in Isaac-GR00T's demo_data, with the columns of the fixture.
MODALITY = {
    "state": {"arm": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 8}},
    "action": {
        "arm": {"start": 0, "end": 6, "absolute": False, "rotation_type": None},
        "gripper": {"start": 6, "end": 7, "original_key": "action"},
    },
    "video": {"wrist_view": {"original_key": "observation.images.wrist"}},
    "annotation": {"human.action.task_description": {}, "human.validity": {}},
}
FIELDS = {
    "cameras": ["video.wrist_view"],
    "action": ["action.arm[3:]", "action.gripper"],
    "proprio": ["state.gripper", "state.arm[:3]"],
    "instruction": "annotation.human.action.task_description",
}


def write(folder, content):
    (folder / "meta" / "modality.json").write_text(json.dumps(content))


@pytest.fixture
def gr00t(tmp_path):
    """A LeRobot v2.0 dataset with modality.json, whose annotation names the other task than task_index."""
    folder = shutil.copytree(FIXTURES / "lerobot_v21", tmp_path / "gr00t")
    file = folder / "meta" / "info.json"
    info = json.loads(file.read_text())
    columns = [f"annotation.{key}" for key in MODALITY["annotation"]]
    info["features"] |= {column: {"dtype": "int64", "shape": [1], "names": None} for column in columns}
    file.write_text(json.dumps({**info, "codebase_version": "v2.0"}))
    for file in folder.rglob("*.parquet"):
        table = pq.read_table(file)
        other = pa.array(1 - table["task_index"].to_numpy())
        for column in columns:
            table = table.append_column(column, other)
        pq.write_table(table, file)
    write(folder, MODALITY)
    return folder


def test_names_of_modality_json_are_columns(gr00t):
    reader = open_dataset(gr00t, fields=FIELDS)
    episode = reader[1]
    action, state = numbers(1, 7), numbers(1, 8, 1)
    np.testing.assert_array_equal(episode.actions, action[:, [3, 4, 5, 6]])
    np.testing.assert_array_equal(episode.proprio, state[:, [6, 7, 0, 1, 2]])
    np.testing.assert_array_equal(episode.images(2)[0], images(1, 1)[2])
    assert set(episode.instructions) == {TASKS[0]} != {TASKS[1]}
    assert any("state.arm, state.gripper, action.arm" in note for note in reader.notes())


def test_defaults_do_not_depend_on_modality_json(gr00t):
    reader = open_dataset(gr00t)
    np.testing.assert_array_equal(reader[1].actions, numbers(1, 7))
    assert set(reader[1].instructions) == {TASKS[1]}
    assert reader.fields == open_dataset(FIXTURES / "lerobot_v21").fields


def test_misspelled_names_are_refused(gr00t):
    with pytest.raises(KeyError, match="has no 'state.arms'. Did you mean 'state.arm'?"):
        open_dataset(gr00t, fields={"proprio": ["state.arms"]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": {"arm": {"start": 0, "end": 9}}}, "within the 8 dimensions of 'observation.state', got 0 and 9"),
        ({"state": {"arm": {"start": 3}}}, "got 3 and None"),
        ({"video": {"front": {"original_key": "front"}}}, "in the column 'front', which does not exist"),
        ({"action": ["arm"]}, "action must map names to objects"),
        ([], "state must map names to objects"),
    ],
)
def test_damaged_modality_json_is_refused(gr00t, content, message):
    write(gr00t, content)
    with pytest.raises(ValueError, match=message):
        open_dataset(gr00t)
