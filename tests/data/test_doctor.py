"""Checks find wrong numbers and suggest a fix; correct numbers have no finding."""

import numpy as np
import pytest
from encoded_images import png
from openvla.data.columns import ColumnSpec
from openvla.data.doctor import CheckInput, check_shifted_frames, run_checks
from openvla.data.open import open_dataset
from openvla.data.statistics import describe, statistics_and_findings
from synthetic_arm import EPISODES, STEPS, arm, arm_reader, changed, check_input, findings_of, with_gripper


@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_correct_data_has_no_certain_finding(noise, lag):
    actions, states = arm(noise, lag)
    checks = findings_of(actions, states)
    # A state that follows exactly, but later, may as well be a column that is shifted: doubtful, and only then.
    assert set(checks) == ({"shifted-actions"} if lag and not noise else set())
    assert not any(finding.certain for finding in checks.values())
    assert findings_of(actions) == {}


@pytest.mark.parametrize(
    ("convert", "certain", "fix"),
    [
        (lambda g: 1 - 2 * g, True, "clipped_inverted if -1 opens"),  # robosuite
        (lambda g: 2 * g - 1, True, "gripper: clipped if -1 closes"),  # CALVIN
        (lambda g: 850 * g, True, r"gripper_range: [closed, open], the two numbers of this gripper ([0, 850]"),  # xArm
        (lambda g: 255 * (1 - g), True, "or [255, 0] if the larger one is closed"),  # Robotiq
        (lambda g: 100 * g, True, "[0, 100]"),
        (lambda g: 2 * g, True, "[0, 2]"),
        (
            lambda g: np.where(np.diff(g, prepend=1) < 0, 1.0, np.where(np.diff(g, prepend=1) > 0, -1.0, 0.0)),
            True,
            "relative",
        ),
        (lambda g: np.where(np.arange(len(g)) == 3, -1.0, g), False, "gripper: clipped."),
        (lambda g: np.where(np.arange(len(g)) == 3, 2.0, g), False, "gripper: clipped."),  # a few frames of 2.0
        (lambda g: 0.6 * np.sin(np.arange(len(g))), False, "clipped_inverted"),
    ],
)
def test_gripper_of_another_convention_is_found(convert, certain, fix):
    actions, states = arm()
    if fix == "relative":  # opens again
        actions, states = [np.tile(e, (3, 1)) for e in actions], ()
    finding = findings_of(with_gripper(actions, convert), states)["gripper-range"]
    assert finding.certain is certain
    assert fix in finding.fix
    assert "gripper from" in finding.evidence


def test_gripper_outliers_are_located(recwarn):
    actions, _ = arm()
    actions[2][5, -1] = actions[4][6:8, -1] = 2.0
    finding = findings_of(actions)["gripper-range"]
    assert "to 2 (q01 0, q99 1), outside 0 to 1 in 3 steps, in 2 of 8 episodes (the first: 2, 4)" in finding.evidence


def test_inverted_gripper_outside_range_suggests_clipped_inverted():
    actions, _ = arm()
    finding = findings_of(with_gripper(actions, lambda g: 2 * g), gripper="inverted")["gripper-range"]
    assert finding.certain
    assert "clipped_inverted instead of inverted" in finding.fix


@pytest.mark.parametrize(
    ("convert", "check", "certain"),
    [
        (lambda g: 0.08 * g, "gripper-scale", True),
        (lambda g: 0.4 * g, "gripper-scale", False),
        (lambda g: 0.6 + 0.4 * g, "gripper-scale", False),
        (lambda g: 0 * g, "constant-gripper", False),
        (lambda g: 0 * g + 1, "constant-gripper", False),
    ],
)
def test_gripper_on_one_side_of_one_half_is_found(convert, check, certain):
    checks = findings_of(with_gripper(arm()[0], convert))
    assert list(checks) == [check]
    assert checks[check].certain is certain


def test_normalised_gripper_is_only_doubtful():
    actions = with_gripper(arm()[0], lambda g: 850 * g)
    assert findings_of(actions)["gripper-range"].certain
    assert not findings_of(actions, action_mask=[True] * 7)["gripper-range"].certain
    assert not findings_of(with_gripper(actions, lambda g: g / 10_000), action_mask=[True] * 7)["gripper-scale"].certain


def test_robot_without_gripper_has_no_constant_gripper_finding():
    actions = with_gripper(arm()[0], lambda g: 0 * g)
    statistics = {**describe(np.concatenate(actions)), "mask": [True] * 6 + [False]}
    fields = ColumnSpec(("image",), ("move", None))
    assert run_checks(CheckInput("mine", statistics, fields, (), actions)) == []


def differences(states, turn=2 * np.pi):
    """Return plain differences of the poses as movements."""
    return [np.diff(state[:, :6], axis=0) * ([1, 1, 1] + [turn / 2 / np.pi] * 3) for state in states]


@pytest.mark.parametrize(("turn", "unit"), [(2 * np.pi, "rad"), (360.0, "degrees")])
def test_wrapped_angle_differences_are_found(turn, unit):
    actions, states = arm()
    moves = differences(states, turn)
    shut = [np.column_stack([move, action[:-1, -1]]) for move, action in zip(moves, actions)]
    share = np.mean(np.abs(np.concatenate(shut)[:, 3]) > 0.9 * turn)
    assert share > 0.01
    finding = findings_of(shut)["wrapped-rotation"]
    assert finding.certain
    assert f"droll jumps by a whole turn in {unit}" in finding.evidence
    assert "dyaw" not in finding.evidence
    assert "rotation: wrapped" in finding.fix


@pytest.mark.parametrize("noise", [0.001, 0.05])
def test_angles_near_half_a_turn_wrap_often(noise):
    random, actions = np.random.RandomState(0), arm()[0]
    for episode in actions:
        roll = np.pi + random.normal(0, noise, STEPS + 1)
        episode[:, 3] = np.diff((roll + np.pi) % (2 * np.pi) - np.pi)
    finding = findings_of(actions)["wrapped-rotation"]
    assert finding.certain
    assert "in 8 of 8 episodes" in finding.evidence


@pytest.mark.parametrize("name", ["mine", "bridge_orig"])
def test_few_wraps_are_doubtful_or_known_from_published_data(name):
    actions, _ = arm()
    actions[3][10, 5] = 6.27
    checks = findings_of(actions, name=name)
    if name == "mine":
        assert not checks["wrapped-rotation"].certain
        assert "dyaw jumps by a whole turn in rad (to 6.27) in 1 of 480 steps, in 1 of 8 episodes (the first: 3)" in (
            checks["wrapped-rotation"].evidence
        )
    else:
        assert checks == {}
    for episode in actions:
        episode[10, 5] = 6.27
    assert findings_of(actions, name=name)["wrapped-rotation"].certain  # q99 of yaw 6.27 under whatever name


@pytest.mark.parametrize(
    ("rotation", "scale"), [("wrapped", 1.0), ("wrapped_degrees", 180 / np.pi), ("degrees", 180 / np.pi)]
)
def test_field_rotation_fixes_wrapped_angles_and_degrees(rotation, scale):
    actions, states = arm()
    right = np.diff(states[0][:, :6], axis=0)
    right[:, 3:] = (right[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    stored = np.diff(states[0][:, :6], axis=0) if rotation.startswith("wrapped") else right.copy()
    stored[:, 3:] *= scale
    stored = np.column_stack([stored, actions[0][:-1, -1]])
    fields = ColumnSpec(("image",), ("action",), rotation=rotation)
    action, _ = fields.actions_and_proprio({"action": stored})
    assert np.allclose(action[:, :6], right, atol=1e-12)
    assert action[:, 6].tolist() == actions[0][:-1, -1].tolist()
    with pytest.raises(ValueError, match="needs an action of seven dimensions, got 6"):
        fields.actions_and_proprio({"action": stored[:, :6]})
    with pytest.raises(ValueError, match="Unknown rotation 'wrap'"):
        ColumnSpec(("image",), ("action",), rotation="wrap")


def test_small_rotations_stay_bitwise_equal():
    values = np.random.RandomState(0).uniform(-3, 3, (50, 7)).astype(np.float32)
    action, _ = ColumnSpec(("image",), ("action",), rotation="wrapped").actions_and_proprio({"action": values})
    assert np.array_equal(action, values.astype(np.float64))


@pytest.mark.parametrize(
    ("ends", "stored", "right"),
    [
        ((0, 850), [0, 850, 425], [0, 1, 0.5]),
        ((0.0, 0.08), [0.08, 0.0, 0.04], [1, 0, 0.5]),
        ((1, -1), [-1, 1, 0], [1, 0, 0.5]),
        ([255, 0], [255, 0, 510], [0, 1, -1]),
    ],
)
def test_field_gripper_range_maps_to_zero_and_one(ends, stored, right):
    column = np.array(stored, float)[:, None]
    action, _ = ColumnSpec(("image",), ("action",), gripper_range=ends).actions_and_proprio({"action": column})
    assert action[:, 0].tolist() == right
    action, _ = ColumnSpec(("image",), ("action",), gripper_range=ends, gripper="clipped").actions_and_proprio(
        {"action": column}
    )
    assert action[:, 0].tolist() == np.clip(right, 0, 1).tolist()


@pytest.mark.parametrize("ends", [(1, 1), (0,), (0, 1, 2), ("0", "1"), (0, float("nan")), 850, True])
def test_invalid_gripper_range_is_refused(ends):
    with pytest.raises(ValueError, match="gripper_range must be two different numbers"):
        ColumnSpec(("image",), ("action",), gripper_range=ends)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("unit", [1, 1000])
def test_absolute_poses_are_found(ahead, unit):
    actions, states = arm(noise=0.001)
    poses = [np.column_stack([np.roll(s[:, :6], -ahead, axis=0), a[:, 6]]) for a, s in zip(actions, states)]
    poses = changed(poses, lambda episode: episode.__setitem__((slice(None), slice(0, 3)), unit * episode[:, :3]))
    finding = findings_of(poses, states)["absolute-pose"]
    assert finding.certain
    assert "dx with proprio[0]" in finding.evidence
    assert "relabel: state" in finding.fix
    alone = findings_of(poses)["absolute-pose"]  # without a state: a roll of half a turn is no movement
    assert alone.certain
    assert "dx from" in alone.evidence
    assert "droll from -3.1" in alone.evidence
    level = changed(poses, lambda episode: episode.__setitem__((slice(None), slice(3, 6)), 0.1 * episode[:, 3:6]))
    assert not findings_of(level)["absolute-pose"].certain  # without either it can only be supposed


def test_suggested_fields_fix_absolute_poses():
    actions, states = arm(noise=0.001)
    poses = [np.column_stack([s[:, :6], a[:, 6]]) for a, s in zip(actions, states)]
    _, findings = statistics_and_findings(arm_reader(poses, states), progress=False)
    assert {one.check for one in findings if one.certain} == {"absolute-pose"}
    _, findings = statistics_and_findings(arm_reader(poses, states, relabel="state"), progress=False)
    assert {one.check for one in findings if one.certain} == {"wrapped-rotation"}
    mended = arm_reader(poses, states, relabel="state", rotation="wrapped")
    assert statistics_and_findings(mended, progress=False)[1] == []
    assert np.allclose(mended[0].actions[:, :6], actions[0][:-1, :6], atol=0.005)


def test_degrees_are_found():
    actions, states = arm()
    degrees = changed(actions, lambda e: e.__setitem__((slice(None), slice(3, 6)), np.degrees(e[:, 3:6])))
    finding = findings_of(degrees, states)["degrees"]
    assert not finding.certain
    assert "dyaw from -5" in finding.evidence
    assert "rotation: degrees" in finding.fix


@pytest.mark.parametrize("share", [0.8, 0.95])
@pytest.mark.parametrize("dimensions", [7, 14])
def test_idle_steps_are_found(share, dimensions):
    actions, _ = arm()
    if dimensions == 14:  # positions: what stands still keeps its value
        actions = [np.column_stack([np.cumsum(e, axis=0), np.cumsum(e, axis=0)]) for e in actions]
    idle = int(share * STEPS)

    def stand_still(episode):
        episode[:idle] = 0 if dimensions == 7 else episode[idle]

    checks = findings_of(changed(actions, stand_still))
    if share < 0.9:
        assert "idle-steps" not in checks
        return
    compared = STEPS - (dimensions == 14)  # a position stands still against the one before it
    assert f"{idle * EPISODES} of {compared * EPISODES} steps" in checks["idle-steps"].evidence
    assert f"skip_first: {idle}" in checks["idle-steps"].fix
    assert not checks["idle-steps"].certain


def test_motionless_arm_is_idle_and_constant_movement_is_not():
    actions, _ = arm()
    still = findings_of(changed(actions, lambda episode: episode.__setitem__((slice(None), slice(0, 6)), 0)))
    assert list(still) == ["idle-steps"]
    assert "472 of 480 steps (98%)" in still["idle-steps"].evidence  # the others are the gripper's
    steady = changed(actions, lambda episode: episode.__setitem__((slice(None), slice(0, 6)), 0.01))
    assert "idle-steps" not in findings_of(steady)


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_actions_before_their_frame_are_certain(noise):
    actions, states = arm(noise)
    late = [np.roll(episode, 1, axis=0) for episode in actions]
    finding = findings_of([e[1:] for e in late], [s[1:] for s in states])["shifted-actions"]
    assert "1 step before it" in finding.evidence
    assert finding.certain
    assert "relabel: state" in finding.fix


def test_actions_after_their_frame_are_doubtful():
    actions, states = arm()
    finding = findings_of([e[1:] for e in actions], [s[:-1] for s in states])["shifted-actions"]
    assert not finding.certain
    assert "1 step after it" in finding.evidence
    noisy, states = arm(noise=0.005, lag=1)
    assert findings_of(noisy, states) == {}  # and as a robot that follows roughly it is not seen


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_frames_reveal_a_shift_without_state(shift):
    random = np.random.RandomState(0)
    actions, _ = arm()
    for episode in actions:
        episode[:, :6] *= random.choice([0.1, 1.0], (STEPS, 1))
    data = check_input(actions)
    scale = (data.max - data.min)[:6]
    sizes = [np.linalg.norm(episode[:, :6] / scale, axis=1) for episode in actions]
    changes = [np.roll(values, shift) + random.uniform(0, 0.05, STEPS) for values in sizes]
    for values in changes:
        values[-1] = np.nan
    finding = check_shifted_frames(data, changes)
    if shift < 0:
        assert (finding.check, finding.certain) == ("shifted-actions", False)
        assert "the change of the frames 1 step before it" in finding.evidence
    else:
        assert finding is None  # later is what robots do


def bimanual(kind):
    """Return actions and states of 14 joints of two arms; actions are the leader's joint positions."""
    random, actions, states = np.random.RandomState(1), [], []
    for _ in range(EPISODES):
        time = np.arange(STEPS)[:, None]
        joints = random.uniform(-2, 2, 14) + random.uniform(0.1, 1, 14) * np.sin(
            2 * np.pi * time / random.uniform(20, 60, 14) + random.uniform(0, 6, 14)
        )
        state = np.vstack([joints[:1], joints[:-1]]) + random.normal(0, 0.002, joints.shape)
        actions.append({"joints": joints, "deltas": joints - state, "velocities": np.gradient(joints, axis=0)}[kind])
        states.append(state)
    return actions, states


@pytest.mark.parametrize("kind", ["joints", "deltas", "velocities"])
@pytest.mark.parametrize("with_state", [True, False])
def test_bimanual_joints_have_no_finding(kind, with_state):
    actions, states = bimanual(kind)
    assert findings_of(actions, states if with_state else ()) == {}
    assert findings_of([e[:, :8] for e in actions], [e[:, :8] for e in states] if with_state else ()) == {}


@pytest.mark.parametrize("names", [("action.joint_position",), ("action", "joint_1", "joint_2"), ("qpos",)])
def test_seven_named_joints_are_not_an_end_effector(names):
    actions, states = bimanual("joints")
    actions, states = [e[:, :7] + 3 for e in actions], [e[:, :7] + 3 for e in states]
    assert {"absolute-pose", "gripper-range"} <= set(findings_of(actions, states))
    assert findings_of(actions, states, names=names) == {}


def test_lerobot_joint_names_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("pyarrow")
    from openvla.data.lerobot_writer import LeRobotWriter

    joints = [f"joint_{index}" for index in range(7)]
    writer = LeRobotWriter(tmp_path / "arm", fps=10, numbers={"action": joints}, cameras={"observation.image": (8, 8)})
    for episode in bimanual("joints")[0][:2]:
        writer.add_episode(
            "go",
            {"action": episode[:, :7].astype(np.float32) + 3},
            {"observation.image": [png(np.zeros((8, 8, 3), np.uint8))] * STEPS},
        )
    with pytest.warns(UserWarning, match="not treated as a gripper but normalised like a movement"):
        _, findings = statistics_and_findings(open_dataset(tmp_path / "arm"), progress=False)
    assert findings == []
