"""Comparison of the fast with the standard decoder, and changes of a model between two predictions."""

import os
import shutil

import numpy as np
import pytest
import torch
from openvla.inference.cuda_graphs import Stages, finish

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")


class EagerGraph:
    """A graph without a GPU: it holds copies of its inputs and computes from them again."""

    captured, replayed = 0, 0

    def __init__(self, compute, inputs, shared=None):
        assert shared is None or type(shared) is EagerGraph
        EagerGraph.captured += 1
        self.compute, self.inputs = compute, [tensor.clone() for tensor in inputs]

    def replay(self, inputs, every_stage=False):
        EagerGraph.replayed += 1
        for static_input, tensor in zip(self.inputs, inputs):
            static_input.copy_(tensor)
        result = self.compute(*self.inputs)
        return result.run_later(0) if every_stage and isinstance(result, Stages) else finish(result)


@torch.no_grad()
def prefer_end_token(model, inputs):
    """Make the end token the model's first choice for these inputs, in place of an action token."""
    head, logits = model.get_output_embeddings().weight, model(**inputs).logits[0, -1]
    assert logits.max() > 0
    head[model.generation_config.eos_token_id] = 2 * head[logits.argmax()]


def compare_decoders(model, inputs, fast=True):
    """Return bin probabilities of a prediction whose tokens and action equal the standard decoder's."""
    kwargs = {**inputs, "return_dict": True, "constrain_actions": True}
    expected, output = (model.predict_action(**kwargs, fast=value) for value in (False, fast))
    assert np.array_equal(expected.token_ids, output.token_ids)
    assert np.array_equal(expected.actions, output.actions)
    return output.bin_probabilities


def weight_changes(model):
    """Return functions that change the weights of a language model; each changes the prediction."""
    layer = model.get_decoder().layers[0]

    def another_storage():
        layer.self_attn.v_proj.weight.data = layer.self_attn.v_proj.weight.data.flip(0)

    def another_parameter():
        layer.input_layernorm.weight = torch.nn.Parameter(layer.input_layernorm.weight * 2)

    def another_module():
        layer.self_attn.k_proj = torch.nn.Linear(*layer.self_attn.k_proj.weight.T.shape, bias=False)

    def another_dtype():
        model.to(torch.float64)

    return another_storage, another_parameter, another_module, another_dtype


def add_adapter(model):
    """Add a LoRA adapter that changes the prediction."""
    model.enable_lora(r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.eval()


def enable_checkpointing(model):
    """Enable transformers' gradient checkpointing, under its name in this version."""
    # 5.24 renamed gradient checkpointing to activation checkpointing; the old methods warn, and go in 6.0.
    old = not hasattr(model, "activation_checkpointing_enable")
    enable = model.gradient_checkpointing_enable if old else model.activation_checkpointing_enable
    enable({"use_reentrant": False})


def disable_checkpointing(model):
    """Disable transformers' gradient checkpointing."""
    old = not hasattr(model, "activation_checkpointing_disable")
    (model.gradient_checkpointing_disable if old else model.activation_checkpointing_disable)()
