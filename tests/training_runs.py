"""Runs of ``openvla finetune`` on a few steps in memory, and the gradients of a step."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import torch
from openvla.training.checkpointing import checkpoints
from openvla.training.collator import ActionCollator, model_inputs
from openvla.training.config import FinetuneConfig
from openvla.training.finetune import finetune

STATISTICS = {
    "action": {"q01": [-0.5] * 7, "q99": [0.5] * 7, "mask": [True] * 6 + [False]},
    "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
}


@dataclass(frozen=True)
class Sample:
    """A training sample, as the streams of ``openvla.data`` yield it."""

    images: list
    instruction: str
    actions: np.ndarray
    proprio: np.ndarray | None
    dataset: str
    is_padding: np.ndarray | None = None


class InMemoryData:
    """A few steps of demonstrations in memory: noise images, each with its own action.

    Args:
        count: Number of steps.
        chunk: Actions of each.
        images: Images of each; None: two for a chunk, else one.
    """

    def __init__(self, count=4, chunk=1, images=None):
        random = np.random.RandomState(0)
        images = images or (2 if chunk > 1 else 1)
        self.statistics, self.readers = {"lab": STATISTICS}, ()
        self.steps = [
            Sample(
                images=list(random.randint(0, 256, (images, 64, 64, 3), dtype=np.uint8)),
                instruction=("open the drawer", "close it")[index % 2],
                actions=random.uniform(-0.5, 0.5, (chunk, 7)),
                proprio=random.uniform(-1, 1, 8),
                dataset="lab",
                is_padding=np.zeros(chunk, bool),
            )
            for index in range(count)
        ]

    def stream(self, chunk_length, rank=0, world_size=1, position=None, history_length=1):
        skipped = position.batches // world_size * position.batch_size if position else 0
        return ShuffledSteps(self.steps, rank, world_size, skipped)


class ShuffledSteps(torch.utils.data.IterableDataset):
    """An endless stream of shuffled steps, dealt to the processes one by one, after a number of skipped ones."""

    def __init__(self, steps, rank, world_size, skipped):
        self.steps, self.rank, self.world_size, self.skipped = steps, rank, world_size, skipped

    def __iter__(self):
        random, drawn = np.random.RandomState(0), 0
        while True:
            for index in random.permutation(len(self.steps)):
                if drawn % self.world_size == self.rank and drawn // self.world_size >= self.skipped:
                    yield self.steps[index]
                drawn += 1


def settings(base, output_dir, **changes):
    values = {
        "model": str(base),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "augment": False,
        "num_train_eval_samples": 4,
        "use_cpu": True,
    }
    return FinetuneConfig(**{**values, **changes})


def run_interrupted_and_whole(base, folder, data, **changes):
    """Train in folder/whole, and in folder/interrupted, which loses its last checkpoint and continues."""
    for run in ("whole", "interrupted"):
        finetune(settings(base, folder / run, **changes), data)
    shutil.rmtree(checkpoints(folder / "interrupted")[-1])
    (folder / "interrupted/metrics.jsonl").unlink()
    finetune(settings(base, folder / "interrupted", **changes), data)


def losses(output_dir):
    return [json.loads(line)["train_loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def step_gradients(model, processor, storages=None):
    """Return the gradients of a step on two samples by name, and its loss.

    Args:
        model: The model, whose statistics this sets.
        processor: Its processor.
        storages: Receives the bytes of each storage that autograd saves, without those of parameters.
    """
    batch = ActionCollator(processor, with_statistics(model))(InMemoryData().steps[:2])
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        address = tensor.untyped_storage().data_ptr()
        if storages is not None and address not in parameters:
            storages[address] = tensor.untyped_storage().nbytes()
        return tensor

    model.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**model_inputs(batch, model), logits_at_labels=True).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


def with_statistics(model):
    model.add_norm_stats("lab", STATISTICS)
    return model


def launch(script, processes, *arguments):
    """Run a script in several processes, which communicate over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), *map(str, arguments)], check=True, env=environment, timeout=300)
