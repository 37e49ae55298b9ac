"""HDF5 demonstrations: LIBERO and robomimic (``data/demo_i``), ALOHA (one file an episode)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAValueError
from .columns import NO_COLOURS, Fields, as_text, dotted, is_no_camera_name
from .episodes import (
    IMAGE,
    NUMBERS,
    TEXT,
    DemonstrationError,
    EpisodeReader,
    Stored,
    decoded_image,
    require,
)
from .open_files import Handles
from .presets import AUTO, HDF5_PRESETS, PRESETS, merged_fields, require_raw_gripper

_SUFFIXES = (".hdf5", ".h5")
# How JPEG and PNG begin.
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
# A group of what followed the action: robomimic's next_obs.
_FUTURE = re.compile(r"(^|[./])next(_(obs|state|frame|image|rgb)\w*)?([./]|$)", re.I)
# What a demo or a file calls its instruction, in the order of looking; the last ones often are a task's short name or a
# language's, so that only several words count.
_SPOKEN = (
    *("language_instruction", "natural_language_instruction", "instruction", "language_raw", "task_description"),
    *("task_instruction", "task", "language", "lang", "prompt"),
)
_SEVERAL_WORDS = ("task", "language", "lang", "prompt")
# Attributes in JSON, of LIBERO and of robosuite, and the key of the instruction in them.
_SPOKEN_JSON = {"problem_info": "language_instruction", "ep_meta": "lang"}
# Masks of demos that are kept from training: robomimic's valid, and 20_percent_valid of a part.
_HELD_OUT = re.compile(r"(^|_)(valid|val|validation|test|eval)$")


def hdf5_files(path: Path) -> list[Path]:
    """The HDF5 files of a folder, sorted by name with numbers in order, or the one that the path names."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    return sorted((file for file in path.rglob("*") if file.suffix in _SUFFIXES), key=lambda file: _natural(str(file)))


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open(path: Path) -> Any:
    try:
        return require("h5py", "Reading HDF5").File(path, "r")
    except OSError as error:
        raise DemonstrationError(f"{path} cannot be opened: {error}. It is damaged, or no HDF5.") from error


class HDF5Reader(EpisodeReader):
    """Episodes of HDF5 files: every group below ``data``, or the whole file where there is none.

    Args:
        root: The folder, or the one file.
        files: The files, in order.
        preset: As in ``open_demonstrations``; "auto" knows LIBERO's and ALOHA's columns.
        fields: Fields to replace.
        name: Of the dataset; by default the folder's or file's name.
        split: As in ``open_demonstrations``.

    Raises:
        KeyError: A field is not there.
        DemonstrationError: No file can be opened.
        ValueError: The split is not there, or the columns are LIBERO's and nothing says which way up the frames are.
    """

    format = "hdf5"

    def __init__(
        self,
        root: Path,
        files: list[Path],
        preset: str | None,
        fields: Mapping[str, Any] | None,
        name: str | None,
        split: str = "train",
    ) -> None:
        self._files, self.handles, self.split = files, Handles(_open), split
        self._file_says: dict[Path, str | list[str]] = {}
        self.episodes: list[tuple[Path, str | None]] = []
        masks: set[str] = set()
        for file in files:
            try:
                opened = self.handles[file]
            except DemonstrationError:  # met and named when it is read
                self.episodes.append((file, None))
                continue
            masks |= set(_masks(opened))
            self.episodes += [(file, group) for group in _groups(opened, split)]
        if split not in ("train", "all", *masks):
            known = sorted({"train", "all", *masks})
            near = nearest_name(split, known)
            raise OpenVLAValueError(
                f"{root} has no split {split!r}.{f' Did you mean {near!r}?' if near else ''} Known: {known}."
            )
        if not self.episodes:
            raise OpenVLAValueError(
                f"{root}: split {split!r} holds no episode; give another of {sorted({'all', *masks})}."
            )
        readable = [(file, group) for file, group in self.episodes if group is not None]
        if not readable:
            raise DemonstrationError(f"{root}: none of its {len(files)} HDF5 files holds an episode that can be read.")
        # Of an episode without steps it cannot be told what its columns hold.
        first = next((pair for pair in readable if _holds_steps(self.handles[pair[0]][pair[1]])), readable[0])
        names, self.encoded, self.passed_over = _columns(self.handles[first[0]][first[1]])
        if preset == AUTO:
            preset = next((layout for layout in HDF5_PRESETS if PRESETS[layout].columns() <= set(names)), None)
            self.preset_reason = "by its columns"
            if preset == "libero_hdf5" and "rotate_180" not in (fields or {}):
                self._require_upside_down()
        self.preset, self._aloha = preset, preset == "aloha_hdf5"
        suggested = _suggested(names, self.passed_over)
        merged = merged_fields(suggested, preset, fields, root, "" if suggested else self._seen(names))
        super().__init__(root, name or root.stem, names, merged)
        require_raw_gripper(self, fields)
        if future := [column for column in self.fields.proprio if column and _FUTURE.search(column)]:
            raise OpenVLAValueError(
                f"{root}: proprio names {future}, which followed the action; name what came before it."
            )

    def _seen(self, names: Mapping[str, str]) -> str:
        """Return a sentence that lists the columns from which cameras and action can be chosen."""
        images, numbers = ([name for name, held in names.items() if held == kind] for kind in (IMAGE, NUMBERS))
        other = [f"{name} ({held})" for name, held in self.passed_over.items()]
        said = f" Images: {images}; numbers: {[name for name in numbers if name not in self.passed_over]}."
        return said + (f" Passed over: {', '.join(other)}." if other else "")

    def _require_upside_down(self) -> None:
        """Raise ValueError where frames in LIBERO's columns may stand upright, so that turning them would harm."""
        for file in dict.fromkeys(file for file, group in self.episodes if group is not None):
            if doubt := _doubt_of_libero(self.handles[file], file.stem):
                raise OpenVLAValueError(
                    f"{file} has LIBERO's columns, but {doubt}: it cannot be told which way up its frames are. Give "
                    "the field rotate_180: true (stored upside down, as LIBERO's) or false (upright); and gripper, "
                    "where it is not LIBERO's -1 open to 1 closed (clipped_inverted)."
                )

    @property
    def files(self) -> list[Path]:
        """The HDF5 files."""
        return list(self._files)

    def digest(self) -> str:
        """Hex digest of what the tables depend on: the split too."""
        return hashlib.sha256(f"{super().digest()} {self.split}".encode()).hexdigest()

    def notes(self) -> list[str]:
        """Return what a user should know of how the dataset is read and cannot see in the fields."""
        notes, (file, group) = super().notes(), next(pair for pair in self.episodes if pair[1] is not None)
        for camera in self.fields.cameras if self.fields.channels is None else ():
            if camera in self.encoded:
                exchanged = self._exchanged(self.handles[file][group], camera)
                notes.append(
                    f"{camera} holds encoded pictures, read as {'BGR' if exchanged else 'RGB'}; if red and blue are "
                    f"exchanged (OpenCV encodes BGR), give the field channels: {'rgb' if exchanged else 'bgr'}"
                )
        notes += [f"{name} is no camera, it holds {held}" for name, held in self.passed_over.items()]
        return notes

    def _exchanged(self, group: Any, camera: str) -> bool:
        """Return whether OpenCV encoded the frames from RGB arrays, which their recorders' own loaders undo."""
        robotwin = camera.endswith(".rgb") and "joint_action" in group
        if self.fields.channels is not None or not (robotwin or self._aloha):
            return False
        stored = group[_stored_path(camera)]
        if stored.ndim == 4:
            return False
        fixed = stored.dtype.kind == "S"  # RDT's and AgileX's in ALOHA's layout
        return robotwin or self._aloha and (fixed or bool(group.file.attrs.get("compress", False)))

    def __len__(self) -> int:
        return len(self.episodes)

    def _group(self, index: int) -> tuple[str, Any]:
        file, group = self.episodes[index]
        identity = str(file.relative_to(self.root) if file != self.root else file.name)
        identity += "" if group in (None, "/") else f":{group.removeprefix('data/')}"
        return identity, self.handles[file][group or "/"]

    def _stored_length(self, index: int) -> int:
        identity, group = self._group(index)
        column = next(iter(sorted(self.fields.columns())), None)
        path = _stored_path(column) if column else next(iter(map(_stored_path, self.fields.cameras)))
        if path not in group or not getattr(group[path], "shape", ()):
            raise DemonstrationError(f"{self.episodes[index][0]}, episode {identity}: no column {path!r}.")
        return len(group[path])

    def _read(self, index: int) -> Stored:
        file = self.episodes[index][0]
        identity, group = self._group(index)
        names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        numbers = {name for name in names if self.names[name] == NUMBERS}
        needed = [*sorted(numbers), *self.fields.cameras, *filter(None, [self.fields.instruction])]
        if missing := sorted(name for name in needed if _stored_path(name) not in group):
            raise DemonstrationError(f"{file}, episode {identity}: {missing} missing.")
        h5py = require("h5py", "Reading HDF5")
        for name in needed:
            node = group[_stored_path(name)]
            if not isinstance(node, h5py.Dataset) or not node.shape and name != self.fields.instruction:
                raise DemonstrationError(f"{file}, episode {identity}: {name} must be a column of one row a step.")
        try:
            columns = {name: group[_stored_path(name)][()] for name in sorted(numbers)}
            counts = {name: group[_stored_path(name)].shape[0] for name in (*sorted(numbers), *self.fields.cameras)}
            said = self._said(group, file)
        except (OSError, ValueError) as error:
            raise DemonstrationError(f"{file}, episode {identity}: {error}.") from error
        if len(set(counts.values())) > 1:
            raise DemonstrationError(f"{file}, episode {identity}: columns of different lengths: {counts}.")
        where = (file, self.episodes[index][1] or "/")
        exchanged = {camera: self._exchanged(group, camera) for camera in self.fields.cameras}

        def image(camera: str, step: int) -> np.ndarray:
            stored = self.handles[where[0]][where[1]][_stored_path(camera)]
            if stored.ndim == 4:
                return stored[step]
            decoded = decoded_image(bytes(stored[step]))  # encoded, padded to one length
            return decoded[..., ::-1] if exchanged[camera] else decoded

        return Stored(identity, str(file), columns, said, image)

    def _said(self, group: Any, file: Path) -> str | list[str]:
        """The instruction: the column of the fields, else the demo's own, else the file's, else LIBERO's file name."""
        if self.fields.instruction:
            return _texts(group[_stored_path(self.fields.instruction)])
        below: dict[str, str] = {}  # of the demo, where the names lie deeper
        for name, holds in self.names.items():
            if holds == TEXT and not _FUTURE.search(name):
                below.setdefault(name.rpartition(".")[2], _stored_path(name))
        said = _said_by(group, below)
        if said is None and file not in self._file_says:
            above = (_said_by(holder, {}) for holder in (group.parent, group.file))
            self._file_says[file] = next((text for text in above if text is not None), _said_by_name(file.stem))
        return self._file_says[file] if said is None else said


def _said_by_name(stem: str) -> str:
    """The instruction in LIBERO's file names: KITCHEN_SCENE3_turn_on_the_stove_demo."""
    if not stem.endswith("_demo"):
        return ""
    return re.sub(r"^[A-Z0-9_]+_SCENE\d+_", "", stem).removesuffix("_demo").replace("_", " ")


def _said_by(holder: Any, deeper: Mapping[str, str]) -> str | list[str] | None:
    """The instruction that a group says by a column, also one at the path ``deeper`` of its name, or an attribute.

    Returns:
        One text, or one a step; None where it says none.
    """
    attributes = set(holder.attrs)
    for key in _SPOKEN:
        column = next((holder[path] for path in (key, deeper.get(key)) if path and _is_text(holder.get(path))), None)
        try:
            if column is not None:
                said = _texts(column)
            elif key in attributes:
                said = _attribute(holder, key)
            else:
                continue
        except ValueError:
            if key in _SEVERAL_WORDS:  # a task's number
                continue
            raise
        texts = [said] if isinstance(said, str) else said
        if key not in _SEVERAL_WORDS or any(len(text.split()) > 1 for text in texts):
            return said
    for key, inner in _SPOKEN_JSON.items():
        if key in attributes:
            told = json.loads(_attribute(holder, key) or "{}")
            if isinstance(told, Mapping) and inner in told:
                said = told[inner]
                if not isinstance(said, list) or len(said) < 2:
                    return as_text(said or "")
                said = [as_text(part) for part in said]
                return ("" if all(len(part) < 2 for part in said) else " ").join(said)  # letters, or words
    return None


def _texts(stored: Any) -> str | list[str]:
    """The texts of a column: one, or one a step."""
    texts = [as_text(text) for text in np.ravel(np.asarray(stored[()], object))]
    return texts if len(texts) > 1 else (texts or [""])[0]


def _attribute(holder: Any, key: str) -> str:
    value = holder.attrs[key]
    return "" if isinstance(value, require("h5py", "Reading HDF5").Empty) else as_text(value)


def _is_text(stored: Any) -> bool:
    h5py = require("h5py", "Reading HDF5")
    return isinstance(stored, h5py.Dataset) and h5py.check_string_dtype(stored.dtype) is not None


def _groups(file: Any, split: str) -> list[str]:
    """The episodes of a file that belong to a split.

    Raises:
        ValueError: The file's masks do not say what is trained on, or name a demo that is not there.
    """
    demos = [f"data/{name}" for name in _demos(file)] or ["/"]
    masks = _masks(file)
    held_out = any(_HELD_OUT.search(name) for name in masks)
    if split == "all" or split == "train" and "train" not in masks and not held_out:
        return demos
    if split == "train" and "train" not in masks:
        raise OpenVLAValueError(
            f"{file.filename} holds demos out of training by its masks {sorted(masks)}, but has no mask 'train'; give "
            f"split: one of {sorted({'all', *masks})}."
        )
    chosen = {f"data/{name}" for name in masks.get(split, ())}
    if missing := sorted(chosen - set(demos)):
        raise OpenVLAValueError(
            f"{file.filename}: mask {split!r} names {missing}, which is not there; give split: all."
        )
    return [demo for demo in demos if demo in chosen]


def _demos(file: Any) -> list[str]:
    """Names of the groups below ``data``; none where the file is one episode."""
    h5py = require("h5py", "Reading HDF5")
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        return []
    return sorted((name for name in data if data.get(name, getclass=True) is h5py.Group), key=_natural)


def _masks(file: Any) -> dict[str, list[str]]:
    """Names of demos by split: robomimic's ``mask/train`` and others."""
    h5py = require("h5py", "Reading HDF5")
    if not _demos(file) or not isinstance(file.get("mask"), h5py.Group):
        return {}
    stored = {
        name: node for name, node in file["mask"].items() if _is_text(node) or getattr(node, "shape", None) == (0,)
    }
    return {name: [as_text(demo) for demo in np.ravel(node[()])] for name, node in stored.items()}


def _doubt_of_libero(file: Any, stem: str) -> str | None:
    """Why a file in LIBERO's columns may not be LIBERO's; None where it is."""
    demos = _demos(file)
    holders = [file, *([file["data"]] if demos else []), *(file["data"][demo] for demo in demos[:1])]
    told = {key: str(holder.attrs[key]) for holder in holders for key in holder.attrs}
    convention = told.get("macros_image_convention")
    if convention is not None and "opencv" in convention:
        return "its macros_image_convention is opencv, not LIBERO's opengl"
    if convention is not None or any(key.startswith("bddl_file") for key in told):
        return None
    words = " ".join(told.get(key, "") for key in ("env", "env_args", "env_info", "env_name", "problem_info", "tag"))
    if re.search(r"libero|robosuite|bddl|problem_name|\"type\": *1\b", words, re.I):
        return None
    # openvla's regenerate_libero_dataset.py writes no attributes, but the simulator's states.
    if demos and {"states", "robot_states"} <= set(file["data"][demos[0]]):
        return None
    if re.match(r"[A-Z0-9_]+_SCENE\d+_.+_demo$", stem) or "problem_info" in told and stem.endswith("_demo"):
        return None
    return "nothing in it (env_args, bddl_file_name, a problem_name) says that LIBERO or robosuite recorded it"


def _holds_steps(group: Any) -> bool:
    """Return whether a dataset below a group has rows."""
    found = group.visititems(lambda _, node: True if getattr(node, "shape", None) and len(node) else None)
    return bool(found)


def _columns(group: Any) -> tuple[dict[str, str], set[str], dict[str, str]]:
    """Return the kind of every dataset below a group, by its dotted name.

    Returns:
        The kinds; which images are encoded; and those that no one may take for a camera unasked, with the reason.
    """
    h5py = require("h5py", "Reading HDF5")
    names: dict[str, str] = {}
    encoded: set[str] = set()
    passed_over: dict[str, str] = {}

    def visit(path: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset) or path.startswith("mask/"):
            return
        name, kind = dotted(path), node.dtype.kind
        pictures = node.ndim == 4 and node.shape[3] == 3 and node.dtype == np.uint8
        if not pictures and _is_encoded(node, path):
            encoded.add(name)
        if (pictures or name in encoded) and _FUTURE.search(name):
            passed_over[name] = "frames that followed the action"
            return
        if pictures or name in encoded:
            names[name] = IMAGE
        elif kind in "biuf" or _is_text(node):
            names[name] = NUMBERS if kind in "biuf" else TEXT
            if _looks_like_frames(node):
                allowed = "frames must be uint8 (steps, height, width, 3), JPEG or PNG"
                passed_over[name] = f"{node.dtype} {node.shape}; {allowed}"
        if (name in passed_over or names.get(name) == IMAGE) and is_no_camera_name(name):
            passed_over[name] = NO_COLOURS

    group.visititems(visit)
    return names, encoded, passed_over


def _is_encoded(stored: Any, path: str) -> bool:
    """Return whether rows of bytes begin as JPEG or PNG do, or by their name can be nothing but pictures."""
    rows = stored.ndim == 2 and stored.dtype == np.uint8
    rows |= stored.ndim == 1 and require("h5py", "Reading HDF5").check_vlen_dtype(stored.dtype) == np.uint8
    if not stored.shape or not len(stored) or not (rows or stored.ndim == 1 and stored.dtype.kind in "SOV"):
        return rows and "image" in path
    first = stored[0]
    marked = isinstance(first, (bytes, np.ndarray, np.void)) and bytes(first).startswith(_PICTURES)
    return marked or rows and "image" in path


def _looks_like_frames(stored: Any) -> bool:
    """Return whether numbers have the shape of frames: channels last or first, or none."""
    if stored.ndim == 4:
        return {stored.shape[1], stored.shape[3]} & {1, 3, 4} != set() and max(stored.shape[1:]) >= 8
    return stored.ndim == 3 and min(stored.shape[1:]) >= 16


def _stored_path(name: str) -> str:
    return name.replace(".", "/")


def _suggested(names: Mapping[str, str], passed_over: Mapping[str, str]) -> Fields | None:
    cameras = tuple(name for name, kind in names.items() if kind == IMAGE and name not in passed_over)
    action = next((name for name in ("actions", "action") if names.get(name) == NUMBERS), None)
    return Fields(cameras, (action,)) if cameras and action else None
