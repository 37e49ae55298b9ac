"""Read zarr replay buffers: Diffusion Policy's ``ReplayBuffer`` and UMI's, as a folder or a .zip file.

A buffer has arrays of all steps below ``data`` and the end of every episode in ``meta/episode_ends``.
"""

from __future__ import annotations

import functools
import itertools
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .columns import NOT_RGB, ColumnSpec, as_text, is_non_camera_name
from .episodes import IMAGE, NUMERIC, TEXT, DatasetError, EpisodeReader, RawEpisode
from .file_handles import FileHandleCache
from .gripper_check import require_unconverted_gripper
from .presets import AUTO, merge_fields
from .utils import require

_EXTRA = "'openvla[zarr]'"
_EPISODE_ENDS = "meta/episode_ends"
_METADATA = (".zarray", "zarr.json")
_FORMAT_2 = 2
_NUM_NAMED_CHUNKS = 5
_BLOSC_HEADER = 16  # bytes; the last four are the size of the compressed chunk


def replay_buffer(path: Path) -> Path | None:
    """Return the folder or .zip file of a replay buffer: the path itself or the only one in it; None if there is none.

    Raises:
        OpenVLAValueError: The folder contains several.
    """
    if _is_replay_buffer(path):
        return path
    if not path.is_dir():
        return None
    found = sorted(entry for entry in path.iterdir() if _is_replay_buffer(entry))
    if len(found) > 1:
        raise OpenVLAValueError(f"{path} contains several replay buffers: {[entry.name for entry in found]}; give one.")
    return found[0] if found else None


def _is_replay_buffer(path: Path) -> bool:
    if path.is_dir():
        return any((path / _EPISODE_ENDS / name).is_file() for name in _METADATA)
    if path.suffix != ".zip" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
    return any(f"{_EPISODE_ENDS}/{name}" in names for name in _METADATA)


class _ChunkLayout(NamedTuple):
    """Shape of an array's chunks, how their names begin and are separated, and whether they are compressed by Blosc."""

    shape: list[int]
    prefix: str
    separator: str
    is_blosc: bool

    def chunk_name(self, index: Sequence[int]) -> str:
        """Return the name of a chunk's file below the array's folder."""
        return f"{self.prefix}{self.separator.join(map(str, index))}"


class _Buffer:
    """An open replay buffer."""

    def __init__(self, path: Path) -> None:
        zarr = require("zarr", "Reading replay buffers", _EXTRA)
        self.path = path
        self.missing: dict[str, str] = {}  # which chunks are missing, by array
        self.store = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else None
        try:
            self.group = zarr.open_group(str(path) if self.store is None else self.store, mode="r")
        except Exception as error:  # zarr's versions raise different errors
            raise DatasetError(f"{path} cannot be opened as zarr: {error!r}.") from error

    def close(self) -> None:
        if self.store is not None:
            self.store.close()

    def array(self, name: str) -> Any:
        """Return an array below ``data`` by its dotted name, or by its path from the root."""
        path = name if "/" in name else f"data/{name.replace('.', '/')}"
        try:
            return self.group[path]
        except ValueError as error:
            if "codec" not in str(error):
                raise
            # UMI's images are JPEG XL.
            require("imagecodecs.numcodecs", f"{self.path}: {error}. Reading it", _EXTRA).register_codecs()
            return self.group[path]

    def array_names(self) -> list[str]:
        """Return the dotted names of all arrays below ``data``, sorted."""
        if self.path.is_dir():
            return sorted(_array_names(self.path / "data"))
        files = (name.removeprefix("data/").rpartition("/") for name in self._file_names if name.startswith("data/"))
        arrays = {folder for folder, _, name in files if name == ".zarray" or name == "zarr.json" and folder}
        return sorted(folder.replace("/", ".") for folder in arrays if "shape" in self._metadata(f"data/{folder}"))

    def damage(self, name: str, start: int, stop: int) -> str | None:
        """Return what is wrong with the first damaged chunk of some steps, which zarr would not report; or None.

        zarr reads a missing chunk as zeros, and not every codec reports a truncated one. A chunk that the copy lost and
        one that the writer left out as zeros look alike in every version of zarr's metadata.
        """
        folder, array = f"data/{name.replace('.', '/')}", self.array(name)
        layout = self._chunk_layout(folder)
        grid = [range(-(-size // chunk)) for size, chunk in zip(array.shape, layout.shape)]
        of_steps = range(start // layout.shape[0], -(-stop // layout.shape[0]))
        for index in itertools.product(of_steps, *grid[1:]):
            chunk = f"{folder}/{layout.chunk_name(index)}"
            if not self._has_file(chunk):
                return f"{chunk} is not stored, {self._describe_missing(folder, layout, grid)}"
            if layout.is_blosc and self.path.is_dir():  # a .zip file has checksums
                size = (self.path / chunk).stat().st_size
                with open(self.path / chunk, "rb") as file:
                    expected = int.from_bytes(file.read(_BLOSC_HEADER)[12:], "little")
                if size != expected:
                    return f"{chunk} has {size} bytes, but its header says {expected}; copy the buffer again"
        return None

    def _describe_missing(self, folder: str, layout: _ChunkLayout, grid: list[range]) -> str:
        """Return which of an array's chunks are missing, and what to do."""
        if folder not in self.missing:
            names = [layout.chunk_name(index) for index in itertools.product(*grid)]
            missing = [name for name in names if not self._has_file(f"{folder}/{name}")]
            listed = ", ".join(missing[:_NUM_NAMED_CHUNKS]) + ", ..." * (len(missing) > _NUM_NAMED_CHUNKS)
            self.missing[folder] = f"one of {len(missing)} missing chunks of {len(names)} ({listed})"
        return (
            f"{self.missing[folder]}, and zarr would read zeros. Copy the buffer again; if the source lacks them too, "
            "its writer left out chunks of zeros, as zarr 3 does by default: store them as docs/data.md, "
            '"Missing chunks", says'
        )

    def _chunk_layout(self, folder: str) -> _ChunkLayout:
        """Return where an array's chunks are, from its metadata of zarr's format 2 or 3."""
        metadata = self._metadata(folder)
        if metadata["zarr_format"] == _FORMAT_2:
            is_blosc = (metadata["compressor"] or {}).get("id") == "blosc" and not metadata["filters"]
            return _ChunkLayout(metadata["chunks"], "", metadata.get("dimension_separator", "."), is_blosc)
        encoding = metadata["chunk_key_encoding"]
        is_default = encoding["name"] == "default"
        separator = encoding.get("configuration", {}).get("separator", "/" if is_default else ".")
        shape = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        is_blosc = metadata["codecs"][-1]["name"] == "blosc"
        return _ChunkLayout(shape, f"c{separator}" if is_default else "", separator, is_blosc)

    def _metadata(self, folder: str) -> dict[str, Any]:
        """Return the metadata of an array, or of a group of format 3."""
        name = next(f"{folder}/{name}" for name in _METADATA if self._has_file(f"{folder}/{name}"))
        if self.path.is_dir():
            return json.loads((self.path / name).read_bytes())
        with zipfile.ZipFile(self.path) as file:
            return json.loads(file.read(name))

    @functools.cached_property
    def _file_names(self) -> set[str]:
        with zipfile.ZipFile(self.path) as file:
            return set(file.namelist())

    def _has_file(self, name: str) -> bool:
        return (self.path / name).is_file() if self.path.is_dir() else name in self._file_names


def _array_names(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the arrays below a group's folder; folders of chunks are not searched."""
    for entry in folder.iterdir():
        if not entry.is_dir():
            continue
        is_array = (entry / ".zarray").is_file()
        if not is_array and (entry / "zarr.json").is_file():
            is_array = json.loads((entry / "zarr.json").read_bytes()).get("node_type") == "array"
        if is_array:
            yield f"{prefix}{entry.name}"
        else:
            yield from _array_names(entry, f"{prefix}{entry.name}.")


class ReplayBufferReader(EpisodeReader):
    """Reader of a zarr replay buffer. It stores no instruction: set the field ``instruction_text``.

    Args:
        path: The folder or .zip file.
        preset: As in ``open_dataset``; "auto" is none.
        fields: Fields of ``ColumnSpec`` to replace. Default: all uint8 cameras, and ``action``.
        name: The dataset's name. Default: the path's name up to the first dot.
        split: "train" or "all": every episode.

    Raises:
        OpenVLAValueError: There is no such split, or the ends of the episodes do not increase.
        KeyError: A field names a column that does not exist.
        ImportError: zarr, or the package of a codec, is not installed.
    """

    root: Path
    format = "zarr"

    def __init__(
        self,
        path: Path,
        *,
        preset: str | None = AUTO,
        fields: Mapping[str, Any] | None = None,
        name: str | None = None,
        split: str = "train",
    ) -> None:
        if split not in ("train", "all"):
            raise OpenVLAValueError(f"{path} has no split {split!r}: a replay buffer has none; use 'train' or 'all'.")
        self.buffers = FileHandleCache(_Buffer)
        self.root = path
        ends = np.asarray(self._buffer.array(_EPISODE_ENDS)[:])
        if ends.ndim != 1 or ends.dtype.kind not in "iu" or (np.diff(ends, prepend=0) < 0).any():
            raise OpenVLAValueError(f"{path}: {_EPISODE_ENDS} must hold numbers of steps that increase, got {ends}.")
        self.bounds = [0, *map(int, ends)]
        kinds, self.unusable_columns = self._scan()
        self.preset = None if preset == AUTO else preset
        merged = merge_fields(
            _suggest_fields(kinds, self.unusable_columns), self.preset, fields, path, _describe(kinds)
        )
        super().__init__(path, name or path.name.partition(".")[0], kinds, merged)
        require_unconverted_gripper(self, fields)

    @property
    def _buffer(self) -> _Buffer:
        return self.buffers[self.root]

    def _scan(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the kind of every column, and image columns that are not offered as cameras with the reason."""
        kinds: dict[str, str] = {}
        unusable: dict[str, str] = {}

        for name in self._buffer.array_names():
            if kind := _kind(self._buffer.array(name)):
                kinds[name] = kind
                if kind == IMAGE and is_non_camera_name(name):
                    unusable[name] = NOT_RGB
        return kinds, unusable

    @property
    def files(self) -> list[Path]:
        """Return the .zip file, or the files of the folder."""
        if self.root.is_file():
            return [self.root]
        return sorted(file for file in self.root.rglob("*") if file.is_file())

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def _stored_length(self, index: int) -> int:
        return self.bounds[index + 1] - self.bounds[index]

    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored."""
        start, stop = self.bounds[index : index + 2]
        where = f"{self.root}, episode {index}"
        names = self.fields.numeric_columns() if self.fields.standardize is None else set(self.column_kinds)
        numeric = sorted(name for name in names if self.column_kinds[name] == NUMERIC)
        text = self.fields.instruction
        for name in (*numeric, *self.fields.cameras, *([text] if text else [])):
            length = self._buffer.array(name).shape[0]
            if length < stop:
                raise DatasetError(f"{where}: {name} has {length} steps, but the episode ends at step {stop}.")
            if damage := self._buffer.damage(name, start, stop):
                raise DatasetError(f"{where}: {damage}.")
        try:
            columns = {name: np.asarray(self._buffer.array(name)[start:stop]) for name in numeric}
            instructions = [as_text(value) for value in self._buffer.array(text)[start:stop]] if text else ""
        except Exception as error:  # every codec raises errors of its own for damaged chunks
            raise DatasetError(f"{where}: it cannot be read: {error!r}.") from error

        def load_image(camera: str, step: int) -> np.ndarray:
            return _as_frame(np.asarray(self._buffer.array(camera)[start + step]))

        return RawEpisode(str(index), str(self.root), columns, instructions, load_image)


def _kind(array: Any) -> str | None:
    """Return the kind of a column; None for one that cannot be used."""
    if array.ndim == 4:
        return IMAGE if array.shape[3] == 3 and min(array.shape[1:3]) >= 8 and array.dtype.kind in "uf" else None
    if array.ndim in (1, 2) and array.dtype.kind in "biuf":
        return NUMERIC
    return TEXT if array.ndim == 1 and array.dtype.kind in "SUOT" else None


def _as_frame(frame: np.ndarray) -> np.ndarray:
    """Return a frame as uint8; Diffusion Policy stores some as float32 whole numbers from 0 to 255."""
    if frame.dtype.kind != "f":
        return frame
    levels = frame.astype(np.uint8)
    if not np.array_equal(levels, frame):
        raise OpenVLAValueError("it has grey levels that are not whole numbers from 0 to 255; store it as uint8")
    return levels


def _suggest_fields(kinds: Mapping[str, str], unusable: Mapping[str, str]) -> ColumnSpec | None:
    """Return the fields of the usual column names; None without cameras or an action."""
    cameras = tuple(name for name, kind in kinds.items() if kind == IMAGE and name not in unusable)
    return ColumnSpec(cameras, ("action",)) if cameras and kinds.get("action") == NUMERIC else None


def _describe(kinds: Mapping[str, str]) -> str:
    """Return a sentence that lists the columns from which cameras and action can be chosen."""
    images, numbers = ([name for name, kind in kinds.items() if kind == wanted] for wanted in (IMAGE, NUMERIC))
    return f" Images: {images}; numbers: {numbers}."
