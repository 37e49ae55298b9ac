"""The published remote code as a peer of ``openvla bench``: a process of its own, in an environment of its own.

Run by path with that environment's Python, so it imports nothing of this package. Reads one JSON command a line and
answers each with one line. The code itself is whoever benchmarks's: the folder of ``modeling_prismatic.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ACTION = "an action, image in to tokens out"
PIXELS = "an action, pixels in to tokens out"
FIRST_TOKEN = "pixels in to the first token"
TOWERS = "vision towers"
BATCH_SIZE = 8
BATCH = f"{BATCH_SIZE} actions, pixels in to tokens out"
FRAME_SIZES = ((224, 224), (640, 480), (1280, 720))  # width, height in pixels


def imported(code: Path) -> list[Any]:
    """The reference's modules of the model, its configuration and its processor."""
    code = code.resolve()
    sys.path.insert(0, str(code.parent))
    return [
        importlib.import_module(f"{code.name}.{part}_prismatic") for part in ("modeling", "configuration", "processing")
    ]


def load(code: Path, folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """The reference's model and image processor on a folder that this package saved, as its README loads them."""
    import timm

    modeling, configuration, processing = imported(code)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = dict(zip(written["timm_model_ids"], written.get("timm_model_kwargs") or itertools.repeat({})))
    create = timm.create_model  # of another width than the id says; the reference has no field for it
    timm.create_model = lambda name, **options: create(name, **options, **sizes[name])
    keywords = {"config": configuration.OpenVLAConfig.from_pretrained(folder), "torch_dtype": getattr(torch, dtype)}
    keywords["low_cpu_mem_usage"] = True
    model = modeling.OpenVLAForActionPrediction.from_pretrained(folder, **keywords)
    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return model.to(device).eval(), processing.PrismaticImageProcessor(**fields)


def batch_of(index: int, inputs: int) -> list[int]:
    """The inputs that are a batch with one, which is its first."""
    return [(index + later) % inputs for later in range(BATCH_SIZE)]


def timed(work: Callable[[int], Any], index: int, device: str) -> dict[str, Any]:
    """What ``work`` makes of an input (an array's digest), its wall and CPU time in seconds, its most GPU memory."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    started, cpu_started = time.perf_counter(), time.process_time()
    result = work(index)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu_started}
    if device.startswith("cuda"):
        took["GPU bytes"] = torch.cuda.max_memory_allocated()
    if isinstance(result, np.ndarray):  # to be compared, not sent
        result = hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()
    return {"result": result, **took}


def preprocessing(processor: Any) -> dict[str, Callable[[int], np.ndarray]]:
    """What the processor makes of noise in each of ``FRAME_SIZES``, by name of the row."""
    random = np.random.RandomState(0)
    frames = {
        f"preprocessing {width} x {height}": Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in FRAME_SIZES
    }
    return {
        row: lambda _, frame=frame: processor(frame, return_tensors="pt")["pixel_values"].numpy()
        for row, frame in frames.items()
    }


def main() -> None:
    """Load, say so, then an answer a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("code", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs", type=Path, help=".npz with input_ids of every prompt and its image")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.code, args.folder, args.dtype, args.device)
    given = np.load(args.inputs)
    dtype = getattr(torch, args.dtype)
    # predict_action appends Llama-2's id of the empty token, 29871; the prompts end in their own tokenizer's already,
    # so generate, which it wraps, is what is timed.
    steps = model.get_action_dim()

    def seen(image: np.ndarray) -> torch.Tensor:
        return processor(Image.fromarray(image), return_tensors="pt")["pixel_values"].to(args.device, dtype)

    pixels = list(map(seen, given["images"]))

    @torch.no_grad()
    def tokens(index: int, pixel_values: torch.Tensor, count: int = steps) -> list[int]:
        ids = torch.from_numpy(given[f"ids_{index}"])[None].to(args.device)
        asked = {"pixel_values": pixel_values, "attention_mask": torch.ones_like(ids)}
        return model.generate(ids, max_new_tokens=count, do_sample=False, **asked)[0, -count:].tolist()

    @torch.no_grad()
    def towers(index: int) -> np.ndarray:
        return model.vision_backbone(pixels[index]).float().cpu().numpy()

    work = {
        ACTION: lambda index: tokens(index, seen(given["images"][index])),
        PIXELS: lambda index: tokens(index, pixels[index]),
        FIRST_TOKEN: lambda index: tokens(index, pixels[index], 1),
        TOWERS: towers,
        BATCH: lambda index: [tokens(one, pixels[one]) for one in batch_of(index, len(pixels))],  # it takes no batch
        **preprocessing(processor),
    }
    versions = {name: sys.modules[name].__version__ for name in ("transformers", "timm", "torch")}
    print("READY " + json.dumps(versions), flush=True)
    for line in sys.stdin:
        command, argument = json.loads(line)
        print("DONE " + json.dumps(timed(work[command], argument, args.device)), flush=True)


if __name__ == "__main__":
    main()
