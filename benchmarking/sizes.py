"""Models and inputs for benchmarks: OpenVLA-7B's size, or its depth with widths for a CPU; crops of a real frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import PLATFORMS, PROMPTS, OpenVLAConfig
from ..conversion.hub_folder import write_config_and_code
from ..conversion.safetensors_io import write_shards
from ..default_processor import default_processor
from ..inference.predict import SAMPLE_IMAGE
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from ..tiny import PADDED_ROWS, build_config, build_tokenizer
from .reference import fill_weights, seeded_weight

INSTRUCTIONS = ("pick up the alphabet soup", "open the drawer", "put the bowl on the plate", "close the microwave")
CROP = 192  # pixels
LLAMA_2_TOKENS = 32000
SHARD_BYTES = 5 * 10**9
SIZES = ("tiny", "tiny-deep", "eighth", "full")
BOUNDS = {"q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0}
# OpenVLA-OFT's model for LIBERO: chunks of 8 actions, L1 head, two cameras, proprio.
CHUNK_FIELDS: dict[str, Any] = {
    **PLATFORMS["libero"],
    "parallel_decoding": True,
    "action_head": "l1",
    "num_images_in_input": 2,
    "norm_stats": {
        "untrained": {
            part: {name: [value] * PLATFORMS["libero"][f"{part}_dim"] for name, value in BOUNDS.items()}
            for part in ("action", "proprio")
        }
    },
}


@dataclass(frozen=True)
class Widths:
    """Widths of a model with OpenVLA-7B's depth.

    Attributes:
        hidden_size: Of the language model.
        intermediate_size: Of the language model's MLP.
        num_attention_heads: Of the language model.
        towers: timm's arguments for each vision tower.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    towers: tuple[dict[str, int], ...]


WIDTHS = {
    "tiny-deep": Widths(
        hidden_size=64,
        intermediate_size=172,
        num_attention_heads=4,
        towers=({"embed_dim": 64, "num_heads": 2}, {"embed_dim": 72, "num_heads": 2}),
    ),
    "eighth": Widths(
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=4,
        towers=({"embed_dim": 128, "num_heads": 2}, {"embed_dim": 144, "num_heads": 2}),
    ),
}


def overrides(size: str) -> dict[str, Any]:
    """Return the configuration fields of a size.

    "tiny" is that of ``openvla.tiny``; "full" is OpenVLA-7B's; "eighth" has full depth at 1/8 of the width; "tiny-deep"
    has full depth and very little arithmetic, so that launch overhead dominates.
    """
    if size == "tiny":
        return {}
    # The published code rejects unknown names of language models.
    fields: dict[str, Any] = {"llm_backbone_id": "llama2-7b-pure"}
    if size == "full":
        vocabulary = {"vocab_size": LLAMA_2_TOKENS + PADDED_ROWS, "pad_token_id": LLAMA_2_TOKENS}
        return {**fields, "text_config": {"model_type": "llama", **vocabulary}, "timm_model_kwargs": None}
    widths = WIDTHS[size]
    text_config = {
        "model_type": "llama",
        "vocab_size": build_tokenizer().pad_token_id + PADDED_ROWS,
        "hidden_size": widths.hidden_size,
        "intermediate_size": widths.intermediate_size,
        "num_hidden_layers": 32,
        "num_attention_heads": widths.num_attention_heads,
        "num_key_value_heads": widths.num_attention_heads,
        "rms_norm_eps": 1e-6,
    }
    return {**fields, "text_config": text_config, "timm_model_kwargs": [dict(tower) for tower in widths.towers]}


def build_configuration(size: str, **fields: Any) -> tuple[OpenVLAConfig, PreTrainedTokenizerFast]:
    """Return the configuration of a size and its tokenizer; ``fields`` replace fields of the configuration."""
    tokenizer = build_tokenizer()
    if size == "full":  # prompts are about as long as Llama-2's
        words = {word for text in (PROMPTS["openvla"].format(instruction=""), *INSTRUCTIONS) for word in text.split()}
        tokenizer = build_tokenizer(LLAMA_2_TOKENS, "<PAD>", sorted(words))
    return build_config(tokenizer, **{**overrides(size), **fields}), tokenizer


def build_model(
    size: str, device: str, dtype: torch.dtype, **fields: Any
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Build a model of a size with seeded weights on its device, in eval mode, and its processor.

    Nothing is written, and the weights are those that ``reference.build_reference`` makes.

    Args:
        size: One of ``SIZES``.
        device: Device of the model.
        dtype: dtype of the model; the weights are rounded to bfloat16 in each.
        **fields: Fields of the configuration.
    """
    config, tokenizer = build_configuration(size, **fields)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = OpenVLAForActionPrediction(config)
    finally:
        torch.set_default_dtype(torch.float32)
    fill_weights(model, dtype, action_token_range(model))
    return model.eval(), default_processor(config, tokenizer)


def write_model(size: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Write a model folder with its processor, one tensor in memory at a time; return the SHA-256 of every tensor."""
    config, tokenizer = build_configuration(size)
    setattr(config, DTYPE_FIELD, dtype)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)

    def weight(name: str, empty: torch.Tensor) -> torch.Tensor:
        return seeded_weight(name, empty.shape, "cpu", action_token_range(model))

    folder.mkdir()
    digests = write_shards(folder, model.state_dict(), dtype, SHARD_BYTES, weight)
    default_processor(config, tokenizer).save_pretrained(folder)
    write_config_and_code(folder, config)
    return digests


def action_token_range(model: OpenVLAForActionPrediction) -> tuple[int, int]:
    """Return the first action token, and the token after the last."""
    return model.action_token_ids.start, model.action_token_ids.stop


def sample_inputs(count: int) -> tuple[list[str], np.ndarray]:
    """Return instructions, and uint8 images ``(count, 192, 192, 3)``: crops of a frame with noise of several levels."""
    frame = np.asarray(Image.open(SAMPLE_IMAGE).convert("RGB")).astype(np.float64)
    random = np.random.RandomState(0)
    images = np.empty((count, CROP, CROP, 3), np.uint8)
    for i in range(count):
        top, left = random.randint(0, 64, 2)
        crop = frame[top : top + CROP, left : left + CROP]
        images[i] = np.clip(crop + random.randn(*crop.shape) * 20 * (i % 4), 0, 255)
    return [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)], images
