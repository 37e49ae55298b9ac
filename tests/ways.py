"""The ways to one answer beside each other, and what may change a model between two answers."""

import os
import shutil

import numpy as np
import pytest
import torch

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")


@torch.no_grad()
def ends_at_once(model, inputs):
    """Make a model's first choice for these inputs the end of the sequence in place of an action token."""
    head, logits = model.get_output_embeddings().weight, model(**inputs).logits[0, -1]
    assert logits.max() > 0
    head[model.generation_config.eos_token_id] = 2 * head[logits.argmax()]


def alike(model, inputs, fast=True):
    """Bin probabilities of an answer whose tokens and action are the plain way's."""
    asked = {**inputs, "return_dict": True, "constrain_actions": True}
    plain, taken = (model.predict_action(**asked, fast=way) for way in (False, fast))
    assert np.array_equal(plain.token_ids, taken.token_ids)
    assert np.array_equal(plain.actions, taken.actions)
    return taken.bin_probabilities


def changes(model):
    """What a user may do to the weights of a language model; each gives another answer."""
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


def adapt(model):
    """A LoRA adapter that does something."""
    model.enable_lora(r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.eval()
