"""The vision-language model: forward, loss, gradients, caches and text generation, against the reference."""

import numpy as np
import pytest
import torch
from openvla import PrismaticConfig, PrismaticForConditionalGeneration
from openvla.compatibility_openvla import (
    CACHE_FIELD,
    MKL_FUNCTIONS,
    cache_of,
    is_checkpointing,
)
from openvla.tiny import build_tiny, build_tokenizer
from predictions import disable_checkpointing, enable_checkpointing
from reference import GRADIENT_ATOL, LOGIT_ATOL, LOSS_ATOL

pytestmark = pytest.mark.lane
CASES = ["mm0", "mm1", "mm2", "mm0_nomask", "mm0_masked5", "text_only"]


def run(golden, case, **kwargs):
    index = int(case[2]) if case.startswith("mm") else 0
    input_ids = golden.prompts[index]
    mask = None if case == "mm0_nomask" else torch.ones_like(input_ids)
    if case == "mm0_masked5":
        mask[0, 5] = 0
    pixels = None if case == "text_only" else golden.pixel_values[index : index + 1]
    with torch.no_grad():
        return golden.model(input_ids=input_ids, attention_mask=mask, pixel_values=pixels, **kwargs)


def check_logits(logits, expected, case):
    assert list(logits.shape) == expected[f"{case}/logits_shape"].tolist()
    assert np.array_equal(logits.argmax(-1), expected[f"{case}/logits_argmax"])
    np.testing.assert_allclose(logits.amax(-1), expected[f"{case}/logits_max"], rtol=0, atol=LOGIT_ATOL)
    np.testing.assert_allclose(logits.logsumexp(-1), expected[f"{case}/logits_lse"], rtol=0, atol=LOGIT_ATOL)
    part = logits[:, expected[f"{case}/logits_slice_positions"]][:, :, expected[f"{case}/logits_slice_vocab"]]
    np.testing.assert_allclose(part, expected[f"{case}/logits_slice"], rtol=0, atol=LOGIT_ATOL)
    if f"{case}/logits_last_full" in expected:
        np.testing.assert_allclose(logits[:, -1], expected[f"{case}/logits_last_full"], rtol=0, atol=LOGIT_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_golden_forward(golden, case):
    output = run(golden, case)
    check_logits(output.logits, golden.forward, case)
    if f"{case}/projector_features" in golden.forward and case != "mm2":
        np.testing.assert_allclose(
            output.projector_features, golden.forward[f"{case}/projector_features"], rtol=0, atol=LOGIT_ATOL
        )


def test_golden_hidden_states_and_cache(golden):
    output = run(golden, "mm0", output_hidden_states=True, use_cache=True)
    expected = golden.forward
    np.testing.assert_allclose(output.hidden_states[-1], expected["mm0/hidden_last"], rtol=0, atol=LOGIT_ATOL)
    np.testing.assert_allclose(output.hidden_states[0][:, ::8], expected["mm0/hidden_embed"], rtol=0, atol=LOGIT_ATOL)
    past = cache_of(output)
    key, value = (past.layers[0].keys, past.layers[0].values) if hasattr(past, "layers") else past[0][:2]
    np.testing.assert_allclose(key[:, :, -4:], expected["mm0/past_k0_last4"], rtol=0, atol=LOGIT_ATOL)
    np.testing.assert_allclose(value[:, :, -4:], expected["mm0/past_v0_last4"], rtol=0, atol=LOGIT_ATOL)


def test_tuple_output_is_the_reference_s(golden):
    logits, _, features = run(golden, "mm0", return_dict=False, output_projector_features=True, use_cache=True)
    assert logits.shape[-1] == 32064
    assert features.shape[:2] == (1, 256)
    assert len(run(golden, "mm0", return_dict=False, use_cache=True)) == 2


def test_golden_loss_and_gradients(golden):
    train, model = golden.train, golden.model
    inputs = {name: torch.from_numpy(train[name]) for name in ("input_ids", "attention_mask", "labels")}
    inputs["pixel_values"] = golden.pixel_values[train["pixel_values_index"]]
    model.train()
    try:
        output = model(**inputs)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad()
        model.eval()
    assert abs(output.loss.item() - float(train["loss"])) < LOSS_ATOL
    check_logits(output.logits.detach(), train, "train")
    names = golden.predict["meta"]["grad_norm_names"]
    assert set(gradients) == set(names)  # the last vision block, the norm and the pool get none
    norms = np.array([gradients[name].double().norm().item() for name in names])
    np.testing.assert_allclose(norms, train["grad_norms"], rtol=GRADIENT_ATOL, atol=GRADIENT_ATOL)
    first = gradients["projector.fc1.weight"]
    np.testing.assert_allclose(first, train["grad_projector_fc1_weight"], rtol=0, atol=GRADIENT_ATOL)
    if "grad_ls_scale_factor_block0" in train:
        scale = gradients["vision_backbone.featurizer.blocks.0.ls1.scale_factor"]
        np.testing.assert_allclose(scale, train["grad_ls_scale_factor_block0"], rtol=0, atol=GRADIENT_ATOL)


def test_each_row_alone_has_the_reference_s_loss(golden):
    for row in range(2):
        seen = torch.from_numpy(golden.train["attention_mask"][row])
        inputs = {
            name: torch.from_numpy(golden.train[name][row : row + 1])[:, seen] for name in ("input_ids", "labels")
        }
        pixels = golden.pixel_values[golden.train["pixel_values_index"][row]][None]
        with torch.no_grad():
            loss = golden.model(**inputs, pixel_values=pixels).loss
        assert abs(loss.item() - float(golden.train[f"row{row}_loss"])) < LOSS_ATOL


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cached_continuation_equals_the_whole_pass(golden, name):
    input_ids = golden.prompts[0]
    pixels = golden.pixel_values[:1]
    with torch.no_grad():
        whole = golden.model(input_ids=input_ids, pixel_values=pixels).logits[:, -1]
        first = golden.model(input_ids=input_ids[:, :-1], pixel_values=pixels, use_cache=True)
        last = golden.model(input_ids=input_ids[:, -1:], use_cache=True, **{name: cache_of(first)})
    np.testing.assert_allclose(last.logits[:, -1], whole, rtol=0, atol=LOGIT_ATOL)


def test_an_empty_cache_is_a_first_pass(golden):
    cache = pytest.importorskip("transformers").DynamicCache()
    expected = run(golden, "mm0").logits
    got = run(golden, "mm0", cache=cache, use_cache=True).logits
    np.testing.assert_allclose(got, expected, rtol=0, atol=LOGIT_ATOL)


def test_an_image_behind_a_filled_cache_is_refused(golden):
    past = cache_of(run(golden, "mm0", use_cache=True))
    with pytest.raises(ValueError, match="would not be seen"):
        golden.model(input_ids=golden.prompts[0], pixel_values=golden.pixel_values[:1], cache=past)
    with pytest.raises(ValueError, match="labels"):
        golden.model(input_ids=golden.prompts[0], labels=golden.prompts[0], cache=past)
    with pytest.raises(ValueError, match="one argument under two names"):
        golden.model(input_ids=golden.prompts[0][:, -1:], cache=past, past_key_values=past)


def test_the_cache_of_an_output_has_transformers_own_name(golden):
    output = run(golden, "mm0", use_cache=True)
    assert output[CACHE_FIELD] is cache_of(output) is not None
    assert list(output) == ["logits", CACHE_FIELD, "projector_features"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "exactly one of input_ids"),
        ({"pixel_values": torch.zeros(2, 6, 224, 224)}, ValueError, "1 prompts but 2 images"),
        ({"pixel_values": torch.zeros(1, 3, 224, 224)}, ValueError, "must have shape"),
        ({"pixel_values": torch.zeros(1, 6, 224, 224, dtype=torch.uint8)}, TypeError, "floating-point"),
    ],
)
def test_bad_inputs_are_refused(tiny, change, error, message):
    inputs = {"input_ids": torch.tensor([[1, 5, 6]]), "pixel_values": torch.zeros(1, 6, 224, 224), **change}
    with pytest.raises(error, match=message):
        tiny.model(**inputs)


def test_left_padding_changes_nothing(golden):
    input_ids, pixels = golden.prompts[0], golden.pixel_values[:1]
    pads = torch.full((1, 4), 32000)
    padded, mask = torch.cat([pads, input_ids], dim=1), torch.cat([pads * 0, torch.ones_like(input_ids)], dim=1)
    with torch.no_grad():
        alone = golden.model(input_ids=input_ids, pixel_values=pixels).logits
        with_pads = golden.model(input_ids=padded, attention_mask=mask, pixel_values=pixels).logits
    np.testing.assert_allclose(with_pads[:, 4:], alone, rtol=0, atol=LOGIT_ATOL)


def test_generate_gives_prompt_and_new_tokens(golden):
    prompt, pixels = golden.prompts[0], golden.pixel_values[:1]
    expected = golden.predict["cases"][0]["generated_ids_full"]
    assert golden.model.generate(prompt, pixel_values=pixels, max_new_tokens=7).tolist() == [expected]
    assert golden.model.generate(prompt, pixels, max_length=prompt.shape[1] + 7, do_sample=False).tolist() == [expected]
    detailed = golden.model.generate(prompt, pixels, max_new_tokens=7, return_dict_in_generate=True, output_logits=True)
    assert detailed.sequences.tolist() == [expected]
    assert len(detailed.logits) == 7
    assert golden.model.generate(prompt, max_new_tokens=3).shape[1] == prompt.shape[1] + 3  # text alone
    sampled = golden.model.generate(prompt, pixels, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (3, prompt.shape[1] + 2)
    assert torch.equal(sampled[:, : prompt.shape[1]], prompt.expand(3, -1))


def test_generate_in_a_padded_batch_equals_singles(golden):
    rows = golden.prompts[:2]
    length = max(row.shape[1] for row in rows)
    for side in ("left", "right"):
        pads = [torch.full((1, length - row.shape[1]), 32000) for row in rows]
        ids = torch.cat([torch.cat([p, r] if side == "left" else [r, p], dim=1) for p, r in zip(pads, rows)])
        output = golden.model.generate(ids, golden.pixel_values[:2], (ids != 32000).long(), max_new_tokens=4)
        for index, row in enumerate(rows):
            alone = golden.model.generate(row, golden.pixel_values[index : index + 1], max_new_tokens=4)
            assert output[index, -4:].tolist() == alone[0, -4:].tolist()


def test_generate_refuses_a_hole_in_the_prompt(golden):
    mask = torch.ones_like(golden.prompts[0])
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="hides a token inside"):
        golden.model.generate(golden.prompts[0], golden.pixel_values[:1], mask, max_new_tokens=2)


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("mistral", False), ("phi", False), ("qwen2", False), ("qwen2", True)]
)
def test_every_language_model_loads_what_it_saved(model_type, tied, tmp_path):
    tokenizer = build_tokenizer()
    text = {
        "model_type": model_type,
        "vocab_size": tokenizer.pad_token_id + 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if model_type in ("mistral", "qwen2") else 4,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = PrismaticConfig(
        llm_backbone_id="small",
        text_config=text,
        timm_model_kwargs=[{"depth": 2, "embed_dim": 32, "num_heads": 2}],
        pad_token_id=tokenizer.pad_token_id,
        empty_token_id=None,
    )
    torch.manual_seed(0)
    model = PrismaticForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    again = PrismaticForConditionalGeneration.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = {"input_ids": torch.tensor([[1, 300, 301, 302]]), "pixel_values": torch.randn(1, 3, 224, 224)}
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), again.generate(**inputs, max_new_tokens=5))
    with torch.no_grad():
        black = again(inputs["input_ids"], pixel_values=torch.full((1, 3, 224, 224), -1.0)).logits
        white = again(inputs["input_ids"], pixel_values=torch.full((1, 3, 224, 224), 1.0)).logits
    assert not torch.equal(black, white)


def test_resized_vocabulary_keeps_action_tokens_in_place():
    from openvla.tiny import build_tiny

    model, _ = build_tiny()
    before = model.config.vocab_size
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64)
    assert model.config.vocab_size == before
    assert model.get_output_embeddings().weight.shape[0] == before + 128


def test_the_full_size_has_the_published_number_of_parameters():
    from openvla import OpenVLAConfig, OpenVLAForActionPrediction

    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        text_config={"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
    )
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_541_237_184


def test_building_a_model_calls_mkl_functions_in_one_thread_first(tiny):
    """The first call of each must not be one that several threads share: see MKL_FUNCTIONS."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile, torch.device("meta"):
        type(tiny.model)(tiny.model.config)
    calls = [
        event.name.removeprefix("aten::").removeprefix("special_")
        for event in profile.events()
        if event.input_shapes == [[1]]
    ]
    assert set(MKL_FUNCTIONS) <= set(calls)


def test_gradient_checkpointing_changes_no_gradient(golden):
    train, model = golden.train, golden.model
    inputs = {name: torch.from_numpy(train[name]) for name in ("input_ids", "attention_mask", "labels")}
    inputs["pixel_values"] = golden.pixel_values[train["pixel_values_index"]]
    gradients = []
    model.train()
    try:
        for checkpointing in (False, True):
            if checkpointing:
                enable_checkpointing(model)
                assert is_checkpointing(model)
            model(**inputs).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
    finally:
        disable_checkpointing(model)
        model.eval()
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, rtol=0, atol=GRADIENT_ATOL)


@pytest.mark.skipif(not hasattr(torch.backends.cuda, "enable_cudnn_sdp"), reason="torch has no cuDNN attention")
def test_a_new_model_switches_cudnn_attention_off():
    """CuDNN's attention gives other bits from call to call on Hopper."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        build_tiny()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
