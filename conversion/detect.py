"""Detect the layout of a checkpoint from its content."""

from __future__ import annotations

from pathlib import Path

from ..errors_openvla import OpenVLAValueError
from ..loading import MODEL_CLASSES, refuse_model_type
from ..saved_folder import refuse_two_kinds
from .files import read_json
from .oft_format import part_files, read_unmerged_adapter

NATIVE_RUN = "native run"


def detect_layout(source: Path) -> str:
    """Return the layout of a checkpoint in words: ``NATIVE_RUN``, a Hub folder, or an OpenVLA-OFT run.

    Raises:
        FileNotFoundError: The folder has no config.json.
        ValueError: The model is of another type, or the folder holds an adapter and whole weights.
    """
    refuse_two_kinds(source)
    if read_unmerged_adapter(source) is not None:
        return "OpenVLA-OFT run with an adapter"
    fields = read_json(source / "config.json")
    if "vla" in fields or "model" in fields:
        return NATIVE_RUN
    if fields.get("model_type") in MODEL_CLASSES:
        parts = ", ".join(path.name for path in part_files(source).values())
        return f"Hub folder with {parts}" if parts else "Hub folder"
    refuse_model_type(source, fields.get("model_type"))
    raise OpenVLAValueError(
        f'{source}/config.json is neither a native Prismatic run\'s ("vla" or "model") nor that of a model of type '
        f"{sorted(MODEL_CLASSES)}."
    )
