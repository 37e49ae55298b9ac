"""Train with Ray Train on batches that Ray Data makes; a killed worker is started again from the last checkpoint.

    pip install "ray[data,train]"
    python examples/toy.py
    python examples/ray_train.py toy/data toy/base out --train-workers 2

Ray Data's actors read, augment and collate, on whichever machine has free cores; each training process asks for its
batches by number. So the batches are those of one process (examples/stateful_loader.py), whatever the numbers of
workers and actors.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import ray
import ray.train.torch
import torch
from openvla.data.batches import BatchStream
from openvla.data.open import open_dataset
from openvla.data.stream import StepStream
from stateful_loader import Record, load_model


class BatchMaker:
    """Actor of Ray Data: makes batches from their numbers."""

    def __init__(self, options: dict) -> None:
        reader = open_dataset(options["data"])
        _, self.collator = load_model(options["model"], reader)
        stream = StepStream(reader, seed=7)
        self.batches = BatchStream(stream, options["batch_size"], num_shards=options["num_shards"])

    def __call__(self, row: dict) -> dict[str, np.ndarray]:
        """Return a batch's tensors and number."""
        number, tensors = self.collator(self.batches[int(row["id"])])
        return {"number": number, **{name: tensor.numpy() for name, tensor in tensors.items()}}


def batches_of(numbers: range, options: dict) -> ray.data.Dataset:
    """Return a dataset of the batches of some numbers, in their order."""
    # Blocks of few batches, so that training need not wait for many.
    rows = ray.data.from_items([{"id": number} for number in numbers], override_num_blocks=max(1, len(numbers) // 2))
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    strategy = ray.data.ActorPoolStrategy(size=options["actors"])
    return rows.map(BatchMaker, fn_constructor_args=(options,), compute=strategy)


def train(options: dict) -> None:
    """Train in one process of Ray Train, from the last checkpoint on if there is one."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    model, _ = load_model(options["model"], open_dataset(options["data"]))
    optimizer, done = torch.optim.AdamW(model.parameters(), lr=1e-3), 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
        done = saved["batches"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    model = ray.train.torch.prepare_model(model)
    record = Record(Path(options["output"]) / f"batches-{rank}.jsonl", done)
    total = options["batches"] // world_size * world_size
    rows = batches_of(range(done + rank, total, world_size), options)
    for step, row in enumerate(rows.iter_rows(), start=1):
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in row.items() if name != "number"}
        loss = model(**tensors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record.add(int(row["number"]), tensors)
        done += world_size
        if step % options["save_steps"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if rank == 0:
                    weights = getattr(model, "module", model).state_dict()
                    content = {"batches": done, "model": weights, "optimizer": optimizer.state_dict()}
                    torch.save(content, os.path.join(folder, "checkpoint.pt"))
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"batches": done, "loss": float(loss)}, checkpoint=checkpoint)


def main() -> None:
    """Start Ray and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--batches", type=int, default=24, help="of all processes together")
    parser.add_argument("--batch-size", type=int, default=4, help="samples per batch")
    parser.add_argument("--num-shards", type=int, default=4, help="must stay the same when a run continues")
    parser.add_argument("--train-workers", type=int, default=2)
    parser.add_argument("--actors", type=int, default=1, help="Ray Data's, of each training process")
    parser.add_argument("--save-steps", type=int, default=2)
    args = parser.parse_args()
    options = {**vars(args), **{name: os.path.abspath(getattr(args, name)) for name in ("data", "model", "output")}}
    # Logical cores: one for each process; Ray waits for ever if there are fewer.
    ray.init(num_cpus=args.train_workers * (1 + args.actors) + 2, object_store_memory=500_000_000)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=options,
        scaling_config=ray.train.ScalingConfig(num_workers=args.train_workers, use_gpu=False),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=options["output"], failure_config=ray.train.FailureConfig(max_failures=2)
        ),
    )
    print(trainer.fit().metrics)


if __name__ == "__main__":
    main()
