"""Input and result of the checks of a dataset's numbers (``openvla.data.doctor``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..dimension_labels import END_EFFECTOR_DIMENSIONS, dimension_labels
from .alignment import Correlation, tracked_positions
from .columns import ColumnSpec
from .presets import PRESETS

# Names of joints: ALOHA's and LeRobot's arms, MuJoCo's qpos.
JOINTS = re.compile(r"joint|qpos|motor|shoulder|elbow|waist|forearm|wrist_(flex|roll|angle|rotate|pitch|yaw)", re.I)
# State columns that hold velocities or the last action, not positions.
RATES = re.compile(r"vel|speed|qvel|last_action|prev_action|previous_action", re.I)


@dataclass(frozen=True)
class Finding:
    """A problem that a check found in a dataset's numbers.

    Attributes:
        check: The check's name, as the option ``accept`` takes it.
        certain: True if the numbers are wrong; False if they may be intended.
        evidence: What the check saw: dimensions by their labels, episodes, numbers.
        reason: Why it matters.
        fix: Which field of the data configuration fixes it.
    """

    check: str
    certain: bool
    evidence: str
    reason: str
    fix: str

    @property
    def severity(self) -> str:
        """Return "certain" or "doubtful"."""
        return "certain" if self.certain else "doubtful"

    def text(self) -> str:
        """Return the finding in one line."""
        return f"{self.check} ({self.severity}): {self.evidence} {self.reason} {self.fix}"

    def as_json(self) -> dict[str, Any]:
        """Return the finding as ``openvla inspect-data --json`` prints it."""
        return {**asdict(self), "severity": self.severity}


@dataclass
class CheckInput:
    """A dataset to check: its statistics and, if available, the numbers of its episodes.

    Attributes:
        name: The dataset's name.
        statistics: The action's lists ``q01`` and ``q99``, ``min`` and ``max`` (either pair suffices), and ``mask``.
        fields: The dataset's fields; None for statistics alone.
        action_names: The dataset's names of the action's columns or dimensions.
        actions: float64 ``(length, action_dim)``, one array per episode; empty for statistics alone.
        proprio: float64 ``(length, proprio_dim)``, one array per episode, or empty.
        labels: This package's names of the action's dimensions.
        q01, q99, min, max: float64 ``(action_dim,)``; a missing pair is replaced by the other one.
        steps: The actions of all episodes, float64 ``(steps, action_dim)``; None for statistics alone.
        tracked: For seven dimensions, those that repeat a measured position (``tracked_positions``); empty if the
            state holds velocities alone.
    """

    name: str
    statistics: Mapping[str, Any]
    fields: ColumnSpec | None = None
    action_names: Sequence[str] = ()
    actions: Sequence[np.ndarray] = ()
    proprio: Sequence[np.ndarray] = ()
    labels: list[str] = field(init=False)
    q01: np.ndarray = field(init=False)
    q99: np.ndarray = field(init=False)
    min: np.ndarray = field(init=False)
    max: np.ndarray = field(init=False)
    steps: np.ndarray | None = field(init=False)
    tracked: list[Correlation] = field(init=False)

    def __post_init__(self) -> None:
        """Compute the attributes that follow from the others."""
        self.q01, self.min = self._bounds("q01", "min")
        self.q99, self.max = self._bounds("q99", "max")
        self.labels = [label for label, _ in dimension_labels(len(self.q01), self.name)]
        self.steps = np.concatenate(self.actions) if len(self.actions) else None
        may_track = len(self.q01) == len(END_EFFECTOR_DIMENSIONS) and not self.is_state_named(RATES)
        self.tracked = tracked_positions(self.actions, self.proprio) if may_track else []

    def _bounds(self, quantile: str, extreme: str) -> tuple[np.ndarray, np.ndarray]:
        stored = {key: values for key, values in self.statistics.items() if values is not None}
        return (
            np.asarray(stored[quantile if quantile in stored else extreme], float),
            np.asarray(stored[extreme if extreme in stored else quantile], float),
        )

    def is_state_named(self, pattern: re.Pattern[str]) -> bool:
        """Return whether the names of all state columns match a pattern."""
        parts = [part for part in (self.fields.proprio if self.fields else ()) if part]
        return bool(parts) and all(pattern.search(part) for part in parts)

    @property
    def is_end_effector(self) -> bool:
        """Return True if the action is seven numbers, a movement and a gripper.

        False if they are named as joints, or if they follow a state whose columns are named as joints.
        """
        is_joints = any(map(JOINTS.search, self.action_names)) or bool(self.tracked) and self.is_state_named(JOINTS)
        return len(self.q01) == len(END_EFFECTOR_DIMENSIONS) and not is_joints

    @property
    def has_gripper(self) -> bool:
        """Return False if the fields, or the preset with the dataset's name, fill the gripper's dimension with 0."""
        fields = self.fields or PRESETS.get(self.name)
        return fields is None or not fields.action or fields.action[-1] is not None

    @property
    def is_gripper_normalised(self) -> bool:
        """Return True if ``action_mask`` says that the gripper is normalised like a movement."""
        mask = self.fields.action_mask if self.fields else self.statistics.get("mask")
        return mask is not None and bool(mask[-1])
