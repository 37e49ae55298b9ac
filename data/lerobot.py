"""Read LeRobot datasets, v2.0 to v3.0: tables through pyarrow, videos through PyAV, images in tables or files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .columns import (
    ColumnSpec,
    alternative_instruction_columns,
    as_text,
    dotted,
    is_empty_instruction,
    is_non_camera_name,
    step_order,
)
from .episodes import DEPTH, IMAGE, NUMERIC, TEXT, DatasetError, EpisodeReader, RawEpisode, decode_image
from .file_cache import RemoteError
from .file_handles import FileHandleCache
from .gripper_check import ABSOLUTE, SIGNED, detect_gripper_convention, require_unconverted_gripper
from .lerobot_meta import FILE_INDICES, load_info, read_json_lines, require_numbers, require_path_patterns
from .modality import Modality
from .presets import AUTO, HDF5_PRESETS, PRESETS, WITHOUT_PRESET, merge_fields
from .remote import DataPath, RemotePath, existing_files, on_disk
from .utils import require
from .video import Video

_IMAGE_DTYPES = ("video", "image")
# Columns that count an episode's rows, the most reliable first.
_COUNTERS = ("frame_index", "index", "timestamp")
# Columns of the tasks table that hold the text; the second is the name of a data frame's index.
_TASK_TEXTS = ("task", "__index_level_0__")
_RANGE = re.compile(r"^\s*(\d*)\s*:\s*(\d*)\s*$")
# Pixel formats with more than 8 bits: depth.
_DEPTH_PIXEL_FORMAT = re.compile(r"^gray(9|1\d)")
# Spellings of false in JSON and in text.
_FALSE = ("false", "none", "0", "no", "")


class _EpisodeRange(NamedTuple):
    """Lowest and highest episode_index of a row group; infinite if unknown."""

    low: float
    high: float


class _ParquetFile:
    """An open parquet file with the rows of some episodes."""

    def __init__(self, path: Path) -> None:
        parquet = require("pyarrow.parquet", "Reading LeRobot datasets")
        pyarrow = require("pyarrow", "Reading LeRobot datasets")
        try:
            self.file = parquet.ParquetFile(path)
            schema = self.file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise DatasetError(f"{path} cannot be read as parquet: {error}.") from error
        self.names = set(schema.names)
        if "episode_index" in self.names and not str(schema.field("episode_index").type).startswith(("int", "uint")):
            raise DatasetError(
                f"{path}: episode_index must be a column of whole numbers, got {schema.field('episode_index').type}."
            )
        self.episode_ranges = _episode_ranges(self.file.metadata)

    def close(self) -> None:
        self.file.close()

    def read_episode(self, index: int, columns: list[str]) -> Any:
        """Return the rows of an episode in stored order, with those of the columns that exist."""
        groups = [group for group, (low, high) in enumerate(self.episode_ranges) if low <= index <= high]
        existing = [name for name in columns if name in self.names]
        table = self.file.read_row_groups(groups, columns=["episode_index", *existing])
        return table.take(np.flatnonzero(table["episode_index"].to_numpy() == index))


def _episode_ranges(metadata: Any) -> list[_EpisodeRange]:
    """Return the range of episode_index of every row group, from the file's statistics."""
    if not metadata.num_row_groups:
        return []
    unknown = _EpisodeRange(-np.inf, np.inf)
    names = [metadata.row_group(0).column(leaf).path_in_schema for leaf in range(metadata.row_group(0).num_columns)]
    if "episode_index" not in names:
        return [unknown] * metadata.num_row_groups
    leaf = names.index("episode_index")
    statistics = [metadata.row_group(group).column(leaf).statistics for group in range(metadata.num_row_groups)]
    return [_EpisodeRange(s.min, s.max) if s is not None and s.has_min_max else unknown for s in statistics]


class LeRobotReader(EpisodeReader):
    """Reader of LeRobot datasets.

    Presets describe RLDS datasets and do not fit LeRobot datasets in general: a dataset with the name of a preset is
    read as it is stored, with a warning. The exception is a LIBERO dataset whose gripper goes below 0, which shows that
    its actions are stored as the simulator takes them: it is read with the preset of its name.

    Args:
        root: The folder with meta/info.json.
        preset: As in ``open_dataset``.
        fields: Fields of ``ColumnSpec`` to replace; names of GR00T's meta/modality.json are columns too. Default: all
            colour cameras in the order of info.json, ``action`` and ``observation.state``.
        name: The dataset's name. Default: the folder's name.
        split: A key of info.json's ``splits``, or "all".

    Raises:
        ValueError: The format's version is not supported, the split does not exist, or a meta file is damaged.
        KeyError: A field names a column that does not exist.
        ImportError: pyarrow is not installed.
    """

    format = "lerobot"

    def __init__(
        self,
        root: DataPath,
        *,
        preset: str | None = AUTO,
        fields: Mapping[str, Any] | None = None,
        name: str | None = None,
        split: str = "train",
    ) -> None:
        self.info = load_info(root)
        self.root, self.v3, self.split = root, self.info["codebase_version"] == "v3.0", split
        features = self.info["features"]
        # Stored names by dotted names.
        self.stored_names = {dotted(feature): feature for feature in features}
        if len(self.stored_names) < len(features):
            raise OpenVLAValueError(
                f"{root} must name features that differ in more than dots and slashes, got {[*features]}."
            )
        self.videos = {dotted(feature) for feature in features if features[feature]["dtype"] == "video"}
        column_kinds = {name: _feature_kind(features[feature]) for name, feature in self.stored_names.items()}
        column_kinds["task"] = TEXT
        widths = {
            name: math.prod(features[feature].get("shape") or (1,)) for name, feature in self.stored_names.items()
        }
        self.modality = Modality(root, widths)
        column_kinds |= dict.fromkeys(self.modality.annotations, TEXT)
        fields = self.modality.resolved(fields)
        self.doubtful_cameras = frozenset(
            name
            for name, feature in self.stored_names.items()
            if column_kinds[name] == IMAGE and _has_single_channel(features[feature])
        )
        require_path_patterns(root, self.info, self.v3, bool(self.videos))
        self.episodes = self._select_split(self._read_episodes())
        fps = self.info.get("fps")
        self.frame_rate = float(fps) if isinstance(fps, (int, float)) and fps > 0 else None
        self.tables = FileHandleCache(_ParquetFile)
        self.open_videos = FileHandleCache(Video)
        self._has_warned_of_tasks = False
        self._episode_ranges: dict[DataPath, list[_EpisodeRange]] = {}
        self.preset = None if preset == AUTO else preset
        suggested = _suggest_fields(column_kinds, self.doubtful_cameras)
        merged = merge_fields(suggested, self.preset, fields, root)
        super().__init__(root, name or root.name, column_kinds, merged)
        self._require_video_locations()
        is_task_number = self.fields.instruction in (None, "task", *self.modality.annotations)
        uses_tasks = is_task_number and not self.fields.instruction_text
        self.tasks = self._read_tasks() if uses_tasks else {}
        if preset == AUTO:
            self._select_preset_by_gripper(fields, name, root.name)
        else:
            require_unconverted_gripper(self, fields)

    def notes(self) -> list[str]:
        """Return the base class's notes, and the names that modality.json defines."""
        names = f"fields may use the names of modality.json: {', '.join(self.modality.columns)}"
        return [*super().notes(), *([names] if self.modality.columns else [])]

    def _require_video_locations(self) -> None:
        """Check that meta/episodes (v3) locates the videos of the cameras."""
        videos = [f"videos/{self.stored_names[camera]}" for camera in self.fields.cameras if camera in self.videos]
        if self.v3 and videos:
            require_numbers(self.root, self.episodes, [f"{video}/{key}" for video in videos for key in FILE_INDICES])
            require_numbers(self.root, self.episodes, [f"{video}/from_timestamp" for video in videos], (int, float))

    def _select_preset_by_gripper(self, fields: Mapping[str, Any] | None, *names: str | None) -> None:
        """Use the preset of the dataset's name if the stored gripper fits it; else warn that it is not used."""
        known = next((name for name in names if name in (PRESETS.keys() | WITHOUT_PRESET) - {*HDF5_PRESETS}), None)
        if known is None or {"gripper", "standardize"} & set(fields or {}):
            return
        convention, preset = detect_gripper_convention(self), PRESETS.get(known)
        if preset is not None and preset.gripper == "clipped_inverted":
            if convention == SIGNED:
                self.preset, self.preset_reason = known, "by the dataset's name, and its gripper goes below 0"
                preset_fields = preset.replace(fields or {})
                mask = self.fields.action_mask or preset.action_mask
                own_fields = dataclasses.replace(self.fields, gripper=preset.gripper, action_mask=mask)
                self.fields = own_fields if self._missing_column(preset_fields) else preset_fields
                return
            if convention == ABSOLUTE:
                return
        warnings.warn(
            f"{self.root}: {known!r} is the name of an RLDS dataset, whose columns this LeRobot dataset need not have: "
            "it is read as it is stored, the gripper as 0 closed, 1 open. Check it with openvla inspect-data; if that "
            "is wrong, set fields.",
            stacklevel=4,
        )

    def _read_tasks(self) -> dict[int, Any]:
        """Return the tasks' texts by task_index."""
        meta = self.root / "meta"
        if not self.v3:
            rows = read_json_lines(meta / "tasks.jsonl")
            require_numbers(self.root, rows, ["task_index"])
            return {row["task_index"]: row.get("task") for row in rows}
        table = _read_parquet(meta / "tasks.parquet")
        text_columns = [
            name
            for name in table.column_names
            if name != "task_index" and re.search("string|binary", str(table[name].type))
        ]
        text_column = next((name for name in _TASK_TEXTS if name in text_columns), None)
        if text_column is None and len(text_columns) == 1:
            text_column = text_columns[0]
        if text_column is None:
            raise OpenVLAValueError(
                f"{meta / 'tasks.parquet'} must hold the task's text in a column named one of {_TASK_TEXTS}; its text "
                f"columns are {text_columns}. Or set the field instruction or instruction_text."
            )
        rows = table.select([name for name in ("task_index", text_column) if name in table.column_names]).to_pylist()
        require_numbers(self.root, rows, ["task_index"])
        return {row["task_index"]: row[text_column] for row in rows}

    def _select_split(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the episodes of the split by info.json's range: "0:80" is the episodes 0 to 79.

        Raises:
            ValueError: The split does not exist, or its range cannot be parsed.
        """
        splits = self.info.get("splits") or {"train": ":"}
        if self.split == "all":
            return rows
        if self.split not in splits:
            raise OpenVLAValueError(f"{self.root} has no split {self.split!r}; use one of {[*splits, 'all']}.")
        indices = {name: _indices_in_range(self.root, name, text, rows) for name, text in splits.items()}
        if num_outside := len(rows) - len(set().union(*indices.values())):
            warnings.warn(
                f"{self.root}: {num_outside} of {len(rows)} episodes are in no split of info.json ({splits}) and are "
                "left out; split 'all' uses every episode.",
                stacklevel=4,
            )
        return [row for row in rows if row["episode_index"] in indices[self.split]]

    def digest(self, times: bool = True) -> str:
        """Return the base class's digest combined with the split."""
        return hashlib.sha256(f"{super().digest(times)} {self.split}".encode()).hexdigest()

    def _read_episodes(self) -> list[dict[str, Any]]:
        """Return the rows of meta/episodes, sorted by episode_index."""
        meta = self.root / "meta"
        self.episode_tables: list[DataPath] = []
        if not self.v3:
            self.episode_tables = [meta / "episodes.jsonl"]
            rows = read_json_lines(meta / "episodes.jsonl")
        else:
            rows = []
            for file in _find_tables(meta / "episodes"):
                self.episode_tables.append(file)
                table = _read_parquet(file)
                # Per-episode statistics are large and not needed.
                rows += table.select([n for n in table.column_names if not n.startswith("stats/")]).to_pylist()
        total = self.info.get("total_episodes")
        if total is not None and total != len(rows):
            warnings.warn(
                f"{self.root}: info.json says {total} episodes, but {meta}/episodes has {len(rows)}; if the dataset is "
                "incomplete, copy it again.",
                stacklevel=4,
            )
        data_indices = [f"data/{key}" for key in FILE_INDICES] if self.v3 else []
        require_numbers(self.root, rows, ["episode_index", "length", *data_indices])
        counts = Counter(row["episode_index"] for row in rows)
        if duplicates := sorted(number for number, count in counts.items() if count > 1):
            raise OpenVLAValueError(f"{meta} must name every episode once; these are duplicated: {duplicates[:5]}.")
        return sorted(rows, key=lambda row: row["episode_index"])

    @property
    def files(self) -> list[DataPath]:
        """Return the tables and videos of the episodes."""
        files = {self.root / "meta" / "info.json", *self.episode_tables}
        for row in self.episodes:
            files.add(self._data_file(row))
            files |= {self._video_file(row, camera) for camera in self.fields.cameras if camera in self.videos}
        return existing_files(files)

    def _data_file(self, row: Mapping[str, Any]) -> DataPath:
        if self.v3:
            numbers = {key: row[f"data/{key}"] for key in FILE_INDICES}
        else:
            numbers = self._v2_file_numbers(row)
        return self.root / self.info["data_path"].format(**numbers)

    def _v2_file_numbers(self, row: Mapping[str, Any]) -> dict[str, int]:
        index = row["episode_index"]
        return {"episode_index": index, "episode_chunk": index // self.info.get("chunks_size", 1000)}

    def _video_file(self, row: Mapping[str, Any], camera: str) -> DataPath:
        stored_name = self.stored_names[camera]
        if self.v3:
            numbers = {key: row[f"videos/{stored_name}/{key}"] for key in FILE_INDICES}
        else:
            numbers = self._v2_file_numbers(row)
        return self.root / self.info["video_path"].format(video_key=stored_name, **numbers)

    def __len__(self) -> int:
        return len(self.episodes)

    def _stored_length(self, index: int) -> int:
        return self.episodes[index]["length"]

    def _read_rows(self, row: Mapping[str, Any], columns: list[str]) -> tuple[DataPath, Any]:
        """Return the file that holds an episode and its rows; if the named file has none, search the other files.

        Raises:
            ValueError: The named file holds only some rows, or it holds none and not exactly one other file all.
        """
        index, length, named_file = row["episode_index"], row["length"], self._data_file(row)
        num_rows = 0
        if not length:
            raise OpenVLAValueError("it has no step")
        if named_file.is_file():
            table = self._read_table(named_file, index, columns)
            if len(table) == length:
                return named_file, table
            num_rows = len(table)
        if num_rows:
            raise OpenVLAValueError(f"the table has {num_rows} rows, but meta/episodes says {length}")
        tables = {file: self._read_table(file, index, columns) for file in self._candidate_files(index)}
        complete = [file for file, table in tables.items() if len(table) == length]
        if len(complete) != 1:
            raise OpenVLAValueError(
                f"{named_file} has no row of it, and {len(complete)} other files have all {length}, where it must be "
                "one; copy the dataset again"
            )
        return complete[0], tables[complete[0]]

    def _read_table(self, file: DataPath, index: int, columns: list[str]) -> Any:
        with self.tables.use(file) as table:
            return table.read_episode(index, columns)

    def _candidate_files(self, index: int) -> list[DataPath]:
        """Return the data files that may hold an episode."""
        if not self._episode_ranges:
            for path in self._all_data_files():
                with on_disk(path) as file:
                    table = _ParquetFile(file)
                    self._episode_ranges[path] = table.episode_ranges
                    table.close()
        return [
            file for file, ranges in self._episode_ranges.items() if any(low <= index <= high for low, high in ranges)
        ]

    def _all_data_files(self) -> list[DataPath]:
        """Return all files below data; where they cannot be listed, those that meta names."""
        if isinstance(self.root, RemotePath) and not self.root.dataset.can_list:
            return existing_files({self._data_file(row) for row in self.episodes})
        return sorted((self.root / "data").rglob("*.parquet"))

    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored, its steps in the order of their counters."""
        row = self.episodes[index]
        episode_id, source = str(row["episode_index"]), self._data_file(row)
        where = f"{source}, episode {episode_id}"
        names = self.fields.numeric_columns() if self.fields.standardize is None else set(self.column_kinds)
        numeric = sorted(name for name in names if self.column_kinds[name] == NUMERIC)
        text = self.fields.instruction if self.fields.instruction not in (None, "task") else None
        videos = {camera: self._video_file(row, camera) for camera in self.fields.cameras if camera in self.videos}
        if missing_video := next((file for file in videos.values() if not file.is_file()), None):
            raise DatasetError(f"{where}: its video {missing_video} is missing.")
        required = [self.stored_names[name] for name in (*numeric, *([text] if text else []))]
        required += ["timestamp"] if videos else []
        required += ["task_index"] if not text and not self.fields.instruction_text else []
        alternatives = (
            [self.stored_names[name] for name in alternative_instruction_columns(text, self.column_kinds)]
            if text
            else []
        )
        pyarrow = require("pyarrow", "Reading LeRobot datasets")
        try:
            source, table = self._read_rows(row, list(dict.fromkeys([*required, *_COUNTERS, *alternatives])))
            if missing := sorted(set(required) - set(table.column_names)):
                raise OpenVLAValueError(f"the columns {missing} are missing")
            order = step_order(
                {name: _to_array(table[name]) for name in _COUNTERS if name in table.column_names},
                distinct=("timestamp",) if videos else (),
            )
            table = table if order is None else table.take(order)
            columns = {name: _to_array(table[self.stored_names[name]]) for name in numeric}
            instructions = self._step_texts(table, text, alternatives, row.get("tasks"))
        except RemoteError:
            raise
        except (ValueError, OSError, KeyError, pyarrow.ArrowException) as error:
            raise DatasetError(f"{where}: {error}.") from error
        load_image = self._stored_image_loader(row, source, videos, table, order)
        return RawEpisode(episode_id, str(source), columns, instructions, load_image)

    def _stored_image_loader(
        self,
        row: Mapping[str, Any],
        source: DataPath,
        videos: Mapping[str, DataPath],
        table: Any,
        order: np.ndarray | None,
    ) -> Any:
        """Return ``RawEpisode.load_image`` of an episode."""
        times = table["timestamp"].to_numpy() if videos else None
        starts = {
            camera: row[f"videos/{self.stored_names[camera]}/from_timestamp"] if self.v3 else 0.0 for camera in videos
        }
        cells: dict[str, Any] = {}  # encoded images, in memory as long as the episode

        def load_image(camera: str, step: int) -> np.ndarray:
            if times is not None and camera in videos:
                try:
                    with self.open_videos.use(videos[camera]) as video:
                        return video.frame(float(starts[camera]) + float(times[step]))
                except OpenVLAValueError as error:
                    if note := self._video_rate_note(camera):
                        raise OpenVLAValueError(f"{error}{note}") from error
                    raise
            if camera not in cells:
                stored_name = self.stored_names[camera]
                cells[camera] = self._read_table(source, row["episode_index"], [stored_name])[stored_name]
            return self._decode_cell(cells[camera][step if order is None else int(order[step])])

        return load_image

    def _video_rate_note(self, camera: str) -> str:
        """Return, for error messages, that a camera's video has another frame rate than the dataset; else nothing."""
        feature = self.info["features"][self.stored_names[camera]]
        rate = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}.get("video.fps")
        if rate in (None, self.frame_rate):
            return ""
        return (
            f". info.json says that {camera} has {rate} frames a second and the dataset {self.frame_rate} steps; only "
            "frames at the steps' times are read, as LeRobot does. Leave the camera out of the field cameras, or "
            "encode its video again at the dataset's rate"
        )

    def _step_texts(self, table: Any, column: str | None, alternatives: list[str], meta_tasks: Any) -> list[Any] | str:
        """Return the instruction of every step: from a text column, if empty from its alternatives, else the task's."""
        if self.fields.instruction_text:
            return ""
        if column is None or column in self.modality.annotations:
            name = "task_index" if column is None else self.stored_names[column]
            indices = table[name].to_pylist()
            if unknown := [
                index for index in indices if not isinstance(index, (int, float)) or index not in self.tasks
            ]:
                raise OpenVLAValueError(f"{name} {unknown[0]} is not in meta/tasks; copy the dataset again")
            instructions = [self.tasks[index] for index in indices]
            if column is None:
                self._warn_of_other_tasks(instructions, meta_tasks)
            return instructions
        texts = _to_texts(table[self.stored_names[column]])
        for alternative in alternatives:
            other_texts = _to_texts(table[alternative])
            texts = [other if is_empty_instruction(text) else text for text, other in zip(texts, other_texts)]
        return texts

    def _warn_of_other_tasks(self, instructions: list[Any], meta_tasks: Any) -> None:
        """Warn once if meta/episodes gives an episode other instructions of the same table than task_index.

        Texts that are not in the table were renamed there and show nothing.
        """
        texts = meta_tasks if isinstance(meta_tasks, (list, tuple)) else [meta_tasks]
        expected = {text for text in texts if isinstance(text, str)}
        others = sorted(set(map(str, instructions)) - expected)
        known = {text for text in self.tasks.values() if isinstance(text, str)}
        if expected and expected <= known and others and not self._has_warned_of_tasks:
            self._has_warned_of_tasks = True
            warnings.warn(
                f"{self.root}: task_index gives an episode the instruction {others[0]!r}, but meta/episodes "
                f"{sorted(expected)}; merging datasets can mix up instructions. task_index is used: check a few "
                "episodes, and set the field instruction_text if it is wrong.",
                stacklevel=6,
            )

    def _decode_cell(self, cell: Any) -> np.ndarray:
        """Return an image that is stored in a table, or in the file that the table names (possible in v2.1)."""
        stored = cell.as_py()
        if stored["bytes"] is not None:
            return decode_image(stored["bytes"])
        return decode_image((self.root / stored["path"]).read_bytes())


def _feature_kind(feature: Mapping[str, Any]) -> str:
    if feature["dtype"] in _IMAGE_DTYPES:
        return DEPTH if _is_depth(feature) else IMAGE
    return TEXT if feature["dtype"] == "string" else NUMERIC


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Return whether info.json declares an image column as depth."""
    for key, value in feature.items():
        name = str(key).rpartition(".")[2]
        if isinstance(value, Mapping):
            if _is_depth(value):
                return True
        elif name == "is_depth_map" and str(value).lower() not in _FALSE:
            return True
        if name == "pix_fmt" and _DEPTH_PIXEL_FORMAT.match(str(value)):
            return True
    return False


def _has_single_channel(feature: Mapping[str, Any]) -> bool:
    """Return whether an image column has one channel."""
    shape, names = list(feature.get("shape") or ()), list(feature.get("names") or ())
    channels = [size for size, name in zip(shape, names) if str(name).startswith("channel")]
    return len(shape) == 3 and 1 in (channels or (shape[0], shape[-1]))


def _suggest_fields(column_kinds: Mapping[str, str], single_channel: frozenset[str]) -> ColumnSpec | None:
    """Return the fields of the usual column names; None without cameras or an action."""
    cameras = tuple(
        name
        for name, kind in column_kinds.items()
        if kind == IMAGE and name not in single_channel and not is_non_camera_name(name)
    )
    if not cameras or column_kinds.get("action") != NUMERIC:
        return None
    proprio = ("observation.state",) if column_kinds.get("observation.state") == NUMERIC else ()
    return ColumnSpec(cameras, ("action",), proprio, instruction="task")


def _indices_in_range(root: DataPath, name: str, text: Any, rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the indices of the episodes in a range such as "0:80"."""
    match = _RANGE.match(text) if isinstance(text, str) else None
    if match is None:
        raise OpenVLAValueError(
            f"{root}: the split {name!r} of info.json must be a range such as '0:80', got {text!r}."
        )
    start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
    indices = (row["episode_index"] for row in rows)
    return {index for index in indices if start <= index and (stop is None or index < stop)}


def _to_texts(column: Any) -> list[str]:
    return [as_text(text) for text in column.to_pylist()]


def _to_array(column: Any) -> np.ndarray:
    """Return a column of numbers, or of lists of one length, as ``(length, ...)`` in its own dtype."""
    values = column.combine_chunks()
    if str(values.type).startswith(("list", "fixed_size_list", "large_list")):
        if values.null_count:  # flatten would leave them out
            raise OpenVLAValueError(
                f"{values.null_count} of {len(values)} rows are null, but each must be {column.type}"
            )
        flat = values.flatten()
        if len(values) and len(flat) % len(values):
            raise OpenVLAValueError(f"rows of different lengths in {column.type}")
        sizes = set(values.value_lengths().to_pylist()) if hasattr(values, "value_lengths") else set()
        if len(sizes) > 1:
            raise OpenVLAValueError(f"rows of different lengths: {sorted(sizes)}")
        return flat.to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return values.to_numpy(zero_copy_only=False)


def _find_tables(folder: DataPath) -> Iterator[DataPath]:
    """Yield the tables below meta/episodes (v3), sorted.

    Where they cannot be listed, LeRobot's names are tried, with growing numbers until there is none. A server that
    answers every name is noticed when the first false table is read.
    """
    if not isinstance(folder, RemotePath) or folder.dataset.can_list:
        tables: list[DataPath] = sorted(folder.rglob("*.parquet"))
        yield from tables
        return
    chunk = number = 0
    while (file := folder / f"chunk-{chunk:03d}/file-{number:03d}.parquet").is_file() or number:
        if file.is_file():
            yield file
            number += 1
        else:
            chunk, number = chunk + 1, 0


def _read_parquet(path: DataPath) -> Any:
    if not path.is_file():
        raise OpenVLAValueError(f"{path} is missing; the dataset is incomplete.")
    pyarrow = require("pyarrow", "Reading LeRobot datasets")
    try:
        with on_disk(path) as file:
            return _ParquetFile(file).file.read()
    except RemoteError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as parquet: {error}.") from error
