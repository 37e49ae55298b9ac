"""Compute the statistics of a dataset's actions and proprio, as dataset_statistics.json of a checkpoint holds them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..actions_openvla import NORMALIZATIONS, NormalizationStatistics
from ..configuration_openvla import write_json
from ..dimension_labels import END_EFFECTOR_DIMENSIONS, dimension_labels
from ..errors_openvla import OpenVLAValueError
from .doctor import Finding, run_checks
from .episodes import DatasetError, EpisodeReader, usable_episodes, warn_skipped
from .file_cache import cache_folder
from .findings import CheckInput
from .lerobot import LeRobotReader
from .utils import read_json

# Version of the cache's content; increase it when the content changes, so that older caches are ignored.
_VERSION = 5


def compute_statistics(
    reader: EpisodeReader,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute statistics over all steps of a dataset in one pass, without decoding images.

    Args:
        reader: The dataset.
        skip_bad: Skip, count and warn about episodes that cannot be used; otherwise the first one raises.
        cache_dir: Where to cache the result under the reader's digest. Default: ``default_cache_dir()``. Nothing is
            cached if the reader has no digest.
        progress: Show a progress bar.

    Returns:
        ``{"action": {...}, "proprio": {...}, "num_transitions": n, "num_trajectories": n, "num_skipped": n}``, the
        dataset's entry in ``config.norm_stats``. "action" and "proprio" hold lists ``mean``, ``std``, ``min``, ``max``,
        ``q01``, ``q99`` (float64, equal to numpy's over all steps); "action" also ``mask`` (without the field
        ``action_mask``, the last of seven dimensions is a gripper and False if all its values are in [-1, 1]).
        "proprio" is missing if the fields name none.

    Warns:
        UserWarning: A dimension never changes, or a check of ``openvla.data.doctor`` has a finding.

    Raises:
        DatasetError: An episode cannot be used and ``skip_bad`` is not set.
        ValueError: No episode can be used, or the mask's length is not the action's.
    """
    statistics, findings = statistics_and_findings(reader, skip_bad=skip_bad, cache_dir=cache_dir, progress=progress)
    for finding in findings:
        if finding.check != "constant-gripper":  # _warn_constant has warned about it
            warnings.warn(f"{reader.name}: {finding.text()}", stacklevel=2)
    return statistics


def statistics_and_findings(
    reader: EpisodeReader,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the statistics of ``compute_statistics`` and the findings of ``doctor.run_checks`` from the same pass."""
    file = cache_file(reader, cache_dir)
    cached = _read_cache(file) if file else None
    if cached is None:
        cached = cache_content(reader, read_values(reader, range(len(reader)), skip_bad, progress))
        if file:
            write_cache(file, cached)
    else:
        reader.restore_usable_lengths(cached["lengths"])
    if cached["skipped"] and not skip_bad:
        raise DatasetError(cached["skipped"][0])
    if cached["lost_tasks"]:
        warnings.warn(
            f"{reader.name}: drop_noops leaves no episode of the tasks {cached['lost_tasks']}, which will not be "
            "learnt. Check their actions, or set drop_noops: false.",
            stacklevel=2,
        )
    warn_skipped(cached["skipped"], len(reader), reader.name)
    for key in ("action", "proprio"):
        _warn_constant(cached["statistics"], reader.name, key)
    _warn_normalised_gripper(cached["statistics"]["action"], reader)
    return cached["statistics"], [Finding(**finding) for finding in cached["findings"]]


def cache_file(reader: EpisodeReader, cache_dir: str | os.PathLike | None = None) -> Path | None:
    """Return the file that caches a dataset's statistics; None if the reader has no digest."""
    digest = reader.digest()
    return (Path(cache_dir) if cache_dir else default_cache_dir()) / f"{digest}.json" if digest else None


def write_cache(file: Path, content: Mapping[str, Any]) -> None:
    """Write what ``cache_content`` returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def default_cache_dir() -> Path:
    """Return the cache's folder: $OPENVLA_CACHE/statistics, else openvla/statistics in the user's cache folder."""
    return cache_folder() / "statistics"


def _read_cache(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError:
        return None
    return content if content.get("version") == _VERSION else None


@dataclass
class EpisodeValues:
    """The numbers of episodes from which their statistics are computed.

    Attributes:
        actions: float64 ``(length, action_dim)`` of each usable episode.
        proprios: float64 ``(length, proprio_dim)`` of each usable episode; empty without proprio.
        tasks: First instructions of the usable episodes.
        skipped: Errors of the others.
        lengths: ``EpisodeReader.usable_lengths`` of these episodes.
        noop_tasks: Instructions of episodes that ``drop_noops`` leaves empty.
    """

    actions: list[np.ndarray] = field(default_factory=list)
    proprios: list[np.ndarray] = field(default_factory=list)
    tasks: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    noop_tasks: set[str] = field(default_factory=set)


def read_values(reader: EpisodeReader, indices: range, skip_bad: bool, progress: bool) -> EpisodeValues:
    """Read the numbers of episodes; the arguments but ``indices`` are those of ``compute_statistics``."""
    values = EpisodeValues()
    episodes = usable_episodes(reader, values.skipped, indices) if skip_bad else (reader[index] for index in indices)
    with tqdm(total=len(indices), desc=f"statistics of {reader.name}", unit="episode", disable=not progress) as bar:
        for episode in episodes:
            values.actions.append(episode.actions)
            if episode.proprio is not None:
                values.proprios.append(episode.proprio)
            values.tasks.add(episode.instructions[0].strip())
            bar.update()
    values.lengths = {key: length for key, length in reader.usable_lengths().items() if int(key) in indices}
    values.noop_tasks = {text for index, text in reader.noop_only_instructions.items() if index in indices}
    return values


def cache_content(reader: EpisodeReader, read: EpisodeValues) -> dict[str, Any]:
    """Return what the cache holds of a dataset, given the values of all its episodes."""
    actions, proprios, skipped = read.actions, read.proprios, read.skipped
    if not actions:
        first = f" The first: {skipped[0]}" if skipped else ""
        raise OpenVLAValueError(f"{reader.root}: none of its {len(reader)} episodes can be used.{first}")
    values = {"action": np.concatenate(actions)}
    if proprios:
        values["proprio"] = np.concatenate(proprios)
    with np.errstate(over="ignore", invalid="ignore"):  # NormalizationStatistics refuses values that are not finite
        statistics: dict[str, Any] = {key: describe(array) for key, array in values.items()}
    for key, entry in statistics.items():
        for normalization in NORMALIZATIONS:
            NormalizationStatistics(entry, f"{reader.name}: the statistics of its {key}", normalization)
    statistics["action"]["mask"] = action_mask(values["action"], reader)
    statistics |= {
        "num_transitions": len(values["action"]),
        "num_trajectories": len(actions),
        "num_skipped": len(skipped),
    }
    check_input = CheckInput(
        reader.name, statistics["action"], reader.fields, action_column_names(reader), actions, proprios
    )
    return {
        "version": _VERSION,
        "statistics": statistics,
        "skipped": skipped,
        "lengths": read.lengths,
        "lost_tasks": sorted(read.noop_tasks - read.tasks),
        "findings": [asdict(finding) for finding in run_checks(check_input)],
    }


def action_column_names(reader: EpisodeReader) -> list[str]:
    """Return the names of the action's columns and, for LeRobot datasets, the names of their dimensions."""
    columns = [column for column in reader.fields.action if column]
    if not isinstance(reader, LeRobotReader):
        return columns
    names = list(columns)
    for column in columns:
        name = column.partition("[")[0]
        feature = reader.info.get("features", {}).get(reader.stored_names.get(name, name)) or {}
        stored = feature.get("names")
        groups = stored.values() if isinstance(stored, dict) else [stored or []]
        names += [str(entry) for group in groups for entry in (group if isinstance(group, list) else [group])]
    return names


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """Return mean, std, max, min, q01 and q99 per dimension of float64 ``(count, dimensions)``."""
    return {
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
    }


def action_mask(actions: np.ndarray, reader: EpisodeReader) -> list[bool]:
    """Return which dimensions are normalised: the field ``action_mask``, else all but the gripper of an end effector.

    Raises:
        ValueError: The mask has another length than the action, or a dimension that is not normalised has values
            outside [-1, 1], the range of the model's output.
    """
    dimension = actions.shape[1]
    mask = reader.fields.action_mask
    if mask is None:
        is_gripper = dimension == len(END_EFFECTOR_DIMENSIONS) and bool((np.abs(actions[:, -1]) <= 1).all())
        return [True] * (dimension - 1) + [not is_gripper]
    if len(mask) != dimension:
        raise OpenVLAValueError(
            f"{reader.name}: action_mask has {len(mask)} entries, but the action has {dimension} dimensions."
        )
    for index in np.flatnonzero(~np.array(mask)):
        low, high = actions[:, index].min(), actions[:, index].max()
        if low < -1 or high > 1:
            raise OpenVLAValueError(
                f"{reader.name}: action[{index}] is not normalised (action_mask) but goes from {low:g} to {high:g}; "
                "the model predicts values in [-1, 1]. Set its mask to true, or the field gripper."
            )
    return list(mask)


def _warn_constant(statistics: Mapping[str, Any], name: str, key: str) -> None:
    """Warn about dimensions that never change, which often are a wrong column."""
    if key not in statistics:
        return
    low, high = statistics[key]["min"], statistics[key]["max"]
    constant = [index for index, pair in enumerate(zip(low, high)) if pair[0] == pair[1]]
    if constant:
        if key == "action":
            labels = [label for label, _ in dimension_labels(len(low), name)]
        else:
            labels = [f"{key}[{index}]" for index in range(len(low))]
        listed = ", ".join(f"{key}[{index}] ({labels[index]}) = {low[index]:g}" for index in constant)
        hint = "Nothing can be learnt from it; often it is a wrong column."
        warnings.warn(f"{name}: constant over the whole dataset: {listed}. {hint}", stacklevel=3)


def _warn_normalised_gripper(action: Mapping[str, Any], reader: EpisodeReader) -> None:
    """Warn if the last of seven dimensions is not treated as a gripper because of a value outside [-1, 1]."""
    if reader.fields.action_mask is None and len(action["mask"]) == len(END_EFFECTOR_DIMENSIONS) and action["mask"][-1]:
        warnings.warn(
            f"{reader.name}: action[6] goes from {action['min'][-1]:g} to {action['max'][-1]:g}, beyond [-1, 1], so it "
            "is not treated as a gripper but normalised like a movement. If it is a gripper, set the field gripper: "
            "clipped or gripper_range; if not, set the field action_mask.",
            stacklevel=3,
        )


def require_matching(statistics: Mapping[str, Any], reader: EpisodeReader) -> None:
    """Check that the statistics of a checkpoint or another run have the dataset's dimensions.

    Raises:
        ValueError: Action or proprio has another number of dimensions.
    """
    for key, dimension in (("action", reader.action_dim), ("proprio", reader.proprio_dim)):
        if key not in statistics or not dimension:
            continue
        entry = statistics[key]  # a checkpoint may have q01 and q99, or min and max
        expected = len(entry["min"] if entry.get("q01") is None else entry["q01"])
        if expected != dimension:
            raise OpenVLAValueError(
                f"{reader.name}: {key} has {dimension} dimensions, but {expected} in the statistics."
            )


def as_norm_stats(readers: Sequence[EpisodeReader], **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Return the statistics of several datasets by name, as ``config.norm_stats`` holds them.

    Args:
        readers: The datasets.
        **kwargs: Options of ``compute_statistics``.

    Raises:
        ValueError: Two datasets have the same name, or ``compute_statistics`` raises.
    """
    require_names_differ(readers)
    return {reader.name: compute_statistics(reader, **kwargs) for reader in readers}


def require_names_differ(readers: Sequence[EpisodeReader]) -> None:
    """Raise ValueError if two datasets have the same name."""
    names = [reader.name for reader in readers]
    if len(set(names)) != len(names):
        raise OpenVLAValueError(f"Datasets need different names for their statistics, got {names}; pass name=.")
