"""Checks of what action dimensions stand for: their order, quaternions, absolute rotations, which way a gripper opens.

Beside ``data_doctor``, which lists them and says what a finding does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from .alignment import FEWEST_STEPS, correlations, state_partners, tracked_positions
from .findings import RATES, Finding, Recording

# A quaternion's length is 1 but for rounding to float16.
UNIT_TOLERANCE = 2e-3
# q and -q are one rotation; neighbours whose product is below this have changed sign.
SIGN_CHANGED = -0.5
# Grippers open to 0.14 m at most (Robotiq 2F-140); fingers that move less than 5 mm hold nothing.
FINGER_METRES = (0.005, 0.2)
# A finger needs some steps to close.
FINGER_LAGS = range(6)
# How well a gripper's command goes with its fingers: commands are steps, fingers move slowly.
DIRECTION_CORRELATION = 0.7
# No arm moves by 2 m between two frames; controllers' own units go to 1.
MOST_METRES = 2.0
# One broken value (-9999, 1e6) decides over min and max; fractal's published ones are 70 times q99, and 22.
OUTLIER_RATIO, OUTLIER_SIZE = 100, 100.0
# Frames that stand still in so many of the steps in which the arm moves come from no working camera. Half of them
# do where a camera of 30 Hz is read at 60.
FROZEN_SHARE = 0.9
# Of q01 to q99: smaller movements need not show in a picture.
MOVING_SHARE = 0.05
_DIMENSION = re.compile(r"(?:^|[^a-z])(?:d|delta)?[^a-z]*(x|y|z|roll|pitch|yaw|gripper)(?=$|[^a-z])")
_ORDER = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def state_column(data: Recording) -> str:
    """Return the first column of the state, as a field names it, or words for it."""
    parts = [part for part in (data.fields.proprio if data.fields else ()) if part]
    return parts[0].partition("[")[0] if parts else "the column of the pose"


def absolute_rotation(data: Recording) -> Finding | None:
    """Return a finding where rotations are the measured angles themselves, beside movements in x y z."""
    if not data.end_effector or data.tracked or not len(data.proprio) or data.state_of(RATES):
        return None
    if len(state_partners(data.actions, data.proprio, (0, 1, 2))) > 1:
        return None  # no positions: the state holds speeds or the last action, of rotations too
    tracked = tracked_positions(data.actions, data.proprio, (3, 4, 5), fewest=1)
    if not tracked:
        return None
    said = ", ".join(f"{data.labels[i]} with proprio[{j}] ({r:.3f})" for i, j, r in tracked)
    return Finding(
        "absolute-rotation",
        len(tracked) > 1,
        f"The action holds the measured angle itself: {said} correlate.",
        "OpenVLA's rotations are movements; a robot that adds them turns by its own orientation at every step.",
        f"Give the field relabel: {state_column(data)} (a column of x y z roll pitch yaw, whose differences become the "
        "movement), or a column of movements in action.",
    )


def quaternions(data: Recording) -> Finding | None:
    """Return a finding where four of seven numbers are a quaternion, or where one of more numbers changes sign."""
    if data.steps is None or data.steps.shape[1] < 4:
        return None
    for start in range(data.steps.shape[1] - 3):
        four = data.steps[:, start : start + 4]
        unit = np.abs(np.linalg.norm(four, axis=1) - 1) < UNIT_TOLERANCE
        turning = (four.std(axis=0) > UNIT_TOLERANCE) & (four != np.round(four)).any(axis=0)
        if not unit.all() or turning.sum() < 2:
            continue
        names = f"action[{start}:{start + 4}] is a quaternion (its length is 1 in every step)"
        if data.end_effector:
            return Finding(
                "quaternion",
                True,
                f"{names}.",
                "OpenVLA's seven numbers are three movements, three rotations (rad) and a gripper.",
                "Give columns of these in action, or make them with standardize.",
            )
        both = [episode[:, start : start + 4] for episode in data.actions]
        flips = int(sum(np.sum((one[1:] * one[:-1]).sum(axis=1) < SIGN_CHANGED) for one in both))
        if flips:
            return Finding(
                "quaternion",
                False,
                f"{names} whose sign changes between neighbouring steps {flips} times.",
                "q and -q are one rotation: their mean, which a model learns, is none.",
                "Give every quaternion the sign of the one before it where the dataset is written, or in standardize.",
            )
    return None


def dimension_order(data: Recording) -> Finding | None:
    """Return a finding where the dataset's own names of seven dimensions stand in another order than OpenVLA's."""
    columns = data.fields.action if data.fields else ()
    if len(data.low) != len(_ORDER) or len(columns) != 1 or "[" in str(columns[0]):
        return None
    names = list(data.names)[-len(_ORDER) :]
    if len(data.names) != 1 + len(_ORDER):
        return None
    said = [found[-1] if (found := _DIMENSION.findall(name.lower())) else None for name in names]
    gripper_elsewhere = said.count("gripper") == 1 and said[-1] != "gripper"
    if not gripper_elsewhere and (set(said) != set(_ORDER) or said == list(_ORDER)):
        return None
    return Finding(
        "dimension-order",
        gripper_elsewhere,
        f"The dataset names its dimensions {names}.",
        "OpenVLA's are x y z roll pitch yaw gripper: the last is not normalised, and is sent to the gripper.",
        f"Give the field action in that order, by parts: [{', '.join(_parts(said, columns[0]))}].",
    )


def _parts(said: list[str | None], column: str | None) -> list[str]:
    if set(said) != set(_ORDER):
        return [f"{column}[1:]", f"{column}[:1]"] if said[0] == "gripper" else [f"{column}[a:b]", "..."]
    places = [said.index(name) for name in _ORDER]
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return [f"{column}[{start}:{stop}]" for start, stop in runs]


def gripper_direction(data: Recording) -> Finding | None:
    """Return a finding where the fingers, in metres at the end of the state, are open when the gripper is closed."""
    if not data.end_effector or not data.gripper_named or not len(data.proprio) or data.least[-1] == data.most[-1]:
        return None
    if not -0.25 <= data.least[-1] <= data.most[-1] <= 1.25:
        return None  # gripper-range says so
    for place in (-1, -2):
        fingers = np.concatenate([state[:, place:][:, :1] for state in data.proprio])
        widest = np.abs(fingers).max()
        if fingers.min() * fingers.max() < -1e-6 or not FINGER_METRES[0] <= widest <= FINGER_METRES[1]:
            continue
        widths = [np.abs(state[:, place:][:, :1]) for state in data.proprio]
        tables = [correlations([e[:, -1:] for e in data.actions], widths, lag) for lag in FINGER_LAGS]
        values = [float(table[0, 0]) for table in tables if table is not None]
        if values and min(values) <= -DIRECTION_CORRELATION and max(values) < DIRECTION_CORRELATION:
            index = data.proprio[0].shape[1] + place
            return Finding(
                "gripper-direction",
                False,
                f"gripper is high where the fingers (proprio[{index}], up to {widest:.3g}, as metres) are together: "
                f"correlation {min(values):.2f}.",
                "OpenVLA's gripper is 0 closed to 1 open.",
                "Give the field gripper: inverted (or take back what inverts it) where fingers apart are open.",
            )
    return None


def millimetres(data: Recording) -> Finding | None:
    """Return a finding where movements are too large for metres."""
    far = np.maximum(-data.low, data.high)[:3]
    if not data.end_effector or not (far > MOST_METRES).any():
        return None
    said = ", ".join(f"{data.labels[i]} from {data.low[i]:.4g} to {data.high[i]:.4g}" for i in np.flatnonzero(far > 2))
    return Finding(
        "millimetres",
        False,
        f"{said} (q01 to q99): more than 2 m a step, if it were metres.",
        "Answers are in the dataset's units; a robot that takes millimetres for metres moves 1000 times too far.",
        "Convert it with standardize or where the dataset is written, or drive the robot in the dataset's units.",
    )


def outliers(data: Recording) -> Finding | None:
    """Return a finding where single values are far beyond all others."""
    usual, far = np.maximum(-data.low, data.high), np.maximum(-data.least, data.most)
    broken = np.flatnonzero((far >= OUTLIER_SIZE) & (far > OUTLIER_RATIO * usual) & (usual > 0))
    if not len(broken):
        return None
    said = ", ".join(f"{data.labels[i]} to {far[i]:.4g}, beside q01 to q99 within {usual[i]:.4g}" for i in broken)
    return Finding(
        "outliers",
        False,
        f"{said}.",
        "These steps are trained on as the largest movement, and min and max (normalization: bounds) are theirs alone.",
        "Repair them where the dataset is written, or leave the episodes out.",
    )


def rare_movement(data: Recording) -> Finding | None:
    """Return a finding where a dimension moves, but in so few steps that q01 and q99 are one value."""
    mask = np.asarray(data.action.get("mask", [True] * len(data.low)), bool)
    rare = np.flatnonzero(mask & (data.low == data.high) & (data.least < data.most))
    if not data.end_effector or not len(rare) or "q01" not in data.action or "min" not in data.action:
        return None
    said = ", ".join(
        f"{data.labels[i]} is {data.low[i]:.4g} from q01 to q99, and {data.least[i]:.4g} to {data.most[i]:.4g} in all"
        for i in rare
    )
    return Finding(
        "rare-movement",
        False,
        f"{said}.",
        "Actions are normalised by q01 and q99: the model cannot answer with this movement.",
        "Leave out steps that stand still (drop_noops), or take normalization: bounds.",
    )


def frozen_frames(data: Recording, still: Mapping[str, Sequence[bool]]) -> list[Finding]:
    """Return a finding for every camera whose pictures stay the same while the arm moves.

    Args:
        data: With the actions of the episodes that were looked at.
        still: By camera, whether the picture after a step is the same in every pixel: one for each step of each episode
            but its last.
    """
    moving = []
    full = data.high - data.low
    for episode in data.actions:
        values = episode - np.median(episode, axis=0) if data.end_effector else np.diff(episode, axis=0, append=np.nan)
        moving.append((np.abs(values) > MOVING_SHARE * full)[:-1, full > 0].any(axis=1))
    steps = np.concatenate(moving) if moving else np.zeros(0, bool)
    found = []
    for camera, equal in still.items():
        share = float(np.mean(np.asarray(equal)[steps])) if steps.sum() >= FEWEST_STEPS else 0.0
        if share >= FROZEN_SHARE:
            found.append(
                Finding(
                    "frozen-frames",
                    False,
                    f"{camera} shows the same picture again after {share:.0%} of {int(steps.sum())} steps that move.",
                    "A model that sees a picture of the past, or nothing, learns the mean movement.",
                    "Leave the camera out of the field cameras, or record it again.",
                )
            )
    return found
