"""Read episodes from memory: any torch Dataset or sequence, of steps or of whole episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from ..images_openvla import as_images
from .columns import ColumnSpec, dotted, step_order, unwrap_scalar
from .episodes import IMAGE, NUMERIC, TEXT, DatasetError, EpisodeReader, RawEpisode
from .presets import merge_fields


class TorchDatasetReader(EpisodeReader):
    """Reader of a torch ``Dataset``, a list or anything else with ``__len__`` and ``__getitem__``.

    Args:
        data: Steps (possibly nested dictionaries), those of an episode together; or episodes (lists of such steps).
            Steps with a ``frame`` or ``timestamp`` column are sorted by it; others must be in order.
        name: The dataset's name.
        fields: ``cameras``, ``action`` and further fields of :class:`~openvla.data.columns.ColumnSpec`.
        episode_lengths: For steps: the number of steps of each episode. Without it, the ``episode`` column of every
            step is read once, which decodes images if the dataset does so.
        episode: For steps: the column with the episode of a step.
        frame: The column that counts an episode's steps, from any number on; None keeps the stored order.
        digest: Identifies the content in the statistics cache; without it nothing is cached.

    Raises:
        KeyError: A field names a column that does not exist.
        ValueError: The episode lengths do not add up, or there is no step. As a ``DatasetError`` when an episode is
            read: steps are missing, duplicated, or of several episodes.
    """

    format = "sequence"

    def __init__(
        self,
        data: Any,
        name: str,
        fields: Mapping[str, Any] | ColumnSpec,
        *,
        episode_lengths: Sequence[int] | None = None,
        episode: str = "episode_index",
        frame: str | None = "frame_index",
        digest: str | None = None,
    ) -> None:
        if not len(data):
            raise OpenVLAValueError(f"{name} has no step.")
        self.data, self.content_digest = data, digest
        first = data[0]
        self.holds_episodes = not isinstance(first, Mapping)
        self.frame, self.episode = frame and dotted(frame), dotted(episode)
        fields = fields if isinstance(fields, ColumnSpec) else merge_fields(None, None, fields, Path(name))
        if not self.holds_episodes:
            if episode_lengths is None:
                episode_lengths = _run_lengths(data, self.episode, name)
            self.bounds = _episode_bounds(name, len(data), list(episode_lengths))
        elif not _is_episode(first) or not len(first) or not isinstance(first[0], Mapping):
            raise OpenVLAValueError(
                f"{name} must hold steps (dictionaries) or episodes (lists of steps, at least one), got {first!r:.200}."
            )
        sample = _flatten(first[0] if self.holds_episodes else first)
        super().__init__(Path(name), name, {key: _value_kind(value) for key, value in sample.items()}, fields)

    @property
    def files(self) -> list[Path]:
        """Return an empty list: the data is in memory."""
        return []

    def __len__(self) -> int:
        return len(self.data) if self.holds_episodes else len(self.bounds) - 1

    def digest(self, times: bool = True) -> str | None:
        """Return a digest of the given content digest, name and fields; None without a content digest."""
        if self.content_digest is None:
            return None
        return hashlib.sha256(f"{self.content_digest} {self.name} {self.fields}".encode()).hexdigest()

    def _stored_length(self, index: int) -> int:
        if not self.holds_episodes:
            return int(self.bounds[index + 1] - self.bounds[index])
        episode = self.data[index]
        if not _is_episode(episode):
            raise DatasetError(f"{self.name}, episode {index}: it must be a list of steps, got {episode!r:.200}.")
        return len(episode)

    def _read_step(self, index: int, step: int) -> dict[str, Any]:
        columns = self.data[index][step] if self.holds_episodes else self.data[int(self.bounds[index]) + step]
        if not isinstance(columns, Mapping):
            raise DatasetError(
                f"{self.name}, episode {index}: step {step} must be a dictionary of columns, got {columns!r:.200}."
            )
        return _flatten(columns)

    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored, its steps in the order of their counters."""
        where = f"{self.name}, episode {index}"
        steps = [self._read_step(index, step) for step in range(self._stored_length(index))]
        if not steps:
            raise DatasetError(f"{where}: it has no step; leave it out with skip_bad=True.")
        names = self.fields.numeric_columns() if self.fields.standardize is None else set(self.column_kinds)
        numeric = sorted(name for name in names if self.column_kinds[name] == NUMERIC)
        text = self.fields.instruction
        required = {*numeric, *self.fields.cameras, *([text] if text else [])}
        for number, step in enumerate(steps):
            if missing := sorted(required - set(step)):
                raise DatasetError(f"{where}: step {number} lacks the columns {missing}.")
        episodes = sorted({str(unwrap_scalar(step[self.episode])) for step in steps if self.episode in step})
        if len(episodes) > 1:
            raise DatasetError(
                f"{where}: its steps belong to several episodes by their column {self.episode!r}: {episodes[:5]}; give "
                "correct episode_lengths, or whole episodes."
            )
        try:
            columns = {name: np.stack([np.asarray(step[name]) for step in steps]) for name in numeric}
            order = self._step_order(steps)
        except ValueError as error:
            raise DatasetError(f"{where}: {error}.") from error
        instructions = [step[text] for step in steps] if text else ""
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
            instructions = [instructions[number] for number in order] if text else ""

        def load_image(camera: str, step: int) -> np.ndarray:
            columns = self._read_step(index, step if order is None else int(order[step]))
            return np.asarray(as_images(columns[camera])[0])

        return RawEpisode(str(index), self.name, columns, instructions, load_image)

    def _step_order(self, steps: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Return the order of an episode's steps by its counters, as ``columns.step_order`` does."""
        if self.frame is None:
            return None
        counters = {}
        for name, counter in ((self.frame, "frame_index"), ("timestamp", "timestamp")):
            values = [unwrap_scalar(step[name]) for step in steps if name in step]
            if not values or not _is_number(values[0]):
                continue
            if len(values) != len(steps):
                raise OpenVLAValueError(f"{name} must be in every step, but is in {len(values)} of {len(steps)}")
            if invalid := [value for value in values if not _is_number(value)]:
                raise OpenVLAValueError(f"{name} must be one number in every step, got {invalid[0]!r:.200}")
            counters[counter] = np.array(values, np.float64)
        try:
            return step_order(counters)
        except ValueError as error:
            raise OpenVLAValueError(f"{error}, or pass frame=None if that column does not count the steps") from error


def _episode_bounds(name: str, num_steps: int, lengths: list[Any]) -> np.ndarray:
    """Return where each episode starts, and the end of the last one."""
    if invalid := [length for length in lengths if type(unwrap_scalar(length)) is not int or length < 1]:
        raise OpenVLAValueError(
            f"{name}: episode_lengths must be whole numbers of steps, 1 or more, got {invalid[0]!r}."
        )
    bounds = np.cumsum([0, *lengths])
    if bounds[-1] != num_steps:
        raise OpenVLAValueError(f"{name}: episode_lengths add up to {bounds[-1]}, but there are {num_steps} steps.")
    return bounds


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dictionary by dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + dotted(str(key))
        leaves |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return leaves


def _value_kind(value: Any) -> str:
    if isinstance(value, (str, bytes)) or getattr(getattr(value, "dtype", None), "kind", "") in ("S", "U", "O"):
        return TEXT
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (str, bytes)):
        return TEXT
    if isinstance(value, (int, float, bool, list, tuple)):
        return NUMERIC
    shape = getattr(value, "shape", None)
    return IMAGE if shape is None or len(shape) == 3 else NUMERIC  # PIL has no shape; arrays of images have three sizes


def _is_episode(value: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return False
    return bool(getattr(value, "ndim", 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or type(value) is int and abs(value) < 2**63


def _run_lengths(data: Any, column: str, name: str) -> list[int]:
    """Return the number of consecutive steps of every episode.

    Raises:
        KeyError: A step lacks the column.
        ValueError: The steps of an episode are not consecutive.
    """
    lengths: list[int] = []
    episodes: list[Any] = []
    for index in range(len(data)):
        step = data[index]
        columns = _flatten(step) if isinstance(step, Mapping) else {}
        if column not in columns:
            raise OpenVLAKeyError(f"{name}: step {index} has no column {column!r}; pass episode=, or episode_lengths.")
        episode = unwrap_scalar(columns[column])
        if isinstance(episode, bool) or not (
            isinstance(episode, (int, str)) or isinstance(episode, float) and episode.is_integer()
        ):
            raise OpenVLAValueError(
                f"{name}: {column} must be a whole number or a text at every step, got {episode!r:.200} at step "
                f"{index}; pass episode=, or episode_lengths."
            )
        if not episodes or episodes[-1] != episode:
            if episode in episodes:
                raise OpenVLAValueError(f"{name}: the steps of episode {episode} are not consecutive (step {index}).")
            episodes.append(episode)
            lengths.append(0)
        lengths[-1] += 1
    return lengths
