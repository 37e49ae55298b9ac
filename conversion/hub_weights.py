"""The weight files of a Hub folder: safetensors or pytorch_model.bin, in one file or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors_openvla import OpenVLAValueError
from ..saved_folder import INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE, SINGLE_FILE, warn_of_two_sets
from .files import link_or_copy
from .safetensors_io import require_digests, tensor_digests, tensor_names
from .torch_archive import load_state_dict, require_intact


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file that holds each tensor of a Hub folder, as transformers loads it.

    Raises:
        ValueError: There are no weights, or an index names a file outside the folder or a missing one.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    warn_of_two_sets(folder)
    if single.is_file():
        return dict.fromkeys(tensor_names(single), single)
    if index.is_file():
        return _read_index(index)
    raise OpenVLAValueError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder of whole weights without a variant in "
        "their names. An adapter becomes one with: openvla merge ADAPTER OUT."
    )


def has_safetensors(folder: Path) -> bool:
    """Return whether a Hub folder's weights are safetensors, not only pytorch_model.bin."""
    return any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)) or not any(
        (folder / name).is_file() for name in (PICKLED_INDEX_FILE, PICKLED_FILE)
    )


def read_pickled_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a Hub folder that has pytorch_model.bin, in one file or in shards; they are mapped from disk.

    Raises:
        ValueError: As :func:`~.torch_archive.load_state_dict` and :func:`weight_files`.
    """
    index = folder / PICKLED_INDEX_FILE
    if (folder / PICKLED_FILE).is_file() or not index.is_file():
        require_intact(folder / PICKLED_FILE)
        return load_state_dict(folder / PICKLED_FILE)
    files = _read_index(index)
    for path in set(files.values()):
        require_intact(path)
    shards = {path: load_state_dict(path) for path in set(files.values())}
    missing = sorted(name for name, path in files.items() if name not in shards[path])
    if missing:
        raise OpenVLAValueError(f"{index} names tensors that are not in their files: {missing}.")
    return {name: shards[path][name] for name, path in files.items()}


def link_weights(source: Path, folder: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Link weight files into another folder, or copy them and compare the copies.

    Args:
        source: The folder that holds them; its index is linked too where it is the one in use.
        folder: Where to link them.
        files: The file that holds each tensor (:func:`weight_files`).

    Returns:
        The sha256 of every tensor's bytes.

    Raises:
        ValueError: A copy does not equal its source.
    """
    index = [] if source / SINGLE_FILE in files.values() else source.glob(INDEX_FILE)
    linked = [link_or_copy(file, folder / file.name) for file in {*files.values(), *index}]
    digests = tensor_digests(files)
    if not all(linked):
        require_digests(weight_files(folder), digests)
    return digests


def _read_index(index: Path) -> dict[str, Path]:
    """Return the weight map of an index; every file must lie in the index's folder."""
    folder = index.parent
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise OpenVLAValueError(f"{index} is no index of weight files: {error}.") from error
    files = {}
    for name, file in weight_map.items():
        path = folder / file
        if not file or Path(file).name != file:
            raise OpenVLAValueError(f"{index} names {file!r}, which lies outside the folder; refused.")
        if not path.is_file():
            raise OpenVLAValueError(f"{index} names {file!r}, which is not there. Download it again.")
        files[name] = path
    return files
