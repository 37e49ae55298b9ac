"""Episodes of images, instructions, actions and proprio, and the base class of the readers of all dataset formats.

``openvla.data.open.open_dataset`` detects a dataset's format and returns its reader.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAIndexError, OpenVLAKeyError, OpenVLAValueError
from .columns import NOT_RGB, ColumnSpec, as_text, is_empty_instruction, is_non_camera_name
from .file_cache import RemoteError
from .remote import DataPath, file_version

# Kinds of columns.
IMAGE, TEXT, NUMERIC, DEPTH = "image", "text", "numeric", "depth"


class DatasetError(OpenVLAValueError):
    """An episode cannot be used; the message names its file and id. ``skip_bad`` leaves such episodes out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One training sample: images, instruction, action chunk and proprio of one time step.

    Attributes:
        images: uint8 ``(height, width, 3)`` RGB, one per camera in the configured order; of several moments the oldest
            first, with all cameras of each.
        instruction: The stored instruction without surrounding whitespace.
        actions: float64 ``(chunk_length, action_dim)``, from this step on, in the dataset's units.
        is_padding: bool ``(chunk_length,)``: True for actions beyond the episode's end, which repeat its last action.
        proprio: float64 ``(proprio_dim,)``, or None.
        dataset: Name of the dataset: the key of its statistics.
        episode_id: The episode's id, unique within the dataset.
        index: The step's number in its episode.
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
        """Return the action of this step alone, float64 ``(action_dim,)``."""
        return self.actions[0]


def neutral_past_end(actions: np.ndarray, is_padding: np.ndarray, is_relative: np.ndarray) -> np.ndarray:
    """Return a chunk whose padding rests: relative dimensions are 0, the others keep the last action's value.

    openvla-mini's ``chunk_act_obs``, which pads normalised actions.

    Args:
        actions: ``(chunk, action_dim)``, with the last action repeated as padding.
        is_padding: bool ``(chunk,)``.
        is_relative: bool ``(action_dim,)``.
    """
    return np.where(is_padding[:, None] & is_relative, 0.0, actions)


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One episode: its numbers in memory, its images decoded on demand.

    Attributes:
        id: Unique within the dataset.
        source: The file that it was read from.
        dataset: The dataset's name.
        actions: float64 ``(length, action_dim)``, standardised, in the dataset's units.
        proprio: float64 ``(length, proprio_dim)``, or None.
        instructions: One per step.
        load_images: Return the images of a step, one per camera.
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
        """Return the images of a step: uint8 ``(height, width, 3)``, one per camera.

        Raises:
            DatasetError: An image is missing or cannot be decoded.
            RemoteError: A remote file cannot be downloaded.
        """
        try:
            return self.load_images(index)
        except (DatasetError, RemoteError):
            raise
        except Exception as error:  # Pillow, h5py, FFmpeg and os raise different errors for damaged files
            raise DatasetError(f"{self.source}, episode {self.id}: no image at step {index}: {error}") from error

    def step(self, index: int, chunk_length: int = 1, history_length: int = 1) -> Step:
        """Return the sample that starts at a step; actions beyond the end repeat the last one.

        Args:
            index: The step.
            chunk_length: Actions, from this step on.
            history_length: Moments whose images the sample has, up to this step; before the start the first one
                repeats.

        Raises:
            IndexError: The episode has no such step.
            DatasetError: An image cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise OpenVLAIndexError(f"Episode {self.id} has steps 0 to {len(self) - 1}, got {index}.")
        steps = np.arange(index, index + chunk_length)
        return Step(
            images=tuple(
                image for step in range(index - history_length + 1, index + 1) for image in self.images(max(0, step))
            ),
            instruction=self.instructions[index].strip(),
            actions=self.actions[np.minimum(steps, len(self) - 1)],
            is_padding=steps >= len(self),
            proprio=None if self.proprio is None else self.proprio[index],
            dataset=self.dataset,
            episode_id=self.id,
            index=index,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RawEpisode:
    """An episode as stored, before the fields of a :class:`ColumnSpec` are applied.

    Attributes:
        id: Unique within the dataset.
        source: The file that it was read from.
        columns: Numeric columns, ``(stored length, ...)`` by dotted name; at least those that the fields name.
        instructions: One per stored step, or one for all; anything that ``as_text`` accepts.
        load_image: Return the image of a camera (by dotted name) at a stored step: uint8 ``(height, width, 3)``.
    """

    id: str
    source: str
    columns: Mapping[str, np.ndarray]
    instructions: Sequence[Any] | str
    load_image: Callable[[str, int], np.ndarray]


class EpisodeReader(ABC):
    """Base class of dataset readers: a sequence of episodes in a stable order, each read on demand.

    Subclasses implement ``files``, ``__len__``, ``_stored_length`` and ``read_raw``.

    Args:
        root: The dataset's folder or file, for messages.
        name: The dataset's name: the key of its statistics in a checkpoint.
        column_kinds: The kind of every column (``IMAGE``, ``TEXT``, ``NUMERIC`` or ``DEPTH``) by dotted name.
        fields: Which columns are cameras, action, proprio and instruction.

    Raises:
        KeyError: A field names a column that does not exist; the message suggests the nearest name.

    Attributes:
        format: Name of the format.
        unusable_columns: Columns that look like images but are not offered as cameras, with the reason.
        preset: The preset that the fields come from, or None.
        preset_reason: Why that preset was selected, for messages.
        doubtful_cameras: Image columns that may hold depth; using one as a camera is warned about.
        frame_rate: Steps per second, if the format stores it.
        noop_only_instructions: By index, the instructions of episodes that ``drop_noops`` would leave empty.
    """

    format = "?"
    unusable_columns: Mapping[str, str] = {}
    preset: str | None = None
    preset_reason = "you named it"
    doubtful_cameras: frozenset[str] = frozenset()
    frame_rate: float | None = None

    def __init__(self, root: DataPath, name: str, column_kinds: Mapping[str, str], fields: ColumnSpec) -> None:
        self.root, self.name, self.fields = root, name, fields
        self.column_kinds = dict(column_kinds)
        self.noop_only_instructions: dict[int, str] = {}
        self._lengths: dict[int, int] = {}
        self._usable: set[int] = set()
        self._num_noops: dict[int, int] = {}
        self._dimensions: tuple[int, int] | None = None
        self._validate_fields()

    def _missing_column(self, fields: ColumnSpec) -> tuple[str, str] | None:
        """Return the first column that the fields name but that does not exist, and the kind that it must have."""
        required = [(camera, IMAGE) for camera in fields.cameras]
        if fields.standardize is None:
            required += [(column, NUMERIC) for column in sorted(fields.numeric_columns())]
        if fields.instruction:
            required.append((fields.instruction, TEXT))
        return next(((column, kind) for column, kind in required if self.column_kinds.get(column) != kind), None)

    def _validate_fields(self) -> None:
        if missing := self._missing_column(self.fields):
            column, kind = missing
            candidates = [name for name, other in self.column_kinds.items() if other == kind]
            nearest = nearest_name(column, candidates)
            content = self.unusable_columns.get(column)
            if content is None and column in self.column_kinds:
                content = f"{self.column_kinds[column]} data"
            raise OpenVLAKeyError(
                f"{self.root}: there is no {kind} column {column!r}{f' (it holds {content})' if content else ''}."
                f"{f' Did you mean {nearest!r}?' if nearest else ''} Available: {candidates}.{self.preset_note()}"
            )
        for camera in self.fields.cameras:
            if self._is_doubtful(camera):
                warnings.warn(
                    f"{self.root}: the camera {camera!r} seems to hold {NOT_RGB}; if so, remove it from cameras.",
                    stacklevel=5,
                )

    def preset_note(self) -> str:
        """Return, for error messages, which preset is used and how to use none; empty without a preset."""
        if self.preset is None:
            return ""
        return (
            f" Fields that you do not set come from the preset {self.preset!r} ({self.preset_reason}): set them in "
            "fields, or use no preset (preset: none, --preset none)."
        )

    @property
    @abstractmethod
    def files(self) -> Sequence[DataPath]:
        """Return every file that the episodes are read from."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of episodes."""

    @abstractmethod
    def _stored_length(self, index: int) -> int:
        """Return the number of stored steps of an episode."""

    @abstractmethod
    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored.

        Raises:
            DatasetError: The episode's file is damaged or lacks a column.
        """

    def length(self, index: int, validate: bool = False) -> int:
        """Return the number of steps of an episode, as cheaply as the format allows.

        Args:
            index: The episode's index.
            validate: Read the episode's numbers (once) to make sure that it can be used.

        Raises:
            DatasetError: The episode's file is damaged; with ``validate``, whatever ``reader[index]`` raises.
        """
        if (validate or self.fields.drop_noops) and index not in self._usable:
            self[index]
        if index not in self._lengths:
            self._lengths[index] = max(0, self._stored_length(index) - self.fields.num_dropped_steps)
        return self._lengths[index]

    def usable_lengths(self) -> dict[str, list[int]]:
        """Return ``[number of steps, number of dropped no-ops]`` by index, for the usable episodes read so far."""
        return {str(index): [self._lengths[index], self._num_noops.get(index, 0)] for index in sorted(self._usable)}

    def restore_usable_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Restore what ``usable_lengths`` returned for the same files and fields, so that no episode is read again."""
        for key, (length, num_noops) in lengths.items():
            self._lengths[int(key)], self._num_noops[int(key)] = length, num_noops
            self._usable.add(int(key))

    @property
    def num_noop_steps(self) -> int:
        """Return the number of steps that ``drop_noops`` removed from the episodes read so far."""
        return sum(self._num_noops.values())

    def notes(self) -> list[str]:
        """Return notes for the user on how the dataset is read, where the fields do not show it."""
        notes = []
        if self.fields.drop_noops:
            notes.append(f"{self.num_noop_steps} steps that do nothing are left out (drop_noops)")
        for name, kind in self.column_kinds.items():
            if kind == DEPTH:
                notes.append(f"{name} is not used as a camera: it holds depth data")
            elif (
                kind == IMAGE and name not in (*self.fields.cameras, *self.unusable_columns) and self._is_doubtful(name)
            ):
                notes.append(f"{name} is not used as a camera: it holds {NOT_RGB}")
        return notes

    def _is_doubtful(self, camera: str) -> bool:
        """Return whether an image column may hold depth, masks or the like."""
        return camera in self.doubtful_cameras or is_non_camera_name(camera)

    def __iter__(self) -> Iterator[Episode]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        """Return one episode, its numbers read and checked.

        Raises:
            IndexError: There is no such episode.
            RemoteError: A remote file cannot be downloaded.
            DatasetError: The episode is damaged or empty, has a number that is not finite or an empty instruction, or
                has other dimensions than the dataset's first episode.
        """
        if not 0 <= index < len(self):
            raise OpenVLAIndexError(f"{self.root} has episodes 0 to {len(self) - 1}, got {index}.")
        raw = self.read_raw(index)
        where = f"{raw.source}, episode {raw.id}"
        try:
            actions, proprio = self.fields.actions_and_proprio(raw.columns)
            instructions = self._step_instructions(raw, len(actions))
        except (ValueError, IndexError) as error:
            raise DatasetError(f"{where}: {error}.") from error
        _require_usable(where, actions, proprio, instructions)
        self._require_equal_dimensions(where, actions, proprio)
        first = self.fields.skip_first
        stored_steps: Sequence[int] = range(first, first + len(actions))
        if self.fields.drop_noops:
            moving = self._non_noop_steps(index, where, raw, instructions)
            self._num_noops[index] = len(actions) - len(moving)
            actions, proprio = actions[moving], None if proprio is None else proprio[moving]
            instructions, stored_steps = [instructions[step] for step in moving], (first + moving).tolist()
        self._lengths[index] = len(actions)
        self._usable.add(index)
        load_images = self._image_loader(raw, stored_steps)
        return Episode(
            id=raw.id,
            source=raw.source,
            dataset=self.name,
            actions=actions,
            proprio=proprio,
            instructions=instructions,
            load_images=load_images,
        )

    def _step_instructions(self, raw: RawEpisode, length: int) -> Sequence[str]:
        """Return one instruction per action; of another number if the stored ones do not fit."""
        stored: Any = self.fields.instruction_text or raw.instructions
        if isinstance(stored, (str, bytes)) or len(stored) == 1:
            return [as_text(stored)] * length
        texts = [as_text(text) for text in stored]
        return texts[self.fields.skip_first : len(texts) - (self.fields.relabel is not None)]

    def _require_equal_dimensions(self, where: str, actions: np.ndarray, proprio: np.ndarray | None) -> None:
        dimensions = (actions.shape[1], 0 if proprio is None else proprio.shape[1])
        if self._dimensions is None:
            self._dimensions = dimensions
        for kind, expected, actual in zip(("action", "proprio"), self._dimensions, dimensions):
            if expected != actual:
                raise DatasetError(
                    f"{where}: {kind} has {actual} dimensions, but {expected} in the dataset's other episodes."
                )

    def _non_noop_steps(self, index: int, where: str, raw: RawEpisode, instructions: Sequence[str]) -> np.ndarray:
        moving = self.fields.non_noop_steps(raw.columns)
        if not len(moving):
            instruction = self.noop_only_instructions[index] = instructions[0].strip()
            raise DatasetError(
                f"{where}: all of its {len(instructions)} steps do nothing (instruction {instruction!r}), so "
                "drop_noops would leave no step. Set skip_bad=True to leave such episodes out, or drop_noops: false."
            )
        return moving

    def _image_loader(self, raw: RawEpisode, stored_steps: Sequence[int]) -> Callable[[int], tuple[np.ndarray, ...]]:
        cameras, swap_channels, rotate = self.fields.cameras, self.fields.channels == "bgr", self.fields.rotate_180

        def load_images(step: int) -> tuple[np.ndarray, ...]:
            images = tuple(raw.load_image(camera, stored_steps[step]) for camera in cameras)
            for camera, image in zip(cameras, images):
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise OpenVLAValueError(f"{camera} is {image.dtype} {image.shape}, not uint8 (height, width, 3)")
            images = tuple(image[..., ::-1] for image in images) if swap_channels else images
            return tuple(image[::-1, ::-1] for image in images) if rotate else images

        return load_images

    @property
    def action_dim(self) -> int:
        """Return the number of action dimensions, from the first usable episode.

        Raises:
            ValueError: No episode can be used.
        """
        return self._read_dimensions()[0]

    @property
    def proprio_dim(self) -> int:
        """Return the number of proprio dimensions, 0 without proprio."""
        return self._read_dimensions()[1]

    def _read_dimensions(self) -> tuple[int, int]:
        if self._dimensions is None:
            next(usable_episodes(self), None)
        if self._dimensions is None:
            raise OpenVLAValueError(f"{self.root}: none of its {len(self)} episodes can be used.")
        return self._dimensions

    def digest(self, times: bool = True) -> str | None:
        """Return a hex digest of the fields and of the files' names, sizes and times; None if it cannot be known.

        Of remote files: checksums where the source has them, else what it tells files apart by.

        Args:
            times: Include the times of local files; without them a copy of the dataset has the same digest.
        """
        parts = [self.format, self.name, str(self.fields)]
        parts += [file_version(self.root, file, times) for file in sorted(self.files, key=str)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def usable_episodes(
    reader: EpisodeReader, skipped: list[str] | None = None, indices: Iterable[int] | None = None
) -> Iterator[Episode]:
    """Yield the episodes (all, or some) that can be used; the errors of the others are appended to ``skipped``."""
    for index in range(len(reader)) if indices is None else indices:
        try:
            yield reader[index]
        except DatasetError as error:
            if skipped is not None:
                skipped.append(str(error))


def _require_usable(where: str, actions: np.ndarray, proprio: np.ndarray | None, instructions: Sequence[str]) -> None:
    if not len(actions):
        raise DatasetError(f"{where}: it has no step.")
    for kind, values in (("action", actions), ("proprio", proprio)):
        if values is not None and not np.isfinite(values).all():
            step, dimension = np.argwhere(~np.isfinite(values))[0]
            raise DatasetError(f"{where}: {kind}[{dimension}] at step {step} is {values[step, dimension]}.")
    if len(instructions) != len(actions):
        raise DatasetError(f"{where}: {len(actions)} actions but {len(instructions)} instructions.")
    empty = next((step for step, text in enumerate(instructions) if is_empty_instruction(text)), None)
    if empty is not None:
        text = f" ({instructions[empty]!r})" if instructions[empty].strip() else ""
        raise DatasetError(
            f"{where}: the instruction at step {empty} is empty{text}. Set skip_bad=True to leave such episodes out, "
            "or give one instruction for all episodes with the field instruction_text."
        )


def decode_image(data: bytes) -> np.ndarray:
    """Return a JPEG or PNG as uint8 ``(height, width, 3)`` RGB."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("RGB", "RGBA", "L", "P"):
            raise OpenVLAValueError(f"an image of mode {image.mode} is not a camera image")
        return np.asarray(image.convert("RGB"))


def warn_skipped(skipped: Sequence[str], total: int, name: str) -> None:
    """Give one warning that counts the skipped episodes and quotes the first error."""
    if skipped:
        warnings.warn(f"{name}: skipped {len(skipped)} of {total} episodes. The first: {skipped[0]}", stacklevel=3)
