"""Whose statistics stand behind an action: the datasets that a model knows, as methods of the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .actions_openvla import NormalizationStatistics, nearest_name, validate_norm_stats
from .errors_openvla import OpenVLAKeyError, OpenVLAValueError

logger = logging.get_logger(__name__)


class NormStatsMixin:
    """The statistics in a model's configuration; mixed into ``OpenVLAForActionPrediction``."""

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """Action statistics by dataset key; assigning checks and replaces all of them."""
        return self.config.norm_stats or {}

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, dict[str, Any]]) -> None:
        validate_norm_stats(norm_stats, self.config.normalization)
        self.config.norm_stats = norm_stats
        if self.config.default_unnorm_key not in norm_stats:
            self.config.default_unnorm_key = None

    def add_norm_stats(self, key: str, stats: dict[str, Any]) -> None:
        """Add (or replace) one dataset's statistics; they are saved with the model.

        Args:
            key: The name that ``unnorm_key`` will take.
            stats: ``{"action": {"q01": [...], "q99": [...], "mask": [...]}}`` or just the inner dictionary.

        Raises:
            ValueError: The statistics are inconsistent, not finite or inverted.
        """
        stats = stats if "action" in stats else {"action": stats}
        self.norm_stats = {**self.norm_stats, key: stats}

    def _other_statistics(self, file: Path) -> dict[str, dict[str, Any]]:
        """Return the statistics in a folder's file of datasets that this model does not know.

        Where the file has other numbers than the model under one key, and the model does not come from this folder, a
        warning says that the model's stay, and the file is kept under another name.

        Raises:
            ValueError: The file is not usable.
        """
        if not file.is_file():
            return {}
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            validate_norm_stats(there, self.config.normalization)
        except ValueError as error:
            raise OpenVLAValueError(
                f"{file} is there already and not usable ({error}); mend or delete it first."
            ) from error
        own = json.loads(json.dumps(self.norm_stats))
        other = [key for key in there if key in own and _differ(there[key], own[key])]
        source = self.config._name_or_path
        if other and not (os.path.isdir(source) and os.path.samefile(source, file.parent)):
            kept = file.with_suffix(".replaced.json")
            shutil.copyfile(file, kept)
            logger.warning(
                f"{file} had other numbers than this model for {other}; the model's replace them, and the file is kept "
                f"as {kept.name}. If those were the robot's, as the published scripts write them, give them to the "
                "model, model.add_norm_stats(key, statistics), and save again."
            )
        return {key: statistics for key, statistics in there.items() if key not in own}

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Number of action dimensions of a dataset."""
        return self.action_statistics(unnorm_key).dimension

    def action_statistics(self, unnorm_key: str | None = None) -> NormalizationStatistics:
        """How a dataset's actions are normalised; raises as ``resolve_unnorm_key`` does.

        Raises:
            ValueError: The dataset's actions have another number of dimensions than the model's.
        """
        key, config = self.resolve_unnorm_key(unnorm_key), self.config
        entry = self.norm_stats[key]["action"]
        statistics = NormalizationStatistics(
            entry, f"norm_stats[{key!r}]['action']", config.normalization, config.normalization_epsilon, key
        )
        if config.action_dim is not None and statistics.dimension != config.action_dim:
            raise OpenVLAValueError(
                f"The actions of {key!r} have {statistics.dimension} dimensions but this model answers with "
                f"{config.action_dim}; pass the unnorm_key of a dataset that it was trained on."
            )
        return statistics

    def proprio_statistics(self, unnorm_key: str | None = None) -> NormalizationStatistics:
        """How a dataset's proprio is normalised.

        Raises:
            ValueError: The dataset has no statistics of proprio, or of another number of dimensions.
        """
        key = self.resolve_unnorm_key(unnorm_key)
        entry = self.norm_stats[key].get("proprio")
        if entry is None:
            raise OpenVLAValueError(
                f"norm_stats[{key!r}] has no 'proprio' beside 'action', so the robot's state cannot be normalised; "
                "add it with model.add_norm_stats."
            )
        statistics = NormalizationStatistics(entry, f"norm_stats[{key!r}]['proprio']", self.config.normalization)
        if statistics.dimension != self.config.proprio_dim:
            raise OpenVLAValueError(
                f"The proprio of {key!r} has {statistics.dimension} dimensions but this model takes "
                f"{self.config.proprio_dim}; pass the unnorm_key of a dataset that it was trained on."
            )
        return statistics

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """The action statistics of a dataset; raises as ``resolve_unnorm_key`` does."""
        return self.norm_stats[self.resolve_unnorm_key(unnorm_key)]["action"]

    def resolve_unnorm_key(self, unnorm_key: str | None = None) -> str:
        """The dataset whose statistics are used for a given (or no) key.

        Raises:
            KeyError: The key is unknown; the message names the nearest and all known ones.
            ValueError: No key is given although there are several datasets and no default, or none at all.
        """
        known = list(self.norm_stats)
        if not known:
            raise OpenVLAValueError(
                "This model has no action statistics, so actions cannot be un-normalised; add them with "
                "model.add_norm_stats(key, statistics) or put dataset_statistics.json beside the weights."
            )
        if unnorm_key is None:
            unnorm_key = known[0] if len(known) == 1 else self.config.default_unnorm_key
        if unnorm_key is None:
            raise OpenVLAValueError(f"The model knows several datasets; pass unnorm_key, one of {known}.")
        if unnorm_key not in known:
            nearest = nearest_name(unnorm_key, known)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise OpenVLAKeyError(f"Unknown unnorm_key {unnorm_key!r}.{hint} Known: {known}.")
        return unnorm_key

    def row_keys(self, unnorm_key: str | Sequence[str | None] | None, rows: int) -> list[str]:
        """The dataset of every row of a batch, for one key or one a row; raises as ``resolve_unnorm_key`` does."""
        keys = [unnorm_key] * rows if unnorm_key is None or isinstance(unnorm_key, str) else list(unnorm_key)
        if len(keys) != rows:
            raise OpenVLAValueError(f"Got {len(keys)} unnorm_keys for a batch of {rows}; give one, or one a row.")
        return [self.resolve_unnorm_key(key) for key in keys]

    def row_statistics(self, keys: list[str]) -> list[NormalizationStatistics]:
        """How each row's actions are normalised.

        Raises:
            ValueError: The datasets' actions have different numbers of dimensions.
        """
        statistics = [self.action_statistics(key) for key in keys]
        dimensions = {row.dimension for row in statistics}
        if len(dimensions) > 1:
            raise OpenVLAValueError(f"One batch cannot mix action dimensions {sorted(dimensions)}; call once for each.")
        return statistics


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two statistics of a dataset give other numbers for what both say of actions or proprio."""
    pairs = [(one.get(part) or {}, other.get(part) or {}) for part in ("action", "proprio")]
    return any(first[name] != second[name] for first, second in pairs for name in {*first} & {*second})
