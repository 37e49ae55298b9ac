"""Open a dataset: detect its format from its content and return the matching reader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors_openvla import OpenVLAValueError
from .episodes import EpisodeReader
from .hdf5 import HDF5Reader, hdf5_files
from .lerobot import LeRobotReader
from .presets import AUTO, NO_PRESET
from .remote import RemotePath, dataset_path
from .replay_buffer import ReplayBufferReader, replay_buffer
from .rlds import RLDSReader, rlds_folder


def open_dataset(
    path: str | os.PathLike,
    *,
    preset: str | None = AUTO,
    fields: Mapping[str, Any] | None = None,
    split: str = "train",
    name: str | None = None,
) -> EpisodeReader:
    """Open a LeRobot (v2.0 to v3.0), RLDS, HDF5 or zarr dataset; the format is detected from the content.

    For a torch ``Dataset`` or a list, see :class:`~openvla.data.torch_dataset.TorchDatasetReader`.

    Args:
        path: The dataset's folder, or one HDF5 or .zip file. For RLDS, the folder with features.json or its parent.
            LeRobot and RLDS datasets may be remote: ``hf://datasets/OWNER/NAME``, ``s3://``, ``gs://``, ``https://``
            (docs/data.md says where files are kept).
        preset: A key of ``presets.PRESETS``. "auto" selects by the dataset's name (RLDS), by the columns (HDF5 of
            LIBERO and ALOHA), or by the name where the gripper goes below 0 (LeRobot datasets of LIBERO). "none" or
            None uses no preset.
        fields: Fields of :class:`~openvla.data.columns.ColumnSpec` to replace.
        split: "train", "val", ... or "all": the split of the shards (RLDS), of info.json (LeRobot), or a name in the
            file's ``mask`` group (HDF5, as robomimic writes it). "train" selects every episode of an HDF5 file
            without masks.
        name: The key of the dataset's statistics in a checkpoint. Default: the dataset's own name.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The format is unknown, or the dataset has no episode.
        KeyError: A field names a column that does not exist.
        ImportError: The format needs a package of the extra ``train`` or ``zarr``, or the source one of its own.
        RemoteError: A remote dataset cannot be reached.
    """
    root = dataset_path(path)
    preset = None if str(preset).lower() == NO_PRESET else preset
    reader: EpisodeReader
    if (root / "meta" / "info.json").is_file():
        reader = LeRobotReader(root, preset=preset, fields=fields, name=name, split=split)
    elif folder := rlds_folder(root):
        reader = RLDSReader(folder, preset=preset, fields=fields, name=name, split=split)
    elif isinstance(root, RemotePath):
        raise OpenVLAValueError(_unknown_remote_dataset(root))
    elif files := hdf5_files(root):
        reader = HDF5Reader(root, files, preset=preset, fields=fields, name=name, split=split)
    elif buffer := replay_buffer(root):
        reader = ReplayBufferReader(buffer, preset=preset, fields=fields, name=name, split=split)
    else:
        entries = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else root.name
        raise OpenVLAValueError(
            f"{root} is not a dataset of a known format. Known formats: LeRobot v2.0 to v3.0 (meta/info.json), "
            "RLDS (features.json and .tfrecord files), HDF5 (.hdf5, .h5), zarr (meta/episode_ends). The path contains: "
            f"{entries}."
        )
    if not len(reader):
        raise OpenVLAValueError(f"{root} has no episode.")
    return reader


def _unknown_remote_dataset(path: RemotePath) -> str:
    """Return the message for a URL that has neither a LeRobot nor an RLDS dataset."""
    if path.dataset.can_list:
        content = f"It contains: {sorted(entry.name for entry in path.iterdir())[:8]}"
    else:
        content = f"Neither file is there: {path.dataset.refusal}"
    return (
        f"{path} is not a dataset that can be read from there: LeRobot v2.0 to v3.0 (meta/info.json) or RLDS "
        f"(features.json). Give the folder with that file; download HDF5 and zarr datasets first. {content}."
    )
