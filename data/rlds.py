"""RLDS datasets (Open X-Embodiment, LIBERO's): TFRecord files that features.json describes, without TensorFlow."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .columns import Fields, alternative_texts, dotted, is_no_camera_name, says_nothing, step_order
from .episodes import (
    IMAGE,
    NUMBERS,
    TEXT,
    DemonstrationError,
    EpisodeReader,
    Stored,
    decoded_image,
    read_json,
)
from .presets import AUTO, PRESETS, WITHOUT_PRESET, known_preset, merged_fields, require_raw_gripper
from .tfrecord import parse_example, read_record, record_offsets

_SHARD = re.compile(r"^(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<shard>\d+)-of-(?P<shards>\d+)$")
_STEPS = "steps/"
_DTYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
# What counts the steps of an episode, where a dataset has it; and flags that only its ends may bear.
_COUNTERS = ("frame_index", "step_index")
_FLAGS = ("is_first", "is_last")
# Where instructions are, in the order of looking.
_INSTRUCTIONS = ("language_instruction", "observation.natural_language_instruction", "observation.language_instruction")


def rlds_folder(path: Path) -> Path | None:
    """The folder with features.json: the path itself, or the newest version right below it."""
    if (path / "features.json").is_file():
        return path
    if not path.is_dir():
        return None
    below = sorted(entry for entry in path.iterdir() if (entry / "features.json").is_file())
    if len(below) > 1 and not all(re.fullmatch(r"[\d.]+", entry.name) for entry in below):
        raise OpenVLAValueError(f"{path} holds several datasets: {[entry.name for entry in below]}; name one of them.")
    return max(below, key=lambda entry: [int(part) for part in re.findall(r"\d+", entry.name)], default=None)


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of features.json: what a step (or an episode) holds under a name."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    compression: str


class RLDSReader(EpisodeReader):
    """Episodes of TFRecord files.

    Args:
        folder: The folder with features.json.
        preset: As in ``open_demonstrations``.
        fields: Fields to replace.
        name: Of the dataset; by default the one in dataset_info.json.
        split: "train", "val", ... or "all".

    Raises:
        ValueError: A split or a shard is not there, features.json is not that of an RLDS dataset, the dataset is known
            by its name and has no preset, or the preset does not fit what is stored.
        KeyError: A field is not there.
    """

    format = "rlds"

    def __init__(
        self,
        folder: Path,
        preset: str | None,
        fields: Mapping[str, Any] | None,
        name: str | None,
        split: str = "train",
    ) -> None:
        info = _checked_info(folder / "dataset_info.json") if (folder / "dataset_info.json").is_file() else {}
        self.features = _features(read_json(folder / "features.json"), folder)
        self.shards = _shards(folder, info, split)
        stored_name = info.get("name") or _SHARD.match(self.shards[0].name)["name"]
        if preset == AUTO:
            self.preset_reason = "by the dataset's name"
            _require_described(folder, fields, stored_name)
        self.preset = known_preset(preset, stored_name, name)
        names = {_public(path): feature.kind for path, feature in self.features.items()}
        if preset == AUTO and self.preset is None and PRESETS["droid"].columns() <= set(names):
            self.preset, self.preset_reason = "droid", "by its columns"
        self.doubtful_cameras = _grey(self.features)
        merged = merged_fields(_suggested(names, self.doubtful_cameras), self.preset, fields, folder)
        self.offsets: dict[Path, tuple[list[tuple[int, int]], str | None]] = {}
        self.counts = _shard_counts(info, self.shards) or [self._count(shard) for shard in self.shards]
        self.starts = np.cumsum([0, *self.counts])
        super().__init__(folder, name or stored_name, names, merged)
        self._require_width()
        require_raw_gripper(self, fields)

    def _require_width(self) -> None:
        """Check that the preset's action has as many dimensions as its mask."""
        mask = self.fields.action_mask
        if self.preset is None or mask is None or self.fields.standardize is not None:
            return
        widths = {_public(path): math.prod(feature.shape) for path, feature in self.features.items()}
        width = self.fields.action_width(widths)
        if width != len(mask):
            raise OpenVLAValueError(
                f"{self.root}: the columns {list(self.fields.action)} hold {width} dimensions, but the action has "
                f"{len(mask)} (action_mask).{self.preset_note()}"
            )

    @property
    def files(self) -> list[Path]:
        """The shards, and what describes them."""
        return [*self.shards, self.root / "features.json"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _offsets(self, shard: Path) -> tuple[list[tuple[int, int]], str | None]:
        if shard not in self.offsets:
            self.offsets[shard] = record_offsets(shard)
        return self.offsets[shard]

    def _count(self, shard: Path) -> int:
        """Records of a shard; what is damaged counts as one more, so that it is met and named."""
        offsets, damage = self._offsets(shard)
        return len(offsets) + (damage is not None)

    def _locate(self, index: int) -> tuple[Path, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[number], index - int(self.starts[number])

    def _example(self, shard: Path, record: int, wanted: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:
        offsets, damage = self._offsets(shard)
        expected = self.counts[self.shards.index(shard)]
        if damage is None and len(offsets) != expected:
            raise OpenVLAValueError(f"the file holds {len(offsets)} records, but dataset_info.json says {expected}")
        if record >= len(offsets):
            raise OpenVLAValueError(f"{damage}; copy the file again from its source")
        example = parse_example(read_record(shard, *offsets[record]), lambda name: name in wanted | optional)
        columns = [path for path in wanted if path.startswith(_STEPS)]
        if columns and all(path in example and not len(example[path]) for path in columns):
            raise OpenVLAValueError("the episode has no steps; leave it out with skip_bad=True")
        if missing := sorted(_public(path) for path in wanted if path not in example or not len(example[path])):
            raise OpenVLAValueError(f"{missing} missing from the record")
        return example

    def _stored_length(self, index: int) -> int:
        return len(self[index]) + self.fields.shortening

    def _read(self, index: int) -> Stored:
        shard, record = self._locate(index)
        paths = {_public(path): path for path in self.features}
        number_names = self.fields.columns() if self.fields.standardize is None else set(self.names)
        numbers = {name for name in number_names if self.names[name] == NUMBERS}
        instruction = self.fields.instruction
        wanted = {*numbers, *self.fields.cameras, *([instruction] if instruction else [])}
        marks = [name for name in (*_COUNTERS, *_FLAGS) if self.names.get(name) == NUMBERS]
        try:
            example = self._example(shard, record, {paths[name] for name in wanted}, {paths[name] for name in marks})
            columns = {name: _array(example[paths[name]], self.features[paths[name]]) for name in sorted(numbers)}
            frames = {camera: example[paths[camera]] for camera in self.fields.cameras}
            held = {name: example.get(paths[name], ()) for name in marks}
            marks = {name: _array(values, self.features[paths[name]]) for name, values in held.items() if len(values)}
            lengths = {name: len(values) for name, values in {**columns, **frames, **marks}.items()}
            if len(set(lengths.values())) > 1:
                raise OpenVLAValueError(f"columns of different lengths: {lengths}")
            order = _order(marks)
            said = self._said(shard, record, example, paths)
        except (ValueError, zlib.error) as error:
            raise DemonstrationError(f"{shard}, episode {shard.name}:{record}: {error}.") from error
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
            frames = {camera: [cells[row] for row in order] for camera, cells in frames.items()}
            said = said if isinstance(said, str) else [said[row] for row in order]

        def image(camera: str, step: int) -> np.ndarray:
            return self._image(frames[camera][step], paths[camera])

        return Stored(f"{shard.name}:{record}", str(shard), columns, said, image)

    def _said(self, shard: Path, record: int, example: Mapping[str, Any], paths: Mapping[str, str]) -> list[str] | str:
        """Return the instruction of every step or of all; where it is empty, a further one that is stored beside it."""
        instruction = self.fields.instruction
        if not instruction:
            return ""
        said = _texts(example[paths[instruction]], instruction)
        others = alternative_texts(instruction, self.names)
        if others and not self.fields.instruction_text and any(map(says_nothing, said)):
            more = self._example(shard, record, {paths[name] for name in others})
            for name in others:
                further = _texts(more[paths[name]], name)
                said = [other if says_nothing(text) else text for text, other in zip(said, further)]
        return said if paths[instruction].startswith(_STEPS) else said[0]

    def _image(self, data: bytes, path: str) -> np.ndarray:
        image, shape = decoded_image(data), self.features[path].shape
        if shape and any(want > 0 and want != got for want, got in zip(shape[:2], image.shape)):
            raise OpenVLAValueError(f"{_public(path)} is {image.shape}, but features.json says {shape}")
        return image


def _public(path: str) -> str:
    return dotted(path.removeprefix(_STEPS))


def _features(tree: dict[str, Any], folder: Path) -> dict[str, Feature]:
    """Leaves by their name in the records: ``steps/observation/image``."""
    leaves: dict[str, Feature] = {}

    def below(node: Any, *keys: str) -> dict[str, Any]:
        for depth in range(len(keys) + 1):
            node = node.get(keys[depth - 1]) if depth else node
            if not isinstance(node, dict):
                raise OpenVLAValueError(
                    f"{folder}/features.json must hold an object at {'/'.join(keys[:depth])!r} of each feature, got "
                    f"{node!r:.200}; copy it again from its source."
                )
        return node

    def walk(node: Any, path: str) -> None:
        if "featuresDict" in below(node):
            for key, child in below(node, "featuresDict", "features").items():
                walk(child, f"{path}/{key}" if path else key)
        elif path == "steps" and "sequence" in node:
            walk(below(node, "sequence", "feature"), path)
        elif leaf := _leaf(node, f"{folder}/features.json: {path}"):
            leaves[path] = leaf

    top = below(tree, "featuresDict", "features") if "featuresDict" in below(tree) else {}
    if "sequence" not in below(top.get("steps", {})):
        raise OpenVLAValueError(
            f"{folder}/features.json describes no RLDS dataset: there are no steps, only {sorted(top)}."
        )

    walk(tree, "")
    return leaves


def _leaf(node: dict[str, Any], where: str) -> Feature | None:
    kind = next((kind for kind in ("image", "text", "tensor") if kind in node), None)
    if kind != "text" and not isinstance(node.get(kind, {}), dict):
        raise OpenVLAValueError(f"{where} must be described by an object, got {node[kind]!r:.200}; copy it again.")
    if kind == "image":
        image = node["image"]
        shape, dtype = _dimensions(image, where), image.get("dtype", "uint8")
        return Feature(IMAGE, shape, dtype, "none") if dtype == "uint8" and shape[-1:] in ((3,), (1,), ()) else None
    if kind == "text":
        return Feature(TEXT, (), "string", "none")
    content = node.get("tensor")
    if not content:
        return None
    shape, dtype = _dimensions(content, where), content.get("dtype", "float32")
    if dtype in ("string", "object"):
        return Feature(TEXT, shape, dtype, "none")
    if -1 in shape or not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        return None  # ragged: stored under other names; or of numbers that numpy has not
    return Feature(NUMBERS, shape, dtype, content.get("encoding", "none"))


def _dimensions(node: dict[str, Any], where: str) -> tuple[int, ...]:
    shape = node.get("shape", {})
    sizes = shape.get("dimensions", []) if isinstance(shape, dict) else None
    if not isinstance(sizes, list) or not all(re.fullmatch(r"-1|\d{1,9}", str(size)) for size in sizes):
        raise OpenVLAValueError(
            f"{where}: its shape must be a list of sizes as dimensions, got {shape!r:.200}; copy it again."
        )
    return tuple(int(size) for size in sizes)


def _texts(values: list[bytes] | np.ndarray, name: str) -> list[str]:
    if not isinstance(values, list):
        raise OpenVLAValueError(
            f"{name} must hold texts, as features.json says, but holds {values.dtype}; copy the file again"
        )
    return [text.decode("utf-8", "replace") for text in values]


def _array(values: list[bytes] | np.ndarray, feature: Feature) -> np.ndarray:
    """A number column ``(length, *shape)`` in its own dtype."""
    if isinstance(values, list):
        if feature.compression == "zlib":
            values = [zlib.decompress(value) for value in values]
        values = np.frombuffer(b"".join(values), np.dtype(feature.dtype).newbyteorder("<"))
    size = math.prod(feature.shape)
    if not size or len(values) % size:
        raise OpenVLAValueError(f"{len(values)} values cannot be steps of shape {feature.shape}")
    return values.reshape(-1, *feature.shape).astype(feature.dtype if feature.dtype != "float64" else np.float64)


def _checked_info(file: Path) -> dict[str, Any]:
    """Return dataset_info.json, once its name and its splits can be read."""
    info = read_json(file)
    splits = info.get("splits") or [] if isinstance(info, dict) else None
    fits = isinstance(splits, list) and all(
        isinstance(split, dict)
        and isinstance(split.get("name"), str)
        and isinstance(split.get("shardLengths", []), list)
        and all(re.fullmatch(r"\d{1,18}", str(length)) for length in split.get("shardLengths", []))
        for split in splits
    )
    if not fits or not isinstance(info.get("name") or "", str):
        raise OpenVLAValueError(
            f"{file} must name the dataset, and its splits with shardLengths, as TFDS does; copy it again."
        )
    return {**info, "splits": splits}


def _shards(folder: Path, info: Mapping[str, Any], split: str) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if _SHARD.match(file.name))
    splits = sorted({_SHARD.match(file.name)["split"] for file in found})
    chosen = [file for file in found if split in ("all", _SHARD.match(file.name)["split"])]
    if not chosen:
        raise OpenVLAValueError(
            f"{folder} has no split {split!r} of .tfrecord files. There is: {splits or 'none at all'}."
        )
    for name in splits if split == "all" else [split]:
        these = [_SHARD.match(file.name) for file in chosen if _SHARD.match(file.name)["split"] == name]
        whole = set(range(int(these[0]["shards"])))
        if missing := sorted(whole - {int(match["shard"]) for match in these}):
            raise OpenVLAValueError(
                f"{folder}: split {name!r} lacks {len(missing)} of {len(whole)} shards: {missing[:5]}."
            )
    return chosen


def _shard_counts(info: Mapping[str, Any], shards: list[Path]) -> list[int] | None:
    """Records of every shard as dataset_info.json says, or None where it does not."""
    by_split = {split["name"]: split.get("shardLengths", []) for split in info.get("splits", [])}
    counts = []
    for match in (_SHARD.match(shard.name) for shard in shards):
        lengths = by_split.get(match["split"], [])
        if len(lengths) != int(match["shards"]):
            return None
        counts.append(int(lengths[int(match["shard"])]))
    return counts


def _require_described(folder: Path, fields: Mapping[str, Any] | None, name: str) -> None:
    """Check that a dataset which is known by its name, and has no preset, is told what its action is."""
    if name not in WITHOUT_PRESET or {"action", "standardize"} & set(fields or {}):
        return
    hint = " Bridge V2 has the presets bridge_orig and bridge_oxe." if name == "bridge" else ""
    raise OpenVLAValueError(
        f"{folder} is {name!r}, whose stored action is not OpenVLA's (six movements, then a gripper of 0 closed, 1 "
        f"open), and no preset describes it. Give action and gripper (or standardize) in fields.{hint} To read its "
        "column 'action' as it is stored, take no preset: preset: none, --preset none."
    )


def _order(marks: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the order of an episode's steps by its counter, as ``step_order``.

    Raises:
        ValueError: Steps are missing or there twice, or is_first or is_last is set elsewhere than at that end.
    """
    counter = next((name for name in _COUNTERS if name in marks), None)
    order = None if counter is None else step_order({"frame_index": marks[counter]})
    for name, end in (("is_first", 0), ("is_last", -1)):
        if name in marks:
            flags = marks[name].reshape(-1).astype(bool)
            flags = flags if order is None else flags[order]
            if wrong := sorted(set(np.flatnonzero(flags)) - {range(len(flags))[end]}):
                raise OpenVLAValueError(
                    f"{name} is set at step {wrong[0]} of {len(flags)}; the episode must be written again"
                )
    return order


def _grey(features: Mapping[str, Feature]) -> frozenset[str]:
    """Return the image columns of one channel."""
    return frozenset(_public(path) for path, one in features.items() if one.kind == IMAGE and one.shape[-1:] == (1,))


def _suggested(names: Mapping[str, str], grey: frozenset[str]) -> Fields | None:
    cameras = tuple(
        name for name, kind in names.items() if kind == IMAGE and name not in grey and not is_no_camera_name(name)
    )
    if not cameras or names.get("action") != NUMBERS:
        return None
    instruction = next((name for name in _INSTRUCTIONS if names.get(name) == TEXT), None)
    proprio = tuple(name for name in ("observation.state",) if names.get(name) == NUMBERS)
    return Fields(cameras, ("action",), proprio, instruction)
