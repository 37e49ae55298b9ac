"""Samples per second and peak memory of a LoRA step, compared with the reference's code on the same weights.

    python benchmarks/training.py --reference DIR --reference-python PY [--batch 4] [--rounds 5]

DIR is a folder with the published remote code (configuration_prismatic.py, modeling_prismatic.py), PY a Python in whose
environment it runs (transformers 4.40.1, timm 0.9, peft 0.11.1); without them only this package is measured. The model
has OpenVLA-7B's depth at an eighth of its width; --vocabulary 32000 gives it Llama-2's head too, whose share of the
work is then eight times that in OpenVLA-7B. Float32, rank 32 on all linear layers, AdamW. Each side runs in its own
process; they alternate, and medians are reported. Memory is the peak resident memory in training (VmHWM, reset after
loading), interpreter and libraries included, reported with the memory before the first step. The losses of all steps
are compared: the sides train the same adapters on the same batch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from openvla import OpenVLAForActionPrediction
from openvla.adapters.targets import lora_targets
from openvla.benchmarking.sizes import overrides
from openvla.benchmarking.worker_process import WorkerProcess
from openvla.data.episodes import Step
from openvla.default_processor import default_processor
from openvla.tiny import UNTRAINED_KEY, build_config, build_model, build_tokenizer
from openvla.training.collator import ActionCollator

WARM = 1
WORKER = Path(__file__).with_name("training_worker.py")
INSTRUCTIONS = ("pick up the red block", "open the middle drawer of the cabinet")


def write_sides(folder: Path, size: str, vocabulary: int, batch: int) -> None:
    """Write the base with seeded weights in the published layout, and a batch of noise."""
    tokenizer = build_tokenizer(vocabulary)
    fields = overrides(size)
    if fields and vocabulary:
        fields["text_config"]["vocab_size"] = tokenizer.pad_token_id + 64
    fields |= {"llm_backbone_id": "llama2-7b-pure"}
    model = build_model(build_config(tokenizer, **fields))
    processor = default_processor(model.config, tokenizer)
    model.save_pretrained(folder / "base")
    (folder / "targets.json").write_text(json.dumps(lora_targets(model, "all-linear")))
    random = np.random.RandomState(0)
    steps = [
        Step(
            images=(random.randint(0, 256, (224, 224, 3), dtype=np.uint8),),
            instruction=INSTRUCTIONS[index % 2],
            actions=random.uniform(-1, 1, (1, 7)),
            is_padding=np.zeros(1, dtype=bool),
            proprio=None,
            dataset=UNTRAINED_KEY,
            episode_id=str(index),
            index=0,
        )
        for index in range(batch)
    ]
    torch.save(ActionCollator(processor, model)(steps), folder / "batch.pt")


def side(name: str, folder: Path, args: argparse.Namespace, **environment: str) -> WorkerProcess:
    """Start a process that takes a training step on request."""
    python = args.reference_python if name == "reference" else sys.executable
    command = [python, WORKER, name, folder, args.threads]
    command += ["--code", args.reference] if name == "reference" else []
    return WorkerProcess(command, {**os.environ, "OMP_NUM_THREADS": str(args.threads), **environment})


def peak(name: str, folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Return the peak resident bytes of two steps, and the bytes before them."""
    worker = side(name, folder, args, MALLOC_MMAP_THRESHOLD_=str(2**16))
    worker.request()
    last = worker.request()
    worker.stop()
    return last["peak"], worker.info["before"]


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Alternate between the sides, and print a line for each."""
    names = [*(["reference"] if args.reference else []), "ours", "checkpointing"]
    sides = {name: side(name, folder, args) for name in names}
    steps: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(WARM + args.rounds):
        for name, worker in sides.items():
            steps[name].append(worker.request())
    for worker in sides.values():
        worker.stop()
    memory = {name: peak(name, folder, args) for name in names}
    first = steps[names[0]]
    rate = args.batch / np.median([step["seconds"] for step in first[WARM:]])
    print("| step | s | samples/s | ratio | peak MB | ratio | before MB | trained | largest difference of losses |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, worker in sides.items():
        seconds = float(np.median([step["seconds"] for step in steps[name][WARM:]]))
        most, before = memory[name]
        off = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps[name], first))
        row = [name, f"{seconds:.2f}", f"{args.batch / seconds:.3f}", f"{args.batch / seconds / rate:.2f}x"]
        row += [f"{most / 1e6:.0f}", f"{most / memory[names[0]][0]:.2f}x", f"{before / 1e6:.0f}"]
        row += [f"{worker.info['trained'] / 1e6:.2f} M", f"{off:.1e}"]
        print("| " + " | ".join(row) + " |", flush=True)
    losses = [step["loss"] for step in first]
    print(f"losses of {names[0]}: {', '.join(f'{loss:.4f}' for loss in losses)}\n", flush=True)


def main() -> None:
    """Measure with each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of the published remote code")
    parser.add_argument("--reference-python", default=sys.executable)
    parser.add_argument("--size", choices=("tiny", "eighth"), default="eighth")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[0], help="0: no larger than needed (675)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} CPU threads, float32, {args.size} size, batch {args.batch}\n")
    for vocabulary in args.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            write_sides(Path(folder), args.size, vocabulary, args.batch)
            print(f"vocabulary {OpenVLAForActionPrediction.config_class.from_pretrained(f'{folder}/base').vocab_size}")
            compare(Path(folder), args)


if __name__ == "__main__":
    main()
