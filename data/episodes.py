"""Demonstrations in: episodes of images, instructions, actions and proprio, whatever format they are stored in.

``open_demonstrations`` looks at the content of a path and returns its reader: LeRobot v2.1 and v3, RLDS (TFRecord),
HDF5 (LIBERO, robomimic, ALOHA); ``sequence_reader.SequenceReader`` takes any torch Dataset. None needs TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..actions_openvla import nearest_name
from ..errors_openvla import (
    OpenVLAFileNotFoundError,
    OpenVLAImportError,
    OpenVLAIndexError,
    OpenVLAKeyError,
    OpenVLAValueError,
)
from .columns import NO_COLOURS, Fields, as_text, is_no_camera_name, says_nothing
from .presets import AUTO, NO_PRESET

# What a column holds.
IMAGE, TEXT, NUMBERS, DEPTH = "image", "text", "numbers", "a depth map"


class DemonstrationError(OpenVLAValueError):
    """An episode that cannot be used; the message names its file and its id. ``skip_bad`` goes on after these."""


def require(package: str, why: str, install: str = "'openvla[train]'") -> Any:
    """An optional package, of the extra ``train`` unless ``install`` says what pip should be given.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise OpenVLAImportError(f"{why} needs {package}: pip install {install} ({error})") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One sample: what the robot saw, was told and did.

    Attributes:
        images: uint8 ``(height, width, 3)`` RGB, one a camera in the configured order.
        instruction: As stored, stripped.
        actions: float64 ``(chunk_length, action_dim)``, from this step on, in the dataset's units.
        is_padding: bool ``(chunk_length,)``: which of them lie beyond the episode's end and repeat its last action.
        proprio: float64 ``(proprio_dim,)``, or None.
        dataset: Name of the dataset: the key of its statistics.
        episode_id: Which episode, unique within the dataset.
        index: Which step of the episode.
    """

    images: tuple[np.ndarray, ...]
    instruction: str
    actions: np.ndarray
    is_padding: np.ndarray
    proprio: np.ndarray | None
    dataset: str
    episode_id: str
    index: int

    @property
    def action(self) -> np.ndarray:
        """The action of this step alone, float64 ``(action_dim,)``."""
        return self.actions[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration: its tables in memory, its images decoded when asked for.

    Attributes:
        id: Unique within the dataset.
        source: The file that it comes from.
        dataset: The dataset's name.
        actions: float64 ``(length, action_dim)``, standardised, in the dataset's units.
        proprio: float64 ``(length, proprio_dim)``, or None.
        instructions: One a step.
        load_images: Images of a step, one a camera.
    """

    id: str
    source: str
    dataset: str
    actions: np.ndarray
    proprio: np.ndarray | None
    instructions: Sequence[str]
    load_images: Callable[[int], tuple[np.ndarray, ...]]

    def __len__(self) -> int:
        return len(self.actions)

    def images(self, index: int) -> tuple[np.ndarray, ...]:
        """uint8 ``(height, width, 3)``, one a camera.

        Raises:
            DemonstrationError: An image is missing or cannot be decoded.
        """
        try:
            return self.load_images(index)
        except DemonstrationError:
            raise
        except Exception as error:  # Pillow, h5py, FFmpeg and os errors by the kind of damage
            raise DemonstrationError(f"{self.source}, episode {self.id}: no image at step {index}: {error}") from error

    def step(self, index: int, chunk_length: int = 1) -> Step:
        """The sample that starts at a step; actions beyond the end repeat the last one.

        Raises:
            IndexError: No such step.
            DemonstrationError: An image cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise OpenVLAIndexError(f"Episode {self.id} has steps 0 to {len(self) - 1}, got {index}.")
        steps = np.arange(index, index + chunk_length)
        return Step(
            images=self.images(index),
            instruction=self.instructions[index].strip(),
            actions=self.actions[np.minimum(steps, len(self) - 1)],
            is_padding=steps >= len(self),
            proprio=None if self.proprio is None else self.proprio[index],
            dataset=self.dataset,
            episode_id=self.id,
            index=index,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An episode as a format's reader finds it, before fields are applied.

    Attributes:
        columns: Number columns, ``(stored length, ...)`` by dotted name; at least those that the fields name.
        instructions: One a stored step, or one for all: anything that ``as_text`` takes.
        image: The image of a camera (by dotted name) at a stored step: uint8 ``(height, width, 3)``.
    """

    id: str
    source: str
    columns: Mapping[str, np.ndarray]
    instructions: Sequence[Any] | str
    image: Callable[[str, int], np.ndarray]


class EpisodeReader(ABC):
    """Episodes of one dataset, in a stable order, read when asked for.

    A format's reader gives ``names``, ``files``, ``stored_lengths`` (or ``_stored_length``) and ``_read``.

    Args:
        root: The dataset's folder or file, for messages.
        name: The dataset's name, under which its statistics go into a checkpoint.
        names: Every column that there is, and what it holds.
        fields: Which columns are what.

    Raises:
        KeyError: A field names a column that is not there; the message gives the nearest.

    Attributes:
        preset: Whose fields are taken where none are given, or None.
        preset_reason: Why, for messages.
        doubtful_cameras: Image columns that may hold depth; named as cameras, they are warned of.
        frame_rate: Steps a second, where the format says it.
    """

    format = "?"
    # Columns that look like images but cannot be read as such, and what they hold.
    passed_over: Mapping[str, str] = {}
    preset: str | None = None
    preset_reason = "you named it"
    doubtful_cameras: frozenset[str] = frozenset()
    frame_rate: float | None = None

    def __init__(self, root: Path, name: str, names: Mapping[str, str], fields: Fields) -> None:
        self.root, self.name, self.fields = root, name, fields
        self.names = dict(names)
        self._lengths: dict[int, int] = {}
        self._usable: set[int] = set()
        self._noops: dict[int, int] = {}
        # Instructions of episodes of which drop_noops leaves nothing, by their index.
        self.emptied: dict[int, str] = {}
        self._dimensions: tuple[int, int] | None = None
        self._require_fields()

    def _absent(self, fields: Fields) -> tuple[str, str] | None:
        """Return the first column that the fields name and that is not there, and what it should hold."""
        wanted = [(camera, IMAGE) for camera in fields.cameras]
        if fields.standardize is None:
            wanted += [(column, NUMBERS) for column in sorted(fields.columns())]
        if fields.instruction:
            wanted.append((fields.instruction, TEXT))
        return next(((column, kind) for column, kind in wanted if self.names.get(column) != kind), None)

    def _require_fields(self) -> None:
        if absent := self._absent(self.fields):
            column, kind = absent
            fitting = [known for known, holds in self.names.items() if holds == kind]
            near = nearest_name(column, fitting)
            held = self.passed_over.get(column, self.names.get(column))
            holds = f" (it holds {held})" if held else ""
            raise OpenVLAKeyError(
                f"{self.root}: no column {column!r} of {kind}{holds}."
                f"{f' Did you mean {near!r}?' if near else ''} There are: {fitting}.{self.preset_note()}"
            )
        for camera in self.fields.cameras:
            if camera in self.doubtful_cameras or is_no_camera_name(camera):
                warnings.warn(
                    f"{self.root}: the camera {camera!r} seems to hold {NO_COLOURS}; leave it out of cameras if it "
                    "does.",
                    stacklevel=5,
                )

    def preset_note(self) -> str:
        """Return, for messages, which preset is taken and how to take none; empty without one."""
        if self.preset is None:
            return ""
        return (
            f" Fields that are not given come from the preset {self.preset!r} ({self.preset_reason}): give them in "
            "fields, or take no preset (preset: none, --preset none)."
        )

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that the episodes are read from."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of episodes."""

    @abstractmethod
    def _stored_length(self, index: int) -> int:
        """Number of stored steps of an episode."""

    @abstractmethod
    def _read(self, index: int) -> Stored:
        """An episode as it is stored."""

    def length(self, index: int, checked: bool = False) -> int:
        """Number of steps of an episode, as cheaply as the format allows.

        Args:
            index: Which episode.
            checked: Read its tables (once) to know that it can be used.

        Raises:
            DemonstrationError: Its file is damaged; with ``checked``, as ``reader[index]``.
        """
        if (checked or self.fields.drop_noops) and index not in self._usable:
            self[index]
        if index not in self._lengths:
            self._lengths[index] = max(0, self._stored_length(index) - self.fields.shortening)
        return self._lengths[index]

    def usable_lengths(self) -> dict[str, list[int]]:
        """Return steps and dropped no-ops of the episodes that were read and can be used, by their index."""
        return {str(index): [self._lengths[index], self._noops.get(index, 0)] for index in sorted(self._usable)}

    def take_usable_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Take what ``usable_lengths`` returned for the same files and fields; no episode is read for it again."""
        for key, (length, dropped) in lengths.items():
            self._lengths[int(key)], self._noops[int(key)] = length, dropped
            self._usable.add(int(key))

    @property
    def noop_steps(self) -> int:
        """Steps that ``drop_noops`` left out of the episodes read so far."""
        return sum(self._noops.values())

    def notes(self) -> list[str]:
        """Return what a user should know of how the dataset is read and cannot see in the fields."""
        notes = [f"{self.noop_steps} steps that do nothing are left out (drop_noops)"] if self.fields.drop_noops else []
        for name, holds in self.names.items():
            image = holds == IMAGE and (name in self.doubtful_cameras or is_no_camera_name(name))
            if holds == DEPTH or image and name not in (*self.fields.cameras, *self.passed_over):
                notes.append(f"{name} is no camera, it holds {DEPTH if holds == DEPTH else NO_COLOURS}")
        return notes

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        """One episode, its tables read and checked.

        Raises:
            IndexError: No such episode.
            DemonstrationError: It is damaged, empty, not finite, has no instruction, or other dimensions than the
                dataset's first one.
        """
        if not 0 <= index < len(self):
            raise OpenVLAIndexError(f"{self.root} has episodes 0 to {len(self) - 1}, got {index}.")
        stored = self._read(index)
        where = f"{stored.source}, episode {stored.id}"
        try:
            actions, proprio = self.fields.tables(stored.columns)
            instructions = self._instructions(stored, len(actions))
        except (ValueError, IndexError) as error:
            raise DemonstrationError(f"{where}: {error}.") from error
        _require_usable(where, actions, proprio, instructions)
        self._require_dimensions(where, actions, proprio)
        first = self.fields.skip_first
        steps: Sequence[int] = range(first, first + len(actions))
        if self.fields.drop_noops:
            moving = self.fields.moving_steps(stored.columns)
            if not len(moving):
                self.emptied[index] = instructions[0].strip()
                raise DemonstrationError(
                    f"{where}: none of its {len(actions)} steps does anything ({self.emptied[index]!r}), so drop_noops "
                    "leaves no step. Take skip_bad=True to leave such episodes out, or drop_noops: false."
                )
            self._noops[index] = len(actions) - len(moving)
            actions, proprio = actions[moving], None if proprio is None else proprio[moving]
            instructions, steps = [instructions[step] for step in moving], (first + moving).tolist()
        self._lengths[index] = len(actions)
        self._usable.add(index)
        cameras, exchanged = self.fields.cameras, self.fields.channels == "bgr"

        def load_images(step: int) -> tuple[np.ndarray, ...]:
            images = tuple(stored.image(camera, steps[step]) for camera in cameras)
            for camera, image in zip(cameras, images):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise OpenVLAValueError(f"{camera} is {image.dtype} {image.shape}, not uint8 (height, width, 3)")
            images = tuple(image[..., ::-1] for image in images) if exchanged else images
            return tuple(image[::-1, ::-1] for image in images) if self.fields.rotate_180 else images

        return Episode(stored.id, stored.source, self.name, actions, proprio, instructions, load_images)

    def _instructions(self, stored: Stored, length: int) -> Sequence[str]:
        """Return one instruction a step of ``tables``; of another number, where the stored ones do not fit."""
        said: Any = self.fields.instruction_text or stored.instructions
        if isinstance(said, (str, bytes)) or len(said) == 1:
            return [as_text(said)] * length
        texts = [as_text(text) for text in said]
        return texts[self.fields.skip_first : len(texts) - (self.fields.relabel is not None)]

    def _require_dimensions(self, where: str, actions: np.ndarray, proprio: np.ndarray | None) -> None:
        got = (actions.shape[1], 0 if proprio is None else proprio.shape[1])
        if self._dimensions is None:
            self._dimensions = got
        for what, expected, found in zip(("action", "proprio"), self._dimensions, got):
            if expected != found:
                raise DemonstrationError(
                    f"{where}: {what} has {found} dimensions, but {expected} in the dataset's other episodes."
                )

    @property
    def action_dim(self) -> int:
        """Number of action dimensions, from the first usable episode.

        Raises:
            ValueError: No episode can be used.
        """
        return self._found_dimensions()[0]

    @property
    def proprio_dim(self) -> int:
        """Number of proprio dimensions; 0 without proprio."""
        return self._found_dimensions()[1]

    def _found_dimensions(self) -> tuple[int, int]:
        if self._dimensions is None:
            next(usable_episodes(self), None)
        if self._dimensions is None:
            raise OpenVLAValueError(f"{self.root}: none of its {len(self)} episodes can be used.")
        return self._dimensions

    def digest(self) -> str:
        """Hex digest of what the tables depend on: names, sizes and times of files, and the fields."""
        parts = [self.format, self.name, str(self.fields)]
        for file in sorted(self.files):
            info = file.stat()
            parts.append(f"{os.path.relpath(file, self.root)} {info.st_size} {info.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def usable_episodes(reader: EpisodeReader, skipped: list[str] | None = None) -> Iterator[Episode]:
    """Episodes one after the other, without the bad ones; what is wrong with those is appended to ``skipped``."""
    for index in range(len(reader)):
        try:
            yield reader[index]
        except DemonstrationError as error:
            if skipped is not None:
                skipped.append(str(error))


def _require_usable(where: str, actions: np.ndarray, proprio: np.ndarray | None, instructions: Sequence[str]) -> None:
    if not len(actions):
        raise DemonstrationError(f"{where}: it has no step.")
    for what, values in (("action", actions), ("proprio", proprio)):
        if values is not None and not np.isfinite(values).all():
            step, dimension = np.argwhere(~np.isfinite(values))[0]
            raise DemonstrationError(f"{where}: {what}[{dimension}] at step {step} is {values[step, dimension]}.")
    if len(instructions) != len(actions):
        raise DemonstrationError(f"{where}: {len(actions)} actions but {len(instructions)} instructions.")
    silent = next((step for step, text in enumerate(instructions) if says_nothing(text)), None)
    if silent is not None:
        held = f" ({instructions[silent]!r})" if instructions[silent].strip() else ""
        raise DemonstrationError(
            f"{where}: the instruction at step {silent} is empty{held}. Take skip_bad=True to leave such episodes out, "
            "or say one for all with the field instruction_text."
        )


def decoded_image(data: bytes) -> np.ndarray:
    """A JPEG or PNG as uint8 ``(height, width, 3)``."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("RGB", "RGBA", "L", "P"):
            raise OpenVLAValueError(f"an image of mode {image.mode} is no camera image")
        return np.asarray(image.convert("RGB"))


def open_demonstrations(
    path: str | os.PathLike,
    *,
    preset: str | None = AUTO,
    fields: Mapping[str, Any] | None = None,
    split: str = "train",
    name: str | None = None,
) -> EpisodeReader:
    """The reader of a dataset, by its content.

    Args:
        path: A folder (or one HDF5 file). Of RLDS the folder with features.json, or one above it.
        preset: A key of ``demonstration_presets.PRESETS``. "auto" takes, of RLDS, the one that bears the dataset's
            name; of HDF5, LIBERO's or ALOHA's by their columns; of LeRobot, one of LIBERO by the name where the
            gripper goes below 0. "none" or None takes none.
        fields: Fields to replace, as in ``demonstration_fields.Fields``.
        split: "train", "val", ... or "all": of RLDS its shards', of LeRobot those of info.json, of HDF5 a name of the
            file's ``mask`` group, as robomimic writes it. "train" is all of a file without masks.
        name: Under which the statistics go into a checkpoint; by default the dataset's own.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: The format is not known, or there is no episode.
        KeyError: A field is not there.
        ImportError: The format needs a package of the extra ``train``.
    """
    from .hdf5 import HDF5Reader, hdf5_files
    from .lerobot import LeRobotReader
    from .rlds import RLDSReader, rlds_folder

    path = Path(path).expanduser()
    if not path.exists():
        raise OpenVLAFileNotFoundError(f"No dataset at {path}.")
    preset = None if str(preset).lower() == NO_PRESET else preset
    if (path / "meta" / "info.json").is_file():
        reader = LeRobotReader(path, preset, fields, name, split)
    elif folder := rlds_folder(path):
        reader = RLDSReader(folder, preset, fields, name, split)
    elif files := hdf5_files(path):
        reader = HDF5Reader(path, files, preset, fields, name, split)
    else:
        there = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else path.name
        raise OpenVLAValueError(
            f"{path} is no dataset of a known format. Known: LeRobot v2.1 and v3 (meta/info.json), RLDS "
            f"(features.json and .tfrecord files), HDF5 (.hdf5, .h5). There is: {there}."
        )
    if not len(reader):
        raise OpenVLAValueError(f"{path} holds no episode.")
    return reader


def warn_skipped(skipped: Sequence[str], of: int, name: str) -> None:
    """One warning that counts bad episodes and quotes the first."""
    if skipped:
        warnings.warn(f"{name}: skipped {len(skipped)} of {of} episodes. The first: {skipped[0]}", stacklevel=3)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: It is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is no JSON: {error}.") from error
