"""The published remote code as a worker process of ``openvla bench``, in a Python environment of its own.

Run by path with that environment's Python, so it imports nothing of this package. Reads one JSON request per line,
``[method, stage, index of the input]``, and prints one JSON result per line. The remote code is given by the caller:
the folder of ``modeling_prismatic.py``.

Both sides build the same weights on the device instead of reading 15 GB: every tensor is drawn from a seed made of its
name (``seeded_weight``). The same torch on the same device draws the same bits; ``checksums`` tells whether it did.
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
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

REFERENCE = "published code"  # name of this backend
ACTION = "action from image"
PIXELS = "action from pixels"
FIRST_TOKEN = "first token from pixels"
TOWERS = "vision towers"
BATCHES = {size: f"{size} actions from pixels" for size in (8, 32)}
FRAME_SIZES = ((224, 224), (640, 480), (1280, 720))  # width, height in pixels
PROFILE_ROWS = 20


def seeded_weight(name: str, shape: Sequence[int], device: Any, action_tokens: Sequence[int]) -> torch.Tensor:
    """Return the weight of a parameter: random from a seed made of its name, rounded to bfloat16.

    Weights are large enough that the image changes the action. The LM head prefers action tokens, as trained ones do.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        device: Device that draws it; another device, or another torch, draws other numbers.
        action_tokens: First action token, and the token after the last.
    """
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16, device=device)
    if name.endswith("scale_factor"):
        return torch.full(shape, 0.5, dtype=torch.bfloat16, device=device)
    is_table = name.endswith(("embed_tokens.weight", "_embed", "_token"))
    spread = 1.0 if is_table else 1.5 * float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(shape, generator=generator, device=device).mul_(spread).to(torch.bfloat16)
    if name.endswith("lm_head.weight"):
        weight[: action_tokens[0]] = 0
        weight[action_tokens[1] :] = 0
    return weight


def fill_weights(model: nn.Module, dtype: torch.dtype, action_tokens: Sequence[int]) -> None:
    """Replace every parameter of a model by its seeded weight, on the parameter's device."""
    for name, parameter in model.named_parameters():
        parameter.data = seeded_weight(name, parameter.shape, parameter.device, action_tokens).to(dtype)


def checksums(model: nn.Module) -> dict[str, int]:
    """Return for every parameter the sum of its bits as integers, which does not depend on the order of summation."""
    integers = {2: torch.int16, 4: torch.int32}
    return {
        name: int(parameter.data.reshape(-1).view(integers[parameter.element_size()]).sum(dtype=torch.int64))
        for name, parameter in model.named_parameters()
    }


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
    modeling, configuration, processing = import_reference(code)
    _set_tower_widths(folder)
    model = modeling.OpenVLAForActionPrediction.from_pretrained(
        folder,
        config=configuration.OpenVLAConfig.from_pretrained(folder),
        torch_dtype=getattr(torch, dtype),
        low_cpu_mem_usage=True,
    )
    return model.to(device).eval(), _image_processor(processing, folder)


def build_reference(code: Path, folder: Path, dtype: str, device: str, action_tokens: Sequence[int]) -> tuple[Any, Any]:
    """Build the reference's model with seeded weights on its device, and its image processor.

    Args:
        code: Folder of the remote code.
        folder: Folder with the model's config.json and preprocessor_config.json; no weights are read.
        dtype: Name of the model's dtype.
        device: Device of the model.
        action_tokens: First action token, and the token after the last.
    """
    modeling, configuration, processing = import_reference(code)
    _set_tower_widths(folder)
    # from_pretrained chooses sdpa by itself, a constructor does not.
    config = configuration.OpenVLAConfig.from_pretrained(folder, attn_implementation="sdpa")
    torch.set_default_dtype(getattr(torch, dtype))  # as from_pretrained does while it builds the modules
    try:
        with torch.device(device):
            model = modeling.OpenVLAForActionPrediction(config)
    finally:
        torch.set_default_dtype(torch.float32)
    fill_weights(model, getattr(torch, dtype), action_tokens)
    return model.eval(), _image_processor(processing, folder)


def _set_tower_widths(folder: Path) -> None:
    """Let timm build towers of the widths in config.json; the reference has no field for them."""
    import timm

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tower_kwargs = dict(zip(config["timm_model_ids"], config.get("timm_model_kwargs") or itertools.repeat({})))
    create_model = timm.create_model
    timm.create_model = lambda name, **kwargs: create_model(name, **kwargs, **tower_kwargs[name])


def _image_processor(processing: ModuleType, folder: Path) -> Any:
    fields = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return processing.PrismaticImageProcessor(**fields)


def batch_indices(index: int, num_inputs: int, size: int) -> list[int]:
    """Return the indices of the batch that begins with an input."""
    return [(index + offset) % num_inputs for offset in range(size)]


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


def profile_call(function: Callable[[int], Any], index: int, device: str) -> list[dict[str, Any]]:
    """Return the kernels (on a CPU: the operators) of one call by time, the longest first.

    Returns:
        ``name``, ``calls``, ``ms`` and ``share`` of the time of all, of the first ``PROFILE_ROWS``.
    """
    activities = torch.profiler.ProfilerActivity
    on_gpu = device.startswith("cuda")
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profiler:
        function(index)
        if on_gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1.0
    return [
        {
            "name": event.key,
            "calls": event.count,
            "ms": getattr(event, field) / 1e3,
            "share": getattr(event, field) / total,
        }
        for event in events[:PROFILE_ROWS]
    ]


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

    def batch(size: int, index: int) -> list[list[int]]:  # one after the other: the reference does not support batches
        return [generate(other, pixels[other]) for other in batch_indices(index, len(pixels), size)]

    return {
        ACTION: lambda index: generate(index, preprocess(inputs["images"][index])),
        PIXELS: lambda index: generate(index, pixels[index]),
        FIRST_TOKEN: lambda index: generate(index, pixels[index], 1),
        TOWERS: towers,
        **{stage: functools.partial(batch, size) for size, stage in BATCHES.items()},
        **preprocessing_stages(processor),
    }


def main() -> None:
    """Build the model, then measure or profile a stage per line of stdin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("code", type=Path)
    parser.add_argument("folder", type=Path, help="config.json and preprocessor_config.json")
    parser.add_argument("inputs", type=Path, help=".npz: ids of every prompt, images, action_tokens")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs = dict(np.load(args.inputs))
    action_tokens = inputs["action_tokens"].tolist()
    model, processor = build_reference(args.code, args.folder, args.dtype, args.device, action_tokens)
    stages = reference_stages(model, processor, inputs, args.device)
    versions = {name: sys.modules[name].__version__ for name in ("transformers", "timm", "torch")}
    print("READY " + json.dumps({"versions": versions, "checksums": checksums(model)}), flush=True)
    methods = {"measure": measure_call, "profile": profile_call}
    for line in sys.stdin:
        method, stage, index = json.loads(line)
        print("DONE " + json.dumps(methods[method](stages[stage], index, args.device)), flush=True)


if __name__ == "__main__":
    main()
