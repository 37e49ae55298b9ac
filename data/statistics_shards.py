"""Statistics of a dataset from shards, each computed elsewhere: equal in every bit to those of one pass.

Quantiles cannot be merged from the quantiles of shards, so a shard's file holds the actions and proprio themselves.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .episodes import EpisodeReader
from .remote import local_path
from .statistics import EpisodeValues, cache_content, cache_file, compute_statistics, read_values, write_cache

# Version of the files' content; files of another version are refused.
_VERSION = 1


def write_statistics_shard(
    reader: EpisodeReader,
    file: str | os.PathLike,
    shard: int,
    num_shards: int,
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Read the numbers of a dataset's episodes of one shard, and write what ``merge_statistics`` needs of them.

    Args:
        reader: The dataset, or a copy of it.
        file: The .npz file to write: 8 bytes for each number of each action and state.
        shard: Which part of the episodes, from 1 to ``num_shards``.
        num_shards: Number of parts.
        skip_bad: As in ``compute_statistics``.
        progress: Show a progress bar.

    Returns:
        Number of ``episodes``, ``steps`` and ``skipped`` episodes.

    Raises:
        DatasetError: An episode cannot be used, and ``skip_bad`` is not set.
        OpenVLAValueError: There is no such shard or no episode in it, a copy of the dataset cannot be recognised, or
            the file is a URL.
    """
    if not 1 <= shard <= num_shards <= len(reader):
        raise OpenVLAValueError(
            f"A shard is K/N, with K from 1 to N and N at most the number of episodes ({len(reader)}); got "
            f"{shard}/{num_shards}."
        )
    file = local_path(file)
    digest = _copy_digest(reader)
    _ = reader.action_dim  # those of the first usable episode, with which the others are compared
    indices = range(len(reader) * (shard - 1) // num_shards, len(reader) * shard // num_shards)
    values = read_values(reader, indices, skip_bad, progress)
    header = {
        "version": _VERSION,
        "digest": digest,
        "shard": shard,
        "num_shards": num_shards,
        "tasks": sorted(values.tasks),
        "skipped": values.skipped,
        "lengths": values.lengths,
        "noop_tasks": sorted(values.noop_tasks),
    }
    arrays: dict[str, Any] = {
        "header": np.array(json.dumps(header)),
        "episode_lengths": np.array([*map(len, values.actions)], np.int64),
    }
    for name, columns in (("actions", values.actions), ("proprios", values.proprios)):
        if columns:
            arrays[name] = np.concatenate(columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
    os.replace(temporary, file)
    return {
        "episodes": len(values.actions),
        "steps": int(arrays["episode_lengths"].sum()),
        "skipped": len(values.skipped),
    }


def merge_statistics(
    reader: EpisodeReader,
    files: Sequence[str | os.PathLike],
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Compute a dataset's statistics from its shards, and cache them as ``compute_statistics`` does.

    Args:
        reader: The dataset; its episodes are not read.
        files: Files of ``write_statistics_shard``, one for each shard, in any order.
        skip_bad: As in ``compute_statistics``.
        cache_dir: As in ``compute_statistics``.

    Returns:
        What ``compute_statistics`` returns.

    Raises:
        DatasetError: An episode of a shard cannot be used, and ``skip_bad`` is not set.
        OpenVLAValueError: A file is none of a shard or of another dataset or fields, or a shard is missing or doubled.
    """
    digest = _copy_digest(reader)
    shards: dict[int, tuple[Path, EpisodeValues]] = {}
    num_shards = 0
    for file in map(Path, files):
        header, values = _read_shard(file)
        if header["digest"] != digest:
            raise OpenVLAValueError(
                f"{file} is of another dataset than {reader.root}, or of other files, fields, preset, split or name; "
                "compute the shards again with this command's options."
            )
        num_shards = num_shards or header["num_shards"]
        if header["num_shards"] != num_shards:
            raise OpenVLAValueError(f"{file} is one of {header['num_shards']} shards, the others of {num_shards}.")
        if header["shard"] in shards:
            raise OpenVLAValueError(f"{file} and {shards[header['shard']][0]} are both shard {header['shard']}.")
        shards[header["shard"]] = (file, values)
    if missing := [f"{shard}/{num_shards}" for shard in range(1, num_shards + 1) if shard not in shards]:
        raise OpenVLAValueError(f"{reader.name}: the shards {missing} are missing; give the files of all.")
    merged = EpisodeValues()
    for _, (_, values) in sorted(shards.items()):
        for name in ("actions", "proprios", "skipped"):
            getattr(merged, name).extend(getattr(values, name))
        merged.tasks |= values.tasks
        merged.noop_tasks |= values.noop_tasks
        merged.lengths |= values.lengths
    cache = cache_file(reader, cache_dir)
    assert cache is not None  # _copy_digest has refused a reader without digest
    write_cache(cache, cache_content(reader, merged))
    return compute_statistics(reader, skip_bad=skip_bad, cache_dir=cache_dir, progress=False)


def _copy_digest(reader: EpisodeReader) -> str:
    """Return a digest by which a copy of the dataset on another machine is recognised."""
    digest = reader.digest(times=False)
    if digest is None or reader.fields.standardize is not None:
        raise OpenVLAValueError(
            f"{reader.name}: statistics in shards need a dataset in files, and fields without standardize (a function "
            "cannot be recognised on another machine). Compute the statistics in one pass."
        )
    return digest


def _read_shard(file: Path) -> tuple[dict[str, Any], EpisodeValues]:
    """Return the header and the values of a file of ``write_statistics_shard``.

    Raises:
        OpenVLAValueError: The file cannot be read, or is another.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            header = json.loads(str(stored["header"]))
            if header["version"] != _VERSION:
                raise OpenVLAValueError(f"its version is {header['version']}, not {_VERSION}; compute the shard again")
            ends = np.cumsum(stored["episode_lengths"])[:-1]
            parts = {
                name: [part.copy() for part in np.split(stored[name], ends)] if name in stored.files else []
                for name in ("actions", "proprios")
            }
        values = EpisodeValues(
            **parts,
            tasks=set(header["tasks"]),
            skipped=header["skipped"],
            lengths=header["lengths"],
            noop_tasks=set(header["noop_tasks"]),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise OpenVLAValueError(f"{file} cannot be read as a file of --statistics-shard: {error}.") from error
    return header, values
