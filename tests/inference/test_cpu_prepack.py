"""Prepacked weights: same predictions, same saved folder, and no unnoticed change."""

import gc
import weakref

import pytest
import torch
from openvla import load_policy
from openvla.__main__ import main
from openvla.inference.cpu_prepack import PrepackedLinear, has_matmul, prepack
from openvla.inference.demo_policies import DEMO_POLICY
from openvla.inference.predict import SAMPLE_IMAGE
from openvla.tiny import build_tiny
from safetensors.torch import load_file

pytest.importorskip("accelerate")
in_bfloat16 = pytest.mark.skipif(not has_matmul(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU.")
INSTRUCTIONS = ("pick up the milk and place it in the basket", "pick up the alphabet soup and place it in the basket")


def predictions(policy, **options):
    outputs = []
    for instruction in INSTRUCTIONS:
        inputs = policy.processor(instruction=instruction, images=SAMPLE_IMAGE)
        outputs.append(policy.model.predict_action(**inputs, return_dict=True, **options))
    return outputs


def linears(model):
    return [module for module in model.modules() if isinstance(module, (torch.nn.Linear, PrepackedLinear))]


@in_bfloat16
@pytest.mark.parametrize("fast", [True, False])
def test_predictions_in_bfloat16_are_bitwise_equal(fast):
    plain, prepacked = load_policy(dtype="bfloat16"), load_policy(dtype="bfloat16", prepack=True)
    kinds = [type(module) for module in linears(prepacked.model)]
    assert kinds.count(torch.nn.Linear) == 1  # the output embeddings
    assert len(kinds) == len(linears(plain.model))
    for actual, expected in zip(predictions(prepacked, fast=fast), predictions(plain, fast=fast)):
        assert actual.token_ids.tolist() == expected.token_ids.tolist()
        assert (actual.bin_probabilities == expected.bin_probabilities).all()


def test_tokens_in_float32_are_equal():
    for actual, expected in zip(predictions(load_policy(prepack=True)), predictions(load_policy())):
        assert actual.token_ids.tolist() == expected.token_ids.tolist()


@in_bfloat16
def test_parallel_decoding_with_film_and_head_is_equal():
    model, processor = build_tiny(parallel_decoding=True, action_dim=7, chunk_length=4, action_head="l1", use_film=True)
    policy = type(load_policy())(model.to(torch.bfloat16), processor, model.resolve_unnorm_key())
    expected = [output.actions.tolist() for output in predictions(policy)]
    prepack(model)
    assert [output.actions.tolist() for output in predictions(policy)] == expected


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=in_bfloat16), "float32"])
def test_saved_folder_holds_plain_weights(dtype, tmp_path):
    load_policy(dtype=dtype, prepack=True).model.save_pretrained(tmp_path)
    tensors, expected = load_file(tmp_path / "model.safetensors"), load_file(DEMO_POLICY / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor.to(tensors[name].dtype)) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_plain_weights_are_freed():
    model, _ = build_tiny()
    references = [
        weakref.ref(module.weight) for module in linears(model) if module is not model.get_output_embeddings()
    ]
    prepack(model)
    gc.collect()
    assert references
    assert not any(weight() is not None for weight in references)


def test_prepacked_weights_can_neither_be_trained_nor_loaded():
    model, processor = build_tiny()
    state = model.state_dict()
    prepack(model)
    inputs = processor(instruction=INSTRUCTIONS[0], images=SAMPLE_IMAGE)
    with pytest.raises(RuntimeError, match="inference only"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(RuntimeError, match="cannot be loaded into"):
        model.load_state_dict(state)


def test_prepack_rejects_other_dtypes_and_devices():
    with pytest.raises(ValueError, match="not for torch.float16 on cpu"):
        load_policy(dtype="float16", prepack=True)
    with pytest.raises(ValueError, match="meta"):
        prepack(build_tiny()[0].to("meta"))


def test_prepack_rejects_adapters():
    pytest.importorskip("peft")
    model, _ = build_tiny()
    model.enable_lora()
    with pytest.raises(ValueError, match="merge them first"):
        prepack(model)


def test_prepack_rejects_quantised_weights(capsys):
    pytest.importorskip("bitsandbytes")
    assert main(["predict", "--bits", "8", "--prepack"]) == 2
    assert "prepack is for whole weights" in capsys.readouterr().err


@in_bfloat16
def test_command_has_prepack(capsys):
    def output(*options):
        assert main(["predict", "--dtype", "bfloat16", *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "to load" not in line]

    assert output("--prepack") == output()
