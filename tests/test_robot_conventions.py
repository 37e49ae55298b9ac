"""What robots take where OpenVLA says seven numbers; limits that cut and say so."""

import logging

import numpy as np
import pytest
from openvla import ActionChunk
from openvla.robot_conventions import ROBOT_CONVENTIONS, ClipAction, convert_action

MOVE = [0.1, -0.2, 0.3, 0.01, -0.02, 0.03]


class Says:
    """Answers with what it was given, every time."""

    def __init__(self, answer):
        self.answer, self.asked, self.episodes = np.asarray(answer, float), [], 0

    def act(self, image, instruction, proprio=None):
        self.asked.append((image, instruction, proprio))
        return self.answer

    def reset(self):
        self.episodes += 1


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("raw", {1.0: 1.0, 0.996: 0.996, 0.2: 0.2, 0.0: 0.0}),
        ("bridge", {1.0: 1.0, 0.996: 0.996, 0.4: 0.4, 0.0: 0.0, -0.04: 0.0, 1.04: 1.0}),
        ("libero", {1.0: -1.0, 0.996: -1.0, 0.6: -1.0, 0.4: 1.0, 0.004: 1.0, 0.0: 1.0}),
    ],
)
def test_the_gripper_changes_its_convention(convention, expected):
    action = np.array([*MOVE, 0.0])
    for openvla, robot in expected.items():
        action[-1] = openvla
        assert convert_action(action, convention).tolist() == [*MOVE, robot]
        assert action[-1] == openvla
    chunk = np.array([[*MOVE, openvla] for openvla in expected])
    assert convert_action(chunk, convention)[:, -1].tolist() == list(expected.values())


def test_the_reference_sends_the_simulator_the_same():
    """normalize_gripper_action and invert_gripper_action of the reference, on every bin centre that is a gripper's."""
    edges = np.linspace(-1, 1, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    for gripper in centres[centres >= -0.05]:
        assert convert_action([*MOVE, gripper], "libero")[-1] == -np.sign(2 * gripper - 1)
    for gripper in centres[centres < -0.05]:  # the reference takes these for closed
        with pytest.raises(ValueError, match="stop the robot"):
            convert_action([*MOVE, gripper], "libero")


@pytest.mark.parametrize(
    ("action", "convention", "message"),
    [
        ([*MOVE, np.nan], "libero", "must be finite"),
        (MOVE, "libero", r"must have shape \(7,\)"),
        ([0.0] * 14, "bridge", r"must have shape \(7,\)"),
        ([*MOVE, -1.0], "libero", r"The gripper must be in \[0, 1\], 0 closed and 1 open, got -1: stop the robot"),
        ([[*MOVE, 0.0], [*MOVE, 850.0]], "bridge", r"got 850: stop the robot"),
        ([*MOVE, -0.06], "raw", r"got -0.06: .*gripper or gripper_range"),
        ([*MOVE, 1.06], "libero", r"got 1.06: stop"),
        ([*MOVE, 1.0], "libro", "Unknown robot convention 'libro'. Did you mean 'libero'"),
    ],
)
def test_what_is_no_action(action, convention, message):
    with pytest.raises(ValueError, match=message):
        convert_action(action, convention)


def test_movements_are_cut_and_said(caplog):
    policy = Says([0.03, -0.08, 0.0, 0.4, 0.0, -0.1, 1.0])
    limited = ClipAction(policy, max_delta=[0.05] * 3 + [0.25] * 3)
    with caplog.at_level(logging.WARNING):
        action = limited.act("image", "go", [0.5])
    assert policy.asked == [("image", "go", [0.5])]
    assert action.tolist() == [0.03, -0.05, 0.0, 0.25, 0.0, -0.1, 1.0]
    assert [(c.step, c.name, c.limit, c.asked, c.given) for c in limited.clipped] == [
        (0, "dy", "max_delta", -0.08, -0.05),
        (0, "droll", "max_delta", 0.4, 0.25),
    ]
    assert caplog.messages == ["clipped dy from -0.08 to -0.05 (max_delta); droll from +0.4 to +0.25 (max_delta)"]
    policy.answer[:] = 0.01
    assert limited.act("image", "go").tolist() == [0.01] * 7
    assert (limited.clipped, limited.clipped_answers, len(caplog.messages)) == ([], 1, 1)
    limited.reset()
    assert policy.episodes == 1


def test_the_end_effector_stays_in_its_workspace():
    limited = ClipAction(Says([0.04, 0.0, -0.04, 0, 0, 0, 0]), workspace=([0, -1, 0], [0.3, 1, 1]))
    action = limited.act(None, "go", position=[0.28, 0, 0.01])
    np.testing.assert_allclose(action[:3], [0.02, 0, -0.01], atol=1e-15)
    assert [(c.name, c.limit) for c in limited.clipped] == [("dx", "workspace"), ("dz", "workspace")]
    # From outside: not farther out, and no jump back in that nobody asked for.
    assert limited.act(None, "go", position=[0.5, 0, 0.5])[:3].tolist() == [0, 0, -0.04]
    assert limited.act(None, "go", position=[-0.5, 0, 0.5])[:3].tolist() == [0.04, 0, -0.04]


def test_a_chunk_is_followed_step_by_step():
    chunk = np.zeros((4, 7))
    chunk[:, 0] = 0.05
    limited = ClipAction(Says(chunk), max_delta=[0.04] + [np.inf] * 5, workspace=([0, 0, 0], [0.1, 1, 1]))
    action = limited.act(None, "go", position=[0, 0.5, 0.5])
    np.testing.assert_allclose(action[:, 0], [0.04, 0.04, 0.02, 0], atol=1e-15)
    assert [(c.step, c.limit) for c in limited.clipped] == [
        *((0, "max_delta"), (1, "max_delta")),
        *((2, "max_delta"), (2, "workspace")),
        *((3, "max_delta"), (3, "workspace")),
    ]


def test_units_of_the_simulator():
    """1 is 0.05 m: from 0.02 m below the lid, 0.4."""
    scale = ROBOT_CONVENTIONS["libero"].metres_per_unit
    limited = ClipAction(Says([0, 0, 0.9, 0, 0, 0, 1]), workspace=([-1, -1, 0], [1, 1, 1.2]), metres_per_unit=scale)
    np.testing.assert_allclose(limited.act(None, "go", position=[0, 0, 1.18])[2], 0.4, atol=1e-12)


def test_around_a_player_of_chunks():
    """The measured position counts, and a missing one costs no action."""
    chunk = np.zeros((3, 7))
    chunk[:, 0] = [0.01, 0.02, 0.03]
    limited = ClipAction(ActionChunk(Says(chunk)), workspace=([0, 0, 0], [0.1, 1, 1]))
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.01
    with pytest.raises(ValueError, match="needs position="):
        limited.act(None, "go")
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.02
    assert limited.act(None, "go", position=[0.1, 0.5, 0.5])[0] == 0
    limited.reset()
    assert limited.act(None, "go", position=[0.05, 0.5, 0.5])[0] == 0.01


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
    ],
)
def test_bad_limits(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipAction(Says([0] * 7), **settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_never_cut_to_something(bad):
    with pytest.raises(ValueError, match="must be finite"):
        ClipAction(Says([bad] + [0] * 6), max_delta=[1] * 6).act(None, "go")
    with pytest.raises(ValueError, match="three finite numbers"):
        ClipAction(Says([0] * 7), workspace=([0] * 3, [1] * 3)).act(None, "go", position=[0, 0, bad])


@pytest.mark.libero
def test_the_simulator_takes_what_is_said():
    """Measured on LIBERO's own arm: which way, how far, and what opens the gripper."""
    from openvla.simulator import make_environment, open_suite

    environment = make_environment(open_suite("libero_object"), 0, has_renderer=False, use_camera_obs=False)
    environment.reset()

    def steps(action, count):
        for _ in range(count):
            seen, *_ = environment.step(convert_action(action, "libero"))
        return seen

    fingers = [abs(steps([0] * 6 + [gripper], 20)["robot0_gripper_qpos"]).sum() for gripper in (0, 1)]
    assert fingers[1] > 0.07 > 0.01 > fingers[0]
    for direction in np.eye(3):
        goals = {}
        for size in (0.5, 1.0, 3.0):
            before = steps([0] * 6 + [1], 10)["robot0_eef_pos"]
            steps([*direction * size, 0, 0, 0, 1], 1)
            goals[size] = environment.env.robots[0].controller.goal_pos - before
        expected = direction * ROBOT_CONVENTIONS["libero"].metres_per_unit
        np.testing.assert_allclose(goals[1.0], expected, atol=5e-3)
        np.testing.assert_allclose(goals[0.5], expected / 2, atol=5e-3)
        np.testing.assert_allclose(goals[3.0], expected, atol=5e-3)  # more is cut
    environment.close()
