"""Training in less memory: the same gradients, and fewer bytes that wait for them."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from openvla.compatibility_openvla import enable_checkpointing
from openvla.tiny import build_tiny
from openvla.training import memory as lean_training
from openvla.training.memory import lean

# The sum W x + s B A x in one matrix product and not in two is rounded elsewhere; float32, whole tensors.
LORA_RTOL = 2e-5
LORA = {"r": 4, "alpha": 8}


def gradients(model, run, training=lean):
    """Of a training pass, by name, and its loss."""
    model.train().zero_grad()
    with training(model):
        loss = run(model)
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss.detach()


def plainly(model):
    return contextlib.nullcontext()


def step(processor, mixed=False):
    """A training pass on noise."""
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = processor(instruction="open the drawer", images=image)

    def run(model):
        ids = torch.cat([inputs["input_ids"], torch.tensor([[model.action_token_ids.start + 3] * 7])], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 7, -100, ids)
        pixels = inputs["pixel_values"].to(model.vision_backbone.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(input_ids=ids, pixel_values=pixels, labels=labels, logits_at_labels=True).loss

    return run


def with_lora(model, **settings):
    """An adapter that does something, and always the same."""
    torch.manual_seed(0)
    model.enable_lora(**LORA | settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.02)
    return model


def test_what_is_computed_again_changes_no_bit():
    model, processor = build_tiny()
    found, loss = gradients(model, step(processor))
    wanted, wanted_loss = gradients(model, step(processor), plainly)
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_has_peft_s_gradients(checkpointing):
    model, processor = build_tiny()
    with_lora(model)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    found, loss = gradients(model, step(processor))
    wanted, wanted_loss = gradients(model, step(processor), plainly)
    assert loss == pytest.approx(float(wanted_loss), rel=LORA_RTOL)
    assert found.keys() == wanted.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= LORA_RTOL * gradient.norm(), name


def test_lora_in_mixed_precision_is_no_less_exact_than_peft_s():
    model, processor = build_tiny()
    with_lora(model)
    exact, _ = gradients(model, step(processor), plainly)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    found, _ = gradients(model, step(processor, mixed=True))
    peft, _ = gradients(model, step(processor, mixed=True), plainly)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    off = [sum(float((of[name] - exact[name]).square().sum()) for name in exact) ** 0.5 for of in (found, peft)]
    assert off[0] <= 1.1 * off[1]  # both are bfloat16's own error


def test_less_waits_for_the_backward_pass(monkeypatch):
    model, processor = build_tiny()
    with_lora(model).train()
    waiting = []
    for computes_again in (True, False):
        kept = {}

        class Counting(lean_training._Recomputed):
            def __call__(self, compute, *inputs, first=None, computes_again=computes_again):
                return super().__call__(compute, *inputs, first=first) if computes_again else compute(*inputs)

            def pack(self, tensor, kept=kept):
                packed = super().pack(tensor)
                if torch.is_tensor(packed) and not isinstance(packed, nn.Parameter):
                    kept[packed.untyped_storage().data_ptr()] = packed.untyped_storage()
                return packed

        monkeypatch.setattr(lean_training, "_Recomputed", Counting)
        with lean(model):
            loss = step(processor)(model)
            waiting.append(sum(storage.nbytes() for storage in kept.values()))
            loss.backward()
    assert waiting[0] < 0.75 * waiting[1], waiting


def test_afterwards_nothing_is_left_of_it():
    model, processor = build_tiny()
    with_lora(model)
    with lean(model):
        assert any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), lean(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_plain_lora_stays_peft_s():
    def taken(model):
        return [type(module) for module, _ in lean_training._lean_forwards(model, lean_training._Recomputed())]

    dropping, _ = build_tiny()
    dropping.enable_lora(**LORA, dropout=0.1)
    trained, _ = build_tiny()
    with_lora(trained, modules_to_save=["projector.fc3"])
    layer = trained.language_model.model.layers[0].mlp.up_proj
    before = len(taken(trained))
    layer.base_layer.register_forward_hook(lambda *_: None)
    from peft.tuners.lora.layer import Linear

    assert Linear not in taken(dropping)
    assert Linear in taken(trained)
    assert len(taken(trained)) == before - 1
    assert nn.LayerNorm in taken(dropping)
