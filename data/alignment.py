"""How actions go with the state and with frames: correlations over episodes, at lags of a few steps. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A rotation that passes from +180 to -180 degrees differs by a turn less the step itself, which is below 0.15 turns.
WRAP_SHARE_OF_TURN = 0.85
# A commanded position follows the measured one so closely, at a robot's lag too; a movement does not follow positions.
POSE_CORRELATION, FOLLOWED_CORRELATION = 0.98, 0.9
# Which frames a movement is compared with: so many steps before and after.
LAGS = (-4, -3, -2, -1, 0, 1, 2, 3, 4)
# Share of a movement's variance that the best lag must explain, so that lags can be compared.
COMPARABLE = 0.8
# Fewer steps show no correlation; more are not needed.
FEWEST_STEPS, MOST_STEPS = 30, 200_000


def wrapped_steps(values: np.ndarray, turn: float) -> np.ndarray:
    """Return which steps of ``(length,)`` are a turn too much: bool, of the same length.

    A joint that is turned so far stays there for a while, which is not counted.
    """
    far = (np.abs(values) >= WRAP_SHARE_OF_TURN * turn) * np.sign(values)
    same = far[1:] == far[:-1]
    stays = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    return (far != 0) & ~stays


def tracked_positions(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray], dimensions: Sequence[int] = (0, 1, 2), fewest: int = 2
) -> list[tuple[int, int, float]]:
    """Return (action dimension, state dimension, correlation) where the action repeats a measured position.

    A movement to both sides of zero that goes with the change of another state (beside measured speeds, or the last
    action) is none.

    Args:
        actions: float64 ``(length, action_dim)``, one an episode.
        states: float64 ``(length, state_dim)``, one an episode.
        dimensions: Of the action, which are looked at.
        fewest: Empty unless so many of them do, at the step itself or the one after it.
    """
    best = state_partners(actions, states, dimensions)
    if len(best) >= fewest:
        moves = _movements(actions, states)
        best = [one for one in best if one[0] not in moves]
    return best if len(best) >= fewest else []


def state_partners(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray], dimensions: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Return (action dimension, state dimension, correlation) where a state goes with the action, whatever it is."""
    best: list[tuple[int, int, float]] = []
    for lag in (0, 1):
        table = correlations(actions, states, lag)
        rows = [] if table is None else [(i, int(table[i].argmax()), float(table[i].max())) for i in dimensions]
        best = max(best, [one for one in rows if one[2] >= POSE_CORRELATION], key=len)
    return best


def _movements(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> set[int]:
    """Return the action dimensions that go to both sides of zero and with the change of a state."""
    moved = [np.diff(state, axis=0, append=np.nan) for state in states]
    tables = [table for lag in (0, 1) if (table := correlations(actions, moved, lag)) is not None]
    steps = np.concatenate(actions)
    central = np.abs(steps.mean(axis=0)) < steps.std(axis=0)
    goes = np.max([table.max(axis=1) for table in tables], axis=0) if tables else np.zeros(steps.shape[1])
    return set(np.flatnonzero(central & (goes >= FOLLOWED_CORRELATION)).tolist())


def follows_positions(actions: Sequence[np.ndarray], states: Sequence[np.ndarray]) -> bool:
    """Return True where most action dimensions are positions: they go with the state."""
    table = correlations(actions, states, 0)
    return table is not None and bool(np.median(table.max(axis=1)) >= FOLLOWED_CORRELATION)


def explained_variance(
    actions: Sequence[np.ndarray], changes: Sequence[np.ndarray], comparable: float = COMPARABLE
) -> dict[int, float] | None:
    """Return by lag which share of the actions' variance a change explains, for the dimensions where one does.

    Args:
        actions: float64 ``(length, dimensions)``, one an episode.
        changes: ``(length, dimensions)``: of the step that starts at t; NaN where there is none.
        comparable: What the best lag must explain of a dimension that counts.

    Returns:
        Means over these dimensions, each with the change that it goes with best; None where there is none.
    """
    tables = [correlations(actions, changes, lag) for lag in LAGS]
    if any(table is None for table in tables):
        return None
    explained = np.stack(tables) ** 2  # (lags, action dimensions, changes)
    partner = explained.max(axis=0).argmax(axis=1)
    profile = explained[:, np.arange(len(partner)), partner]
    profile = profile[:, profile.max(axis=0) >= comparable]
    return dict(zip(LAGS, profile.mean(axis=1).tolist())) if profile.shape[1] else None


def correlations(first: Sequence[np.ndarray], second: Sequence[np.ndarray], lag: int) -> np.ndarray | None:
    """Correlations of ``first[t]`` with ``second[t + lag]`` within episodes: float64 ``(dimensions, dimensions)``.

    Steps with NaN are left out, constant dimensions correlate 0. None for too few steps.
    """
    pairs, steps = [], 0
    for one, other in zip(first, second):
        size = len(one) - abs(lag)
        if size > 0:
            pairs.append((one[max(0, -lag) :][:size], other[max(0, lag) :][:size]))
            steps += size
        if steps > MOST_STEPS:
            break
    if not pairs:
        return None
    one, other = (np.concatenate(side) for side in zip(*pairs))
    whole = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
    if whole.sum() < FEWEST_STEPS:
        return None
    one, other = one[whole], other[whole]
    sides = []
    for values in (one, other):
        values = values - values.mean(axis=0)
        size = np.sqrt((values**2).sum(axis=0))
        sides.append(values / np.where(size > 1e-9 * np.sqrt(len(values)), size, np.inf))
    return sides[0].T @ sides[1]
