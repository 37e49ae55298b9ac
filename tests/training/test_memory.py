"""Memory-efficient training: the same gradients, and fewer bytes saved for the backward pass."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from openvla.tiny import build_tiny
from openvla.training import memory
from openvla.training.activation_checkpointing import enable_checkpointing
from openvla.training.memory import memory_efficient_training

# W x + s B A x accumulated into one matrix product is rounded in another order; float32, norms of whole tensors.
LORA_RTOL = 2e-5
LORA = {"r": 4, "alpha": 8}


def gradients(model, run, context=memory_efficient_training):
    """Return the gradients of a training step by name, and its loss."""
    model.train().zero_grad()
    with context(model):
        loss = run(model)
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss.detach()


def unchanged(model):
    return contextlib.nullcontext()


def step(processor, mixed=False):
    """Return a function that computes the loss of a noise image."""
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = processor(instruction="open the drawer", images=image)

    def run(model):
        ids = torch.cat([inputs["input_ids"], torch.tensor([[model.action_token_ids.start + 3] * 7])], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 7, -100, ids)
        pixels = inputs["pixel_values"].to(model.vision_backbone.featurizer.patch_embed.proj.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(input_ids=ids, pixel_values=pixels, labels=labels, logits_at_labels=True).loss

    return run


def with_lora(model, **settings):
    """Add an adapter with reproducible weights other than zero."""
    torch.manual_seed(0)
    model.enable_lora(**LORA | settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.02)
    return model


def test_recomputed_activations_give_bitwise_equal_gradients():
    model, processor = build_tiny()
    actual, loss = gradients(model, step(processor))
    expected, expected_loss = gradients(model, step(processor), unchanged)
    assert torch.equal(loss, expected_loss)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_those_of_peft(checkpointing):
    model, processor = build_tiny()
    with_lora(model)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    actual, loss = gradients(model, step(processor))
    expected, expected_loss = gradients(model, step(processor), unchanged)
    assert loss == pytest.approx(float(expected_loss), rel=LORA_RTOL)
    assert actual.keys() == expected.keys()
    assert all("lora_" in name for name in actual)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= LORA_RTOL * gradient.norm(), name


def test_lora_in_mixed_precision_is_as_accurate_as_peft():
    model, processor = build_tiny()
    with_lora(model)
    exact, _ = gradients(model, step(processor), unchanged)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    actual, _ = gradients(model, step(processor, mixed=True))
    peft, _ = gradients(model, step(processor, mixed=True), unchanged)
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    errors = [
        sum(float((computed[name] - exact[name]).square().sum()) for name in exact) ** 0.5
        for computed in (actual, peft)
    ]
    assert errors[0] <= 1.1 * errors[1]  # both are the rounding error of bfloat16


def test_fewer_bytes_are_saved_for_the_backward_pass(monkeypatch):
    model, processor = build_tiny()
    with_lora(model).train()
    saved_bytes = []
    for recomputes in (True, False):
        storages = {}

        class Counting(memory._Recompute):
            def __call__(self, compute, *inputs, first=None, recomputes=recomputes):
                return super().__call__(compute, *inputs, first=first) if recomputes else compute(*inputs)

            def pack(self, tensor, storages=storages):
                packed = super().pack(tensor)
                if torch.is_tensor(packed) and not isinstance(packed, nn.Parameter):
                    storages[packed.untyped_storage().data_ptr()] = packed.untyped_storage()
                return packed

        monkeypatch.setattr(memory, "_Recompute", Counting)
        with memory_efficient_training(model):
            loss = step(processor)(model)
            saved_bytes.append(sum(storage.nbytes() for storage in storages.values()))
            loss.backward()
    assert saved_bytes[0] < 0.75 * saved_bytes[1], saved_bytes


def test_forwards_are_restored_after_the_context():
    model, processor = build_tiny()
    with_lora(model)
    with memory_efficient_training(model):
        assert any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), memory_efficient_training(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_only_plain_lora_layers_are_replaced():
    def replaced(model):
        return [type(module) for module, _ in memory._memory_efficient_forwards(model, memory._Recompute())]

    with_dropout, _ = build_tiny()
    with_dropout.enable_lora(**LORA, dropout=0.1)
    plain, _ = build_tiny()
    with_lora(plain, modules_to_save=["projector.fc3"])
    layer = plain.language_model.model.layers[0].mlp.up_proj
    count = len(replaced(plain))
    layer.base_layer.register_forward_hook(lambda *_: None)
    from peft.tuners.lora.layer import Linear

    assert Linear not in replaced(with_dropout)
    assert Linear in replaced(plain)
    assert len(replaced(plain)) == count - 1
    assert nn.LayerNorm in replaced(with_dropout)
