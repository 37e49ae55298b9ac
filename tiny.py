"""A tiny OpenVLA with its own tokenizer, built in a second: for a first try without a download, and for tests.

It is *untrained*: it has seeded random weights and is no policy. Tests, benchmarks and examples build on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from .configuration_openvla import OpenVLAConfig
from .default_processor import default_processor
from .modeling_openvla import OpenVLAForActionPrediction
from .processing_openvla import OpenVLAProcessor

N_ACTION_BINS = 256
PADDED_ROWS = 64
UNTRAINED_KEY = "untrained"
# Every dimension spans [-1, 1]; the gripper passes unchanged, as in most of OpenVLA's datasets.
UNTRAINED_STATISTICS = {"action": {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}

TINY_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": {"depth": 3, "embed_dim": 48, "num_heads": 3},
    "vit_so400m_patch14_siglip_224": {"depth": 3, "embed_dim": 40, "num_heads": 2},
}


def build_tokenizer(
    vocab_size: int = 0, pad_token: str | None = "<pad>", words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Build a character tokenizer with Llama-2's pipeline (``▁`` for a space, BOS in front, bytes for the rest).

    Its last 256 ids stand for action bins, as in every OpenVLA vocabulary; the padding token comes after them.

    Args:
        vocab_size: Number of ids before the padding token (Llama-2 has 32000), filled up; 0 for no more than needed.
        pad_token: The padding token; None for none, as in Llama-2.
        words: Words, or several words together, that are one token after a space, as are their beginnings. They make
            prompts shorter.
    """
    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    # Every word is merged from its beginning on; words with the same beginning share its token.
    merges = {
        ("▁" + word)[: end + 1]: (("▁" + word)[:end], word[end - 1])
        for word in (entry.replace(" ", "▁") for entry in words)
        for end in range(1, len(word) + 1)
    }
    vocabulary += merges
    vocabulary += [f"<filler_{index}>" for index in range(len(vocabulary), vocab_size - N_ACTION_BINS)]
    vocabulary += [f"<action_{index}>" for index in range(N_ACTION_BINS)]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocabulary)},
            list(merges.values()),
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad_token,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> OpenVLAConfig:
    """Return the configuration of an OpenVLA of 0.5 M parameters; ``overrides`` replace its fields."""
    fields: dict[str, Any] = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "tiny-llama",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "timm_model_kwargs": list(TINY_TOWERS.values()),
        "text_config": language_config(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "pad_to_multiple_of": PADDED_ROWS,
        "empty_token_id": tokenizer.convert_tokens_to_ids("▁"),
        "n_action_bins": N_ACTION_BINS,
        "norm_stats": {UNTRAINED_KEY: UNTRAINED_STATISTICS},
    }
    return OpenVLAConfig(**{**fields, **overrides})


def language_config(tokenizer: PreTrainedTokenizerFast, width: int = 64, depth: int = 2) -> dict[str, Any]:
    """Return the ``text_config`` of a Llama of this width and depth, with 4 heads."""
    return {
        "model_type": "llama",
        "vocab_size": tokenizer.pad_token_id + PADDED_ROWS,
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 12) * 4,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_tiny(seed: int = 0, **overrides: Any) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Build a tiny untrained OpenVLA and its processor, the same on every transformers version.

    Args:
        seed: Seed of the weights.
        **overrides: Fields of :class:`OpenVLAConfig`.

    Returns:
        The model, float32 in eval mode on the CPU, and its processor.
    """
    tokenizer = build_tokenizer()
    config = build_config(tokenizer, **overrides)
    return build_model(config, seed), default_processor(config, tokenizer)


def build_model(config: OpenVLAConfig, seed: int = 0) -> OpenVLAForActionPrediction:
    """Build an untrained model of a configuration, float32 in eval mode on the CPU."""
    model = OpenVLAForActionPrediction(config)
    _fill(model, seed)
    return model.eval()


def _fill(model: nn.Module, seed: int) -> None:
    """Set seeded weights, which do not depend on how a transformers version initialises."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(seeded_weight(name, parameter.shape, generator))


def seeded_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return an initial float32 weight by its name, large enough that the image changes the action."""
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if name.endswith("scale_factor"):
        return torch.full(shape, 0.5)
    is_table = name.endswith(("embed_tokens.weight", "_embed", "_token"))
    spread = 1.0 if is_table else 1.5 * shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
    return torch.randn(shape, generator=generator) * spread
