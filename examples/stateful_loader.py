"""Train in your own loop, on one process or many, with torchdata's StatefulDataLoader; kill it and start it again.

    pip install torchdata
    python examples/toy.py
    torchrun --nproc-per-node 2 examples/stateful_loader.py toy/data toy/base out
    accelerate launch --num_processes 2 examples/stateful_loader.py toy/data toy/base out      # the same

Every process writes the batches that it trained on to out/batches-RANK.jsonl. The batches of all processes together are
those of one process. The same command continues after a kill; another number of processes may continue as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.adapters.targets import unused_modules
from openvla.data.batches import BatchStream, StepBatch
from openvla.data.episodes import EpisodeReader
from openvla.data.open import open_dataset
from openvla.data.statistics import compute_statistics
from openvla.data.stream import StepStream
from openvla.training.collator import ActionCollator
from torchdata.stateful_dataloader import StatefulDataLoader


class Record:
    """File with number and digest of every batch that a process trained on.

    Args:
        path: The file.
        done: Batches of all processes in the checkpoint; what was recorded after it is trained on again.
    """

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["number"] < done]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def add(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Append a batch."""
        digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"number": number, "digest": digest, "process": os.getpid()}) + "\n")


class NumberedCollator(ActionCollator):
    """Collator that also returns the batch's number."""

    def __call__(self, steps: StepBatch) -> tuple[int, dict[str, torch.Tensor]]:
        """Collate one batch."""
        return steps.number, super().__call__(steps)


def load_model(folder: Path, reader: EpisodeReader) -> tuple[OpenVLAForActionPrediction, NumberedCollator]:
    """Load a model with the statistics of the data, and the collator of its batches."""
    model = OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.float32)
    model.add_norm_stats(reader.name, compute_statistics(reader, progress=False))
    for module in unused_modules(model):  # of which DDP would wait for gradients
        module.requires_grad_(False)
    return model, NumberedCollator(OpenVLAProcessor.from_pretrained(folder), model)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batches", type=int, default=24, help="of all processes together")
    parser.add_argument("--batch-size", type=int, default=4, help="samples per batch")
    parser.add_argument("--num-shards", type=int, default=4, help="must stay the same when a run continues")
    parser.add_argument("--workers", type=int, default=1, help="of each process; may change if the run continues")
    parser.add_argument("--save-steps", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Train, from the last checkpoint on if there is one."""
    args = arguments()
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    reader = open_dataset(args.data)
    model, collator = load_model(args.model, reader)
    stream = StepStream(reader, seed=7, rank=rank, world_size=world_size)
    batches = BatchStream(stream, args.batch_size, num_shards=args.num_shards)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    checkpoint, done, state = args.output / "checkpoint.pt", 0, None
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["batches"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if (saved["world_size"], saved["workers"]) == (world_size, args.workers):
            state = saved["loaders"][rank]
        else:  # a loader's state is of as many processes and workers; the position holds for any number
            batches.continue_at(done)
    loader = StatefulDataLoader(batches, batch_size=None, num_workers=args.workers, collate_fn=collator)
    if state is not None:
        loader.load_state_dict(state)
    model, optimizer = accelerator.prepare(model, optimizer)

    record = Record(args.output / f"batches-{rank}.jsonl", done)
    for step, (number, tensors) in enumerate(loader, start=1):
        accelerator.backward(model(**tensors).loss)
        optimizer.step()
        optimizer.zero_grad()
        record.add(number, tensors)
        done += world_size
        if step % args.save_steps == 0:
            save(accelerator, checkpoint, model, optimizer, loader, done, args.workers)
        if done + world_size > args.batches:
            break
    accelerator.print(f"{done} batches")
    accelerator.end_training()


def save(accelerator, checkpoint, model, optimizer, loader, done, workers) -> None:
    """Write model, optimizer and every process's position."""
    loaders: list = [None] * accelerator.num_processes
    loaders[accelerator.process_index] = loader.state_dict()
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(loaders, loader.state_dict())
    if accelerator.is_main_process:
        content = {
            "batches": done,
            "world_size": accelerator.num_processes,
            "workers": workers,
            "loaders": loaders,
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


if __name__ == "__main__":
    main()
