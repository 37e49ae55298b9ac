"""Detect how a dataset stores its gripper, so that a preset does not convert a gripper that is converted already."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dimension_labels import END_EFFECTOR_DIMENSIONS
from ..errors_openvla import OpenVLAValueError
from .episodes import EpisodeReader
from .presets import HDF5_PRESETS

# Gripper conventions: values below 0 (-1 to +1), or 0 to 1 with both ends reached.
SIGNED, ABSOLUTE = "signed", "absolute"
_TOLERANCE = 0.05
_NUM_EPISODES = 3  # episodes whose values are read


def detect_gripper_convention(reader: EpisodeReader) -> str | None:
    """Return ``SIGNED`` or ``ABSOLUTE`` from the stored gripper of the first episodes, or None if neither is clear.

    The gripper is the last of seven action dimensions. ``SIGNED``: it goes below 0, as -1 to +1 does. ``ABSOLUTE``: it
    stays between 0 and 1 and reaches both.
    """
    raw_fields = dataclasses.replace(reader.fields, gripper="as_is", relabel=None, skip_first=0)
    low, high = np.inf, -np.inf
    for index in range(min(_NUM_EPISODES, len(reader))):
        try:
            actions, _ = raw_fields.actions_and_proprio(reader.read_raw(index).columns)
        except (ValueError, IndexError):  # reported when the episode is used
            continue
        if actions.shape[1] != len(END_EFFECTOR_DIMENSIONS):
            continue
        if len(actions):
            low, high = min(low, actions[:, -1].min()), max(high, actions[:, -1].max())
        if low < -_TOLERANCE:
            return SIGNED
    return ABSOLUTE if low < _TOLERANCE and 1 - _TOLERANCE < high < 1 + _TOLERANCE else None


def require_unconverted_gripper(reader: EpisodeReader, fields: Mapping[str, Any] | None) -> None:
    """Refuse, or warn about, a preset that would invert a gripper which is 0 closed, 1 open already.

    Args:
        reader: The opened dataset.
        fields: Fields given by the user; nothing is checked if they contain ``gripper``.

    Raises:
        ValueError: The preset is one of LIBERO's, whose raw gripper is never 0.
    """
    if reader.preset is None or "gripper" in (fields or {}) or reader.fields.gripper != "clipped_inverted":
        return
    if detect_gripper_convention(reader) != ABSOLUTE:
        return
    message = (
        f"{reader.root}: the preset {reader.preset!r} ({reader.preset_reason}) converts a gripper of -1 open, +1 "
        "closed, but the stored gripper stays between 0 and 1. If it is 0 closed, 1 open, the preset would invert it. "
        "Use no preset (preset: none, --preset none), or set gripper in fields."
    )
    if reader.preset.startswith("libero") and reader.preset not in HDF5_PRESETS:
        raise OpenVLAValueError(message)
    warnings.warn(message, stacklevel=4)
