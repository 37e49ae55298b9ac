"""Robot conventions: conversion of actions, sticky grippers, ClipAction."""

import logging

import numpy as np
import pytest
from openvla import ActionQueue
from openvla.inference.robot_conventions import (
    ROBOT_CONVENTIONS,
    ActionConverter,
    ClipAction,
    convert_action,
    euler_to_axis_angle,
)

MOVE = [0.1, -0.2, 0.3, 0.01, -0.02, 0.03]


class ConstantPolicy:
    """Policy that returns the same action every time and keeps its inputs."""

    def __init__(self, action):
        self.action, self.inputs, self.episodes = np.asarray(action, float), [], 0

    def act(self, image, instruction, proprio=None):
        self.inputs.append((image, instruction, proprio))
        return self.action

    def reset(self):
        self.episodes += 1


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("raw", {1.0: 1.0, 0.996: 0.996, 0.2: 0.2, 0.0: 0.0}),
        ("bridge", {1.0: 1.0, 0.996: 0.996, 0.4: 0.4, 0.0: 0.0, -0.04: 0.0, 1.04: 1.0}),
        ("libero", {1.0: -1.0, 0.996: -1.0, 0.6: -1.0, 0.4: 1.0, 0.004: 1.0, 0.0: 1.0}),
        ("simpler_widowx", {1.0: 1.0, 0.996: 1.0, 0.6: 1.0, 0.5: -1.0, 0.4: -1.0, 0.004: -1.0, 0.0: -1.0}),
    ],
)
def test_convert_action_converts_the_gripper(convention, expected):
    action = np.array([*MOVE, 0.0])
    move = MOVE[:3] + (euler_to_axis_angle(MOVE[3:]).tolist() if convention == "simpler_widowx" else MOVE[3:])
    for openvla, robot in expected.items():
        action[-1] = openvla
        assert convert_action(action, convention).tolist() == [*move, robot]
        assert action.tolist() == [*MOVE, openvla]
    chunk = np.array([[*MOVE, openvla] for openvla in expected])
    assert convert_action(chunk, convention)[:, -1].tolist() == list(expected.values())


def test_libero_gripper_equals_the_reference():
    """normalize_gripper_action and invert_gripper_action of the reference, on every bin centre that is a gripper's."""
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    for gripper in centres[centres >= -0.25]:
        assert convert_action([*MOVE, gripper], "libero")[-1] == -np.sign(2 * gripper - 1)
    for gripper in centres[centres < -0.25]:  # the reference takes these for closed
        with pytest.raises(ValueError, match="stop the robot"):
            convert_action([*MOVE, gripper], "libero")


@pytest.mark.parametrize("gripper", [1.053, 1.066, -0.04])  # the first two of an L1 head in LIBERO-PRO
def test_the_overshoot_of_a_continuous_head_is_sent_on_as_in_the_reference(gripper):
    assert convert_action([*MOVE, gripper], "libero")[-1] == -np.sign(2 * gripper - 1)
    assert convert_action([*MOVE, gripper], "bridge")[-1] == np.clip(gripper, 0, 1)


# Roll, pitch, yaw and their rotation vectors, of transforms3d's euler2axangle (axis times angle): what SimplerEnv does.
ROTATIONS = {
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (0.1, 0.0, 0.0): (0.1, 0.0, 0.0),
    (0.0, -0.3, 0.0): (0.0, -0.3, 0.0),
    (0.01, -0.02, 0.03): (0.010298916738962, -0.019848343258275, 0.030098749985034),
    (0.25, -0.4, 0.9): (0.410182965005132, -0.260542144754888, 0.932969823752735),
    (1.2, 0.7, -2.0): (1.424261926944833, -0.796422209670175, -2.054737918990694),
    (3.0, 0.2, -0.1): (2.992033431482939, -0.128391780474553, -0.310711890784843),
    (3.1, 3.0, 2.9): (-0.024218047012383, 0.145889626285809, -0.238208839217795),
}


def test_simpler_rotations_are_axis_angles():
    np.testing.assert_allclose(
        euler_to_axis_angle(np.array(list(ROTATIONS))), list(ROTATIONS.values()), rtol=0, atol=1e-12
    )
    assert euler_to_axis_angle(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(euler_to_axis_angle(np.array([1e-9, 0, 0])), [1e-9, 0, 0], rtol=1e-12)  # no arccosine
    for euler, expected in ROTATIONS.items():
        for robot in (convert_action, lambda action, name: ActionConverter(name).convert(action)):
            action = robot([0.01, -0.02, 0.03, *euler, 1.0], "simpler_widowx")
            np.testing.assert_allclose(action, [0.01, -0.02, 0.03, *expected, 1.0], rtol=0, atol=1e-12)
    google = ActionConverter("simpler_google_robot").convert([[0.01, -0.02, 0.03, *euler, 1.0] for euler in ROTATIONS])
    np.testing.assert_allclose(google[:, 3:6], list(ROTATIONS.values()), rtol=0, atol=1e-12)
    assert (google[:, :3] == [0.01, -0.02, 0.03]).all()


# Positions of OpenVLA's gripper (0 closed, 1 open) step by step, and what SimplerEnv's Google Robot is sent: the change
# since the step before, +1 closing; one above 0.5 for 15 steps.
STICKY = {
    "closes": ([1.0, 1.0] + [0.0] * 18, [0.0, 0.0] + [1.0] * 15 + [0.0] * 3),
    "begins closed, opens": ([0.0] + [1.0] * 17, [0.0] + [-1.0] * 15 + [0.0, 0.0]),
    "a larger change during repetition is ignored": (
        [1.0, 0.25, 0.25, 1.0] + [1.0] * 12 + [0.125],
        [0.0] + [0.75] * 15 + [0.875],
    ),
    "the last of 15 is followed by the next change": (
        [1.0] + [0.0] * 15 + [1.0] * 16,
        [0.0] + [1.0] * 15 + [-1.0] * 15 + [0.0],
    ),
    "a change of a half or less is not repeated": ([1.0, 0.5, 0.25, 0.75, 0.75], [0.0, 0.5, 0.25, -0.5, 0.0]),
    "two halves are not a large change": ([1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]),
}


@pytest.mark.parametrize("case", STICKY)
def test_google_robot_gripper_repeats_large_changes(case):
    positions, expected = STICKY[case]
    converter = ActionConverter("simpler_google_robot")
    actions = np.array([[*[0.0] * 6, position] for position in positions])
    assert [float(converter.convert(action)[-1]) for action in actions] == expected
    assert (actions[:, -1] == positions).all()  # a copy was changed
    converter.reset()
    assert converter.convert(actions)[:, -1].tolist() == expected  # as one chunk; nothing of the episode before


def test_reset_clears_the_sticky_gripper():
    converter = ActionConverter("simpler_google_robot")
    closed, opened = [*[0.0] * 6, 0.0], [*[0.0] * 6, 1.0]
    assert converter.convert(closed)[-1] == 0
    assert converter.convert(opened)[-1] == -1
    with pytest.raises(ValueError, match="must be finite"):
        converter.convert([*[0.0] * 6, np.nan])
    assert converter.convert(closed)[-1] == -1  # still the second of fifteen
    converter.reset()
    assert converter.convert(closed)[-1] == 0


@pytest.mark.parametrize("convention", ["raw", "bridge", "libero", "simpler_widowx"])
def test_converter_without_state_equals_convert_action(convention):
    converter = ActionConverter(convention)
    for gripper in (1.0, 0.0, 0.75, 0.75):
        action = [*MOVE, gripper]
        assert converter.convert(action).tolist() == convert_action(action, convention).tolist()


def test_convert_action_rejects_a_sticky_gripper():
    with pytest.raises(ValueError, match=r"depend on the episode.*use ActionConverter\('simpler_google_robot'\)"):
        convert_action([*MOVE, 1.0], "simpler_google_robot")
    with pytest.raises(ValueError, match="Unknown robot convention 'simpler_google'. Did you mean 'simpler_google_"):
        ActionConverter("simpler_google")


@pytest.mark.parametrize(
    ("action", "convention", "message"),
    [
        ([*MOVE, np.nan], "libero", "must be finite"),
        (MOVE, "libero", r"must have shape \(7,\)"),
        ([0.0] * 14, "bridge", r"must have shape \(7,\)"),
        ([*MOVE, -1.0], "libero", r"The gripper must be in \[0, 1\], 0 closed and 1 open, got -1: stop the robot"),
        ([[*MOVE, 0.0], [*MOVE, 850.0]], "bridge", r"got 850: stop the robot"),
        ([*MOVE, -0.26], "raw", r"got -0.26: .*gripper or gripper_range"),
        ([*MOVE, 1.26], "libero", r"got 1.26: stop"),
        ([*MOVE, 1.0], "libro", "Unknown robot convention 'libro'. Did you mean 'libero'"),
    ],
)
def test_convert_action_rejects_invalid_actions(action, convention, message):
    with pytest.raises(ValueError, match=message):
        convert_action(action, convention)


def test_max_delta_clips_and_logs(caplog):
    policy = ConstantPolicy([0.03, -0.08, 0.0, 0.4, 0.0, -0.1, 1.0])
    limited = ClipAction(policy, max_delta=[0.05] * 3 + [0.25] * 3)
    with caplog.at_level(logging.WARNING):
        action = limited.act("image", "go", [0.5])
    assert policy.inputs == [("image", "go", [0.5])]
    assert action.tolist() == [0.03, -0.05, 0.0, 0.25, 0.0, -0.1, 1.0]
    assert [(c.step, c.name, c.limit, c.original, c.clipped) for c in limited.clipped] == [
        (0, "dy", "max_delta", -0.08, -0.05),
        (0, "droll", "max_delta", 0.4, 0.25),
    ]
    assert caplog.messages == ["clipped dy from -0.08 to -0.05 (max_delta); droll from +0.4 to +0.25 (max_delta)"]
    policy.action[:] = 0.01
    assert limited.act("image", "go").tolist() == [0.01] * 7
    assert (limited.clipped, limited.num_clipped_actions, len(caplog.messages)) == ([], 1, 1)
    limited.reset()
    assert policy.episodes == 1


def test_end_effector_stays_in_the_workspace():
    limited = ClipAction(ConstantPolicy([0.04, 0.0, -0.04, 0, 0, 0, 0]), workspace=([0, -1, 0], [0.3, 1, 1]))
    action = limited.act(None, "go", position=[0.28, 0, 0.01])
    np.testing.assert_allclose(action[:3], [0.02, 0, -0.01], atol=1e-15)
    assert [(c.name, c.limit) for c in limited.clipped] == [("dx", "workspace"), ("dz", "workspace")]
    # From outside: not farther out, and no jump back in that nobody asked for.
    assert limited.act(None, "go", position=[0.5, 0, 0.5])[:3].tolist() == [0, 0, -0.04]
    assert limited.act(None, "go", position=[-0.5, 0, 0.5])[:3].tolist() == [0.04, 0, -0.04]


def test_chunk_is_clipped_step_by_step():
    chunk = np.zeros((4, 7))
    chunk[:, 0] = 0.05
    limited = ClipAction(ConstantPolicy(chunk), max_delta=[0.04] + [np.inf] * 5, workspace=([0, 0, 0], [0.1, 1, 1]))
    action = limited.act(None, "go", position=[0, 0.5, 0.5])
    np.testing.assert_allclose(action[:, 0], [0.04, 0.04, 0.02, 0], atol=1e-15)
    assert [(c.step, c.limit) for c in limited.clipped] == [
        *((0, "max_delta"), (1, "max_delta")),
        *((2, "max_delta"), (2, "workspace")),
        *((3, "max_delta"), (3, "workspace")),
    ]


# Height (m) of LIBERO's hand in libero_object's first scene (robosuite 1.4.0, MuJoCo 3.17): at rest, after each of
# twelve actions of -1 in dz, and how far it goes on afterwards.
START = 0.26128
MILLIMETRES = [6.02, 11.36, 12.48, 12.8, 12.98, 13.11, 13.23, 13.32, 13.4, 13.45, 13.5, 13.53]
DESCENT = START - np.cumsum(MILLIMETRES) / 1000
COASTS = 0.01272  # m, after the last


def clip_libero(action, floor):
    workspace = ([-1, -1, floor], [1, 1, 1.2])
    scale = ROBOT_CONVENTIONS["libero"].metres_per_unit
    return ClipAction(ConstantPolicy(action), workspace=workspace, metres_per_unit=scale)


def test_libero_chunk_is_clipped_at_the_measured_path():
    """Actions that stay above the floor are not clipped, others are, within a tenth of the measured distance."""
    chunk = np.tile([0, 0, -1.0, 0, 0, 0, 1], (12, 1))
    for steps in (1, 4, 8, 12):
        at_rest = DESCENT[steps - 1] - COASTS
        limited = clip_libero(chunk[:steps], at_rest)
        assert (limited.act(None, "go", position=[0, 0, START]) == chunk[:steps]).all()
        assert limited.clipped == []
    limited = clip_libero(chunk, DESCENT[7])  # the arm is there after eight steps
    clipped = limited.act(None, "go", position=[0, 0, START])[:, 2]
    assert clipped[:7].tolist() == [-1.0] * 7
    assert clipped[8:].tolist() == [0.0] * 4
    assert [clip.step for clip in limited.clipped] == [7, 8, 9, 10, 11]
    assert clipped.sum() * 0.0126 == pytest.approx(DESCENT[7] - START, abs=1e-12)
    assert -clipped.sum() == pytest.approx(8, rel=0.1)


def test_libero_action_is_clipped_to_the_remaining_distance():
    action = clip_libero([0, 0, 0.9, 0, 0, 0, 1], 0).act(None, "go", position=[0, 0, 1.2 - 0.0063])
    np.testing.assert_allclose(action[2], 0.5, atol=1e-12)


def test_clip_action_around_an_action_queue():
    """The measured position is used, and a missing one does not consume an action."""
    chunk = np.zeros((3, 7))
    chunk[:, 0] = [0.01, 0.02, 0.03]
    limited = ClipAction(ActionQueue(ConstantPolicy(chunk)), workspace=([0, 0, 0], [0.1, 1, 1]))
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.01
    with pytest.raises(ValueError, match="needs position="):
        limited.act(None, "go")
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.02
    assert limited.act(None, "go", position=[0.1, 0.5, 0.5])[0] == 0
    limited.reset()
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.01


def test_position_without_workspace_is_rejected():
    limited = ClipAction(ConstantPolicy([0.2] * 6 + [1]), max_delta=[0.1] * 6)
    for act in (lambda: limited.act(None, "go", position=[0, 0, 0]), lambda: limited.clip([0] * 7, [0, 0, 0])):
        with pytest.raises(ValueError, match="position is for a workspace, and none was given; leave it out"):
            act()
    assert limited.act(None, "go").tolist() == [0.1] * 6 + [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs max_delta, workspace or both"),
        ({"max_delta": 0.05}, "six numbers"),
        ({"max_delta": [0.05] * 5 + [-1]}, "0 or more"),
        ({"max_delta": [0.05] * 5 + [np.nan]}, "0 or more"),
        ({"workspace": ([0, 0, 0], [1, 0, 1])}, "low below high"),
        ({"workspace": ([0, 0, 0], [1, np.nan, 1])}, "low below high"),
        ({"workspace": [0, 1]}, "low below high"),
        ({"max_delta": [1] * 6, "metres_per_unit": 0}, "above 0"),
        ({"max_delta": [1] * 6, "metres_per_unit": 0.0126}, "is for a workspace; leave it out, or give one"),
    ],
)
def test_invalid_limits_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipAction(ConstantPolicy([0] * 7), **settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clip_action_rejects_non_finite_values(bad):
    with pytest.raises(ValueError, match="must be finite"):
        ClipAction(ConstantPolicy([bad] + [0] * 6), max_delta=[1] * 6).act(None, "go")
    with pytest.raises(ValueError, match="three finite numbers"):
        ClipAction(ConstantPolicy([0] * 7), workspace=([0] * 3, [1] * 3)).act(None, "go", position=[0, 0, bad])


@pytest.fixture(scope="module")
def arm():
    """LIBERO's arm: its environment, and a function that plays an action a number of times."""
    from openvla.evaluation.simulator import make_environment, open_suite

    environment = make_environment(open_suite("libero_object"), 0, has_renderer=False, use_camera_obs=False)

    def steps(action, count):
        for _ in range(count):
            observation, *_ = environment.step(convert_action(action, "libero"))
        return observation

    yield environment, steps
    environment.close()


@pytest.mark.libero
def test_simulator_goal_and_gripper_follow_the_convention(arm):
    """Direction and size of the controller's goal, and the gripper's sign, measured on LIBERO's arm."""
    environment, steps = arm
    environment.reset()
    fingers = [abs(steps([0] * 6 + [gripper], 20)["robot0_gripper_qpos"]).sum() for gripper in (0, 1)]
    assert fingers[1] > 0.07 > 0.01 > fingers[0]
    for direction in np.eye(3):
        goals = {}
        for size in (0.5, 1.0, 3.0):
            before = steps([0] * 6 + [1], 10)["robot0_eef_pos"]
            steps([*direction * size, 0, 0, 0, 1], 1)
            goals[size] = environment.env.robots[0].controller.goal_pos - before
        expected = direction * 0.05  # osc_pose.json
        np.testing.assert_allclose(goals[1.0], expected, atol=5e-3)
        np.testing.assert_allclose(goals[0.5], expected / 2, atol=5e-3)
        np.testing.assert_allclose(goals[3.0], expected, atol=5e-3)  # more is cut


@pytest.mark.libero
def test_simulator_moves_by_metres_per_unit(arm):
    """Movement per step of an action of 1 at constant speed, and the descent that a test above uses."""
    environment, steps = arm
    convention = ROBOT_CONVENTIONS["libero"]
    for direction in (*np.eye(6), *-np.eye(6)):
        environment.reset()
        observations = [steps([0] * 6 + [1], 10)] + [steps([*direction, 1], 1) for _ in range(12)]
        heights = [observation["robot0_eef_pos"] for observation in observations]
        moved = np.linalg.norm(np.diff(heights, axis=0), axis=1)
        quaternions = np.array([observation["robot0_eef_quat"] for observation in observations])
        cosines = np.abs((quaternions[1:] * quaternions[:-1]).sum(-1)).clip(max=1)
        turned = 2 * np.arccos(cosines)
        if direction[:3].any():
            assert moved[5:].mean() == pytest.approx(convention.metres_per_unit, rel=0.15)
            assert moved.max() < 0.05 / 3  # never the goal
        else:
            assert 0.75 < turned[4:8].mean() / convention.radians_per_unit < 1.7
        if direction[2] == -1:
            np.testing.assert_allclose(np.array(heights)[1:, 2], DESCENT, atol=2e-3)
            np.testing.assert_allclose(steps([0] * 6 + [1], 10)["robot0_eef_pos"][2], DESCENT[-1] - COASTS, atol=2e-3)


@pytest.mark.libero
def test_only_exactly_zero_rotation_keeps_the_orientation(arm):
    """Constant dimensions are un-normalised exactly, because a goal that is set every step follows the arm's errors."""
    environment, steps = arm
    goals = {}
    for rotation in (0.0, 5e-9):
        environment.reset()
        steps([0] * 6 + [1], 10)
        first = environment.env.robots[0].controller.goal_ori.copy()
        steps([0.9, 0.5, -0.9, rotation, rotation, rotation, 1], 8)
        goals[rotation] = np.abs(environment.env.robots[0].controller.goal_ori - first).max()
    assert goals[0.0] == 0
    assert goals[5e-9] > 1e-4


@pytest.mark.parametrize("action", [["0"] * 7, [1j] * 7, [None] * 7, {}, [[0.0] * 7, [0.0] * 6], "0000000"])
def test_convert_action_rejects_non_numbers(action):
    with pytest.raises(ValueError, match="An action must be finite numbers"):
        convert_action(action, "bridge")


def test_convert_action_accepts_objects_that_are_numbers():
    as_objects = np.array([1, 0.5, np.float32(0.25), 0, 0, 0, True], object)
    assert convert_action(as_objects, "bridge").tolist() == [1, 0.5, 0.25, 0, 0, 0, 1]
