"""Fine-tuning: what is trained, that it learns, goes on after a break, and gives a folder that everyone can load."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from reference import FIXTURES, GOLDEN, LOSS_ATOL, REPOSITORY, oft_model
from safetensors.torch import load_file

pytest.importorskip("accelerate")

from openvla import PLATFORMS, OpenVLAForActionPrediction, load_policy
from openvla.adapters.targets import lora_targets
from openvla.compatibility_openvla import QUANTIZES_ON_CPU, enable_checkpointing
from openvla.conversion.merge import merge
from openvla.tiny import build_tiny
from openvla.training.checkpointing import checkpoints
from openvla.training.collator import ActionCollator, answer_metrics, model_inputs
from openvla.training.config import TRACKERS
from openvla.training.finetune import (
    Demonstrations,
    FinetuneConfig,
    as_config,
    build,
    finetune,
    rate,
    read_yaml,
    set_trained,
)
from openvla.training.memory import lean

# A batch in two halves adds its gradients up in another order, in float32; four steps of AdamW on a tiny model make of
# that less than 1e-4 of a loss.
SPLIT_BATCH_RTOL = 1e-4
SPLIT_BATCH_ACTION_ATOL = 1e-3  # of an L1 head's actions after those steps; tokens are a bin apart or equal

STATISTICS = {
    "action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
}


@dataclass(frozen=True)
class Sample:
    """What a sample of ``demonstrations`` has."""

    images: list
    instruction: str
    actions: np.ndarray
    proprio: np.ndarray | None
    dataset: str


class Few:
    """A few steps of demonstrations in memory: noise images, each with its own action."""

    def __init__(self, count=4, chunk=1):
        random = np.random.RandomState(0)
        self.statistics, self.readers = {"lab": STATISTICS}, ()
        self.steps = [
            Sample(
                images=list(random.randint(0, 256, (2 if chunk > 1 else 1, 64, 64, 3), dtype=np.uint8)),
                instruction=("open the drawer", "close it")[index % 2],
                actions=random.uniform(-0.5, 0.5, (chunk, 7)),
                proprio=random.uniform(-1, 1, 8),
                dataset="lab",
            )
            for index in range(count)
        ]

    def stream(self, chunk_length, rank=0, world_size=1, batches=0, batch_size=1):
        return Shuffled(self.steps, rank, world_size, batches * batch_size)


class Shuffled(torch.utils.data.IterableDataset):
    """Steps without end, in an order of their own, from behind so many on."""

    def __init__(self, steps, rank, world_size, skip):
        self.settings = steps, rank, world_size, skip

    def __iter__(self):
        steps, rank, world_size, skip = self.settings
        random, drawn = np.random.RandomState(0), 0
        while True:
            for index in random.permutation(len(steps)):
                drawn += 1
                if drawn % world_size == rank and (drawn - 1) // world_size >= skip:
                    yield steps[index]


def settings(base, output, **changes):
    fields = {"model": str(base), "output": str(output), "batch_size": 4, "max_steps": 4, "device": "cpu"}
    return FinetuneConfig(
        **{**fields, "learning_rate": 3e-3, "log_steps": 1, "augment": False, "feed_back": 4, **changes}
    )


def losses(output):
    return [json.loads(line)["train_loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["fused", "siglip"])
def test_a_step_has_the_golden_loss_however_it_is_taken(name, tmp_path):
    from reference import published_folder

    golden = np.load(GOLDEN / name / "train.npz")
    pixels = np.load(GOLDEN / name / "inputs.npz")["pixel_values"][:2]
    model = OpenVLAForActionPrediction.from_pretrained(published_folder(name, tmp_path), torch_dtype=torch.float32)
    batch = {key: torch.from_numpy(golden[key]) for key in ("input_ids", "attention_mask", "labels")}
    batch["pixel_values"] = torch.from_numpy(pixels)
    gradients = []
    ways = [(False, contextlib.nullcontext(), batch), (True, contextlib.nullcontext(), batch)]
    for only, training, inputs in [*ways, (True, lean(model), model_inputs(batch, model))]:
        model.zero_grad()
        with training:
            out = model.train()(**inputs, logits_at_labels=only)
            assert abs(float(out.loss.detach()) - float(golden["loss"])) <= LOSS_ATOL
            out.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(out.logits) == int((batch["labels"][:, 1:] != -100).sum())
    assert set(gradients[0]) == set(gradients[1]) == set(gradients[2])
    for key, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[key], gradient, atol=1e-6, rtol=1e-4)
    metrics = answer_metrics(out, batch, model)
    assert float(metrics["action_accuracy"]) == pytest.approx(float(golden["finetune_action_accuracy"]), abs=1e-6)


def test_rows_are_the_golden_ones():
    """Prompt, empty token, action tokens, end token; padded on the right."""
    golden = np.load(GOLDEN / "oft_libero" / "train.npz")
    model = oft_model("libero", "l1")

    class Processor:
        """Gives the golden prompts, whose ids are no tokenizer's."""

        def __call__(self, instruction, images):
            end = int((golden["labels"][instruction] != -100).argmax())
            return {"input_ids": torch.from_numpy(golden["input_ids"][[instruction], :end]), "pixel_values": images[0]}

    key = "libero_spatial_no_noops"
    steps = [
        Sample(
            images=[torch.zeros(1, 12, 224, 224)] * 2,
            instruction=row,
            actions=model.action_statistics(key).unnormalize(golden["actions"][row]),
            proprio=np.zeros(8),
            dataset=key,
        )
        for row in range(2)
    ]
    batch = ActionCollator(Processor(), model)(steps)
    for name in ("attention_mask", "labels"):
        assert (batch[name].numpy() == golden[name]).all()
    assert (batch["input_ids"].numpy() == golden["input_ids"]).all()


def test_lora_learns_and_everyone_can_load_the_result(base, tmp_path):
    data = Few()
    finetune(settings(base, tmp_path, max_steps=40, lora_rank=16), data)
    found = losses(tmp_path)
    assert found[-1] < 0.2 * found[0]
    fed = json.loads((tmp_path / "feed_back.json").read_text())
    assert fed["token_accuracy"] > 0.9
    assert fed["distinct"] == 1
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
def test_oft_heads(base, head, tmp_path):
    answer = {"platform": "libero", "action_head": head, "num_images_in_input": 2, "use_film": head == "l1"}
    config = settings(
        base, tmp_path, method="full", answer=answer, max_steps=12, learning_rate=1e-3, augment=head == "l1"
    )
    finetune(config, Few(chunk=PLATFORMS["libero"]["chunk_length"]))
    found = losses(tmp_path)
    if head != "diffusion":  # whose loss is of another noise at each step
        assert found[-1] < 0.8 * found[0]
    policy = load_policy(tmp_path / "model")
    assert policy.model.config.action_head == head
    assert policy.processor.image_preset == ("libero" if head == "l1" else "none")


@pytest.mark.parametrize("method", ["full", "frozen-vision", "sandwich", "last-layer"])
def test_what_each_method_trains(method, tmp_path):
    model, _ = build_tiny()
    set_trained(model, settings("", tmp_path, method=method))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    towers = [name for name in trained if name.startswith("vision_backbone.")]
    assert bool(towers) == (method in ("full", "sandwich"))
    assert not any("blocks.2." in name and "featurizer" in name for name in towers if "fused" not in name)
    assert any("projector" in name for name in trained) == (method != "last-layer")
    assert any("layers.0." in name for name in trained) == (method in ("full", "frozen-vision"))
    assert any("layers.1." in name for name in trained)
    batch = ActionCollator(build_tiny()[1], _with_statistics(model))(Few().steps[:2])
    model.train()(**batch, logits_at_labels=True).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without  # or DDP would wait for them


def test_checkpointing_saves_the_towers_too_and_changes_no_gradient():
    """Adapters in towers whose input needs no gradient."""
    model, processor = build_tiny()
    batch = ActionCollator(processor, _with_statistics(model))(Few().steps[:2])
    model.enable_lora(r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.02)
    saved, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        features, kept = _with_what_is_saved(lambda: model.train().vision_backbone(batch["pixel_values"]))
        saved.append(kept)
        features.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert saved[1] < 0.3 * saved[0]
    assert gradients[0]
    assert set(gradients[0]) == set(gradients[1])
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def _with_what_is_saved(run):
    """The result, and the bytes that wait for its backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        result = run()
    return result, sum(kept)


def _with_statistics(model):
    model.add_norm_stats("lab", STATISTICS)
    return model


def test_a_broken_run_goes_on_with_the_same_losses(base, tmp_path):
    data = Few(count=7)
    changes = {"max_steps": 6, "save_steps": 2, "accumulation": 2, "batch_size": 2, "decay": "cosine", "keep": 9}
    finetune(settings(base, tmp_path / "whole", **changes), data)
    finetune(settings(base, tmp_path / "broken", **changes), data)
    for folder in checkpoints(tmp_path / "broken")[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (tmp_path / "broken" / "metrics.jsonl").unlink()
    finetune(settings(base, tmp_path / "broken", **changes), data)
    np.testing.assert_allclose(losses(tmp_path / "broken"), losses(tmp_path / "whole")[4:], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["full", "lora", "oft"])
def test_two_processes_train_as_one(base, method, parallelism, tmp_path):
    """Two processes with two rows each, broken off once (over gloo), have the losses of one with four."""
    answer, chunk = None, 1
    if method == "oft":  # its heads and FiLM, LoRA beside the rest
        answer = {"platform": "libero", "action_head": "l1", "num_images_in_input": 2, "use_film": True}
        method, chunk = "lora", PLATFORMS["libero"]["chunk_length"]
    common = {"max_steps": 4, "method": method, "save_steps": 2, "answer": answer, "feed_back": 2}
    common["gradient_checkpointing"] = method == "full"
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "from test_finetune import Few, settings\nfrom openvla.training.finetune import finetune\n"
        "steps, parallelism, data = int(sys.argv[1]), sys.argv[2], Few(8, chunk=int(sys.argv[3]))\n"
        f"common = {{**{common!r}, 'max_steps': steps, 'batch_size': 2, 'parallelism': parallelism}}\n"
        f"finetune(settings({str(base)!r}, {str(tmp_path / 'two')!r}, **common), data)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    for steps in ("2", "4"):  # the second run goes on from the first
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, steps, parallelism, str(chunk)], check=True, env=environment, timeout=300)
    data = Few(8, chunk=chunk)
    finetune(settings(base, tmp_path / "one", **common, batch_size=4), data)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=SPLIT_BATCH_RTOL)
    in_tokens = chunk == 1  # after four steps, which teach no action tokens yet
    policy, alone = (load_policy(tmp_path / run / "model", constrain_actions=in_tokens) for run in ("two", "one"))
    assert policy.unnorm_key == "lab"
    step = data.steps[0]
    asked = {"proprio": step.proprio} if chunk > 1 else {}
    actions = [one.act(step.images, step.instruction, **asked) for one in (policy, alone)]
    np.testing.assert_allclose(*actions, atol=SPLIT_BATCH_ACTION_ATOL)
    newest = checkpoints(tmp_path / "two")[-1]
    trained = sum(file.stat().st_size for file in newest.glob("trained*"))
    assert len(list(newest.glob("trained*"))) == (2 if parallelism == "fsdp" else 1)
    assert trained < 1.2 * (checkpoints(tmp_path / "one")[-1] / "trained.safetensors").stat().st_size  # none twice
    if parallelism == "fsdp":
        with pytest.raises(ValueError, match="written under another parallelism or by fewer processes"):
            finetune(settings(base, tmp_path / "two", **common, batch_size=2), data)


@pytest.mark.slow
def test_killed_at_random_moments_it_keeps_its_last_checkpoint(base, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests')!r})\n"
        "from test_finetune import Few, settings\nfrom openvla.training.finetune import finetune\n"
        f"finetune(settings({str(base)!r}, {str(tmp_path / 'run')!r}, max_steps=400, save_steps=1), Few())\n"
    )
    seen, random = 0, np.random.RandomState(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while time.time() < deadline and _newest_step(tmp_path / "run") <= seen + 1:
            time.sleep(0.05)
        time.sleep(2 * random.rand())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        step = _newest_step(tmp_path / "run")
        assert step > seen + 1  # it went on, from where it had been
        newest = checkpoints(tmp_path / "run")[-1]
        assert torch.load(newest / "state.pt", weights_only=True)["step"] == step
        assert load_file(newest / "trained.safetensors")
        seen = step


def _newest_step(run):
    return max((int(folder.name.removeprefix("step-")) for folder in checkpoints(run)), default=0)


def test_the_learning_rate(base, tmp_path):
    config = settings(base, tmp_path, warmup_steps=2, max_steps=10, decay="cosine")
    assert [round(rate(config, step), 3) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    config = settings(base, tmp_path, decay="step", decay_step=5)
    assert [rate(config, step) for step in (0, 4, 5, 9)] == [1, 1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lorra"}, "Unknown method 'lorra'; allowed"),
        ({"decay": "linear"}, "Unknown decay 'linear'"),
        ({"decay": "step"}, "decay='step' needs decay_step"),
        ({"decay_step": 5}, "decay_step is 5, which .* does not use; leave it out, or take decay: step"),
        ({"method": "full", "lora_alpha": 64}, "lora_alpha is 64, which method: full .*; leave it out, or take method"),
        ({"parallelism": "tp"}, "Unknown parallelism 'tp'; allowed"),
        ({"parallelism": "fsdp", "method": "qlora"}, "4-bit weights cannot be spread"),
        ({"pad_last_chunk": "pad"}, r"Unknown pad_last_chunk 'pad'; allowed: \[False, True\]"),
        ({"tracker": "mlflow"}, "Unknown tracker 'mlflow'; allowed"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate and max_grad_norm must be positive"),
        ({"modle": "x"}, r"Unknown fields in here: \['modle'\]"),
        ({"model": None}, r"missing: \['model'\]"),
    ],
)
def test_bad_runs(fields, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "output": "o", **fields}, "here")


def test_bad_data(base, tmp_path):
    model, processor = build_tiny()
    collator, step = ActionCollator(processor, _with_statistics(model)), Few().steps[0]
    with pytest.raises(KeyError, match="No statistics of 'kitchen'"):
        collator([replace(step, dataset="kitchen")])
    with pytest.raises(ValueError, match="Expected actions of 7 dimensions"):
        collator([replace(step, actions=np.zeros((1, 6)))])
    with pytest.raises(ValueError, match="answers with 1 actions; 'lab' gives 8"):
        collator([replace(step, actions=np.zeros((8, 7)))])
    with pytest.raises(ValueError, match="The model takes 1 images, 'lab' gives 2: name the cameras"):
        collator([replace(step, images=step.images * 2)])
    with pytest.raises(ValueError, match="Unknown platform 'so100'"):
        build(settings(base, tmp_path, answer={"platform": "so100"}), Few(), torch.device("cpu"))
    with pytest.raises(ValueError, match="fsdp spreads a model over several processes, this is one"):
        finetune(settings(base, tmp_path, parallelism="fsdp"), Few())


def test_an_answer_that_the_model_does_not_give(tmp_path):
    """An OpenVLA-OFT stays what it is: to ask otherwise is an error, to ask for what it is is none."""
    l1 = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "num_images_in_input": 2}
    for part in build_tiny(**l1, norm_stats={"lab": STATISTICS}):
        part.save_pretrained(tmp_path)
    data, device = Few(chunk=8), torch.device("cpu")
    model, _ = build(settings(tmp_path, tmp_path, answer={"platform": "libero", "action_head": "l1"}), data, device)
    assert model.config.action_head == "l1"
    asked = {"platform": "aloha", "action_head": "l1"}
    with pytest.raises(ValueError, match=r"asks for .*'chunk_length': 25.* already answers with .*'chunk_length': 8"):
        build(settings(tmp_path, tmp_path, answer=asked), data, device)
    with pytest.raises(ValueError, match="'action_heads': 'l1'"):
        build(settings(tmp_path, tmp_path, answer={"action_heads": "l1"}), data, device)


def test_statistics_that_a_model_holds_fit_the_data(tmp_path):
    from openvla.data.torch_dataset import TorchDatasetReader

    six = {"action": {"q01": [-1.0] * 6, "q99": [1.0] * 6}}
    for part in build_tiny(norm_stats={"lab": six}):
        part.save_pretrained(tmp_path)
    data = Few()
    episode = [{"image": step.images[0], "action": step.actions[0]} for step in data.steps]
    fields = {"cameras": ["image"], "action": ["action"], "instruction_text": "go"}
    data.readers = [TorchDatasetReader([episode], name="lab", fields=fields)]
    with pytest.raises(ValueError, match="lab: action has 7 dimensions, but 6 in the statistics"):
        build(settings(tmp_path, tmp_path), data, torch.device("cpu"))


def test_bad_episodes_stop_a_run_or_are_counted(base, tmp_path, capsys, monkeypatch):
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
    command = ["finetune", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--max-steps", "1", "--batch-size", "2", "--feed-back", "2"]
    status = main(command)
    said = capsys.readouterr().err
    assert status == 2
    assert "pick_up_the_red_block_demo.hdf5, episode" in said
    assert "demo_0: action[1] at step 2 is nan" in said
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 episodes. The first: .*demo_0: action\[1\]") as warned:
        assert main([*command, "--skip-bad"]) == 0
    assert sum("Skipped, 1 so far" in str(one.message) for one in warned) <= 2  # once a stream, not once an epoch
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


@pytest.mark.parametrize(("pad", "steps"), [(False, [0, 1]), (True, [0, 0, 1, 1, 2, 2, 3])])
def test_a_run_says_what_happens_at_the_ends_of_episodes(tmp_path, monkeypatch, pad, steps):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for number, length in enumerate((3, 4)):
            group = file.create_group(f"data/demo_{number}")
            group.attrs["instruction"] = "go"
            group["actions"] = np.random.RandomState(number).uniform(0, 1, (length, 7))
            group["image"] = np.zeros((length, 8, 8, 3), np.uint8)
    data = Demonstrations(
        settings("base", tmp_path, data=str(tmp_path / "a.hdf5"), pad_last_chunk=pad, shuffle_buffer=0)
    )
    stream = data.stream(5 if pad else 3)
    drawn = [sample.index for sample, _ in zip(stream, range(len(steps) + (not pad)))]
    assert sorted(drawn) == (steps if pad else sorted([0, *steps]))


@pytest.mark.skipif(not QUANTIZES_ON_CPU, reason="needs a GPU before transformers 4.53")
def test_qlora(base, tmp_path):
    """Trained beside 4-bit weights; the result is the plain base with the adapter merged into it once."""
    pytest.importorskip("bitsandbytes")
    finetune(settings(base, tmp_path, method="qlora", max_steps=12, lora_rank=8, lora_alpha=16), Few())
    found = losses(tmp_path)
    assert found[-1] < 0.8 * found[0]
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
def test_trackers(base, tracker, tmp_path, monkeypatch):
    """What a tracker has written is what metrics.jsonl holds."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker)
    answer = {"action_dim": 7, "chunk_length": 2, "num_images_in_input": 2}  # a mapping, for the hyperparameters
    config = settings(base, tmp_path / "run", max_steps=2, tracker=tracker, feed_back=2, method="full", answer=answer)
    finetune(config, Few(chunk=2))
    wanted = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = read_tracker(tracker, tmp_path)
    for name in ("train_loss", "action_accuracy", "l1_loss", "l1_bins", "gradient_norm", "learning_rate"):
        assert found[name] == pytest.approx([line[name] for line in wanted], rel=1e-6)


def read_tracker(tracker, folder):
    """Values by name, in the order of steps."""
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "run" / "openvla")).Reload()
        return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    rows = list(_wandb_rows(folder)) if tracker == "wandb" else list(_trackio_rows(folder))
    return {name: [row[name] for row in rows] for name in rows[0]}


def _wandb_rows(folder):
    """Its offline file: a header of 7 bytes, then records behind a checksum, their length and kind (LevelDB's log)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place = next(folder.rglob("*.wandb")).read_bytes(), 7
    assert len(data) < 2**15  # one block
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1  # a whole record
        record = Record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _trackio_rows(folder):
    with sqlite3.connect(next((folder / "trackio").glob("*.db"))) as database:
        for (metrics,) in database.execute("SELECT metrics FROM metrics ORDER BY step"):
            yield json.loads(metrics)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_tracker_names_what_to_install(base, tracker, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ImportError, match=f"tracker: {tracker} needs {tracker}: pip install {tracker}"):
        finetune(settings(base, tmp_path, tracker=tracker), Few())


@pytest.mark.slow
def test_twenty_episodes_are_learnt_by_heart(tmp_path):
    """The commands of examples/toy.py, as they are written there."""
    for package in ("h5py", "yaml"):
        pytest.importorskip(package)
    environment = {**os.environ, "OPENVLA_CACHE": str(tmp_path / "cache")}
    for command in (["examples/toy.py"], ["-m", "openvla", "finetune", "examples/toy.yaml"]):
        command = [sys.executable, *(str(REPOSITORY / part) if "/" in part else part for part in command)]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=3000)
    fed = json.loads((tmp_path / "toy" / "run" / "feed_back.json").read_text())
    assert fed["steps"] == 120  # all of them
    assert fed["token_accuracy"] > 0.95
    assert load_policy(tmp_path / "toy" / "run" / "model").unnorm_key == "data"


@pytest.mark.parametrize("name", ["full_8gpu", "lora_24gb", "oft_libero", "qlora_16gb", "toy"])
def test_examples_are_runs(name):
    pytest.importorskip("yaml")
    file = REPOSITORY / "examples" / f"{name}.yaml"
    config = as_config({"output": "run", **read_yaml(file)}, file)
    assert file.read_text().count(f"examples/{name}.yaml") >= 1  # the command to launch it
    assert (config.parallelism == "fsdp") == (name == "full_8gpu")


@pytest.mark.parametrize("name", ["lerobot_v3", "bridge_orig", "hdf5"])
def test_the_command_trains_on_stored_demonstrations(base, name, tmp_path, capsys, monkeypatch):
    for package in ("av", "h5py", "pyarrow", "yaml"):
        pytest.importorskip(package)
    from openvla.__main__ import main
    from openvla.data.open import open_dataset

    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))
    data = FIXTURES / name
    camera = open_dataset(data).fields.cameras[0]
    fields = {"model": str(base), "method": "full", "batch_size": 2, "max_steps": 3, "log_steps": 1}
    fields["data"] = [{"path": str(data), "fields": {"cameras": [camera]}}]
    (tmp_path / "run.yaml").write_text(json.dumps(fields))  # YAML reads JSON
    command = ["finetune", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--feed-back", "2", "--workers", "1"]
    status = main(command)
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "fed back 2 training steps: l1_loss" in said.out
    assert len(losses(tmp_path / "run")) == 3
    assert load_policy(tmp_path / "run" / "model").unnorm_key


def test_numbers_that_yaml_gives_as_text_are_numbers():
    assert as_config({"model": "m", "output": "o", "learning_rate": "5e-4"}).learning_rate == 5e-4
    with pytest.raises(ValueError, match="learning_rate must be a number, got 'fast'"):
        as_config({"model": "m", "output": "o", "learning_rate": "fast"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"path": "a", "wieght": 2}, r"unknown: \['wieght'\]. Did you mean 'weight'"), ({"weight": 1}, "needs a path")],
)
def test_an_entry_of_data_says_what_data_has(entry, message):
    with pytest.raises(ValueError, match=message):
        Demonstrations(as_config({"model": "m", "output": "o", "data": [entry]}))
