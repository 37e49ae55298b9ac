"""Sampled actions and their log-probabilities: one distribution in rollouts and in training, with gradient."""

import numpy as np
import pytest
import torch
from minivla import convert_run, write_vq
from openvla import AutoModelForVision2Seq, AutoProcessor, ValueHead, observation_batch
from openvla.benchmarking.sizes import CHUNK_FIELDS
from openvla.inference.sampling import action_log_distribution
from openvla.tiny import build_tiny
from torch.nn import functional

pytestmark = pytest.mark.lane

INSTRUCTIONS = ("open the drawer", "pick up the red block and put it down")
# Ratios of probabilities; products over a batch round otherwise than over one sample, and padding moves kernels.
FLOAT32_ATOL, BFLOAT16_ATOL = 1e-5, 2e-2
KINDS = ("tokens", "chunks", "vq")


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Return model and processor of each kind."""
    folder = tmp_path_factory.mktemp("vq")
    _, hub = convert_run("vq_libero", folder, write_vq(folder / "vq"))
    return {
        "tokens": build_tiny(),
        "chunks": build_tiny(**{**CHUNK_FIELDS, "action_head": None}),
        "vq": (AutoModelForVision2Seq.from_pretrained(hub).eval(), AutoProcessor.from_pretrained(hub)),
    }


@pytest.fixture(params=KINDS)
def policy(request, policies):
    """Return a model, inputs of a batch of two observations, and the key of its statistics."""
    model, processor = policies[request.param]
    random = np.random.RandomState(0)
    cameras = processor.num_images_in_input
    frames = random.randint(0, 256, (2, cameras, 64, 64, 3), dtype=np.uint8)
    frames = [list(images) if cameras > 1 else images[0] for images in frames]
    states = random.uniform(-1, 1, (2, model.config.proprio_dim)) if model.config.proprio_dim else None
    batch = observation_batch(processor, frames, INSTRUCTIONS, states)
    key = next(key for key, entry in model.norm_stats.items() if len(entry["action"]["q01"]) == 7)
    return model, {**batch, "unnorm_key": key}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_of(inputs, index):
    """Return the inputs of one sample of a batch, with its padding."""
    return {name: value if name == "unnorm_key" else value[index : index + 1] for name, value in inputs.items()}


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.6}, {"temperature": 0.5, "top_k": 20}])
def test_sampled_tokens_have_the_same_probability_in_training(policy, settings):
    model, inputs = policy
    actions, tokens, log_probs = model.sample_actions(**inputs, **settings, generator=generator())
    trained, entropy = model.action_log_probs(**inputs, **settings, tokens=tokens)
    assert log_probs.shape == trained.shape == entropy.shape == tokens.shape
    assert torch.equal(trained.detach(), log_probs)  # one code path: the ratio is 1
    shape = (2, model.config.chunk_length, 7) if model.config.chunk_length > 1 else (2, 7)
    assert actions.dtype == np.float64
    assert actions.shape == shape
    entry = model.action_statistics(inputs["unnorm_key"])
    decoded = [entry.unnormalize(model.action_tokenizer.decode(ids)) for ids in tokens.numpy()]
    assert np.array_equal(actions, np.stack(decoded))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_ATOL), (torch.bfloat16, BFLOAT16_ATOL)])
def test_a_batch_has_the_probabilities_of_its_samples(dtype, tolerance):
    model, processor = build_tiny()
    model.to(dtype)
    frames = np.random.RandomState(1).randint(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    inputs = observation_batch(processor, frames, INSTRUCTIONS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    _, tokens, log_probs = model.sample_actions(**inputs, generator=generator())
    for index in range(2):
        single, _ = model.action_log_probs(**one_of(inputs, index), tokens=tokens[index : index + 1])
        assert float(((single[0].detach() - log_probs[index]).exp() - 1).abs().max()) < tolerance


def test_a_low_temperature_is_greedy_decoding(policy):
    model, inputs = policy
    expected = model.predict_action(**inputs, constrain_actions=True, return_dict=True)
    actions, tokens, log_probs = model.sample_actions(**inputs, temperature=1e-6)
    assert np.array_equal(tokens.numpy(), expected.token_ids)
    assert np.array_equal(actions, expected.actions)
    assert float(log_probs.exp().min()) == pytest.approx(1)


def test_tokens_are_drawn_with_their_probability(policies):
    """The mean log-probability of draws is minus the entropy, within five standard errors."""
    model, processor = policies["tokens"]
    frame = np.random.RandomState(2).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = observation_batch(processor, [frame] * 96, INSTRUCTIONS[:1] * 96)
    _, tokens, log_probs = model.sample_actions(**inputs, generator=generator())
    _, entropy = model.action_log_probs(**one_of(inputs, 0), tokens=tokens[:1])
    entropy = entropy.detach()
    first = log_probs[:, 0]
    error = first.std() / len(first) ** 0.5
    assert float((first.mean() + entropy[0, 0]).abs()) < 5 * float(error)
    assert len(tokens[:, 0].unique()) > 20
    assert torch.equal(tokens, model.sample_actions(**inputs, generator=generator())[1])
    assert not torch.equal(tokens, model.sample_actions(**inputs, generator=generator(1))[1])


def test_the_gradient_is_that_of_cross_entropy_among_action_tokens(policies):
    model, processor = policies["tokens"]
    frame = np.random.RandomState(3).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = processor(instruction=INSTRUCTIONS[0], images=frame)
    _, tokens, _ = model.sample_actions(**inputs, generator=generator())
    weight = model.language_model.get_decoder().layers[0].mlp.up_proj.weight

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return weight.grad.clone()

    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -8:-1]
    allowed = model.action_token_ids
    loss = functional.cross_entropy(logits[:, allowed], tokens[0] - allowed.start, reduction="sum")
    log_probs, _ = model.action_log_probs(**inputs, tokens=tokens)
    expected, actual = gradient(loss), gradient(-log_probs.sum())
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm()) <= 1e-5 * float(expected.norm())


def test_top_k_draws_from_the_likeliest_tokens_alone(policy):
    model, inputs = policy
    _, tokens, _ = model.sample_actions(**inputs, top_k=1)
    log_probs, entropy = model.action_log_probs(**inputs, tokens=tokens, top_k=1)
    assert torch.equal(log_probs, torch.zeros_like(log_probs))
    assert torch.equal(entropy, torch.zeros_like(entropy))
    other = torch.where(tokens == model.action_token_ids.start, tokens + 1, tokens - 1)
    model.zero_grad()
    log_probs, entropy = model.action_log_probs(**inputs, tokens=other, top_k=2)
    assert torch.isneginf(log_probs).any()
    assert entropy.isfinite().all()
    log_probs.exp().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("top_k", [None, 20])
def test_the_distribution_holds_the_log_probabilities_of_tokens(policy, top_k):
    model, inputs = policy
    _, tokens, log_probs = model.sample_actions(**inputs, temperature=1.6, top_k=top_k)
    before = {} if model.config.parallel_decoding else {"tokens": tokens}
    everything = action_log_distribution(model, **inputs, **before, temperature=1.6, top_k=top_k)
    assert torch.equal(everything.gather(-1, (tokens - model.action_token_ids.start)[..., None])[..., 0], log_probs)
    torch.testing.assert_close(everything.exp().sum(-1), torch.ones(tokens.shape))
    assert int(everything.isfinite().sum(-1).max()) == (top_k or everything.shape[-1])
    with pytest.raises(ValueError, match="tokens are needed of a model without parallel decoding, and of no other"):
        action_log_distribution(model, **inputs, **({} if before else {"tokens": tokens}))


def test_values_have_a_gradient_and_the_head_is_saved(policy, tmp_path):
    model, inputs = policy
    torch.manual_seed(0)
    head = ValueHead(model.config.text_config.hidden_size)
    *_, tokens, _, values = model.sample_actions(**inputs, value_head=head)
    *_, trained = model.action_log_probs(**inputs, tokens=tokens, value_head=head)
    assert values.shape == trained.shape == (2,)
    assert not values.requires_grad
    torch.testing.assert_close(trained.detach(), values, rtol=1e-5, atol=1e-6)
    trained.sum().backward()
    assert float(head.layers[0].weight.grad.norm()) > 0
    head.save_pretrained(tmp_path)
    loaded = ValueHead.from_pretrained(tmp_path)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_folder_without_a_value_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no value_head.safetensors"):
        ValueHead.from_pretrained(tmp_path)


def test_batches_of_observations_have_one_length(policies):
    model, processor = policies["tokens"]
    frames = np.random.RandomState(4).randint(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    padded = observation_batch(processor, frames, INSTRUCTIONS, pad_to=128)
    assert padded["input_ids"].shape == (2, 128)
    expected = model.predict_action(**observation_batch(processor, frames, INSTRUCTIONS))
    assert np.array_equal(model.predict_action(**padded), expected)
    with pytest.raises(ValueError, match="A prompt has .* tokens, more than max_length=20"):
        observation_batch(processor, frames, INSTRUCTIONS, pad_to=20)
    with pytest.raises(ValueError, match="Each environment has one of each, got {'frames': 2, 'instructions': 1"):
        observation_batch(processor, frames, INSTRUCTIONS[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0; predict_action is greedy"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be from 1 to"),
        ({"top_k": 1000}, "top_k must be from 1 to"),
        ({"pixel_values": None}, "input_ids and pixel_values are needed"),
    ],
)
def test_arguments_without_a_distribution_are_refused(policy, changes, message):
    model, inputs = policy
    _, tokens, _ = model.sample_actions(**inputs)
    with pytest.raises(ValueError, match=message):
        model.sample_actions(**{**inputs, **changes})
    with pytest.raises(ValueError, match=message):
        model.action_log_probs(**{**inputs, **changes}, tokens=tokens)


def test_tokens_that_are_no_sampled_actions_are_refused(policy):
    model, inputs = policy
    _, tokens, _ = model.sample_actions(**inputs)
    with pytest.raises(ValueError, match="tokens must be action tokens, integers from"):
        model.action_log_probs(**inputs, tokens=torch.full_like(tokens, 5))
    with pytest.raises(ValueError, match="tokens must be action tokens, integers from"):
        model.action_log_probs(**inputs, tokens=tokens.float())
    with pytest.raises(ValueError, match="tokens must have shape"):
        model.action_log_probs(**inputs, tokens=tokens[:1])


def test_states_that_a_model_does_not_take_are_refused(policies):
    model, processor = policies["tokens"]
    frame = np.zeros((64, 64, 3), np.uint8)
    inputs = observation_batch(processor, [frame], INSTRUCTIONS[:1], np.zeros((1, 8)))
    with pytest.raises(ValueError, match="trained without proprio"):
        model.sample_actions(**inputs)
    inputs.pop("proprio")
    _, tokens, _ = model.sample_actions(**inputs)
    with pytest.raises(ValueError, match="trained without proprio"):
        model.action_log_probs(**inputs, tokens=tokens, proprio=np.zeros((1, 8)))


def test_continuous_heads_have_no_distribution():
    model, processor = build_tiny(**CHUNK_FIELDS)
    frames = [[np.zeros((64, 64, 3), np.uint8)] * 2]
    inputs = observation_batch(processor, frames, INSTRUCTIONS[:1], np.zeros((1, 8)))
    with pytest.raises(ValueError, match="action_head 'l1' has no distribution of tokens"):
        model.sample_actions(**inputs)
