"""Presets are selected by a dataset's content; one with only the name is read as stored, warned about or refused."""

import warnings

import numpy as np
import pytest
from encoded_images import jpeg
from rlds import episode_columns, write_rlds

pytest.importorskip("pyarrow")
from openvla.data.inspect import inspect  # noqa: E402
from openvla.data.lerobot_writer import LeRobotWriter  # noqa: E402
from openvla.data.open import open_dataset  # noqa: E402
from openvla.data.presets import HDF5_PRESETS, PRESETS, WITHOUT_PRESET  # noqa: E402
from openvla.dimension_labels import dimension_labels  # noqa: E402
from openvla.training.config import FinetuneConfig  # noqa: E402
from openvla.training.datasets import Demonstrations  # noqa: E402

CAMERA = "observation.images.image"
OPENING = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def lerobot(root, name, gripper, cameras=(CAMERA,), texts=()):
    """Write one episode of six steps; dx counts the steps."""
    numbers = {"action": list("abcdefg"), "observation.state": list("abcdefgh")}
    writer = LeRobotWriter(root / name, fps=10, numbers=numbers, cameras={c: (8, 8) for c in cameras}, texts=texts)
    action = np.zeros((6, 7), np.float32)
    action[:, 0], action[:, 6] = np.arange(6) / 10, gripper
    columns = {"action": action, "observation.state": np.zeros((6, 8), np.float32)}
    frames = {camera: [jpeg(20 * step) for step in range(6)] for camera in cameras}
    writer.add_episode("do it", columns, frames, {text: "say it" for text in texts})
    return root / name


@pytest.mark.parametrize(
    "given", [None, {"cameras": [CAMERA]}, {"instruction": "task", "proprio": "observation.state"}]
)
def test_converted_lerobot_dataset_with_an_rlds_name_uses_no_preset(tmp_path, given):
    folder = lerobot(tmp_path, "libero_10_no_noops", OPENING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = open_dataset(folder, fields=given)
    assert (reader.preset, reader.fields.gripper) == (None, "as_is")
    assert reader[0].actions[:, 6].tolist() == OPENING
    assert reader[0].instructions[0] == "do it"


@pytest.mark.parametrize("name", ["bridge_orig", "droid", "fractal20220817_data", "language_table"])
def test_lerobot_dataset_with_an_rlds_name_is_read_as_stored_with_a_warning(tmp_path, name):
    folder = lerobot(tmp_path, name, OPENING, ["observation.image_0"], ["language_instruction"])
    with pytest.warns(UserWarning, match=f"{name!r} is the name of an RLDS dataset.*read as it is stored"):
        reader = open_dataset(folder)
    assert len(reader[0]) == 6
    assert reader[0].actions[:, 6].tolist() == OPENING
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_dataset(folder, preset="none")[0].actions[:, 6].tolist() == OPENING


@pytest.mark.parametrize(
    ("cameras", "texts", "instruction"),
    [
        ((CAMERA,), (), "do it"),
        (("observation.image", "observation.wrist_image"), ("language_instruction",), "say it"),
    ],
)
def test_lerobot_gripper_below_zero_selects_the_libero_preset(tmp_path, cameras, texts, instruction):
    folder = lerobot(tmp_path, "libero_goal_no_noops", [-1, -1, -1, 1, 1, 1], cameras, texts)
    reader = open_dataset(folder)
    assert reader.preset == "libero_goal_no_noops"
    assert reader[0].actions[:, 6].tolist() == [1, 1, 1, 0, 0, 0]  # -1 is open
    assert (reader.fields.cameras, reader[0].instructions[0]) == (tuple(cameras), instruction)
    assert open_dataset(folder, preset="none")[0].actions[0, 6] == -1
    assert open_dataset(folder, fields={"gripper": "as_is"})[0].actions[0, 6] == -1


def test_joint_angles_do_not_select_a_preset(tmp_path):
    folder = tmp_path / "libero_goal_no_noops"
    writer = LeRobotWriter(folder, fps=10, numbers={"action": list("abcdefgh")}, cameras={CAMERA: (8, 8)})
    angles = np.full((3, 8), -0.5, np.float32)
    writer.add_episode("do it", {"action": angles}, {CAMERA: [jpeg(0)] * 3})
    with pytest.warns(UserWarning, match="read as it is stored"):
        np.testing.assert_array_equal(open_dataset(folder)[0].actions, angles)


def test_rlds_preset_error_for_a_lerobot_dataset_names_the_preset(tmp_path):
    folder = lerobot(tmp_path, "mine", OPENING)
    with pytest.raises(
        KeyError, match=r"no image column 'observation\.image'.*preset 'libero_10_no_noops' \(you named it\).*none"
    ):
        open_dataset(folder, preset="libero_10_no_noops")
    folder = lerobot(tmp_path, "other", OPENING, ["observation.image"], ["language_instruction"])
    with pytest.raises(ValueError, match=r"-1 open, \+1 closed, but the stored gripper stays between 0 and 1"):
        open_dataset(folder, preset="libero_10_no_noops", fields={"cameras": "observation.image"})


def test_droid_uses_end_effector_velocity_and_inverted_gripper(tmp_path):
    rng = np.random.default_rng(0)
    cartesian, gripper = rng.uniform(-1, 1, (4, 6)).astype(np.float32), np.linspace(0, 1, 4, dtype=np.float32)[:, None]
    position = rng.uniform(-1, 1, (4, 6)).astype(np.float32)
    columns = {
        "action": rng.uniform(-1, 1, (4, 7)).astype(np.float32),
        "action_dict/cartesian_velocity": cartesian,
        "action_dict/gripper_position": gripper,
        "observation/cartesian_position": position,
        "observation/gripper_position": gripper,
        "observation/exterior_image_1_left": [jpeg(10)] * 4,
        "observation/exterior_image_2_left": [jpeg(20)] * 4,
        "observation/wrist_image_left": [jpeg(30)] * 4,
        "language_instruction": ["", "  ", "take it", ""],
        "language_instruction_2": ["", "lift it", "raise it", ""],
        "language_instruction_3": ["grab it"] * 4,
    }
    for name, camera, shade in (("droid", "1", 10), ("droid_100", "1", 10), ("droid_wipe", "2", 20), ("mine", "1", 10)):
        reader = open_dataset(write_rlds(tmp_path, name, [columns]))
        episode = reader[0]
        np.testing.assert_array_equal(episode.actions, np.concatenate([cartesian, 1 - gripper], axis=1))
        np.testing.assert_array_equal(episode.proprio, np.concatenate([position, gripper], axis=1))
        assert reader.fields.cameras[0] == f"observation.exterior_image_{camera}_left"
        assert [int(image[0, 0, 0]) for image in episode.images(0)] == [shade, 30]
        assert list(episode.instructions) == ["grab it", "lift it", "take it", "grab it"]
    units = [unit for _, unit in dimension_labels(7, "droid")]
    assert units == ["controller units"] * 6 + ["0 closed to 1 open"]  # not metres: velocities from -1 to 1


@pytest.mark.parametrize("name", sorted(WITHOUT_PRESET)[::6])
def test_known_dataset_without_preset_needs_an_action(tmp_path, name):
    folder = write_rlds(tmp_path, name, [episode_columns()])
    with pytest.raises(ValueError, match=f"is {name!r}, whose stored action is not OpenVLA's.*preset: none"):
        open_dataset(folder)
    for options in ({"preset": "none"}, {"preset": None}, {"fields": {"action": "action", "gripper": "as_is"}}):
        assert open_dataset(folder, **options)[0].actions[:, 6].tolist() == OPENING


def test_every_dataset_name_of_the_reference_is_known():
    ours = {"bridge", "droid_100", *HDF5_PRESETS}
    assert not WITHOUT_PRESET & set(PRESETS)
    assert len((WITHOUT_PRESET | set(PRESETS)) - ours) == 78  # names of openvla-oft's transforms.py


def test_rlds_dataset_without_its_presets_columns_is_refused(tmp_path):
    folder = write_rlds(tmp_path, "fractal20220817_data", [episode_columns()])
    with pytest.raises(KeyError, match=r"preset 'fractal20220817_data' \(by the dataset's name\).*--preset none"):
        open_dataset(folder)
    assert open_dataset(folder, preset="None")[0].actions[:, 6].tolist() == OPENING
    folder = write_rlds(tmp_path, "cmu_stretch", [episode_columns()])  # whose action has eight dimensions
    with pytest.raises(ValueError, match=r"\['action\[:-1\]'\] have 6 dimensions, but the action has 7.*preset"):
        open_dataset(folder)


def test_converted_rlds_dataset_with_a_presets_name_is_refused(tmp_path):
    episode = episode_columns(**{"observation/wrist_image": [jpeg(0)] * 6})
    folder = write_rlds(tmp_path, "libero_10_no_noops", [episode])
    with pytest.raises(
        ValueError, match=r"'libero_10_no_noops' \(by the dataset's name\).*stays between 0 and 1.*none"
    ):
        open_dataset(folder)
    assert open_dataset(folder, preset="none")[0].actions[:, 6].tolist() == OPENING
    folder = write_rlds(tmp_path, "austin_sirius_dataset_converted_externally_to_rlds", [episode])
    with pytest.warns(UserWarning, match="the preset would invert it"):
        open_dataset(folder)
    raw = {**episode, "action": episode["action"] * np.float32([*[1] * 6, 2]) - np.float32([*[0] * 6, 1])}
    closed = {**raw, "action": raw["action"] * np.float32([*[1] * 6, 0]) + np.float32([*[0] * 6, 1])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an episode that is closed throughout tells nothing, the next one does
        reader = open_dataset(write_rlds(tmp_path, "libero_object_no_noops", [closed, raw]))
    assert reader[1].actions[:, 6].tolist() == [1, 1, 1, 0, 0, 0]
    assert reader[0].actions[:, 6].tolist() == [0] * 6


@pytest.mark.filterwarnings("ignore:.*constant over the whole dataset")
def test_preset_none_in_finetune_and_inspect_data(tmp_path, capsys):
    from openvla.__main__ import main

    folder = write_rlds(tmp_path, "language_table", [episode_columns()])
    run = {"model": "m", "output_dir": "o", "data": str(folder)}
    assert Demonstrations(FinetuneConfig(**run, preset="none")).readers[0].preset is None
    with pytest.raises(ValueError, match="no preset describes it"):
        Demonstrations(FinetuneConfig(**run))
    own = FinetuneConfig(**{**run, "data": [{"path": str(folder), "preset": "none"}]})
    assert Demonstrations(own).readers[0][0].actions[:, 6].tolist() == OPENING
    assert main(["inspect-data", str(folder), "--preset", "none"]) == 0
    assert "preset       none" in capsys.readouterr().out
    libero = lerobot(tmp_path, "libero_goal_no_noops", [-1, -1, -1, 1, 1, 1])
    assert inspect(open_dataset(libero), progress=False)["preset"] == "libero_goal_no_noops"


def test_libero_hdf5_layout_with_a_converted_gripper(tmp_path):
    h5py = pytest.importorskip("h5py")
    file = tmp_path / "pick_up_the_cup_demo.hdf5"
    with h5py.File(file, "w") as h5:
        group = h5.create_group("data/demo_0")
        h5["data"].attrs["bddl_file_name"] = "pick_up_the_cup.bddl"
        group["actions"] = episode_columns()["action"]
        group["obs/ee_states"], group["obs/gripper_states"] = np.zeros((6, 6)), np.zeros((6, 2))
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            group[f"obs/{camera}"] = np.zeros((6, 8, 8, 3), np.uint8)
    with pytest.warns(UserWarning, match=r"'libero_hdf5' \(by its columns\).*stays between 0 and 1"):
        open_dataset(file)  # relabelled, it may be: its frames alone are LIBERO's
    reader = open_dataset(file, fields={"gripper": "as_is"})
    assert (reader.preset, reader.fields.rotate_180) == ("libero_hdf5", True)
    assert reader[0].actions[:, 6].tolist() == OPENING
