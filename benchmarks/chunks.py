"""Latency of a parallel action chunk and of an autoregressive action with the same weights, and their lower bounds.

    python benchmarks/chunks.py [--size eighth|full] [--dtype float32|bfloat16] [--repeats 20]

"eighth" is OpenVLA-7B's depth at an eighth of its width, "full" its size, built on the GPU with random weights. All
models are timed in turn in one process, and medians are reported. The floor is the time of the pass's floating-point
operations at the speed of one large matrix product, measured in the same run: the lower bound of a compute-bound pass.
The six decode steps of the autoregressive action are memory-bound, so its floor adds six reads of the language model.

Each time comes with a check: the difference between the chunks under sdpa and eager attention, and for tokens the
number of equal ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import transformers
from openvla import PLATFORMS, OpenVLAForActionPrediction
from openvla.benchmarking.reference import measure_call
from openvla.benchmarking.roofline import gemm_rate, read_rate, roofline_seconds
from openvla.benchmarking.sizes import overrides
from openvla.inference.predict import SAMPLE_IMAGE, SAMPLE_INSTRUCTION
from openvla.tiny import UNTRAINED_STATISTICS, build_tiny
from PIL import Image

WARM = 2
FULL = {"text_config": {"model_type": "llama", "vocab_size": 32064}, "timm_model_kwargs": [{}, {}]}
BOUNDS = ("q01", "q99", "min", "max")


def statistics(platform: str) -> dict:
    """Return made-up statistics of a platform."""
    sizes = PLATFORMS[platform]
    entry = {
        part: {name: [(-1.0) ** (i % 2 + 1)] * sizes[f"{part}_dim"] for i, name in enumerate(BOUNDS)}
        for part in ("action", "proprio")
    }
    return {"norm_stats": {platform: entry}}


ROWS = {
    "one action, autoregressive": {"norm_stats": {"untrained": UNTRAINED_STATISTICS}},
    "8 x 7 tokens, 1 image": {
        **PLATFORMS["libero"],
        **statistics("libero"),
        "proprio_dim": None,
        "parallel_decoding": True,
    },
    "8 x 7 L1, 2 images, proprio (LIBERO)": {
        **PLATFORMS["libero"],
        **statistics("libero"),
        "parallel_decoding": True,
        "action_head": "l1",
        "num_images_in_input": 2,
    },
    "25 x 14 L1, 3 images, proprio, FiLM (ALOHA)": {
        **PLATFORMS["aloha"],
        **statistics("aloha"),
        "parallel_decoding": True,
        "action_head": "l1",
        "num_images_in_input": 3,
        "use_film": True,
    },
}


def build(row: str, size: str, device: str, dtype: torch.dtype) -> tuple[OpenVLAForActionPrediction, Callable]:
    """Build a model with the same seeded weights as the others, and its prediction function."""
    with torch.device(device):
        model, processor = build_tiny(**{**(FULL if size == "full" else overrides(size)), **ROWS[row]})
    model = model.to(device=device, dtype=dtype)
    image = Image.open(SAMPLE_IMAGE).convert("RGB")
    inputs = processor(instruction=SAMPLE_INSTRUCTION, images=[image] * model.config.num_images_in_input)
    proprio = None if model.config.proprio_dim is None else np.zeros(model.config.proprio_dim)
    return model, lambda: model.predict_action(**inputs, proprio=proprio, constrain_actions=True, return_dict=True)


def check(model: OpenVLAForActionPrediction, predict: Callable) -> str:
    """Compare the prediction with that under eager attention; return the difference as text."""
    first = predict()
    model.language_model.config._attn_implementation = "eager"
    try:
        second = predict()
    finally:
        model.language_model.config._attn_implementation = "sdpa"
    if first.token_ids is not None:
        return f"{(first.token_ids == second.token_ids).sum()} of {first.token_ids.size} tokens equal"
    return f"actions differ by {np.abs(first.actions - second.actions).max():.1e}"


def main() -> None:
    """Time all models in turn and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("eighth", "full"), default="eighth")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{args.threads} CPU threads"
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {place}, {args.dtype}, {args.size} size\n"
    )
    models = {row: build(row, args.size, args.device, dtype) for row in ROWS}
    seconds = {row: [] for row in ROWS}
    for turn in range(WARM + args.repeats):
        for row, (_, predict) in models.items():
            took = measure_call(lambda _, predict=predict: predict(), 0, args.device)
            if turn >= WARM:
                seconds[row].append(took["seconds"])
    ceilings = gemm_rate(args.device, dtype) / 1e9, read_rate(args.device) / 1e9
    first = float(np.median(seconds[next(iter(ROWS))]))
    print("| chunk | ms | ms an action | faster per action | roofline fraction | check |\n|---|---|---|---|---|---|")
    for row, (model, predict) in models.items():
        median = float(np.median(seconds[row]))
        one = median / model.config.chunk_length
        share = roofline_seconds(model, predict, *ceilings) / median
        figures = f"{1e3 * median:.1f} | {1e3 * one:.1f} | {first / one:.1f}x | {share:.2f}"
        print(f"| {row} | {figures} | {check(model, predict)} |", flush=True)


if __name__ == "__main__":
    main()
