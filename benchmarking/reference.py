"""The published remote code as a worker process of ``openvla bench``, in a Python environment of its own.

Run by path with that environment's Python, so it imports nothing of this package. Reads one JSON request per line,
``[stage, index of the input]``, and prints one JSON result per line. The remote code is given by the caller: the folder
of ``modeling_prismatic.py``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

ACTION = "action from image"
PIXELS = "action from pixels"
FIRST_TOKEN = "first token from pixels"
TOWERS = "vision towers"
BATCH_SIZE = 8
BATCH = f"{BATCH_SIZE} actions from pixels"
FRAME_SIZES = ((224, 224), (640, 480), (1280, 720))  # width, height in pixels


def import_reference(code: Path) -> list[ModuleType]:
    """Import the reference's modules of the model, its configuration and its processor."""
    code = code.resolve()
    sys.path.insert(0, str(code.parent))
    return [
        importlib.import_module(f"{code.name}.{part}_prismatic") for part in ("modeling", "configuration", "processing")
    ]


def load_reference(code: Path, folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """Load the reference's model and image processor from a folder that this package saved, as its README does.

    Args:
        code: Folder of the remote code.
        folder: Model folder.
        dtype: Name of the model's dtype.
        device: Device of the model.
    """
    import timm

    modeling, configuration, processing = import_reference(code)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower_kwargs = dict(zip(config["timm_model_ids"], config.get("timm_model_kwargs") or itertools.repeat({})))
    create_model = timm.create_model  # the reference has no field for towers of another width than their id says
    timm.create_model = lambda name, **kwargs: create_model(name, **kwargs, **tower_kwargs[name])
    model = modeling.OpenVLAForActionPrediction.from_pretrained(
        folder,
        config=configuration.OpenVLAConfig.from_pretrained(folder),
        torch_dtype=getattr(torch, dtype),
        low_cpu_mem_usage=True,
    )
    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return model.to(device).eval(), processing.PrismaticImageProcessor(**fields)


def batch_indices(index: int, num_inputs: int) -> list[int]:
    """Return the indices of the batch that begins with an input."""
    return [(index + offset) % num_inputs for offset in range(BATCH_SIZE)]


def measure_call(function: Callable[[int], Any], index: int, device: str) -> dict[str, Any]:
    """Call a function with the index of an input and measure it.

    Returns:
        ``result`` (an array's SHA-256), wall time ``seconds``, ``cpu_seconds``, and on a GPU the peak memory
        ``gpu_bytes``.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started, cpu_started = time.perf_counter(), time.process_time()
    result = function(index)
    if on_gpu:
        torch.cuda.synchronize()
    measured = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    if on_gpu:
        measured["gpu_bytes"] = torch.cuda.max_memory_allocated()
    if isinstance(result, np.ndarray):  # to be compared, not sent
        result = hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()
    return {"result": result, **measured}


def preprocessing_stages(processor: Any) -> dict[str, Callable[[int], np.ndarray]]:
    """Return a stage for each of ``FRAME_SIZES`` that preprocesses a noise image of that size."""
    random = np.random.RandomState(0)

    def preprocess(frame: Image.Image, _: int) -> np.ndarray:
        return processor(frame, return_tensors="pt")["pixel_values"].numpy()

    return {
        f"preprocessing {width} x {height}": functools.partial(
            preprocess, Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        )
        for width, height in FRAME_SIZES
    }


def reference_stages(model: Any, processor: Any, inputs: Any, device: str) -> dict[str, Callable[[int], Any]]:
    """Return the stages of the benchmark, each a function of the index of an input.

    ``predict_action`` appends Llama-2's id of the empty token, 29871; these prompts already end in the id of their own
    tokenizer, so ``generate``, which it calls, is measured.

    Args:
        model: The reference's model.
        processor: The reference's image processor.
        inputs: ``.npz`` of ``openvla bench``: images, and token ids of every prompt.
        device: Device of the model.
    """
    action_dim = model.get_action_dim()

    def preprocess(image: np.ndarray) -> torch.Tensor:
        return processor(Image.fromarray(image), return_tensors="pt")["pixel_values"].to(device, model.dtype)

    pixels = [preprocess(image) for image in inputs["images"]]

    @torch.no_grad()
    def generate(index: int, pixel_values: torch.Tensor, num_tokens: int = action_dim) -> list[int]:
        ids = torch.from_numpy(inputs[f"ids_{index}"])[None].to(device)
        tokens = model.generate(
            ids,
            max_new_tokens=num_tokens,
            do_sample=False,
            pixel_values=pixel_values,
            attention_mask=torch.ones_like(ids),
        )
        return tokens[0, -num_tokens:].tolist()

    @torch.no_grad()
    def towers(index: int) -> np.ndarray:
        return model.vision_backbone(pixels[index]).float().cpu().numpy()

    return {
        ACTION: lambda index: generate(index, preprocess(inputs["images"][index])),
        PIXELS: lambda index: generate(index, pixels[index]),
        FIRST_TOKEN: lambda index: generate(index, pixels[index], 1),
        TOWERS: towers,
        # The reference does not support batches.
        BATCH: lambda index: [generate(other, pixels[other]) for other in batch_indices(index, len(pixels))],
        **preprocessing_stages(processor),
    }


def main() -> None:
    """Load the model, then measure a stage per line of stdin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("code", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("inputs", type=Path, help=".npz with input_ids of every prompt and its image")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_reference(args.code, args.folder, args.dtype, args.device)
    stages = reference_stages(model, processor, np.load(args.inputs), args.device)
    versions = {name: sys.modules[name].__version__ for name in ("transformers", "timm", "torch")}
    print("READY " + json.dumps(versions), flush=True)
    for line in sys.stdin:
        stage, index = json.loads(line)
        print("DONE " + json.dumps(measure_call(stages[stage], index, args.device)), flush=True)


if __name__ == "__main__":
    main()
