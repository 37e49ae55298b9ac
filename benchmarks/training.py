"""Samples per second and peak memory of a LoRA step, compared with the published code's on the same weights.

    python benchmarks/training.py --reference DIR --reference-python PY                            # a CPU, 1/8 width
    python benchmarks/training.py --device cuda --size full --batch 8 16 --reference DIR --reference-python PY

DIR is a folder with the published remote code (configuration_prismatic.py, modeling_prismatic.py), PY a Python in whose
environment it runs (transformers 4.40.1, timm 0.9, peft 0.11.1); without them only this package is measured. The model
has OpenVLA-7B's depth at an eighth of its width, or its size. Each process builds the same weights on its device. Rank
32 on all linear layers, AdamW; float32 on a CPU, bfloat16 on a GPU, under autocast as published. The processes
alternate on a CPU and follow each other on a GPU, whose memory holds one of them; medians are reported. With one CPU
thread the time is that of the processor, which other work on the machine changes little. Memory is the device's peak,
on a CPU the peak resident memory in training (VmHWM, reset after building). The losses of all steps are compared: the
sides train the same adapters on the same batch. The loader alone prepares samples of noise frames, with augmentation,
in --workers processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from openvla.adapters.targets import lora_targets
from openvla.benchmarking.sizes import action_token_range, build_configuration
from openvla.benchmarking.worker_process import WorkerProcess
from openvla.data.augmentation import ImageAugmentation
from openvla.data.episodes import Step
from openvla.default_processor import default_processor
from openvla.modeling_openvla import OpenVLAForActionPrediction
from openvla.training.collator import ActionCollator
from openvla.training.finetune import LENGTH_MULTIPLE
from torch.utils.data import DataLoader, IterableDataset

# plain: compile: none; the others compile: layers, by itself or with one more field: the policy of gradient
# checkpointing, adapter_dtype: bf16, or gradient_checkpointing: true (full layers).
SIDES = ("plain", "compiled", "selective", "bf16", "checkpointing")
WARM = 2
WORKER = Path(__file__).with_name("training_worker.py")
INSTRUCTIONS = ("pick up the red block", "open the middle drawer of the cabinet")
LOADED_BATCHES = 20


class NoiseSteps(IterableDataset):
    """An endless stream of steps with noise frames."""

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Step]:
        random = np.random.RandomState(0)
        for index in itertools.count():
            yield Step(
                images=(random.randint(0, 256, (224, 224, 3), dtype=np.uint8),),
                instruction=INSTRUCTIONS[index % 2],
                actions=random.uniform(-1, 1, (1, 7)),
                is_padding=np.zeros(1, dtype=bool),
                proprio=None,
                dataset=self.dataset,
                episode_id=str(index),
                index=0,
            )


def write_inputs(folder: Path, size: str, batch: int, workers: int) -> float:
    """Write the configuration, what is adapted and a batch of noise; return the samples per second of the loader."""
    config, tokenizer = build_configuration(size, llm_backbone_id="llama2-7b-pure")  # the published code knows it
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    processor = default_processor(config, tokenizer)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    about = {"targets": lora_targets(model, "all-linear"), "action_tokens": action_token_range(model)}
    (folder / "about.json").write_text(json.dumps(about))
    steps = NoiseSteps(next(iter(model.norm_stats)))
    for name, multiple in (("reference", 1), ("ours", LENGTH_MULTIPLE)):
        collator = ActionCollator(processor, model, pad_to_multiple_of=multiple)
        torch.save(collator(list(itertools.islice(steps, batch))), folder / f"{name}.pt")
    augmenting = ActionCollator(processor, model, ImageAugmentation(), pad_to_multiple_of=LENGTH_MULTIPLE)
    batches = iter(DataLoader(steps, batch, collate_fn=augmenting, num_workers=workers))
    for _ in range(2 * workers + 1):  # those that were prepared while the workers started
        next(batches)
    start = time.perf_counter()
    for _ in range(LOADED_BATCHES):
        next(batches)
    return LOADED_BATCHES * batch / (time.perf_counter() - start)


def side(name: str, folder: Path, args: argparse.Namespace, **environment: str) -> WorkerProcess:
    """Start a process that takes a training step on request."""
    python = args.reference_python if name == "reference" else sys.executable
    command = [python, WORKER, name, folder, args.size, args.device, args.threads]
    command += ["--code", args.reference] if name == "reference" else []
    return WorkerProcess(command, {**os.environ, "OMP_NUM_THREADS": str(args.threads), **environment})


def peak(name: str, folder: Path, args: argparse.Namespace) -> int:
    """Return the peak resident bytes of two steps on a CPU, in a process of its own."""
    worker = side(name, folder, args, MALLOC_MMAP_THRESHOLD_=str(2**16))
    worker.request()
    last = worker.request()
    worker.stop()
    return last["peak"]


def measure(names: list[str], folder: Path, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Return the steps of every side: in alternation on a CPU, one side after the other on a GPU."""
    steps: dict[str, list[dict]] = {name: [] for name in names}
    for group in [names] if args.device == "cpu" else [[name] for name in names]:
        workers = {name: side(name, folder, args) for name in group}
        for _ in range(WARM + args.rounds):
            for name, worker in workers.items():
                steps[name].append(worker.request())
        for worker in workers.values():
            worker.stop()
    return steps


def compare(folder: Path, batch: int, args: argparse.Namespace) -> None:
    """Print a line for each side."""
    names = [*(["reference"] if args.reference else []), *args.sides]
    steps = measure(names, folder, args)
    peaks = {name: peak(name, folder, args) if args.device == "cpu" else steps[name][-1]["peak"] for name in names}
    first, losses = names[0], {name: [step["loss"] for step in steps[name]] for name in names}
    seconds = {name: float(np.median([step["seconds"] for step in steps[name][WARM:]])) for name in names}
    print("| step | s | samples/s | ratio | peak MB | ratio | trained | first step s | largest difference of losses |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        off = max(abs(a - b) for a, b in zip(losses[name], losses[first]))
        row = [name, f"{seconds[name]:.3f}", f"{batch / seconds[name]:.2f}", f"{seconds[first] / seconds[name]:.2f}x"]
        row += [f"{peaks[name] / 1e6:.0f}", f"{peaks[name] / peaks[first]:.2f}x"]
        row += [f"{steps[name][0]['trained'] / 1e6:.2f} M"]
        print("| " + " | ".join([*row, f"{steps[name][0]['seconds']:.1f}", f"{off:.1e}"]) + " |", flush=True)
    print(f"losses of {first}: {', '.join(f'{loss:.4f}' for loss in losses[first])}\n", flush=True)


def main() -> None:
    """Measure with each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of the published remote code")
    parser.add_argument("--reference-python", default=sys.executable)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("tiny", "eighth", "full"), default="eighth")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default all, bf16 on a GPU only")
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="processes of the loader")
    args = parser.parse_args()
    args.sides = args.sides or [name for name in SIDES if name != "bf16" or args.device == "cuda"]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    for batch in args.batch:
        print(f"torch {torch.__version__}, {device}, {args.size} size, batch {batch}\n")
        with tempfile.TemporaryDirectory() as folder:
            rate = write_inputs(Path(folder), args.size, batch, args.workers)
            compare(Path(folder), batch, args)
        print(f"the loader alone, {args.workers} workers: {rate:.1f} samples/s\n", flush=True)


if __name__ == "__main__":
    main()
