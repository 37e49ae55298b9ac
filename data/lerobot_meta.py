"""Load and validate the meta files of a LeRobot dataset: every value that the reader uses exists and has its type."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors_openvla import OpenVLAValueError
from .remote import DataPath
from .utils import read_json

_VERSIONS = ("v2.0", "v2.1", "v3.0")
# Types of a feature's optional entries.
_ENTRY_TYPES = {"shape": (list,), "names": (list, dict, str), "info": (dict,), "video_info": (dict,)}
# Columns of meta/episodes (v3) that locate an episode's file.
FILE_INDICES = ("chunk_index", "file_index")


def load_info(root: DataPath) -> dict[str, Any]:
    """Return info.json after validating its version and its features.

    Raises:
        ValueError: The version is not supported, or an entry has a wrong type.
    """
    info = read_json(root / "meta" / "info.json")
    version = info.get("codebase_version") if isinstance(info, dict) else info
    if version not in _VERSIONS:
        raise OpenVLAValueError(
            f"{root} is LeRobot {version!s:.200}; supported versions: {_VERSIONS}. Convert it with LeRobot's tools."
        )
    features = info.get("features")
    for name, feature in features.items() if isinstance(features, dict) else [("features", features)]:
        valid = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        if not valid or any(
            not isinstance(feature.get(key), (*types, type(None))) for key, types in _ENTRY_TYPES.items()
        ):
            raise OpenVLAValueError(
                f"{root}: info.json must describe every feature as LeRobot does, by a dtype, a shape and names, "
                f"got {name!r}: {feature!r:.200}; copy the dataset again."
            )
    if not isinstance(info.get("splits"), (dict, type(None))):
        raise OpenVLAValueError(
            f"{root}: splits of info.json must name ranges of episodes, got {info['splits']!r:.200}."
        )
    return info


def require_path_patterns(root: DataPath, info: Mapping[str, Any], v3: bool, has_videos: bool) -> None:
    """Check that info.json's path patterns contain only the placeholders of the format's version."""
    placeholders = "|".join(FILE_INDICES if v3 else ("episode_chunk", "episode_index"))
    for key, video_key in (("data_path", ""), *([("video_path", r"|\{video_key\}")] if has_videos else [])):
        pattern = info.get(key)
        if not isinstance(pattern, str) or not re.fullmatch(
            rf"([^{{}}]|\{{({placeholders})(:0?\d?d)?\}}{video_key})+", pattern
        ):
            raise OpenVLAValueError(
                f"{root}: {key} of info.json must be a path with the placeholders {{{placeholders}}}, as "
                f"LeRobot writes it, got {pattern!r:.200}; copy the dataset again."
            )
    size = info.get("chunks_size", 1000)
    if not v3 and (type(size) is not int or size < 1):
        raise OpenVLAValueError(f"{root}: chunks_size of info.json must be a whole number above 0, got {size!r:.200}.")


def require_numbers(
    root: DataPath, rows: Sequence[Mapping[str, Any]], names: Sequence[str], types: tuple[type, ...] = (int,)
) -> None:
    """Check that every row of a table below meta has these numeric entries."""
    for row in rows:
        if invalid := [name for name in names if type(row.get(name)) not in types]:
            raise OpenVLAValueError(
                f"{root}: every row of the tables below meta must have the number {invalid[0]!r}, got "
                f"{row.get(invalid[0])!r:.200}; copy the dataset again."
            )


def read_json_lines(path: DataPath) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file.

    Raises:
        ValueError: The file is missing or damaged.
    """
    if not path.is_file():
        raise OpenVLAValueError(f"{path} is missing; the dataset is incomplete.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is damaged: {error}; copy the dataset again.") from error
    if invalid := [row for row in rows if not isinstance(row, dict)]:
        raise OpenVLAValueError(f"{path} is damaged: every line must be an object, got {invalid[0]!r:.200}.")
    return rows
