"""Check a dataset's numbers for what cannot be right: wrapped rotations, absolute poses, other gripper units and so on.

``run_checks`` examines a dataset's actions (and its proprio, if it has one), ``check_statistics`` the statistics of a
checkpoint or file. A certain finding stops ``openvla finetune`` unless the option ``accept`` names its check; a
doubtful one is a warning. Every threshold is a constant with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAValueError
from ..inference.robot_conventions import GRIPPER_OVERSHOOT
from .alignment import (
    MIN_STEPS,
    WRAP_SHARE_OF_TURN,
    explained_variance,
    follows_positions,
    wrapped_steps,
)
from .conventions import (
    check_absolute_rotation,
    check_dimension_order,
    check_gripper_direction,
    check_millimetres,
    check_outliers,
    check_quaternions,
    check_rare_movement,
    state_column,
)
from .findings import RATES, CheckInput, Finding

# How far a commanded gripper may be from the ends of its range.
GRIPPER_TOLERANCE = 0.05
# Grippers open to 0.14 m at most (Robotiq 2F-140); an open gripper of 0 to 1 is far above.
GRIPPER_METRES = 0.2
# Larger values count as open (inference/robot_conventions.py).
GRIPPER_OPEN = 0.5
# Smallest share of steps in which a gripper that is commanded as -1 or +1 (or 0) has one of these values.
GRIPPER_COMMANDED_SHARE = 0.5
# Wrong values in fewer steps are outliers; a gripper of another convention has more than a tenth on either side.
GRIPPER_FEW_SHARE = 0.1
# Commands to open or close, with no command in between, are rarer than this; the steps of an open gripper are not.
GRIPPER_RARE_SHARE = 0.05
TURNS = {"rad": 2 * np.pi, "degrees": 360.0}
# If one in a hundred steps is wrapped, q01 and q99, which are mapped to -1 and 1, are wrapped values.
WRAP_CERTAIN_SHARE = 0.01
# No arm turns more than half a turn between two frames; plus a tenth for controllers' own units.
MAX_RADIANS = 1.1 * np.pi
# |centre| of q01 and q99 over half their distance: movements go both ways (below 1), positions lie on one side.
POSE_OFFSET, POSE_OFFSET_ALONE = 1.0, 2.0
# The roll of a gripper that points down is half a turn; no arm turns so far between two frames.
POSE_ANGLE = 0.8 * np.pi
# If nine tenths of the steps have no movement, a model that never moves is nearly always right.
IDLE_SHARE = 0.9
# Share of a dimension's largest (99th percentile) movement; smaller values are sensor noise.
IDLE_MOVEMENT = 0.01
# Share of the movement's variance that a shifted column explains; the robot's lag and noise leave less.
SHIFT_CERTAIN = 0.95
# Share that the best lag may leave unexplained relative to lag 0 or later; a robot that lags does not follow exactly.
SHIFT_UNEXPLAINED, LATE_EXPLAINED, LATE_UNEXPLAINED = 0.5, 0.98, 0.25
# Robots that follow three or more steps later are common; columns that are shifted so far are not.
MAX_LATE_STEPS = 2
# Frames also change with light and noise: minimum number of frames, variance to explain, share left unexplained.
FRAME_STEPS, FRAME_EXPLAINED, FRAME_UNEXPLAINED = 100, 0.36, 0.7
FRAMES_FIRST = "The model must predict the movement that follows a frame, not the one that led to it."

# Findings in published datasets, on which released checkpoints were trained: poses of the end
# effector (ucsd_kitchen's in mm and degrees), no gripper, a few wrapped yaws (below one in a thousand).
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


def _check_wrapped_rotation(data: CheckInput) -> Finding | None:
    dimensions = range(3, 6) if data.is_end_effector else range(len(data.q01))
    find_wraps = _wrapped_in_statistics if data.steps is None else _wrapped_in_steps
    evidence, certain = [], False
    for unit, turn in TURNS.items():
        for index in dimensions:
            wraps = find_wraps(data, index, unit, turn)
            if wraps is not None:
                evidence.append(wraps[0])
                certain |= wraps[1]
    if not evidence:
        return None
    return Finding(
        check="wrapped-rotation",
        certain=certain,
        evidence=f"{'; '.join(evidence)}.",
        reason="A difference of angles that passes from +180 to -180 degrees is a whole turn off and has the wrong "
        "sign; q01 and q99 stretch to it.",
        fix="Set the field rotation: wrapped (for degrees wrapped_degrees), which brings differences into half a turn.",
    )


def _wrapped_in_statistics(data: CheckInput, index: int, unit: str, turn: float) -> tuple[str, bool] | None:
    """Return evidence that a rotation wraps, and whether it is certain, from statistics alone."""
    largest = max(-data.min[index], data.max[index])
    if not data.is_end_effector or not WRAP_SHARE_OF_TURN * turn <= largest <= 1.001 * turn:
        return None
    certain = max(-data.q01[index], data.q99[index]) >= WRAP_SHARE_OF_TURN * turn
    return (
        f"{data.labels[index]} goes to {largest:.4g}, a whole turn in {unit} (q01 {data.q01[index]:.4g}, q99 "
        f"{data.q99[index]:.4g})",
        bool(certain),
    )


def _wrapped_in_steps(data: CheckInput, index: int, unit: str, turn: float) -> tuple[str, bool] | None:
    """Return evidence that a rotation wraps, and whether it is certain, from all steps."""
    assert data.steps is not None
    largest = max(-data.min[index], data.max[index])
    wraps = [wrapped_steps(episode[:, index], turn) for episode in data.actions]
    count = int(sum(map(np.sum, wraps)))
    sizes = np.abs(data.steps[:, index])
    others = sizes[sizes < WRAP_SHARE_OF_TURN * turn]
    if not count or np.mean(others > turn / 4) > WRAP_CERTAIN_SHARE or largest > 1.001 * turn:
        return None
    return (
        f"{data.labels[index]} jumps by a whole turn in {unit} (to {largest:.4g}) in {count} of {len(sizes)} steps, "
        f"{_affected_episodes(map(np.any, wraps))}",
        data.is_end_effector and count >= WRAP_CERTAIN_SHARE * len(sizes),
    )


def _check_absolute_pose(data: CheckInput) -> Finding | None:
    if not data.is_end_effector:
        return None
    reason = "OpenVLA's actions are movements; a robot that adds absolute poses moves by its own position."
    fix = (
        f"Set the field relabel: {state_column(data)} (a column of x y z roll pitch yaw, whose differences become "
        "the movement; with rotation: wrapped if its angles pass half a turn), or use a column of movements in action. "
        "If the numbers are joint positions, accept the finding."
    )
    if data.tracked:
        pairs = ", ".join(
            f"{data.labels[i]} with proprio[{j}] ({correlation:.3f})" for i, j, correlation in data.tracked
        )
        evidence = f"The action is the measured position itself: {pairs} correlate."
        return Finding(check="absolute-pose", certain=True, evidence=evidence, reason=reason, fix=fix)
    half_range = np.maximum(data.q99 - data.q01, 1e-12)[:3] / 2
    offset = np.abs(data.q99 + data.q01)[:3] / 2 / half_range
    moving = data.q99[:3] > data.q01[:3]
    one_sided = np.flatnonzero(moving & (offset > POSE_OFFSET))
    if len(one_sided) < 2 and not (moving & (offset > POSE_OFFSET_ALONE)).any():
        return None
    half_turns = [index for index in range(3, 6) if POSE_ANGLE < max(-data.q01[index], data.q99[index]) <= MAX_RADIANS]
    ranges = _quantile_ranges(data, [*one_sided, *half_turns])
    evidence = (
        f"{ranges} (q01 to q99): one sign only{', and almost half a turn' if half_turns else ''}, like positions."
    )
    return Finding(check="absolute-pose", certain=bool(half_turns), evidence=evidence, reason=reason, fix=fix)


def _check_degrees(data: CheckInput) -> Finding | None:
    if not data.is_end_effector:
        return None
    largest = np.maximum(-data.q01, data.q99)
    large = [index for index in range(3, 6) if largest[index] > MAX_RADIANS]
    large = [i for i in large if not any(WRAP_SHARE_OF_TURN * t <= largest[i] <= 1.001 * t for t in TURNS.values())]
    if not large:
        return None
    return Finding(
        check="degrees",
        certain=False,
        evidence=f"{_quantile_ranges(data, large)} (q01 to q99): more than half a turn per step if these are radians.",
        reason="OpenVLA's rotations are radians; a robot that takes degrees for radians turns 57 times too far.",
        fix="Set the field rotation: degrees, or drive the robot in the dataset's units.",
    )


def _check_gripper_range(data: CheckInput) -> Finding | None:
    if not data.is_end_effector or not data.has_gripper:
        return None
    q01, q99, low, high = (values[-1] for values in (data.q01, data.q99, data.min, data.max))
    evidence = f"gripper from {low:.4g} to {high:.4g} (q01 {q01:.4g}, q99 {q99:.4g})"
    reason = "OpenVLA's gripper is 0 closed to 1 open; values above 0.5 are sent as open, below as closed."
    is_inside = q01 >= -GRIPPER_TOLERANCE and q99 <= 1 + GRIPPER_TOLERANCE
    is_near = q01 >= -GRIPPER_OVERSHOOT and q99 <= 1 + GRIPPER_OVERSHOOT
    if is_inside and low >= -GRIPPER_OVERSHOOT and high <= 1 + GRIPPER_OVERSHOOT:
        return None
    is_few = is_inside or is_near
    is_signed = -1 - GRIPPER_TOLERANCE <= low < -GRIPPER_OVERSHOOT and high <= 1 + GRIPPER_TOLERANCE
    if data.steps is not None:
        beyond = [(e[:, -1] < -GRIPPER_TOLERANCE) | (e[:, -1] > 1 + GRIPPER_TOLERANCE) for e in data.actions]
        is_few = bool(np.mean(np.concatenate(beyond)) < GRIPPER_FEW_SHARE)
        evidence += (
            f", outside 0 to 1 in {int(sum(map(np.sum, beyond)))} steps, {_affected_episodes(map(np.any, beyond))}"
        )
        is_few &= not (is_signed and np.mean(data.steps[:, -1] > GRIPPER_OPEN) < GRIPPER_RARE_SHARE)
    if is_few or is_near:
        reason += " A single value above 1 makes the gripper a normalised dimension, like a movement."
        return Finding(
            check="gripper-range",
            certain=False,
            evidence=f"{evidence}.",
            reason=reason,
            fix="Set the field gripper: clipped.",
        )
    certain = True
    fix = (
        "Set the field gripper_range: [closed, open], the two numbers of this gripper "
        f"([{low:.4g}, {high:.4g}], or [{high:.4g}, {low:.4g}] if the larger one is closed)."
    )
    if is_signed:
        certain, fix, more_evidence = _signed_gripper(data)
        evidence += more_evidence
    elif data.fields is not None and data.fields.gripper == "inverted" and q99 <= 2 + GRIPPER_TOLERANCE:
        fix = "Set the field gripper: clipped_inverted instead of inverted."
    if data.is_gripper_normalised:
        certain = False
        reason += " Since its action_mask is true, it is predicted in the dataset's own units."
    return Finding(check="gripper-range", certain=certain, evidence=f"{evidence}.", reason=reason, fix=fix)


def _signed_gripper(data: CheckInput) -> tuple[bool, str, str]:
    """Return, for a gripper of -1 to +1: whether the finding is certain, its fix, and further evidence."""
    fix = (
        "Set the field gripper: clipped_inverted if -1 opens and +1 closes (robosuite, robomimic, LIBERO), "
        "gripper: clipped if -1 closes and +1 opens."
    )
    if data.steps is None:
        return bool(data.q01[-1] < -1 + GRIPPER_TOLERANCE and data.q99[-1] > 1 - GRIPPER_TOLERANCE), fix, ""
    values = data.steps[:, -1]
    ends = np.mean(np.abs(np.abs(values) - 1) < GRIPPER_TOLERANCE)
    zeros = np.mean(np.abs(values) < GRIPPER_TOLERANCE)
    certain = bool(ends > 0 and ends + zeros >= GRIPPER_COMMANDED_SHARE)
    if certain and zeros > ends:
        fix = "Set the field gripper: relative (+1 closes, -1 opens, 0 holds)."
    first = np.array([episode[0, -1] for episode in data.actions])
    evidence = f"; {int((first < 0).sum())} of {len(first)} episodes begin below 0, and most grippers begin open"
    return certain, fix, evidence


def _check_gripper_scale(data: CheckInput) -> Finding | None:
    low, high = data.min[-1], data.max[-1]
    if not data.is_end_effector or low == high or low < -GRIPPER_TOLERANCE or high > 1 + GRIPPER_OVERSHOOT:
        return None
    if high > GRIPPER_OPEN and low < GRIPPER_OPEN:
        return None
    is_metres = high <= GRIPPER_METRES
    state = "closed" if high <= GRIPPER_OPEN else "open"
    return Finding(
        check="gripper-scale",
        certain=bool(is_metres and not data.is_gripper_normalised),
        evidence=f"gripper from {low:.4g} to {high:.4g}{', like a width in metres' if is_metres else ''}.",
        reason=f"OpenVLA's gripper is 0 closed to 1 open: every step of this one counts as {state}.",
        fix=f"Set the field gripper_range: [closed, open], such as [{low:.4g}, {high:.4g}].",
    )


def _check_constant_gripper(data: CheckInput) -> Finding | None:
    if not data.is_end_effector or not data.has_gripper or data.min[-1] != data.max[-1]:
        return None
    return Finding(
        check="constant-gripper",
        certain=False,
        evidence=f"gripper is {data.min[-1]:.4g} in every step.",
        reason="A model that is trained on it never opens or closes the gripper.",
        fix="Set the last entry of the field action to the gripper's column, or to null for a robot without a gripper.",
    )


def _check_idle_steps(data: CheckInput) -> Finding | None:
    if data.steps is None:
        return None
    if data.is_end_effector:
        if (data.min[:6] == data.max[:6])[data.min[:6] != 0].any():
            return None  # a constant movement never stops
        idle = _idle_end_effector(data, data.steps)
    else:  # positions or movements: both keep their value when idle; a constant movement also counts
        moving = np.flatnonzero(data.min < data.max)
        tolerance = IDLE_MOVEMENT / 10 * (data.q99 - data.q01)[moving]
        idle = [(np.abs(np.diff(episode[:, moving], axis=0)) <= tolerance).all(axis=1) for episode in data.actions]
    count, num_steps = int(sum(map(np.sum, idle))), sum(map(len, idle))
    if num_steps < MIN_STEPS or count < IDLE_SHARE * num_steps:
        return None
    start = int(np.median([int(np.argmin(episode)) if not episode.all() else len(episode) for episode in idle]))
    fix = f"Half of the episodes begin with {start} or more: set the field skip_first: {start}. " if start else ""
    return Finding(
        check="idle-steps",
        certain=False,
        evidence=f"{count} of {num_steps} steps ({count / num_steps:.0%}) have no movement in any dimension.",
        reason="A model that is trained on them learns not to move.",
        fix=f"{fix}Set the field drop_noops: true, which drops steps that do exactly nothing, or leave them out when "
        "writing the dataset.",
    )


def _idle_end_effector(data: CheckInput, steps: np.ndarray) -> list[np.ndarray]:
    """Return, per episode, which steps have no movement and no change of the gripper: bool ``(length,)``."""
    moving = np.flatnonzero(data.min[:6] < data.max[:6])
    largest = np.quantile(np.abs(steps[:, moving]), 0.99, axis=0)
    idle = [(np.abs(episode[:, moving]) <= IDLE_MOVEMENT * largest).all(axis=1) for episode in data.actions]
    for episode, is_idle in zip(data.actions, idle):
        is_idle[1:] &= np.abs(np.diff(episode[:, -1])) <= IDLE_MOVEMENT * (data.max[-1] - data.min[-1])
    return idle


def _check_shifted_actions(data: CheckInput) -> Finding | None:
    if data.steps is None or not len(data.proprio) or data.is_state_named(RATES):
        return None
    is_position = bool(data.tracked) or not data.is_end_effector and follows_positions(data.actions, data.proprio)
    actions = [np.diff(episode, axis=0, prepend=np.nan) if is_position else episode for episode in data.actions]
    if data.is_end_effector:
        actions = [episode[:, :3] for episode in actions]
    changes = [np.diff(state, axis=0, append=np.nan) for state in data.proprio]
    explained = explained_variance(actions, changes)
    if explained is None:
        return None
    lag, best = max(explained.items(), key=lambda item: item[1])
    causal = max(share for other, share in explained.items() if other >= 0)
    is_early = lag < 0 and 1 - best <= SHIFT_UNEXPLAINED * (1 - causal)
    is_late = 0 < lag <= MAX_LATE_STEPS and best >= LATE_EXPLAINED and 1 - best <= LATE_UNEXPLAINED * (1 - explained[0])
    if not is_early and not is_late:
        return None
    offset = f"{abs(lag)} step{'s' if abs(lag) > 1 else ''} {'before' if is_early else 'after'} it"
    reason = FRAMES_FIRST
    if is_late:
        reason = (
            "Either actions are stored too early, or this robot executes its commands exactly, but that much later."
        )
    return Finding(
        check="shifted-actions",
        certain=is_early and best >= SHIFT_CERTAIN and not is_position,
        evidence=f"The action of a step fits the movement of the state {offset} ({best:.0%} of its variance) better "
        f"than the movement that starts with it ({explained[0]:.0%}).",
        reason=reason,
        fix=f"Set the field relabel: {state_column(data)} (movements computed from the state, if it is x y z roll "
        "pitch yaw), or shift the column when writing the dataset.",
    )


def check_shifted_frames(data: CheckInput, changes: Sequence[np.ndarray]) -> Finding | None:
    """Return a finding if frames change before the action that moves the arm instead of after it.

    Args:
        data: With the actions of the episodes whose frames were compared.
        changes: ``(length,)``, one array per episode: the difference between frames t and t + 1; the last is NaN.
    """
    moving = data.min[:6] < data.max[:6]
    if not data.is_end_effector or not moving.any() or sum(map(len, changes)) < FRAME_STEPS:
        return None
    scale = (data.max - data.min)[:6][moving]
    sizes = [np.linalg.norm(episode[:, :6][:, moving] / scale, axis=1)[:, None] for episode in data.actions]
    explained = explained_variance(sizes, [values[:, None] for values in changes], FRAME_EXPLAINED)
    if explained is None:
        return None
    lag, best = max(explained.items(), key=lambda item: item[1])
    causal = max(share for other, share in explained.items() if other >= 0)
    if lag >= 0 or 1 - best > FRAME_UNEXPLAINED * (1 - causal):
        return None
    return Finding(
        check="shifted-actions",
        certain=False,
        evidence=f"The size of a movement fits the change of the frames {-lag} step{'s' if lag < -1 else ''} before it "
        f"({best:.0%} of its variance) better than the change after it ({causal:.0%}).",
        reason=FRAMES_FIRST,
        fix="Shift the column when writing the dataset, so that the action of a step starts at its frame.",
    )


def _quantile_ranges(data: CheckInput, dimensions: Iterable[int]) -> str:
    return ", ".join(f"{data.labels[i]} from {data.q01[i]:.4g} to {data.q99[i]:.4g}" for i in dimensions)


def _affected_episodes(affected: Iterable[Any]) -> str:
    """Return how many episodes are affected, and the first of them."""
    flags = [bool(flag) for flag in affected]
    first = [str(index) for index, flag in enumerate(flags) if flag][:5]
    return f"in {sum(flags)} of {len(flags)} episodes (the first: {', '.join(first)})"


CHECKS: dict[str, Callable[[CheckInput], Finding | None]] = {
    "wrapped-rotation": _check_wrapped_rotation,
    "absolute-pose": _check_absolute_pose,
    "degrees": _check_degrees,
    "gripper-range": _check_gripper_range,
    "gripper-scale": _check_gripper_scale,
    "constant-gripper": _check_constant_gripper,
    "idle-steps": _check_idle_steps,
    "shifted-actions": _check_shifted_actions,
    "absolute-rotation": check_absolute_rotation,
    "quaternion": check_quaternions,
    "dimension-order": check_dimension_order,
    "gripper-direction": check_gripper_direction,
    "millimetres": check_millimetres,
    "outliers": check_outliers,
    "rare-movement": check_rare_movement,
}
# If the last four of seven numbers are a quaternion, the last one is not a gripper.
GRIPPER_CHECKS = ("gripper-range", "gripper-scale", "constant-gripper", "gripper-direction")


def run_checks(data: CheckInput) -> list[Finding]:
    """Return the findings of all checks, certain ones first, without those of published datasets (``PUBLISHED``)."""
    findings = [finding for check in CHECKS.values() if (finding := check(data))]
    if any(finding.check == "quaternion" and finding.certain for finding in findings):
        findings = [finding for finding in findings if finding.check not in GRIPPER_CHECKS]
    published = PUBLISHED.get(data.name, frozenset())
    findings = [
        finding
        for finding in findings
        if finding.check not in published or finding.certain and finding.check == "wrapped-rotation"
    ]
    return sorted(findings, key=lambda finding: not finding.certain)


def check_statistics(norm_stats: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Finding]]:
    """Return the findings by dataset from statistics alone, which show ranges but not single steps."""
    return {name: run_checks(CheckInput(name, statistics["action"])) for name, statistics in norm_stats.items()}


def validate_check_names(names: Iterable[str]) -> None:
    """Check the names of checks given as the option ``accept``.

    Raises:
        ValueError: A name is not a check.
    """
    for name in names:
        if name not in CHECKS:
            nearest = nearest_name(name, list(CHECKS))
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise OpenVLAValueError(f"Unknown check {name!r} in accept.{hint} Allowed: {list(CHECKS)}.")


def raise_for_findings(
    findings: Mapping[str, Sequence[Finding]], accept: Sequence[str] = (), quiet: bool = False
) -> None:
    """Raise for certain findings, and warn about doubtful and accepted ones.

    Args:
        findings: By dataset.
        accept: Names of checks whose certain findings are only warned about.
        quiet: Give no warnings, because another process does.

    Raises:
        ValueError: A finding is certain and not accepted.
    """
    listed = [(name, finding) for name, entries in findings.items() for finding in entries]
    stopping = [(name, finding) for name, finding in listed if finding.certain and finding.check not in accept]
    if stopping:
        lines = "\n".join(f"  {name}: {finding.text()}" for name, finding in stopping)
        flags = " ".join(sorted({f"--accept {finding.check}" for _, finding in stopping}))
        raise OpenVLAValueError(
            f"The data cannot be right:\n{lines}\nNothing was trained. Change the fields as described and check again "
            f"with openvla inspect-data, or train anyway with {flags} (accept: [...] in the configuration)."
        )
    if quiet:
        return
    for name, finding in listed:
        accepted = "accepted: " if finding.check in accept else ""
        warnings.warn(f"{name}: {accepted}{finding.text()}", stacklevel=3)
    unused = sorted(set(accept) - {finding.check for _, finding in listed})
    if unused:
        warnings.warn(f"accept: the checks {unused} have no finding in this data; remove them.", stacklevel=3)
