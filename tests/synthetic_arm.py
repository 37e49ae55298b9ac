"""Synthetic episodes of a small arm without errors, and the findings in changed ones."""

import numpy as np
from openvla.data.columns import ColumnSpec
from openvla.data.doctor import CheckInput, run_checks
from openvla.data.statistics import describe
from openvla.data.torch_dataset import TorchDatasetReader

EPISODES, STEPS = 8, 60


def arm(noise=0.0, lag=0):
    """Return float64 actions ``(60, 7)`` and states ``(60, 8)`` of 8 episodes without errors.

    A smooth movement (m, rad) in both directions, a gripper that closes once, a state that follows ``lag`` steps later.
    """
    random, episodes = np.random.RandomState(0), []
    for _ in range(EPISODES):
        time = np.arange(STEPS)
        phases, periods = random.uniform(0, 2 * np.pi, 6), random.uniform(8, 25, 6)
        move = np.sin(2 * np.pi * time[:, None] / periods + phases) * [0.02, 0.02, 0.02, 0.05, 0.05, 0.1]
        move *= random.uniform(0.3, 1, (STEPS, 1))
        gripper = (time < random.randint(20, 40)).astype(float)
        moved = np.roll(move, lag, axis=0) + random.normal(0, noise, move.shape)
        moved[:lag] = 0
        pose = np.array([0.4, 0.0, 0.2, np.pi - 0.02, 0.0, 0.0]) + np.cumsum(moved, axis=0) - moved
        pose[:, 3:] = (pose[:, 3:] + np.pi) % (2 * np.pi) - np.pi
        fingers = np.stack([0.04 * gripper, -0.04 * gripper], axis=1)
        episodes.append((np.column_stack([move, gripper]), np.column_stack([pose, fingers])))
    return [list(side) for side in zip(*episodes)]


def check_input(actions, states=(), name="mine", names=(), **fields):
    """Return the input of the checks."""
    fields = ColumnSpec(("image",), ("action",), ("state",) if len(states) else (), **fields)
    statistics = {**describe(np.concatenate(actions)), "mask": [True] * (actions[0].shape[1] - 1) + [False]}
    return CheckInput(name, statistics, fields, names, actions, states)


def findings_of(*args, **kwargs):
    """Return the findings by check; arguments as ``check_input``."""
    return {finding.check: finding for finding in run_checks(check_input(*args, **kwargs))}


def changed(actions, change):
    """Return copies of the episodes, each changed in place by a function."""
    copies = [episode.copy() for episode in actions]
    for episode in copies:
        change(episode)
    return copies


def with_gripper(actions, convert):
    """Return copies of the episodes with a converted gripper."""
    return changed(actions, lambda episode: episode.__setitem__((slice(None), -1), convert(episode[:, -1])))


def steps_of(actions, states=()):
    """Return all steps as dictionaries."""
    flat = np.concatenate(actions)
    states = np.concatenate(states) if len(states) else [None] * len(flat)
    image = np.zeros((4, 4, 3), np.uint8)
    return [{"image": image, "action": a, "task": "go", "state": s} for a, s in zip(flat, states)]


def arm_reader(actions, states=(), name="mine", **fields):
    """Return a reader of the episodes."""
    fields = {"cameras": ["image"], "action": "action", "instruction": "task", **fields}
    if len(states):
        fields["proprio"] = "state"
    return TorchDatasetReader(steps_of(actions, states), name, fields, episode_lengths=[len(e) for e in actions])
