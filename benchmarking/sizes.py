"""Models and inputs for benchmarks: OpenVLA-7B's size, or its depth with widths for a CPU; crops of a real frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import PROMPTS
from ..conversion.hub_folder import write_config_and_code
from ..conversion.safetensors_io import write_shards
from ..default_processor import default_processor
from ..inference.predict import SAMPLE_IMAGE
from ..modeling_openvla import OpenVLAForActionPrediction
from ..tiny import PADDED_ROWS, build_config, build_tiny, build_tokenizer, seeded_weight

INSTRUCTIONS = ("pick up the alphabet soup", "open the drawer", "put the bowl on the plate", "close the microwave")
CROP = 192  # pixels
LLAMA_2_TOKENS = 32000
SHARD_BYTES = 5 * 10**9
SIZES = ("tiny", "tiny-deep", "eighth", "full")


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

    "tiny" is that of ``openvla.tiny``; "eighth" has full depth at 1/8 of the width; "tiny-deep" has full depth and very
    little arithmetic, so that launch overhead dominates.
    """
    if size == "tiny":
        return {}
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
    # The published code rejects unknown names of language models.
    return {
        "text_config": text_config,
        "timm_model_kwargs": [dict(tower) for tower in widths.towers],
        "llm_backbone_id": "llama2-7b-pure",
    }


def write_model(size: str, folder: Path) -> None:
    """Write a bfloat16 model folder with its processor. The model prefers action tokens, like trained ones."""
    if size == "full":
        write_full(folder, torch.bfloat16)
        return
    model: Any
    model, processor = build_tiny(**overrides(size))
    with torch.no_grad():
        _zero_other_tokens(model.get_output_embeddings().weight, model.action_token_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_full(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write a model of OpenVLA-7B's size, one tensor in memory at a time; return the SHA-256 of every tensor."""
    words = {word for text in (PROMPTS["openvla"].format(instruction=""), *INSTRUCTIONS) for word in text.split()}
    tokenizer = build_tokenizer(LLAMA_2_TOKENS, "<PAD>", sorted(words))  # prompts are about as long as Llama-2's
    config = build_config(
        tokenizer,
        timm_model_kwargs=None,
        llm_backbone_id="llama2-7b-pure",
        text_config={"model_type": "llama", "vocab_size": LLAMA_2_TOKENS + PADDED_ROWS, "pad_token_id": LLAMA_2_TOKENS},
    )
    setattr(config, DTYPE_FIELD, dtype)
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, empty: torch.Tensor) -> torch.Tensor:
        values = seeded_weight(name, empty.shape, generator)
        if name.endswith("lm_head.weight"):
            _zero_other_tokens(values, model.action_token_ids)
        return values

    folder.mkdir()
    digests = write_shards(folder, model.state_dict(), dtype, SHARD_BYTES, weight)
    default_processor(config, tokenizer).save_pretrained(folder)
    write_config_and_code(folder, config)
    return digests


def _zero_other_tokens(head: torch.Tensor, action_token_ids: slice) -> None:
    """Set the LM head's weights of all tokens except the action tokens to 0, in place."""
    head[: action_token_ids.start] = 0
    head[action_token_ids.stop :] = 0


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
