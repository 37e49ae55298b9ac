"""The embedded policies see where they are: on an episode that none was trained on, they do what was demonstrated."""

import json

import numpy as np
import pytest
import torch
from openvla import load_policy
from openvla.inference.fast_decoder import FastDecoder
from openvla.inference.policy import EMBEDDED, EMBEDDED_OFT
from PIL import Image
from reference import FIXTURES

pytest.importorskip("accelerate")
pytestmark = pytest.mark.lane
EPISODE = FIXTURES / "libero_episode"
LARGEST_BYTES = 20e6
# Cosine between the movement that was made and the one that was demonstrated, mean over ten steps.
FOLLOWS, SHUFFLED = 0.8, 0.5
# In controller units, mean over ten steps and three axes; another step's frame is worse by this factor at least.
TWIN_ERROR, TWIN_SHUFFLED = 0.15, 3.0
SCORE_ATOL = 0.01  # nats: a pass over all tokens at once, and probability that is not on action tokens


@pytest.fixture(scope="module")
def policy():
    return load_policy()


@pytest.fixture(scope="module")
def steps():
    return json.loads((EPISODE / "steps.json").read_text())


def answers(policy, steps, order):
    """The next action at every step, float64 ``(steps, 7)``, each seeing the frame of another; of a chunk the first."""
    found = []
    for step, frame in zip(steps, order):
        with Image.open(EPISODE / f"{frame}.jpg") as image:
            found.append(np.atleast_2d(policy.act(image.convert("RGB"), step["language_instruction"]))[0])
    return np.stack(found)


def agreement(actions, steps):
    """Mean cosine of the movements, and the share of steps whose gripper is right (ours 1 open, theirs -1)."""
    shown = np.array([step["action"] for step in steps])
    ours, theirs = actions[:, :3], shown[:, :3]
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return cosine.mean(), ((actions[:, 6] > 0.5) == (shown[:, 6] < 0)).mean()


def test_it_fits_in_the_box():
    folders = (EMBEDDED, EMBEDDED_OFT)
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < LARGEST_BYTES
    for folder in folders:
        assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
        assert not list(folder.glob("*.py"))


def test_it_follows_the_demonstrated_direction_and_shuffled_images_do_not(policy, steps):
    order = list(range(len(steps)))
    cosine, gripper = agreement(answers(policy, steps, order), steps)
    turned = [agreement(answers(policy, steps, np.roll(order, by)), steps) for by in (3, 5, 7)]
    assert cosine > FOLLOWS
    assert gripper >= 0.9
    assert max(other for other, _ in turned) < SHUFFLED


def test_the_twin_does_what_was_demonstrated_and_with_shuffled_images_does_not(steps):
    twin, order = load_policy(EMBEDDED_OFT, device="cpu"), list(range(len(steps)))
    shown = np.array([step["action"] for step in steps])[:, :3]
    error, *turned = [np.abs(answers(twin, steps, np.roll(order, by))[:, :3] - shown).mean() for by in (0, 3, 5, 7)]
    assert error < TWIN_ERROR
    assert min(turned) > TWIN_SHUFFLED * error
    assert twin.model.config.proprio_dim is None
    assert twin.model.dtype == torch.float32  # as it was judged


def test_its_own_answer_is_the_likeliest_and_as_a_draft_saves_every_step(policy, steps, monkeypatch):
    """An open gripper is the top edge of the bins, whose token decodes as the highest bin's does."""
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
