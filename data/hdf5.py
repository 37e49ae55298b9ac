"""Read HDF5 datasets: LIBERO and robomimic (``data/demo_i``), ALOHA (one file per episode) and similar layouts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAValueError
from .columns import NOT_RGB, ColumnSpec, as_text, dotted, is_non_camera_name
from .episodes import IMAGE, NUMERIC, TEXT, DatasetError, EpisodeReader, RawEpisode, decode_image
from .file_handles import FileHandleCache
from .gripper_check import require_unconverted_gripper
from .presets import AUTO, HDF5_PRESETS, PRESETS, merge_fields
from .utils import require

_SUFFIXES = (".hdf5", ".h5")
# First bytes of JPEG and PNG files.
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# Groups of observations after the action: robomimic's next_obs.
_NEXT_OBSERVATION = re.compile(r"(^|[./])next(_(obs|state|frame|image|rgb)\w*)?([./]|$)", re.I)
# Columns or attributes that hold an instruction, in order of preference. The last ones often hold a task's short name
# or a language code, so only values of several words count.
_INSTRUCTION_KEYS = (
    *("language_instruction", "natural_language_instruction", "instruction", "language_raw", "task_description"),
    *("task_instruction", "task", "language", "lang", "prompt"),
)
_MULTI_WORD_KEYS = ("task", "language", "lang", "prompt")
# JSON attributes of LIBERO and robosuite, and the key of the instruction in them.
_JSON_ATTRIBUTES = {"problem_info": "language_instruction", "ep_meta": "lang"}
# Masks of demos that are held out of training: robomimic's valid, or 20_percent_valid.
_HELD_OUT = re.compile(r"(^|_)(valid|val|validation|test|eval)$")


def hdf5_files(path: Path) -> list[Path]:
    """Return the HDF5 files of a folder, sorted by name with numbers in numeric order, or the file itself."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    files = (file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    return sorted(files, key=lambda file: _natural_key(str(file)))


def _natural_key(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open_file(path: Path) -> Any:
    try:
        return require("h5py", "Reading HDF5").File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path} cannot be opened: {error}. It is damaged or not an HDF5 file.") from error


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns of an episode.

    Attributes:
        kinds: The kind of every readable column by dotted name.
        encoded: Image columns that hold JPEG or PNG data.
        unusable: Image columns that are not offered as cameras, with the reason.
    """

    kinds: dict[str, str]
    encoded: set[str]
    unusable: dict[str, str]


class HDF5Reader(EpisodeReader):
    """Reader of HDF5 files. Every group below ``data`` is an episode, or the whole file if it has no such group.

    Args:
        root: The folder, or the one file.
        files: The files, in order.
        preset: As in ``open_dataset``; "auto" detects LIBERO and ALOHA by their columns.
        fields: Fields of ``ColumnSpec`` to replace.
        name: The dataset's name. Default: the name of the folder or file.
        split: As in ``open_dataset``.

    Raises:
        KeyError: A field names a column that does not exist.
        DatasetError: No file can be opened.
        ValueError: The split does not exist, or the columns are LIBERO's but it is unclear whether the images are
            stored upside down.
    """

    root: Path
    format = "hdf5"

    def __init__(
        self,
        root: Path,
        files: list[Path],
        *,
        preset: str | None = AUTO,
        fields: Mapping[str, Any] | None = None,
        name: str | None = None,
        split: str = "train",
    ) -> None:
        self._files, self.handles, self.split = files, FileHandleCache(_open_file), split
        self._file_instructions: dict[Path, str | list[str]] = {}
        self.episodes = self._find_episodes(root)
        readable = [(file, group) for file, group in self.episodes if group is not None]
        if not readable:
            raise DatasetError(f"{root}: none of its {len(files)} HDF5 files has an episode that can be read.")
        # The kinds of columns cannot be read from an episode without steps.
        file, group = next((pair for pair in readable if _has_steps(self.handles[pair[0]][pair[1]])), readable[0])
        columns = _scan_columns(self.handles[file][group])
        self.encoded, self.unusable_columns = columns.encoded, columns.unusable
        if preset == AUTO:
            preset = next(
                (layout for layout in HDF5_PRESETS if PRESETS[layout].numeric_columns() <= set(columns.kinds)), None
            )
            self.preset_reason = "by its columns"
            if preset == "libero_hdf5" and "rotate_180" not in (fields or {}):
                self._require_upside_down()
        self.preset, self._is_aloha = preset, preset == "aloha_hdf5"
        suggested = _suggest_fields(columns)
        merged = merge_fields(suggested, preset, fields, root, "" if suggested else _describe_columns(columns))
        super().__init__(root, name or root.stem, columns.kinds, merged)
        require_unconverted_gripper(self, fields)
        if future := [column for column in self.fields.proprio if column and _NEXT_OBSERVATION.search(column)]:
            raise OpenVLAValueError(
                f"{root}: the proprio columns {future} are from after the action; use columns from before it."
            )

    def _find_episodes(self, root: Path) -> list[tuple[Path, str | None]]:
        """Return file and group of every episode of the split; the group is None for a file that cannot be opened."""
        episodes: list[tuple[Path, str | None]] = []
        masks: set[str] = set()
        for file in self._files:
            try:
                handle = self.handles[file]
            except DatasetError:  # raised when the episode is read
                episodes.append((file, None))
                continue
            masks |= set(_read_masks(handle))
            episodes += [(file, group) for group in _groups_of_split(handle, self.split)]
        if self.split not in ("train", "all", *masks):
            known = sorted({"train", "all", *masks})
            nearest = nearest_name(self.split, known)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise OpenVLAValueError(f"{root} has no split {self.split!r}.{hint} Allowed: {known}.")
        if not episodes:
            raise OpenVLAValueError(
                f"{root}: split {self.split!r} has no episode; use another of {sorted({'all', *masks})}."
            )
        return episodes

    def _require_upside_down(self) -> None:
        """Raise ValueError if images in LIBERO's columns may be upright, so that rotating them would be wrong."""
        for file in dict.fromkeys(file for file, group in self.episodes if group is not None):
            if doubt := _doubt_of_libero(self.handles[file], file.stem):
                raise OpenVLAValueError(
                    f"{file} has LIBERO's columns, but {doubt}: it is unclear whether its images are stored upside "
                    "down. Set the field rotate_180: true (upside down, as LIBERO stores them) or false (upright); and "
                    "gripper, if it is not LIBERO's -1 open to 1 closed (clipped_inverted)."
                )

    @property
    def files(self) -> list[Path]:
        """Return the HDF5 files."""
        return list(self._files)

    def digest(self, times: bool = True) -> str:
        """Return the base class's digest combined with the split."""
        return hashlib.sha256(f"{super().digest(times)} {self.split}".encode()).hexdigest()

    def notes(self) -> list[str]:
        """Return notes for the user on how the dataset is read, where the fields do not show it."""
        notes, (file, group) = super().notes(), next(pair for pair in self.episodes if pair[1] is not None)
        for camera in self.fields.cameras if self.fields.channels is None else ():
            if camera in self.encoded:
                swapped = self._has_swapped_channels(self.handles[file][group], camera)
                notes.append(
                    f"{camera} holds encoded images, read as {'BGR' if swapped else 'RGB'}; if red and blue are "
                    f"swapped (OpenCV encodes BGR), set the field channels: {'rgb' if swapped else 'bgr'}"
                )
        notes += [
            f"{name} is not used as a camera: it holds {reason}" for name, reason in self.unusable_columns.items()
        ]
        return notes

    def _has_swapped_channels(self, group: Any, camera: str) -> bool:
        """Return whether the frames were encoded by OpenCV from RGB arrays, as the ALOHA and RoboTwin recorders do."""
        is_robotwin = camera.endswith(".rgb") and "joint_action" in group
        if self.fields.channels is not None or not (is_robotwin or self._is_aloha):
            return False
        stored = group[_stored_path(camera)]
        if stored.ndim == 4:
            return False
        fixed_length = stored.dtype.kind == "S"  # RDT and AgileX in ALOHA's layout
        return is_robotwin or self._is_aloha and (fixed_length or bool(group.file.attrs.get("compress", False)))

    def __len__(self) -> int:
        return len(self.episodes)

    def _group(self, index: int) -> tuple[str, Any]:
        """Return the id and the HDF5 group of an episode."""
        file, group = self.episodes[index]
        episode_id = str(file.relative_to(self.root) if file != self.root else file.name)
        if group is not None and group != "/":
            episode_id += f":{group.removeprefix('data/')}"
        return episode_id, self.handles[file][group or "/"]

    def _stored_length(self, index: int) -> int:
        episode_id, group = self._group(index)
        column = next(iter(sorted(self.fields.numeric_columns())), None)
        path = _stored_path(column) if column else next(iter(map(_stored_path, self.fields.cameras)))
        if path not in group or not getattr(group[path], "shape", ()):
            raise DatasetError(f"{self.episodes[index][0]}, episode {episode_id}: there is no column {path!r}.")
        return len(group[path])

    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored."""
        file, group_name = self.episodes[index]
        episode_id, group = self._group(index)
        where = f"{file}, episode {episode_id}"
        names = self.fields.numeric_columns() if self.fields.standardize is None else set(self.column_kinds)
        numeric = sorted(name for name in names if self.column_kinds[name] == NUMERIC)
        self._require_columns(where, group, numeric)
        try:
            columns = {name: group[_stored_path(name)][()] for name in numeric}
            lengths = {name: group[_stored_path(name)].shape[0] for name in (*numeric, *self.fields.cameras)}
            instructions = self._read_instructions(group, file)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{where}: {error}.") from error
        if len(set(lengths.values())) > 1:
            raise DatasetError(f"{where}: columns have different lengths: {lengths}.")
        swapped = {camera: self._has_swapped_channels(group, camera) for camera in self.fields.cameras}

        def load_image(camera: str, step: int) -> np.ndarray:
            stored = self.handles[file][group_name or "/"][_stored_path(camera)]
            if stored.ndim == 4:
                return stored[step]
            image = decode_image(bytes(stored[step]))  # encoded, padded to one length
            return image[..., ::-1] if swapped[camera] else image

        return RawEpisode(episode_id, str(file), columns, instructions, load_image)

    def _require_columns(self, where: str, group: Any, numeric: list[str]) -> None:
        required = [*numeric, *self.fields.cameras, *filter(None, [self.fields.instruction])]
        if missing := sorted(name for name in required if _stored_path(name) not in group):
            raise DatasetError(f"{where}: the columns {missing} are missing.")
        h5py = require("h5py", "Reading HDF5")
        for name in required:
            node = group[_stored_path(name)]
            if not isinstance(node, h5py.Dataset) or not node.shape and name != self.fields.instruction:
                raise DatasetError(f"{where}: {name} must be a column with one row per step.")

    def _read_instructions(self, group: Any, file: Path) -> str | list[str]:
        """Return the instruction from the configured column, else the demo, the file, or LIBERO's file name."""
        if self.fields.instruction:
            return _read_texts(group[_stored_path(self.fields.instruction)])
        nested: dict[str, str] = {}
        for name, kind in self.column_kinds.items():
            if kind == TEXT and not _NEXT_OBSERVATION.search(name):
                nested.setdefault(name.rpartition(".")[2], _stored_path(name))
        instructions = _find_instruction(group, nested)
        if instructions is not None:
            return instructions
        if file not in self._file_instructions:
            parents = (_find_instruction(node, {}) for node in (group.parent, group.file))
            inherited = next((text for text in parents if text is not None), None)
            self._file_instructions[file] = _instruction_from_file_name(file.stem) if inherited is None else inherited
        return self._file_instructions[file]


def _instruction_from_file_name(stem: str) -> str:
    """Return the instruction in LIBERO's file names: KITCHEN_SCENE3_turn_on_the_stove_demo."""
    if not stem.endswith("_demo"):
        return ""
    return re.sub(r"^[A-Z0-9_]+_SCENE\d+_", "", stem).removesuffix("_demo").replace("_", " ")


def _find_instruction(node: Any, nested: Mapping[str, str]) -> str | list[str] | None:
    """Return the instruction in a column or an attribute of a group: one text, or one per step; None if there is none.

    Args:
        node: The group.
        nested: Paths of text columns in subgroups, by their last name.
    """
    attributes = set(node.attrs)
    for key in _INSTRUCTION_KEYS:
        column = next((node[path] for path in (key, nested.get(key)) if path and _is_text(node.get(path))), None)
        try:
            if column is not None:
                instructions = _read_texts(column)
            elif key in attributes:
                instructions = _read_attribute(node, key)
            else:
                continue
        except ValueError:
            if key in _MULTI_WORD_KEYS:  # a task's number
                continue
            raise
        texts = [instructions] if isinstance(instructions, str) else instructions
        if key not in _MULTI_WORD_KEYS or any(len(text.split()) > 1 for text in texts):
            return instructions
    for key, entry in _JSON_ATTRIBUTES.items():
        if key in attributes:
            content = json.loads(_read_attribute(node, key) or "{}")
            if isinstance(content, Mapping) and entry in content:
                return _join_parts(content[entry])
    return None


def _join_parts(instruction: Any) -> str:
    """Return an instruction that is stored as a text, a list of words or a list of letters."""
    if not isinstance(instruction, list) or len(instruction) < 2:
        return as_text(instruction or "")
    parts = [as_text(part) for part in instruction]
    return ("" if all(len(part) < 2 for part in parts) else " ").join(parts)


def _read_texts(stored: Any) -> str | list[str]:
    """Return the texts of a column: one, or one per step."""
    texts = [as_text(text) for text in np.ravel(np.asarray(stored[()], object))]
    return texts if len(texts) > 1 else (texts or [""])[0]


def _read_attribute(node: Any, key: str) -> str:
    value = node.attrs[key]
    return "" if isinstance(value, require("h5py", "Reading HDF5").Empty) else as_text(value)


def _is_text(stored: Any) -> bool:
    h5py = require("h5py", "Reading HDF5")
    return isinstance(stored, h5py.Dataset) and h5py.check_string_dtype(stored.dtype) is not None


def _groups_of_split(file: Any, split: str) -> list[str]:
    """Return the episodes of a file that belong to a split.

    Raises:
        ValueError: The file's masks do not define the training split, or name a demo that does not exist.
    """
    demos = [f"data/{name}" for name in _demo_names(file)] or ["/"]
    masks = _read_masks(file)
    has_held_out = any(_HELD_OUT.search(name) for name in masks)
    if split == "all" or split == "train" and "train" not in masks and not has_held_out:
        return demos
    if split == "train" and "train" not in masks:
        raise OpenVLAValueError(
            f"{file.filename} has masks for held-out demos, {sorted(masks)}, but no mask 'train'; set split: one of "
            f"{sorted({'all', *masks})}."
        )
    selected = {f"data/{name}" for name in masks.get(split, ())}
    if missing := sorted(selected - set(demos)):
        raise OpenVLAValueError(f"{file.filename}: mask {split!r} names {missing}, which do not exist; set split: all.")
    return [demo for demo in demos if demo in selected]


def _demo_names(file: Any) -> list[str]:
    """Return the names of the groups below ``data``; empty if the file is one episode."""
    h5py = require("h5py", "Reading HDF5")
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        return []
    return sorted((name for name in data if data.get(name, getclass=True) is h5py.Group), key=_natural_key)


def _read_masks(file: Any) -> dict[str, list[str]]:
    """Return the names of demos by split: robomimic's ``mask/train`` and others."""
    h5py = require("h5py", "Reading HDF5")
    if not _demo_names(file) or not isinstance(file.get("mask"), h5py.Group):
        return {}
    stored = {
        name: node for name, node in file["mask"].items() if _is_text(node) or getattr(node, "shape", None) == (0,)
    }
    return {name: [as_text(demo) for demo in np.ravel(node[()])] for name, node in stored.items()}


def _doubt_of_libero(file: Any, stem: str) -> str | None:
    """Return why a file with LIBERO's columns may not be LIBERO's; None if it is."""
    demos = _demo_names(file)
    nodes = [file, *([file["data"]] if demos else []), *(file["data"][demo] for demo in demos[:1])]
    attributes = {key: str(node.attrs[key]) for node in nodes for key in node.attrs}
    convention = attributes.get("macros_image_convention")
    if convention is not None and "opencv" in convention:
        return "its macros_image_convention is opencv, not LIBERO's opengl"
    if convention is not None or any(key.startswith("bddl_file") for key in attributes):
        return None
    keys = ("env", "env_args", "env_info", "env_name", "problem_info", "tag")
    environment = " ".join(attributes.get(key, "") for key in keys)
    if re.search(r"libero|robosuite|bddl|problem_name|\"type\": *1\b", environment, re.I):
        return None
    # openvla's regenerate_libero_dataset.py writes no attributes, but the simulator's states.
    if demos and {"states", "robot_states"} <= set(file["data"][demos[0]]):
        return None
    if re.match(r"[A-Z0-9_]+_SCENE\d+_.+_demo$", stem) or "problem_info" in attributes and stem.endswith("_demo"):
        return None
    return "nothing in it (env_args, bddl_file_name, a problem_name) shows that LIBERO or robosuite recorded it"


def _has_steps(group: Any) -> bool:
    """Return whether a dataset below a group has rows."""
    return bool(group.visititems(lambda _, node: True if getattr(node, "shape", None) and len(node) else None))


def _scan_columns(group: Any) -> _Columns:
    """Return the columns of every dataset below a group."""
    h5py = require("h5py", "Reading HDF5")
    columns = _Columns({}, set(), {})

    def visit(path: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset) or path.startswith("mask/"):
            return
        name, dtype_kind = dotted(path), node.dtype.kind
        is_image = node.ndim == 4 and node.shape[3] == 3 and node.dtype == np.uint8
        if not is_image and _is_encoded(node, path):
            columns.encoded.add(name)
            is_image = True
        if is_image and _NEXT_OBSERVATION.search(name):
            columns.unusable[name] = "frames from after the action"
            return
        if is_image:
            columns.kinds[name] = IMAGE
        elif dtype_kind in "biuf" or _is_text(node):
            columns.kinds[name] = NUMERIC if dtype_kind in "biuf" else TEXT
            if _looks_like_frames(node):
                allowed = "frames must be uint8 (steps, height, width, 3), JPEG or PNG"
                columns.unusable[name] = f"{node.dtype} {node.shape}; {allowed}"
        if (name in columns.unusable or columns.kinds.get(name) == IMAGE) and is_non_camera_name(name):
            columns.unusable[name] = NOT_RGB

    group.visititems(visit)
    return columns


def _is_encoded(stored: Any, path: str) -> bool:
    """Return whether a column holds JPEG or PNG data, by its first bytes or, for rows of bytes, by its name."""
    has_rows = stored.ndim == 2 and stored.dtype == np.uint8
    has_rows |= stored.ndim == 1 and require("h5py", "Reading HDF5").check_vlen_dtype(stored.dtype) == np.uint8
    if not stored.shape or not len(stored) or not (has_rows or stored.ndim == 1 and stored.dtype.kind in "SOV"):
        return has_rows and "image" in path
    first = stored[0]
    if isinstance(first, (np.ndarray, np.void)):
        first = first.tobytes()
    return isinstance(first, bytes) and first.startswith(_IMAGE_SIGNATURES) or has_rows and "image" in path


def _looks_like_frames(stored: Any) -> bool:
    """Return whether numbers have the shape of frames: channels last, channels first, or none."""
    if stored.ndim == 4:
        return {stored.shape[1], stored.shape[3]} & {1, 3, 4} != set() and max(stored.shape[1:]) >= 8
    return stored.ndim == 3 and min(stored.shape[1:]) >= 16


def _stored_path(name: str) -> str:
    return name.replace(".", "/")


def _suggest_fields(columns: _Columns) -> ColumnSpec | None:
    """Return the fields of the usual column names; None without cameras or an action."""
    cameras = tuple(name for name, kind in columns.kinds.items() if kind == IMAGE and name not in columns.unusable)
    action = next((name for name in ("actions", "action") if columns.kinds.get(name) == NUMERIC), None)
    return ColumnSpec(cameras, (action,)) if cameras and action else None


def _describe_columns(columns: _Columns) -> str:
    """Return a sentence that lists the columns from which cameras and action can be chosen."""
    images = [name for name, kind in columns.kinds.items() if kind == IMAGE]
    numeric = [name for name, kind in columns.kinds.items() if kind == NUMERIC and name not in columns.unusable]
    text = f" Images: {images}; numbers: {numeric}."
    if columns.unusable:
        text += f" Not usable: {', '.join(f'{name} ({reason})' for name, reason in columns.unusable.items())}."
    return text
