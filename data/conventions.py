"""Checks of conventions: dimension order, quaternions, absolute rotations, gripper direction, units, broken values.

``openvla.data.doctor`` lists all checks and decides what a finding does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from .alignment import MIN_STEPS, correlated_states, correlations, tracked_positions
from .findings import RATES, CheckInput, Finding

# A quaternion's norm is 1 up to rounding to float16.
UNIT_TOLERANCE = 2e-3
# q and -q are the same rotation; consecutive quaternions with a smaller dot product have changed their sign.
SIGN_CHANGED = -0.5
# Range of the opening of two-finger grippers in metres: at most 0.14 (Robotiq 2F-140); below 5 mm it holds nothing.
FINGER_METRES = (0.005, 0.2)
# Lags in steps: fingers need some steps to close.
FINGER_LAGS = range(6)
# Correlation of a gripper's command with its fingers: commands are step functions, fingers move slowly.
DIRECTION_CORRELATION = 0.7
# No arm moves 2 m between two frames; controllers' own units go to 1.
MAX_METRES = 2.0
# A broken value (-9999, 1e6) determines min and max; in fractal's published statistics max is 70 times q99, at 22.
OUTLIER_RATIO, OUTLIER_SIZE = 100, 100.0
# A camera with unchanged frames in this share of the moving steps does not work. A camera of 30 Hz that is read at
# 60 Hz has unchanged frames in half of them.
FROZEN_SHARE = 0.9
# Share of the range from q01 to q99; smaller movements need not be visible.
MOVING_SHARE = 0.05
_DIMENSION_NAME = re.compile(r"(?:^|[^a-z])(?:d|delta)?[^a-z]*(x|y|z|roll|pitch|yaw|gripper)(?=$|[^a-z])")
_ORDER = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def state_column(data: CheckInput) -> str:
    """Return the name of the first state column, or a description of it."""
    parts = [part for part in (data.fields.proprio if data.fields else ()) if part]
    return parts[0].partition("[")[0] if parts else "the column of the pose"


def check_absolute_rotation(data: CheckInput) -> Finding | None:
    """Return a finding if rotations are the measured angles themselves, while x, y and z are movements."""
    if not data.is_end_effector or data.tracked or not len(data.proprio) or data.is_state_named(RATES):
        return None
    if len(correlated_states(data.actions, data.proprio, (0, 1, 2))) > 1:
        return None  # the state holds velocities or the last action, also of rotations
    tracked = tracked_positions(data.actions, data.proprio, (3, 4, 5), min_count=1)
    if not tracked:
        return None
    pairs = ", ".join(f"{data.labels[i]} with proprio[{j}] ({correlation:.3f})" for i, j, correlation in tracked)
    return Finding(
        check="absolute-rotation",
        certain=len(tracked) > 1,
        evidence=f"The action's rotations are the measured angles: {pairs} correlate.",
        reason="OpenVLA's rotations are relative; a robot that adds absolute angles turns by its own orientation at "
        "every step.",
        fix=f"Set the field relabel: {state_column(data)} (a column of x y z roll pitch yaw, whose differences become "
        "the movement), or use a column of movements in action.",
    )


def check_quaternions(data: CheckInput) -> Finding | None:
    """Return a finding if four of seven numbers are a quaternion, or if a quaternion in more numbers changes sign."""
    if data.steps is None or data.steps.shape[1] < 4:
        return None
    for start in range(data.steps.shape[1] - 3):
        values = data.steps[:, start : start + 4]
        has_unit_norm = np.abs(np.linalg.norm(values, axis=1) - 1) < UNIT_TOLERANCE
        varies = (values.std(axis=0) > UNIT_TOLERANCE) & (values != np.round(values)).any(axis=0)
        if not has_unit_norm.all() or varies.sum() < 2:
            continue
        evidence = f"action[{start}:{start + 4}] is a quaternion (its norm is 1 in every step)"
        if data.is_end_effector:
            return Finding(
                check="quaternion",
                certain=True,
                evidence=f"{evidence}.",
                reason="OpenVLA's seven numbers are three translations, three rotations (rad) and a gripper.",
                fix="Use columns with these in action, or compute them with standardize.",
            )
        episodes = [episode[:, start : start + 4] for episode in data.actions]
        num_flips = int(sum(np.sum((q[1:] * q[:-1]).sum(axis=1) < SIGN_CHANGED) for q in episodes))
        if num_flips:
            return Finding(
                check="quaternion",
                certain=False,
                evidence=f"{evidence}, and its sign changes between consecutive steps {num_flips} times.",
                reason="q and -q are the same rotation, but a model that averages them learns neither.",
                fix="Give every quaternion the sign of the previous one when writing the dataset, or in standardize.",
            )
    return None


def check_dimension_order(data: CheckInput) -> Finding | None:
    """Return a finding if the dataset's names of seven dimensions are in another order than OpenVLA's."""
    columns = data.fields.action if data.fields else ()
    if len(data.q01) != len(_ORDER) or len(columns) != 1 or "[" in str(columns[0]):
        return None
    names = list(data.action_names)[-len(_ORDER) :]
    if len(data.action_names) != 1 + len(_ORDER):
        return None
    order = [matches[-1] if (matches := _DIMENSION_NAME.findall(name.lower())) else None for name in names]
    is_gripper_misplaced = order.count("gripper") == 1 and order[-1] != "gripper"
    if not is_gripper_misplaced and (set(order) != set(_ORDER) or order == list(_ORDER)):
        return None
    return Finding(
        check="dimension-order",
        certain=is_gripper_misplaced,
        evidence=f"The dataset's names of the dimensions are {names}.",
        reason="OpenVLA's order is x y z roll pitch yaw gripper: the last dimension is not normalised and is sent to "
        "the gripper.",
        fix=f"Set the field action to parts in that order: [{', '.join(_reordered_parts(order, columns[0]))}].",
    )


def _reordered_parts(order: list[str | None], column: str | None) -> list[str]:
    """Return parts ``column[a:b]`` that bring the dimensions into OpenVLA's order, consecutive ones together."""
    if set(order) != set(_ORDER):
        return [f"{column}[1:]", f"{column}[:1]"] if order[0] == "gripper" else [f"{column}[a:b]", "..."]
    ranges: list[list[int]] = []
    for position in (order.index(name) for name in _ORDER):
        if ranges and position == ranges[-1][1]:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    return [f"{column}[{start}:{stop}]" for start, stop in ranges]


def check_gripper_direction(data: CheckInput) -> Finding | None:
    """Return a finding if the fingers (the end of the state, in metres) are apart when the gripper is closed."""
    if not data.is_end_effector or not data.has_gripper or not len(data.proprio) or data.min[-1] == data.max[-1]:
        return None
    if not -0.25 <= data.min[-1] <= data.max[-1] <= 1.25:
        return None  # the check gripper-range has a finding
    for offset in (-1, -2):
        fingers = np.concatenate([state[:, offset:][:, :1] for state in data.proprio])
        widest = np.abs(fingers).max()
        if fingers.min() * fingers.max() < -1e-6 or not FINGER_METRES[0] <= widest <= FINGER_METRES[1]:
            continue
        widths = [np.abs(state[:, offset:][:, :1]) for state in data.proprio]
        tables = [correlations([e[:, -1:] for e in data.actions], widths, lag) for lag in FINGER_LAGS]
        values = [float(table[0, 0]) for table in tables if table is not None]
        if values and min(values) <= -DIRECTION_CORRELATION and max(values) < DIRECTION_CORRELATION:
            index = data.proprio[0].shape[1] + offset
            return Finding(
                check="gripper-direction",
                certain=False,
                evidence=f"gripper is high when the fingers (proprio[{index}], up to {widest:.3g}, as metres) are "
                f"together: correlation {min(values):.2f}.",
                reason="OpenVLA's gripper is 0 closed to 1 open.",
                fix="Set the field gripper: inverted (or remove the inversion) if a large finger distance means open.",
            )
    return None


def check_millimetres(data: CheckInput) -> Finding | None:
    """Return a finding if translations are too large for metres."""
    largest = np.maximum(-data.q01, data.q99)[:3]
    if not data.is_end_effector or not (largest > MAX_METRES).any():
        return None
    dimensions = np.flatnonzero(largest > MAX_METRES)
    ranges = ", ".join(f"{data.labels[i]} from {data.q01[i]:.4g} to {data.q99[i]:.4g}" for i in dimensions)
    return Finding(
        check="millimetres",
        certain=False,
        evidence=f"{ranges} (q01 to q99): more than 2 m per step if the unit is metres.",
        reason="Predicted actions have the dataset's units; a robot that takes millimetres for metres moves 1000 times "
        "too far.",
        fix="Convert the unit with standardize or when writing the dataset, or drive the robot in the dataset's units.",
    )


def check_outliers(data: CheckInput) -> Finding | None:
    """Return a finding if single values are far beyond all others."""
    usual, largest = np.maximum(-data.q01, data.q99), np.maximum(-data.min, data.max)
    broken = np.flatnonzero((largest >= OUTLIER_SIZE) & (largest > OUTLIER_RATIO * usual) & (usual > 0))
    if not len(broken):
        return None
    ranges = ", ".join(
        f"{data.labels[i]} has values up to {largest[i]:.4g}, but q01 to q99 is within {usual[i]:.4g}" for i in broken
    )
    return Finding(
        check="outliers",
        certain=False,
        evidence=f"{ranges}.",
        reason="The model is trained on these steps as the largest movement, and they alone determine min and max "
        "(normalization: bounds).",
        fix="Repair the values when writing the dataset, or leave the episodes out.",
    )


def check_rare_movement(data: CheckInput) -> Finding | None:
    """Return a finding if a dimension moves in so few steps that q01 and q99 are equal."""
    mask = np.asarray(data.statistics.get("mask", [True] * len(data.q01)), bool)
    rare = np.flatnonzero(mask & (data.q01 == data.q99) & (data.min < data.max))
    if not data.is_end_effector or not len(rare) or "q01" not in data.statistics or "min" not in data.statistics:
        return None
    ranges = ", ".join(
        f"{data.labels[i]} is {data.q01[i]:.4g} from q01 to q99, but goes from {data.min[i]:.4g} to {data.max[i]:.4g}"
        for i in rare
    )
    return Finding(
        check="rare-movement",
        certain=False,
        evidence=f"{ranges}.",
        reason="Actions are normalised by q01 and q99, so the model cannot predict this movement.",
        fix="Leave out steps without movement (drop_noops), or set normalization: bounds.",
    )


def check_frozen_frames(data: CheckInput, unchanged: Mapping[str, Sequence[bool]]) -> list[Finding]:
    """Return a finding for every camera whose frames do not change while the arm moves.

    Args:
        data: With the actions of the episodes whose frames were compared.
        unchanged: By camera: whether the next frame is equal in every pixel, for each step of each episode but its
            last.
    """
    moving = []
    value_range = data.q99 - data.q01
    for episode in data.actions:
        if data.is_end_effector:
            movement = episode - np.median(episode, axis=0)
        else:
            movement = np.diff(episode, axis=0, append=np.nan)
        moving.append((np.abs(movement) > MOVING_SHARE * value_range)[:-1, value_range > 0].any(axis=1))
    is_moving = np.concatenate(moving) if moving else np.zeros(0, bool)
    findings = []
    for camera, equal in unchanged.items():
        share = float(np.mean(np.asarray(equal)[is_moving])) if is_moving.sum() >= MIN_STEPS else 0.0
        if share >= FROZEN_SHARE:
            findings.append(
                Finding(
                    check="frozen-frames",
                    certain=False,
                    evidence=f"{camera} has the same frame again after {share:.0%} of {int(is_moving.sum())} moving "
                    "steps.",
                    reason="A model whose input is an old frame, or none, learns the mean movement.",
                    fix="Remove the camera from the field cameras, or record the data again.",
                )
            )
    return findings
