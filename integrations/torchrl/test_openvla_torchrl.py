"""The TorchRL wrapper with TorchRL's own environment, replay buffer and losses, on the CPU."""

import numpy as np
import pytest
import torch
from openvla.benchmarking.sizes import CHUNK_FIELDS
from openvla.errors_openvla import OpenVLAValueError
from openvla.inference.robot_conventions import convert_action
from openvla.tiny import build_tiny
from openvla_torchrl import OpenVLAWrapper
from tensordict import NonTensorStack, TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.envs.custom.vla import ToyVLAEnv
from torchrl.envs.transforms import ActionTokenizerTransform, MultiAction
from torchrl.objectives import ClipPPOLoss

KINDS = {"tokens": {}, "chunks": {**CHUNK_FIELDS, "action_head": None}}
BATCH, BINS = 4, 256


@pytest.fixture(scope="module")
def models():
    """Return model and processor of each kind."""
    return {kind: build_tiny(**fields) for kind, fields in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def wrapper(models, kind, **settings):
    """Return a policy that samples."""
    key = "untrained" if kind == "chunks" else None
    settings = {"robot_convention": "libero", "mode": "sample", "log_probs_mode": "token", **settings}
    return OpenVLAWrapper(*models[kind], unnorm_key=key, temperature=1.6, **settings)


def observations(batch=(BATCH,), seed=0):
    """Return canonical observations."""
    random = np.random.RandomState(seed)
    frames = torch.from_numpy(random.randint(0, 256, (2, *batch, 3, 64, 64), dtype=np.uint8))
    state = torch.from_numpy(random.uniform(-1, 1, (*batch, 8)).astype(np.float32))
    data = TensorDict({"observation": {"image": frames[0], "wrist_image": frames[1], "state": state}}, batch_size=batch)
    count = int(np.prod(batch))
    instructions = ["open the drawer", "pick up the red block and put it down"] * count
    stack = NonTensorStack(*instructions[:count])
    return data.set("language_instruction", stack.reshape(batch) if len(batch) > 1 else stack)


def loss_of(policy, **settings):
    """Return TorchRL's loss as its recipe for VLA policies builds it."""
    loss = ClipPPOLoss(actor_network=policy, critic_network=None, clip_epsilon=0.2, entropy_bonus=False, **settings)
    keys = policy.tensor_keys
    loss.set_keys(action=keys.action_tokens, sample_log_prob=keys.log_probs, advantage="advantage")
    return loss


def advantages(batch):
    """Return advantages that tell the samples apart."""
    return torch.linspace(-1, 1, len(batch))[:, None]


@pytest.mark.parametrize("log_probs_mode", ["token", "sequence"])
def test_the_ratio_is_one_and_a_step_changes_the_weights(models, kind, log_probs_mode):
    torch.manual_seed(0)
    policy = wrapper(models, kind, log_probs_mode=log_probs_mode)
    with torch.no_grad():
        data = policy(observations())
    tokens = data[policy.tensor_keys.action_tokens]
    assert tokens.shape == (BATCH, policy.chunk_size, 7)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < policy.vocab_size == BINS
    shape = tokens.shape if log_probs_mode == "token" else (BATCH,)
    assert data[policy.tensor_keys.log_probs].shape == shape
    data["advantage"] = advantages(data) if log_probs_mode == "sequence" else advantages(data)[..., None, None]
    loss = loss_of(policy)
    values = loss(data)
    assert torch.equal(values["kl_approx"], torch.zeros_like(values["kl_approx"]))  # the ratio is 1 in every bit
    assert float(values["clip_fraction"]) == 0
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    values["loss_objective"].backward()
    optimizer.step()
    after = dict(policy.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    with torch.no_grad():  # the model is shared by the tests
        for name, parameter in after.items():
            parameter.copy_(before[name])
    for part in ("language_model", "projector", "vision_backbone"):
        assert any(name.startswith(part) for name in changed), part


def test_the_wrapper_has_the_probabilities_of_the_package(models, kind):
    policy = wrapper(models, kind)
    with torch.no_grad():
        data = policy(observations())
        distribution = policy.get_dist(data)
    model, first = policy.model, policy.model.action_token_ids.start
    inputs, _ = policy._inputs(data)
    tokens = data[policy.tensor_keys.action_tokens] + first
    tokens = tokens if kind == "chunks" else tokens[:, 0]
    log_probs, entropy = model.action_log_probs(**inputs, tokens=tokens, temperature=1.6)
    torch.testing.assert_close(data[policy.tensor_keys.log_probs].reshape(tokens.shape), log_probs.detach())
    torch.testing.assert_close(distribution.entropy().reshape(tokens.shape), entropy.detach())


def test_the_likeliest_tokens_are_the_package_s_action(models, kind):
    policy = wrapper(models, kind, output_mode="both")
    data = observations()
    with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
        policy(data)
    inputs, _ = policy._inputs(data)
    expected = policy.model.predict_action(**inputs, constrain_actions=True).reshape(BATCH, policy.chunk_size, 7)
    expected[..., -1] = expected[..., -1].clip(0, 1)
    expected = np.stack([convert_action(chunk, "libero") for chunk in expected]).astype(np.float32)
    assert np.array_equal(data[policy.tensor_keys.action_chunk].numpy(), expected)


def test_rollouts_of_an_environment_are_replayed_with_ratio_one(models):
    """TorchRL's toy environment executes the tokens; its replay buffer holds them; the loss evaluates them."""
    torch.manual_seed(0)
    policy = wrapper(models, "tokens")
    environment = TransformedEnv(ToyVLAEnv(action_dim=7, state_dim=14, image_shape=(3, 32, 32), batch_size=(2,)))
    environment.append_transform(MultiAction(stack_rewards=False))
    environment.append_transform(ActionTokenizerTransform(policy.action_tokenizer))
    with torch.no_grad():
        rollout = environment.rollout(3, policy)
    rows = rollout.reshape(-1)
    rows["advantage"] = advantages(rows)[..., None, None]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(6), batch_size=6)
    buffer.extend(rows)
    values = loss_of(policy)(buffer.sample())
    assert float(values["kl_approx"].abs().max()) < 1e-5  # another batch than in the rollout: products round otherwise
    assert values["loss_objective"].requires_grad


def test_a_saved_checkpoint_is_loaded(models, tmp_path):
    for part in models["tokens"]:
        part.save_pretrained(tmp_path)
    policy = OpenVLAWrapper.from_pretrained(str(tmp_path), robot_convention="raw", output_mode="both")
    data = observations()
    with torch.no_grad():
        policy(data)  # the likeliest tokens: mode="sample" is not given
    expected = wrapper(models, "tokens", robot_convention="raw", mode="greedy", output_mode="both")
    with torch.no_grad():
        other = expected(observations())
    key = policy.tensor_keys.action_chunk
    assert data[key].dtype == torch.float32
    assert torch.equal(data[key], other[key])


def test_batches_of_several_dimensions(models, kind):
    torch.manual_seed(0)
    policy = wrapper(models, kind, pad_to=96)
    with torch.no_grad():
        flat = policy(observations((4,)))
    data = flat.select("observation", "language_instruction", policy.tensor_keys.action_tokens).reshape(2, 2)
    with torch.no_grad():
        log_probs = policy.log_prob(data)[policy.tensor_keys.log_probs]
    assert torch.equal(log_probs.flatten(0, 1), flat[policy.tensor_keys.log_probs])


def test_what_has_no_such_distribution_is_refused(models):
    with pytest.raises(OpenVLAValueError, match="no continuous head"):
        OpenVLAWrapper(*build_tiny(**CHUNK_FIELDS), robot_convention="raw")
    with pytest.raises(OpenVLAValueError, match="num_samples needs a model with parallel decoding"):
        wrapper(models, "tokens", num_samples=2)
    with pytest.raises(OpenVLAValueError, match="Unknown robot convention"):
        wrapper(models, "tokens", robot_convention="libre")
    with pytest.raises(OpenVLAValueError, match="its distribution needs"):
        wrapper(models, "tokens").get_dist(observations())
