"""Write a LeRobot v3 dataset episode by episode, or append to one: tables and images as parquet through pyarrow.

Every episode is one data file, written atomically; the folder is a complete dataset after each episode. LeRobot's
training also needs statistics, which ``write_statistics`` adds after the last one.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAValueError
from .lerobot_statistics import image_statistics, level_counts, number_statistics, sampled_steps
from .utils import read_json, require

VERSION = "v3.0"
_CHUNK_SIZE = 1000  # files per folder, as in LeRobot
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES = "meta/episodes/chunk-000/file-000.parquet"
_STATISTICS = "meta/stats.json"
_INDICES = ("frame_index", "episode_index", "index", "task_index")


class LeRobotWriter:
    """Writer of a LeRobot v3 dataset.

    Args:
        root: The dataset's folder; episodes are appended to a dataset with the same features.
        fps: Steps per second.
        numbers: Names of the dimensions of every column of numbers.
        cameras: Height and width of every image column.
        texts: Text columns, in addition to the task, which the format stores separately.
        robot_type: LeRobot's name of the robot.
        number_dtype: dtype of the columns of numbers, "float32" or "float64".

    Raises:
        ValueError: The folder holds a dataset with other features.
        ImportError: pyarrow is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        fps: int,
        numbers: Mapping[str, Sequence[str]],
        cameras: Mapping[str, tuple[int, int]],
        texts: Sequence[str] = (),
        robot_type: str | None = None,
        number_dtype: str = "float32",
    ) -> None:
        self.root, self.fps, self.number_dtype = Path(root), fps, number_dtype
        self.numbers, self.cameras, self.texts = dict(numbers), dict(cameras), tuple(texts)
        self.pyarrow = require("pyarrow", "Writing LeRobot datasets")
        self.parquet = require("pyarrow.parquet", "Writing LeRobot datasets")
        self.info = {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "chunks_size": _CHUNK_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": fps,
            "data_path": _DATA_PATH,
            "video_path": None,
            "features": self._features(),
        }
        self.episodes: list[dict[str, Any]] = []
        self.tasks: list[str] = []
        if (self.root / "meta" / "info.json").is_file():
            self._load_existing()

    def _features(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for name, dimensions in self.numbers.items():
            features[name] = {"dtype": self.number_dtype, "shape": [len(dimensions)], "names": list(dimensions)}
        for name, size in self.cameras.items():
            features[name] = {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for name, dtype in (
            *((text, "string") for text in self.texts),
            ("timestamp", "float32"),
            *((index, "int64") for index in _INDICES),
        ):
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return features

    def _load_existing(self) -> None:
        info = read_json(self.root / "meta" / "info.json")
        for key in ("codebase_version", "fps", "features"):
            if info.get(key) != self.info[key]:
                raise OpenVLAValueError(
                    f"{self.root} holds a dataset with another {key}; use a new folder, or remove it."
                )
        rows = self.parquet.read_table(self.root / _EPISODES).to_pylist()
        self.episodes = [{key: row[key] for key in row if not key.startswith("stats/")} for row in rows]
        tasks = self.parquet.read_table(self.root / "meta" / "tasks.parquet").to_pylist()
        self.tasks = [row["__index_level_0__"] for row in sorted(tasks, key=lambda row: row["task_index"])]

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.episodes)

    def add_episode(
        self,
        task: str | Sequence[str],
        numbers: Mapping[str, np.ndarray],
        images: Mapping[str, Sequence[bytes]],
        texts: Mapping[str, str] | None = None,
    ) -> int:
        """Write one episode, and remove statistics, which are those of fewer episodes.

        Args:
            task: The instruction, or one of every step.
            numbers: ``(length, dimensions)`` by column.
            images: One encoded image (JPEG or PNG) per step, by column.
            texts: One text for the whole episode, by column.

        Returns:
            The episode's index.

        Raises:
            ValueError: A column is missing or unknown, or lengths, dimensions or sizes of images differ from the
                dataset's.
        """
        texts = texts or {}
        length = self._validated_length(numbers, images, texts)
        index, start = len(self.episodes), sum(row["length"] for row in self.episodes)
        tasks = [task] * length if isinstance(task, str) else list(task)
        if len(tasks) != length:
            raise OpenVLAValueError(f"task must be one text, or one of each of {length} steps, got {len(tasks)}.")
        self.tasks = list(dict.fromkeys([*self.tasks, *tasks]))
        table = self._episode_table(
            index=index, start=start, length=length, tasks=tasks, numbers=numbers, images=images, texts=texts
        )
        location = {"chunk_index": index // _CHUNK_SIZE, "file_index": index % _CHUNK_SIZE}
        self._write(_DATA_PATH.format(**location), table)
        self.episodes.append(
            {
                "episode_index": index,
                "tasks": list(dict.fromkeys(tasks)),
                "length": length,
                **{f"data/{key}": value for key, value in location.items()},
                "dataset_from_index": start,
                "dataset_to_index": start + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._write_meta()
        return index

    def _episode_table(
        self,
        *,
        index: int,
        start: int,
        length: int,
        tasks: Sequence[str],
        numbers: Mapping[str, np.ndarray],
        images: Mapping[str, Sequence[bytes]],
        texts: Mapping[str, str],
    ) -> Any:
        arrow = self.pyarrow
        columns: dict[str, Any] = {}
        for name, dimensions in self.numbers.items():
            flat = arrow.array(np.asarray(numbers[name], self.number_dtype).reshape(-1))
            columns[name] = arrow.FixedSizeListArray.from_arrays(flat, len(dimensions))
        cell = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        for name in self.cameras:
            columns[name] = arrow.array([{"bytes": data, "path": None} for data in images[name]], cell)
        for name in self.texts:
            columns[name] = arrow.array([texts[name]] * length)
        steps = np.arange(length)
        columns["timestamp"] = arrow.array((steps / self.fps).astype(np.float32))
        values = (steps, np.full(length, index), start + steps, np.array([self.tasks.index(task) for task in tasks]))
        columns |= {name: arrow.array(value.astype(np.int64)) for name, value in zip(_INDICES, values)}
        return arrow.table(columns)

    def _validated_length(
        self, numbers: Mapping[str, np.ndarray], images: Mapping[str, Sequence[bytes]], texts: Mapping[str, str]
    ) -> int:
        for argument, names, expected in (
            ("numbers", set(numbers), set(self.numbers)),
            ("images", set(images), set(self.cameras)),
            ("texts", set(texts), set(self.texts)),
        ):
            if names != expected:
                raise OpenVLAValueError(f"{argument} must have the columns {sorted(expected)}, got {sorted(names)}.")
        for name, dimensions in self.numbers.items():
            shape = np.shape(numbers[name])
            if len(shape) != 2 or shape[1] != len(dimensions) or not np.isfinite(numbers[name]).all():
                raise OpenVLAValueError(f"{name} must be finite, of shape (length, {len(dimensions)}), got {shape}.")
        lengths = {name: len(values) for name, values in numbers.items()}
        lengths |= {name: len(values) for name, values in images.items()}
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
            raise OpenVLAValueError(f"All columns of an episode must have the same length, 1 or more, got {lengths}.")
        for name, size in self.cameras.items():
            for step, data in enumerate(images[name]):
                with Image.open(io.BytesIO(data)) as image:
                    if (image.height, image.width) != tuple(size):
                        raise OpenVLAValueError(
                            f"{name} must have images of {size[0]} x {size[1]} (height x width), got {image.height} x "
                            f"{image.width} at step {step}."
                        )
        return next(iter(lengths.values()))

    def _write_meta(self) -> None:
        """Write the meta files; info.json, without which the folder is not a dataset, last."""
        (self.root / _STATISTICS).unlink(missing_ok=True)
        arrow = self.pyarrow
        tasks = arrow.table({"task_index": list(range(len(self.tasks))), "__index_level_0__": self.tasks})
        # LeRobot reads the table as a data frame whose index is the text.
        columns = [("task_index", "int64"), ("__index_level_0__", "unicode")]
        pandas_metadata = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [],
            "columns": [
                {
                    "name": name if kind == "int64" else None,
                    "field_name": name,
                    "pandas_type": kind,
                    "numpy_type": "int64" if kind == "int64" else "object",
                    "metadata": None,
                }
                for name, kind in columns
            ],
        }
        self._write("meta/tasks.parquet", tasks.replace_schema_metadata({"pandas": json.dumps(pandas_metadata)}))
        self._write(_EPISODES, arrow.Table.from_pylist(self.episodes))
        totals = {
            "total_episodes": len(self.episodes),
            "total_frames": self.episodes[-1]["dataset_to_index"],
            "total_tasks": len(self.tasks),
            "splits": {"train": f"0:{len(self.episodes)}"},
        }
        write_json(self.root / "meta" / "info.json", {**self.info, **totals})

    def write_statistics(self, *, progress: bool = False) -> None:
        """Write meta/stats.json and each episode's statistics, without which LeRobot's training stops.

        Numbers are those of all frames, images those of a sample of frames and pixels (``lerobot_statistics``).

        Args:
            progress: Show a progress bar.

        Raises:
            OpenVLAValueError: The dataset has no episode.
        """
        if not self.episodes:
            raise OpenVLAValueError(f"{self.root} has no episode; add one before its statistics are computed.")
        names = [*self.numbers, "timestamp", *_INDICES]
        numbers: dict[str, list[np.ndarray]] = {name: [] for name in names}
        counts = {name: np.zeros((3, 256), np.int64) for name in self.cameras}
        num_images, rows = 0, []
        for row in tqdm(self.episodes, desc="statistics", unit="episode", disable=not progress):
            file = _DATA_PATH.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            only_this = [("episode_index", "=", row["episode_index"])]
            table = self.parquet.read_table(self.root / file, columns=[*names, *self.cameras], filters=only_this)
            steps = sampled_steps(len(table))
            statistics = {}
            for name in names:
                numbers[name].append(np.stack(table[name].to_numpy()).reshape(len(table), -1))
                statistics[name] = number_statistics(numbers[name][-1])
            for name in self.cameras:
                cells = table[name].take(steps).to_pylist()
                levels = np.sum([level_counts(cell["bytes"]) for cell in cells], axis=0)
                counts[name] += levels
                statistics[name] = image_statistics(levels, len(steps))
            num_images += len(steps)
            by_column = {f"stats/{name}/{key}": entry[key] for name, entry in statistics.items() for key in entry}
            rows.append({**row, **by_column})
        total = {name: number_statistics(np.concatenate(values)) for name, values in numbers.items()}
        total |= {name: image_statistics(levels, num_images) for name, levels in counts.items()}
        self._write(_EPISODES, self.pyarrow.Table.from_pylist(rows))
        write_json(self.root / _STATISTICS, total)

    def _write(self, name: str, table: Any) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.parquet.write_table(table, temporary)
        os.replace(temporary, path)
