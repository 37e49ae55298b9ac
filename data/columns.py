"""Which columns of a dataset are cameras, action, proprio and instruction, and how its action becomes the usual one.

The usual action is what OpenVLA was trained on: movements, then an absolute gripper, 0 closed and 1 open. Arithmetic
happens in the dtype that the data is stored in, as in the reference's pipeline, so that results are equal in every bit.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, nearest_name
from ..errors_openvla import OpenVLAValueError

_SLICE = re.compile(r"^(?P<name>.*?)(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?$")

# What a gripper dimension of +1 closing, -1 opening, 0 nothing counts as no command at all.
RELATIVE_GRIPPER_THRESHOLD = 0.1
# Between these a measured gripper is on its way; the state that it reaches is what was commanded.
BINARY_GRIPPER_BOUNDS = (0.05, 0.95)
# A movement whose norm is smaller does nothing (openvla's regenerate_libero_dataset.py).
NOOP_THRESHOLD = 1e-4
CHANNELS = (None, "rgb", "bgr")
# What no colour camera's frames are called; a goal is what follows the action.
_NO_CAMERA = re.compile(
    r"depth|disparity|segment|semantic|pointcloud|infrared|thermal|tactile"
    r"|(^|[./_])(seg|masks?|normals|flow|ir|infra\d?|(sub)?goal)(?=[./_\d]|$)",
    re.I,
)
NO_COLOURS = "no colours of now (depth, masks, infrared, touch, a goal), by its name or shape"
# An instruction that is missing, as pandas, Python and JSON spell it.
_MISSING_TEXTS = ("", "nan", "none", "null", "<na>", "n/a")


def dotted(name: str) -> str:
    """One way to write a nested name: ``observation/image`` is ``observation.image``."""
    return name.replace("/", ".")


def single(value: Any) -> Any:
    """Return the one entry of a list, an array or a tensor of one (numpy's scalars too); all else as it is."""
    while True:
        if isinstance(value, (list, tuple)) and len(value) == 1:
            one = value[0]
        elif hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
            one = value.item()
        else:
            return value
        if type(one) is type(value) and not isinstance(value, (list, tuple)):  # numpy's longdouble has no other
            return one
        value = one


def as_text(value: Any) -> str:
    """Return a stored text as str: bytes are UTF-8, an array of one is its entry, None and NaN are empty.

    Raises:
        ValueError: It is no text, several texts, or the spelling of Python's bytes.
    """
    value = single(value)
    if value is None or isinstance(value, float) and np.isnan(value):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise OpenVLAValueError(f"the text {value!r} is not UTF-8 ({error}); give instruction_text") from error
    if not isinstance(value, str):
        raise OpenVLAValueError(f"an instruction must be one text, got {value!r:.200}; give instruction_text")
    if re.fullmatch(r"b(['\"]).*\1", value.strip(), re.DOTALL):
        raise OpenVLAValueError(f"the text {value!r} is the spelling of Python's bytes; it must be stored as text")
    return str(value).strip("\0")


def noops(actions: np.ndarray) -> np.ndarray:
    """Return which steps do nothing, by openvla's rule for LIBERO: bool ``(length,)``.

    Nothing moves (the norm of all but the last dimension is below ``NOOP_THRESHOLD``) and the gripper's command is that
    of the last step that did something; before the first of those the gripper does not count.
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NOOP_THRESHOLD
    out, gripper = [], None
    for step, command in enumerate(actions[:, -1]):
        out.append(bool(still[step]) and (gripper is None or command == gripper))
        gripper = gripper if out[-1] else command
    return np.array(out, bool)


def alternative_texts(instruction: str, names: Mapping[str, str]) -> list[str]:
    """Return the columns of further instructions: of ``language_instruction`` ``language_instruction_2`` and so on."""
    return sorted(
        name for name in names if names[name] == "text" and re.fullmatch(rf"{re.escape(instruction)}_\d+", name)
    )


def is_no_camera_name(name: str) -> bool:
    """Return whether an image column's name says that it holds no colours of now: depth, masks, infrared, a goal."""
    return _NO_CAMERA.search(name) is not None


def says_nothing(text: str) -> bool:
    """Return whether an instruction is empty, or the spelling of a missing value ("nan", "None")."""
    return text.strip().lower() in _MISSING_TEXTS


def step_order(counters: Mapping[str, np.ndarray], distinct: Iterable[str] = ()) -> np.ndarray | None:
    """Return the order of an episode's rows, or None where they are stored in it.

    Args:
        counters: Number columns ``(length,)`` that count steps or tell their time. The first one decides, the others
            must not contradict it. ``frame_index`` must be consecutive.
        distinct: Further counters, beside ``frame_index``, that must differ from step to step.

    Returns:
        int64 ``(length,)``: the row of every step.

    Raises:
        ValueError: Frames are missing or there twice, two counters contradict each other, or one holds no finite number
            a row.
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
                f"{name} is not a number in row {np.argmin(np.isfinite(column))}; the rows must be repaired"
            )
        steps = np.diff(column[order])
        if (steps < 0).any():
            place = int(np.flatnonzero(steps < 0)[0]) + 1
            raise OpenVLAValueError(
                f"{name} goes back at step {place}, in the order of {first}; the rows must be repaired"
            )
        if name in ("frame_index", *distinct) and (steps == 0).any():
            twice = column[order][1:][steps == 0][0]
            raise OpenVLAValueError(f"{name} {twice:g} is there twice; the rows must be repaired")
        if name == "frame_index" and (steps > 1).any():
            place = column[order][1:][steps > 1][0]
            raise OpenVLAValueError(f"frames are missing before {name} {place:g}; the rows must be repaired")
    return None if (np.diff(order) == 1).all() else order


def absolute_gripper(relative: np.ndarray) -> np.ndarray:
    """Commands (+1 closes, -1 opens, 0 leaves) as positions (0 closed, 1 open), float32 ``(length,)``.

    Before the first command the gripper is what that command changes; without any it is open.
    """
    steps = np.where(relative < -RELATIVE_GRIPPER_THRESHOLD, 1, np.where(relative > RELATIVE_GRIPPER_THRESHOLD, -1, 0))
    state = -next((step for step in steps if step), -1)
    positions = []
    for step in steps:
        state = step or state
        positions.append(state)
    return np.array(positions, np.float32) / 2 + np.float32(0.5)


def binary_gripper(measured: np.ndarray) -> np.ndarray:
    """Positions in [0, 1] as 0 or 1: what lies between is what is reached after it. float32 ``(length,)``.

    An episode that ends in between keeps its last value there.
    """
    closed, opened = BINARY_GRIPPER_BOUNDS
    state, positions = measured[-1], []
    for value in measured[::-1]:
        state = 1.0 if value > opened else 0.0 if value < closed else state
        positions.append(state)
    return np.array(positions[::-1], np.float32)


# How the last action dimension becomes 0 closed, 1 open.
GRIPPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as_is": lambda gripper: gripper,
    "clipped": lambda gripper: np.clip(gripper, 0, 1),
    "inverted": lambda gripper: 1 - gripper,
    "clipped_inverted": lambda gripper: 1 - np.clip(gripper, 0, 1),
    "relative": absolute_gripper,
    "binary": binary_gripper,
}

# How the three rotations of an end effector's movement become radians within half a turn.
ROTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as_is": lambda rotation: rotation,
    "wrapped": lambda rotation: within_half_a_turn(rotation, 2 * np.pi),
    "degrees": np.radians,
    "wrapped_degrees": lambda rotation: np.radians(within_half_a_turn(rotation, 360)),
}


def within_half_a_turn(rotation: np.ndarray, turn: float) -> np.ndarray:
    """Differences of angles without whole turns, in [-turn / 2, turn / 2]; what is there already stays in every bit."""
    return np.where(np.abs(rotation) > turn / 2, rotation - turn * np.round(rotation / turn), rotation)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of columns; nested ones with dots or slashes.

    Attributes:
        cameras: Image columns, in the order in which the model takes them.
        action: Columns that together are the action. ``name[a:b]`` takes part of one, None is a zero.
        proprio: The same for the robot's state; empty for none.
        instruction: The text column; None where the format says the task itself.
        instruction_text: One instruction for a dataset that stores none.
        gripper: A key of ``GRIPPERS``: how the last action dimension becomes 0 closed, 1 open.
        gripper_range: What the last action dimension is where the gripper is closed, and where it is open, in the
            dataset's units: ``(0, 850)``, ``(0.0, 0.08)``, ``(1, -1)``. It becomes 0 and 1, before ``gripper``.
        rotation: A key of ``ROTATIONS``: how dimensions 3 to 5 of seven become radians within half a turn, at the end.
        skip_first: Steps to leave out at the start of an episode.
        relabel: A column whose differences between steps replace the first six action dimensions (Bridge: what was
            reached, not what was commanded); the last step goes.
        rotate_180: Images are stored upside down (LIBERO's HDF5: the model was trained on turned ones).
        channels: "bgr": red and blue of stored images are exchanged; "rgb": they are not; None: as the format knows,
            which is "rgb" but for the encoded frames of ALOHA's and RoboTwin's HDF5.
        drop_noops: Leave out steps that do nothing (``noops`` of the stored action), as in OpenVLA's LIBERO sets.
        action_mask: Which action dimensions are normalised. None: all, but not the gripper of seven.
        standardize: For what the above cannot say: a function of the columns (arrays ``(length, ...)`` by name) to
            ``(action, proprio or None)`` of the same length, before ``gripper`` and the others.
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
            ends = np.asarray(self.gripper_range, dtype=object)
            fits = ends.shape == (2,) and all(isinstance(end, numbers.Real) and np.isfinite(end) for end in ends)
            if not fits or ends[0] == ends[1]:
                raise OpenVLAValueError(
                    f"gripper_range must be two different numbers, closed and open; got {self.gripper_range}."
                )
            object.__setattr__(self, "gripper_range", tuple(map(float, self.gripper_range)))
        for name in ("action", "proprio"):
            parts = getattr(self, name)
            if parts and not any(parts):
                raise OpenVLAValueError(f"{name} names no column, only zeros; got {parts}.")
        if not self.cameras or not self.action and self.standardize is None:
            raise OpenVLAValueError(f"A demonstration needs at least one camera and an action; got {self}.")

    def changed(self, config: Mapping[str, Any]) -> Fields:
        """These fields with some replaced, as a configuration file gives them.

        Raises:
            ValueError: A key is unknown.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for key in config:
            if key not in known:
                near = nearest_name(key, known)
                raise OpenVLAValueError(
                    f"Unknown field {key!r}.{f' Did you mean {near!r}?' if near else ''} Allowed: {known}."
                )
        return dataclasses.replace(self, **config)

    @property
    def shortening(self) -> int:
        """How many stored steps of an episode give no sample."""
        return self.skip_first + (self.relabel is not None)

    def columns(self) -> set[str]:
        """Names of all number columns that are read."""
        named = [_SLICE.match(part)["name"] for part in (*self.action, *self.proprio, self.relabel) if part]
        return set(named)

    def action_width(self, widths: Mapping[str, int]) -> int:
        """Return the number of action dimensions, of columns of these widths; a part that selects nothing counts 0."""
        width = 0
        for part in self.action:
            match = part and _SLICE.match(part)
            width += len(range(widths[match["name"]])[_slice(match)]) if match else 1
        return width

    def tables(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions and proprio of an episode, float64 ``(length, dimensions)``.

        Args:
            columns: Arrays ``(stored length, ...)`` by dotted name.

        Raises:
            ValueError: A column has more than one dimension a step, or lengths disagree.
        """
        if self.standardize is not None:
            action, proprio = self.standardize(columns)
        else:
            action = _joined(columns, self.action)
            proprio = _joined(columns, self.proprio) if self.proprio else None
        if proprio is not None and len(proprio) != len(action):
            raise OpenVLAValueError(f"{len(action)} actions but {len(proprio)} proprio values")
        action = action[self.skip_first :]
        proprio = None if proprio is None else proprio[self.skip_first :]
        if len(action) and (self.gripper != "as_is" or self.gripper_range):
            gripper = action[:, -1]
            if self.gripper_range:
                closed, opened = self.gripper_range
                gripper = (gripper - closed) / (opened - closed)
            gripper = np.asarray(GRIPPERS[self.gripper](gripper))
            action = np.concatenate([action[:, :-1], gripper[:, None]], axis=1)
        if self.relabel is not None:
            reached = _column(columns, self.relabel)[self.skip_first :, :6]
            action = np.concatenate([reached[1:] - reached[:-1], action[:-1, 6:]], axis=1)
            proprio = None if proprio is None else proprio[:-1]
        if self.rotation != "as_is":
            if action.shape[1] != len(END_EFFECTOR_DIMENSIONS):
                raise OpenVLAValueError(
                    f"rotation: {self.rotation} needs an action of seven, got {action.shape[1]} dimensions"
                )
            action = np.concatenate([action[:, :3], ROTATIONS[self.rotation](action[:, 3:6]), action[:, 6:]], axis=1)
        return action.astype(np.float64), None if proprio is None else proprio.astype(np.float64)

    def moving_steps(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the steps of ``tables`` that are no no-ops: int64 ``(count,)``."""
        action, _ = dataclasses.replace(self, gripper="as_is").tables(columns)
        return np.flatnonzero(~noops(action))


def _column(columns: Mapping[str, np.ndarray], part: str) -> np.ndarray:
    """One column, or a part of it: ``(length, dimensions)``."""
    match = _SLICE.match(part)
    values = np.asarray(columns[match["name"]])
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise OpenVLAValueError(
            f"{match['name']!r} must hold flat numbers a step, got shape {values.shape}, {values.dtype}"
        )
    return values[:, _slice(match)]


def _slice(match: re.Match[str]) -> slice:
    """Return which dimensions a part takes: all where it says none."""
    return slice(*(int(end) if end else None for end in (match["start"], match["stop"])))


def _joined(columns: Mapping[str, np.ndarray], parts: Iterable[str | None]) -> np.ndarray:
    named = {part: _column(columns, part) for part in parts if part}
    lengths = {part: len(values) for part, values in named.items()}
    if len(set(lengths.values())) > 1:
        raise OpenVLAValueError(f"columns of different lengths: {lengths}")
    floats = [values.dtype for values in named.values() if values.dtype.kind == "f"]
    dtype = np.result_type(*floats) if floats else np.float32
    zero = np.zeros((next(iter(lengths.values()), 0), 1), dtype)
    return np.concatenate([named[part].astype(dtype) if part else zero for part in parts], axis=1)
