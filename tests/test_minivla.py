"""MiniVLA equals openvla-mini: prompts, pixels, patches, tokens, codes and actions of every golden case."""

import hashlib
import importlib.util

import numpy as np
import pytest
import torch
from minivla import LIBERO_VQ, MINIVLA, RUNS, SIZES, convert_run, read_json, require_golden_pixels, write_vq
from openvla import ActionTokenizer, AutoModelForVision2Seq, AutoProcessor, Policy, VQActionTokenizer
from openvla.inference.robot_conventions import convert_action
from reference import FEATURE_ATOL, LOGIT_ATOL

pytestmark = pytest.mark.lane
# The authors' own code differs by that much between CPUs.
VQ_ATOL = 1e-6
CASES = read_json("predict.json")["cases"]
GOLDEN_ARRAYS = np.load(MINIVLA / "predict.npz")
IMAGES = np.load(MINIVLA / "images.npz")
VQ_ARRAYS = np.load(MINIVLA / "vq.npz")
# Arguments that have no counterpart: the reference decodes prompt tokens where the answer ends early, here it is an
# error (test_an_early_end_is_an_error).
EARLY_END = "vq_libero/early_eos"


@pytest.fixture(scope="session")
def vq_folder(tmp_path_factory):
    return write_vq(tmp_path_factory.mktemp("vq"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, vq_folder):
    """A function that converts a run once."""
    converted = {}

    def folder(name):
        if name not in converted:
            converted[name] = convert_run(name, tmp_path_factory.mktemp("minivla"), vq_folder)
        return converted[name]

    return folder


@pytest.fixture(scope="session")
def loaded(folders):
    """A function that loads a converted run's model and processor once; frames are taken as they are."""
    cache = {}

    def load(name):
        if name not in cache:
            _, hub = folders(name)
            model = AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=torch.float32).eval()
            processor = AutoProcessor.from_pretrained(hub)
            processor.image_preset = None
            cache[name] = model, processor
        return cache[name]

    return load


def image(index):
    names = sorted(IMAGES.files)
    return IMAGES[names[index]]


def inputs_of(case, processor):
    images = [image(index) for index in case["images"]]
    return processor(instruction=case["instruction"], images=images if len(images) > 1 else images[0])


def towers(case, pixel_values):
    """Pixels of each tower as the reference has them: images on an axis of their own where there are several."""
    stacked = pixel_values.unflatten(1, (len(case["images"]), 6))
    parts = {"dino": stacked[:, :, :3], "siglip": stacked[:, :, 3:]}
    return {name: part if len(case["images"]) > 1 else part[:, 0] for name, part in parts.items()}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_golden_case_has_the_reference_s_ids_tokens_and_action(case, loaded):
    require_golden_pixels(case["images"])
    model, processor = loaded(case["run"])
    inputs = inputs_of(case, processor)
    assert inputs["input_ids"].tolist() == [case["input_ids"]]
    for name, pixels in towers(case, inputs["pixel_values"]).items():
        assert list(pixels.shape) == case["pixel_values_shape"][name]
        digest = hashlib.sha256(np.ascontiguousarray(pixels.numpy()).tobytes()).hexdigest()
        assert digest == case["pixel_values_sha256"][name]
    if case["name"] == EARLY_END:
        return
    unnorm_key = case["unnorm_key"]
    output = model.predict_action(**inputs, unnorm_key=unnorm_key, return_dict=True, **case["kwargs"])
    assert output.token_ids.tolist() == case["generated_ids"]
    first = model.predict_action(**inputs, unnorm_key=unnorm_key, **case["kwargs"], **first_action(model))
    if model.config.action_vq is None:
        assert output.actions.tolist() == case["action"]
        assert first.tolist() == case["action"]
        return
    assert model.action_tokenizer.codes(output.token_ids).tolist() == case["codes"]
    chunk = GOLDEN_ARRAYS[f"{case['name']}/chunk"]
    assert output.actions.shape == chunk.shape == (model.config.chunk_length, 7)
    assert output.actions.dtype == np.float64
    np.testing.assert_allclose(output.actions, chunk, rtol=0, atol=VQ_ATOL)
    normalized = GOLDEN_ARRAYS[f"{case['name']}/normalized_chunk"]
    assert output.normalized_actions.dtype == np.float32
    np.testing.assert_allclose(output.normalized_actions, normalized, rtol=0, atol=VQ_ATOL)
    np.testing.assert_allclose(first, case["action"], rtol=0, atol=VQ_ATOL)


def first_action(model):
    return {} if model.config.action_vq is None else {"actions": "first"}


KEPT = [case for case in CASES if f"{case['name']}/features" in GOLDEN_ARRAYS.files]


@pytest.mark.parametrize("case", KEPT, ids=[case["name"] for case in KEPT])
def test_a_kept_case_has_the_reference_s_patches_and_logits(case, loaded):
    require_golden_pixels(case["images"])
    model, processor = loaded(case["run"])
    inputs = inputs_of(case, processor)
    for name, pixels in towers(case, inputs["pixel_values"]).items():
        assert np.array_equal(pixels[..., 3::16, 5::16].numpy(), GOLDEN_ARRAYS[f"{case['name']}/pixels_{name}"])
    with torch.no_grad():
        features = model.vision_backbone(inputs["pixel_values"])
        projected = model.get_image_features(inputs["pixel_values"])
        logits = model(**inputs).logits[0, -1]
    assert features.shape[1] == 256 * len(case["images"])
    for name, tensor in (("features", features), ("projected", projected)):
        expected = GOLDEN_ARRAYS[f"{case['name']}/{name}"]
        np.testing.assert_allclose(tensor[:, ::16].numpy(), expected, rtol=0, atol=FEATURE_ATOL)
    expected = GOLDEN_ARRAYS[f"{case['name']}/logits_first_step"]
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=LOGIT_ATOL)


@pytest.mark.parametrize("case", read_json("prompts.json"), ids=lambda case: case["instruction"][:20])
def test_the_prompt_is_qwen_s_to_the_letter(case, loaded):
    _, processor = loaded("bins_extra")
    assert processor.prompt(case["instruction"]) == case["prompt"]
    ids = processor(instruction=case["instruction"], images=image(0))["input_ids"]
    assert ids.tolist() == [case["ids_tiny"]]


VQ_RUNS = {"libero": "vq_libero", "libero_h0": "vq_h0", "bridge": "vq_bridge"}


@pytest.mark.parametrize("name", VQ_RUNS)
def test_chunks_and_codes_convert_as_in_the_reference(name, loaded):
    tokenizer = loaded(VQ_RUNS[name])[0].action_tokenizer
    golden = {key.split("/")[1]: VQ_ARRAYS[key] for key in VQ_ARRAYS.files if key.startswith(f"{name}/")}
    facts = read_json("vq.json")[name]
    assert isinstance(tokenizer, VQActionTokenizer)
    assert (tokenizer.vocab_size, tokenizer.n_bins) == (facts["tokenizer_len"], facts["n_bins"])
    assert tokenizer.first_token_id - 1 == facts["action_token_begin_idx"]
    token_ids = tokenizer.encode(golden["chunks"])
    assert np.array_equal(token_ids, golden["token_ids"])
    assert np.array_equal(tokenizer.codes(token_ids), golden["codes"])
    np.testing.assert_allclose(tokenizer.decode(token_ids), golden["decoded"], rtol=0, atol=VQ_ATOL)
    random_ids = tokenizer.vocab_size - 1 - golden["random_codes"]
    np.testing.assert_allclose(tokenizer.decode(random_ids), golden["random_decoded"], rtol=0, atol=VQ_ATOL)
    np.testing.assert_allclose(tokenizer.decode(golden["odd_ids"])[0], golden["odd_decoded"], rtol=0, atol=VQ_ATOL)
    np.testing.assert_allclose(
        tokenizer.decode(golden["odd_ids"][None])[:, 0], golden["odd_decoded_2d"], rtol=0, atol=VQ_ATOL
    )


def test_other_shapes_are_no_chunk(loaded):
    tokenizer = loaded("vq_libero")[0].action_tokenizer
    with pytest.raises(ValueError, match="A chunk has 7 tokens, got shape"):
        tokenizer.decode(np.full(6, 700))
    with pytest.raises(ValueError, match=r"must hold \(8, 7\) finite numbers, got shape \(7,\)"):
        tokenizer.encode(np.zeros(7))
    with pytest.raises(ValueError, match="finite numbers"):
        tokenizer.encode(np.full((8, 7), np.nan))
    with pytest.raises(TypeError, match="must be integers"):
        tokenizer.decode(np.full(7, 700.0))
    assert tokenizer.encode(np.zeros((2, 8, 7), np.float64)).shape == (2, 7)


def test_an_early_end_is_an_error(loaded):
    """The reference decodes tokens of the prompt as codes; ``<|endoftext|>`` alone ends an answer."""
    case = next(case for case in CASES if case["name"] == EARLY_END)
    model, processor = loaded("vq_libero")
    assert model.generation_config.eos_token_id == SIZES["vocabulary_proper"]
    with pytest.raises(ValueError, match="ended the sequence after 3 of 7 action tokens"):
        model.predict_action(**inputs_of(case, processor), unnorm_key="libero_90", **case["kwargs"])


def test_tokens_that_are_no_codes_are_counted(loaded, caplog):
    case = next(case for case in CASES if case["codes_clipped"] == 2 and case["run"] == "vq_libero")
    model, processor = loaded("vq_libero")
    inputs = inputs_of(case, processor)
    with pytest.raises(ValueError, match="2 of 7 predicted tokens are not action tokens"):
        model.predict_action(**inputs, unnorm_key=case["unnorm_key"], strict=True)
    output = model.predict_action(**inputs, unnorm_key=case["unnorm_key"], constrain_actions=True, return_dict=True)
    assert all(774 - 128 <= token < 774 for token in output.token_ids)
    assert output.bin_probabilities.shape == (7, 128)
    np.testing.assert_allclose(output.bin_probabilities.sum(-1), 1)
    assert np.array_equal(output.bin_probabilities.argmax(-1), model.action_tokenizer.codes(output.token_ids))


@pytest.mark.parametrize(
    ("run", "key", "images", "message"),
    [
        ("vq_libero", None, [0], "The model knows several datasets; pass unnorm_key"),
        ("vq_libero", "libero", [0], "Unknown unnorm_key 'libero'. Did you mean 'libero_90'"),
        ("vq_libero", "fourteen_dims", [0], "have 14 dimensions but this model predicts 7"),
        ("vq_libero", "six_dims", [0], "have 6 dimensions but this model predicts 7"),
        ("vq_libero", "libero_90", [0, 1], "1 prompts but 2 images"),
        ("vq_history2", "libero_90", [0], "1 prompts but 1 images; give each prompt 2"),
        ("vq_history2", "libero_90", [0, 1, 2], "1 prompts but 3 images; give each prompt 2"),
    ],
)
def test_what_the_reference_fails_on_is_a_clear_error(run, key, images, message, loaded):
    """expected_errors of predict.json; a list of one image to a model of one, a TypeError there, is allowed here."""
    model, processor = loaded(run)
    with pytest.raises((ValueError, KeyError), match=message):
        model.predict_action(**processor(instruction="x", images=[image(index) for index in images]), unnorm_key=key)


def test_arguments_without_effect_are_refused(loaded):
    model, processor = loaded("vq_libero")
    inputs = inputs_of(CASES[0], processor)
    with pytest.raises(ValueError, match="draft is for a model whose tokens are bins"):
        model.predict_action(**inputs, unnorm_key="libero_90", draft=np.zeros(7))
    with pytest.raises(ValueError, match="actions is 'all'"):
        model.predict_action(**inputs, unnorm_key="libero_90", actions="last")
    with pytest.raises(ValueError, match="this one has VQ actions"):
        model.score_actions(**inputs, actions=np.zeros((1, 7)), unnorm_key="libero_90")
    bins, _ = loaded("bins_extra")
    with pytest.raises(ValueError, match="actions is 'all'"):
        bins.predict_action(**inputs, actions="first")


def test_a_batch_gives_every_sample_its_chunk(loaded):
    model, processor = loaded("vq_history2")
    cases = [case for case in CASES if case["run"] == "vq_history2" and case["codes_clipped"] == 0][:3]
    inputs = processor(
        instruction=[case["instruction"] for case in cases],
        images=[[image(index) for index in case["images"]] for case in cases],
    )
    assert len({len(case["input_ids"]) for case in cases}) > 1
    chunks = model.predict_action(**inputs, unnorm_key="libero_90")
    expected = np.stack([GOLDEN_ARRAYS[f"{case['name']}/chunk"] for case in cases])
    np.testing.assert_allclose(chunks, expected, rtol=0, atol=VQ_ATOL)


@pytest.mark.parametrize("run", ["vq_libero", "vq_wrist_history2", "bins_extra_wrist"])
def test_the_fast_decoder_and_the_plain_one_agree(run, loaded):
    model, processor = loaded(run)
    case = next(case for case in CASES if case["run"] == run)
    outputs = [
        model.predict_action(**inputs_of(case, processor), unnorm_key="libero_90", fast=fast, return_dict=True)
        for fast in (True, False)
    ]
    assert outputs[0].token_ids.tolist() == outputs[1].token_ids.tolist() == case["generated_ids"]
    assert np.array_equal(outputs[0].actions, outputs[1].actions)


def test_the_configuration_says_what_the_run_was(loaded):
    for run in RUNS:
        config, facts = loaded(run)[0].config, SIZES["runs"][run]
        assert config.num_images_in_input == facts["image_sequence_len"]
        assert config.history_length == facts["image_sequence_len"] // (2 if facts["use_wrist_image"] else 1)
        assert (config.action_vq is None) == (facts["vq"] is None)
        assert config.vocab_size == (774 if "extra" in facts["action_tokenizer"] else 496)
    fields = {"num_codes": 256, "num_rounds": 7, "latent_dim": 16, "hidden_dim": 128, "act_scale": 1.0}
    assert loaded("vq_bridge")[0].config.action_vq == fields
    assert loaded("vq_h0")[0].config.action_vq["act_scale"] == 1.5
    assert LIBERO_VQ in SIZES["runs"]["vq_history2"]["vq"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kwargs", [{}, {"device_map": {"": "cpu"}}], ids=["plain", "device_map"])
def test_the_autoencoder_stays_float32(dtype, kwargs, folders, loaded, tmp_path):
    if kwargs and importlib.util.find_spec("accelerate") is None:
        pytest.skip("device_map needs accelerate")
    _, hub = folders("vq_libero")
    exact = loaded("vq_libero")[0].action_vq.state_dict()
    model = AutoModelForVision2Seq.from_pretrained(hub, torch_dtype=getattr(torch, dtype), **kwargs)
    assert model.dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForVision2Seq.from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))
    for other in (model, again, model.float(), model.half(), model.to(torch.bfloat16)):
        for name, tensor in other.action_vq.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact[name])


def test_decoding_is_float32_under_autocast(loaded):
    tokenizer = loaded("vq_libero")[0].action_tokenizer
    ids = VQ_ARRAYS["libero/token_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = tokenizer.decode(ids)
    assert np.array_equal(inside, tokenizer.decode(ids))


@pytest.mark.parametrize("name", ["extra", "last", "qwen25_extra", "qwen25_last"])
def test_bins_are_openvla_mini_s(name):
    golden = read_json("bins.json")[name]
    tokenizer = ActionTokenizer(golden["tokenizer_len"])
    assert tokenizer.encode(golden["actions"]).tolist() == golden["ids"]
    assert tokenizer.decode(golden["ids"]).tolist() == golden["decoded"]
    assert tokenizer.first_token_id - 1 == golden["action_token_begin_idx"]


@pytest.mark.parametrize("name", read_json("libero_eval.json")["episodes"])
def test_actions_reach_libero_as_openvla_mini_s(name):
    episode = read_json("libero_eval.json")["episodes"][name]
    for action, expected in zip(episode["policy_actions"], episode["env_actions"]):
        if action[-1] == 0.5:
            expected[-1] = 1.0  # half open: np.sign gives 0 there, which is no command; here the gripper closes
        action[-1] = np.clip(action[-1], 0, 1)  # as openvla evaluate does; convert_action refuses 1.3
        assert convert_action(np.array(action), "libero").tolist() == expected


def test_a_policy_executes_the_first_action_where_asked(loaded):
    case = next(case for case in CASES if case["run"] == "vq_wrist" and case["codes_clipped"] == 0)
    policy = Policy(*loaded("vq_wrist"), "libero_90", actions="first")
    action = policy.act([image(index) for index in case["images"]], case["instruction"])
    np.testing.assert_allclose(action, case["action"], rtol=0, atol=VQ_ATOL)
