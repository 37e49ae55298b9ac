"""What benchmarks run on: OpenVLA-7B's size, or its depth at widths that a CPU bears; crops of a real frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import PROMPTS
from ..conversion.hub_folder import write_config_and_code
from ..conversion.safetensors_io import write_shards
from ..inference.predict import SAMPLE_IMAGE
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from ..tiny import PADDED_ROWS, build_config, build_tiny, build_tokenizer, seeded_weight

INSTRUCTIONS = ("pick up the alphabet soup", "open the drawer", "put the bowl on the plate", "close the microwave")
CROP = 192  # pixels
LLAMA_2_TOKENS = 32000
SHARD_BYTES = 5 * 10**9
SIZES = ("tiny", "tiny-deep", "eighth", "full")
# (language model's width, its MLP's, attention heads), the towers' widths and heads
WIDTHS = {"tiny-deep": ((64, 172, 4), ((64, 2), (72, 2))), "eighth": ((512, 1376, 4), ((128, 2), (144, 2)))}


def overrides(size: str) -> dict[str, Any]:
    """Fields of the configuration of a size.

    "tiny" is that of ``openvla.tiny``; "eighth" has full depth at 1/8 of the width; "tiny-deep" has full depth and next
    to no arithmetic, so that what is left is the host's work.
    """
    if size == "tiny":
        return {}
    (hidden, intermediate, heads), towers = WIDTHS[size]
    vocabulary = build_tokenizer().pad_token_id + PADDED_ROWS
    text = {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
    text |= {"num_hidden_layers": 32, "num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-6}
    towers = [{"embed_dim": dim, "num_heads": heads} for dim, heads in towers]
    # The published code takes no name of a language model but those it knows.
    return {"text_config": text, "timm_model_kwargs": towers, "llm_backbone_id": "llama2-7b-pure"}


def write_model(size: str, folder: Path) -> None:
    """A bfloat16 folder with its processor. The model prefers action tokens, as trained ones do."""
    if size == "full":
        write_full(folder, torch.bfloat16)
        return
    model, processor = build_tiny(**overrides(size))
    with torch.no_grad():
        _prefer_actions(model.get_output_embeddings().weight, model.action_token_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_full(folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """As ``write_model`` at OpenVLA-7B's own size, a tensor in memory at a time; returns every tensor's sha256."""
    words = {word for text in (PROMPTS["openvla"].format(instruction=""), *INSTRUCTIONS) for word in text.split()}
    tokenizer = build_tokenizer(LLAMA_2_TOKENS, "<PAD>", sorted(words))  # prompts about as long as Llama-2's
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
        return _prefer_actions(values, model.action_token_ids) if name.endswith("lm_head.weight") else values

    folder.mkdir()
    digests = write_shards(folder, model.state_dict(), dtype, SHARD_BYTES, weight)
    OpenVLAProcessor.for_config(config, tokenizer).save_pretrained(folder)
    write_config_and_code(folder, config)
    return digests


def _prefer_actions(head: torch.Tensor, actions: slice) -> torch.Tensor:
    """The head's weights with those of every other token at 0, in place."""
    head[: actions.start], head[actions.stop :] = 0, 0
    return head


def sample_inputs(count: int) -> tuple[list[str], np.ndarray]:
    """Instructions, and uint8 images ``(count, 192, 192, 3)``: crops of a frame under noise of several strengths."""
    frame = np.asarray(Image.open(SAMPLE_IMAGE).convert("RGB")).astype(np.float64)
    random = np.random.RandomState(0)
    images = np.empty((count, CROP, CROP, 3), np.uint8)
    for i in range(count):
        top, left = random.randint(0, 64, 2)
        crop = frame[top : top + CROP, left : left + CROP]
        images[i] = np.clip(crop + random.randn(*crop.shape) * 20 * (i % 4), 0, 255)
    return [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)], images
