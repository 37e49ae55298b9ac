"""Correlate actions with the state and with camera frames, over episodes and at lags of a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A rotation difference that passes from +180 to -180 degrees is a turn minus the step, which is below 0.15 turns.
WRAP_SHARE_OF_TURN = 0.85
# A commanded position correlates with the measured one at least so much, even if the robot lags; a movement does not.
POSE_CORRELATION, FOLLOWED_CORRELATION = 0.98, 0.9
# Lags in steps at which a movement is compared with changes.
LAGS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)
# Share of a movement's variance that the best lag must explain, so that lags can be compared.
COMPARABLE = 0.8
# With fewer steps a correlation shows nothing; more steps are not needed.
MIN_STEPS, MAX_STEPS = 30, 200_000


class Correlation(NamedTuple):
    """An action dimension, the state dimension that it correlates with most, and their correlation."""

    action_dim: int
    state_dim: int
    correlation: float


def wrapped_steps(values: np.ndarray, turn: float) -> np.ndarray:
    """Return which angle differences are about one turn: bool ``(length,)``.

    A value that stays about one turn for several steps is a joint's position and is not counted.

    Args:
        values: ``(length,)``.
        turn: A whole turn in the values' unit.
    """
    about_one_turn = (np.abs(values) >= WRAP_SHARE_OF_TURN * turn) * np.sign(values)
    same = about_one_turn[1:] == about_one_turn[:-1]
    stays = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    return (about_one_turn != 0) & ~stays


def tracked_positions(
    actions: Sequence[np.ndarray],
    states: Sequence[np.ndarray],
    dimensions: Sequence[int] = (0, 1, 2),
    min_count: int = 2,
) -> list[Correlation]:
    """Return the action dimensions that repeat a measured position; empty if there are fewer than ``min_count``.

    A movement in both directions that correlates with the change of another state dimension (next to measured
    velocities, or to the last action) does not count.

    Args:
        actions: float64 ``(length, action_dim)``, one array per episode.
        states: float64 ``(length, state_dim)``, one array per episode.
        dimensions: Action dimensions to examine.
        min_count: Smallest number of dimensions, at the same step or the one after it.
    """
    tracked = correlated_states(actions, states, dimensions)
    if len(tracked) >= min_count:
        movements = _movement_dimensions(actions, states)
        tracked = [entry for entry in tracked if entry.action_dim not in movements]
    return tracked if len(tracked) >= min_count else []


def correlated_states(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray], dimensions: Sequence[int]
) -> list[Correlation]:
    """Return the action dimensions that correlate with a state dimension, at the same step or the one after it."""
    best: list[Correlation] = []
    for lag in (0, 1):
        table = correlations(actions, states, lag)
        if table is not None:
            entries = [Correlation(i, int(table[i].argmax()), float(table[i].max())) for i in dimensions]
            best = max(best, [entry for entry in entries if entry.correlation >= POSE_CORRELATION], key=len)
    return best


def _movement_dimensions(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> set[int]:
    """Return the action dimensions that move in both directions and correlate with the change of a state dimension."""
    changes = [np.diff(state, axis=0, append=np.nan) for state in states]
    tables = [table for lag in (0, 1) if (table := correlations(actions, changes, lag)) is not None]
    steps = np.concatenate(actions)
    both_directions = np.abs(steps.mean(axis=0)) < steps.std(axis=0)
    highest = np.max([table.max(axis=1) for table in tables], axis=0) if tables else np.zeros(steps.shape[1])
    return set(np.flatnonzero(both_directions & (highest >= FOLLOWED_CORRELATION)).tolist())


def follows_positions(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> bool:
    """Return whether most action dimensions are positions, which correlate with the state."""
    table = correlations(actions, states, 0)
    return table is not None and bool(np.median(table.max(axis=1)) >= FOLLOWED_CORRELATION)


def explained_variance(
    actions: Sequence[np.ndarray], changes: Sequence[np.ndarray], comparable: float = COMPARABLE
) -> dict[int, float] | None:
    """Return, by lag, the share of the actions' variance that the changes explain.

    Args:
        actions: float64 ``(length, dimensions)``, one array per episode.
        changes: ``(length, dimensions)``, one array per episode: the change from step t to t + 1; NaN if unknown.
        comparable: Share that the best lag must explain for a dimension to count.

    Returns:
        Means over the dimensions that count, each with the change that it correlates with most; None without any.
    """
    tables = []
    for lag in LAGS:
        table = correlations(actions, changes, lag)
        if table is None:
            return None
        tables.append(table)
    explained = np.stack(tables) ** 2  # (lags, action dimensions, changes)
    best_change = explained.max(axis=0).argmax(axis=1)
    by_lag = explained[:, np.arange(len(best_change)), best_change]
    by_lag = by_lag[:, by_lag.max(axis=0) >= comparable]
    return dict(zip(LAGS, by_lag.mean(axis=1).tolist())) if by_lag.shape[1] else None


def correlations(first: Sequence[np.ndarray], second: Sequence[np.ndarray], lag: int) -> np.ndarray | None:
    """Return the correlations of ``first[t]`` with ``second[t + lag]`` within episodes.

    Steps with NaN are left out; the correlation with a constant dimension is 0.

    Args:
        first: ``(length, dimensions)``, one array per episode.
        second: ``(length, other dimensions)``, one array per episode.
        lag: In steps.

    Returns:
        float64 ``(dimensions, other dimensions)``; None for fewer than ``MIN_STEPS`` steps.
    """
    firsts, seconds, num_steps = [], [], 0
    for one, other in zip(first, second):
        size = len(one) - abs(lag)
        if size > 0:
            firsts.append(one[max(0, -lag) :][:size])
            seconds.append(other[max(0, lag) :][:size])
            num_steps += size
        if num_steps > MAX_STEPS:
            break
    if not firsts:
        return None
    one, other = np.concatenate(firsts), np.concatenate(seconds)
    finite = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
    if finite.sum() < MIN_STEPS:
        return None
    return _normalised(one[finite]).T @ _normalised(other[finite])


def _normalised(values: np.ndarray) -> np.ndarray:
    """Return columns with mean 0 and norm 1; constant ones are 0."""
    values = values - values.mean(axis=0)
    size = np.sqrt((values**2).sum(axis=0))
    return values / np.where(size > 1e-9 * np.sqrt(len(values)), size, np.inf)
