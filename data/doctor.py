"""Checks of recorded numbers that cannot be right: wrapped rotations, poses for movements, a gripper of other units.

``examine`` looks at the actions of a dataset (and its proprio, where there is one), ``examine_statistics`` at what a
checkpoint or a file of statistics holds. A finding that is certain stops ``openvla finetune`` unless it is accepted by
its name; a doubtful one is a warning. Every threshold is a constant with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAValueError
from ..inference.robot_conventions import GRIPPER_TOLERANCE
from .alignment import (
    FEWEST_STEPS,
    WRAP_SHARE_OF_TURN,
    explained_variance,
    follows_positions,
    wrapped_steps,
)
from .conventions import (
    absolute_rotation,
    dimension_order,
    gripper_direction,
    millimetres,
    outliers,
    quaternions,
    rare_movement,
    state_column,
)
from .findings import RATES, Finding, Recording

# Measured grippers overshoot by their calibration: Bridge's state reaches 1.12.
GRIPPER_OVERSHOOT = 0.25
# Grippers open to 0.14 m at most (Robotiq 2F-140), and one of 0 to 1 that opens is far above.
GRIPPER_METRES = 0.2
# From here on a gripper counts as open (inference/robot_conventions.py).
GRIPPER_OPEN = 0.5
# Of the steps of a gripper that is commanded as -1 or +1 (or 0), at least so many are at one of these.
GRIPPER_COMMANDED_SHARE = 0.5
# Wrong values in fewer steps are outliers; a gripper of another convention spends more than a tenth on either side.
GRIPPER_FEW_SHARE = 0.1
# Commands to open or close that leave the gripper as it is in between are as rare as this; an open gripper is not.
GRIPPER_RARE_SHARE = 0.05
TURNS = {"rad": 2 * np.pi, "degrees": 360.0}
# q01 and q99, which become -1 and 1, are taken from the wrapped steps where these are one in a hundred.
WRAP_CERTAIN_SHARE = 0.01
# No arm turns by more than half a turn between two frames; a tenth more for controllers' own units.
MOST_RADIANS = 1.1 * np.pi
# Centre of q01 and q99 against half their distance: movements go both ways (below 1), positions lie to one side.
POSE_OFFSET, POSE_OFFSET_ALONE = 1.0, 2.0
# Beside that, a gripper that points down stands at half a turn; no arm turns so far between two frames.
POSE_ANGLE = 0.8 * np.pi
# Where nine tenths of the steps stand still, a model that never moves is right nearly always.
IDLE_SHARE = 0.9
# Of the largest (99th percentile) movement of a dimension: less than this is noise of sensors.
IDLE_MOVEMENT = 0.01
# Share of the movement's variance that a shifted column explains: a robot's own lag and noise leave less.
SHIFT_CERTAIN = 0.95
# The best lag must leave at most half as much unexplained as the right one; a robot that lags does not follow exactly.
SHIFT_UNEXPLAINED, LATE_EXPLAINED, LATE_UNEXPLAINED = 0.5, 0.98, 0.25
# Robots that follow three steps and more later are common; columns that are shifted so far are not.
MOST_LATE_STEPS = 2
# Frames change with light and noise too: pictures needed, variance to be explained, what may stay unexplained.
FRAME_STEPS, FRAME_EXPLAINED, FRAME_UNEXPLAINED = 100, 0.36, 0.7
FRAMES_FIRST = "A frame is to be answered with the movement that follows it, not with the one that led to it."

# What is published so, and what released checkpoints were trained on under these names: poses of the end effector
# (ucsd_kitchen's in mm and degrees), no gripper, a few wrapped yaws below one in a thousand.
PUBLISHED: dict[str, frozenset[str]] = {
    "bridge_orig": frozenset({"wrapped-rotation"}),
    "bridge_oxe": frozenset({"wrapped-rotation"}),
    "bridge": frozenset({"wrapped-rotation"}),
    "nyu_franka_play_dataset_converted_externally_to_rlds": frozenset({"wrapped-rotation"}),
    "toto": frozenset({"absolute-pose", "constant-gripper"}),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": frozenset({"absolute-pose", "degrees", "millimetres"}),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": frozenset({"absolute-pose"}),
    "berkeley_cable_routing": frozenset({"constant-gripper"}),
}


def _wrapped_rotation(data: Recording) -> Finding | None:
    rotations = range(3, 6) if data.end_effector else range(len(data.low))
    seen, certain = [], False
    for unit, turn in TURNS.items():
        for index in rotations:
            high = max(-data.low[index], data.high[index])
            farthest = max(-data.least[index], data.most[index])
            if data.steps is None:
                if not data.end_effector or not WRAP_SHARE_OF_TURN * turn <= farthest <= 1.001 * turn:
                    continue
                certain |= high >= WRAP_SHARE_OF_TURN * turn
                seen.append(
                    f"{data.labels[index]} goes to {farthest:.4g}, a whole turn in {unit} (q01 {data.low[index]:.4g}, "
                    f"q99 {data.high[index]:.4g})"
                )
                continue
            wraps = [wrapped_steps(episode[:, index], turn) for episode in data.actions]
            count = int(sum(map(np.sum, wraps)))
            sizes = np.abs(data.steps[:, index])
            others = sizes[sizes < WRAP_SHARE_OF_TURN * turn]
            if not count or np.mean(others > turn / 4) > WRAP_CERTAIN_SHARE or farthest > 1.001 * turn:
                continue
            certain |= data.end_effector and count >= WRAP_CERTAIN_SHARE * len(sizes)
            seen.append(
                f"{data.labels[index]} jumps by a turn in {unit} (to {farthest:.4g}) in {count} of {len(sizes)} steps, "
                f"{_where(map(np.any, wraps))}"
            )
    if not seen:
        return None
    return Finding(
        "wrapped-rotation",
        bool(certain),
        f"{'; '.join(seen)}.",
        "A difference of angles that passes from +180 to -180 degrees is a whole turn too much, the other way round; "
        "q01 and q99 stretch over it.",
        "Give the field rotation: wrapped (for degrees wrapped_degrees), which brings differences into half a turn.",
    )


def _absolute_pose(data: Recording) -> Finding | None:
    if not data.end_effector:
        return None
    why = "OpenVLA's seven numbers are movements; a model of poses would be asked to move by its own position."
    mend = (
        f"Give the field relabel: {state_column(data)} (a column of x y z roll pitch yaw, whose differences become "
        "the movement; with rotation: wrapped where its angles pass half a turn), or a column of movements in action. "
        "Joint positions are no poses: accept the finding for them."
    )
    if data.tracked:
        said = ", ".join(f"{data.labels[i]} with proprio[{j}] ({r:.3f})" for i, j, r in data.tracked)
        return Finding(
            "absolute-pose", True, f"The action is the measured position itself: {said} correlate.", why, mend
        )
    half = np.maximum(data.high - data.low, 1e-12)[:3] / 2
    offset = np.abs(data.high + data.low)[:3] / 2 / half
    moving = data.high[:3] > data.low[:3]
    aside = np.flatnonzero(moving & (offset > POSE_OFFSET))
    if len(aside) < 2 and not (moving & (offset > POSE_OFFSET_ALONE)).any():
        return None
    far = [index for index in range(3, 6) if POSE_ANGLE < max(-data.low[index], data.high[index]) <= MOST_RADIANS]
    said = ", ".join(f"{data.labels[i]} from {data.low[i]:.4g} to {data.high[i]:.4g}" for i in [*aside, *far])
    saw = f"{said} (q01 to q99): never changing sign{' and almost half a turn' if far else ''}, as positions are."
    return Finding("absolute-pose", bool(far), saw, why, mend)


def _degrees(data: Recording) -> Finding | None:
    if not data.end_effector:
        return None
    far = np.maximum(-data.low, data.high)
    over = [index for index in range(3, 6) if far[index] > MOST_RADIANS]
    over = [i for i in over if not any(WRAP_SHARE_OF_TURN * t <= far[i] <= 1.001 * t for t in TURNS.values())]
    if not over:
        return None
    said = ", ".join(f"{data.labels[i]} from {data.low[i]:.4g} to {data.high[i]:.4g}" for i in over)
    return Finding(
        "degrees",
        False,
        f"{said} (q01 to q99): more than half a turn a step, if it were radians.",
        "OpenVLA's rotations are radians; a robot that takes the answer for radians turns 57 times too far.",
        "Give the field rotation: degrees, or drive the robot in the dataset's units.",
    )


def _gripper_range(data: Recording) -> Finding | None:
    if not data.end_effector or not data.gripper_named:
        return None
    low, high, least, most = (values[-1] for values in (data.low, data.high, data.least, data.most))
    seen = f"gripper from {least:.4g} to {most:.4g} (q01 {low:.4g}, q99 {high:.4g})"
    why = "OpenVLA's gripper is 0 closed to 1 open; everything above 0.5 is sent as open, everything below as closed."
    inside = low >= -GRIPPER_TOLERANCE and high <= 1 + GRIPPER_TOLERANCE
    near = low >= -GRIPPER_OVERSHOOT and high <= 1 + GRIPPER_OVERSHOOT
    if inside and least >= -GRIPPER_OVERSHOOT and most <= 1 + GRIPPER_OVERSHOOT:
        return None
    few, signed = inside or near, -1 - GRIPPER_TOLERANCE <= least < -GRIPPER_OVERSHOOT and most <= 1 + GRIPPER_TOLERANCE
    values = None if data.steps is None else data.steps[:, -1]
    if values is not None:
        beyond = [(e[:, -1] < -GRIPPER_TOLERANCE) | (e[:, -1] > 1 + GRIPPER_TOLERANCE) for e in data.actions]
        few = np.mean(np.concatenate(beyond)) < GRIPPER_FEW_SHARE
        seen += f", beyond 0 to 1 in {int(sum(map(np.sum, beyond)))} steps, {_where(map(np.any, beyond))}"
        few &= not (signed and np.mean(values > GRIPPER_OPEN) < GRIPPER_RARE_SHARE)
    if few or near:
        why += " One value above 1 makes the gripper a normalised dimension, like a movement."
        return Finding("gripper-range", False, f"{seen}.", why, "Give the field gripper: clipped.")
    certain, mend = (
        True,
        (
            "Give the field gripper_range: [closed, open], the two numbers of this gripper "
            f"([{least:.4g}, {most:.4g}], or [{most:.4g}, {least:.4g}] where the larger is closed)."
        ),
    )
    if signed:
        certain = low < -1 + GRIPPER_TOLERANCE and high > 1 - GRIPPER_TOLERANCE
        mend = (
            "Give the field gripper: clipped_inverted where -1 opens and +1 closes (robosuite, robomimic, LIBERO), "
            "gripper: clipped where -1 closes and +1 opens."
        )
        if values is not None:
            ends = np.mean(np.abs(np.abs(values) - 1) < GRIPPER_TOLERANCE)
            zeros = np.mean(np.abs(values) < GRIPPER_TOLERANCE)
            certain = ends > 0 and ends + zeros >= GRIPPER_COMMANDED_SHARE
            if certain and zeros > ends:
                mend = "Give the field gripper: relative (+1 closes, -1 opens, 0 leaves it as it is)."
            first = np.array([episode[0, -1] for episode in data.actions])
            seen += f"; {int((first < 0).sum())} of {len(first)} episodes begin below 0, and most grippers begin open"
    elif data.fields is not None and data.fields.gripper == "inverted" and high <= 2 + GRIPPER_TOLERANCE:
        mend = "Give the field gripper: clipped_inverted in place of inverted."
    if data.gripper_normalised:
        certain = False
        why += " With its action_mask true, the answer is in the dataset's own units."
    return Finding("gripper-range", bool(certain), f"{seen}.", why, mend)


def _gripper_scale(data: Recording) -> Finding | None:
    least, most = data.least[-1], data.most[-1]
    if not data.end_effector or least == most or least < -GRIPPER_TOLERANCE or most > 1 + GRIPPER_OVERSHOOT:
        return None
    if most > GRIPPER_OPEN and least < GRIPPER_OPEN:
        return None
    metres = most <= GRIPPER_METRES
    side = "closed" if most <= GRIPPER_OPEN else "open"
    return Finding(
        "gripper-scale",
        bool(metres and not data.gripper_normalised),
        f"gripper from {least:.4g} to {most:.4g}{', as a width in metres' if metres else ''}.",
        f"OpenVLA's gripper is 0 closed to 1 open: every step of it counts as {side}.",
        f"Give the field gripper_range: [closed, open], such as [{least:.4g}, {most:.4g}].",
    )


def _constant_gripper(data: Recording) -> Finding | None:
    if not data.end_effector or not data.gripper_named or data.least[-1] != data.most[-1]:
        return None
    return Finding(
        "constant-gripper",
        False,
        f"gripper is {data.least[-1]:.4g} in every step.",
        "A model that is trained on it never opens or closes anything.",
        "Name the column of the gripper as the last one of the field action, or null for a robot without one.",
    )


def _idle_steps(data: Recording) -> Finding | None:
    if data.steps is None:
        return None
    if data.end_effector:
        moving = np.flatnonzero(data.least[:6] < data.most[:6])
        if (data.least[:6] == data.most[:6])[data.least[:6] != 0].any():
            return None  # a movement that never ends
        idle = [np.abs(episode[:, moving]) for episode in data.actions]
        full = np.quantile(np.abs(data.steps[:, moving]), 0.99, axis=0)
        idle = [(sizes <= IDLE_MOVEMENT * full).all(axis=1) for sizes in idle]
        for episode, still in zip(data.actions, idle):
            still[1:] &= np.abs(np.diff(episode[:, -1])) <= IDLE_MOVEMENT * (data.most[-1] - data.least[-1])
    else:  # positions or movements: what does not change is idle in both, but for a steady movement
        moving = np.flatnonzero(data.least < data.most)
        close = IDLE_MOVEMENT / 10 * (data.high - data.low)[moving]
        idle = [(np.abs(np.diff(episode[:, moving], axis=0)) <= close).all(axis=1) for episode in data.actions]
    count, steps = int(sum(map(np.sum, idle))), sum(map(len, idle))
    if steps < FEWEST_STEPS or count < IDLE_SHARE * steps:
        return None
    start = int(np.median([int(np.argmin(still)) if not still.all() else len(still) for still in idle]))
    mend = f"Half of the episodes begin with {start} or more: give the field skip_first: {start}. " if start else ""
    return Finding(
        "idle-steps",
        False,
        f"{count} of {steps} steps ({count / steps:.0%}) hold no movement in any dimension.",
        "A model that is trained on them answers that nothing moves.",
        f"{mend}Give the field drop_noops: true, which leaves out steps that do exactly nothing, or leave them out "
        "where the dataset is written.",
    )


def _shifted_actions(data: Recording) -> Finding | None:
    if data.steps is None or not len(data.proprio) or data.state_of(RATES):
        return None
    positions = bool(data.tracked) or not data.end_effector and follows_positions(data.actions, data.proprio)
    actions = [np.diff(e, axis=0, prepend=np.nan) if positions else e for e in data.actions]
    if data.end_effector:
        actions = [episode[:, :3] for episode in actions]
    moved = [np.diff(state, axis=0, append=np.nan) for state in data.proprio]
    explained = explained_variance(actions, moved)
    if explained is None:
        return None
    lag, best = max(explained.items(), key=lambda item: item[1])
    causal = max(share for after, share in explained.items() if after >= 0)
    early = lag < 0 and 1 - best <= SHIFT_UNEXPLAINED * (1 - causal)
    late = 0 < lag <= MOST_LATE_STEPS and best >= LATE_EXPLAINED and 1 - best <= LATE_UNEXPLAINED * (1 - explained[0])
    if not early and not late:
        return None
    place = f"{abs(lag)} step{'s' if abs(lag) > 1 else ''} {'before' if early else 'after'} it"
    why = FRAMES_FIRST
    if late:
        why = "Either actions are stored too early, or this robot follows its commands exactly, but that much later."
    return Finding(
        "shifted-actions",
        early and best >= SHIFT_CERTAIN and not positions,
        f"The action of a step fits the movement of the state {place} ({best:.0%} of its variance) better than the one "
        f"that starts with it ({explained[0]:.0%}).",
        why,
        f"Give the field relabel: {state_column(data)} (movements from the state itself, where it is x y z roll pitch "
        "yaw), or shift the column where the dataset is written.",
    )


def shifted_frames(data: Recording, changes: Sequence[np.ndarray]) -> Finding | None:
    """Return a finding where pictures change before the movement that moves them, and not after it.

    Args:
        data: With actions.
        changes: ``(length,)``, one an episode (of the first ones): how far frame t + 1 differs from frame t; the last
            is NaN.
    """
    moving = data.least[:6] < data.most[:6]
    if not data.end_effector or not moving.any() or sum(map(len, changes)) < FRAME_STEPS:
        return None
    scale = (data.most - data.least)[:6][moving]
    sizes = [np.linalg.norm(episode[:, :6][:, moving] / scale, axis=1)[:, None] for episode in data.actions]
    explained = explained_variance(sizes, [values[:, None] for values in changes], FRAME_EXPLAINED)
    if explained is None:
        return None
    lag, best = max(explained.items(), key=lambda item: item[1])
    causal = max(share for after, share in explained.items() if after >= 0)
    if lag >= 0 or 1 - best > FRAME_UNEXPLAINED * (1 - causal):
        return None
    return Finding(
        "shifted-actions",
        False,
        f"The size of a movement fits the change of the frames {-lag} step{'s' if lag < -1 else ''} before it "
        f"({best:.0%} of its variance) better than the change after it ({causal:.0%}).",
        FRAMES_FIRST,
        "Shift the column where the dataset is written, so that the action of a step starts at its frame.",
    )


def _where(affected: Iterable[Any]) -> str:
    """Return how many episodes are affected, and the first of them."""
    marks = [bool(mark) for mark in affected]
    first = [str(index) for index, mark in enumerate(marks) if mark][:5]
    return f"in {sum(marks)} of {len(marks)} episodes (the first: {', '.join(first)})"


CHECKS: dict[str, Callable[[Recording], Finding | None]] = {
    "wrapped-rotation": _wrapped_rotation,
    "absolute-pose": _absolute_pose,
    "degrees": _degrees,
    "gripper-range": _gripper_range,
    "gripper-scale": _gripper_scale,
    "constant-gripper": _constant_gripper,
    "idle-steps": _idle_steps,
    "shifted-actions": _shifted_actions,
    "absolute-rotation": absolute_rotation,
    "quaternion": quaternions,
    "dimension-order": dimension_order,
    "gripper-direction": gripper_direction,
    "millimetres": millimetres,
    "outliers": outliers,
    "rare-movement": rare_movement,
}
# Where four numbers are a quaternion, the last of them is no gripper.
GRIPPER_CHECKS = ("gripper-range", "gripper-scale", "constant-gripper", "gripper-direction")


def examine(data: Recording) -> list[Finding]:
    """Return what the checks find, certain findings first; what is published so under its name is left out."""
    found = [finding for check in CHECKS.values() if (finding := check(data))]
    if any(one.check == "quaternion" and one.certain for one in found):
        found = [one for one in found if one.check not in GRIPPER_CHECKS]
    published = PUBLISHED.get(data.name, frozenset())
    found = [one for one in found if one.check not in published or one.certain and one.check == "wrapped-rotation"]
    return sorted(found, key=lambda finding: not finding.certain)


def examine_statistics(norm_stats: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Finding]]:
    """Return the findings on statistics alone, by dataset: ranges, not what needs every step."""
    return {name: examine(Recording(name, statistics["action"])) for name, statistics in norm_stats.items()}


def require_names(names: Iterable[str]) -> None:
    """Check names of checks, as ``accept`` takes them.

    Raises:
        ValueError: A name is unknown.
    """
    for name in names:
        if name not in CHECKS:
            near = nearest_name(name, list(CHECKS))
            hint = f" Did you mean {near!r}?" if near else ""
            raise OpenVLAValueError(f"Unknown check {name!r} in accept.{hint} Allowed: {list(CHECKS)}.")


def refuse(findings: Mapping[str, Sequence[Finding]], accept: Sequence[str] = (), quiet: bool = False) -> None:
    """Stop before training on numbers that are certainly wrong, and warn of the others.

    Args:
        findings: By dataset.
        accept: Names of checks whose certain findings are a warning.
        quiet: Give no warnings (another process does).

    Raises:
        ValueError: A finding is certain and not accepted.
    """
    listed = [(name, finding) for name, found in findings.items() for finding in found]
    stopping = [(name, finding) for name, finding in listed if finding.certain and finding.check not in accept]
    if stopping:
        said = "\n".join(f"  {name}: {finding.text()}" for name, finding in stopping)
        flags = " ".join(sorted({f"--accept {finding.check}" for _, finding in stopping}))
        raise OpenVLAValueError(
            f"The data cannot be right:\n{said}\nNothing was trained. Change the fields as said, look again with "
            f"openvla inspect-data, or go on all the same with {flags} (accept: [...] in the configuration)."
        )
    if quiet:
        return
    for name, finding in listed:
        accepted = "accepted: " if finding.check in accept else ""
        warnings.warn(f"{name}: {accepted}{finding.text()}", stacklevel=3)
    unused = sorted(set(accept) - {finding.check for _, finding in listed})
    if unused:
        warnings.warn(f"accept: {unused} found nothing in this data; these names need not be given.", stacklevel=3)
