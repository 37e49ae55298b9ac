"""HDF5 demonstrations: LIBERO and robomimic (``data/demo_i``), ALOHA (one file an episode)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .demonstration_fields import Fields, dotted
from .demonstration_presets import AUTO, HDF5_PRESETS, PRESETS, merged_fields, require_raw_gripper
from .demonstrations import (
    IMAGE,
    NUMBERS,
    TEXT,
    DemonstrationError,
    EpisodeReader,
    Handles,
    Stored,
    decoded_image,
    require,
)

_SUFFIXES = (".hdf5", ".h5")


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

    Raises:
        KeyError: A field is not there.
        DemonstrationError: The first file cannot be opened.
    """

    format = "hdf5"

    def __init__(
        self, root: Path, files: list[Path], preset: str | None, fields: Mapping[str, Any] | None, name: str | None
    ) -> None:
        self._files, self.handles = files, Handles(_open)
        self.episodes: list[tuple[Path, str | None]] = []
        for file in files:
            try:
                self.episodes += [(file, group) for group in _groups(self.handles[file])]
            except DemonstrationError:  # met and named when it is read
                self.episodes.append((file, None))
        whole = next(((file, group) for file, group in self.episodes if group is not None), None)
        if whole is None:
            raise DemonstrationError(f"{root}: none of its {len(files)} HDF5 files holds an episode that can be read.")
        names = _columns(self.handles[whole[0]][whole[1]])
        if preset == AUTO:
            preset = next((layout for layout in HDF5_PRESETS if PRESETS[layout].columns() <= set(names)), None)
            self.preset_reason = "by its columns"
        self.preset = preset
        super().__init__(root, name or root.stem, names, merged_fields(_suggested(names), preset, fields, root))
        require_raw_gripper(self, fields)

    @property
    def files(self) -> list[Path]:
        """The HDF5 files."""
        return list(self._files)

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
        if path not in group:
            raise DemonstrationError(f"{self.episodes[index][0]}, episode {identity}: no {path!r}.")
        return len(group[path])

    def _read(self, index: int) -> Stored:
        file = self.episodes[index][0]
        identity, group = self._group(index)
        names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        numbers = {name for name in names if self.names[name] == NUMBERS}
        if missing := sorted(name for name in (*numbers, *self.fields.cameras) if _stored_path(name) not in group):
            raise DemonstrationError(f"{file}, episode {identity}: {missing} missing.")
        try:
            columns = {name: group[_stored_path(name)][()] for name in sorted(numbers)}
            counts = {name: group[_stored_path(name)].shape[0] for name in (*sorted(numbers), *self.fields.cameras)}
        except OSError as error:
            raise DemonstrationError(f"{file}, episode {identity}: {error}.") from error
        if len(set(counts.values())) > 1:
            raise DemonstrationError(f"{file}, episode {identity}: columns of different lengths: {counts}.")
        where = (file, self.episodes[index][1] or "/")

        def image(camera: str, step: int) -> np.ndarray:
            stored = self.handles[where[0]][where[1]][_stored_path(camera)]
            if stored.ndim == 4:
                return stored[step]
            return decoded_image(bytes(stored[step]))  # encoded, padded to one length

        return Stored(identity, str(file), columns, self._said(group, file), image)

    def _said(self, group: Any, file: Path) -> list[str] | str:
        """The instruction: a column or an attribute, else LIBERO's in the file's problem_info, else its file name."""
        if self.fields.instruction:
            stored = group[_stored_path(self.fields.instruction)]
            texts = stored.asstr()[()]
            return str(texts) if stored.ndim == 0 else [str(text) for text in texts]
        for holder in (group, group.parent, group.file):
            for key in ("language_instruction", "instruction"):
                if key in holder.attrs:
                    return str(holder.attrs[key])
            if "problem_info" in holder.attrs:
                said = json.loads(holder.attrs["problem_info"]).get("language_instruction", "")
                return "".join(said) if isinstance(said, (list, tuple)) else str(said)
        if file.stem.endswith("_demo"):
            # LIBERO: KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5
            return re.sub(r"^[A-Z0-9_]+_SCENE\d+_", "", file.stem).removesuffix("_demo").replace("_", " ")
        return ""


def _groups(file: Any) -> list[str]:
    if "data" not in file:
        return ["/"]
    return [f"data/{name}" for name in sorted(file["data"], key=_natural)]


def _columns(group: Any) -> dict[str, str]:
    """What every dataset below a group holds, by its dotted name."""
    h5py = require("h5py", "Reading HDF5")
    names: dict[str, str] = {}

    def visit(path: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            kind = node.dtype.kind
            encoded = "image" in path and (node.ndim == 2 and node.dtype == np.uint8 or kind == "O")
            pictures = node.ndim == 4 and node.shape[3] == 3 and node.dtype == np.uint8
            texts = h5py.check_string_dtype(node.dtype) is not None
            if pictures or encoded:
                names[dotted(path)] = IMAGE
            elif texts or kind in "biuf":
                names[dotted(path)] = TEXT if texts else NUMBERS

    group.visititems(visit)
    return names


def _stored_path(name: str) -> str:
    return name.replace(".", "/")


def _suggested(names: Mapping[str, str]) -> Fields | None:
    cameras = tuple(name for name, kind in names.items() if kind == IMAGE)
    action = next((name for name in ("actions", "action") if names.get(name) == NUMBERS), None)
    if not cameras or action is None:
        return None
    instruction = next((n for n in ("language_instruction", "instruction") if names.get(n) == TEXT), None)
    return Fields(cameras, (action,), instruction=instruction)
