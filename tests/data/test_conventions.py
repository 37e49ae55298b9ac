"""Checks of conventions find wrong dimensions and frames; correct ones have no finding."""

import json

import numpy as np
import pytest
from openvla.__main__ import main
from openvla.data.columns import ColumnSpec
from openvla.data.conventions import check_frozen_frames
from openvla.data.doctor import check_statistics, run_checks
from synthetic_arm import EPISODES, arm, changed, check_input, findings_of, with_gripper

XYZ = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def with_columns(states, *columns):
    """Return states with further columns, each a function of the episode's index."""
    return [np.column_stack([state, *(column(i) for column in columns)]) for i, state in enumerate(states)]


def joints(noise=0.002):
    """Return joint targets ``(60, 7)`` and positions that reach them one step later."""
    actions, _ = arm()
    random = np.random.RandomState(1)
    targets = [np.column_stack([np.cumsum(a[:, :6], axis=0), a[:, 6]]) for a in actions]
    reached = [np.vstack([t[:1], t[:-1]]) + random.normal(0, noise, t.shape) for t in targets]
    return targets, reached


def of_columns(actions, states, *proprio):
    data = check_input(actions, states)
    data = type(data)(data.name, data.statistics, ColumnSpec(("image",), ("action",), proprio), (), actions, states)
    return {finding.check for finding in run_checks(data)}


@pytest.mark.parametrize(
    "names",
    [
        ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "a", "b", "c", "gripper.pos"],
        [f"motor_{index}" for index in range(7)],
        ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"],
        ["joint_1"] * 7,
    ],
)
def test_joint_names_suppress_the_pose_check(names):
    targets, reached = joints()
    assert "absolute-pose" in findings_of(targets, reached)
    assert findings_of(targets, reached, names=["action", *names]) == {}


def test_joint_state_column_suppresses_the_pose_check():
    targets, reached = joints()
    assert of_columns(targets, reached, "observations.qpos") == set()
    assert of_columns(targets, reached, "obs.joint_states") == set()
    assert "absolute-pose" in of_columns(targets, reached, "observations.pose")


def test_velocities_and_last_action_in_the_state_are_not_positions():
    actions, states = arm(noise=0.001)
    speeds = with_columns(states, lambda i: np.diff(states[i][:, :6], axis=0, append=states[i][-1:, :6]))
    last = with_columns(states, lambda i: np.vstack([0 * actions[i][:1], actions[i][:-1]]))
    assert findings_of(actions, speeds) == {}
    assert findings_of(actions, last) == {}
    assert findings_of(actions, [np.column_stack([s[:, :3], s[:, 8:]]) for s in last]) == {}
    assert of_columns(actions, [s[:, 8:11] for s in speeds], "obs.robot0_eef_vel") == set()
    poses = [np.column_stack([s[:, :6], a[:, 6]]) for a, s in zip(actions, states)]
    assert findings_of(poses, speeds)["absolute-pose"].certain  # beside speeds, poses are still poses


@pytest.mark.parametrize("steps", [3, 4])
def test_shifts_of_several_steps_are_found(steps):
    actions, states = arm(noise=0.001)
    finding = findings_of([np.roll(a, steps, axis=0) for a in actions], states)["shifted-actions"]
    assert finding.certain
    assert f"{steps} steps before it" in finding.evidence
    assert findings_of(*arm(noise=0.001, lag=steps)) == findings_of(*arm(lag=steps)) == {}  # a robot that follows later


def test_absolute_rotations_are_found():
    actions, states = arm(noise=0.001)
    angles = [np.column_stack([a[:, :3], s[:, 3:6], a[:, 6]]) for a, s in zip(actions, states)]
    finding = findings_of(angles, states)["absolute-rotation"]
    assert finding.certain
    assert "droll with proprio[3]" in finding.evidence
    assert "dyaw with proprio[5]" in finding.evidence
    yaw = [np.column_stack([a[:, :5], s[:, 5], a[:, 6]]) for a, s in zip(actions, states)]
    assert not findings_of(yaw, states)["absolute-rotation"].certain


def unit(length, random):
    four = random.normal(0, 0.3, (length, 4)) + [0, 0.7, 0.1, 0.7]
    return four / np.linalg.norm(four, axis=1, keepdims=True)


def test_quaternions_and_their_sign_changes_are_found():
    actions, states = arm()
    random = np.random.RandomState(0)
    turns = [unit(len(a), random) for a in actions]
    seven = findings_of([np.column_stack([s[:, :3], q]) for s, q in zip(states, turns)])
    assert seven["quaternion"].certain
    assert "action[3:7] is a quaternion" in seven["quaternion"].evidence
    assert not any(name.startswith("gripper") for name in seven)  # a range for it would hide the quaternion
    eight = [np.column_stack([a[:, :3], q, a[:, 6]]) for a, q in zip(actions, turns)]
    assert findings_of(eight) == {}
    flipped = changed(eight, lambda e: e.__setitem__((slice(30, 40), slice(3, 7)), -e[30:40, 3:7]))
    finding = findings_of(flipped)["quaternion"]
    assert not finding.certain
    assert f"{2 * EPISODES} times" in finding.evidence


@pytest.mark.parametrize(
    ("names", "certain", "parts"),
    [
        (["gripper", *XYZ[:6]], True, "[action[1:7], action[0:1]]"),
        (["gripper", "x", "y", "z", "rx", "ry", "rz"], True, "[action[1:], action[:1]]"),
        (["x", "y", "z", "yaw", "pitch", "roll", "gripper"], False, "action[5:6], action[4:5], action[3:4]"),
        ([f"eef_delta_{name}" for name in ["y", "x", *XYZ[2:]]], False, "[action[1:2], action[0:1], action[2:7]]"),
    ],
)
def test_other_dimension_order_is_found(names, certain, parts):
    actions, states = arm()
    finding = findings_of(actions, states, names=["action", *names])["dimension-order"]
    assert finding.certain is certain
    assert parts in finding.fix


@pytest.mark.parametrize(
    "names", [XYZ, [f"delta_{n}" for n in XYZ], ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "grip"]]
)
def test_usual_dimension_order_has_no_finding(names):
    actions, states = arm()
    assert findings_of(actions, states, names=["action", *names]) == {}


def test_inverted_gripper_is_found_by_its_fingers():
    actions, states = arm()
    finding = findings_of(with_gripper(actions, lambda g: 1 - g), states)["gripper-direction"]
    assert not finding.certain
    assert "proprio[7]" in finding.evidence
    assert "gripper: inverted" in finding.fix
    slow = with_columns([s[:, :6] for s in states], lambda i: np.convolve(actions[i][:, 6], np.ones(4) / 4)[:60] * 0.08)
    assert "gripper-direction" not in findings_of(actions, slow)
    assert "gripper-direction" in findings_of(with_gripper(actions, lambda g: 1 - g), slow)
    # Robotiq's angle and DROID's position are high when closed, and no metres.
    assert findings_of(actions, with_columns([s[:, :6] for s in states], lambda i: 0.8 * (1 - actions[i][:, 6]))) == {}


def test_millimetres_outliers_and_rare_movements_are_found():
    actions, states = arm()
    thousands = changed(actions, lambda e: e.__setitem__((slice(None), slice(0, 3)), 1000 * e[:, :3]))
    assert list(findings_of(thousands, states)) == ["millimetres"]
    broken = changed(actions, lambda e: None)
    broken[2][5, 1] = -9999.0
    finding = findings_of(broken)["outliers"]
    assert "dy has values up to 9999" in finding.evidence
    rare = changed(actions, lambda e: e.__setitem__((slice(None), 4), 0.0))
    rare[0][7:9, 4] = 0.3
    finding = findings_of(rare)["rare-movement"]
    assert "dpitch is 0 from q01 to q99, but goes from 0 to 0.3" in finding.evidence
    for data, check in ((thousands, "millimetres"), (broken, "outliers"), (rare, "rare-movement")):
        (one,) = check_statistics({"mine": {"action": check_input(data).statistics}})["mine"]
        assert (one.check, one.certain) == (check, False)


def test_frozen_camera_is_found():
    actions, _ = arm()
    data = check_input(actions)
    count = sum(len(a) - 1 for a in actions)
    (finding,) = check_frozen_frames(data, {"top": [False] * count, "wrist": [True] * count})
    assert finding.check == "frozen-frames"
    assert finding.evidence.startswith("wrist has the same frame again after 100% of")
    assert check_frozen_frames(data, {"top": [step % 2 == 0 for step in range(count)]}) == []  # 30 Hz read at 60
    paused = [np.vstack([a, np.tile([0, 0, 0, 0, 0, 0, a[-1, 6]], (300, 1))]) for a in actions]
    same = [step >= 59 for a in paused for step in range(len(a) - 1)]
    assert check_frozen_frames(check_input(paused), {"top": same}) == []  # a simulator's pause


def test_inspect_data_reports_a_frozen_camera(tmp_path, capsys, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    actions, _ = arm()
    random = np.random.RandomState(0)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index, action in enumerate(actions[:3]):
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"], frames = action, random.randint(0, 256, (60, 16, 16, 3), np.uint8)
            episode["obs/top"], episode["obs/wrist"] = frames, np.repeat(frames[:1], 60, axis=0)
    assert main(["inspect-data", str(tmp_path), "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["check"], finding["severity"]) == ("frozen-frames", "doubtful")
    assert finding["evidence"].startswith("obs.wrist has the same frame")
