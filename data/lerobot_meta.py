"""Checks of a LeRobot dataset's meta files: what the reader takes from them is there, and of the right kind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors_openvla import OpenVLAValueError
from .episodes import read_json

_VERSIONS = ("v2.0", "v2.1", "v3.0")
# What describes a feature, beside its dtype, where it is there.
_FORMS = {"shape": (list,), "names": (list, dict, str), "info": (dict,), "video_info": (dict,)}
# Where an episode of v3 lies, by the columns of meta/episodes.
PLACE = ("chunk_index", "file_index")


def checked_info(root: Path) -> dict[str, Any]:
    """Return info.json, once its version and the descriptions of its features can be read."""
    info = read_json(root / "meta" / "info.json")
    version = info.get("codebase_version") if isinstance(info, dict) else info
    if version not in _VERSIONS:
        raise OpenVLAValueError(
            f"{root} is LeRobot {version!s:.200}; readable are {_VERSIONS}. Convert it with LeRobot's tools."
        )
    features = info.get("features")
    for name, feature in features.items() if isinstance(features, dict) else [("features", features)]:
        fits = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        if not fits or any(not isinstance(feature.get(key), (*forms, type(None))) for key, forms in _FORMS.items()):
            raise OpenVLAValueError(
                f"{root}: info.json must describe each of its features as LeRobot does, by a dtype, a shape and names, "
                f"got {name!r}: {feature!r:.200}; copy the dataset again."
            )
    if not isinstance(info.get("splits"), (dict, type(None))):
        raise OpenVLAValueError(
            f"{root}: splits of info.json must name ranges of episodes, got {info['splits']!r:.200}."
        )
    return info


def require_paths(root: Path, info: Mapping[str, Any], v3: bool, filmed: bool) -> None:
    """Check that info.json's patterns name files by the numbers that there are."""
    numbers = "|".join(PLACE if v3 else ("episode_chunk", "episode_index"))
    for key, more in (("data_path", ""), *([("video_path", r"|\{video_key\}")] if filmed else [])):
        pattern = info.get(key)
        if not isinstance(pattern, str) or not re.fullmatch(rf"([^{{}}]|\{{({numbers})(:0?\d?d)?\}}{more})+", pattern):
            raise OpenVLAValueError(
                f"{root}: {key} of info.json must be a path with the numbers {{{numbers}}}, such as LeRobot "
                f"writes, got {pattern!r:.200}; copy the dataset again."
            )
    size = info.get("chunks_size", 1000)
    if not v3 and (type(size) is not int or size < 1):
        raise OpenVLAValueError(f"{root}: chunks_size of info.json must be a whole number above 0, got {size!r:.200}.")


def require_numbers(
    root: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str], kinds: tuple[type, ...] = (int,)
) -> None:
    """Check that every row of a table below meta holds these numbers."""
    for row in rows:
        if wrong := [name for name in names if type(row.get(name)) not in kinds]:
            raise OpenVLAValueError(
                f"{root}: every row of the tables below meta must hold the number {wrong[0]!r}, got "
                f"{row.get(wrong[0])!r:.200}; copy the dataset again."
            )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that holds one a line.

    Raises:
        ValueError: It is missing or damaged.
    """
    if not path.is_file():
        raise OpenVLAValueError(f"{path} is missing; the dataset is incomplete.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is damaged: {error}; copy the dataset again.") from error
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise OpenVLAValueError(f"{path} is damaged: every line must be an object, got {wrong[0]!r:.200}.")
    return rows
