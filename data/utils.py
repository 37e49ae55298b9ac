"""Helpers for reading datasets: optional packages, YAML and JSON."""

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


def parse_yaml(text: str | bytes, source: str) -> dict[str, Any]:
    """Return the mapping in a YAML text.

    Args:
        text: The text, or its bytes in UTF-8.
        source: Start of the error message: the file or the option that the text is from.

    Raises:
        OpenVLAValueError: The text is not valid YAML, or holds something else.
    """
    yaml = require("yaml", source)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OpenVLAValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise OpenVLAValueError(f"{source} must hold a mapping such as {{name: value}}, got {type(content).__name__}.")
    return content


def read_json(path: DataPath) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: The file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OpenVLAValueError(f"{path} is not valid JSON: {error}.") from error
