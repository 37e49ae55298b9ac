"""Tiny OpenVLA with random weights, to be trained from scratch on scripted LIBERO demonstrations.

    python examples/tiny_libero.py demos/libero_object_no_noops runs/tiny-base

``train_tiny.py`` does this and everything before and after.

Two vision towers as in OpenVLA, with 49 patches of 32 pixels to suit a CPU, a Llama, and a tokenizer with the prompt
and the words of the demonstrations as tokens: about 20 tokens in place of 100 characters.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor
from openvla.configuration_openvla import PROMPTS
from openvla.data.open import open_dataset
from openvla.default_processor import default_processor
from openvla.tiny import build_config, build_tokenizer, language_config

IMAGE_SIZE, PATCH_SIZE = 224, 32
TOWER_WIDTH, TOWER_DEPTH = 128, 4  # features come from the second-to-last block: three are run
LLM_WIDTH, LLM_DEPTH = 192, 2


def build(instructions: list[str], seed: int) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Build the model, float32, and its processor."""
    before, _ = PROMPTS["openvla"].split(" {instruction}")
    words = {word for text in instructions for word in text.lower().split()}
    tokenizer = build_tokenizer(words=[before, *sorted(words)])
    tower = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": TOWER_WIDTH, "depth": TOWER_DEPTH}
    config = build_config(
        tokenizer,
        timm_model_kwargs=[{**tower, "num_heads": 2}] * 2,
        text_config=language_config(tokenizer, LLM_WIDTH, LLM_DEPTH),
        norm_stats=None,
    )
    torch.manual_seed(seed)
    model = OpenVLAForActionPrediction(config)
    _start(model)
    return model, default_processor(config, tokenizer)


def _start(model: OpenVLAForActionPrediction) -> None:
    """Initialise the weights; LayerScale starts at 1, because a pretrained tower's small values would grow slowly.

    Position embeddings start as sines and cosines, which tell positions apart from the first step (Dosovitskiy et al.
    2021 start from random ones).
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pos_embed"):
                parameter.copy_(_positions(IMAGE_SIZE // PATCH_SIZE, parameter.shape[-1]))
            elif "norm" in name or name.endswith(("bias", "scale_factor")):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(std=0.02)


def _positions(side: int, width: int) -> torch.Tensor:
    """Encode row and column of every patch as waves of 4 to 80 patches: float32 ``(1, side * side, width)``."""
    frequencies = math.pi / 2 * 20 ** -torch.linspace(0, 1, width // 4)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None]


def main() -> int:
    """Write the model; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DIR", help="demonstrations whose instructions it will know")
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reader = open_dataset(args.data, fields={"cameras": ["observation.image"]})
    instructions = sorted({text for episode in reader for text in episode.instructions})
    model, processor = build(instructions, args.seed)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    prompt = processor.prompt(instructions[0])
    length = len(processor.tokenizer(prompt)["input_ids"])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {length} tokens: {prompt!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
