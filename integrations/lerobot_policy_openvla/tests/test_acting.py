"""Actions are those of the openvla package, in every bit."""

import importlib.metadata

import numpy as np
import pytest
import torch
from conftest import FRONT, WRIST, features, frames, observation
from lerobot.policies.factory import get_policy_class
from lerobot_policy_openvla.modeling_openvla import ChunkPolicy, OpenVLAPolicy
from minivla import convert_run, write_vq
from openvla import ActionQueue, load_policy
from openvla.inference.robot_conventions import convert_action
from reach import TASK

ONE_CAMERA = {"cameras": ["front"], "constrain_actions": True}
MINIVLA_KEY = "libero_90"
STATISTICS = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}


def test_lerobot_finds_the_plugin_by_its_name():
    names = [distribution.metadata["Name"] for distribution in importlib.metadata.distributions()]
    assert "lerobot_policy_openvla" in names
    assert get_policy_class("openvla") is OpenVLAPolicy


def test_an_action_in_tokens_is_that_of_act(acting, tokens_folder):
    policy, preprocess, postprocess = acting(tokens_folder, **ONE_CAMERA)
    reference = load_policy(tokens_folder, constrain_actions=True)
    seen = []
    for step in range(3):
        front, wrist, state = frames(step, rows=2)
        action = policy.select_action(preprocess(observation(front, wrist, state)))
        expected = np.stack([reference.act(image, TASK) for image in front])
        assert action.dtype == torch.float64
        np.testing.assert_array_equal(action.numpy(), expected)
        sent = postprocess(action)
        assert sent.dtype == torch.float32
        np.testing.assert_array_equal(sent.numpy(), expected.astype(np.float32))
        seen.append(expected)
    assert len(np.unique(np.concatenate(seen), axis=0)) > 1  # actions depend on the images


@pytest.mark.parametrize(
    "settings",
    [{}, {"n_action_steps": 2}, {"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}],
    ids=["whole chunk", "two of a chunk", "ensemble"],
)
def test_actions_of_chunks_are_those_of_the_queue(settings, acting, oft_folder):
    policy, preprocess, _ = acting(oft_folder, **settings)
    queues = [ActionQueue(load_policy(oft_folder), **settings) for _ in range(2)]
    for step in range(6):
        front, wrist, state = frames(step, rows=2)
        action = policy.select_action(preprocess(observation(front, wrist, state)))
        expected = [q.act([f, w], TASK, s) for q, f, w, s in zip(queues, front, wrist, state, strict=True)]
        np.testing.assert_array_equal(action.numpy(), expected)


def test_a_chunk_is_that_of_act(acting, oft_folder):
    policy, preprocess, _ = acting(oft_folder)
    reference = load_policy(oft_folder)
    front, wrist, state = frames(0, rows=2)
    chunks = policy.predict_action_chunk(preprocess(observation(front, wrist, state)))
    expected = [reference.act([f, w], TASK, s) for f, w, s in zip(front, wrist, state, strict=True)]
    assert chunks.shape == (2, 4, 7)
    np.testing.assert_array_equal(chunks.numpy(), expected)


def test_the_order_of_cameras_is_that_of_the_configuration(acting, oft_folder):
    policy, preprocess, _ = acting(oft_folder, cameras=["wrist", FRONT])
    assert policy.config.cameras == list(policy.config.image_features) == [WRIST, FRONT]
    reference = load_policy(oft_folder)
    front, wrist, state = frames(0, rows=1)
    action = policy.select_action(preprocess(observation(front, wrist, state)))
    np.testing.assert_array_equal(action[0].numpy(), reference.act([wrist[0], front[0]], TASK, state[0])[0])


@pytest.fixture(scope="module")
def minivla(tmp_path_factory):
    """Convert a golden run of openvla-mini."""
    vq = write_vq(tmp_path_factory.mktemp("vq"))
    return lambda name: convert_run(name, tmp_path_factory.mktemp("minivla"), vq)[1]


@pytest.mark.parametrize("run", ["vq_libero", "vq_wrist_history2"])
def test_actions_of_a_minivla_are_those_of_the_queue(run, minivla, acting):
    folder = minivla(run)
    reference = load_policy(folder, unnorm_key=MINIVLA_KEY, constrain_actions=True)
    has_wrist = reference.model.config.images_per_moment == 2
    cameras = ["front", "wrist"] if has_wrist else ["front"]
    policy, preprocess, _ = acting(folder, unnorm_key=MINIVLA_KEY, cameras=cameras, constrain_actions=True)
    queue = ActionQueue(ChunkPolicy(reference))
    for step in range(4):
        front, wrist, state = frames(step, rows=1)
        action = policy.select_action(preprocess(observation(front, wrist, state)))
        images = [front[0], wrist[0]] if has_wrist else [front[0]]
        np.testing.assert_array_equal(action[0].numpy(), queue.act(images, TASK))
    if reference.model.config.history_length > 1:
        with pytest.raises(ValueError, match="select_action at every control step"):
            policy.predict_action_chunk(preprocess(observation(front, wrist, state)))


def test_a_robot_s_convention_is_applied_to_selected_actions_and_chunks(acting, tokens_folder):
    policy, preprocess, _ = acting(tokens_folder, robot_convention="libero", **ONE_CAMERA)
    front, wrist, state = frames(0, rows=1)
    expected = convert_action(load_policy(tokens_folder, constrain_actions=True).act(front[0], TASK), "libero")
    batch = preprocess(observation(front, wrist, state))
    np.testing.assert_array_equal(policy.select_action(batch)[0].numpy(), expected)
    np.testing.assert_array_equal(policy.predict_action_chunk(batch)[0, 0].numpy(), expected)
    assert abs(expected[-1]) == 1


def test_images_are_prepared_as_asked(acting, tokens_folder):
    policy, preprocess, _ = acting(tokens_folder, image_preset="libero", **ONE_CAMERA)
    reference = load_policy(tokens_folder, constrain_actions=True)
    front, wrist, state = frames(0, rows=1)
    batch = preprocess(observation(front, wrist, state))
    unprepared = reference.act(front[0], TASK)
    reference.processor.image_preset = "libero"
    expected = reference.act(front[0], TASK)
    np.testing.assert_array_equal(policy.select_action(batch)[0].numpy(), expected)
    assert (expected != unprepared).any()


def test_an_instruction_fills_in_for_a_missing_task(acting, tokens_folder):
    front, wrist, state = frames(0, rows=1)
    policy, preprocess, _ = acting(tokens_folder, instruction="push", **ONE_CAMERA)
    action = policy.select_action(preprocess(observation(front, wrist, state, task="")))
    reference = load_policy(tokens_folder, constrain_actions=True)
    np.testing.assert_array_equal(action[0].numpy(), reference.act(front[0], "push"))
    policy, preprocess, _ = acting(tokens_folder, **ONE_CAMERA)
    with pytest.raises(ValueError, match="needs an instruction"):
        policy.select_action(preprocess(observation(front, wrist, state, task="")))


def test_reset_begins_an_episode_of_other_environments(acting, oft_folder):
    policy, preprocess, _ = acting(oft_folder)
    first = policy.select_action(preprocess(observation(*frames(0, rows=1))))
    policy.select_action(preprocess(observation(*frames(1, rows=1))))
    with pytest.raises(ValueError, match="2 rows, the one before had 1; call reset"):
        policy.select_action(preprocess(observation(*frames(0, rows=2))))
    policy.reset()
    again = policy.select_action(preprocess(observation(*frames(0, rows=2))))
    assert again.shape == (2, 7)
    policy.reset()
    torch.testing.assert_close(policy.select_action(preprocess(observation(*frames(0, rows=1)))), first, rtol=0, atol=0)


def test_an_incomplete_observation_names_what_is_missing(acting, oft_folder):
    policy, preprocess, _ = acting(oft_folder)
    whole = preprocess(observation(*frames(0, rows=1)))
    for name in (WRIST, "observation.state"):
        with pytest.raises(KeyError, match=rf"lacks \['{name}'\]"):
            policy.select_action({key: value for key, value in whole.items() if key != name})
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\)"):
        policy.select_action({**whole, FRONT: whole[FRONT][0]})
    with pytest.raises(ValueError, match="must lie in"):
        policy.select_action({**whole, FRONT: whole[FRONT] * 255})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"takes 1 camera\(s\), and there are 2"),
        ({"cameras": ["top"]}, "'top' is not one of the image features"),
        ({"cameras": ["front", "wrist"]}, "cameras names 2"),
        (
            {"cameras": ["front"], "n_action_steps": 8},
            "n_action_steps must be 1 to 1, the length of the model's chunks",
        ),
        ({"cameras": ["front"], "unnorm_key": "unknown"}, "unknown"),
        ({"cameras": ["front"], **features(FRONT, action=6)}, None),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_a_remedy(fields, message, acting, tokens_folder, make_config):
    if message is None:  # other dimensions than the environment's, as a robot's checkpoint may have them
        with pytest.raises(ValueError, match="7 action dimensions, the feature 'action'"):
            OpenVLAPolicy(make_config(tokens_folder, **fields))
        return
    with pytest.raises((ValueError, KeyError), match=message):
        acting(tokens_folder, constrain_actions=True, **fields)


def test_a_state_of_other_dimensions_is_refused(oft_folder, make_config):
    for state in (0, 7):
        with pytest.raises(ValueError, match=r"takes observation.state of shape \(8,\)"):
            OpenVLAPolicy(make_config(oft_folder, **features(FRONT, WRIST, state=state)))


def test_several_or_no_statistics_are_refused_with_a_remedy(write_model, acting):
    with pytest.raises(ValueError, match="unnorm_key") as several:
        acting(write_model(norm_stats={"one": STATISTICS, "two": STATISTICS}), **ONE_CAMERA)
    assert "'one', 'two'" in str(several.value)
    with pytest.raises(ValueError, match="no action statistics"):
        acting(write_model(norm_stats={}), **ONE_CAMERA)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "qlora"}, "Unknown method 'qlora'; allowed"),
        ({"n_obs_steps": 2}, "n_obs_steps must be 1"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"robot_convention": "liberro"}, "Did you mean 'libero'"),
        ({"image_preset": "liberro"}, "image_preset 'liberro'"),
        ({"normalization_mapping": {"ACTION": "MEAN_STD"}}, "must stay at IDENTITY"),
    ],
)
def test_settings_without_effect_are_refused(fields, message, make_config, tokens_folder):
    with pytest.raises(ValueError, match=message):
        make_config(tokens_folder, **fields)


def test_a_policy_without_a_model_says_what_to_give(make_config):
    config = make_config("unused")
    config.pretrained_openvla = None
    with pytest.raises(ValueError, match="--policy.pretrained_openvla"):
        OpenVLAPolicy(config)


def test_a_folder_of_openvla_is_no_lerobot_checkpoint(make_config, tokens_folder):
    config = make_config(tokens_folder, **features(FRONT))
    config.pretrained_path = tokens_folder
    with pytest.raises(ValueError, match="no LeRobot checkpoint of an OpenVLA.*--policy.pretrained_openvla"):
        OpenVLAPolicy(config)
