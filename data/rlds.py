"""Read RLDS datasets (Open X-Embodiment, LIBERO): TFRecord files described by features.json, without TensorFlow."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .columns import (
    ColumnSpec,
    alternative_instruction_columns,
    dotted,
    is_empty_instruction,
    is_non_camera_name,
    step_order,
)
from .episodes import IMAGE, NUMERIC, TEXT, DatasetError, EpisodeReader, RawEpisode, decode_image
from .gripper_check import require_unconverted_gripper
from .presets import AUTO, PRESETS, WITHOUT_PRESET, merge_fields, select_preset
from .remote import DataPath, RemotePath, existing_files, on_disk
from .tfrecord import RecordIndex, index_records, parse_example, read_record
from .utils import read_json

_SHARD_NAME = re.compile(r"^(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<shard>\d+)-of-(?P<shards>\d+)$")
_STEPS = "steps/"
_DTYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
# Optional columns that count the steps of an episode; and flags that only its first or last step may have.
_COUNTERS = ("frame_index", "step_index")
_FLAGS = ("is_first", "is_last")
# Columns of the instruction, in order of preference.
_INSTRUCTIONS = ("language_instruction", "observation.natural_language_instruction", "observation.language_instruction")


def rlds_folder(path: DataPath) -> DataPath | None:
    """Return the folder with features.json: the path itself or the newest version in it; None if there is none.

    Raises:
        ValueError: The path contains several datasets.
    """
    if (path / "features.json").is_file():
        return path
    if not path.is_dir() or (isinstance(path, RemotePath) and not path.dataset.can_list):
        return None
    versions = sorted(entry for entry in path.iterdir() if (entry / "features.json").is_file())
    if len(versions) > 1 and not all(re.fullmatch(r"[\d.]+", entry.name) for entry in versions):
        raise OpenVLAValueError(
            f"{path} contains several datasets: {[entry.name for entry in versions]}; give the path of one of them."
        )
    return max(versions, key=lambda entry: [int(part) for part in re.findall(r"\d+", entry.name)], default=None)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of features.json: kind, shape and storage of a column.

    Attributes:
        kind: ``IMAGE``, ``TEXT`` or ``NUMERIC``.
        shape: Shape per step; empty if unknown.
        dtype: numpy's name of the dtype, or "string".
        compression: "none" or "zlib".
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    compression: str


class _Shard(NamedTuple):
    """A TFRecord file and the parts of its name."""

    path: DataPath
    dataset: str
    split: str
    number: int
    total: int


class RLDSReader(EpisodeReader):
    """Reader of RLDS datasets.

    Args:
        folder: The folder with features.json.
        preset: As in ``open_dataset``.
        fields: Fields of ``ColumnSpec`` to replace.
        name: The dataset's name. Default: the one in dataset_info.json.
        split: "train", "val", ... or "all".

    Raises:
        ValueError: A split or a shard is missing, features.json does not describe an RLDS dataset, the dataset is one
            of ``WITHOUT_PRESET``, or the preset does not fit the stored data.
        KeyError: A field names a column that does not exist.
    """

    format = "rlds"

    def __init__(
        self,
        folder: DataPath,
        *,
        preset: str | None = AUTO,
        fields: Mapping[str, Any] | None = None,
        name: str | None = None,
        split: str = "train",
    ) -> None:
        info = _load_info(folder / "dataset_info.json") if (folder / "dataset_info.json").is_file() else {}
        self.features = _parse_features(read_json(folder / "features.json"), folder)
        shards = _find_shards(folder, split, info)
        self.shards = [shard.path for shard in shards]
        stored_name = info.get("name") or shards[0].dataset
        if preset == AUTO:
            self.preset_reason = "by the dataset's name"
            _require_known_action(folder, fields, stored_name)
        self.preset = select_preset(preset, stored_name, name)
        column_kinds = {_column_name(path): feature.kind for path, feature in self.features.items()}
        if preset == AUTO and self.preset is None and PRESETS["droid"].numeric_columns() <= set(column_kinds):
            self.preset, self.preset_reason = "droid", "by its columns"
        self.doubtful_cameras = _single_channel_images(self.features)
        suggested = _suggest_fields(column_kinds, self.doubtful_cameras)
        merged = merge_fields(suggested, self.preset, fields, folder)
        self._indices: dict[DataPath, RecordIndex] = {}
        self.counts = _stored_record_counts(info, shards) or [self._count_records(shard) for shard in self.shards]
        self.starts = np.cumsum([0, *self.counts])
        super().__init__(folder, name or stored_name, column_kinds, merged)
        self._require_action_width()
        require_unconverted_gripper(self, fields)

    def _require_action_width(self) -> None:
        """Check that the preset's action has as many dimensions as its mask."""
        mask = self.fields.action_mask
        if self.preset is None or mask is None or self.fields.standardize is not None:
            return
        widths = {_column_name(path): math.prod(feature.shape) for path, feature in self.features.items()}
        width = self.fields.action_width(widths)
        if width != len(mask):
            raise OpenVLAValueError(
                f"{self.root}: the columns {list(self.fields.action)} have {width} dimensions, but the action has "
                f"{len(mask)} (action_mask).{self.preset_note()}"
            )

    @property
    def files(self) -> list[DataPath]:
        """Return the shards and features.json."""
        return existing_files([*self.shards, self.root / "features.json"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _index(self, shard: DataPath) -> RecordIndex:
        if shard not in self._indices:
            with on_disk(shard) as file:
                self._indices[shard] = index_records(file)
        return self._indices[shard]

    def _count_records(self, shard: DataPath) -> int:
        """Return the number of records of a shard; damage counts as one more, so that reading it raises."""
        index = self._index(shard)
        return len(index.records) + (index.damage is not None)

    def _locate(self, index: int) -> tuple[DataPath, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[number], index - int(self.starts[number])

    def _read_example(
        self, shard: DataPath, record: int, required: Collection[str], optional: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return features of a record by their stored names."""
        records, damage = self._index(shard)
        expected = self.counts[self.shards.index(shard)]
        if damage is None and len(records) != expected:
            raise OpenVLAValueError(f"the file has {len(records)} records, but dataset_info.json says {expected}")
        if record >= len(records):
            raise OpenVLAValueError(f"{damage}; copy the file again from its source")
        selected = {*required, *optional}
        with on_disk(shard) as file:
            data = read_record(file, records[record])
        example = parse_example(data, lambda name: name in selected)
        columns = [path for path in required if path.startswith(_STEPS)]
        if columns and all(path in example and not len(example[path]) for path in columns):
            raise OpenVLAValueError("the episode has no steps; leave it out with skip_bad=True")
        if missing := sorted(_column_name(path) for path in required if path not in example or not len(example[path])):
            raise OpenVLAValueError(f"the record lacks {missing}")
        return example

    def _stored_length(self, index: int) -> int:
        return len(self[index]) + self.fields.num_dropped_steps

    def read_raw(self, index: int) -> RawEpisode:
        """Return an episode as it is stored, its steps in the order of their counter."""
        shard, record = self._locate(index)
        paths = {_column_name(path): path for path in self.features}
        column_names = self.fields.numeric_columns() if self.fields.standardize is None else set(self.column_kinds)
        numeric = {name for name in column_names if self.column_kinds[name] == NUMERIC}
        instruction = self.fields.instruction
        required = {*numeric, *self.fields.cameras, *([instruction] if instruction else [])}
        marker_names = [name for name in (*_COUNTERS, *_FLAGS) if self.column_kinds.get(name) == NUMERIC]
        try:
            example = self._read_example(
                shard, record, {paths[name] for name in required}, {paths[name] for name in marker_names}
            )
            columns = {name: _to_array(example[paths[name]], self.features[paths[name]]) for name in sorted(numeric)}
            frames = {camera: example[paths[camera]] for camera in self.fields.cameras}
            stored = {name: example.get(paths[name], ()) for name in marker_names}
            markers = {
                name: _to_array(values, self.features[paths[name]]) for name, values in stored.items() if len(values)
            }
            lengths = {name: len(values) for name, values in {**columns, **frames, **markers}.items()}
            if len(set(lengths.values())) > 1:
                raise OpenVLAValueError(f"columns have different lengths: {lengths}")
            order = _step_order(markers)
            instructions = self._read_instructions(shard, record, example, paths)
        except (ValueError, zlib.error) as error:
            raise DatasetError(f"{shard}, episode {shard.name}:{record}: {error}.") from error
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
            frames = {camera: [images[row] for row in order] for camera, images in frames.items()}
            instructions = instructions if isinstance(instructions, str) else [instructions[row] for row in order]

        def load_image(camera: str, step: int) -> np.ndarray:
            return self._decode(frames[camera][step], paths[camera])

        return RawEpisode(f"{shard.name}:{record}", str(shard), columns, instructions, load_image)

    def _read_instructions(
        self, shard: DataPath, record: int, example: Mapping[str, Any], paths: Mapping[str, str]
    ) -> list[str] | str:
        """Return one instruction per step or one for all; an empty one is taken from ``language_instruction_2`` etc."""
        instruction = self.fields.instruction
        if not instruction:
            return ""
        texts = _to_texts(example[paths[instruction]], instruction)
        alternatives = alternative_instruction_columns(instruction, self.column_kinds)
        if alternatives and not self.fields.instruction_text and any(map(is_empty_instruction, texts)):
            others = self._read_example(shard, record, {paths[name] for name in alternatives})
            for name in alternatives:
                other_texts = _to_texts(others[paths[name]], name)
                texts = [other if is_empty_instruction(text) else text for text, other in zip(texts, other_texts)]
        return texts if paths[instruction].startswith(_STEPS) else texts[0]

    def _decode(self, data: bytes, path: str) -> np.ndarray:
        image, shape = decode_image(data), self.features[path].shape
        if shape and any(expected > 0 and expected != size for expected, size in zip(shape[:2], image.shape)):
            raise OpenVLAValueError(f"{_column_name(path)} is {image.shape}, but features.json says {shape}")
        return image


def _column_name(path: str) -> str:
    """Return the dotted name of a feature's stored name: ``steps/observation/image`` as ``observation.image``."""
    return dotted(path.removeprefix(_STEPS))


def _parse_features(tree: dict[str, Any], folder: DataPath) -> dict[str, Feature]:
    """Return the leaves of features.json by their name in the records: ``steps/observation/image``."""
    leaves: dict[str, Feature] = {}

    def descend(node: Any, *keys: str) -> dict[str, Any]:
        for depth in range(len(keys) + 1):
            node = node.get(keys[depth - 1]) if depth else node
            if not isinstance(node, dict):
                raise OpenVLAValueError(
                    f"{folder}/features.json must have an object at {'/'.join(keys[:depth])!r} of every feature, got "
                    f"{node!r:.200}; copy it again from its source."
                )
        return node

    def walk(node: Any, path: str) -> None:
        if "featuresDict" in descend(node):
            for key, child in descend(node, "featuresDict", "features").items():
                walk(child, f"{path}/{key}" if path else key)
        elif path == "steps" and "sequence" in node:
            walk(descend(node, "sequence", "feature"), path)
        elif leaf := _parse_leaf(node, f"{folder}/features.json: {path}"):
            leaves[path] = leaf

    top = descend(tree, "featuresDict", "features") if "featuresDict" in descend(tree) else {}
    if "sequence" not in descend(top.get("steps", {})):
        raise OpenVLAValueError(
            f"{folder}/features.json does not describe an RLDS dataset: it has no steps, only {sorted(top)}."
        )
    walk(tree, "")
    return leaves


def _parse_leaf(node: dict[str, Any], where: str) -> Feature | None:
    """Return a column's feature; None for one that cannot be read."""
    kind = next((kind for kind in ("image", "text", "tensor") if kind in node), "")
    if kind != "text" and not isinstance(node.get(kind, {}), dict):
        raise OpenVLAValueError(f"{where} must be an object, got {node[kind]!r:.200}; copy it again.")
    if kind == "image":
        image = node["image"]
        shape, dtype = _parse_shape(image, where), image.get("dtype", "uint8")
        return Feature(IMAGE, shape, dtype, "none") if dtype == "uint8" and shape[-1:] in ((3,), (1,), ()) else None
    if kind == "text":
        return Feature(TEXT, (), "string", "none")
    content = node.get("tensor")
    if not content:
        return None
    shape, dtype = _parse_shape(content, where), content.get("dtype", "float32")
    if dtype in ("string", "object"):
        return Feature(TEXT, shape, dtype, "none")
    if -1 in shape or not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        return None  # ragged tensors are stored under other names; or a dtype that numpy does not have
    return Feature(NUMERIC, shape, dtype, content.get("encoding", "none"))


def _parse_shape(node: dict[str, Any], where: str) -> tuple[int, ...]:
    shape = node.get("shape", {})
    sizes = shape.get("dimensions", []) if isinstance(shape, dict) else None
    if not isinstance(sizes, list) or not all(re.fullmatch(r"-1|\d{1,9}", str(size)) for size in sizes):
        raise OpenVLAValueError(
            f"{where}: its shape must have a list of sizes as dimensions, got {shape!r:.200}; copy it again."
        )
    return tuple(int(size) for size in sizes)


def _to_texts(values: list[bytes] | np.ndarray, name: str) -> list[str]:
    if not isinstance(values, list):
        raise OpenVLAValueError(
            f"{name} must hold texts according to features.json, but holds {values.dtype}; copy the file again"
        )
    return [text.decode("utf-8", "replace") for text in values]


def _to_array(values: list[bytes] | np.ndarray, feature: Feature) -> np.ndarray:
    """Return a numeric column ``(length, *shape)`` in its own dtype."""
    if isinstance(values, list):
        if feature.compression == "zlib":
            values = [zlib.decompress(value) for value in values]
        values = np.frombuffer(b"".join(values), np.dtype(feature.dtype).newbyteorder("<"))
    size = math.prod(feature.shape)
    if not size or len(values) % size:
        raise OpenVLAValueError(f"{len(values)} values cannot be split into steps of shape {feature.shape}")
    return values.reshape(-1, *feature.shape).astype(feature.dtype if feature.dtype != "float64" else np.float64)


def _load_info(file: DataPath) -> dict[str, Any]:
    """Return dataset_info.json after validating its name and its splits."""
    info = read_json(file)
    splits = info.get("splits") or [] if isinstance(info, dict) else None
    valid = isinstance(splits, list) and all(
        isinstance(split, dict)
        and isinstance(split.get("name"), str)
        and isinstance(split.get("shardLengths", []), list)
        and all(re.fullmatch(r"\d{1,18}", str(length)) for length in split.get("shardLengths", []))
        for split in splits
    )
    if not valid or not isinstance(info.get("name") or "", str):
        raise OpenVLAValueError(
            f"{file} must have the dataset's name and its splits with shardLengths, as TFDS writes them; copy it again."
        )
    return {**info, "splits": splits}


def _find_shards(folder: DataPath, split: str, info: Mapping[str, Any]) -> list[_Shard]:
    """Return the shards of a split ("all": of every split), sorted by name.

    Raises:
        ValueError: The split does not exist, or lacks shards.
    """
    shards = [
        _Shard(file, match["name"], match["split"], int(match["shard"]), int(match["shards"]))
        for file in _shard_files(folder, info)
        if (match := _SHARD_NAME.match(file.name))
    ]
    splits = sorted({shard.split for shard in shards})
    selected = [shard for shard in shards if split in ("all", shard.split)]
    if not selected:
        raise OpenVLAValueError(
            f"{folder} has no split {split!r} of .tfrecord files. Available: {splits or 'none at all'}."
        )
    for name in splits if split == "all" else [split]:
        numbers = {shard.number for shard in selected if shard.split == name}
        total = next(shard.total for shard in selected if shard.split == name)
        if missing := sorted(set(range(total)) - numbers):
            raise OpenVLAValueError(f"{folder}: split {name!r} lacks {len(missing)} of {total} shards: {missing[:5]}.")
    return selected


def _shard_files(folder: DataPath, info: Mapping[str, Any]) -> list[DataPath]:
    """Return a dataset's files, sorted; where they cannot be listed, the shards by the names that TFDS gives them."""
    if not isinstance(folder, RemotePath) or folder.dataset.can_list:
        return sorted(folder.iterdir())
    if not info.get("name") or not info["splits"]:
        raise OpenVLAValueError(
            f"{folder}/dataset_info.json must have the dataset's name and its splits, because the server lists no "
            "files; copy it there, or download the dataset."
        )
    return [
        folder / f"{info['name']}-{split['name']}.tfrecord-{shard:05d}-of-{len(split['shardLengths']):05d}"
        for split in info["splits"]
        for shard in range(len(split.get("shardLengths", [])))
    ]


def _stored_record_counts(info: Mapping[str, Any], shards: list[_Shard]) -> list[int] | None:
    """Return the number of records per shard from dataset_info.json; None if it does not have them."""
    by_split = {split["name"]: split.get("shardLengths", []) for split in info.get("splits", [])}
    counts = []
    for shard in shards:
        lengths = by_split.get(shard.split, [])
        if len(lengths) != shard.total:
            return None
        counts.append(int(lengths[shard.number]))
    return counts


def _require_known_action(folder: DataPath, fields: Mapping[str, Any] | None, name: str) -> None:
    """Raise ValueError if a dataset of ``WITHOUT_PRESET`` is opened without the field action or standardize."""
    if name not in WITHOUT_PRESET or {"action", "standardize"} & set(fields or {}):
        return
    hint = " Bridge V2 has the presets bridge_orig and bridge_oxe." if name == "bridge" else ""
    raise OpenVLAValueError(
        f"{folder} is {name!r}, whose stored action is not OpenVLA's (six movements, then a gripper of 0 closed, 1 "
        f"open), and no preset describes it. Set action and gripper (or standardize) in fields.{hint} To read its "
        "column 'action' as it is stored, use no preset: preset: none, --preset none."
    )


def _step_order(markers: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the order of an episode's steps by its counter, as ``columns.step_order`` does.

    Raises:
        ValueError: Steps are missing or duplicated, or is_first or is_last is set at another step.
    """
    counter = next((name for name in _COUNTERS if name in markers), None)
    order = None if counter is None else step_order({"frame_index": markers[counter]})
    for name, end in (("is_first", 0), ("is_last", -1)):
        if name in markers:
            flags = markers[name].reshape(-1).astype(bool)
            flags = flags if order is None else flags[order]
            if misplaced := sorted(set(np.flatnonzero(flags)) - {range(len(flags))[end]}):
                raise OpenVLAValueError(
                    f"{name} is set at step {misplaced[0]} of {len(flags)}; the episode must be written again"
                )
    return order


def _single_channel_images(features: Mapping[str, Feature]) -> frozenset[str]:
    """Return the image columns with one channel."""
    return frozenset(
        _column_name(path) for path, feature in features.items() if feature.kind == IMAGE and feature.shape[-1:] == (1,)
    )


def _suggest_fields(column_kinds: Mapping[str, str], single_channel: frozenset[str]) -> ColumnSpec | None:
    """Return the fields of the usual column names; None without cameras or an action."""
    cameras = tuple(
        name
        for name, kind in column_kinds.items()
        if kind == IMAGE and name not in single_channel and not is_non_camera_name(name)
    )
    if not cameras or column_kinds.get("action") != NUMERIC:
        return None
    instruction = next((name for name in _INSTRUCTIONS if column_kinds.get(name) == TEXT), None)
    proprio = tuple(name for name in ("observation.state",) if column_kinds.get(name) == NUMERIC)
    return ColumnSpec(cameras, ("action",), proprio, instruction)
