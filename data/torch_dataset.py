"""Demonstrations from memory: any torch Dataset or sequence, of steps or of whole episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from ..images_openvla import as_images
from .columns import Fields, dotted, single, step_order
from .episodes import IMAGE, NUMBERS, TEXT, DemonstrationError, EpisodeReader, Stored
from .presets import merged_fields


class SequenceReader(EpisodeReader):
    """Episodes of something that has ``len`` and ``[]``.

    Args:
        data: Steps (dictionaries, nested ones too), those of an episode together, or episodes (lists of such steps).
            Steps that have a ``frame`` or ``timestamp`` are put in its order; others must lie in theirs.
        name: Of the dataset.
        fields: ``cameras``, ``action``, and what else ``demonstration_fields.Fields`` takes.
        episode_lengths: Of steps: how many belong to each episode. Without it every step is asked for its
            ``episode`` once, which decodes images where the dataset does so.
        episode: Of steps: the column that says which episode a step is of.
        frame: The column that counts an episode's steps, from any number on; None takes them as they lie.
        digest: Stands for the content in the statistics' cache; without it nothing is cached.

    Raises:
        KeyError: A field is not there.
        ValueError: The lengths of episodes do not add up, or there is no step. Of an episode (DemonstrationError):
            steps are missing, there twice, or of several episodes.
    """

    format = "sequence"

    def __init__(
        self,
        data: Any,
        name: str,
        fields: Mapping[str, Any] | Fields,
        *,
        episode_lengths: Sequence[int] | None = None,
        episode: str = "episode_index",
        frame: str | None = "frame_index",
        digest: str | None = None,
    ) -> None:
        if not len(data):
            raise OpenVLAValueError(f"{name} holds no step.")
        self.data, self.content_digest = data, digest
        first = data[0]
        self.whole = not isinstance(first, Mapping)
        self.frame, self.episode = frame and dotted(frame), dotted(episode)
        fields = fields if isinstance(fields, Fields) else merged_fields(None, None, fields, Path(name))
        if not self.whole:
            lengths = _run_lengths(data, self.episode, name) if episode_lengths is None else list(episode_lengths)
            if wrong := [one for one in lengths if type(single(one)) is not int or one < 1]:
                raise OpenVLAValueError(
                    f"{name}: episode_lengths must be whole numbers of steps, 1 or more, got {wrong[0]!r}."
                )
            self.bounds = np.cumsum([0, *lengths])
            if self.bounds[-1] != len(data):
                raise OpenVLAValueError(
                    f"{name}: episode_lengths add up to {self.bounds[-1]}, but there are {len(data)} steps."
                )
        elif not _is_episode(first) or not len(first) or not isinstance(first[0], Mapping):
            raise OpenVLAValueError(
                f"{name} must hold steps (dictionaries) or episodes (lists of steps, at least one), got {first!r:.200}."
            )
        sample = _flat(first[0] if self.whole else first)
        super().__init__(Path(name), name, {key: _kind(value) for key, value in sample.items()}, fields)

    @property
    def files(self) -> list[Path]:
        """None."""
        return []

    def __len__(self) -> int:
        return len(self.data) if self.whole else len(self.bounds) - 1

    def digest(self) -> str | None:
        """Of the given digest and the fields; None where none was given."""
        if self.content_digest is None:
            return None
        return hashlib.sha256(f"{self.content_digest} {self.name} {self.fields}".encode()).hexdigest()

    def _stored_length(self, index: int) -> int:
        if not self.whole:
            return int(self.bounds[index + 1] - self.bounds[index])
        episode = self.data[index]
        if not _is_episode(episode):
            raise DemonstrationError(f"{self.name}, episode {index}: it must be a list of steps, got {episode!r:.200}.")
        return len(episode)

    def _step(self, index: int, step: int) -> dict[str, Any]:
        row = self.data[index][step] if self.whole else self.data[int(self.bounds[index]) + step]
        if not isinstance(row, Mapping):
            raise DemonstrationError(
                f"{self.name}, episode {index}: step {step} must be a dictionary of columns, got {row!r:.200}."
            )
        return _flat(row)

    def _read(self, index: int) -> Stored:
        steps = [self._step(index, step) for step in range(self._stored_length(index))]
        if not steps:
            raise DemonstrationError(f"{self.name}, episode {index}: it has no step; leave it out with skip_bad=True.")
        names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        wanted = {name for name in names if self.names[name] == NUMBERS}
        text = self.fields.instruction
        for step, row in enumerate(steps):
            if missing := sorted({*wanted, *self.fields.cameras, *([text] if text else [])} - set(row)):
                raise DemonstrationError(f"{self.name}, episode {index}: {missing} missing at step {step}.")
        named = sorted({str(single(row[self.episode])) for row in steps if self.episode in row})
        if len(named) > 1:
            raise DemonstrationError(
                f"{self.name}, episode {index}: its steps are of several by their {self.episode!r}: {named[:5]}; give "
                "the episode_lengths that fit, or whole episodes."
            )
        try:
            columns = {name: np.stack([np.asarray(row[name]) for row in steps]) for name in sorted(wanted)}
            order = self._order(steps)
        except ValueError as error:
            raise DemonstrationError(f"{self.name}, episode {index}: {error}.") from error
        said = [row[text] for row in steps] if text else ""
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
            said = [said[row] for row in order] if text else ""

        def image(camera: str, step: int) -> np.ndarray:
            return np.asarray(as_images(self._step(index, step if order is None else int(order[step]))[camera])[0])

        return Stored(str(index), self.name, columns, said, image)

    def _order(self, steps: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Return the order of an episode's steps by what counts them, as ``step_order``."""
        counters = {}
        for name, counter in ((self.frame, "frame_index"), ("timestamp", "timestamp")):
            held = [single(row[name]) for row in steps if name in row]
            if self.frame is None or not held or not _is_number(held[0]):
                continue
            if len(held) != len(steps):
                raise OpenVLAValueError(f"{name} must be in every step, it is in {len(held)} of {len(steps)}")
            if wrong := [value for value in held if not _is_number(value)]:
                raise OpenVLAValueError(f"{name} must be one number in every step, got {wrong[0]!r:.200}")
            counters[counter] = np.array(held, np.float64)
        try:
            return step_order(counters)
        except ValueError as error:
            raise OpenVLAValueError(f"{error}, or give frame=None where the steps are not counted so") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + dotted(str(key))
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return out


def _kind(value: Any) -> str:
    if isinstance(value, (str, bytes)) or getattr(getattr(value, "dtype", None), "kind", "") in ("S", "U", "O"):
        return TEXT
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (str, bytes)):
        return TEXT
    if isinstance(value, (int, float, bool, list, tuple)):
        return NUMBERS
    shape = getattr(value, "shape", None)
    return IMAGE if shape is None or len(shape) == 3 else NUMBERS  # PIL, or height, width and channels


def _is_episode(value: Any) -> bool:
    several = hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "ndim", 1)
    return bool(several) and not isinstance(value, (str, bytes, Mapping))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or type(value) is int and abs(value) < 2**63


def _run_lengths(data: Any, column: str, name: str) -> list[int]:
    """How many steps in a row bear the same episode.

    Raises:
        KeyError: There is no such column.
        ValueError: An episode's steps do not lie together.
    """
    lengths: list[int] = []
    seen: list[Any] = []
    for index in range(len(data)):
        row = data[index]
        row = _flat(row) if isinstance(row, Mapping) else {}
        if column not in row:
            raise OpenVLAKeyError(f"{name}: no column {column!r} at step {index}; give episode=, or episode_lengths.")
        number = single(row[column])
        if isinstance(number, bool) or not (
            isinstance(number, (int, str)) or isinstance(number, float) and number.is_integer()
        ):
            raise OpenVLAValueError(
                f"{name}: {column} must be a whole number or a text at every step, got {number!r:.200} at step "
                f"{index}; give episode=, or episode_lengths."
            )
        if not seen or seen[-1] != number:
            if number in seen:
                raise OpenVLAValueError(f"{name}: the steps of episode {number} do not lie together (step {index}).")
            seen.append(number)
            lengths.append(0)
        lengths[-1] += 1
    return lengths
