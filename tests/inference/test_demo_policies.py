"""The demo policies follow a demonstration that they were not trained on, and need its images."""

import json

import numpy as np
import pytest
import torch
from openvla import load_policy
from openvla.inference import demo_policies
from openvla.inference.demo_policies import DEMO_OFT_POLICY, DEMO_POLICY
from openvla.inference.fast_decoder import FastDecoder
from PIL import Image
from reference import FIXTURES

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
EPISODE = FIXTURES / "libero_episode"
LARGEST_BYTES = 20e6
# Cosine between the predicted and the demonstrated movement, mean over ten steps.
MIN_COSINE, MAX_SHUFFLED_COSINE = 0.8, 0.5
# Mean over ten steps and three axes, controller units; with another step's frame larger by at least this factor.
MAX_OFT_ERROR, MIN_SHUFFLED_FACTOR = 0.15, 3.0
SCORE_ATOL = 0.01  # nats: one pass over all tokens, and the probability of other tokens


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module")
def steps():
    return json.loads((EPISODE / "steps.json").read_text())


def predict_steps(policy, steps, order):
    """Predict an action per step from the frame of step ``order[i]``: float64 ``(steps, 7)``, the first of a chunk."""
    actions = []
    for step, frame in zip(steps, order):
        with Image.open(EPISODE / f"{frame}.jpg") as image:
            actions.append(np.atleast_2d(policy.act(image.convert("RGB"), step["language_instruction"]))[0])
    return np.stack(actions)


def agreement(actions, steps):
    """Return the mean cosine of the movements and the share of steps with the right gripper (1 open; data: -1)."""
    demonstrated = np.array([step["action"] for step in steps])
    predicted, expected = actions[:, :3], demonstrated[:, :3]
    cosine = (predicted * expected).sum(1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(expected, axis=1)
    return cosine.mean(), ((actions[:, 6] > 0.5) == (demonstrated[:, 6] < 0)).mean()


def test_demo_policies_are_small_and_complete():
    folders = (DEMO_POLICY, DEMO_OFT_POLICY)
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < LARGEST_BYTES
    for folder in folders:
        assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
        assert not list(folder.glob("*.py"))


def test_default_follows_the_demonstration_only_with_its_images(policy, steps):
    order = list(range(len(steps)))
    cosine, gripper = agreement(predict_steps(policy, steps, order), steps)
    shuffled = [agreement(predict_steps(policy, steps, np.roll(order, by)), steps) for by in (3, 5, 7)]
    assert cosine > MIN_COSINE
    assert gripper >= 0.9
    assert max(other for other, _ in shuffled) < MAX_SHUFFLED_COSINE


def test_oft_policy_follows_the_demonstration_only_with_its_images(steps):
    policy, order = load_policy(DEMO_OFT_POLICY, device="cpu"), list(range(len(steps)))
    demonstrated = np.array([step["action"] for step in steps])[:, :3]
    error, *shuffled = [
        np.abs(predict_steps(policy, steps, np.roll(order, by))[:, :3] - demonstrated).mean() for by in (0, 3, 5, 7)
    ]
    assert error < MAX_OFT_ERROR
    assert min(shuffled) > MIN_SHUFFLED_FACTOR * error
    assert policy.model.config.proprio_dim is None
    assert policy.model.dtype == torch.float32  # as it was evaluated


def test_predicted_action_scores_highest_and_is_an_accepted_draft(policy, steps, monkeypatch):
    """An open gripper is the top bin edge; its token and that of the highest bin decode alike."""
    with Image.open(EPISODE / "1.jpg") as image:
        inputs = policy.processor(instruction=steps[1]["language_instruction"], images=image.convert("RGB"))
    output = policy.model.predict_action(**inputs, return_dict=True)
    assert output.token_ids[6] == policy.model.action_tokenizer.first_token_id
    scores = policy.model.score_actions(**inputs, actions=[output.actions, -output.actions, output.actions / 2])
    chosen = policy.model.action_tokenizer.bin_indices(output.token_ids)
    expected = np.log(output.bin_probabilities[np.arange(7), chosen]).sum()
    assert abs(scores[0, 0] - expected) < SCORE_ATOL
    assert scores[0].argmax() == 0
    passes, run = [], FastDecoder.run
    monkeypatch.setattr(FastDecoder, "run", lambda self, *args: passes.append(1) or run(self, *args))
    drafted = policy.model.predict_action(**inputs, draft=output.actions, return_dict=True)
    assert np.array_equal(drafted.token_ids, output.token_ids)
    assert len(passes) == 1


def test_without_the_demo_policy_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_policies, "DEMO_POLICY", tmp_path / "libero")
    with pytest.raises(ImportError, match=r"not installed: pip install 'openvla\[demo\]'.*--model DIR_OR_ID"):
        load_policy()


def test_outside_a_clone_the_demo_policy_is_that_of_its_distribution(monkeypatch, tmp_path):
    (tmp_path / "openvla_demo" / "libero").mkdir(parents=True)
    (tmp_path / "openvla_demo" / "__init__.py").touch()
    (tmp_path / "openvla" / "inference").mkdir(parents=True)
    monkeypatch.setattr(demo_policies, "__file__", str(tmp_path / "openvla" / "inference" / "demo_policies.py"))
    monkeypatch.syspath_prepend(tmp_path)
    assert demo_policies._find("libero") == tmp_path / "openvla_demo" / "libero"
