"""The sizes that benchmarks run at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from openvla.tiny import PADDED_ROWS, build_tiny, build_tokenizer

SIZES = ("tiny", "eighth", "full")


def overrides(size: str) -> dict[str, Any]:
    """Fields of the configuration: "tiny" is the embedded default, "eighth" has full depth at 1/8 of the width."""
    if size == "tiny":
        return {}
    vocabulary = build_tokenizer().pad_token_id + PADDED_ROWS
    text = {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": 512, "intermediate_size": 1376}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    towers = [{"embed_dim": 128, "num_heads": 2}, {"embed_dim": 144, "num_heads": 2}]
    return {"text_config": text, "timm_model_kwargs": towers}


def write_model(size: str, folder: Path) -> None:
    """A bfloat16 folder with its processor."""
    if size == "full":
        from convert_full import write_synthetic

        return write_synthetic(folder, torch.bfloat16, spread=0.02)
    model, processor = build_tiny(**overrides(size))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return None
