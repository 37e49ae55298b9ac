"""GRPO of examples/grpo_libero.py in a scripted environment."""

import numpy as np
import pytest
import torch
from openvla.inference.policy import Policy
from openvla.tiny import build_tiny

pytest.importorskip("pyarrow")  # of collect_libero.py, which it imports
import grpo_libero as grpo  # noqa: E402

FRAME = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
INSTRUCTION = "move forward"


class ForwardTask:
    """The task is done by one step forward (dx above 0)."""

    def reset(self, initial_state):
        return FRAME

    def step(self, action):
        return FRAME, bool(action[0] > 0)


@pytest.fixture
def policy():
    model, processor = build_tiny()
    key = next(key for key, entry in model.norm_stats.items() if len(entry["action"]["q01"]) == 7)
    return Policy(model, processor, key, constrain_actions=True)


def group_of(policy, size, seed, max_steps=1):
    """Return a group of episodes with advantages."""
    generator = torch.Generator().manual_seed(seed)
    group = [
        grpo.run_episode(ForwardTask(), policy, INSTRUCTION, 0, max_steps, 1.0, generator=generator)
        for _ in range(size)
    ]
    grpo.set_advantages(group)
    return group


def test_advantages_compare_the_episodes_of_a_group():
    group = [grpo.Episode(INSTRUCTION, success=success) for success in (True, False, False, False)]
    grpo.set_advantages(group)
    assert [round(episode.advantage, 3) for episode in group] == [1.732, -0.577, -0.577, -0.577]
    same = [grpo.Episode(INSTRUCTION, success=True) for _ in range(4)]
    grpo.set_advantages(same)
    assert [episode.advantage for episode in same] == [0] * 4


def test_an_episode_ends_with_success_or_its_steps(policy):
    episodes = group_of(policy, 4, seed=0, max_steps=3)
    for episode in episodes:
        assert len(episode.frames) == len(episode.tokens) == len(episode.log_probs)
        assert len(episode.frames) <= 3
        assert episode.success or len(episode.frames) == 3


def test_the_first_update_has_ratio_one_and_others_move_the_weights(policy):
    group = group_of(policy, 6, seed=1)
    assert any(episode.advantage for episode in group)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    first, second = (grpo.grpo_update(policy, optimizer, group, temperature=1.0)[0] for _ in range(2))
    assert first["ratio"] == pytest.approx(1, abs=1e-5)  # drawn one by one, evaluated in a batch
    assert first["gradient_norm"] > 0
    assert abs(second["ratio"] - 1) > 1e-4


def test_groups_of_one_outcome_change_nothing(policy):
    group = [episode for episode in group_of(policy, 8, seed=2) if episode.success]
    grpo.set_advantages(group)
    before = {name: parameter.clone() for name, parameter in policy.model.state_dict().items()}
    assert grpo.grpo_update(policy, torch.optim.SGD(policy.model.parameters(), lr=1.0), group, temperature=1.0) == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.model.state_dict().items())


@pytest.mark.slow
def test_success_becomes_more_frequent(policy):
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-3)
    successes = []
    for iteration in range(24):
        group = group_of(policy, 12, seed=iteration)
        successes.append(sum(episode.success for episode in group))
        grpo.grpo_update(policy, optimizer, group, temperature=1.0, batch_size=12)
    assert sum(successes[:4]) <= 30  # of 48
    assert sum(successes[-8:]) >= 80  # of 96
