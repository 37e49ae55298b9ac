"""The input of a check of recorded numbers, and its result (``data_doctor``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, dimension_labels
from .alignment import tracked_positions
from .columns import Fields
from .presets import PRESETS

# How recorders name joints: ALOHA's and LeRobot's arms, MuJoCo's qpos.
JOINTS = re.compile(r"joint|qpos|motor|shoulder|elbow|waist|forearm|wrist_(flex|roll|angle|rotate|pitch|yaw)", re.I)
# Columns of a state that tell how it moves, not where it is.
RATES = re.compile(r"vel|speed|qvel|last_action|prev_action|previous_action", re.I)


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        check: Its name, as ``accept`` takes it.
        certain: The numbers are wrong; else they may be meant so.
        saw: Dimensions by their labels, episodes, numbers.
        why: Why it matters.
        mend: The field of the data configuration that mends it.
    """

    check: str
    certain: bool
    saw: str
    why: str
    mend: str

    @property
    def severity(self) -> str:
        """Return "certain" or "doubtful"."""
        return "certain" if self.certain else "doubtful"

    def text(self) -> str:
        """Return the finding in one line."""
        return f"{self.check} ({self.severity}): {self.saw} {self.why} {self.mend}"

    def as_json(self) -> dict[str, Any]:
        """Return the finding as ``openvla inspect-data --json`` prints it."""
        return {**asdict(self), "severity": self.severity}


@dataclass
class Recording:
    """A dataset to examine: its statistics, and the numbers behind them where they are at hand.

    Attributes:
        name: The dataset's.
        action: Lists ``q01``, ``q99``, ``min``, ``max`` (either pair), ``mask``.
        fields: The dataset's; None for statistics alone.
        names: What the dataset calls the action's dimensions or columns.
        actions: float64 ``(length, action_dim)``, one an episode; empty for statistics alone.
        proprio: float64 ``(length, proprio_dim)``, one an episode, or empty.
        labels: What this package calls the action's dimensions.
        tracked: Action dimensions that are measured positions (``tracked_positions``): of seven, and not where the
            state tells speeds alone.
    """

    name: str
    action: Mapping[str, Any]
    fields: Fields | None = None
    names: Sequence[str] = ()
    actions: Sequence[np.ndarray] = ()
    proprio: Sequence[np.ndarray] = ()
    labels: list[str] = field(init=False)
    tracked: list[tuple[int, int, float]] = field(init=False)

    def __post_init__(self) -> None:
        """Take q01 and q99 for min and max, or the other way round, where statistics hold one pair."""
        own = {field: values for field, values in self.action.items() if values is not None}
        self.low, self.high = (np.asarray(own[a] if a in own else own[b], float) for a, b in _PAIRS)
        self.least, self.most = (np.asarray(own[b] if b in own else own[a], float) for a, b in _PAIRS)
        self.labels = [label for label, _ in dimension_labels(len(self.low), self.name)]
        self.steps = np.concatenate(self.actions) if len(self.actions) else None
        seven = len(self.low) == len(END_EFFECTOR_DIMENSIONS)
        self.tracked = tracked_positions(self.actions, self.proprio) if seven and not self.state_of(RATES) else []

    def state_of(self, names: re.Pattern[str]) -> bool:
        """Return True where every column of the state bears one of these names."""
        parts = [part for part in (self.fields.proprio if self.fields else ()) if part]
        return bool(parts) and all(names.search(part) for part in parts)

    @property
    def end_effector(self) -> bool:
        """True where seven numbers are a movement and a gripper.

        Not where their names speak of joints, or where they follow a state that holds joints alone.
        """
        joints = any(map(JOINTS.search, self.names)) or bool(self.tracked) and self.state_of(JOINTS)
        return len(self.low) == len(END_EFFECTOR_DIMENSIONS) and not joints

    @property
    def gripper_named(self) -> bool:
        """True unless the fields (or the preset of that name) put a zero in the gripper's place."""
        fields = self.fields or PRESETS.get(self.name)
        return fields is None or not fields.action or fields.action[-1] is not None

    @property
    def gripper_normalised(self) -> bool:
        """True where the configuration says that the gripper is one more movement: ``action_mask`` is all true."""
        mask = self.fields.action_mask if self.fields else self.action.get("mask")
        return mask is not None and bool(mask[-1])


_PAIRS = (("q01", "min"), ("q99", "max"))
