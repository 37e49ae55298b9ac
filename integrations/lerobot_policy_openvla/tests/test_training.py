"""Losses, statistics and checkpoints are those of the openvla package."""

import copy

import numpy as np
import pytest
import torch
from conftest import ACTION_CONFIG, REPO_ID, frames, observation
from lerobot.configs import PreTrainedConfig
from lerobot_policy_openvla.__main__ import main as write_checkpoint
from lerobot_policy_openvla.modeling_openvla import OpenVLAPolicy
from openvla import load_policy
from openvla.data.lerobot import LeRobotReader
from openvla.data.statistics import compute_statistics
from openvla.training.collator import ActionCollator, model_inputs
from reach import TASK
from safetensors.torch import load_file

FRONT_ONLY = {"cameras": ["front"], "augment": False}
INDICES = [0, 5, 13]  # of the first and the second episode, which have ten steps each


def reference_steps(root, policy):
    """Return the same samples as the package's own reader gives them."""
    fields = {"cameras": policy.config.cameras, "action": "action", "proprio": "observation.state"}
    reader = LeRobotReader(root, preset=None, fields=fields, name=REPO_ID, split="all")
    episodes = list(reader)
    return [episodes[i // 10].step(i % 10, policy.model.config.chunk_length) for i in INDICES]


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("tokens_folder", FRONT_ONLY),
        ("oft_folder", {"augment": False}),
        ("tokens_folder", {"augment": False, "action_config": ACTION_CONFIG}),
        ("tokens_folder", {**FRONT_ONLY, "method": "lora", "lora_rank": 4}),
        ("tokens_folder", {**FRONT_ONLY, "gradient_checkpointing": True}),
    ],
    ids=["tokens", "oft", "tokens made oft", "lora", "checkpointing"],
)
def test_the_loss_is_that_of_the_package_s_batch(folder, settings, request, trainee, training_batch, dataset_root):
    policy = trainee(request.getfixturevalue(folder), **settings)
    loss, metrics = policy.forward(training_batch(policy, INDICES))
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in policy.get_optim_params() if parameter.grad is not None]
    processor = policy._policy.processor
    assert processor.image_preset == "none"
    batch = ActionCollator(processor, policy.model)(reference_steps(dataset_root, policy))
    policy.zero_grad()
    expected = policy.model(**model_inputs(batch, policy.model), logits_at_labels=True).loss
    expected.backward()
    assert loss.item() == expected.item() > 0
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics
    again = [parameter.grad for parameter in policy.get_optim_params() if parameter.grad is not None]
    assert len(again) == len(gradients) > 0
    for ours, theirs in zip(gradients, again, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_statistics_are_those_of_all_steps(trainee, oft_folder, dataset_meta, dataset_root):
    policy = trainee(oft_folder)
    fields = {"cameras": policy.config.cameras, "action": "action", "proprio": "observation.state"}
    reader = LeRobotReader(dataset_root, preset=None, fields=fields, name=REPO_ID, split="all")
    assert policy.model.norm_stats[REPO_ID] == compute_statistics(reader, progress=False)
    assert policy.model.config.default_unnorm_key == REPO_ID
    assert set(policy.model.norm_stats) == {"robot", REPO_ID}
    # LeRobot's own are means of the episodes' quantiles.
    exact = np.array(policy.model.norm_stats[REPO_ID]["action"]["q01"])
    assert (dataset_meta.stats["action"]["q01"] > exact + 1e-3).any()


def test_statistics_of_the_model_are_used_where_they_are_named(trainee, tokens_folder):
    policy = trainee(tokens_folder, unnorm_key="untrained", **FRONT_ONLY)
    assert set(policy.model.norm_stats) == {"untrained"}


def test_training_on_other_data_takes_that_data_s_statistics(trainee, tokens_folder, dataset_meta, tmp_path):
    trainee(tokens_folder, **FRONT_ONLY).save_pretrained(tmp_path / "first")
    write_checkpoint([str(tokens_folder), str(tmp_path / "written"), "--cameras", "front", "--unnorm-key", "untrained"])
    other = copy.copy(dataset_meta)
    other.repo_id = "tests/other"
    for checkpoint, before in (("first", REPO_ID), ("written", "untrained")):
        assert OpenVLAPolicy.from_pretrained(tmp_path / checkpoint)._policy.unnorm_key == before
        continued = OpenVLAPolicy.from_pretrained(tmp_path / checkpoint, dataset_meta=other)
        assert continued._policy.unnorm_key == "tests/other"
        assert {before, "tests/other"} <= set(continued.model.norm_stats)


def test_a_mask_is_that_of_the_configuration(trainee, tokens_folder):
    mask = [True] * 3 + [False] * 4
    policy = trainee(tokens_folder, action_mask=mask, **FRONT_ONLY)
    assert policy.model.norm_stats[REPO_ID]["action"]["mask"] == mask


def test_augmentations_depend_on_the_seed_and_the_batches_before(trainee, tokens_folder, training_batch):
    policy = trainee(tokens_folder, cameras=["front"])
    batch = training_batch(policy, INDICES)

    def loss(seed, batches):
        torch.manual_seed(seed)
        policy.config.trained_batches = batches
        return policy.forward(batch)[0].item()

    first = loss(1, 0)
    assert policy.config.trained_batches == 1
    torch.rand(1)  # as LeRobot's loader draws a number wherever it begins
    second = policy.forward(batch)[0].item()
    assert len({first, second, loss(2, 0)}) == 3
    assert (loss(1, 0), loss(1, 1)) == (first, second)
    policy.eval()
    assert policy.forward(batch)[0].item() == policy.forward(batch)[0].item() not in (first, second)
    assert policy.config.trained_batches == 2


def test_chunks_end_with_the_episode_unless_they_are_padded(make_config, oft_folder):
    assert make_config(oft_folder).drop_n_last_frames == 3
    assert make_config(oft_folder).action_delta_indices == [0, 1, 2, 3]
    assert make_config(oft_folder, pad_last_chunk=True).drop_n_last_frames == 0


def trained(policy, batch):
    """Take one optimizer step, so that the weights are not those of the folder."""
    torch.manual_seed(0)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy.forward(batch)[0].backward()
    optimizer.step()
    return policy


@pytest.mark.parametrize(
    ("settings", "is_adapter"),
    [
        ({}, False),
        ({"method": "lora", "lora_rank": 4}, True),
        ({"method": "lora", "lora_rank": 4, "action_config": ACTION_CONFIG, "cameras": None}, True),
    ],
    ids=["full", "lora", "lora of an oft"],
)
def test_a_checkpoint_acts_and_holds_a_folder_of_the_package(
    settings, is_adapter, trainee, tokens_folder, training_batch, tmp_path
):
    policy = trainee(
        tokens_folder, **{"cameras": ["front"], "constrain_actions": "action_config" not in settings, **settings}
    )
    policy = trained(policy, training_batch(policy, INDICES)).eval()
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "openvla/adapter_config.json").is_file() == is_adapter
    assert PreTrainedConfig.from_pretrained(tmp_path).type == "openvla"
    loaded = OpenVLAPolicy.from_pretrained(tmp_path)
    assert not loaded.training
    front, wrist, state = frames(0, rows=1)
    batch = observation(front, wrist, state)
    action = policy.select_action(batch)[0].numpy()
    np.testing.assert_array_equal(loaded.select_action(batch)[0].numpy(), action)
    of_package = load_policy(tmp_path / "openvla", constrain_actions=policy.config.constrain_actions)
    images = [front[0], wrist[0]] if len(policy.config.cameras) == 2 else front[0]
    proprio = state[0] if policy.model.config.proprio_dim else None
    np.testing.assert_array_equal(np.atleast_2d(of_package.act(images, TASK, proprio))[0], action)
    assert of_package.processor.image_preset == "libero"  # as it was trained with augmentation
    before = load_policy(tokens_folder, constrain_actions=True)
    name = "language_model.model.layers.0.self_attn.q_proj"
    weights = [x.model.get_submodule(name) for x in (before, of_package)]
    assert not torch.equal(*[module.weight for module in weights]) or hasattr(weights[1], "lora_A")


def test_a_gathered_state_dict_is_written(trainee, tokens_folder, tmp_path):
    policy = trainee(tokens_folder, **FRONT_ONLY)
    weights = {name: tensor + 1 for name, tensor in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state_dict=weights)
    saved = load_file(tmp_path / "openvla/model.safetensors")
    assert {f"model.{name}" for name in saved} == set(weights)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, weights[f"model.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("field", "value"), [("lora_rank", 8), ("lora_alpha", 2), ("method", "full")])
def test_an_adapter_is_continued_as_it_is(field, value, trainee, tokens_folder, make_config, dataset_meta, tmp_path):
    trainee(tokens_folder, method="lora", lora_rank=4, **FRONT_ONLY).save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    continued = OpenVLAPolicy.from_pretrained(tmp_path, config=config, dataset_meta=dataset_meta)
    assert continued.get_optim_params()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"asks for {{'{field}': {value!r}}}"):
        OpenVLAPolicy.from_pretrained(tmp_path, config=config, dataset_meta=dataset_meta)


def test_a_policy_that_acts_is_not_trained(acting, trainee, tokens_folder, training_batch):
    batch = training_batch(trainee(tokens_folder, **FRONT_ONLY), INDICES)
    policy, *_ = acting(tokens_folder, cameras=["front"])
    for call in (policy.get_optim_params, lambda: policy.forward(batch)):
        with pytest.raises(ValueError, match="loaded to act"):
            call()


def test_what_the_loss_cannot_do_is_refused(trainee, tokens_folder, training_batch):
    policy = trainee(tokens_folder, **FRONT_ONLY)
    batch = training_batch(policy, INDICES)
    with pytest.raises(ValueError, match="leave sample_weighting out"):
        policy.forward(batch, reduction="none")
    with pytest.raises(ValueError, match="--policy.method=lora"):
        policy.wrap_with_peft(peft_cli_overrides={"r": 4})
    with pytest.raises(KeyError, match="needs 'action'"):
        policy.forward({name: value for name, value in batch.items() if name != "action"})
    with pytest.raises(ValueError, match="predicts 1 actions"):
        policy.forward({**batch, "action": batch["action"].repeat(1, 2, 1)})
    with pytest.raises(ValueError, match="dimensions"):
        policy.forward({**batch, "action": batch["action"][..., :6]})


def test_a_minivla_is_not_trained(trainee, tmp_path):
    from minivla import convert_run, write_vq

    _, folder = convert_run("vq_libero", tmp_path, write_vq(tmp_path / "vq"))
    with pytest.raises(ValueError, match=r"VQ actions \(MiniVLA\), which openvla does not train"):
        trainee(folder, cameras=["front"])


def test_statistics_of_streamed_data_must_be_named(trainee, tokens_folder, dataset_meta, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_meta, "root", tmp_path)
    with pytest.raises(ValueError, match="download the dataset instead of streaming it"):
        trainee(tokens_folder, **FRONT_ONLY)
