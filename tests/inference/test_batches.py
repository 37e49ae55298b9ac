"""Policy.act_batch: the actions of act, for several robots in one pass."""

import numpy as np
import pytest
import torch
from minivla import TINY_VQ, set_random_vq
from openvla import NoActionError, Policy
from openvla.benchmarking.sizes import CHUNK_FIELDS
from openvla.tiny import build_tiny
from predictions import prefer_end_token

pytestmark = pytest.mark.lane
INSTRUCTIONS = ("open the drawer", "close the drawer", "open the drawer")  # two lengths in characters, so in tokens


def build_policy(**overrides):
    model, processor = build_tiny(**overrides)
    constrain_actions = model.config.action_head is None
    return Policy(model, processor, next(iter(model.norm_stats)), constrain_actions)


def observations(policy, count=3):
    random, cameras = np.random.RandomState(0), policy.model.config.num_images_in_input
    frames = random.randint(0, 256, (count, cameras, 64, 64, 3), dtype=np.uint8)
    batch = []
    for index in range(count):
        observation = {"image": list(frames[index]) if cameras > 1 else frames[index][0]}
        observation["instruction"] = INSTRUCTIONS[index % len(INSTRUCTIONS)]
        if policy.model.config.proprio_dim is not None:
            observation["proprio"] = random.uniform(-1, 1, policy.model.config.proprio_dim)
        batch.append(observation)
    return batch


@pytest.mark.parametrize("kind", ["tokens", "bfloat16", "discrete chunks", "l1 chunks", "vq"])
def test_a_batch_has_the_actions_of_act(kind):
    if kind == "vq":
        policy = build_policy(**TINY_VQ)
        set_random_vq(policy.model)
    elif kind.endswith("chunks"):
        policy = build_policy(**{**CHUNK_FIELDS, "action_head": "l1" if kind.startswith("l1") else None})
    else:
        policy = build_policy()
    if kind == "bfloat16":
        policy.model.to(torch.bfloat16)
    batch = observations(policy, count=7)
    expected = [policy.act(one["image"], one["instruction"], one.get("proprio")) for one in batch]
    for size in (1, 2, 16):
        actions = policy.act_batch(batch, batch_size=size)
        assert len(actions) == len(batch)
        for action, of_act in zip(actions, expected):
            assert np.array_equal(action, of_act)
    assert policy.act_batch([]) == []


def test_observations_of_one_length_share_a_pass(monkeypatch):
    policy, sizes = build_policy(), []
    predict_action = policy.model.predict_action

    def counted(input_ids, **kwargs):
        sizes.append(len(input_ids))
        return predict_action(input_ids, **kwargs)

    monkeypatch.setattr("openvla.inference.batches.MIN_LOG_PROB_MARGIN", {torch.float32: 0.0})
    monkeypatch.setattr(policy.model, "predict_action", counted)
    policy.act_batch(observations(policy, count=6))
    assert sorted(sizes) == [2, 4]
    sizes.clear()
    policy.act_batch(observations(policy, count=6), batch_size=3)
    assert sorted(sizes) == [1, 2, 3]


def test_an_observation_that_fails_leaves_the_others():
    policy = build_policy()
    good = observations(policy)
    bad = [{**good[0], "instruction": ""}, {**good[0], "proprio": np.zeros(8)}, {**good[0], "unnorm_key": "bridge"}]
    results = policy.act_batch([good[0], *bad, good[1]], return_errors=True)
    assert np.array_equal(results[0], policy.act(good[0]["image"], good[0]["instruction"]))
    assert np.array_equal(results[4], policy.act(good[1]["image"], good[1]["instruction"]))
    for result, message in zip(results[1:4], ("instruction", "without proprio", "Unknown unnorm_key 'bridge'")):
        assert isinstance(result, ValueError | KeyError)
        assert message in str(result)
    with pytest.raises(KeyError, match="Unknown unnorm_key 'bridge'"):
        policy.act_batch([good[0], bad[2]])


def test_a_prediction_that_is_no_action_is_an_error_in_its_place():
    policy = build_policy()
    policy.constrain_actions = False
    batch = observations(policy)
    inputs = policy.processor(instruction=batch[0]["instruction"], images=batch[0]["image"])
    prefer_end_token(policy.model, inputs)
    results = policy.act_batch(batch[:1], return_errors=True)
    assert isinstance(results[0], NoActionError)
    with pytest.raises(NoActionError):
        policy.act_batch(batch[:1])


@pytest.mark.parametrize("observation", [{"image": None}, {"image": None, "instruction": "go", "state": 1}])
def test_other_fields_are_refused(observation):
    with pytest.raises(ValueError, match="An observation has image and instruction, and may have .* got"):
        build_policy().act_batch([observation])


def test_a_bug_of_the_model_is_raised(monkeypatch):
    policy = build_policy()

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(policy.model, "predict_action", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.act_batch(observations(policy), return_errors=True)
