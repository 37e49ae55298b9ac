"""Fine-tuning: trained parameters, learning, resuming after an interruption, and loadable results."""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import FIXTURES, GOLDEN, LOSS_ATOL, REPOSITORY, oft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import STATISTICS, InMemoryData, Sample, launch, losses, settings, with_statistics

pytest.importorskip("accelerate")

from openvla import PLATFORMS, OpenVLAForActionPrediction, load_policy
from openvla.adapters.targets import lora_targets
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.conversion.merge import merge
from openvla.data.stream import StreamPosition
from openvla.tiny import build_tiny
from openvla.training.checkpointing import checkpoints
from openvla.training.collator import ActionCollator, compute_metrics, model_inputs
from openvla.training.config import (
    TRACKERS,
    FinetuneConfig,
    add_arguments,
    config_from_dict,
    lr_lambda,
    read_yaml,
)
from openvla.training.datasets import Demonstrations
from openvla.training.finetune import finetune, load_model_and_processor, set_trainable
from openvla.training.layers import prepared_layers

# Gradients of a batch in two halves are summed in another order, in float32; after four steps of AdamW on a tiny model,
# losses differ by less than a relative 1e-4.
SPLIT_BATCH_RTOL = 1e-4
SPLIT_BATCH_ACTION_ATOL = 1e-3  # of an L1 head's actions after those steps; decoded tokens are equal or a bin apart


@pytest.mark.parametrize("name", ["fused", "siglip"])
def test_training_step_has_the_golden_loss(name, tmp_path):
    from reference import published_folder

    golden = np.load(GOLDEN / name / "train.npz")
    pixels = np.load(GOLDEN / name / "inputs.npz")["pixel_values"][:2]
    model = OpenVLAForActionPrediction.from_pretrained(published_folder(name, tmp_path), torch_dtype=torch.float32)
    batch = {key: torch.from_numpy(golden[key]) for key in ("input_ids", "attention_mask", "labels")}
    batch["pixel_values"] = torch.from_numpy(pixels)
    gradients = []
    variants = [
        (False, contextlib.nullcontext(), batch),
        (True, contextlib.nullcontext(), batch),
        (True, prepared_layers(model, checkpointing="selective"), model_inputs(batch, model)),
    ]
    for logits_at_labels, context, inputs in variants:
        model.zero_grad()
        with context:
            out = model.train()(**inputs, logits_at_labels=logits_at_labels)
            assert abs(float(out.loss.detach()) - float(golden["loss"])) <= LOSS_ATOL
            out.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(out.logits) == int((batch["labels"][:, 1:] != -100).sum())
    assert set(gradients[0]) == set(gradients[1]) == set(gradients[2])
    for key, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[key], gradient, atol=1e-6, rtol=1e-4)
    metrics = compute_metrics(out, batch, model)
    assert float(metrics["action_accuracy"]) == pytest.approx(float(golden["finetune_action_accuracy"]), abs=1e-6)


def test_collated_sequences_equal_the_golden_ones():
    """Prompt, empty token, action tokens, end token; padded on the right."""
    golden = np.load(GOLDEN / "oft_libero" / "train.npz")
    model = oft_model("libero", "l1")

    class Processor:
        """Return the golden prompts, whose ids no tokenizer produces."""

        def __call__(self, instruction, images):
            end = int((golden["labels"][instruction] != -100).argmax())
            return {"input_ids": torch.from_numpy(golden["input_ids"][[instruction], :end]), "pixel_values": images[0]}

    key = "libero_spatial_no_noops"
    steps = [
        Sample(
            images=[torch.zeros(1, 12, 224, 224)] * 2,
            instruction=index,
            actions=model.action_statistics(key).unnormalize(golden["actions"][index]),
            proprio=np.zeros(8),
            dataset=key,
        )
        for index in range(2)
    ]
    batch = ActionCollator(Processor(), model)(steps)
    for name in ("attention_mask", "labels"):
        assert (batch[name].numpy() == golden[name]).all()
    assert (batch["input_ids"].numpy() == golden["input_ids"]).all()


def test_lora_learns_and_the_result_loads_with_remote_code(base, tmp_path):
    data = InMemoryData()
    finetune(settings(base, tmp_path, max_steps=40, lora_rank=16), data)
    logged = losses(tmp_path)
    assert logged[-1] < 0.2 * logged[0]
    metrics = json.loads((tmp_path / "feed_back.json").read_text())
    assert metrics["token_accuracy"] > 0.9
    assert metrics["distinct"] == 1
    policy = load_policy(tmp_path / "model")
    step = data.steps[0]
    action = policy.act(step.images[0], step.instruction)
    np.testing.assert_allclose(action[:6], step.actions[0][:6], atol=0.1)
    code = (
        "import transformers, sys; auto = transformers.AutoModelForImageTextToText;"
        f"m = auto.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True);"
        "assert 'openvla' not in sys.modules; assert m.norm_stats['lab']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    adapter = OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter").eval()
    inputs = policy.processor(instruction=step.instruction, images=step.images[0])
    np.testing.assert_allclose(adapter.predict_action(**inputs, unnorm_key="lab"), action, atol=1e-6)


@pytest.mark.parametrize("head", [None, "l1", "diffusion"])
def test_oft_heads_learn(base, head, tmp_path):
    action_config = {"platform": "libero", "action_head": head, "num_images_in_input": 2, "use_film": head == "l1"}
    config = settings(
        base,
        tmp_path,
        method="full",
        action_config=action_config,
        max_steps=12,
        learning_rate=1e-3,
        augment=head == "l1",
    )
    finetune(config, InMemoryData(chunk=PLATFORMS["libero"]["chunk_length"]))
    logged = losses(tmp_path)
    if head != "diffusion":  # its loss depends on the noise of each step
        assert logged[-1] < 0.8 * logged[0]
    policy = load_policy(tmp_path / "model")
    assert policy.model.config.action_head == head
    assert policy.processor.image_preset == ("libero" if head == "l1" else "none")


@pytest.mark.parametrize("method", ["full", "frozen-vision", "sandwich", "last-layer"])
def test_each_method_trains_its_parameters(method, tmp_path):
    model, _ = build_tiny()
    set_trainable(model, settings("", tmp_path, method=method))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    towers = [name for name in trained if name.startswith("vision_backbone.")]
    assert bool(towers) == (method in ("full", "sandwich"))
    assert not any("blocks.2." in name and "featurizer" in name for name in towers if "fused" not in name)
    assert any("projector" in name for name in trained) == (method != "last-layer")
    assert any("layers.0." in name for name in trained) == (method in ("full", "frozen-vision"))
    assert any("layers.1." in name for name in trained)
    batch = ActionCollator(build_tiny()[1], with_statistics(model))(InMemoryData().steps[:2])
    model.train()(**batch, logits_at_labels=True).loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, unused  # DDP would wait for their gradients


def test_gradient_checkpointing_saves_memory_in_towers_and_changes_no_gradient():
    """The towers have adapters, and their input needs no gradient."""
    model, processor = build_tiny()
    batch = ActionCollator(processor, with_statistics(model))(InMemoryData().steps[:2])
    model.enable_lora(r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.02)
    saved, gradients = [], []
    for checkpointing in (None, "full"):
        with prepared_layers(model, checkpointing=checkpointing):
            run = functools.partial(model.train().vision_backbone, batch["pixel_values"])
            features, num_bytes = _run_counting_saved_bytes(run)
            saved.append(num_bytes)
            features.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert saved[1] < 0.3 * saved[0]
    assert gradients[0]
    assert set(gradients[0]) == set(gradients[1])
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def _run_counting_saved_bytes(function):
    """Return a function's result and the bytes that autograd saves for its backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t):
        result = function()
    return result, sum(saved)


def test_interrupted_run_resumes_with_the_same_losses(base, tmp_path):
    data = InMemoryData(count=7)
    changes = {
        "max_steps": 6,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "lr_scheduler_type": "cosine",
        "save_total_limit": 9,
    }
    finetune(settings(base, tmp_path / "uninterrupted", **changes), data)
    finetune(settings(base, tmp_path / "interrupted", **changes), data)
    for folder in checkpoints(tmp_path / "interrupted")[2:]:
        shutil.rmtree(folder)
    (tmp_path / "interrupted" / "metrics.jsonl").unlink()
    finetune(settings(base, tmp_path / "interrupted", **changes), data)
    np.testing.assert_allclose(losses(tmp_path / "interrupted"), losses(tmp_path / "uninterrupted")[4:], rtol=1e-6)


def write_script(file, text):
    """Write a script that can import this module."""
    file.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n{text}")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["full", "lora", "oft"])
def test_two_processes_train_as_one(base, method, distributed, tmp_path):
    """Two processes with two samples each, interrupted once, have the losses of one process with four."""
    action_config, chunk = None, 1
    if method == "oft":  # trains heads and FiLM, and LoRA in all other modules
        action_config = {"platform": "libero", "action_head": "l1", "num_images_in_input": 2, "use_film": True}
        method, chunk = "lora", PLATFORMS["libero"]["chunk_length"]
    common = {"max_steps": 4, "method": method, "save_steps": 2, "action_config": action_config}
    common |= {"num_train_eval_samples": 2, "gradient_checkpointing": method == "full"}
    script = write_script(
        tmp_path / "run.py",
        "from training_runs import InMemoryData, settings\nfrom openvla.training.finetune import finetune\n"
        "steps, distributed, data = int(sys.argv[1]), sys.argv[2], InMemoryData(8, chunk=int(sys.argv[3]))\n"
        f"common = {{**{common!r}, 'max_steps': steps, 'per_device_train_batch_size': 2, 'distributed': distributed}}\n"
        f"finetune(settings({str(base)!r}, {str(tmp_path / 'two')!r}, **common), data)\n",
    )
    for steps in (2, 4):  # the second run resumes the first one
        launch(script, 2, steps, distributed, chunk)
    data = InMemoryData(8, chunk=chunk)
    finetune(settings(base, tmp_path / "one", **common, per_device_train_batch_size=4), data)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=SPLIT_BATCH_RTOL)
    constrain_actions = chunk == 1  # four steps teach no action tokens yet
    two, one = (load_policy(tmp_path / run / "model", constrain_actions=constrain_actions) for run in ("two", "one"))
    assert two.unnorm_key == "lab"
    step = data.steps[0]
    kwargs = {"proprio": step.proprio} if chunk > 1 else {}
    actions = [policy.act(step.images, step.instruction, **kwargs) for policy in (two, one)]
    np.testing.assert_allclose(*actions, atol=SPLIT_BATCH_ACTION_ATOL)
    newest = checkpoints(tmp_path / "two")[-1]
    expected = checkpoints(tmp_path / "one")[-1]
    assert {file.name for file in newest.iterdir()} == {*(file.name for file in expected.iterdir()), "random-1.pt"}
    sizes = [(folder / "trained.safetensors").stat().st_size for folder in (newest, expected)]
    assert sizes[0] == sizes[1]


def seeds_and_samples(steps, collator):
    """Return what determines a batch: the seed of its augmentation, and its samples."""
    seed = collator.position.source(collator._next_batch())
    return seed, [(step.episode_id, step.index) for step in steps]


def batches_in_order(data, count, world_size, workers, position=None):
    """Return the first batches of all processes in the order of training, with the position after them."""
    position = position or StreamPosition(0, 2, world_size, max(1, workers))
    loaders = []
    for rank in range(world_size):
        collator = ActionCollator(*build_tiny()[::-1], position=position, rank=rank, world_size=world_size)
        collate = functools.partial(seeds_and_samples, collator=collator)
        stream = data.stream(1, rank, world_size, position)
        loaders.append(iter(DataLoader(stream, position.batch_size, collate_fn=collate, num_workers=workers)))
    batches = [next(loaders[index % world_size]) for index in range(count)]
    return batches, replace(position, batches=position.batches + count)


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize(
    ("first", "second", "third"),  # processes and workers
    [
        ((2, 0), (1, 0), (2, 0)),
        ((1, 0), (2, 0), (3, 1)),
        ((3, 1), (2, 0), (1, 2)),
        ((1, 2), (1, 0), (2, 2)),
        ((2, 2), (3, 0), (1, 0)),
    ],
)
def test_data_order_and_augmentation_continue_with_other_processes_and_workers(first, second, third, tmp_path):
    """Interrupted twice, after numbers of batches that no number of processes divides."""
    data = Demonstrations(settings("base", tmp_path, data=stored_data(tmp_path / "data.hdf5"), shuffle_buffer=6))
    expected, _ = batches_in_order(data, 35, *first)
    batches, position = batches_in_order(data, 7, *first)
    for processes, count in ((second, 11), (third, 17)):
        more, position = batches_in_order(data, count, *processes, position)
        batches += more
    assert batches == expected
    assert len({tuple(samples) for _, samples in expected}) > 20


STORED_DATA = {"shuffle_buffer": 6, "augment": True, "save_steps": 2, "max_steps": 4, "num_train_eval_samples": 2}


def stored_data(file):
    """Write episodes of random frames and actions, an HDF5 file."""
    h5py = pytest.importorskip("h5py")
    random = np.random.RandomState(0)
    with h5py.File(file, "w") as content:
        for number, length in enumerate((3, 4, 5, 4, 3, 5)):
            group = content.create_group(f"data/demo_{number}")
            group.attrs["instruction"] = ("open the drawer", "close it")[number % 2]
            group["actions"] = random.uniform(-0.5, 0.5, (length, 7))
            group["actions"][:, 6] = random.randint(0, 2, length)
            group["image"] = random.randint(0, 256, (length, 32, 32, 3), np.uint8)
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize(("distributed", "workers"), [("ddp", 1), ("fsdp", 0)])
def test_run_resumes_on_another_number_of_processes(base, distributed, workers, tmp_path):
    """Interrupted after two of four steps, and resumed with the other number of processes: 2 then 1, 1 then 2.

    The batch of an optimizer step stays the same by gradient accumulation. Losses, weights and AdamW's moments must be
    those of the uninterrupted run: data order and augmentation continue.
    """
    common = {**STORED_DATA, "data": stored_data(tmp_path / "data.hdf5"), "lora_rank": 8}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "dataloader_num_workers": workers}
    script = write_script(
        tmp_path / "run.py",
        "from training_runs import settings\nfrom openvla.training.finetune import finetune\n"
        f"finetune(settings({str(base)!r}, sys.argv[1], **{common!r}, distributed={distributed!r}))\n",
    )

    def train(processes, output_dir):
        if processes == 2:
            return launch(script, 2, output_dir)
        return finetune(settings(base, output_dir, **common, gradient_accumulation_steps=2))

    for first, second in ((2, 1), (1, 2)):
        uninterrupted, resumed = tmp_path / f"{first}", tmp_path / f"{first} then {second}"
        train(first, uninterrupted)
        shutil.copytree(uninterrupted, resumed)
        shutil.rmtree(checkpoints(resumed)[-1])
        train(second, resumed)
        logged = losses(resumed)
        assert len(logged) == 4 + 2
        np.testing.assert_allclose(logged[4:], losses(uninterrupted)[2:], rtol=SPLIT_BATCH_RTOL)
        models = [load_policy(folder / "model").model.state_dict() for folder in (uninterrupted, resumed)]
        for name, tensor in models[0].items():
            torch.testing.assert_close(models[1][name], tensor, rtol=SPLIT_BATCH_RTOL, atol=SPLIT_BATCH_RTOL)
        expected, actual = (adamw_state(checkpoints(folder)[-1]) for folder in (uninterrupted, resumed))
        assert expected.keys() == actual.keys()
        assert expected
        for name, tensor in expected.items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-3 * scale)


def adamw_state(folder):
    """Return the optimizer state in a checkpoint by parameter and name."""
    states = torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"]
    return {(index, name): value for index, values in states.items() for name, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["none", "layers"])
def test_run_killed_at_random_moments_keeps_its_last_checkpoint(base, tmp_path, compiled):
    script = write_script(
        tmp_path / "run.py",
        "from training_runs import InMemoryData, settings\nfrom openvla.training.finetune import finetune\n"
        f"finetune(settings({str(base)!r}, {str(tmp_path / 'run')!r}, max_steps=400, save_steps=1, "
        f"compile={compiled!r}), InMemoryData())\n",
    )
    last_step, random = 0, np.random.RandomState(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while time.time() < deadline and _newest_step(tmp_path / "run") <= last_step + 1:
            time.sleep(0.05)
        time.sleep(2 * random.rand())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        step = _newest_step(tmp_path / "run")
        assert step > last_step + 1  # it resumed from the last checkpoint
        newest = checkpoints(tmp_path / "run")[-1]
        assert torch.load(newest / "state.pt", weights_only=True)["step"] == step
        assert load_file(newest / "trained.safetensors")
        last_step = step


def _newest_step(run):
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoints(run)), default=0)


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"warmup_steps": 2, "lr_scheduler_type": "cosine"}, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
        ({"warmup_steps": 2, "lr_scheduler_type": "linear"}, {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.75, 10: 0.0}),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}, {0: 0.5, 1: 1.0, 9: 1.0}),
        ({"lr_scheduler_type": "step", "num_steps_before_decay": 5}, {0: 1, 4: 1, 5: 0.1, 9: 0.1}),
        ({}, {0: 1, 9: 1}),
    ],
)
def test_learning_rate_schedules(base, tmp_path, changes, factors):
    config = settings(base, tmp_path, max_steps=10, **changes)
    assert {step: round(lr_lambda(config, step), 3) for step in factors} == factors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "Unknown method 'lorra'; allowed"),
        ({"lr_scheduler_type": "polynomial"}, "Unknown lr_scheduler_type 'polynomial'"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type: step needs num_steps_before_decay"),
        ({"num_steps_before_decay": 5}, "num_steps_before_decay is 5, which .* use lr_scheduler_type: step"),
        ({"warmup_steps": 5}, "warmup_steps is 5, which .* use lr_scheduler_type: constant_with_warmup"),
        ({"method": "full", "lora_alpha": 64}, "lora_alpha is 64, which method: full .*; remove it, or use method"),
        ({"distributed": "tp"}, "Unknown distributed 'tp'; allowed"),
        ({"compile": "model"}, "Unknown compile 'model'; allowed"),
        ({"method": "full", "adapter_dtype": "bf16"}, "adapter_dtype is 'bf16', which method: full does not use"),
        ({"gradient_checkpointing_policy": "selective"}, "which gradient_checkpointing: False does not use"),
        ({"distributed": "fsdp", "method": "qlora"}, "4-bit weights cannot be sharded"),
        ({"pad_last_chunk": "repeat"}, "pad_last_chunk must be true or false, got 'repeat'"),
        ({"report_to": "mlflow"}, "Unknown report_to 'mlflow'; allowed"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an integer of at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be an integer of at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        ({"shuffle_buffer": "all"}, "shuffle_buffer must be an integer of at least 0, got 'all'"),
        ({"learning_rate": 0.0}, "learning_rate and max_grad_norm must be positive"),
        ({"modle": "x"}, r"Unknown fields in here: \['modle'\].* Did you mean model by modle\?"),
        ({"logging_step": 5}, "Did you mean logging_steps by logging_step"),
        ({"model": None}, r"missing: \['model'\]"),
    ],
)
def test_invalid_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict({"model": "m", "output_dir": "o", **fields}, "here")


def test_invalid_samples_and_configurations_of_the_model_are_refused(base, tmp_path):
    model, processor = build_tiny()
    collator, step = ActionCollator(processor, with_statistics(model)), InMemoryData().steps[0]
    with pytest.raises(KeyError, match="No statistics of 'kitchen'"):
        collator([replace(step, dataset="kitchen")])
    with pytest.raises(ValueError, match="Expected actions of 7 dimensions"):
        collator([replace(step, actions=np.zeros((1, 6)))])
    with pytest.raises(ValueError, match="predicts 1 actions; 'lab' gives 8"):
        collator([replace(step, actions=np.zeros((8, 7)))])
    with pytest.raises(ValueError, match="The model takes 1 images, 'lab' gives 2: name the cameras .*cameras: .NAME"):
        collator([replace(step, images=step.images * 2)])
    with pytest.raises(ValueError, match="Unknown platform 'so100'"):
        load_model_and_processor(
            settings(base, tmp_path, action_config={"platform": "so100"}), InMemoryData(), torch.device("cpu")
        )
    with pytest.raises(ValueError, match="fsdp shards a model over several processes, this is one"):
        finetune(settings(base, tmp_path, distributed="fsdp"), InMemoryData())


def test_action_config_of_an_oft_model_cannot_be_changed(tmp_path):
    l1 = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "num_images_in_input": 2}
    for part in build_tiny(**l1, norm_stats={"lab": STATISTICS}):
        part.save_pretrained(tmp_path)
    data, device = InMemoryData(chunk=8), torch.device("cpu")

    def load(action_config):
        return load_model_and_processor(settings(tmp_path, tmp_path, action_config=action_config), data, device)

    model, _ = load({"platform": "libero", "action_head": "l1"})
    assert model.config.action_head == "l1"
    with pytest.raises(ValueError, match=r"asks for .*'chunk_length': 25.* already has .*'chunk_length': 8"):
        load({"platform": "aloha", "action_head": "l1"})
    with pytest.raises(ValueError, match="'action_heads': 'l1'"):
        load({"action_heads": "l1"})


def test_data_must_match_the_statistics_that_the_model_holds(tmp_path):
    from openvla.data.torch_dataset import TorchDatasetReader

    six = {"action": {"q01": [-1.0] * 6, "q99": [1.0] * 6}}
    for part in build_tiny(norm_stats={"lab": six}):
        part.save_pretrained(tmp_path)
    data = InMemoryData()
    episode = [{"image": step.images[0], "action": step.actions[0]} for step in data.steps]
    fields = {"cameras": ["image"], "action": ["action"], "instruction_text": "go"}
    data.readers = [TorchDatasetReader([episode], name="lab", fields=fields)]
    with pytest.raises(ValueError, match="lab: action has 7 dimensions, but 6 in the statistics"):
        load_model_and_processor(settings(tmp_path, tmp_path), data, torch.device("cpu"))


def test_run_without_evaluation_writes_the_model(base, tmp_path):
    model = finetune(settings(base, tmp_path, max_steps=1, num_train_eval_samples=0), InMemoryData())
    assert OpenVLAForActionPrediction.from_pretrained(model).norm_stats["lab"]["action"] == STATISTICS["action"]
    assert not (tmp_path / "feed_back.json").exists()


def test_progress_bar_ends_before_the_message_of_an_error(base, tmp_path, capsys, monkeypatch):
    def fail(collator, samples):
        raise ValueError("a damaged frame")

    monkeypatch.setattr(ActionCollator, "__call__", fail)
    with pytest.raises(ValueError, match="a damaged frame") as caught:
        finetune(settings(base, tmp_path), InMemoryData())
    assert capsys.readouterr().err.endswith("it/s]\n"), caught  # whose traceback keeps the bar alive


def test_bad_episodes_stop_a_run_or_are_counted_with_skip_bad(base, tmp_path, capsys, monkeypatch):
    h5py = pytest.importorskip("h5py")
    from openvla.__main__ import main

    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(FIXTURES / "hdf5", data)
    file = data / "pick_up_the_red_block_demo.hdf5"
    with h5py.File(file, "r+") as content:
        content["data/demo_0/actions"][2, 1] = np.nan
    fields = [{"path": str(data), "fields": {"cameras": ["obs.agentview_rgb"]}}]
    (tmp_path / "run.yaml").write_text(json.dumps({"model": str(base), "data": fields, "method": "last-layer"}))
    command = ["finetune", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "run"), "--use-cpu"]
    command += ["--max-steps", "1", "--per-device-train-batch-size", "2", "--num-train-eval-samples", "2"]
    status = main(command)
    message = capsys.readouterr().err
    assert status == 2
    assert "pick_up_the_red_block_demo.hdf5, episode" in message
    assert "demo_0: action[1] at step 2 is nan" in message
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 episodes. The first: .*demo_0: action\[1\]") as recorded:
        assert main([*command, "--skip-bad"]) == 0
    assert sum("Skipped, 1 so far" in str(one.message) for one in recorded) <= 2  # once a stream, not once an epoch
    statistics = json.loads((tmp_path / "run" / "model" / "dataset_statistics.json").read_text())["data"]
    assert (statistics["num_trajectories"], statistics["num_skipped"]) == (3, 1)
    (written,) = json.loads((tmp_path / "run" / "data.json").read_text())["datasets"]
    assert (written["cameras"], written["episodes"]) == (["obs.agentview_rgb"], 3)
    assert written["left_out"] == {"bad_episodes": 1, "episodes_shorter_than_the_chunk": 0, "steps_that_do_nothing": 0}
    printed = capsys.readouterr().out
    assert (
        f"data: 3 episodes, {written['samples']} samples, cameras obs.agentview_rgb; left out: 1 bad episodes"
        in printed
    )


@pytest.mark.parametrize(("pad_last_chunk", "steps"), [(False, [0, 1]), (True, [0, 0, 1, 1, 2, 2, 3])])
def test_pad_last_chunk_decides_where_chunks_start(tmp_path, monkeypatch, pad_last_chunk, steps):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number, length in enumerate((3, 4)):
            group = file.create_group(f"data/demo_{number}")
            group.attrs["instruction"] = "go"
            group["actions"] = np.random.RandomState(number).uniform(0, 1, (length, 7))
            group["image"] = np.zeros((length, 8, 8, 3), np.uint8)
    config = settings("base", tmp_path, data=str(tmp_path / "a.hdf5"), pad_last_chunk=pad_last_chunk, shuffle_buffer=0)
    stream = Demonstrations(config).stream(5 if pad_last_chunk else 3)
    drawn = [sample.index for sample, _ in zip(stream, range(len(steps) + (not pad_last_chunk)))]
    assert sorted(drawn) == (steps if pad_last_chunk else sorted([0, *steps]))


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
def test_qlora_result_is_the_unquantized_base_with_the_adapter_merged(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    finetune(settings(base, tmp_path, method="qlora", max_steps=12, lora_rank=8, lora_alpha=16), InMemoryData())
    logged = losses(tmp_path)
    assert logged[-1] < 0.8 * logged[0]
    merge(tmp_path / "adapter", tmp_path / "streamed")
    result, streamed, plain = (
        load_policy(folder).model for folder in (tmp_path / "model", tmp_path / "streamed", base)
    )
    assert result.dtype == plain.dtype == torch.float32
    assert not hasattr(result.config, "quantization_config")
    changed = 0
    for (name, tensor), other in zip(result.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(tensor, streamed.state_dict()[name])
        changed += not torch.equal(tensor, other)
    assert changed == len(lora_targets(plain, "all-linear"))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_trackers_log_the_values_of_metrics_jsonl(base, tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker)
    config = settings(
        base,
        tmp_path / "run",
        max_steps=2,
        report_to=tracker,
        num_train_eval_samples=2,
        method="full",
        action_config={"action_dim": 7, "chunk_length": 2, "num_images_in_input": 2},  # a mapping as hyperparameter
    )
    finetune(config, InMemoryData(chunk=2))
    expected = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = read_tracker(tracker, tmp_path)
    for name in ("train_loss", "action_accuracy", "l1_loss", "l1_bins", "gradient_norm", "learning_rate"):
        assert logged[name] == pytest.approx([line[name] for line in expected], rel=1e-6)


def read_tracker(tracker, folder):
    """Return a tracker's values by name, in the order of steps."""
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "run" / "openvla")).Reload()
        return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    steps = list(_wandb_steps(folder)) if tracker == "wandb" else list(_trackio_steps(folder))
    return {name: [values[name] for values in steps] for name in steps[0]}


def _wandb_steps(folder):
    """Read wandb's offline file: a header of 7 bytes, then records in the format of LevelDB's log.

    Each record follows its checksum, length and kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset = next(folder.rglob("*.wandb")).read_bytes(), 7
    assert len(data) < 2**15  # one block
    while offset < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        assert kind == 1  # a complete record
        record = Record.FromString(data[offset + 7 : offset + 7 + length])
        offset += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _trackio_steps(folder):
    with sqlite3.connect(next((folder / "trackio").glob("*.db"))) as database:
        for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY step"):
            yield json.loads(metrics)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_missing_tracker_error_names_the_package(base, tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ImportError, match=f"report_to: {tracker} needs {tracker}: pip install {tracker}"):
        finetune(settings(base, tmp_path, report_to=tracker), InMemoryData())


@pytest.mark.slow
def test_toy_example_memorizes_its_twenty_episodes(tmp_path):
    """Run the commands in the docstring of examples/toy.py."""
    for package in ("h5py", "yaml"):
        pytest.importorskip(package)
    environment = {**os.environ, "OPENVLA_CACHE": str(tmp_path / "cache")}
    for command in (["examples/toy.py"], ["-m", "openvla", "finetune", "examples/toy.yaml"]):
        command = [sys.executable, *(str(REPOSITORY / part) if "/" in part else part for part in command)]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=3000)
    metrics = json.loads((tmp_path / "toy" / "run" / "feed_back.json").read_text())
    assert metrics["steps"] == 120  # all of them
    assert metrics["token_accuracy"] > 0.95
    assert load_policy(tmp_path / "toy" / "run" / "model").unnorm_key == "data"


@pytest.mark.parametrize("name", ["full_8gpu", "lora_24gb", "oft_libero", "qlora_16gb", "toy"])
def test_example_files_are_valid_configurations(name):
    pytest.importorskip("yaml")
    file = REPOSITORY / "examples" / f"{name}.yaml"
    config = config_from_dict({"output_dir": "run", **read_yaml(file)}, file)
    assert file.read_text().count(f"examples/{name}.yaml") >= 1  # the command to launch it
    assert (config.distributed == "fsdp") == (name == "full_8gpu")


@pytest.mark.parametrize("name", ["lerobot_v3", "bridge_orig", "hdf5"])
def test_command_trains_on_stored_demonstrations(base, name, tmp_path, capsys, monkeypatch):
    for package in ("av", "google_crc32c", "h5py", "pyarrow", "yaml"):
        pytest.importorskip(package)
    from openvla.__main__ import main
    from openvla.data.open import open_dataset

    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    data = FIXTURES / name
    camera = open_dataset(data).fields.cameras[0]
    fields = {"model": str(base), "method": "full", "max_steps": 3, "logging_steps": 1}
    fields["per_device_train_batch_size"] = 2
    fields["data"] = [{"path": str(data), "fields": {"cameras": [camera]}}]
    (tmp_path / "run.yaml").write_text(json.dumps(fields))  # YAML reads JSON
    command = ["finetune", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "run"), "--use-cpu"]
    command += ["--num-train-eval-samples", "2", "--dataloader-num-workers", "1"]
    status = main(command)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "predicted 2 training samples: l1_loss" in printed.out
    assert len(losses(tmp_path / "run")) == 3
    assert load_policy(tmp_path / "run" / "model").unnorm_key


def test_numbers_that_yaml_reads_as_text_are_parsed():
    assert config_from_dict({"model": "m", "output_dir": "o", "learning_rate": "5e-4"}).learning_rate == 5e-4
    with pytest.raises(ValueError, match="learning_rate must be a number, got 'fast'"):
        config_from_dict({"model": "m", "output_dir": "o", "learning_rate": "fast"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"path": "a", "wieght": 2}, r"unknown: \['wieght'\]. Did you mean 'weight'"), ({"weight": 1}, "needs a path")],
)
def test_invalid_data_entry_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        Demonstrations(config_from_dict({"model": "m", "output_dir": "o", "data": [entry]}))


def test_help_describes_every_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    undescribed = [action.dest for action in parser._actions if not action.help or action.help.startswith(" Default")]
    assert undescribed == []
    text = " ".join(parser.format_help().split())
    assert "Folder or Hub id of the model to fine-tune." in text
    assert f"Default {FinetuneConfig.learning_rate}." in text
