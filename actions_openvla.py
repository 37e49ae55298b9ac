"""Action bins and action statistics: the arithmetic between action tokens and robot units.

A continuous action in [-1, 1] falls into one of ``n_bins - 1`` intervals; interval i is the token
``vocab_size - 1 - i``, so action tokens are the last ``n_bins`` ids of the (unpadded) vocabulary. Tokens decode to
interval centres in [-1, 1]; per-dataset quantiles un-normalise them to robot units.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np

from .errors_openvla import OpenVLAKeyError, OpenVLATypeError, OpenVLAValueError

# Added to (q99 - q01) when training data is normalised, so that a constant dimension does not divide by zero
# (octo/dlimp normalize_action_and_proprio, as used by OpenVLA's RLDS pipeline).
NORMALIZATION_EPSILON = 1e-8

# A state further than FAR_STATE half ranges from the middle of the training range is in other units: degrees are 57
# times radians, millimetres 1000 times metres. Dimensions of a smaller half range hardly moved and are not checked.
FAR_STATE = 10
MIN_HALF_RANGE = 1e-3

# The two statistics that become -1 and 1.
NORMALIZATIONS = {"q99": ("q01", "q99"), "bounds": ("min", "max")}


class ActionTokenizer:
    """Tokenizer of continuous actions, bit for bit as OpenVLA was trained.

    ``n_bins`` equally spaced *edges* span [min_action, max_action] and enclose ``n_bins - 1`` *centres*. The top edge
    has its own token (``vocab_size - n_bins``), which decodes like the one of the bin below it.

    Args:
        vocab_size: Size of the *unpadded* vocabulary: 32000 for Llama-2, never the padded 32064.
        n_bins: Number of bin edges, at least 2.
        min_action: Lowest edge.
        max_action: Highest edge.

    Attributes:
        bins: float64 ``(n_bins,)``, the edges.
        bin_centers: float64 ``(n_bins - 1,)``, the values that tokens decode to.
    """

    def __init__(self, vocab_size: int, n_bins: int = 256, min_action: float = -1.0, max_action: float = 1.0) -> None:
        if n_bins < 2:
            raise OpenVLAValueError(f"n_bins must be at least 2 (two edges enclose one bin), got {n_bins}.")
        if vocab_size < n_bins:
            raise OpenVLAValueError(f"A vocabulary of {vocab_size} ids cannot hold {n_bins} action tokens.")
        if not min_action < max_action:
            raise OpenVLAValueError(f"min_action must be below max_action, got {min_action} and {max_action}.")
        self.vocab_size = int(vocab_size)
        self.n_bins = int(n_bins)
        self.min_action, self.max_action = float(min_action), float(max_action)
        self.bins = np.linspace(min_action, max_action, n_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def first_token_id(self) -> int:
        """Return the lowest action token id (31744 for Llama-2); the highest is ``vocab_size - 1``."""
        return self.vocab_size - self.n_bins

    def encode(self, actions: np.ndarray | Sequence[float]) -> np.ndarray:
        """Return the token ids of normalised actions: int64, same shape; values beyond the range are clipped to it.

        Raises:
            ValueError: An action is NaN (the reference silently encodes it as +1).
        """
        actions = np.asarray(actions)
        if np.isnan(actions).any():
            raise OpenVLAValueError(
                f"Cannot tokenise NaN: {int(np.isnan(actions).sum())} of {actions.size} values are NaN."
            )
        clipped = np.clip(actions, self.min_action, self.max_action)
        return (self.vocab_size - np.digitize(clipped, self.bins)).astype(np.int64)

    def bin_indices(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return each token id's index into ``bin_centers``: int64, same shape; other tokens' are clipped."""
        token_ids = np.asarray(token_ids)
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise OpenVLATypeError(f"Token ids must be integers, got dtype {token_ids.dtype}.")
        return np.clip(self.vocab_size - token_ids.astype(np.int64) - 1, 0, self.n_bins - 2)

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the normalised actions of token ids: float64, same shape, bin centres.

        Ids above the action tokens decode to the lowest centre and ids below them to the highest, as in the reference.
        """
        return self.bin_centers[self.bin_indices(token_ids)]


class NormalizationStatistics:
    """The checked range of one dataset's actions (or proprio), with its normalisation.

    Args:
        action: The ``"action"`` (or ``"proprio"``) entry of a dataset's statistics: the two lists that the
            normalisation takes, optionally ``mask`` (true where a dimension was normalised; the gripper usually was
            not) and the others of ``mean``, ``std``, ``min``, ``max``, ``q01``, ``q99``, all of one length.
        name: Name of the statistics in error messages.
        normalization: "q99" (the range is ``q01`` to ``q99``) or "bounds" (``min`` to ``max``).
        epsilon: Added to the range when values are un-normalised (OpenVLA-OFT does so).
        unnorm_key: The dataset's key, which determines the names and units of its dimensions.

    Raises:
        ValueError: A list is missing, empty, not finite, of another length, inverted, or beyond float64.
    """

    def __init__(
        self,
        action: Mapping[str, Any],
        name: str = "action statistics",
        normalization: str = "q99",
        epsilon: float = 0.0,
        unnorm_key: str = "",
    ) -> None:
        low, high = NORMALIZATIONS[normalization]
        missing = [field for field in (low, high) if action.get(field) is None]
        if missing:
            raise OpenVLAValueError(f"{name}: {missing} missing; statistics need {low} and {high}, got {[*action]}.")
        fields = dict.fromkeys((low, high, "q01", "q99", "mask", "mean", "std", "min", "max"))
        arrays = {field: _statistic(field, action[field], name) for field in fields if action.get(field) is not None}
        dimension = len(arrays[low])
        for field, values in arrays.items():
            if len(values) != dimension:
                raise OpenVLAValueError(
                    f"{name}: {field} has {len(values)} entries but {low} has {dimension}; lengths must agree."
                )
        self.low, self.high = arrays[low], arrays[high]
        if (self.low > self.high).any():
            worst = int(np.argmax(self.low > self.high))
            raise OpenVLAValueError(
                f"{name}: {low} exceeds {high} in dimension {worst} ({self.low[worst]} > {self.high[worst]}); "
                "the lower bound must not be above the upper one."
            )
        with np.errstate(over="ignore"):
            overflows = ~np.isfinite(2 * (self.high - self.low + max(epsilon, NORMALIZATION_EPSILON)))
        if overflows.any():
            worst = int(np.argmax(overflows))
            raise OpenVLAValueError(
                f"{name}: the range from {low} to {high} in dimension {worst} ({self.low[worst]} to "
                f"{self.high[worst]}) is beyond {self.low.dtype}; it must be finite, and so must its double."
            )
        self.mask = np.ones(dimension, bool) if "mask" not in arrays else arrays["mask"].astype(bool)
        self.name, self.epsilon, self.unnorm_key = name, epsilon, unnorm_key

    @property
    def dimension(self) -> int:
        """Return the number of action dimensions."""
        return len(self.low)

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """Return normalised actions in robot units, float64 ``(..., dimension)``; unmasked dimensions are unchanged.

        ``0.5 * (x + 1) * (high - low + epsilon) + low``, in the order of the reference's ``predict_action``, so that
        results have the same bits. A dimension whose ``low`` is its ``high`` becomes exactly that value: a controller
        may treat a command of exactly 0 differently from 1e-9 (PARITY.md).
        """
        scale = np.where(self.high == self.low, 0.0, self.high - self.low + self.epsilon)
        return np.where(self.mask, 0.5 * (normalized + 1) * scale + self.low, normalized)

    def normalize(self, actions: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Return actions in robot units as training normalised them, float64 ``(..., dimension)`` in [-1, 1].

        ``clip(2 * (a - low) / (high - low + 1e-8) - 1, -1, 1)``, zero in a constant dimension (OpenVLA's RLDS
        pipeline); unmasked dimensions are unchanged. Another dimension, or a value that is not finite, raises
        ValueError.
        """
        actions = as_numbers(actions, "Actions")
        if actions.shape[-1:] != (self.dimension,):
            raise OpenVLAValueError(f"Expected actions of {self.dimension} dimensions, got shape {actions.shape}.")
        if not np.isfinite(actions).all():
            raise OpenVLAValueError("Actions must be finite, got NaN or infinity.")
        with np.errstate(over="ignore"):  # such values are clipped
            scaled = np.clip(2 * (actions - self.low) / (self.high - self.low + NORMALIZATION_EPSILON) - 1, -1, 1)
        scaled = np.where(self.low == self.high, 0.0, scaled)
        return np.where(self.mask, scaled, actions)

    def normalize_proprio(self, proprio: np.ndarray | Sequence[float]) -> np.ndarray:
        """Return the robot's state as training normalised it, float64 ``(dimension,)`` in [-1, 1].

        As ``normalize`` (OpenVLA-OFT, ``normalize_proprio``), but unmasked dimensions are clipped too.
        """
        proprio = as_numbers(proprio, "proprio")
        if proprio.shape != (self.dimension,):
            raise OpenVLAValueError(
                f"{self.name}: proprio must hold {self.dimension} numbers, got shape {proprio.shape}."
            )
        if not np.isfinite(proprio).all():
            raise OpenVLAValueError(f"proprio must be finite, got {proprio.tolist()}.")
        with np.errstate(over="ignore"):
            scaled = 2 * (proprio - self.low) / (self.high - self.low + NORMALIZATION_EPSILON) - 1
        return np.clip(np.where(self.mask, scaled, proprio), -1.0, 1.0)

    def far_states(self, proprio: np.ndarray) -> list[int]:
        """Return the dimensions in which a state, float64 ``(dimension,)``, cannot be in the units of training."""
        half = (self.high - self.low) / 2
        far = self.mask & (half > MIN_HALF_RANGE) & (np.abs(proprio - (self.low + self.high) / 2) > FAR_STATE * half)
        return [int(index) for index in np.flatnonzero(far)]


def as_numbers(values: Any, name: str) -> np.ndarray:
    """Return real numbers of any shape as float64; raise ValueError for anything else, texts included."""
    reason = "."
    try:
        array = np.asarray(values)
        is_real = array.dtype.kind == "O" and all(isinstance(number, Real) for number in array.flat)
        if array.dtype.kind in "biuf" or is_real:
            return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # raised by numpy, and by torch's tensors
        reason = f": {error}"
    raise OpenVLAValueError(f"{name} must be finite numbers, in rows of equal lengths, got {values!r:.200}{reason}")


def _statistic(field: str, values: Any, name: str) -> np.ndarray:
    """Return a list of statistics ``(dimensions,)`` in its own dtype; whole numbers as float64."""
    numbers = as_numbers(values, f"{name}: {field}")
    if numbers.ndim != 1 or numbers.size == 0:
        raise OpenVLAValueError(f"{name}: {field} must be a non-empty flat list, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise OpenVLAValueError(f"{name}: {field} must hold finite numbers, got {numbers.tolist()}.")
    array = np.array(values)
    if (field == "mask") != (array.dtype.kind == "b") and (field != "mask" or not np.isin(numbers, (0, 1)).all()):
        allowed = "true or false" if field == "mask" else "numbers, not true or false"
        raise OpenVLAValueError(f"{name}: {field} must hold {allowed}, got {array.tolist()}.")
    return array if array.dtype.kind == "f" else numbers


def validate_norm_stats(norm_stats: Mapping[str, Any], normalization: str = "q99") -> None:
    """Check the statistics of every dataset, ``{key: {"action": {...}, ...}}``; raise ValueError for unusable ones."""
    if not isinstance(norm_stats, Mapping):
        raise OpenVLAValueError(f"norm_stats must map dataset keys to statistics, got {type(norm_stats).__name__}.")
    for key, statistics in norm_stats.items():
        if not isinstance(statistics, Mapping) or not isinstance(statistics.get("action"), Mapping):
            needed = " and ".join(NORMALIZATIONS[normalization])
            raise OpenVLAValueError(f"norm_stats[{key!r}] needs an 'action' entry with {needed}.")
        NormalizationStatistics(statistics["action"], f"norm_stats[{key!r}]['action']", normalization)


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that ``name`` probably means, or None."""
    containing = sorted((k for k in known if name and name in k), key=len)
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return next(iter(containing + close), None)


class StatisticsConfig(Protocol):
    """The fields of ``OpenVLAConfig`` that un-normalisation reads."""

    norm_stats: dict[str, dict[str, Any]] | None
    default_unnorm_key: str | None
    normalization: str
    action_dim: int | None
    proprio_dim: int | None
    _name_or_path: str

    @property
    def normalization_epsilon(self) -> float: ...


class NormStatsMixin:
    """Action statistics by dataset, for a model whose configuration holds them."""

    config: StatisticsConfig

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """Return the statistics by dataset key; assigning checks and replaces all of them."""
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
            key: Value of ``unnorm_key`` for this dataset.
            stats: ``{"action": {"q01": [...], "q99": [...], "mask": [...]}}`` or only the inner dictionary; ValueError
                where they are inconsistent, not finite or inverted.
        """
        stats = stats if "action" in stats else {"action": stats}
        self.norm_stats = {**self.norm_stats, key: stats}

    def resolve_unnorm_key(self, unnorm_key: str | None = None) -> str:
        """Return the dataset key for ``unnorm_key``; None is the only dataset, or the default one.

        Raises:
            KeyError: The key is unknown; the message names the nearest and all known ones.
            ValueError: No key is given although there are several datasets and no default, or there is no dataset.
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

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Return the number of action dimensions of a dataset; raises as ``action_statistics``."""
        return self.action_statistics(unnorm_key).dimension

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Return the action statistics of a dataset as saved; raises as ``resolve_unnorm_key``."""
        return self.norm_stats[self.resolve_unnorm_key(unnorm_key)]["action"]

    def action_statistics(self, unnorm_key: str | None = None) -> NormalizationStatistics:
        """Return the normalisation of a dataset's actions; raise as ``resolve_unnorm_key``.

        Raises:
            ValueError: The actions have another number of dimensions than the model's.
        """
        key, config = self.resolve_unnorm_key(unnorm_key), self.config
        statistics = NormalizationStatistics(
            self.norm_stats[key]["action"],
            name=f"norm_stats[{key!r}]['action']",
            normalization=config.normalization,
            epsilon=config.normalization_epsilon,
            unnorm_key=key,
        )
        if config.action_dim is not None and statistics.dimension != config.action_dim:
            raise OpenVLAValueError(
                f"The actions of {key!r} have {statistics.dimension} dimensions but this model predicts "
                f"{config.action_dim}; pass the unnorm_key of a dataset that it was trained on."
            )
        return statistics

    def proprio_statistics(self, unnorm_key: str | None = None) -> NormalizationStatistics:
        """Return the normalisation of a dataset's proprio; ValueError where it has none that fits the model."""
        key = self.resolve_unnorm_key(unnorm_key)
        entry = self.norm_stats[key].get("proprio")
        if entry is None:
            raise OpenVLAValueError(
                f"norm_stats[{key!r}] has no 'proprio' beside 'action', so the robot's state cannot be normalised; "
                "add it with model.add_norm_stats."
            )
        name = f"norm_stats[{key!r}]['proprio']"
        statistics = NormalizationStatistics(entry, name=name, normalization=self.config.normalization)
        if statistics.dimension != self.config.proprio_dim:
            raise OpenVLAValueError(
                f"The proprio of {key!r} has {statistics.dimension} dimensions but this model takes "
                f"{self.config.proprio_dim}; pass the unnorm_key of a dataset that it was trained on."
            )
        return statistics

    def batch_keys(self, unnorm_key: str | Sequence[str | None] | None, batch_size: int) -> list[str]:
        """Return every sample's dataset, for one key or one a sample; raise as ``resolve_unnorm_key``."""
        keys = [unnorm_key] * batch_size if unnorm_key is None or isinstance(unnorm_key, str) else list(unnorm_key)
        if len(keys) != batch_size:
            raise OpenVLAValueError(
                f"Got {len(keys)} unnorm_keys for a batch of {batch_size}; give one, or one a sample."
            )
        return [self.resolve_unnorm_key(key) for key in keys]

    def batch_statistics(self, keys: Sequence[str]) -> list[NormalizationStatistics]:
        """Return the normalisation of every sample's actions; ValueError where their dimensions differ."""
        statistics = [self.action_statistics(key) for key in keys]
        dimensions = {entry.dimension for entry in statistics}
        if len(dimensions) > 1:
            raise OpenVLAValueError(f"One batch cannot mix action dimensions {sorted(dimensions)}; call once for each.")
        return statistics
