"""LeRobot datasets, v2.1 and v3: parquet tables through pyarrow, videos through PyAV, images as parquet bytes too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .demonstration_fields import Fields
from .demonstrations import (
    IMAGE,
    NUMBERS,
    TEXT,
    DemonstrationError,
    EpisodeReader,
    Stored,
    decoded_image,
    known_preset,
    merged_fields,
    read_json,
    require,
)
from .open_files import Handles
from .video_frames import Video

_VERSIONS = ("v2.0", "v2.1", "v3.0")
_IMAGE_DTYPES = ("video", "image")


class _Table:
    """An open parquet file."""

    def __init__(self, path: Path) -> None:
        parquet = require("pyarrow.parquet", "Reading LeRobot datasets")
        pyarrow = require("pyarrow", "Reading LeRobot datasets")
        try:
            self.file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DemonstrationError(f"{path} cannot be read as parquet: {error}.") from error
        self.bounds = _episode_bounds(self.file.metadata)

    def close(self) -> None:
        self.file.close()

    def episode(self, index: int, columns: list[str]) -> Any:
        """The rows of an episode, of those row groups that hold them."""
        groups = [group for group, (low, high) in enumerate(self.bounds) if low <= index <= high]
        table = self.file.read_row_groups(groups, columns=["episode_index", *columns])
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

    Args:
        root: The folder with meta/info.json.
        preset: As in ``open_demonstrations``.
        fields: Fields to replace; by default all cameras in the order of info.json, ``action``, ``observation.state``.
        name: Of the dataset; by default the folder's name.

    Raises:
        ValueError: Another version of the format, or damaged meta files.
        KeyError: A field is not there.
        ImportError: pyarrow is not installed.
    """

    format = "lerobot"

    def __init__(self, root: Path, preset: str | None, fields: Mapping[str, Any] | None, name: str | None) -> None:
        self.info = read_json(root / "meta" / "info.json")
        version = self.info.get("codebase_version")
        if version not in _VERSIONS:
            raise ValueError(f"{root} is LeRobot {version}; readable are {_VERSIONS}. Convert it with LeRobot's tools.")
        self.root, self.v3 = root, version == "v3.0"
        features = self.info["features"]
        self.videos = {name for name, feature in features.items() if feature["dtype"] == "video"}
        names = {name: _kind(feature) for name, feature in features.items()}
        names["task"] = TEXT
        self.tasks = self._read_tasks()
        self.episodes = self._read_episodes()
        self.handles = Handles(_Table)
        self.open_videos = Handles(Video)
        preset = known_preset(preset, name, root.name)
        super().__init__(root, name or root.name, names, merged_fields(_suggested(features), preset, fields, root))

    def _read_tasks(self) -> dict[int, str]:
        meta = self.root / "meta"
        if not self.v3:
            return {row["task_index"]: row["task"] for row in _json_lines(meta / "tasks.jsonl")}
        table = _read_parquet(meta / "tasks.parquet")
        texts = next(name for name in table.column_names if name != "task_index")  # the index of a data frame
        return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist()))

    def _read_episodes(self) -> list[dict[str, Any]]:
        meta = self.root / "meta"
        if not self.v3:
            rows = _json_lines(meta / "episodes.jsonl")
        else:
            files = sorted((meta / "episodes").rglob("*.parquet"))
            rows = []
            for file in files:
                table = _read_parquet(file)
                # Statistics of every episode are there too, and large.
                rows += table.select([n for n in table.column_names if not n.startswith("stats/")]).to_pylist()
        return sorted(rows, key=lambda row: row["episode_index"])

    @property
    def files(self) -> list[Path]:
        """Tables and videos that the episodes name."""
        found = {self.root / "meta" / "info.json"}
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
            numbers = {part: row[f"videos/{camera}/{part}"] for part in ("chunk_index", "file_index")}
        else:
            numbers = self._place(row)
        return self.root / self.info["video_path"].format(video_key=camera, **numbers)

    def __len__(self) -> int:
        return len(self.episodes)

    def _stored_length(self, index: int) -> int:
        return self.episodes[index]["length"]

    def _read(self, index: int) -> Stored:
        row = self.episodes[index]
        identity, source = str(row["episode_index"]), self._data_file(row)
        where = f"{source}, episode {identity}"
        names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        numbers = sorted(name for name in names if self.names[name] == NUMBERS)
        texts = [self.fields.instruction] if self.fields.instruction not in (None, "task") else []
        files = {camera: self._video_file(row, camera) for camera in self.fields.cameras if camera in self.videos}
        if absent := next((file for file in files.values() if not file.is_file()), None):
            raise DemonstrationError(f"{where}: its video {absent} is missing.")
        wanted = list(dict.fromkeys([*numbers, *texts, "timestamp", "task_index"]))
        try:
            table = self.handles[source].episode(row["episode_index"], wanted)
            columns = {name: _numbers(table[name]) for name in numbers}
        except (ValueError, OSError, KeyError) as error:  # pyarrow's errors are among these
            raise DemonstrationError(f"{where}: {error}") from error
        if len(table) != row["length"]:
            raise DemonstrationError(f"{where}: the table has {len(table)} rows, meta/episodes says {row['length']}.")
        if texts:
            said = table[texts[0]].to_pylist()
        else:
            said = [self.tasks.get(task, "") for task in table["task_index"].to_pylist()]
        times = table["timestamp"].to_numpy()
        starts = {camera: row[f"videos/{camera}/from_timestamp"] if self.v3 else 0.0 for camera in files}
        cells: dict[str, Any] = {}  # encoded images, as long as someone holds the episode

        def image(camera: str, step: int) -> np.ndarray:
            if camera in files:
                return self.open_videos[files[camera]].frame(float(starts[camera]) + float(times[step]))
            if camera not in cells:
                cells[camera] = self.handles[source].episode(row["episode_index"], [camera])[camera]
            return self._decoded(cells[camera][step])

        return Stored(identity, str(source), columns, said, image)

    def _decoded(self, cell: Any) -> np.ndarray:
        """An image in a table, or in the file that it names (v2.1 may leave them beside)."""
        stored = cell.as_py()
        if stored["bytes"] is not None:
            return decoded_image(stored["bytes"])
        return decoded_image((self.root / stored["path"]).read_bytes())


def _kind(feature: Mapping[str, Any]) -> str:
    if feature["dtype"] in _IMAGE_DTYPES:
        return IMAGE
    return TEXT if feature["dtype"] == "string" else NUMBERS


def _suggested(features: Mapping[str, Any]) -> Fields | None:
    cameras = tuple(name for name, feature in features.items() if feature["dtype"] in _IMAGE_DTYPES)
    if not cameras or "action" not in features:
        return None
    proprio = ("observation.state",) if "observation.state" in features else ()
    return Fields(cameras, ("action",), proprio, instruction="task")


def _numbers(column: Any) -> np.ndarray:
    """A column of numbers, or of lists of one length, as ``(length, ...)`` in its own dtype."""
    values = column.combine_chunks()
    if str(values.type).startswith(("list", "fixed_size_list", "large_list")):
        flat = values.flatten()
        if len(values) and len(flat) % len(values):
            raise ValueError(f"rows of different lengths in {column.type}")
        sizes = set(values.value_lengths().to_pylist()) if hasattr(values, "value_lengths") else set()
        if len(sizes) > 1:
            raise ValueError(f"rows of different lengths: {sorted(sizes)}")
        return flat.to_numpy(zero_copy_only=False).reshape(len(values), -1)
    return values.to_numpy(zero_copy_only=False)


def _read_parquet(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the dataset is incomplete.")
    return _Table(path).file.read()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; the dataset is incomplete.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
