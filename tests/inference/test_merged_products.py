"""Weights side by side: one product for several layers, the same saved weights, and every change of a model counts."""

import copy

import numpy as np
import pytest
import torch
from openvla import OpenVLAForActionPrediction, load_policy
from openvla.inference.merged_products import merge_products, merged_groups, merged_product
from openvla.tiny import build_tiny
from predictions import add_adapter, compare_decoders, weight_changes
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def groups_of(language_model):
    return [group for layer in language_model.get_decoder().layers for group in merged_groups(layer)]


def num_merged(language_model):
    return sum(merged_product(group) is not None for group in groups_of(language_model))


@pytest.fixture
def merged(frames):
    """A tiny model with merged products, inputs for it, and the bin probabilities of the model before."""
    model, processor = build_tiny()
    inputs = processor(instruction="open the drawer", images=frames["noise"])
    before = compare_decoders(model, inputs)
    assert merge_products(model.language_model) == len(groups_of(model.language_model))
    return model, inputs, before


@pytest.mark.lane
def test_merged_products_predict_the_same(merged):
    model, inputs, before = merged
    # A product of more columns may sum in another order: a few units in the last place of probabilities.
    np.testing.assert_allclose(compare_decoders(model, inputs), before, rtol=0, atol=1e-6)
    assert merge_products(model.language_model) == 0


@pytest.mark.lane
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_product_is_that_of_the_parts(bias):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    config = AutoConfig.for_model("qwen2" if bias else "mistral", **sizes, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    queries, keys, values = groups_of(model)[0]
    assert (queries.bias is not None) == bias
    for part in (queries, keys, values):
        if bias:
            torch.nn.init.normal_(part.bias)
    x = torch.randn(3, 32)
    expected = torch.cat([part(x) for part in (queries, keys, values)], dim=-1)
    assert merged_product([queries, keys, values]) is None
    merge_products(model)
    product = merged_product([queries, keys, values])
    torch.testing.assert_close(product(x), expected, rtol=0, atol=1e-6)
    if bias:
        keys.bias = None
        assert merged_product([queries, keys, values]) is None


@pytest.mark.lane
def test_saved_folder_is_as_if_nothing_was_merged(merged, tmp_path):
    model, inputs, _ = merged
    unmerged = build_tiny()[0]
    for folder, saved in (("merged", model), ("unmerged", unmerged)):
        saved.save_pretrained(tmp_path / folder)
    expected, weights = (load_file(tmp_path / folder / "model.safetensors") for folder in ("unmerged", "merged"))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("unmerged", "merged")]
    assert sizes[0] == sizes[1]
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path / "merged").eval()
    assert num_merged(loaded.language_model) == 0
    compare_decoders(loaded, inputs)


@pytest.mark.lane
def test_changed_weights_change_the_next_prediction(merged):
    model, inputs, _ = merged
    layer = model.get_decoder().layers[0]
    previous = compare_decoders(model, inputs)

    def in_place():
        layer.mlp.up_proj.weight.data.mul_(3)

    def of_all():
        model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})

    total = num_merged(model.language_model)
    for change, num_apart in ((in_place, 0), (of_all, 0), *zip(weight_changes(model), (1, 1, 1, total))):
        with torch.no_grad():
            change()
        current = compare_decoders(model, inputs)
        assert not np.array_equal(current, previous), change
        assert num_merged(model.language_model) == total - num_apart, change
        previous = current
    model.to(torch.float32)
    layer.self_attn.k_proj.to(torch.float32)
    assert merge_products(model.language_model) == total


@pytest.mark.lane
def test_copies_and_moved_models_keep_their_weights(merged):
    model, inputs, _ = merged
    expected = compare_decoders(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_decoder().layers[0].mlp.up_proj.weight.mul_(3)
    assert not np.array_equal(compare_decoders(other, inputs), expected)
    assert np.array_equal(compare_decoders(model, inputs), expected)
    moved = compare_decoders(model.to(torch.float64).to(torch.float32), inputs)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)


def test_adapters_on_merged_weights(merged):
    pytest.importorskip("peft")
    model, inputs, _ = merged
    before = compare_decoders(model, inputs)
    add_adapter(model)
    adapted = compare_decoders(model, inputs)
    assert not np.array_equal(adapted, before)
    model.disable_adapters()
    np.testing.assert_allclose(compare_decoders(model, inputs), before, rtol=0, atol=1e-6)
    model.enable_adapters()
    model.merge_lora().eval()
    np.testing.assert_allclose(compare_decoders(model, inputs), adapted, rtol=0, atol=1e-4)  # W + BA is rounded once


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_load_policy_merges_on_a_gpu(device, tmp_path, tiny):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    language_model = load_policy(tmp_path, device=device).model.language_model
    assert num_merged(language_model) == (len(groups_of(language_model)) if device == "cuda" else 0)
