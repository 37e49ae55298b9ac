"""The fields of a dataset (``ColumnSpec``) and the conversion of its action to OpenVLA's convention.

OpenVLA was trained on end-effector movements followed by an absolute gripper, 0 closed and 1 open. Arithmetic runs in
the dtype of the stored data, as in the reference's pipeline, so that results are bitwise equal.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..actions_openvla import nearest_name
from ..dimension_labels import END_EFFECTOR_DIMENSIONS
from ..errors_openvla import OpenVLAValueError

_COLUMN_PART = re.compile(r"^(?P<name>.*?)(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?$")

# A relative gripper command (+1 closes, -1 opens) with a smaller magnitude is no command.
RELATIVE_GRIPPER_THRESHOLD = 0.1
# Between these a measured gripper is moving; the state that it reaches is taken as the command.
BINARY_GRIPPER_BOUNDS = (0.05, 0.95)
# A movement with a smaller norm is a no-op (openvla's regenerate_libero_dataset.py).
NOOP_THRESHOLD = 1e-4
CHANNELS = (None, "rgb", "bgr")
# Names of image columns that are not colour frames of the current step; a goal image is from after the action.
_NON_CAMERA_NAME = re.compile(
    r"depth|disparity|segment|semantic|pointcloud|infrared|thermal|tactile"
    r"|(^|[./_])(seg|masks?|normals|flow|ir|infra\d?|(sub)?goal)(?=[./_\d]|$)",
    re.I,
)
NOT_RGB = "depth, masks, infrared, touch or a goal image, by its name or shape"
# How pandas, Python and JSON spell a missing instruction.
_MISSING_TEXTS = ("", "nan", "none", "null", "<na>", "n/a")


def dotted(name: str) -> str:
    """Return a nested name with dots: ``observation/image`` as ``observation.image``."""
    return name.replace("/", ".")


def unwrap_scalar(value: Any) -> Any:
    """Return the only entry of a list, array, tensor or numpy scalar; any other value unchanged."""
    while True:
        if isinstance(value, (list, tuple)) and len(value) == 1:
            entry = value[0]
        elif hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
            entry = value.item()
        else:
            return value
        if type(entry) is type(value) and not isinstance(value, (list, tuple)):  # numpy's longdouble stays one
            return entry
        value = entry


def as_text(value: Any) -> str:
    """Return a stored text as str: bytes are decoded as UTF-8, an array of one is unwrapped, None and NaN are empty.

    Raises:
        ValueError: The value is not a text, is several texts, or is the repr of Python bytes.
    """
    value = unwrap_scalar(value)
    if value is None or isinstance(value, float) and np.isnan(value):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise OpenVLAValueError(f"the text {value!r} is not UTF-8 ({error}); set instruction_text") from error
    if not isinstance(value, str):
        raise OpenVLAValueError(f"an instruction must be one text, got {value!r:.200}; set instruction_text")
    if re.fullmatch(r"b(['\"]).*\1", value.strip(), re.DOTALL):
        raise OpenVLAValueError(f"the text {value!r} is the repr of Python bytes; it must be stored as text")
    return str(value).strip("\0")


def find_noops(actions: np.ndarray) -> np.ndarray:
    """Return which steps are no-ops by openvla's rule for LIBERO (regenerate_libero_dataset.py): bool ``(length,)``.

    A step is a no-op if the norm of all dimensions but the last is below ``NOOP_THRESHOLD`` and the gripper command
    equals that of the last step that was not a no-op. Before the first such step the gripper is ignored.

    Args:
        actions: ``(length, action_dim)``, the gripper last.
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NOOP_THRESHOLD
    noops: list[bool] = []
    gripper = None
    for step, command in enumerate(actions[:, -1]):
        noops.append(bool(still[step]) and (gripper is None or command == gripper))
        gripper = gripper if noops[-1] else command
    return np.array(noops, bool)


def alternative_instruction_columns(instruction: str, column_kinds: Mapping[str, str]) -> list[str]:
    """Return columns with further instructions: for ``language_instruction``, ``language_instruction_2`` and so on."""
    return sorted(
        name
        for name, kind in column_kinds.items()
        if kind == "text" and re.fullmatch(rf"{re.escape(instruction)}_\d+", name)
    )


def is_non_camera_name(name: str) -> bool:
    """Return whether an image column is depth, a mask, infrared, touch or a goal image by its name."""
    return _NON_CAMERA_NAME.search(name) is not None


def is_empty_instruction(text: str) -> bool:
    """Return whether an instruction is empty or spells a missing value ("nan", "None")."""
    return text.strip().lower() in _MISSING_TEXTS


def step_order(counters: Mapping[str, np.ndarray], distinct: Iterable[str] = ()) -> np.ndarray | None:
    """Return the table rows of an episode in the order of its steps, or None if they are stored in order.

    Args:
        counters: Numeric columns ``(length,)`` that count steps or hold their time. The first one decides; the others
            must not contradict it. ``frame_index`` must be consecutive.
        distinct: Further counters that, like ``frame_index``, must differ from step to step.

    Returns:
        int64 ``(length,)``: the row of every step.

    Raises:
        ValueError: Frames are missing or duplicated, two counters contradict each other, or a counter does not hold
            one finite number per row.
    """
    if not counters:
        return None
    first = next(iter(counters))
    length, values = len(counters[first]), {}
    for name, column in counters.items():
        column = np.asarray(column)
        if column.dtype.kind not in "iufmM" or len(column) != length or column.size != length:
            raise OpenVLAValueError(
                f"{name} must hold one number in each of {length} rows, got {column.dtype} of shape {column.shape}"
            )
        values[name] = column.reshape(-1).astype(np.float64)
    order = np.argsort(values[first], kind="stable")
    for name, column in values.items():
        if not np.isfinite(column).all():
            raise OpenVLAValueError(
                f"{name} is not a number in row {np.argmin(np.isfinite(column))}; repair the rows of the dataset"
            )
        steps = np.diff(column[order])
        if (steps < 0).any():
            step = int(np.flatnonzero(steps < 0)[0]) + 1
            raise OpenVLAValueError(
                f"{name} decreases at step {step}, in the order of {first}; repair the rows of the dataset"
            )
        if name in ("frame_index", *distinct) and (steps == 0).any():
            duplicate = column[order][1:][steps == 0][0]
            raise OpenVLAValueError(f"{name} {duplicate:g} is duplicated; repair the rows of the dataset")
        if name == "frame_index" and (steps > 1).any():
            after_gap = column[order][1:][steps > 1][0]
            raise OpenVLAValueError(f"frames are missing before {name} {after_gap:g}; repair the rows of the dataset")
    return None if (np.diff(order) == 1).all() else order


def absolute_gripper(commands: np.ndarray) -> np.ndarray:
    """Convert relative commands (+1 closes, -1 opens, 0 holds) to positions (0 closed, 1 open), float32 ``(length,)``.

    Before the first command the gripper is in the state that this command changes; without any command it is open.
    """
    directions = np.where(
        commands < -RELATIVE_GRIPPER_THRESHOLD, 1, np.where(commands > RELATIVE_GRIPPER_THRESHOLD, -1, 0)
    )
    state = -next((direction for direction in directions if direction), -1)
    positions = []
    for direction in directions:
        state = direction or state
        positions.append(state)
    return np.array(positions, np.float32) / 2 + np.float32(0.5)


def binary_gripper(measured: np.ndarray) -> np.ndarray:
    """Round positions in [0, 1] to 0 or 1: a moving gripper counts as the state it reaches. float32 ``(length,)``.

    An episode that ends while the gripper is moving keeps its last value there.
    """
    closed, opened = BINARY_GRIPPER_BOUNDS
    state, positions = measured[-1], []
    for value in measured[::-1]:
        state = 1.0 if value > opened else 0.0 if value < closed else state
        positions.append(state)
    return np.array(positions[::-1], np.float32)


def wrap_angle(rotation: np.ndarray, turn: float) -> np.ndarray:
    """Remove whole turns from angle differences; values within [-turn / 2, turn / 2] stay bitwise equal."""
    return np.where(np.abs(rotation) > turn / 2, rotation - turn * np.round(rotation / turn), rotation)


# Conversions of the last action dimension to 0 closed, 1 open.
GRIPPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as_is": lambda gripper: gripper,
    "clipped": lambda gripper: np.clip(gripper, 0, 1),
    "inverted": lambda gripper: 1 - gripper,
    "clipped_inverted": lambda gripper: 1 - np.clip(gripper, 0, 1),
    "relative": absolute_gripper,
    "binary": binary_gripper,
}

# Conversions of an end effector's three rotations to radians within half a turn.
ROTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as_is": lambda rotation: rotation,
    "wrapped": lambda rotation: wrap_angle(rotation, 2 * np.pi),
    "degrees": np.radians,
    "wrapped_degrees": lambda rotation: np.radians(wrap_angle(rotation, 360)),
}


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """The fields of a dataset: which columns are cameras, action, proprio and instruction, and how to convert them.

    Nested column names are written with dots or slashes.

    Attributes:
        cameras: Image columns, in the order in which the model takes them.
        action: Columns that are concatenated to the action. ``name[a:b]`` takes some dimensions, None is a zero.
        proprio: The same for the robot's state; empty for none.
        instruction: The text column; None if the format stores the task itself.
        instruction_text: One instruction for all episodes, for a dataset that stores none.
        gripper: A key of ``GRIPPERS``: how to convert the last action dimension to 0 closed, 1 open.
        gripper_range: The values of the last action dimension for the closed and the open gripper, in the dataset's
            units: ``(0, 850)``, ``(0.0, 0.08)``, ``(1, -1)``. They are mapped to 0 and 1 before ``gripper``.
        rotation: A key of ``ROTATIONS``: how to convert dimensions 3 to 5 of seven to radians within half a turn;
            applied last.
        skip_first: Number of steps to drop at the start of every episode.
        relabel: A column whose differences between steps replace the first six action dimensions (Bridge: the reached
            pose instead of the commanded one); drops the last step.
        rotate_180: Rotate the images by 180 degrees (LIBERO's HDF5 files store them upside down).
        channels: "bgr": swap red and blue of the stored images; "rgb": do not; None: decide by the format, which is
            "rgb" except for the encoded frames of ALOHA's and RoboTwin's HDF5 files.
        drop_noops: Drop steps that do nothing (``find_noops`` of the stored action), as in OpenVLA's LIBERO datasets.
        action_mask: Which action dimensions are normalised. None: all except the gripper of seven.
        standardize: For conversions that the other fields cannot express: a function from all columns (arrays
            ``(length, ...)`` by name) to ``(action, proprio or None)`` of the same length. Applied before ``gripper``
            and the other conversions.
    """

    cameras: tuple[str, ...]
    action: tuple[str | None, ...]
    proprio: tuple[str | None, ...] = ()
    instruction: str | None = None
    instruction_text: str | None = None
    gripper: str = "as_is"
    gripper_range: tuple[float, float] | None = None
    rotation: str = "as_is"
    skip_first: int = 0
    relabel: str | None = None
    rotate_180: bool = False
    channels: str | None = None
    drop_noops: bool = False
    action_mask: tuple[bool, ...] | None = None
    standardize: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, np.ndarray | None]] | None = None

    def __post_init__(self) -> None:
        """Convert names to dotted ones and sequences to tuples, and validate every field."""
        for name in ("cameras", "action", "proprio"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, name, tuple(part and dotted(part) for part in value))
        for name in ("instruction", "relabel"):
            object.__setattr__(self, name, getattr(self, name) and dotted(getattr(self, name)))
        if self.action_mask is not None:
            object.__setattr__(self, "action_mask", tuple(map(bool, self.action_mask)))
        if self.gripper not in GRIPPERS:
            raise OpenVLAValueError(f"Unknown gripper {self.gripper!r}. Allowed: {list(GRIPPERS)}.")
        if self.channels not in CHANNELS:
            raise OpenVLAValueError(f"Unknown channels {self.channels!r}. Allowed: {list(CHANNELS)}.")
        for name in ("rotate_180", "drop_noops"):
            if not isinstance(getattr(self, name), bool):
                raise OpenVLAValueError(f"The field {name} must be true or false, got {getattr(self, name)!r}.")
        if self.rotation not in ROTATIONS:
            raise OpenVLAValueError(f"Unknown rotation {self.rotation!r}. Allowed: {list(ROTATIONS)}.")
        if self.gripper_range is not None:
            object.__setattr__(self, "gripper_range", _validated_range(self.gripper_range))
        for name in ("action", "proprio"):
            parts = getattr(self, name)
            if parts and not any(parts):
                raise OpenVLAValueError(f"{name} must name at least one column, got only zeros: {parts}.")
        if not self.cameras or not self.action and self.standardize is None:
            raise OpenVLAValueError(f"A dataset needs at least one camera and an action, got {self}.")

    def replace(self, changes: Mapping[str, Any]) -> ColumnSpec:
        """Return a copy with some fields replaced, as a configuration file gives them.

        Raises:
            ValueError: A key is not a field.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for key in changes:
            if key not in known:
                nearest = nearest_name(key, known)
                hint = f" Did you mean {nearest!r}?" if nearest else ""
                raise OpenVLAValueError(f"Unknown field {key!r}.{hint} Allowed: {known}.")
        return dataclasses.replace(self, **changes)

    @property
    def num_dropped_steps(self) -> int:
        """Return the number of stored steps per episode that give no sample."""
        return self.skip_first + (self.relabel is not None)

    def numeric_columns(self) -> set[str]:
        """Return the names of all numeric columns that are read."""
        return {parse_part(part).name for part in (*self.action, *self.proprio, self.relabel) if part}

    def action_width(self, widths: Mapping[str, int]) -> int:
        """Return the number of action dimensions, given the number of dimensions of every column."""
        width = 0
        for entry in self.action:
            part = parse_part(entry) if entry else None
            width += len(range(widths[part.name])[part.dimensions]) if part else 1
        return width

    def actions_and_proprio(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the converted actions and proprio of an episode, float64 ``(length, dimensions)`` each.

        Args:
            columns: Arrays ``(stored length, ...)`` by dotted name.

        Raises:
            ValueError: A column has more than one dimension per step, or lengths disagree.
        """
        if self.standardize is not None:
            action, proprio = self.standardize(columns)
        else:
            action = _concatenate(columns, self.action)
            proprio = _concatenate(columns, self.proprio) if self.proprio else None
        if proprio is not None and len(proprio) != len(action):
            raise OpenVLAValueError(f"{len(action)} actions but {len(proprio)} proprio values")
        action = action[self.skip_first :]
        proprio = None if proprio is None else proprio[self.skip_first :]
        if len(action) and (self.gripper != "as_is" or self.gripper_range):
            action = self._with_converted_gripper(action)
        if self.relabel is not None:
            poses = _column(columns, self.relabel)[self.skip_first :, :6]
            action = np.concatenate([poses[1:] - poses[:-1], action[:-1, 6:]], axis=1)
            proprio = None if proprio is None else proprio[:-1]
        if self.rotation != "as_is":
            if action.shape[1] != len(END_EFFECTOR_DIMENSIONS):
                raise OpenVLAValueError(
                    f"rotation: {self.rotation} needs an action of seven dimensions, got {action.shape[1]}"
                )
            action = np.concatenate([action[:, :3], ROTATIONS[self.rotation](action[:, 3:6]), action[:, 6:]], axis=1)
        return action.astype(np.float64), None if proprio is None else proprio.astype(np.float64)

    def _with_converted_gripper(self, action: np.ndarray) -> np.ndarray:
        gripper = action[:, -1]
        if self.gripper_range:
            closed, opened = self.gripper_range
            gripper = (gripper - closed) / (opened - closed)
        gripper = np.asarray(GRIPPERS[self.gripper](gripper))
        return np.concatenate([action[:, :-1], gripper[:, None]], axis=1)

    def non_noop_steps(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the steps of ``actions_and_proprio`` that are not no-ops: int64 ``(count,)``."""
        action, _ = dataclasses.replace(self, gripper="as_is").actions_and_proprio(columns)
        return np.flatnonzero(~find_noops(action))


class ColumnPart(NamedTuple):
    """A column and which of its dimensions to take."""

    name: str
    dimensions: slice


def parse_part(text: str) -> ColumnPart:
    """Return the column and the dimensions that ``name`` or ``name[a:b]`` takes."""
    match = _COLUMN_PART.match(text)
    if match is None:
        raise OpenVLAValueError(f"{text!r} is not a column's name.")
    return ColumnPart(match["name"], slice(*(int(end) if end else None for end in (match["start"], match["stop"]))))


def _validated_range(values: Any) -> tuple[float, float]:
    ends = np.asarray(values, dtype=object)
    valid = ends.shape == (2,) and all(isinstance(end, numbers.Real) and math.isfinite(end) for end in ends)
    if not valid or ends[0] == ends[1]:
        raise OpenVLAValueError(f"gripper_range must be two different numbers, closed and open; got {values}.")
    return float(values[0]), float(values[1])


def _column(columns: Mapping[str, np.ndarray], text: str) -> np.ndarray:
    """Return a column, or some of its dimensions: ``(length, dimensions)``."""
    part = parse_part(text)
    values = np.asarray(columns[part.name])
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise OpenVLAValueError(
            f"{part.name!r} must hold one vector of numbers per step, got shape {values.shape}, {values.dtype}"
        )
    width, ends = values.shape[1], (part.dimensions.start, part.dimensions.stop)
    if any(end is not None and abs(end) > width for end in ends) or width and not range(width)[part.dimensions]:
        raise OpenVLAValueError(f"{text!r} must take dimensions of {part.name!r}, which has {width}")
    return values[:, part.dimensions]


def _concatenate(columns: Mapping[str, np.ndarray], parts: Iterable[str | None]) -> np.ndarray:
    """Return the parts side by side, ``(length, dimensions)``; None is a column of zeros."""
    arrays = {part: _column(columns, part) for part in parts if part}
    lengths = {part: len(values) for part, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise OpenVLAValueError(f"columns have different lengths: {lengths}")
    floats = [values.dtype for values in arrays.values() if values.dtype.kind == "f"]
    dtype = np.result_type(*floats) if floats else np.float32
    zero = np.zeros((next(iter(lengths.values()), 0), 1), dtype)
    return np.concatenate([arrays[part].astype(dtype) if part else zero for part in parts], axis=1)
