"""LeRobot datasets, v2.1 and v3: parquet tables through pyarrow, videos through PyAV, images as parquet bytes too."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .columns import (
    Fields,
    alternative_texts,
    as_text,
    dotted,
    is_no_camera_name,
    says_nothing,
    step_order,
)
from .episodes import (
    DEPTH,
    IMAGE,
    NUMBERS,
    TEXT,
    DemonstrationError,
    EpisodeReader,
    Stored,
    decoded_image,
    require,
)
from .lerobot_meta import PLACE, checked_info, json_lines, require_numbers, require_paths
from .open_files import Handles
from .presets import (
    ABSOLUTE,
    AUTO,
    HDF5_PRESETS,
    PRESETS,
    SIGNED,
    WITHOUT_PRESET,
    merged_fields,
    require_raw_gripper,
    stored_gripper,
)
from .video import Video

_IMAGE_DTYPES = ("video", "image")
# What counts an episode's rows, in the order of trust.
_COUNTERS = ("frame_index", "index", "timestamp")
# Columns of the tasks' table that hold the text; the second is the name of a data frame's index.
_TASK_TEXTS = ("task", "__index_level_0__")
_RANGE = re.compile(r"^\s*(\d*)\s*:\s*(\d*)\s*$")
# Pixels of more than 8 bits: depth.
_DEPTH_PIXELS = re.compile(r"^gray(9|1\d)")
# How JSON, and writers of text, say that something is not so.
_FALSE = ("false", "none", "0", "no", "")


class _Table:
    """An open parquet file."""

    def __init__(self, path: Path) -> None:
        parquet = require("pyarrow.parquet", "Reading LeRobot datasets")
        pyarrow = require("pyarrow", "Reading LeRobot datasets")
        try:
            self.file = parquet.ParquetFile(path)
            schema = self.file.schema_arrow
        except (pyarrow.ArrowException, OSError) as error:
            raise DemonstrationError(f"{path} cannot be read as parquet: {error}.") from error
        self.names = set(schema.names)
        if "episode_index" in self.names and not str(schema.field("episode_index").type).startswith(("int", "uint")):
            raise DemonstrationError(
                f"{path}: episode_index must be a column of whole numbers, got {schema.field('episode_index').type}."
            )
        self.bounds = _episode_bounds(self.file.metadata)

    def close(self) -> None:
        self.file.close()

    def episode(self, index: int, columns: list[str]) -> Any:
        """The rows of an episode as they are stored, of those row groups that hold them; columns that are there."""
        groups = [group for group, (low, high) in enumerate(self.bounds) if low <= index <= high]
        held = [name for name in columns if name in self.names]
        table = self.file.read_row_groups(groups, columns=["episode_index", *held])
        return table.take(np.flatnonzero(table["episode_index"].to_numpy() == index))


def _episode_bounds(metadata: Any) -> list[tuple[float, float]]:
    """Lowest and highest episode_index of every row group, as far as the file says."""
    if not metadata.num_row_groups:
        return []
    names = [metadata.row_group(0).column(leaf).path_in_schema for leaf in range(metadata.row_group(0).num_columns)]
    if "episode_index" not in names:
        return [(-np.inf, np.inf)] * metadata.num_row_groups
    leaf = names.index("episode_index")
    statistics = [metadata.row_group(group).column(leaf).statistics for group in range(metadata.num_row_groups)]
    return [(s.min, s.max) if s is not None and s.has_min_max else (-np.inf, np.inf) for s in statistics]


class LeRobotReader(EpisodeReader):
    """Episodes of a LeRobot dataset on disk.

    Presets are of RLDS and do not belong here; a dataset that bears the name of one is read as it is stored, with a
    warning. Only a gripper that goes below 0 shows that LIBERO's actions are stored as the simulator takes them: then
    the preset of the name is taken.

    Args:
        root: The folder with meta/info.json.
        preset: As in ``open_demonstrations``.
        fields: Fields to replace; by default all colour cameras in the order of info.json, ``action``,
            ``observation.state``.
        name: Of the dataset; by default the folder's name.
        split: A key of info.json's ``splits``, or "all".

    Raises:
        ValueError: Another version of the format, no such split, or damaged meta files.
        KeyError: A field is not there.
        ImportError: pyarrow is not installed.
    """

    format = "lerobot"

    def __init__(
        self,
        root: Path,
        preset: str | None,
        fields: Mapping[str, Any] | None,
        name: str | None,
        split: str = "train",
    ) -> None:
        self.info = checked_info(root)
        self.root, self.v3, self.split = root, self.info["codebase_version"] == "v3.0", split
        features = self.info["features"]
        # Names as they are stored, by the names with dots.
        self.stored = {dotted(feature): feature for feature in features}
        if len(self.stored) < len(features):
            raise OpenVLAValueError(
                f"{root} must name features that differ in more than dots and slashes, got {[*features]}."
            )
        self.videos = {dotted(feature) for feature in features if features[feature]["dtype"] == "video"}
        names = {public: _kind(features[feature]) for public, feature in self.stored.items()}
        names["task"] = TEXT
        self.doubtful_cameras = frozenset(
            public for public, feature in self.stored.items() if names[public] == IMAGE and _grey(features[feature])
        )
        require_paths(root, self.info, self.v3, bool(self.videos))
        self.episodes = self._of_split(self._read_episodes())
        fps = self.info.get("fps")
        self.frame_rate = float(fps) if isinstance(fps, (int, float)) and fps > 0 else None
        self.handles = Handles(_Table)
        self.open_videos = Handles(Video)
        self._tasks_differ = False
        self._holders: dict[Path, list[tuple[float, float]]] = {}
        self.preset = None if preset == AUTO else preset
        suggested = _suggested(names, self.doubtful_cameras)
        super().__init__(root, name or root.name, names, merged_fields(suggested, self.preset, fields, root))
        if self.v3 and (filmed := [f"videos/{self.stored[one]}" for one in self.fields.cameras if one in self.videos]):
            require_numbers(root, self.episodes, [f"{one}/{part}" for one in filmed for part in PLACE])
            require_numbers(root, self.episodes, [f"{one}/from_timestamp" for one in filmed], (int, float))
        by_task = self.fields.instruction in (None, "task") and not self.fields.instruction_text
        self.tasks = self._read_tasks() if by_task else {}
        if preset == AUTO:
            self._look_at_gripper(fields, name, root.name)
        else:
            require_raw_gripper(self, fields)

    def _look_at_gripper(self, given: Mapping[str, Any] | None, *names: str | None) -> None:
        """Take the preset of the dataset's name if the gripper shows that it fits; else say that it is not taken."""
        known = next((name for name in names if name in (PRESETS.keys() | WITHOUT_PRESET) - {*HDF5_PRESETS}), None)
        if known is None or {"gripper", "standardize"} & set(given or {}):
            return
        convention, preset = stored_gripper(self), PRESETS.get(known)
        if preset is not None and preset.gripper == "clipped_inverted":
            if convention == SIGNED:
                self.preset, self.preset_reason = known, "by the dataset's name, and its gripper goes below 0"
                whole = preset.changed(given or {})
                mask = self.fields.action_mask or preset.action_mask
                own = dataclasses.replace(self.fields, gripper=preset.gripper, action_mask=mask)
                self.fields = own if self._absent(whole) else whole
                return
            if convention == ABSOLUTE:
                return
        warnings.warn(
            f"{self.root}: {known!r} is the name of an RLDS dataset, whose columns this LeRobot dataset need not have: "
            "it is read as it is stored, the gripper as 0 closed, 1 open. Look at it with openvla inspect-data; where "
            "that is wrong, give fields.",
            stacklevel=4,
        )

    def _read_tasks(self) -> dict[int, str]:
        meta = self.root / "meta"
        if not self.v3:
            rows = json_lines(meta / "tasks.jsonl")
            require_numbers(self.root, rows, ["task_index"])
            return {row["task_index"]: row.get("task") for row in rows}
        table = _read_parquet(meta / "tasks.parquet")
        texts = [
            name
            for name in table.column_names
            if name != "task_index" and re.search("string|binary", str(table[name].type))
        ]
        text = next((name for name in _TASK_TEXTS if name in texts), texts[0] if len(texts) == 1 else None)
        if text is None:
            raise OpenVLAValueError(
                f"{meta / 'tasks.parquet'} must hold the task's text in a column named one of {_TASK_TEXTS}; its text "
                f"columns are {texts}. Or give the field instruction or instruction_text."
            )
        rows = table.select([name for name in ("task_index", text) if name in table.column_names]).to_pylist()
        require_numbers(self.root, rows, ["task_index"])
        return {row["task_index"]: row[text] for row in rows}

    def _of_split(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the episodes of the split, as info.json says it: "0:80" is the episodes 0 to 79.

        Raises:
            ValueError: There is no such split, or its range cannot be read.
        """
        splits = self.info.get("splits") or {"train": ":"}
        if self.split == "all":
            return rows
        if self.split not in splits:
            raise OpenVLAValueError(f"{self.root} has no split {self.split!r}; take one of {[*splits, 'all']}.")
        kept = {name: _in_range(self.root, name, text, rows) for name, text in splits.items()}
        if outside := len(rows) - len(set().union(*kept.values())):
            warnings.warn(
                f"{self.root}: {outside} of {len(rows)} episodes lie in no split of info.json ({splits}) and are left "
                "out; split 'all' takes every one.",
                stacklevel=4,
            )
        return [row for row in rows if row["episode_index"] in kept[self.split]]

    def digest(self) -> str:
        """Hex digest of what the tables depend on, the split among it."""
        return hashlib.sha256(f"{super().digest()} {self.split}".encode()).hexdigest()

    def _read_episodes(self) -> list[dict[str, Any]]:
        meta = self.root / "meta"
        if not self.v3:
            rows = json_lines(meta / "episodes.jsonl")
        else:
            files = sorted((meta / "episodes").rglob("*.parquet"))
            rows = []
            for file in files:
                table = _read_parquet(file)
                # Statistics of every episode are there too, and large.
                rows += table.select([n for n in table.column_names if not n.startswith("stats/")]).to_pylist()
        total = self.info.get("total_episodes")
        if total is not None and total != len(rows):
            warnings.warn(
                f"{self.root}: info.json says {total} episodes, but {meta}/episodes names {len(rows)}; if it is not "
                "whole, copy the dataset again.",
                stacklevel=4,
            )
        require_numbers(self.root, rows, ["episode_index", "length", *([f"data/{part}" for part in PLACE] * self.v3)])
        counts = Counter(row["episode_index"] for row in rows)
        if twice := sorted(number for number, count in counts.items() if count > 1):
            raise OpenVLAValueError(f"{meta} must name every episode once; these are there twice: {twice[:5]}.")
        return sorted(rows, key=lambda row: row["episode_index"])

    @property
    def files(self) -> list[Path]:
        """Tables and videos that the episodes name."""
        meta = self.root / "meta"
        found = {meta / "info.json", *meta.glob("episodes.jsonl"), *meta.glob("episodes/**/*.parquet")}
        for row in self.episodes:
            found.add(self._data_file(row))
            found |= {self._video_file(row, camera) for camera in self.fields.cameras if camera in self.videos}
        return sorted(file for file in found if file.is_file())

    def _data_file(self, row: Mapping[str, Any]) -> Path:
        if self.v3:
            numbers = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        else:
            numbers = self._place(row)
        return self.root / self.info["data_path"].format(**numbers)

    def _place(self, row: Mapping[str, Any]) -> dict[str, int]:
        index = row["episode_index"]
        return {"episode_index": index, "episode_chunk": index // self.info.get("chunks_size", 1000)}

    def _video_file(self, row: Mapping[str, Any], camera: str) -> Path:
        if self.v3:
            numbers = {part: row[f"videos/{self.stored[camera]}/{part}"] for part in ("chunk_index", "file_index")}
        else:
            numbers = self._place(row)
        return self.root / self.info["video_path"].format(video_key=self.stored[camera], **numbers)

    def __len__(self) -> int:
        return len(self.episodes)

    def _stored_length(self, index: int) -> int:
        return self.episodes[index]["length"]

    def _rows(self, row: Mapping[str, Any], columns: list[str]) -> tuple[Path, Any]:
        """Return the file that holds an episode and its rows; where the named file has none, it is looked for.

        Raises:
            ValueError: The named file holds some rows only, or it holds none and not exactly one other file all.
        """
        index, length, named = row["episode_index"], row["length"], self._data_file(row)
        got = 0
        if not length:
            raise OpenVLAValueError("it has no step")
        if named.is_file():
            table = self.handles[named].episode(index, columns)
            if len(table) == length:
                return named, table
            got = len(table)
        if got:
            raise OpenVLAValueError(f"the table has {got} rows, meta/episodes says {length}")
        tables = {file: self.handles[file].episode(index, columns) for file in self._others(index)}
        whole = [file for file, table in tables.items() if len(table) == length]
        if len(whole) != 1:
            raise OpenVLAValueError(
                f"{named} holds no row of it, and {len(whole)} other files all {length}, where it must be one; copy "
                "the dataset again"
            )
        return whole[0], tables[whole[0]]

    def _others(self, index: int) -> list[Path]:
        """Return the data files that may hold an episode."""
        if not self._holders:
            for file in sorted((self.root / "data").rglob("*.parquet")):
                table = _Table(file)
                self._holders[file] = table.bounds
                table.close()
        return [file for file, bounds in self._holders.items() if any(low <= index <= high for low, high in bounds)]

    def _read(self, index: int) -> Stored:
        row = self.episodes[index]
        identity, source = str(row["episode_index"]), self._data_file(row)
        where = f"{source}, episode {identity}"
        names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        numbers = sorted(name for name in names if self.names[name] == NUMBERS)
        texts = self.fields.instruction if self.fields.instruction not in (None, "task") else None
        needed = [self.stored[name] for name in (*numbers, *([texts] if texts else []))]
        files = {camera: self._video_file(row, camera) for camera in self.fields.cameras if camera in self.videos}
        if absent := next((file for file in files.values() if not file.is_file()), None):
            raise DemonstrationError(f"{where}: its video {absent} is missing.")
        needed += ["timestamp"] if files else []
        needed += ["task_index"] if not texts and not self.fields.instruction_text else []
        others = [self.stored[name] for name in alternative_texts(texts, self.names)] if texts else []
        try:
            source, table = self._rows(row, list(dict.fromkeys([*needed, *_COUNTERS, *others])))
            if missing := sorted(set(needed) - set(table.column_names)):
                raise OpenVLAValueError(f"{missing} missing")
            order = step_order(
                {name: _numbers(table[name]) for name in _COUNTERS if name in table.column_names},
                distinct=("timestamp",) if files else (),
            )
            table = table if order is None else table.take(order)
            columns = {name: _numbers(table[self.stored[name]]) for name in numbers}
            said = self._said(table, texts, others, row.get("tasks"))
        except (ValueError, OSError, KeyError, NotImplementedError) as error:  # pyarrow's errors are among these
            raise DemonstrationError(f"{where}: {error}.") from error
        times = table["timestamp"].to_numpy() if files else None
        starts = {camera: row[f"videos/{self.stored[camera]}/from_timestamp"] if self.v3 else 0.0 for camera in files}
        cells: dict[str, Any] = {}  # encoded images, as long as someone holds the episode

        def image(camera: str, step: int) -> np.ndarray:
            if camera in files:
                return self.open_videos[files[camera]].frame(float(starts[camera]) + float(times[step]))
            if camera not in cells:
                stored = self.stored[camera]
                cells[camera] = self.handles[source].episode(row["episode_index"], [stored])[stored]
            return self._decoded(cells[camera][step if order is None else int(order[step])])

        return Stored(identity, str(source), columns, said, image)

    def _said(self, table: Any, column: str | None, others: list[str], own: Any) -> list[str] | str:
        """Return the instruction of every step: of a text column (where empty, of further ones), else the task's."""
        if self.fields.instruction_text:
            return ""
        if column is None:
            tasks = table["task_index"].to_pylist()
            if unknown := [task for task in tasks if not isinstance(task, (int, float)) or task not in self.tasks]:
                raise OpenVLAValueError(f"task_index {unknown[0]} is not in meta/tasks; copy the dataset again")
            said = [self.tasks[task] for task in tasks]
            self._compare_tasks(said, own)
            return said
        said = _texts(table[self.stored[column]])
        for other in others:
            said = [further if says_nothing(text) else text for text, further in zip(said, _texts(table[other]))]
        return said

    def _compare_tasks(self, said: list[str], own: Any) -> None:
        """Warn once where meta/episodes gives an episode other instructions of the same table.

        Texts that are not in the table were renamed there, and say nothing.
        """
        own = {text for text in (own if isinstance(own, (list, tuple)) else [own]) if isinstance(text, str)}
        other = sorted(set(map(str, said)) - own)
        known = {text for text in self.tasks.values() if isinstance(text, str)}
        if own and own <= known and other and not self._tasks_differ:
            self._tasks_differ = True
            warnings.warn(
                f"{self.root}: task_index gives an episode the instruction {other[0]!r}, but meta/episodes "
                f"{sorted(own)}; merging datasets can mix instructions up. task_index is taken: look at a few "
                "episodes, and give the field instruction_text where it is wrong.",
                stacklevel=6,
            )

    def _decoded(self, cell: Any) -> np.ndarray:
        """An image in a table, or in the file that it names (v2.1 may leave them beside)."""
        stored = cell.as_py()
        if stored["bytes"] is not None:
            return decoded_image(stored["bytes"])
        return decoded_image((self.root / stored["path"]).read_bytes())


def _kind(feature: Mapping[str, Any]) -> str:
    if feature["dtype"] in _IMAGE_DTYPES:
        return DEPTH if _is_depth(feature) else IMAGE
    return TEXT if feature["dtype"] == "string" else NUMBERS


def _is_depth(feature: Mapping[str, Any]) -> bool:
    """Return whether info.json says that an image column holds depth."""
    for key, value in feature.items():
        name = str(key).rpartition(".")[2]
        if isinstance(value, Mapping):
            if _is_depth(value):
                return True
        elif name == "is_depth_map" and str(value).lower() not in _FALSE:
            return True
        if name == "pix_fmt" and _DEPTH_PIXELS.match(str(value)):
            return True
    return False


def _grey(feature: Mapping[str, Any]) -> bool:
    """Return whether an image column has one channel."""
    shape, names = list(feature.get("shape") or ()), list(feature.get("names") or ())
    channels = [size for size, name in zip(shape, names) if str(name).startswith("channel")]
    return len(shape) == 3 and 1 in (channels or (shape[0], shape[-1]))


def _suggested(names: Mapping[str, str], grey: frozenset[str]) -> Fields | None:
    cameras = tuple(
        name for name, kind in names.items() if kind == IMAGE and name not in grey and not is_no_camera_name(name)
    )
    if not cameras or names.get("action") != NUMBERS:
        return None
    proprio = ("observation.state",) if names.get("observation.state") == NUMBERS else ()
    return Fields(cameras, ("action",), proprio, instruction="task")


def _in_range(root: Path, name: str, text: Any, rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the numbers of the episodes of a range such as "0:80"."""
    match = _RANGE.match(text) if isinstance(text, str) else None
    if match is None:
        raise OpenVLAValueError(
            f"{root}: the split {name!r} of info.json must be a range such as '0:80', got {text!r}."
        )
    start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
    numbers = (row["episode_index"] for row in rows)
    return {number for number in numbers if start <= number and (stop is None or number < stop)}


def _texts(column: Any) -> list[str]:
    return [as_text(text) for text in column.to_pylist()]


def _numbers(column: Any) -> np.ndarray:
    """A column of numbers, or of lists of one length, as ``(length, ...)`` in its own dtype."""
    values = column.combine_chunks()
    if str(values.type).startswith(("list", "fixed_size_list", "large_list")):
        if values.null_count:  # which flatten would leave out
            raise OpenVLAValueError(
                f"{values.null_count} of {len(values)} rows are null, where each must be {column.type}"
            )
        flat = values.flatten()
        if len(values) and len(flat) % len(values):
            raise OpenVLAValueError(f"rows of different lengths in {column.type}")
        sizes = set(values.value_lengths().to_pylist()) if hasattr(values, "value_lengths") else set()
        if len(sizes) > 1:
            raise OpenVLAValueError(f"rows of different lengths: {sorted(sizes)}")
        return flat.to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return values.to_numpy(zero_copy_only=False)


def _read_parquet(path: Path) -> Any:
    if not path.is_file():
        raise OpenVLAValueError(f"{path} is missing; the dataset is incomplete.")
    pyarrow = require("pyarrow", "Reading LeRobot datasets")
    try:
        return _Table(path).file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DemonstrationError(f"{path} cannot be read as parquet: {error}.") from error
