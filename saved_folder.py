"""Keep a saved folder consistent: one set of weights, either whole weights or an adapter, all statistics.

transformers prefers model.safetensors to shards, and leaves the one in place when it writes the other; loading would
then take old weights. ``loading.attach_package`` gives this module to the models
(``PrismaticPreTrainedModel.saved_folder``); code beside a checkpoint saves as transformers does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .actions_openvla import validate_norm_stats
from .configuration_openvla import ADAPTER_CONFIG_FILE
from .errors_openvla import OpenVLAValueError

logger = logging.get_logger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE)  # in transformers' order of preference
SHARD_NUMBER = r"-\d{5}-of-\d{5}\.safetensors"


@contextmanager
def one_set_of_weights(folder: str | os.PathLike, variant: str | None = None) -> Iterator[None]:
    """Context manager that removes weights of an earlier save in another layout after new weights were written.

    It removes what transformers would load in place of the new weights, and the other layout of the same format:
    model.safetensors beside new shards, shards and their index beside a new model.safetensors, both beside a new
    pytorch_model.bin.

    Args:
        folder: Where the weights are written.
        variant: ``save_pretrained``'s argument, a part of the files' names.
    """
    folder, names = Path(folder), [_variant_name(name, variant) for name in LAYOUTS]
    before = {name: _file_state(folder / name) for name in names}
    yield
    written = [name for name in names if _file_state(folder / name) not in (None, before[name])]
    if len(written) != 1:
        return
    rank = names.index(written[0])
    stale = [name for name in names[: max(rank + 1, 2)] if before[name] and name != written[0]]
    if names[1] in stale:
        stem = re.escape(names[0].removesuffix(".safetensors"))
        stale += [path.name for path in folder.iterdir() if re.fullmatch(stem + SHARD_NUMBER, path.name)]
    for name in stale:
        (folder / name).unlink()
    if stale:
        logger.info(f"{folder}: removed {', '.join(stale)} of an earlier save.")


def _variant_name(name: str, variant: str | None) -> str:
    """Return the name that transformers gives to a weights file of a variant."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written again; None where there is no file."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def warn_of_two_sets(folder: str | os.PathLike) -> None:
    """Warn where a folder holds model.safetensors and shards, of which transformers loads the former."""
    if (Path(folder) / SINGLE_FILE).is_file() and (Path(folder) / INDEX_FILE).is_file():
        logger.warning_once(
            f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}, of two saves. The former is read, as transformers does; "
            "if the shards are the newer weights, delete it, else delete the index and the shards."
        )


def _weights_in(folder: str | os.PathLike) -> str | None:
    """Return the name of a local folder's whole weights (a file or an index); None where it holds none."""
    return next((name for name in LAYOUTS if os.path.isfile(os.path.join(folder, name))), None)


def _has_adapter(folder: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_FILE))


def refuse_two_kinds(folder: str | os.PathLike) -> None:
    """Raise ValueError where a local folder holds both an adapter and whole weights, one of which would be ignored."""
    weights = _weights_in(folder)
    if weights and _has_adapter(folder):
        raise OpenVLAValueError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_FILE}) and whole weights ({weights}); which of them is "
            "meant cannot be told. Move the adapter's files (adapter_*, openvla_adapter.json) to a folder of their own."
        )


def require_own_kind(folder: str | os.PathLike, is_adapter: bool) -> None:
    """Raise ValueError before an adapter is saved beside whole weights, or whole weights beside an adapter."""
    if is_adapter:
        kind, other_kind, other_file = "an adapter", "whole weights", _weights_in(folder)
    else:
        kind, other_kind = "whole weights", "an adapter"
        other_file = ADAPTER_CONFIG_FILE if _has_adapter(folder) else None
    if other_file:
        raise OpenVLAValueError(
            f"{folder} holds {other_kind} ({other_file}), and {kind} beside it could not be told from it when it is "
            "loaded. Give another folder, or delete those files first."
        )


def other_statistics(model: Any, file: Path) -> dict[str, dict[str, Any]]:
    """Return the statistics in a folder's file for datasets that this model does not know.

    Where the file has other numbers under one key, and the model was not loaded from this folder, the file is
    copied to ``*.replaced.json``, with a warning.
    """
    if not file.is_file():
        return {}
    try:
        in_file = json.loads(file.read_text(encoding="utf-8"))
        validate_norm_stats(in_file, model.config.normalization)
    except ValueError as error:
        raise OpenVLAValueError(
            f"{file} is there already and not usable ({error}); mend or delete it first."
        ) from error
    in_model = json.loads(json.dumps(model.norm_stats))
    replaced = [key for key in in_file if key in in_model and _differ(in_file[key], in_model[key])]
    source = model.config._name_or_path
    if replaced and not (os.path.isdir(source) and os.path.samefile(source, file.parent)):
        backup = file.with_suffix(".replaced.json")
        shutil.copyfile(file, backup)
        logger.warning(
            f"{file} had other numbers than this model for {replaced}; the model's replace them, and the file is "
            f"kept as {backup.name}. If those were the robot's, as the published scripts write them, give them to "
            "the model, model.add_norm_stats(key, statistics), and save again."
        )
    return {key: statistics for key, statistics in in_file.items() if key not in in_model}


def _differ(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return whether two statistics of a dataset disagree on a field of actions or proprio that both have."""
    pairs = [(first.get(part) or {}, second.get(part) or {}) for part in ("action", "proprio")]
    return any(one[name] != other[name] for one, other in pairs for name in {*one} & {*other})
