"""Names of GR00T's meta/modality.json: parts of the columns of a LeRobot dataset, for the fields.

``state.left_arm`` and ``action.left_arm`` are dimensions of a column, ``video.ego_view`` is a camera, and
``annotation.human.action.task_description`` a column of task numbers. Source: Isaac-GR00T, getting_started/
data_preparation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAKeyError, OpenVLAValueError
from .columns import dotted, parse_part
from .remote import DataPath
from .utils import read_json

_FILE = Path("meta", "modality.json")
# Columns that the entries of a modality divide where they name none.
_DEFAULT_COLUMNS = {"state": "observation.state", "action": "action"}
_MODALITIES = (*_DEFAULT_COLUMNS, "video", "annotation")


class Modality:
    """The names that a LeRobot dataset's modality.json defines.

    Args:
        root: The dataset's folder. Without the file, no name is defined.
        widths: Number of dimensions of every column by dotted name.

    Raises:
        OpenVLAValueError: An entry is not as GR00T writes it, or names a column or dimensions that do not exist.

    Attributes:
        columns: Column, or ``column[a:b]``, by name.
        annotations: Columns of task numbers.
    """

    def __init__(self, root: DataPath, widths: Mapping[str, int]) -> None:
        self.file, self.widths = root / _FILE, widths
        self.columns: dict[str, str] = {}
        content = read_json(self.file) if self.file.is_file() else {}
        for modality in _MODALITIES:
            for key, entry in _entries(self.file, content, modality).items():
                self.columns[f"{modality}.{key}"] = self._column(modality, key, entry)
        self.annotations = {column for name, column in self.columns.items() if name.startswith("annotation.")}

    def _column(self, modality: str, key: str, entry: Mapping[str, Any]) -> str:
        widths = self.widths
        default = _DEFAULT_COLUMNS.get(modality, f"{modality}.{key}")
        column = dotted(str(entry.get("original_key") or default))
        if column not in widths:
            raise OpenVLAValueError(f"{self.file}: {modality}.{key} is in the column {column!r}, which does not exist.")
        if modality not in _DEFAULT_COLUMNS:
            return column
        start, end = entry.get("start"), entry.get("end")
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= widths[column]:
            raise OpenVLAValueError(
                f"{self.file}: {modality}.{key} must have a start and an end within the {widths[column]} dimensions of "
                f"{column!r}, got {start!r} and {end!r}."
            )
        return f"{column}[{start}:{end}]"

    def resolved(self, fields: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Return fields with the names of modality.json replaced by columns; other names stay."""
        if not fields or not self.columns:
            return None if fields is None else dict(fields)
        resolved = dict(fields)
        for field in ("cameras", "action", "proprio"):
            if field in fields:
                parts = fields[field]
                parts = [parts] if isinstance(parts, str) else list(parts or ())
                resolved[field] = [self._resolved_part(part) for part in parts]
        for field in ("instruction", "relabel"):
            if fields.get(field):
                resolved[field] = self._resolved_part(fields[field])
        return resolved

    def _resolved_part(self, part: Any) -> Any:
        if not isinstance(part, str):
            return part
        name, dimensions = parse_part(dotted(part))
        if name not in self.columns:
            self._require_no_misspelling(name)
            return part
        column, taken = parse_part(self.columns[name])
        if dimensions == slice(None):
            return self.columns[name]
        if taken == slice(None):
            return f"{column}[{part.partition('[')[2]}"
        nested = range(taken.start, taken.stop)[dimensions]
        return f"{column}[{nested.start}:{nested.stop}]"

    def _require_no_misspelling(self, name: str) -> None:
        """Raise OpenVLAKeyError for a name of a modality that is neither defined nor a column."""
        if name.startswith(("state.", "action.", "video.")) and name not in self.widths:
            nearest = nearest_name(name, list(self.columns))
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise OpenVLAKeyError(f"{self.file} has no {name!r}.{hint} It names: {list(self.columns)}.")


def _entries(file: DataPath, content: Any, modality: str) -> Mapping[str, Mapping[str, Any]]:
    entries = content.get(modality) or {} if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise OpenVLAValueError(f"{file}: {modality} must map names to objects, got {entries!r:.200}; copy it again.")
    return entries
