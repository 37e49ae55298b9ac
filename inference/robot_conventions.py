"""What a robot or simulator takes where OpenVLA says ``dx dy dz droll dpitch dyaw gripper``, and limits on the way.

convert_action(action, "libero")                       # the gripper's convention, by the robot's name
converter = ActionConverter("simpler_google_robot")    # one that keeps state: converter.reset() begins an episode
policy = ClipAction(policy, max_delta=[0.05] * 3 + [0.25] * 3, workspace=([0.1, -0.2, 0], [0.45, 0.25, 0.3]))
action = policy.act(image, instruction, position=end_effector)
policy.clipped                                         # what was cut of it, and by how much
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, OPEN_X_UNITS, as_numbers, nearest_name
from ..errors_openvla import OpenVLAValueError

logger = logging.getLogger(__name__)

# How far the answers of a head that is not clipped may leave 0 to 1; the bins' end at 0.996.
GRIPPER_TOLERANCE = 0.05
ACTION_DIM = len(END_EFFECTOR_DIMENSIONS)


@dataclass(frozen=True)
class RobotConvention:
    """How one robot or simulator takes an action of seven.

    Attributes:
        frame: Along which axes it moves, and how it turns.
        units: Of the seven numbers as the robot takes them.
        metres_per_unit: How far the end effector moves a control step (m) while 1 is commanded in one of the first
            three; None where only the dataset knows. It is less than ``units`` says where the controller sets its next
            goal before it has reached the last.
        radians_per_unit: How far it turns a control step (rad) while 1 is commanded in one of the next three; as above.
        convert_gripper: OpenVLA's gripper, 0 closed to 1 open, as the robot takes it; where ``sticky_steps`` is above
            0, the change since the step before, -1 opened to 1 closed.
        convert_rotation: The next three as the robot takes them, ``(..., 3)`` to ``(..., 3)``; None leaves them alone.
        sticky_steps: For how many steps a large change of the gripper is repeated (``ActionConverter``); 0 for robots
            that take the gripper's position.
    """

    frame: str
    units: tuple[str, ...]
    metres_per_unit: float | None
    radians_per_unit: float | None
    convert_gripper: Callable[[np.ndarray], np.ndarray]
    convert_rotation: Callable[[np.ndarray], np.ndarray] | None = None
    sticky_steps: int = 0


def axis_angles(euler: np.ndarray) -> np.ndarray:
    """Return rotation vectors (rad, axis times angle) of roll, pitch and yaw about fixed x, y, z axes, ``(..., 3)``.

    The angle lies in [0, 2 pi) and is not folded at pi; no rotation gives exactly 0.
    """
    half = np.asarray(euler, np.float64) / 2
    (cos_roll, cos_pitch, cos_yaw), (sin_roll, sin_pitch, sin_yaw) = (
        np.moveaxis(function(half), -1, 0) for function in (np.cos, np.sin)
    )
    cosine = cos_roll * cos_pitch * cos_yaw + sin_roll * sin_pitch * sin_yaw
    vector = np.stack(
        [
            sin_roll * cos_pitch * cos_yaw - cos_roll * sin_pitch * sin_yaw,
            cos_roll * sin_pitch * cos_yaw + sin_roll * cos_pitch * sin_yaw,
            cos_roll * cos_pitch * sin_yaw - sin_roll * sin_pitch * cos_yaw,
        ],
        axis=-1,
    )
    sine = np.linalg.norm(vector, axis=-1)
    factor = np.where(sine > 0, 2 * np.arctan2(sine, cosine) / np.where(sine > 0, sine, 1), 0.0)
    return vector * factor[..., None]


STICKY_CHANGE = 0.5  # a change of the gripper that is larger is repeated


# OpenVLA's training data has the gripper at 0 closed to 1 open, whatever the robot's own convention was
# (prismatic/vla/datasets/rlds/oxe/transforms.py); its un-normalised answers do, too.
ROBOT_CONVENTIONS: dict[str, RobotConvention] = {
    "raw": RobotConvention(
        "the dataset's own", ("dataset units",) * 6 + OPEN_X_UNITS[6:], None, None, lambda gripper: gripper
    ),
    # BridgeData V2's WidowX (bridge_data_robot): movement along the axes of the robot's base, x forward, y left, z up;
    # differences of roll, pitch and yaw. The reference sends its answers as they are
    # (experiments/robot/bridge/run_bridgev2_eval.py); the gripper's range is the environment's (widowx_env.py).
    "bridge": RobotConvention(
        "base axes (x forward, y left, z up); differences of roll, pitch, yaw",
        OPEN_X_UNITS,
        1.0,
        1.0,
        lambda gripper: np.clip(gripper, 0.0, 1.0),
    ),
    # robosuite's OSC_POSE (controllers/config/osc_pose.json: 1 is 0.05 m or 0.5 rad, more is cut to 1) along the axes
    # of the world, rotation as an axis-angle; Panda's gripper takes -1 for open and +1 for closed. The reference
    # answers sign(1 - 2 g) (experiments/robot/robot_utils.py, normalize_gripper_action and invert_gripper_action).
    # Every step sets a goal 0.05 m from where the arm is then, and the arm covers a quarter of the way before the next
    # one: a steady 1 moves 0.0126 m and turns 0.066 rad a step (measured in robosuite 1.4.0, 20 steps a second; by
    # direction 0.012 to 0.0135 m and 0.056 to 0.105 rad, less in the first two steps). Tests measure it again.
    "libero": RobotConvention(
        "world axes; rotation as an axis-angle about them",
        ("0.05 m",) * 3 + ("0.5 rad",) * 3 + ("-1 open, +1 closed",),
        0.0126,
        0.066,
        lambda gripper: np.where(gripper > 0.5, -1.0, 1.0),
    ),
    # SimplerEnv's two robots as its own OpenVLA policy sends them their actions
    # (simpler_env/policies/openvla/openvla_model.py): rotations as axis-angles in place of roll, pitch, yaw.
    "simpler_widowx": RobotConvention(
        "base axes; rotation as an axis-angle about them",
        ("m",) * 3 + ("rad",) * 3 + ("-1 closed, +1 open",),
        1.0,
        1.0,
        lambda gripper: np.where(gripper > 0.5, 1.0, -1.0),
        axis_angles,
    ),
    # Its gripper takes changes: 0 leaves it as it is. One that is larger than a half is repeated for 15 steps, in which
    # others are ignored.
    "simpler_google_robot": RobotConvention(
        "base axes; rotation as an axis-angle about them",
        ("m",) * 3 + ("rad",) * 3 + ("change, -1 opens, +1 closes",),
        1.0,
        1.0,
        lambda change: change,
        axis_angles,
        sticky_steps=15,
    ),
}


def robot_convention(name: str) -> RobotConvention:
    """The convention of a robot.

    Raises:
        ValueError: It is unknown; the message names the nearest and all known ones.
    """
    if name not in ROBOT_CONVENTIONS:
        near = nearest_name(name, list(ROBOT_CONVENTIONS))
        hint = f" Did you mean {near!r}?" if near else ""
        raise OpenVLAValueError(f"Unknown robot convention {name!r}.{hint} Allowed: {list(ROBOT_CONVENTIONS)}.")
    return ROBOT_CONVENTIONS[name]


def convert_action(action: np.ndarray | Sequence[Any], convention: str) -> np.ndarray:
    """Return an action, or a chunk, of OpenVLA as a robot takes it: the gripper and rotations in its convention.

    Args:
        action: ``(7,)`` or ``(chunk, 7)``, as ``predict_action`` gives it.
        convention: A key of ``ROBOT_CONVENTIONS``.

    Returns:
        float64 of the same shape, a copy; movements are unchanged.

    Raises:
        ValueError: The convention is unknown or needs ``ActionConverter``, it is no action of seven, not finite, or its
            gripper is not in [0, 1] (by more than ``GRIPPER_TOLERANCE``).
    """
    if robot_convention(convention).sticky_steps:
        raise OpenVLAValueError(
            f"The gripper of {convention!r} takes changes, which depend on the episode's earlier actions; take "
            f"ActionConverter({convention!r}), call its convert() once a control step, and its reset() when an episode "
            "begins."
        )
    return _converted(action, robot_convention(convention))


def _converted(action: Any, convention: RobotConvention) -> np.ndarray:
    """Return a checked copy as the robot takes it; a sticky gripper's position stays."""
    action = _checked_actions(action).copy()
    _require_gripper(action[..., -1])
    if convention.convert_rotation is not None:
        action[..., 3:6] = convention.convert_rotation(action[..., 3:6])
    if not convention.sticky_steps:
        action[..., -1] = convention.convert_gripper(action[..., -1])
    return action


class ActionConverter:
    """One episode's actions as a robot takes them: ``convert_action`` that remembers what a sticky gripper needs.

    A sticky gripper takes the change of OpenVLA's gripper since the step before, and one that is larger than a half is
    repeated for ``sticky_steps`` steps, so that the fingers arrive. That is state: one converter a robot, one call a
    control step, in the order in which actions are played (after an ``ActionQueue``, not before it), and ``reset`` when
    an episode begins. Other conventions keep no state and are converted as ``convert_action`` does.

        converter = ActionConverter("simpler_google_robot")
        converter.reset()                                      # every episode
        command = converter.convert(player.act(image, instruction))    # every control step

    Args:
        convention: A key of ``ROBOT_CONVENTIONS``.

    Raises:
        ValueError: The convention is unknown.
    """

    def __init__(self, convention: str) -> None:
        self.convention = robot_convention(convention)
        self.reset()

    def reset(self) -> None:
        """Begin an episode: the next action's gripper is no change, and none is repeated."""
        self._position: float | None = None  # of the gripper, a step before
        self._repeated: float = 0.0
        self._steps_left = 0

    def convert(self, action: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Return the action of this step as the robot takes it.

        Args:
            action: ``(7,)``; or ``(chunk, 7)``, all of which is then played, one row a step.

        Returns:
            float64 of the same shape, a copy.

        Raises:
            ValueError: It is no action of seven, or not finite; the state is then unchanged.
        """
        action = _converted(action, self.convention)
        if self.convention.sticky_steps:
            for row in np.atleast_2d(action):  # a view
                row[-1] = self.convention.convert_gripper(self._sticky(float(row[-1])))
        return action

    def _sticky(self, position: float) -> float:
        """Return the change to command for the gripper's next position."""
        change = 0.0 if self._position is None else self._position - position
        self._position = position
        if not self._steps_left and abs(change) > STICKY_CHANGE:
            self._repeated, self._steps_left = change, self.convention.sticky_steps
        if self._steps_left:
            self._steps_left -= 1
            return self._repeated
        return change


@dataclass(frozen=True)
class Clip:
    """One number that was cut.

    Attributes:
        step: Of the chunk; 0 for a single action.
        name: Of the dimension, such as "dx".
        limit: "max_delta" or "workspace".
        asked: What it was, in the policy's units.
        given: What it became.
    """

    step: int
    name: str
    limit: str
    asked: float
    given: float


class ClipAction:
    """A policy whose movements stay within limits: what exceeds them is cut, and said each time.

    Around anything that acts: a ``Policy``, an ``ActionQueue``, a client of a policy server. A chunk is cut as if the
    arm followed it: every step's position is the one before plus what was given. With ``ActionQueue``, put it outside,
    where it sees the measured position every step. It is no substitute for the limits of the robot's own controller:
    it does not know where the arm's other links are, nor how far the arm goes on after a last command (LIBERO's: 0.012
    to 0.03 m from full speed), by which the workspace should lie within what is solid.

    Args:
        policy: Its ``act(image, instruction, proprio)`` gives ``(7,)`` or ``(chunk, 7)``: movements, then a gripper,
            which is left alone.
        max_delta: Largest movement a step of each of dx dy dz droll dpitch dyaw, either way, in the policy's units;
            infinity for no limit. None limits none.
        workspace: ``(low, high)``, the corners (m) of the box that the end effector stays in, along the axes that the
            policy moves along. ``act`` then needs ``position``. From outside of it, it may only go towards it.
        metres_per_unit: How far 1 in dx, dy, dz moves the end effector a control step (m); 1.0 for policies in metres,
            ``ROBOT_CONVENTIONS["libero"].metres_per_unit`` for LIBERO's. What the arm does, not the controller's goal
            (0.05 m there): from that, a chunk's path is forecast four times too long.

    Attributes:
        clipped: What was cut of the last answer, a list of :class:`Clip`; empty where nothing was.
        clipped_answers: How many answers something was cut of.

    Raises:
        ValueError: A limit is no number or out of range.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_delta: Sequence[float] | None = None,
        workspace: tuple[Sequence[float], Sequence[float]] | None = None,
        metres_per_unit: float = 1.0,
    ) -> None:
        if max_delta is None and workspace is None:
            raise OpenVLAValueError(
                "ClipAction needs max_delta, workspace or both; without them it would limit nothing."
            )
        self.max_delta = np.full(6, np.inf) if max_delta is None else as_numbers(max_delta, "max_delta")
        if self.max_delta.shape != (6,) or not (self.max_delta >= 0).all():
            raise OpenVLAValueError(
                f"max_delta must hold six numbers, 0 or more, for {' '.join(END_EFFECTOR_DIMENSIONS[:6])}, "
                f"got {max_delta!r}."
            )
        if not (np.isfinite(metres_per_unit) and metres_per_unit > 0):
            raise OpenVLAValueError(f"metres_per_unit must be above 0, got {metres_per_unit!r}.")
        if workspace is None and metres_per_unit != 1.0:
            raise OpenVLAValueError(
                f"metres_per_unit={metres_per_unit!r} is for a workspace; leave it out, or give one."
            )
        self.workspace = None if workspace is None else as_numbers(workspace, "workspace")
        if workspace is not None and (
            self.workspace.shape != (2, 3) or not np.all(self.workspace[0] < self.workspace[1])
        ):
            raise OpenVLAValueError(
                f"workspace must be (low, high), each x y z with low below high, got {workspace!r}."
            )
        self.policy, self.metres_per_unit = policy, float(metres_per_unit)
        self.clipped: list[Clip] = []
        self.clipped_answers = 0

    def act(self, image: Any, instruction: str, proprio: Any = None, *, position: Any = None) -> np.ndarray:
        """The policy's next action or chunk, within the limits.

        Args:
            image: As the policy takes it.
            instruction: What the robot should do.
            proprio: As the policy takes it.
            position: Where the end effector is now, x y z (m); needed for ``workspace``.

        Returns:
            float64 ``(7,)`` or ``(chunk, 7)``, the policy's units.

        Raises:
            ValueError: The answer is no action of seven or not finite, or ``position`` is missing, not finite, or of no
                use.
        """
        # Before the policy is asked: an ActionQueue would lose an action.
        position = self._checked_position(position)
        return self.clip(self.policy.act(image, instruction, proprio), position)

    def clip(self, action: np.ndarray | Sequence[Any], position: Any = None) -> np.ndarray:
        """An action or chunk within the limits; as ``act``, for one that is already there."""
        asked = _checked_actions(action)
        steps = np.atleast_2d(asked).copy()
        position = self._checked_position(position)
        self.clipped = []
        for index, step in enumerate(steps):
            self._cut(index, step, "max_delta", -self.max_delta, self.max_delta)
            if position is not None:
                low, high = (self.workspace - position) / self.metres_per_unit
                # From outside, 0 is the least way out; going in is not forced.
                self._cut(index, step, "workspace", np.minimum(low, 0), np.maximum(high, 0))
                position = position + step[:3] * self.metres_per_unit
        if self.clipped:
            self.clipped_answers += 1
            logger.warning("clipped %s", "; ".join(map(_said, self.clipped)))
        return steps.reshape(asked.shape)

    def reset(self) -> None:
        """Begin an episode."""
        self.clipped = []
        self.policy.reset()

    def _checked_position(self, position: Any) -> np.ndarray | None:
        if self.workspace is not None:
            return _checked_position(position)
        if position is not None:
            raise OpenVLAValueError("position is for a workspace, and none was given; leave it out, or give workspace.")
        return None

    def _cut(self, index: int, step: np.ndarray, limit: str, low: np.ndarray, high: np.ndarray) -> None:
        """Cut the first dimensions of a step in place, and note it."""
        asked = step[: len(low)].copy()
        step[: len(low)] = given = np.clip(asked, low, high)
        for dimension in np.flatnonzero(given != asked):
            name = END_EFFECTOR_DIMENSIONS[dimension]
            self.clipped.append(Clip(index, name, limit, float(asked[dimension]), float(given[dimension])))


def _said(clip: Clip) -> str:
    where = f"step {clip.step} " if clip.step else ""
    return f"{where}{clip.name} from {clip.asked:+.4g} to {clip.given:+.4g} ({clip.limit})"


def _checked_actions(action: Any) -> np.ndarray:
    """float64 ``(7,)`` or ``(chunk, 7)``, finite."""
    action = as_numbers(action, "An action")
    if action.ndim not in (1, 2) or action.shape[-1] != ACTION_DIM or action.size == 0:
        raise OpenVLAValueError(
            f"An action must have shape ({ACTION_DIM},) or (chunk, {ACTION_DIM}): {' '.join(END_EFFECTOR_DIMENSIONS)}; "
            f"got {action.shape}."
        )
    if not np.isfinite(action).all():
        raise OpenVLAValueError(f"An action must be finite, got {action.tolist()}: stop the robot.")
    return action


def _require_gripper(gripper: np.ndarray) -> None:
    """Raise ValueError where a gripper is not OpenVLA's 0 closed to 1 open, and would be taken for open or closed."""
    low, high = float(gripper.min()), float(gripper.max())
    if low < -GRIPPER_TOLERANCE or high > 1 + GRIPPER_TOLERANCE:
        raise OpenVLAValueError(
            f"The gripper must be in [0, 1], 0 closed and 1 open, got {low if low < 0 else high:g}: stop the robot. "
            "The policy was trained on another convention; openvla inspect-data on its checkpoint says which field of "
            "the data mends it (gripper or gripper_range)."
        )


def _checked_position(position: Any) -> np.ndarray:
    """float64 ``(3,)``, finite."""
    if position is None:
        raise OpenVLAValueError("The workspace needs position=, where the end effector is now: x y z (m).")
    position = as_numbers(position, "position")
    if position.shape != (3,) or not np.isfinite(position).all():
        raise OpenVLAValueError(f"position must be three finite numbers, x y z (m), got {position.tolist()}.")
    return position
