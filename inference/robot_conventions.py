"""Conversion of OpenVLA's seven action numbers to a robot's or simulator's convention, and limits on actions.

convert_action(action, "libero")                       # converts the gripper by the name of the convention
converter = ActionConverter("simpler_google_robot")    # a convention with state: converter.reset() begins an episode
policy = ClipAction(policy, max_delta=[0.05] * 3 + [0.25] * 3, workspace=([0.1, -0.2, 0], [0.45, 0.25, 0.3]))
action = policy.act(image, instruction, position=end_effector)
policy.clipped                                         # the numbers that were clipped, before and after
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..actions_openvla import as_numbers, nearest_name
from ..dimension_labels import END_EFFECTOR_DIMENSIONS, OPEN_X_UNITS
from ..errors_openvla import OpenVLAValueError
from .action_queue import ActingPolicy

logger = logging.getLogger(__name__)

# Grippers leave [0, 1] by less than this: Bridge's measured ones reach 1.12, those of an L1 head 1.07 (LIBERO-PRO), and
# the reference sends them on. One of another convention, such as -1 to 1, goes further.
GRIPPER_OVERSHOOT = 0.25
ACTION_DIM = len(END_EFFECTOR_DIMENSIONS)
STICKY_CHANGE = 0.5  # a larger change of a sticky gripper is repeated


@dataclass(frozen=True)
class RobotConvention:
    """Action convention of one robot or simulator.

    Attributes:
        frame: Axes of the translation, and representation of the rotation.
        units: Units of the seven numbers as the robot takes them.
        metres_per_unit: Distance (m) that the end effector moves per control step while one of the first three numbers
            is 1; None if it depends on the dataset. It is less than ``units`` says where the controller sets the next
            goal before the arm reaches the last one.
        radians_per_unit: Angle (rad) that the end effector turns per control step while one of the next three numbers
            is 1; None as above.
        convert_gripper: Maps OpenVLA's gripper (0 closed, 1 open) to the robot's; if ``sticky_steps`` > 0, maps the
            change since the previous step (-1 opened, 1 closed).
        convert_rotation: Maps the three rotation numbers, ``(..., 3)`` to ``(..., 3)``; None leaves them unchanged.
        sticky_steps: Number of steps for which a large change of the gripper is repeated (``ActionConverter``); 0 for
            robots that take the gripper's position.
    """

    frame: str
    units: tuple[str, ...]
    metres_per_unit: float | None
    radians_per_unit: float | None
    convert_gripper: Callable[[np.ndarray], np.ndarray]
    convert_rotation: Callable[[np.ndarray], np.ndarray] | None = None
    sticky_steps: int = 0


def euler_to_axis_angle(euler: np.ndarray) -> np.ndarray:
    """Convert roll, pitch, yaw (rad, about fixed x, y, z axes) to rotation vectors (axis times angle, rad).

    Args:
        euler: float ``(..., 3)``.

    Returns:
        float64 ``(..., 3)``. The angle is in [0, 2 pi), not wrapped at pi; no rotation gives exactly 0.
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


# OpenVLA's training data has the gripper at 0 closed to 1 open, whatever the robot's convention was
# (prismatic/vla/datasets/rlds/oxe/transforms.py); so do un-normalised predictions.
ROBOT_CONVENTIONS: dict[str, RobotConvention] = {
    "raw": RobotConvention(
        frame="as in the dataset",
        units=("dataset units",) * 6 + OPEN_X_UNITS[6:],
        metres_per_unit=None,
        radians_per_unit=None,
        convert_gripper=lambda gripper: gripper,
    ),
    # BridgeData V2's WidowX (bridge_data_robot): translation along the axes of the robot's base, x forward, y left, z
    # up; differences of roll, pitch and yaw. The reference sends its actions unchanged
    # (experiments/robot/bridge/run_bridgev2_eval.py); the gripper's range is the environment's (widowx_env.py).
    "bridge": RobotConvention(
        frame="base axes (x forward, y left, z up); differences of roll, pitch, yaw",
        units=OPEN_X_UNITS,
        metres_per_unit=1.0,
        radians_per_unit=1.0,
        convert_gripper=lambda gripper: np.clip(gripper, 0.0, 1.0),
    ),
    # robosuite's OSC_POSE (controllers/config/osc_pose.json: 1 is 0.05 m or 0.5 rad, larger values are clipped to 1)
    # along the axes of the world, rotation as an axis-angle; Panda's gripper takes -1 for open and +1 for closed. The
    # reference sends sign(1 - 2 g) (experiments/robot/robot_utils.py, normalize_gripper_action and
    # invert_gripper_action). Every step sets a goal 0.05 m from the arm's current position, and the arm covers a
    # quarter of the distance before the next goal: a constant 1 moves 0.0126 m and turns 0.066 rad per step (measured
    # in robosuite 1.4.0 at 20 Hz; by direction 0.012 to 0.0135 m and 0.056 to 0.105 rad, less in the first two steps).
    # Tests repeat the measurement.
    "libero": RobotConvention(
        frame="world axes; rotation as an axis-angle about them",
        units=("0.05 m",) * 3 + ("0.5 rad",) * 3 + ("-1 open, +1 closed",),
        metres_per_unit=0.0126,
        radians_per_unit=0.066,
        convert_gripper=lambda gripper: np.where(gripper > 0.5, -1.0, 1.0),
    ),
    # SimplerEnv's two robots, as its OpenVLA policy converts the actions
    # (simpler_env/policies/openvla/openvla_model.py): rotations as axis-angles instead of roll, pitch, yaw.
    "simpler_widowx": RobotConvention(
        frame="base axes; rotation as an axis-angle about them",
        units=("m",) * 3 + ("rad",) * 3 + ("-1 closed, +1 open",),
        metres_per_unit=1.0,
        radians_per_unit=1.0,
        convert_gripper=lambda gripper: np.where(gripper > 0.5, 1.0, -1.0),
        convert_rotation=euler_to_axis_angle,
    ),
    # The Google Robot's gripper takes changes: 0 keeps its position. A change larger than a half is repeated for 15
    # steps, during which other changes are ignored.
    "simpler_google_robot": RobotConvention(
        frame="base axes; rotation as an axis-angle about them",
        units=("m",) * 3 + ("rad",) * 3 + ("change, -1 opens, +1 closes",),
        metres_per_unit=1.0,
        radians_per_unit=1.0,
        convert_gripper=lambda change: change,
        convert_rotation=euler_to_axis_angle,
        sticky_steps=15,
    ),
}


def robot_convention(name: str) -> RobotConvention:
    """Return the convention of that name.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    if name not in ROBOT_CONVENTIONS:
        near = nearest_name(name, list(ROBOT_CONVENTIONS))
        hint = f" Did you mean {near!r}?" if near else ""
        raise OpenVLAValueError(f"Unknown robot convention {name!r}.{hint} Allowed: {list(ROBOT_CONVENTIONS)}.")
    return ROBOT_CONVENTIONS[name]


def convert_action(action: np.ndarray | Sequence[Any], convention: str) -> np.ndarray:
    """Convert the gripper and the rotation of an action or chunk to a robot's convention.

    Args:
        action: ``(7,)`` or ``(chunk, 7)`` as ``predict_action`` returns it.
        convention: A key of ``ROBOT_CONVENTIONS``.

    Returns:
        float64 copy of the same shape; the translation is unchanged.

    Raises:
        ValueError: The convention is unknown or needs ``ActionConverter``, the action has another shape or is not
            finite, or its gripper is outside [0, 1] by more than ``GRIPPER_OVERSHOOT``.
    """
    if robot_convention(convention).sticky_steps:
        raise OpenVLAValueError(
            f"The gripper of {convention!r} takes changes, which depend on the episode's earlier actions; use "
            f"ActionConverter({convention!r}), call its convert() once per control step, and its reset() when an "
            "episode begins."
        )
    return _convert(action, robot_convention(convention))


def _convert(action: Any, convention: RobotConvention) -> np.ndarray:
    """Return a validated copy in the robot's convention; a sticky gripper keeps its position."""
    action = _validate_action(action).copy()
    _require_gripper_range(action[..., -1])
    if convention.convert_rotation is not None:
        action[..., 3:6] = convention.convert_rotation(action[..., 3:6])
    if not convention.sticky_steps:
        action[..., -1] = convention.convert_gripper(action[..., -1])
    return action


class ActionConverter:
    """``convert_action`` with the state that a sticky gripper needs during an episode.

    A sticky gripper takes the change of OpenVLA's gripper since the previous step, and a change larger than
    ``STICKY_CHANGE`` is repeated for ``sticky_steps`` steps, so that the fingers arrive. Use one converter per robot,
    call ``convert`` once per control step in the order of execution (after an ``ActionQueue``, not before it), and call
    ``reset`` when an episode begins. Other conventions have no state and are converted as by ``convert_action``.

        converter = ActionConverter("simpler_google_robot")
        converter.reset()                                             # every episode
        command = converter.convert(queue.act(image, instruction))    # every control step

    Args:
        convention: A key of ``ROBOT_CONVENTIONS``.

    Raises:
        ValueError: The convention is unknown.
    """

    def __init__(self, convention: str) -> None:
        self.convention = robot_convention(convention)
        self.reset()

    def reset(self) -> None:
        """Begin an episode: the first action's gripper is no change, and no change is being repeated."""
        self._previous_position: float | None = None
        self._repeated_change = 0.0
        self._repeats_left = 0

    def convert(self, action: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Return the action of the current step in the robot's convention.

        Args:
            action: ``(7,)``, or ``(chunk, 7)`` if all its actions are executed, one per step.

        Returns:
            float64 copy of the same shape.

        Raises:
            ValueError: The action has another shape or is not finite; the state is then unchanged.
        """
        action = _convert(action, self.convention)
        if self.convention.sticky_steps:
            for step in np.atleast_2d(action):  # a view
                change = np.asarray(self._sticky_change(float(step[-1])))
                step[-1] = self.convention.convert_gripper(change)
        return action

    def _sticky_change(self, position: float) -> float:
        """Return the change to command for the gripper's new position."""
        change = 0.0 if self._previous_position is None else self._previous_position - position
        self._previous_position = position
        if not self._repeats_left and abs(change) > STICKY_CHANGE:
            self._repeated_change, self._repeats_left = change, self.convention.sticky_steps
        if self._repeats_left:
            self._repeats_left -= 1
            return self._repeated_change
        return change


@dataclass(frozen=True)
class Clip:
    """One number that was clipped.

    Attributes:
        step: Index in the chunk; 0 for a single action.
        name: Name of the dimension, such as "dx".
        limit: "max_delta" or "workspace".
        original: Value before clipping, in the policy's units.
        clipped: Value after clipping.
    """

    step: int
    name: str
    limit: str
    original: float
    clipped: float


class EpisodicPolicy(ActingPolicy, Protocol):
    """A policy that is told when an episode begins."""

    def reset(self) -> Any:
        """Begin an episode."""
        ...


class ClipAction:
    """Policy wrapper that clips movements to limits and logs a warning for each clipped action.

    Wraps anything with ``act``: a ``Policy``, an ``ActionQueue``, a ``PolicyClient``. A chunk is clipped as if the arm
    followed it: the position at every step is the previous position plus the clipped movement. Wrap an ``ActionQueue``
    rather than its policy, so that every action is clipped with the measured position. This does not replace the limits
    of the robot's controller: it does not know where the other links of the arm are, nor how far the arm coasts after
    the last command (LIBERO: 0.012 to 0.03 m from full speed); keep the workspace that far from obstacles.

    Args:
        policy: ``policy.act(image, instruction, proprio)`` returns ``(7,)`` or ``(chunk, 7)``. The gripper, its last
            number, is not clipped.
        max_delta: Largest absolute movement per step in dx dy dz droll dpitch dyaw, in the policy's units; infinity for
            no limit. None limits nothing.
        workspace: ``(low, high)`` corners (m) of the box that the end effector must stay in, along the axes of the
            policy's movements. ``act`` then needs ``position``. Outside the box only movements towards it are allowed.
        metres_per_unit: Distance (m) that the end effector moves per control step while dx, dy or dz is 1; 1.0 for
            policies in metres, ``ROBOT_CONVENTIONS["libero"].metres_per_unit`` for LIBERO. This is the movement of the
            arm, not the controller's goal (0.05 m in LIBERO, which would predict a chunk's path four times too long).

    Attributes:
        clipped: The numbers that were clipped in the last action or chunk, a list of :class:`Clip`.
        num_clipped_actions: Number of actions or chunks in which something was clipped.

    Raises:
        ValueError: A limit is not numeric or out of range.
    """

    def __init__(
        self,
        policy: EpisodicPolicy,
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
        self.workspace = None if workspace is None else _validate_workspace(workspace)
        self.policy, self.metres_per_unit = policy, float(metres_per_unit)
        self.clipped: list[Clip] = []
        self.num_clipped_actions = 0

    def act(self, image: Any, instruction: str, proprio: Any = None, *, position: Any = None) -> np.ndarray:
        """Return the policy's next action or chunk, clipped to the limits.

        Args:
            image: See ``policy.act``.
            instruction: Instruction for the robot.
            proprio: See ``policy.act``.
            position: Current position x y z (m) of the end effector; required with ``workspace``.

        Returns:
            float64 ``(7,)`` or ``(chunk, 7)`` in the policy's units.

        Raises:
            ValueError: The policy's action has another shape or is not finite, or ``position`` is missing, not finite,
                or given without ``workspace``.
        """
        # Before the policy is called: an ActionQueue would lose an action.
        position = self._validate_position(position)
        return self.clip(self.policy.act(image, instruction, proprio), position)

    def clip(self, action: np.ndarray | Sequence[Any], position: Any = None) -> np.ndarray:
        """Return an action or chunk clipped to the limits; arguments and errors as in ``act``."""
        original = _validate_action(action)
        steps = np.atleast_2d(original).copy()
        position = self._validate_position(position)
        self.clipped = []
        for index, step in enumerate(steps):
            self._clip_step(index, step, limit="max_delta", low=-self.max_delta, high=self.max_delta)
            if self.workspace is not None:
                low, high = (self.workspace - position) / self.metres_per_unit
                # Outside the box, moving farther out is not allowed; moving in is not forced.
                self._clip_step(index, step, limit="workspace", low=np.minimum(low, 0), high=np.maximum(high, 0))
                position = position + step[:3] * self.metres_per_unit
        if self.clipped:
            self.num_clipped_actions += 1
            logger.warning("clipped %s", "; ".join(map(_format_clip, self.clipped)))
        return steps.reshape(original.shape)

    def reset(self) -> None:
        """Begin an episode."""
        self.clipped = []
        self.policy.reset()

    def _validate_position(self, position: Any) -> np.ndarray | None:
        """Return float64 ``(3,)``, or None without ``workspace``."""
        if self.workspace is None:
            if position is not None:
                raise OpenVLAValueError(
                    "position is for a workspace, and none was given; leave it out, or give workspace."
                )
            return None
        if position is None:
            raise OpenVLAValueError("The workspace needs position=, where the end effector is now: x y z (m).")
        position = as_numbers(position, "position")
        if position.shape != (3,) or not np.isfinite(position).all():
            raise OpenVLAValueError(f"position must be three finite numbers, x y z (m), got {position.tolist()}.")
        return position

    def _clip_step(self, index: int, step: np.ndarray, *, limit: str, low: np.ndarray, high: np.ndarray) -> None:
        """Clip the first dimensions of a step in place, and record it in ``clipped``."""
        original = step[: len(low)].copy()
        step[: len(low)] = clipped = np.clip(original, low, high)
        for dimension in np.flatnonzero(clipped != original):
            name = END_EFFECTOR_DIMENSIONS[dimension]
            self.clipped.append(Clip(index, name, limit, float(original[dimension]), float(clipped[dimension])))


def _format_clip(clip: Clip) -> str:
    prefix = f"step {clip.step} " if clip.step else ""
    return f"{prefix}{clip.name} from {clip.original:+.4g} to {clip.clipped:+.4g} ({clip.limit})"


def _validate_workspace(workspace: Any) -> np.ndarray:
    """Return the corners as float64 ``(2, 3)``, low below high."""
    corners = as_numbers(workspace, "workspace")
    if corners.shape != (2, 3) or not np.all(corners[0] < corners[1]):
        raise OpenVLAValueError(f"workspace must be (low, high), each x y z with low below high, got {workspace!r}.")
    return corners


def _validate_action(action: Any) -> np.ndarray:
    """Return a finite action, float64 ``(7,)`` or ``(chunk, 7)``."""
    action = as_numbers(action, "An action")
    if action.ndim not in (1, 2) or action.shape[-1] != ACTION_DIM or action.size == 0:
        raise OpenVLAValueError(
            f"An action must have shape ({ACTION_DIM},) or (chunk, {ACTION_DIM}): {' '.join(END_EFFECTOR_DIMENSIONS)}; "
            f"got {action.shape}."
        )
    if not np.isfinite(action).all():
        raise OpenVLAValueError(f"An action must be finite, got {action.tolist()}: stop the robot.")
    return action


def _require_gripper_range(gripper: np.ndarray) -> None:
    """Raise if a gripper is not in OpenVLA's convention, 0 closed to 1 open."""
    low, high = float(gripper.min()), float(gripper.max())
    if low < -GRIPPER_OVERSHOOT or high > 1 + GRIPPER_OVERSHOOT:
        raise OpenVLAValueError(
            f"The gripper must be in [0, 1], 0 closed and 1 open, got {low if low < 0 else high:g}: stop the robot. "
            "The policy was trained with another convention; openvla inspect-data on its checkpoint says which field "
            "of the data to change (gripper or gripper_range)."
        )
