"""Action bins and action statistics: the arithmetic between tokens and robot units. numpy only.

A continuous action in [-1, 1] falls into one of ``n_bins - 1`` intervals; interval i is written as the token
``vocab_size - 1 - i``, so actions live in the last ``n_bins`` ids of the (unpadded) vocabulary. De-tokenised values
are interval centres in [-1, 1]; per-dataset quantiles stretch them back to robot units.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from .errors_openvla import OpenVLATypeError, OpenVLAValueError

# Added to (q99 - q01) when training data is normalised, so that a constant dimension does not divide by zero
# (octo/dlimp normalize_action_and_proprio, as used by OpenVLA's RLDS pipeline).
NORMALIZATION_EPSILON = 1e-8

# A state in degrees or millimetres is 57 or 1000 times that in radians or metres.
FAR_STATE = 10
LEAST_HALF_RANGE = 1e-3

# Which two statistics become -1 and 1.
NORMALIZATIONS = {"q99": ("q01", "q99"), "bounds": ("min", "max")}

# What the seven numbers of an end-effector policy are, in order, and their units in the Open X-Embodiment datasets
# that OpenVLA was trained on (and in the fine-tuning sets that follow them).
END_EFFECTOR_DIMENSIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
OPEN_X_UNITS = ("m", "m", "m", "rad", "rad", "rad", "0 closed to 1 open")
OPEN_X_DATASETS = frozenset(
    [
        "fractal20220817_data",
        "kuka",
        "bridge",
        "bridge_orig",
        "bridge_oxe",
        "taco_play",
        "jaco_play",
        "berkeley_cable_routing",
        "roboturk",
        "viola",
        "berkeley_autolab_ur5",
        "toto",
        "stanford_hydra_dataset_converted_externally_to_rlds",
        "austin_buds_dataset_converted_externally_to_rlds",
        "nyu_franka_play_dataset_converted_externally_to_rlds",
        "furniture_bench_dataset_converted_externally_to_rlds",
        "ucsd_kitchen_dataset_converted_externally_to_rlds",
        "austin_sailor_dataset_converted_externally_to_rlds",
        "austin_sirius_dataset_converted_externally_to_rlds",
        "dlr_edan_shared_control_converted_externally_to_rlds",
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        "utaustin_mutex",
        "berkeley_fanuc_manipulation",
        "cmu_stretch",
        "bc_z",
        "fmb_dataset",
        "dobbe",
    ]
)


class ActionTokenizer:
    """Maps continuous actions to token ids and back, bit for bit as OpenVLA was trained.

    ``n_bins`` equally spaced *edges* span [min_action, max_action] and enclose ``n_bins - 1`` *centres*. The top edge
    itself has a token of its own (``vocab_size - n_bins``), which decodes like the one below it.

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
            raise OpenVLAValueError(f"A vocabulary of {vocab_size} ids has no room for {n_bins} action tokens.")
        if not min_action < max_action:
            raise OpenVLAValueError(f"min_action must be below max_action, got {min_action} and {max_action}.")
        self.vocab_size = int(vocab_size)
        self.n_bins = int(n_bins)
        self.min_action, self.max_action = float(min_action), float(max_action)
        self.bins = np.linspace(min_action, max_action, n_bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0

    @property
    def first_token_id(self) -> int:
        """Lowest action token id: ``vocab_size - n_bins`` (31744 for Llama-2). The highest is ``vocab_size - 1``."""
        return self.vocab_size - self.n_bins

    def encode(self, actions: np.ndarray | Sequence[float]) -> np.ndarray:
        """Token ids of normalised actions.

        Args:
            actions: Floats of any shape; values beyond the range are clipped to it, infinities included.

        Returns:
            int64 array of the same shape, in [first_token_id, vocab_size - 1].

        Raises:
            ValueError: An action is NaN (the reference silently makes it the token of +1).
        """
        actions = np.asarray(actions)
        if np.isnan(actions).any():
            raise OpenVLAValueError(
                f"Cannot tokenise NaN: {int(np.isnan(actions).sum())} of {actions.size} values are NaN."
            )
        clipped = np.clip(actions, self.min_action, self.max_action)
        return (self.vocab_size - np.digitize(clipped, self.bins)).astype(np.int64)

    def encode_decoded(self, actions: np.ndarray | Sequence[float]) -> np.ndarray:
        """Token ids behind what ``decode`` gave: as ``encode``, but all of the highest bin has the top edge's token.

        That one and the bin's own decode alike; clipped and saturated labels (an open gripper) are trained as the edge.
        """
        tokens = self.encode(actions)
        return np.where(tokens == self.first_token_id + 1, self.first_token_id, tokens)

    def bin_indices(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index into ``bin_centers`` of each token id: int64, same shape, ids outside the action range clipped."""
        token_ids = np.asarray(token_ids)
        if not np.issubdtype(token_ids.dtype, np.integer):
            raise OpenVLATypeError(f"Token ids must be integers, got dtype {token_ids.dtype}.")
        return np.clip(self.vocab_size - token_ids.astype(np.int64) - 1, 0, self.n_bins - 2)

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Normalised actions of token ids: float64 of the same shape, each a bin centre strictly inside the range.

        Ids above the action tokens decode to the lowest centre and ids below them to the highest, as in the reference.
        """
        return self.bin_centers[self.bin_indices(token_ids)]


class NormalizationStatistics:
    """The range of one dataset's actions (or proprio), checked, with the maps that it defines.

    Args:
        action: The ``"action"`` entry of a dataset's statistics (or ``"proprio"``): the two lists that the
            normalisation takes, optionally ``mask`` (true where a dimension was normalised; the gripper usually was
            not) and the others of ``mean``, ``std``, ``min``, ``max``, ``q01``, ``q99``, all of one length.
        name: Whose statistics these are, for error messages.
        normalization: "q99" (the range is ``q01`` to ``q99``) or "bounds" (``min`` to ``max``).
        epsilon: Added to the range when values are un-normalised (OpenVLA-OFT does so).
        unnorm_key: The dataset's key, by which the units of its dimensions are known.

    Raises:
        ValueError: A list is missing, empty, not finite, of another length, the lower bound exceeds the upper, or
            float64 cannot hold the range.
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
        held = {field: _statistic(field, action[field], name) for field in fields if action.get(field) is not None}
        dimension = len(held[low])
        for field, values in held.items():
            if len(values) != dimension:
                raise OpenVLAValueError(
                    f"{name}: {field} has {len(values)} entries but {low} has {dimension}; lengths must agree."
                )
        self.low, self.high = held[low], held[high]
        if (self.low > self.high).any():
            worst = int(np.argmax(self.low > self.high))
            raise OpenVLAValueError(
                f"{name}: {low} exceeds {high} in dimension {worst} ({self.low[worst]} > {self.high[worst]}); "
                "the lower bound must not be above the upper one."
            )
        with np.errstate(over="ignore"):
            wide = ~np.isfinite(2 * (self.high - self.low + max(epsilon, NORMALIZATION_EPSILON)))
        if wide.any():
            worst = int(np.argmax(wide))
            raise OpenVLAValueError(
                f"{name}: the range from {low} to {high} in dimension {worst} ({self.low[worst]} to "
                f"{self.high[worst]}) is beyond {self.low.dtype}; it must be finite, and so must its double."
            )
        self.mask = np.ones(dimension, bool) if "mask" not in held else held["mask"].astype(bool)
        self.name, self.epsilon, self.unnorm_key = name, epsilon, unnorm_key

    @property
    def dimension(self) -> int:
        """Number of action dimensions."""
        return len(self.low)

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Name of every action dimension."""
        return tuple(name for name, _ in dimension_labels(self.dimension, self.unnorm_key))

    @property
    def units(self) -> tuple[str, ...]:
        """Unit of every action dimension."""
        return tuple(unit for _, unit in dimension_labels(self.dimension, self.unnorm_key))

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """Robot units of normalised actions, float64 ``(..., dimension)``; unmasked dimensions pass unchanged.

        ``0.5 * (x + 1) * (high - low + epsilon) + low``, in the reference's order of operations
        (modeling_prismatic.py, ``predict_action``), so that results are equal in every bit. Without the epsilon in a
        dimension whose ``low`` is its ``high``: it becomes exactly that value, whatever the model says. A command of
        exactly 0 can mean something else to a controller than 1e-9 (PARITY.md).
        """
        scale = np.where(self.high == self.low, 0.0, self.high - self.low + self.epsilon)
        return np.where(self.mask, 0.5 * (normalized + 1) * scale + self.low, normalized)

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions of robot units, float64 ``(..., dimension)`` in [-1, 1], as training data was made.

        ``clip(2 * (a - low) / (high - low + 1e-8) - 1, -1, 1)``, zero in a constant dimension (OpenVLA's RLDS
        pipeline); unmasked dimensions pass unchanged.

        Raises:
            ValueError: The last dimension disagrees with the statistics, or a value is not finite.
        """
        actions = as_numbers(actions, "Actions")
        if actions.shape[-1:] != (self.dimension,):
            raise OpenVLAValueError(f"Expected actions of {self.dimension} dimensions, got shape {actions.shape}.")
        if not np.isfinite(actions).all():
            raise OpenVLAValueError("Actions must be finite, got NaN or infinity.")
        with np.errstate(over="ignore"):  # what lies so far outside is clipped
            scaled = np.clip(2 * (actions - self.low) / (self.high - self.low + NORMALIZATION_EPSILON) - 1, -1, 1)
        scaled = np.where(self.low == self.high, 0.0, scaled)
        return np.where(self.mask, scaled, actions)

    def normalize_proprio(self, proprio: np.ndarray | Sequence[float]) -> np.ndarray:
        """The robot's state as the model was trained on it, float64 ``(dimension,)`` in [-1, 1].

        ``clip(2 * (p - low) / (high - low + 1e-8) - 1, -1, 1)`` (OpenVLA-OFT, ``normalize_proprio``); unmasked
        dimensions are only clipped.

        Raises:
            ValueError: Another number of values, or one is not finite.
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
        """Return which numbers of a state, float64 ``(dimension,)``, cannot be in the units that were trained on.

        They lie further than ``FAR_STATE`` half ranges from the middle of what was trained on. Numbers that hardly
        moved in training are left out.
        """
        half = (self.high - self.low) / 2
        far = self.mask & (half > LEAST_HALF_RANGE) & (np.abs(proprio - (self.low + self.high) / 2) > FAR_STATE * half)
        return np.flatnonzero(far).tolist()


def as_numbers(values: Any, name: str) -> np.ndarray:
    """Return numbers of any shape as float64.

    Raises:
        ValueError: They are no real numbers (texts are none), beyond float64, or rows of different lengths.
    """
    reason = "."
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf" or array.dtype.kind == "O" and all(isinstance(one, Real) for one in array.flat):
            return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # of numpy, and of torch's tensors
        reason = f": {error}"
    raise OpenVLAValueError(f"{name} must be finite numbers, in rows of equal lengths, got {values!r:.200}{reason}")


def _statistic(field: str, values: Any, name: str) -> np.ndarray:
    """Return a list of statistics ``(dimensions,)`` in its own dtype; whole numbers as float64."""
    numbers = as_numbers(values, f"{name}: {field}")
    if numbers.ndim != 1 or numbers.size == 0:
        raise OpenVLAValueError(f"{name}: {field} must be a non-empty flat list, got shape {numbers.shape}.")
    if not np.isfinite(numbers).all():
        raise OpenVLAValueError(f"{name}: {field} must hold finite numbers, got {numbers.tolist()}.")
    held = np.array(values)
    if (field == "mask") != (held.dtype.kind == "b") and (field != "mask" or not np.isin(numbers, (0, 1)).all()):
        allowed = "true or false" if field == "mask" else "numbers, not true or false"
        raise OpenVLAValueError(f"{name}: {field} must hold {allowed}, got {held.tolist()}.")
    return held if held.dtype.kind == "f" else numbers


def validate_norm_stats(norm_stats: Mapping[str, Any], normalization: str = "q99") -> None:
    """Check the action statistics of every dataset: ``{key: {"action": {...}, ...}}``.

    Raises:
        ValueError: Anything that would un-normalise wrongly; the message names the dataset and the field.
    """
    if not isinstance(norm_stats, Mapping):
        raise OpenVLAValueError(f"norm_stats must map dataset keys to statistics, got {type(norm_stats).__name__}.")
    for key, statistics in norm_stats.items():
        if not isinstance(statistics, Mapping) or not isinstance(statistics.get("action"), Mapping):
            needed = " and ".join(NORMALIZATIONS[normalization])
            raise OpenVLAValueError(f"norm_stats[{key!r}] needs an 'action' entry with {needed}.")
        NormalizationStatistics(statistics["action"], f"norm_stats[{key!r}]['action']", normalization)


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, or None."""
    containing = sorted((k for k in known if name and name in k), key=len)
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return next(iter(containing + close), None)


def dimension_labels(action_dim: int, unnorm_key: str) -> list[tuple[str, str]]:
    """Name and unit of every action dimension.

    Args:
        action_dim: Seven is an end effector; any other number of dimensions is only numbered.
        unnorm_key: The dataset; units other than Open X-Embodiment's are the dataset's own and not known here.
    """
    if action_dim != len(END_EFFECTOR_DIMENSIONS):
        return [(f"action[{index}]", "dataset units") for index in range(action_dim)]
    if unnorm_key in OPEN_X_DATASETS:
        return list(zip(END_EFFECTOR_DIMENSIONS, OPEN_X_UNITS))
    # DROID: velocities as its controller takes them, from -1 to 1.
    units = "controller units" if unnorm_key.startswith(("libero", "droid")) else "dataset units"
    gripper = OPEN_X_UNITS[-1] if unnorm_key.startswith("droid") else units
    return list(zip(END_EFFECTOR_DIMENSIONS, (*[units] * 6, gripper)))
