"""Compiled and checkpointed layers: the losses and gradients of plain ones, and few compilations."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from openvla.tiny import build_tiny
from openvla.training.checkpointing import checkpoints
from openvla.training.collator import ActionCollator, model_inputs
from openvla.training.finetune import LENGTH_MULTIPLE, finetune, set_adapter_dtype
from openvla.training.layers import LayerCompiler, prepared_layers, repeated_layers
from predictions import needs_compiler
from reference import REPOSITORY
from training_runs import InMemoryData, launch, losses, settings, step_gradients, with_statistics

LOSS_RTOL = 1e-5  # float32, 20 steps; a compiled layer rounds sums in another order
SPLIT_BATCH_RTOL = 1e-4  # a batch in two halves, after four steps of AdamW
GRADIENT_RTOL = 2e-5  # norms of whole tensors
# Decoder layers; blocks of each of two towers, whose first one has an input without gradient.
GRAPHS = 1 + 2 * 2


class Eager(LayerCompiler):
    """Compiler that traces layers and compiles nothing."""

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def lora_model():
    """Return a tiny model with an adapter of weights other than zero, and its processor."""
    model, processor = build_tiny()
    torch.manual_seed(0)
    model.enable_lora(r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.02)
    return model, processor


@pytest.mark.parametrize("checkpointing", [None, "full", "selective"])
def test_prepared_layers_have_the_gradients_of_plain_ones(checkpointing):
    model, processor = lora_model()
    expected, expected_loss = step_gradients(model, processor)
    compiler = Eager()
    with prepared_layers(model, compiler, checkpointing):
        actual, loss = step_gradients(model, processor)
    assert compiler.num_graphs == GRAPHS
    assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= GRADIENT_RTOL * gradient.norm(), name


def test_adapters_in_bfloat16_need_a_base_in_bfloat16():
    model, _ = lora_model()
    with pytest.raises(ValueError, match=r"needs a base in bfloat16, this one is loaded in torch.float32"):
        set_adapter_dtype(model)
    model, _ = build_tiny()
    model.to(torch.bfloat16).enable_lora(r=4)
    set_adapter_dtype(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_layers_are_restored_after_the_context():
    model, _ = build_tiny()
    layers = repeated_layers(model)
    with prepared_layers(model, Eager(), "full"):
        assert all("forward" in vars(layer) for layer in layers)
    with pytest.raises(ZeroDivisionError), prepared_layers(model, checkpointing="full"):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers)


def test_every_length_is_compiled_beside_checkpointing():
    """Three kinds of layers and five lengths: more graphs of one function than the eight that torch compiles."""
    model, processor = lora_model()
    step, compiler = InMemoryData().steps[0], Eager()
    graphs = []
    with prepared_layers(model, compiler, "full"):
        for words in range(0, 80, 16):
            instruction = step.instruction + " now" * words
            batch = ActionCollator(processor, with_statistics(model), pad_to_multiple_of=LENGTH_MULTIPLE)(
                [replace(step, instruction=instruction)]
            )
            model(**model_inputs(batch, model), logits_at_labels=True).loss.backward()
            graphs.append(compiler.num_graphs)
    assert graphs == [GRAPHS + index for index in range(5)]  # a length is one graph of the decoder's layers


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_saves_fewer_bytes(checkpointing):
    model, processor = lora_model()
    saved = []
    for kind in (None, checkpointing):
        with prepared_layers(model, checkpointing=kind):
            storages = {}
            step_gradients(model, processor, storages)
            saved.append(sum(storages.values()))
    assert saved[1] < 0.75 * saved[0]


def test_without_a_working_compiler_layers_run_plain_with_one_warning(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("No working C++ compiler found.\nand a long trace")

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: fail)
    model, processor = lora_model()
    expected, _ = step_gradients(model, processor)
    compiler = LayerCompiler()
    logging.getLogger("transformers").addHandler(caplog.handler)
    with prepared_layers(model, compiler):
        actual, _ = step_gradients(model, processor)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    messages = [record.message for record in caplog.records if "uncompiled" in record.message]
    assert messages == ["Training uncompiled: torch.compile failed with No working C++ compiler found.."]
    assert compiler.num_graphs == 0
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= GRADIENT_RTOL * gradient.norm(), name


@needs_compiler
@pytest.mark.slow
def test_compiled_run_has_the_losses_of_a_plain_one_when_resumed_too(base, tmp_path):
    """Compiled, then interrupted after 12 of 20 steps and resumed; prompts of two lengths are padded to one."""
    data = InMemoryData(count=7)
    changes = {"max_steps": 20, "save_steps": 4, "save_total_limit": 9, "lora_rank": 4, "seed": 3}
    finetune(settings(base, tmp_path / "plain", **changes), data)
    finetune(settings(base, tmp_path / "compiled", **changes, compile="layers"), data)
    lines = [json.loads(line) for line in (tmp_path / "compiled" / "metrics.jsonl").read_text().splitlines()]
    assert {line["compiled_graphs"] for line in lines} == {GRAPHS}
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=LOSS_RTOL)
    for folder in checkpoints(tmp_path / "compiled")[3:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (tmp_path / "compiled" / "metrics.jsonl").unlink()
    finetune(settings(base, tmp_path / "compiled", **changes, compile="layers"), data)
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain")[12:], rtol=LOSS_RTOL)


# torch's, where it traces the autograd functions of bitsandbytes.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["qlora", "tokens", "l1", "diffusion"])
def test_every_kind_of_run_has_the_losses_of_uncompiled_layers(base, kind, tmp_path, monkeypatch):
    """Layers are traced and run as traced: inductor compiles the same graphs in the runs above."""
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: lambda graph, inputs: graph.forward)
    changes = {"method": "qlora" if kind == "qlora" else "lora", "lora_rank": 4, "num_train_eval_samples": 1}
    if kind != "qlora":
        head = None if kind == "tokens" else kind
        film = {"num_images_in_input": 2, "use_film": kind == "l1"}
        changes["action_config"] = {"platform": "libero", "action_head": head, **film}
    data = InMemoryData(chunk=1 if kind == "qlora" else 8)
    finetune(settings(base, tmp_path / "plain", **changes), data)
    finetune(settings(base, tmp_path / "traced", **changes, compile="layers"), data)
    np.testing.assert_allclose(losses(tmp_path / "traced"), losses(tmp_path / "plain"), rtol=LOSS_RTOL)
    lines = [json.loads(line) for line in (tmp_path / "traced" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["compiled_graphs"] for line in lines}) == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_two_compiled_processes_train_as_one_plain_process(base, distributed, tmp_path):
    """Resumed once, by two processes."""
    common = {"save_steps": 2, "num_train_eval_samples": 2, "lora_rank": 4}
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "from training_runs import InMemoryData, settings\nfrom openvla.training.finetune import finetune\n"
        f"finetune(settings({str(base)!r}, {str(tmp_path / 'two')!r}, **{common!r}, max_steps=int(sys.argv[1]), "
        f"per_device_train_batch_size=2, distributed={distributed!r}, compile='layers'), InMemoryData(8))\n"
    )
    for steps in (2, 4):
        launch(script, 2, steps)
    finetune(settings(base, tmp_path / "one", **common), InMemoryData(8))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=SPLIT_BATCH_RTOL)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert {line["compiled_graphs"] for line in lines} == {GRAPHS}


def test_prompts_of_two_lengths_are_padded_to_one():
    model, processor = build_tiny()
    collator = ActionCollator(processor, with_statistics(model), pad_to_multiple_of=LENGTH_MULTIPLE)
    batches = [collator([step]) for step in InMemoryData().steps[:2]]
    assert len({int(batch["attention_mask"].sum()) for batch in batches}) == 2
    assert {batch["labels"].shape for batch in batches} == {(1, 80)}
