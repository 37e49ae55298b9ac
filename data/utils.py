"""Helpers for reading datasets: optional packages and JSON files."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError

if TYPE_CHECKING:
    from .remote import DataPath


def require(package: str, purpose: str, install: str = "'openvla[train]'") -> Any:
    """Import and return an optional package.

    Args:
        package: The module to import.
        purpose: Start of the error message: what needs the package.
        install: What the error message tells the user to pass to ``pip install``.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise OpenVLAImportError(f"{purpose} needs {package}: pip install {install} ({error})") from error


def cache_folder() -> Path:
    """Return the folder of what can be made or downloaded again: $OPENVLA_CACHE, else openvla in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("OPENVLA_CACHE") or Path(home) / "openvla")


def read_json(path: DataPath) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: The file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is not valid JSON: {error}.") from error
