"""Helpers for reading datasets: optional packages and JSON files."""

from __future__ import annotations

import importlib
import json
from typing import Any

from ..errors_openvla import OpenVLAImportError, OpenVLAValueError
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


def read_json(path: DataPath) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: The file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is not valid JSON: {error}.") from error
