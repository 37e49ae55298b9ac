"""Statistics of a dataset's actions and proprio, as a checkpoint's dataset_statistics.json holds them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, NORMALIZATIONS, NormalizationStatistics, dimension_labels
from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAValueError
from .doctor import Finding, Recording, examine
from .episodes import DemonstrationError, EpisodeReader, read_json, usable_episodes, warn_skipped

# What is computed; raised when that changes, so that older caches are not taken.
_VERSION = 4


def compute_statistics(
    reader: EpisodeReader,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Statistics over every step of a dataset, in one pass over its tables; no image is decoded.

    Args:
        reader: The dataset.
        skip_bad: Leave out episodes that cannot be used, count them and warn; otherwise the first one raises.
        cache_dir: Where to keep the result, under a digest of the data's files and fields. None: where
            ``cache_folder`` says. Nothing is kept where the reader has no digest.
        progress: Show a progress bar.

    Returns:
        ``{"action": {...}, "proprio": {...}, "num_transitions": n, "num_trajectories": n, "num_skipped": n}`` with
        lists ``mean``, ``std``, ``min``, ``max``, ``q01``, ``q99`` (float64, equal to numpy's over all steps) and
        ``mask`` (without the field ``action_mask`` the last of seven is a gripper where all of it is in [-1, 1]).
        ``proprio`` is there where the fields name one. This is what stands under the dataset's name in norm_stats.

    Warns:
        UserWarning: A dimension never changes, or numbers look wrong (``data_doctor``).

    Raises:
        DemonstrationError: An episode cannot be used, without ``skip_bad``.
        ValueError: No episode can be used, or a mask has another length than the action.
    """
    statistics, findings = statistics_and_findings(reader, skip_bad=skip_bad, cache_dir=cache_dir, progress=progress)
    for finding in findings:
        if finding.check != "constant-gripper":  # which is warned of as a constant dimension
            warnings.warn(f"{reader.name}: {finding.text()}", stacklevel=2)
    return statistics


def statistics_and_findings(
    reader: EpisodeReader,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[Finding]]:
    """Statistics as ``compute_statistics`` gives them, and what ``data_doctor`` found in the same pass."""
    digest = reader.digest()
    file = (Path(cache_dir) if cache_dir else cache_folder()) / f"{digest}.json"
    cached = _cached(file) if digest else None
    if cached is None:
        cached = {"version": _VERSION, **_pass(reader, skip_bad, progress)}
        if digest:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, cached)
    else:
        reader.take_usable_lengths(cached["lengths"])
    if cached["skipped"] and not skip_bad:
        raise DemonstrationError(cached["skipped"][0])
    if cached["lost_tasks"]:
        warnings.warn(
            f"{reader.name}: drop_noops leaves no episode of {cached['lost_tasks']}, which will not be learnt. Look at "
            "their actions, or take drop_noops: false.",
            stacklevel=2,
        )
    warn_skipped(cached["skipped"], len(reader), reader.name)
    for what in ("action", "proprio"):
        warn_constant(cached["statistics"], reader.name, what)
    warn_normalised_gripper(cached["statistics"]["action"], reader)
    return cached["statistics"], [Finding(**finding) for finding in cached["findings"]]


def cache_folder() -> Path:
    """Where statistics are kept: $OPENVLA_CACHE, else openvla/statistics in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("OPENVLA_CACHE") or Path(home) / "openvla") / "statistics"


def _cached(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError:
        return None
    return content if content.get("version") == _VERSION else None


def _pass(reader: EpisodeReader, skip_bad: bool, progress: bool) -> dict[str, Any]:
    skipped: list[str] = []
    episodes = usable_episodes(reader, skipped) if skip_bad else iter(reader)
    actions, proprios, tasks = [], [], set()
    with tqdm(total=len(reader), desc=f"statistics of {reader.name}", unit="episode", disable=not progress) as bar:
        for episode in episodes:
            actions.append(episode.actions)
            proprios.append(episode.proprio)
            tasks.add(episode.instructions[0].strip())
            bar.update()
    if not actions:
        first = f" The first: {skipped[0]}" if skipped else ""
        raise OpenVLAValueError(f"{reader.root}: none of its {len(reader)} episodes can be used.{first}")
    columns = {"action": np.concatenate(actions)}
    if proprios[0] is not None:
        columns["proprio"] = np.concatenate(proprios)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        statistics: dict[str, Any] = {what: describe(values) for what, values in columns.items()}
    for what, held in statistics.items():
        for normalization in NORMALIZATIONS:
            NormalizationStatistics(held, f"{reader.name}: the statistics of its {what}", normalization)
    statistics["action"]["mask"] = action_mask(columns["action"], reader)
    statistics |= {
        "num_transitions": len(columns["action"]),
        "num_trajectories": len(actions),
        "num_skipped": len(skipped),
    }
    lost_tasks = sorted(set(reader.emptied.values()) - tasks)
    known = [proprio for proprio in proprios if proprio is not None]
    names = dimension_names(reader)
    findings = examine(Recording(reader.name, statistics["action"], reader.fields, names, actions, known))
    return {
        "statistics": statistics,
        "skipped": skipped,
        "lengths": reader.usable_lengths(),
        "lost_tasks": lost_tasks,
        "findings": [asdict(finding) for finding in findings],
    }


def dimension_names(reader: EpisodeReader) -> list[str]:
    """Return names of the action's columns and, of LeRobot's, of their dimensions."""
    columns = [column for column in reader.fields.action if column]
    info = getattr(reader, "info", None) if reader.format == "lerobot" else None
    for column in list(columns):
        stored = column.partition("[")[0]
        stored = reader.stored.get(stored, stored) if info else stored
        names = ((info or {}).get("features", {}).get(stored) or {}).get("names")
        groups = names.values() if isinstance(names, dict) else [names or []]
        columns += [str(name) for group in groups for name in (group if isinstance(group, list) else [group])]
    return columns


def describe(values: np.ndarray) -> dict[str, list[float]]:
    """What the normalisations need of float64 ``(count, dimensions)``: mean, std, max, min, q01, q99."""
    return {
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
    }


def action_mask(actions: np.ndarray, reader: EpisodeReader) -> list[bool]:
    """Which dimensions are normalised: as the fields say, else all but the gripper of an end effector.

    Raises:
        ValueError: The mask has another length, or a dimension that is not normalised leaves [-1, 1], where the model
            answers.
    """
    dimension = actions.shape[1]
    mask = reader.fields.action_mask
    if mask is None:
        gripper_fits = dimension == len(END_EFFECTOR_DIMENSIONS) and bool((np.abs(actions[:, -1]) <= 1).all())
        return [True] * (dimension - 1) + [not gripper_fits]
    if len(mask) != dimension:
        raise OpenVLAValueError(
            f"{reader.name}: action_mask has {len(mask)} entries, the action {dimension} dimensions."
        )
    for index in np.flatnonzero(~np.array(mask)):
        low, high = actions[:, index].min(), actions[:, index].max()
        if low < -1 or high > 1:
            raise OpenVLAValueError(
                f"{reader.name}: action[{index}] is not normalised (action_mask) but goes from {low:g} to {high:g}; "
                "the model answers in [-1, 1]. Set its mask to true, or the field gripper."
            )
    return list(mask)


def warn_constant(statistics: Mapping[str, Any], name: str, what: str) -> None:
    """Warn of dimensions that never change: they carry nothing, and often are a wrong column."""
    if what not in statistics:
        return
    low, high = statistics[what]["min"], statistics[what]["max"]
    constant = [index for index, pair in enumerate(zip(low, high)) if pair[0] == pair[1]]
    if constant:
        labels = (
            dimension_labels(len(low), name) if what == "action" else [(f"{what}[{i}]", "") for i in range(len(low))]
        )
        listed = ", ".join(f"{what}[{i}] ({labels[i][0]}) = {low[i]:g}" for i in constant)
        what_it_means = "Nothing can be learnt from it; often it is a wrong column."
        warnings.warn(f"{name}: constant over the whole dataset: {listed}. {what_it_means}", stacklevel=3)


def warn_normalised_gripper(action: Mapping[str, Any], reader: EpisodeReader) -> None:
    """Warn where the last of seven dimensions is no gripper because a value leaves [-1, 1]."""
    if reader.fields.action_mask is None and len(action["mask"]) == len(END_EFFECTOR_DIMENSIONS) and action["mask"][-1]:
        warnings.warn(
            f"{reader.name}: action[6] goes from {action['min'][-1]:g} to {action['max'][-1]:g}, beyond [-1, 1], so it "
            "is not taken for a gripper but normalised like a movement. If it is one, give the field gripper: clipped "
            "or gripper_range; if not, say so with the field action_mask.",
            stacklevel=3,
        )


def require_matching(statistics: Mapping[str, Any], reader: EpisodeReader) -> None:
    """Check that statistics (of a checkpoint, or of another run) describe the data's dimensions.

    Raises:
        ValueError: Action or proprio has another number of dimensions.
    """
    for what, found in (("action", reader.action_dim), ("proprio", reader.proprio_dim)):
        if what not in statistics or not found:
            continue
        one = statistics[what]  # a checkpoint may hold either pair
        held = len(one["min"] if one.get("q01") is None else one["q01"])
        if held != found:
            raise OpenVLAValueError(f"{reader.name}: {what} has {found} dimensions, but {held} in the statistics.")


def as_norm_stats(readers: Sequence[EpisodeReader], **options: Any) -> dict[str, dict[str, Any]]:
    """Statistics of several datasets under their names, as ``config.norm_stats`` takes them; options of the above.

    Raises:
        ValueError: Two datasets have one name, and what ``compute_statistics`` raises.
    """
    require_names_differ(readers)
    return {reader.name: compute_statistics(reader, **options) for reader in readers}


def require_names_differ(readers: Sequence[EpisodeReader]) -> None:
    """Raise ValueError where two datasets have one name."""
    names = [reader.name for reader in readers]
    if len(set(names)) != len(names):
        raise OpenVLAValueError(f"Datasets need different names for their statistics, got {names}; give name=.")
