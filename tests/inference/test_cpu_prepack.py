"""Prepacked weights: the same answers, the same folder when saved, and no way to change them unnoticed."""

import gc
import weakref

import pytest
import torch
from openvla import load_policy
from openvla.__main__ import main
from openvla.inference.cpu_prepack import PrepackedLinear, multiplies, prepack
from openvla.inference.policy import EMBEDDED
from openvla.inference.predict import SAMPLE_IMAGE
from openvla.tiny import build_tiny
from safetensors.torch import load_file

pytest.importorskip("accelerate")
in_bfloat16 = pytest.mark.skipif(not multiplies(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU.")
INSTRUCTIONS = ("pick up the milk and place it in the basket", "pick up the alphabet soup and place it in the basket")


def answers(policy, **options):
    outputs = []
    for instruction in INSTRUCTIONS:
        inputs = policy.processor(instruction=instruction, images=SAMPLE_IMAGE)
        outputs.append(policy.model.predict_action(**inputs, return_dict=True, **options))
    return outputs


def linears(model):
    return [module for module in model.modules() if isinstance(module, (torch.nn.Linear, PrepackedLinear))]


@in_bfloat16
@pytest.mark.parametrize("fast", [True, False])
def test_in_bfloat16_every_bit_is_the_same(fast):
    plain, prepacked = load_policy(dtype="bfloat16"), load_policy(dtype="bfloat16", prepack=True)
    kinds = [type(module) for module in linears(prepacked.model)]
    assert kinds.count(torch.nn.Linear) == 1  # the output embeddings
    assert len(kinds) == len(linears(plain.model))
    for ours, expected in zip(answers(prepacked, fast=fast), answers(plain, fast=fast)):
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        assert (ours.bin_probabilities == expected.bin_probabilities).all()


def test_in_float32_the_tokens_are_the_same():
    for ours, expected in zip(answers(load_policy(prepack=True)), answers(load_policy())):
        assert ours.token_ids.tolist() == expected.token_ids.tolist()


@in_bfloat16
def test_parallel_decoding_film_and_heads_answer_alike():
    model, processor = build_tiny(parallel_decoding=True, action_dim=7, chunk_length=4, action_head="l1", use_film=True)
    policy = type(load_policy())(model.to(torch.bfloat16), processor, model.resolve_unnorm_key())
    expected = [output.actions.tolist() for output in answers(policy)]
    prepack(model)
    assert [output.actions.tolist() for output in answers(policy)] == expected


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=in_bfloat16), "float32"])
def test_a_saved_folder_holds_the_plain_weights(dtype, tmp_path):
    load_policy(dtype=dtype, prepack=True).model.save_pretrained(tmp_path)
    found, expected = load_file(tmp_path / "model.safetensors"), load_file(EMBEDDED / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}


def test_plain_weights_are_let_go():
    model, _ = build_tiny()
    held = [weakref.ref(module.weight) for module in linears(model) if module is not model.get_output_embeddings()]
    prepack(model)
    gc.collect()
    assert held
    assert not any(weight() is not None for weight in held)


def test_they_can_neither_be_trained_nor_exchanged():
    model, processor = build_tiny()
    state = model.state_dict()
    prepack(model)
    inputs = processor(instruction=INSTRUCTIONS[0], images=SAMPLE_IMAGE)
    with pytest.raises(RuntimeError, match="answer only"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(RuntimeError, match="cannot be loaded into"):
        model.load_state_dict(state)


def test_what_cannot_be_prepacked_is_refused():
    with pytest.raises(ValueError, match="not for torch.float16 on cpu"):
        load_policy(dtype="float16", prepack=True)
    with pytest.raises(ValueError, match="meta"):
        prepack(build_tiny()[0].to("meta"))


def test_adapters_are_merged_first():
    pytest.importorskip("peft")
    model, _ = build_tiny()
    model.enable_lora()
    with pytest.raises(ValueError, match="merge them first"):
        prepack(model)


def test_quantised_weights_are_refused(capsys):
    pytest.importorskip("bitsandbytes")
    assert main(["predict", "--bits", "8", "--prepack"]) == 2
    assert "prepack is for whole weights" in capsys.readouterr().err


@in_bfloat16
def test_the_command_takes_it(capsys):
    def said(*options):
        assert main(["predict", "--dtype", "bfloat16", *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "to load" not in line]

    assert said("--prepack") == said()
