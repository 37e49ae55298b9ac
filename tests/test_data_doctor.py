"""Numbers that cannot be right are found, by name, with what mends them; what is right is left alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from openvla.__main__ import main
from openvla.actions_openvla import NormalizationStatistics
from openvla.data_doctor import CHECKS, Finding, Recording, examine, examine_statistics, refuse, shifted_frames
from openvla.dataset_statistics import compute_statistics, describe, statistics_and_findings
from openvla.demonstration_fields import Fields
from openvla.demonstrations import open_demonstrations
from openvla.finetune_config import FinetuneConfig
from openvla.sequence_reader import SequenceReader

DATA = Path(__file__).parent / "data"
EPISODES, STEPS = 8, 60


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))


def arm(noise=0.0, lag=0):
    """Right demonstrations: float64 actions ``(60, 7)`` and states ``(60, 8)`` of 8 episodes.

    A smooth movement (m, rad) to and fro, a gripper that closes once, and a state that follows ``lag`` steps later.
    """
    random, episodes = np.random.RandomState(0), []
    for _ in range(EPISODES):
        time = np.arange(STEPS)
        phases, periods = random.uniform(0, 2 * np.pi, 6), random.uniform(8, 25, 6)
        move = np.sin(2 * np.pi * time[:, None] / periods + phases) * [0.02, 0.02, 0.02, 0.05, 0.05, 0.1]
        move *= random.uniform(0.3, 1, (STEPS, 1))
        gripper = (time < random.randint(20, 40)).astype(float)
        moved = np.roll(move, lag, axis=0) + random.normal(0, noise, move.shape)
        moved[:lag] = 0
        pose = np.array([0.4, 0.0, 0.2, np.pi - 0.02, 0.0, 0.0]) + np.cumsum(moved, axis=0) - moved
        pose[:, 3:] = (pose[:, 3:] + np.pi) % (2 * np.pi) - np.pi
        fingers = np.stack([0.04 * gripper, -0.04 * gripper], axis=1)
        episodes.append((np.column_stack([move, gripper]), np.column_stack([pose, fingers])))
    return [list(side) for side in zip(*episodes)]


def recorded(actions, states=(), name="mine", names=(), **fields):
    fields = Fields(("image",), ("action",), ("state",) if len(states) else (), **fields)
    statistics = {**describe(np.concatenate(actions)), "mask": [True] * (actions[0].shape[1] - 1) + [False]}
    return Recording(name, statistics, fields, names, actions, states)


def found(*args, **kwargs):
    return {finding.check: finding for finding in examine(recorded(*args, **kwargs))}


def changed(actions, change):
    copies = [episode.copy() for episode in actions]
    for episode in copies:
        change(episode)
    return copies


def gripper(actions, convert):
    return changed(actions, lambda episode: episode.__setitem__((slice(None), -1), convert(episode[:, -1])))


@pytest.mark.parametrize("noise", [0.0, 0.002])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_right_demonstrations_have_no_certain_finding(noise, lag):
    actions, states = arm(noise, lag)
    checks = found(actions, states)
    # A state that follows exactly, but later, may as well be a column that is shifted: doubtful, and only then.
    assert set(checks) == ({"shifted-actions"} if lag and not noise else set())
    assert not any(finding.certain for finding in checks.values())
    assert found(actions) == {}


@pytest.mark.parametrize(
    ("convert", "certain", "says"),
    [
        (lambda g: 1 - 2 * g, True, "clipped_inverted where -1 opens"),  # robosuite
        (lambda g: 2 * g - 1, True, "gripper: clipped where -1 closes"),  # CALVIN
        (lambda g: 850 * g, True, r"gripper_range: [closed, open], the two numbers of this gripper ([0, 850]"),  # xArm
        (lambda g: 255 * (1 - g), True, "or [255, 0] where the larger is closed"),  # Robotiq
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
def test_a_gripper_of_another_convention(convert, certain, says):
    actions, states = arm()
    if says == "relative":  # opens again
        actions, states = [np.tile(e, (3, 1)) for e in actions], ()
    finding = found(gripper(actions, convert), states)["gripper-range"]
    assert finding.certain is certain
    assert says in finding.mend
    assert "gripper from" in finding.saw


def test_2_in_a_few_frames_says_which(recwarn):
    actions, _ = arm()
    actions[2][5, -1] = actions[4][6:8, -1] = 2.0
    finding = found(actions)["gripper-range"]
    assert "to 2 (q01 0, q99 1), beyond 0 to 1 in 3 steps, in 2 of 8 episodes (the first: 2, 4)" in finding.saw


def test_inverted_twice_asks_for_clipped_inverted():
    actions, _ = arm()
    finding = found(gripper(actions, lambda g: 2 * g), gripper="inverted")["gripper-range"]
    assert finding.certain
    assert "clipped_inverted in place of inverted" in finding.mend


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
def test_a_gripper_that_is_always_on_one_side(convert, check, certain):
    checks = found(gripper(arm()[0], convert))
    assert list(checks) == [check]
    assert checks[check].certain is certain


def test_a_gripper_that_the_configuration_says_is_a_movement_is_only_doubtful():
    actions = gripper(arm()[0], lambda g: 850 * g)
    assert found(actions)["gripper-range"].certain
    assert not found(actions, action_mask=[True] * 7)["gripper-range"].certain
    assert not found(gripper(actions, lambda g: g / 10_000), action_mask=[True] * 7)["gripper-scale"].certain


def test_no_gripper_is_no_constant_gripper():
    actions = gripper(arm()[0], lambda g: 0 * g)
    statistics = {**describe(np.concatenate(actions)), "mask": [True] * 6 + [False]}
    fields = Fields(("image",), ("move", None))
    assert examine(Recording("mine", statistics, fields, (), actions)) == []


def differences(states, turn=2 * np.pi):
    """Plain differences of poses, as the movement."""
    return [np.diff(state[:, :6], axis=0) * ([1, 1, 1] + [turn / 2 / np.pi] * 3) for state in states]


@pytest.mark.parametrize(("turn", "unit"), [(2 * np.pi, "rad"), (360.0, "degrees")])
def test_differences_of_angles_that_wrap(turn, unit):
    actions, states = arm()
    moves = differences(states, turn)
    shut = [np.column_stack([move, action[:-1, -1]]) for move, action in zip(moves, actions)]
    share = np.mean(np.abs(np.concatenate(shut)[:, 3]) > 0.9 * turn)
    assert share > 0.01
    finding = found(shut)["wrapped-rotation"]
    assert finding.certain
    assert f"droll jumps by a turn in {unit}" in finding.saw
    assert "dyaw" not in finding.saw
    assert "rotation: wrapped" in finding.mend


@pytest.mark.parametrize("noise", [0.001, 0.05])
def test_a_gripper_that_points_down_wraps_at_every_other_step(noise):
    random, actions = np.random.RandomState(0), arm()[0]
    for episode in actions:
        roll = np.pi + random.normal(0, noise, STEPS + 1)
        episode[:, 3] = np.diff((roll + np.pi) % (2 * np.pi) - np.pi)
    finding = found(actions)["wrapped-rotation"]
    assert finding.certain
    assert "in 8 of 8 episodes" in finding.saw


@pytest.mark.parametrize("name", ["mine", "bridge_orig"])
def test_few_wraps_are_doubtful_and_published_ones_known(name):
    actions, _ = arm()
    actions[3][10, 5] = 6.27
    checks = found(actions, name=name)
    if name == "mine":
        assert not checks["wrapped-rotation"].certain
        assert "dyaw jumps by a turn in rad (to 6.27) in 1 of 480 steps, in 1 of 8 episodes (the first: 3)" in (
            checks["wrapped-rotation"].saw
        )
    else:
        assert checks == {}
    for episode in actions:
        episode[10, 5] = 6.27
    assert found(actions, name=name)["wrapped-rotation"].certain  # q99 of yaw 6.27 under whatever name


@pytest.mark.parametrize(
    ("rotation", "scale"), [("wrapped", 1.0), ("wrapped_degrees", 180 / np.pi), ("degrees", 180 / np.pi)]
)
def test_the_field_rotation_mends_it(rotation, scale):
    actions, states = arm()
    right = np.diff(states[0][:, :6], axis=0)
    right[:, 3:] = (right[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    stored = np.diff(states[0][:, :6], axis=0) if rotation.startswith("wrapped") else right.copy()
    stored[:, 3:] *= scale
    stored = np.column_stack([stored, actions[0][:-1, -1]])
    fields = Fields(("image",), ("action",), rotation=rotation)
    action, _ = fields.tables({"action": stored})
    assert np.allclose(action[:, :6], right, atol=1e-12)
    assert action[:, 6].tolist() == actions[0][:-1, -1].tolist()
    with pytest.raises(ValueError, match="needs an action of seven, got 6"):
        fields.tables({"action": stored[:, :6]})
    with pytest.raises(ValueError, match="Unknown rotation 'wrap'"):
        Fields(("image",), ("action",), rotation="wrap")


def test_small_rotations_stay_in_every_bit():
    values = np.random.RandomState(0).uniform(-3, 3, (50, 7)).astype(np.float32)
    action, _ = Fields(("image",), ("action",), rotation="wrapped").tables({"action": values})
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
def test_the_field_gripper_range_mends_it(ends, stored, right):
    column = np.array(stored, float)[:, None]
    action, _ = Fields(("image",), ("action",), gripper_range=ends).tables({"action": column})
    assert action[:, 0].tolist() == right
    action, _ = Fields(("image",), ("action",), gripper_range=ends, gripper="clipped").tables({"action": column})
    assert action[:, 0].tolist() == np.clip(right, 0, 1).tolist()


@pytest.mark.parametrize("ends", [(1, 1), (0,), (0, 1, 2), ("0", "1"), (0, float("nan")), 850, True])
def test_a_range_that_is_none_is_refused(ends):
    with pytest.raises(ValueError, match="gripper_range must be two different numbers"):
        Fields(("image",), ("action",), gripper_range=ends)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("unit", [1, 1000])
def test_poses_given_for_movements(ahead, unit):
    actions, states = arm(noise=0.001)
    poses = [np.column_stack([np.roll(s[:, :6], -ahead, axis=0), a[:, 6]]) for a, s in zip(actions, states)]
    poses = changed(poses, lambda episode: episode.__setitem__((slice(None), slice(0, 3)), unit * episode[:, :3]))
    finding = found(poses, states)["absolute-pose"]
    assert finding.certain
    assert "dx with proprio[0]" in finding.saw
    assert "relabel: state" in finding.mend
    alone = found(poses)["absolute-pose"]  # without a state: a roll of half a turn is no movement
    assert alone.certain
    assert "dx from" in alone.saw
    assert "droll from -3.1" in alone.saw
    level = changed(poses, lambda episode: episode.__setitem__((slice(None), slice(3, 6)), 0.1 * episode[:, 3:6]))
    assert not found(level)["absolute-pose"].certain  # without either it can only be supposed


def test_the_fields_that_are_named_mend_poses():
    actions, states = arm(noise=0.001)
    poses = [np.column_stack([s[:, :6], a[:, 6]]) for a, s in zip(actions, states)]
    _, findings = statistics_and_findings(reader(poses, states), progress=False)
    assert {one.check for one in findings if one.certain} == {"absolute-pose"}
    _, findings = statistics_and_findings(reader(poses, states, relabel="state"), progress=False)
    assert {one.check for one in findings if one.certain} == {"wrapped-rotation"}
    mended = reader(poses, states, relabel="state", rotation="wrapped")
    assert statistics_and_findings(mended, progress=False)[1] == []
    assert np.allclose(mended[0].actions[:, :6], actions[0][:-1, :6], atol=0.005)


def test_degrees():
    actions, states = arm()
    degrees = changed(actions, lambda e: e.__setitem__((slice(None), slice(3, 6)), np.degrees(e[:, 3:6])))
    finding = found(degrees, states)["degrees"]
    assert not finding.certain
    assert "dyaw from -5" in finding.saw
    assert "rotation: degrees" in finding.mend


@pytest.mark.parametrize("share", [0.8, 0.95])
@pytest.mark.parametrize("dimensions", [7, 14])
def test_idle_steps(share, dimensions):
    actions, _ = arm()
    if dimensions == 14:  # positions: what stands still keeps its value
        actions = [np.column_stack([np.cumsum(e, axis=0), np.cumsum(e, axis=0)]) for e in actions]
    idle = int(share * STEPS)

    def stand_still(episode):
        episode[:idle] = 0 if dimensions == 7 else episode[idle]

    checks = found(changed(actions, stand_still))
    if share < 0.9:
        assert "idle-steps" not in checks
        return
    compared = STEPS - (dimensions == 14)  # a position stands still against the one before it
    assert f"{idle * EPISODES} of {compared * EPISODES} steps" in checks["idle-steps"].saw
    assert f"skip_first: {idle}" in checks["idle-steps"].mend
    assert not checks["idle-steps"].certain


def test_an_arm_that_never_moves_is_idle_and_one_that_never_stops_is_not():
    actions, _ = arm()
    still = found(changed(actions, lambda episode: episode.__setitem__((slice(None), slice(0, 6)), 0)))
    assert list(still) == ["idle-steps"]
    assert "472 of 480 steps (98%)" in still["idle-steps"].saw  # the others are the gripper's
    steady = changed(actions, lambda episode: episode.__setitem__((slice(None), slice(0, 6)), 0.01))
    assert "idle-steps" not in found(steady)


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_actions_that_lead_to_the_frame_are_certain(noise):
    actions, states = arm(noise)
    late = [np.roll(episode, 1, axis=0) for episode in actions]
    finding = found([e[1:] for e in late], [s[1:] for s in states])["shifted-actions"]
    assert "1 step before it" in finding.saw
    assert finding.certain
    assert "relabel: state" in finding.mend


def test_actions_that_come_early_may_be_a_robot_that_lags():
    actions, states = arm()
    finding = found([e[1:] for e in actions], [s[:-1] for s in states])["shifted-actions"]
    assert not finding.certain
    assert "1 step after it" in finding.saw
    noisy, states = arm(noise=0.005, lag=1)
    assert found(noisy, states) == {}  # and as a robot that follows roughly it is not seen


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_frames_show_a_shift_where_there_is_no_state(shift):
    random = np.random.RandomState(0)
    actions, _ = arm()
    for episode in actions:
        episode[:, :6] *= random.choice([0.1, 1.0], (STEPS, 1))
    data = recorded(actions)
    scale = (data.most - data.least)[:6]
    sizes = [np.linalg.norm(episode[:, :6] / scale, axis=1) for episode in actions]
    changes = [np.roll(values, shift) + random.uniform(0, 0.05, STEPS) for values in sizes]
    for values in changes:
        values[-1] = np.nan
    finding = shifted_frames(data, changes)
    if shift < 0:
        assert (finding.check, finding.certain) == ("shifted-actions", False)
        assert "the change of the frames 1 step before it" in finding.saw
    else:
        assert finding is None  # later is what robots do


def bimanual(kind):
    """14 joints of two arms, grippers in places 6 and 13 or none; actions are where the leader's joints are."""
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
def test_joints_of_two_arms_are_left_alone(kind, with_state):
    actions, states = bimanual(kind)
    assert found(actions, states if with_state else ()) == {}
    assert found([e[:, :8] for e in actions], [e[:, :8] for e in states] if with_state else ()) == {}


@pytest.mark.parametrize("names", [("action.joint_position",), ("action", "joint_1", "joint_2"), ("qpos",)])
def test_seven_joints_are_no_end_effector_where_they_are_named_so(names):
    actions, states = bimanual("joints")
    actions, states = [e[:, :7] + 3 for e in actions], [e[:, :7] + 3 for e in states]
    assert {"absolute-pose", "gripper-range"} <= set(found(actions, states))
    assert found(actions, states, names=names) == {}


def test_lerobot_names_of_joints_are_read(tmp_path):
    pytest.importorskip("pyarrow")
    from openvla.lerobot_writer import LeRobotWriter
    from test_lerobot_writer import as_png

    joints = [f"joint_{index}" for index in range(7)]
    writer = LeRobotWriter(tmp_path / "arm", fps=10, numbers={"action": joints}, cameras={"observation.image": (8, 8)})
    for episode in bimanual("joints")[0][:2]:
        writer.add_episode(
            "go",
            {"action": episode[:, :7].astype(np.float32) + 3},
            {"observation.image": [as_png(np.zeros((8, 8, 3), np.uint8))] * STEPS},
        )
    with pytest.warns(UserWarning, match="not taken for a gripper but normalised like a movement"):
        _, findings = statistics_and_findings(open_demonstrations(tmp_path / "arm"), progress=False)
    assert findings == []


# q01 and q99 (and min, max) of the actions as published with openvla-7b and OpenVLA-OFT's LIBERO checkpoints.
PUBLISHED = {
    "bridge_orig": {
        "min": [-0.40075102, -0.13874775, -0.225539, -3.2010787, -1.8618113, -6.2790756, 0.0],
        "q01": [-0.02872725, -0.0417035, -0.02609386, -0.08092105, -0.092887, -0.20718276, 0.0],
        "q99": [0.02830968, 0.04085525, 0.04016159, 0.08192048, 0.07792851, 0.20382575, 1.0],
        "max": [0.41691166, 0.25864795, 0.21218234, 3.1222019, 1.8618113, 6.2804785, 1.0],
    },
    "fractal20220817_data": {
        "min": [-2.0204521, -5.4978995, -2.0316634, -1.5699179, -1.5698922, -1.5704194, 0.0],
        "q01": [-0.22453528, -0.14820013, -0.23158971, -0.35179949, -0.41930113, -0.43643461, 0.0],
        "q99": [0.17824687, 0.1493838, 0.21842355, 0.5892666, 0.35272657, 0.44796681, 1.0],
        "max": [2.9984593, 22.090528, 2.7507524, 1.5706365, 1.5321087, 1.5691522, 1.0],
    },
    "libero_spatial_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.1875, -0.3675, -0.36, 0.0],
        "q01": [-0.74547321, -0.66160715, -0.9375, -0.10714286, -0.20678571, -0.18428572, 0.0],
        "q99": [0.9375, 0.87589288, 0.93214285, 0.10392857, 0.17678571, 0.14571428, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.19714285, 0.33642858, 0.375, 1.0],
    },
    "libero_object_no_noops": {
        "min": [-0.8839286, -0.9375, -0.9375, -0.15, -0.29035714, -0.32892856, 0.0],
        "q01": [-0.53839284, -0.87589288, -0.9375, -0.06964286, -0.11678571, -0.15964286, 0.0],
        "q99": [0.84642857, 0.84375, 0.9375, 0.08142857, 0.14892857, 0.08678571, 1.0],
        "max": [0.9375, 0.89196426, 0.9375, 0.17678571, 0.35035715, 0.18107143, 1.0],
    },
    "libero_goal_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.2582143, -0.375, -0.28714284, 0.0],
        "q01": [-0.87857145, -0.75535715, -0.9375, -0.15107143, -0.16392857, -0.137775, 0.0],
        "q99": [0.9375, 0.91071427, 0.9375, 0.20357142, 0.26357144, 0.375, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.35571429, 0.375, 0.375, 1.0],
    },
    "libero_10_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.23642857, -0.30535713, -0.3675, 0.0],
        "q01": [-0.63482141, -0.77410716, -0.76339287, -0.0975, -0.1482, -0.2742857, 0.0],
        "q99": [0.77142859, 0.84642857, 0.9375, 0.13928571, 0.15964286, 0.32464287, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.3, 0.29357144, 0.375, 1.0],
    },
}


def held_statistics():
    """Every file of statistics that lies in the repository."""
    root = Path(__file__).parent.parent
    files = sorted([*root.glob("assets/**/*.json"), *root.glob("tests/golden/**/*.json")])
    for file in files:
        content = json.loads(file.read_text())
        content = content.get("norm_stats") or content if isinstance(content, dict) else {}
        for name, one in content.items():
            if isinstance(one, dict) and isinstance(one.get("action"), dict) and "q01" in one["action"]:
                yield f"{file.relative_to(root)} {name}", name, one["action"]


def test_no_alarm_on_published_statistics():
    held = [*held_statistics(), *((name, name, action) for name, action in PUBLISHED.items())]
    assert len(held) > 20
    for place, name, action in held:
        assert examine_statistics({name: {"action": action}})[name] == [], place
        only = {key: action[key] for key in ("q01", "q99")}
        assert examine_statistics({name: {"action": only}})[name] == [], place


@pytest.mark.parametrize("name", ["toto", "ucsd_kitchen_dataset_converted_externally_to_rlds"])
def test_sets_that_are_published_as_poses_are_known_by_their_names(name):
    low = [170.0, -160.0, -90.0, -180.0, -80.0, -90.0, 0.0]
    high = [670.0, 400.0, 500.0, 180.0, 6.0, 110.0, 1.0]
    low[2] = 200.0
    poses = {"q01": low, "q99": high}
    assert {"absolute-pose", "degrees"} <= {
        one.check for one in examine_statistics({"mine": {"action": poses}})["mine"]
    }
    assert "absolute-pose" not in {one.check for one in examine_statistics({name: {"action": poses}})[name]}


@pytest.mark.parametrize(
    ("change", "check", "certain"),
    [
        ({"min": {5: -6.28}, "q01": {5: -6.28}, "q99": {5: 6.28}, "max": {5: 6.28}}, "wrapped-rotation", True),
        ({"max": {3: 6.28}}, "wrapped-rotation", False),
        ({"q01": {0: 0.3, 2: 0.1}, "q99": {0: 0.6, 2: 0.3}}, "absolute-pose", False),
        ({"q99": {3: 12.0}}, "degrees", False),
        ({"q01": {6: -1.0}, "min": {6: -1.0}}, "gripper-range", True),
        ({"q99": {6: 850.0}, "max": {6: 850.0}}, "gripper-range", True),
        ({"max": {6: 2.0}}, "gripper-range", False),
        ({"q99": {6: 0.08}, "max": {6: 0.08}}, "gripper-scale", True),
        ({"q99": {6: 0.0}, "max": {6: 0.0}}, "constant-gripper", False),
    ],
)
def test_statistics_alone_show_it(change, check, certain, tmp_path, capsys):
    action = json.loads(json.dumps(PUBLISHED["fractal20220817_data"]))
    for key, values in change.items():
        for index, value in values.items():
            action[key][index] = value
    (finding,) = examine_statistics({"mine": {"action": action}})["mine"]
    assert (finding.check, finding.certain) == (check, certain)
    # and of a checkpoint's folder or file
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": action}}))
    for place in (tmp_path, tmp_path / "dataset_statistics.json"):
        assert main(["inspect-data", str(place), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["findings"]["mine"]
        assert [(one["check"], one["severity"]) for one in said] == [(check, "certain" if certain else "doubtful")]
    assert main(["inspect-data", str(tmp_path)]) == 0
    assert f"{'CERTAIN' if certain else 'DOUBTFUL'} {check}: {finding.saw}" in capsys.readouterr().out


def test_statistics_take_no_options_of_data(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"mine": {"action": PUBLISHED["bridge_orig"]}}}))
    assert main(["inspect-data", str(tmp_path)]) == 0
    assert "findings     none" not in capsys.readouterr().out  # its name is not Bridge's: the wraps are said
    assert main(["inspect-data", str(tmp_path), "--check-images"]) == 2
    assert "holds statistics, not data: ['check_images'] must be left out" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["inspect-data", str(tmp_path / "other.json")]) == 2
    assert "holds no statistics: it needs" in capsys.readouterr().err


def rows(actions, states=()):
    flat = np.concatenate(actions)
    states = np.concatenate(states) if len(states) else [None] * len(flat)
    image = np.zeros((4, 4, 3), np.uint8)
    return [{"image": image, "action": a, "task": "go", "state": s} for a, s in zip(flat, states)]


def reader(actions, states=(), name="mine", **fields):
    fields = {"cameras": ["image"], "action": "action", "instruction": "task", **fields}
    if len(states):
        fields["proprio"] = "state"
    return SequenceReader(rows(actions, states), name, fields, episode_lengths=[len(e) for e in actions])


def test_statistics_warn_and_the_field_mends_what_a_model_learns():
    actions, states = arm()
    simulated = gripper(actions, lambda g: 1 - 2 * g)  # -1 open, +1 closed
    with pytest.warns(UserWarning, match=r"mine: gripper-range \(certain\): gripper from -1 to 1"):
        compute_statistics(reader(simulated, states), progress=False)
    statistics, findings = statistics_and_findings(
        reader(simulated, states, gripper="clipped_inverted"), progress=False
    )
    assert findings == []
    assert (statistics["action"]["min"][6], statistics["action"]["max"][6]) == (0, 1)
    learnt = NormalizationStatistics(statistics["action"])
    mended = reader(simulated, states, gripper="clipped_inverted")[0].actions
    assert np.array_equal(learnt.normalize(mended)[:, 6], actions[0][:, 6])


def test_a_gripper_beyond_1_is_said_to_be_normalised():
    actions, _ = arm()
    actions[0][3, 6] = 1.1
    with pytest.warns(UserWarning, match=r"action\[6\] goes from 0 to 1.1, beyond \[-1, 1\]") as seen:
        statistics = compute_statistics(reader(actions), progress=False)
    assert len(seen) == 1
    assert statistics["action"]["mask"] == [True] * 7
    assert compute_statistics(reader(actions, gripper="clipped"), progress=False)["action"]["mask"][6] is False


def test_inspect_data_shows_findings(tmp_path, capsys, monkeypatch):
    h5py = pytest.importorskip("h5py")
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    actions, _ = arm()
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index, action in enumerate(gripper(actions, lambda g: 850 * g)[:2]):
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"], episode["images"] = action, np.zeros((STEPS, 16, 16, 3), np.uint8)
    for more in (["--out", str(tmp_path / "look.png")], []):  # the second time from the cache
        with pytest.warns(UserWarning, match="normalised like a movement"):
            assert main(["inspect-data", str(tmp_path), *more]) == 0
        text = capsys.readouterr().out
        assert "findings     1 certain (openvla finetune refuses them), 0 doubtful" in text
        assert "CERTAIN gripper-range: gripper from 0 to 850" in text
        assert "not seen: poses given for movements, and shifts, against the state (no proprio)" in text
    (figure,) = figures
    assert figure.get_suptitle().endswith("2 episodes, 120 steps\ngripper-range (certain)")
    titles = {axes.get_title(): axes.title.get_color() for axes in figure.axes if "units" in axes.get_title()}
    assert [title for title, color in titles.items() if color == "C3"] == ["gripper (dataset units)"]
    assert main(["inspect-data", str(tmp_path), "--json", "--fields", "{gripper_range: [0, 850]}"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21", "bridge_orig", "fractal20220817_data", "hdf5"])
def test_nothing_certain_in_the_small_datasets(name):
    for package in ("av", "h5py", "pyarrow"):
        pytest.importorskip(package)
    _, findings = statistics_and_findings(open_demonstrations(DATA / name), progress=False)
    assert not any(finding.certain for finding in findings)


CERTAIN = Finding("gripper-range", True, "gripper from 0 to 850.", "why.", "Give gripper_range.")
DOUBTFUL = Finding("idle-steps", False, "much.", "why.", "less.")


def test_certain_findings_stop_a_run_unless_they_are_accepted(recwarn):
    message = r"(?s)cannot be right.*a: gripper-range \(certain\): gripper from 0 to 850.*--accept gripper-range"
    with pytest.raises(ValueError, match=message):
        refuse({"a": [CERTAIN, DOUBTFUL]})
    with pytest.raises(ValueError, match=message):
        refuse({"a": [CERTAIN]}, ["idle-steps"])
    assert not recwarn.list
    refuse({"a": [CERTAIN, DOUBTFUL]}, ["gripper-range", "degrees"])
    assert [str(one.message) for one in recwarn.list] == [
        f"a: accepted: {CERTAIN.text()}",
        f"a: {DOUBTFUL.text()}",
        "accept: ['degrees'] found nothing in this data; these names need not be given.",
    ]
    recwarn.clear()
    refuse({"a": [DOUBTFUL]}, quiet=True)
    assert not recwarn.list


def test_accept_takes_names_of_checks():
    given = {"model": "m", "output": "o"}
    assert FinetuneConfig(**given, accept=list(CHECKS)).accept == list(CHECKS)
    with pytest.raises(ValueError, match="Unknown check 'gripper' in accept. Did you mean 'gripper-"):
        FinetuneConfig(**given, accept=["gripper"])
    with pytest.raises(ValueError, match="accept must be a list of names, got 'degrees'"):
        FinetuneConfig(**given, accept="degrees")


@pytest.fixture
def simulated(tmp_path):
    """A folder of demonstrations with the simulator's gripper, and the fields of a run on it."""
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("accelerate")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index, action in enumerate(gripper(arm()[0], lambda g: 1 - 2 * g)[:2]):
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"], episode["images"] = action, np.zeros((STEPS, 16, 16, 3), np.uint8)
    return ["--model", str(tmp_path / "no-model"), "--output", str(tmp_path / "run"), "--device", "cpu"]


def test_finetune_refuses_before_it_loads_the_model(simulated, tmp_path, capsys):
    run = ["finetune", "--data", str(tmp_path), *simulated]
    assert main(run) == 2
    said = capsys.readouterr().err
    assert "gripper-range (certain): gripper from -1 to 1" in said
    assert "gripper: clipped_inverted where -1 opens" in said
    assert "go on all the same with --accept gripper-range" in said
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="accepted: gripper-range") as seen:
        assert main([*run, "--accept", "gripper-range", "--accept", "degrees"]) != 0  # there is no model
    assert "The data cannot be right" not in capsys.readouterr().err
    assert any("accept: ['degrees'] found nothing" in str(one.message) for one in seen)
    (tmp_path / "run.yaml").write_text("accept: [gripper-range]")
    with pytest.warns(UserWarning, match="accepted: gripper-range"):
        main(["finetune", str(tmp_path / "run.yaml"), *run[1:]])
    capsys.readouterr()


def test_finetune_looks_at_statistics_where_there_is_no_reader(tmp_path):
    pytest.importorskip("accelerate")
    from openvla.finetune import finetune

    class Held:
        readers = ()
        statistics = {"lab": {"action": {"q01": [-0.5] * 6 + [-1.0], "q99": [0.5] * 6 + [1.0]}}}

    with pytest.raises(ValueError, match=r"lab: gripper-range \(certain\)"):
        finetune(FinetuneConfig(model="no", output=str(tmp_path / "run"), device="cpu"), Held())
