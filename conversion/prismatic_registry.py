"""The reference's registry of base VLMs (prismatic/conf/models.py), and facts of their language models."""

from __future__ import annotations

from typing import Any

VOCABULARY_MULTIPLE = 64  # the reference rounds the number of embedding rows up to a multiple of it

# Every entry is written as its differences from the most common one.
COMMON = {
    "vision_backbone_id": "clip-vit-l-336px",
    "llm_backbone_id": "vicuna-v15-7b",
    "arch_specifier": "no-align+gelu-mlp",
    "image_resize_strategy": "letterbox",
    "llm_max_length": 2048,
}
FUSED = {"arch_specifier": "no-align+fused-gelu-mlp"}
TOWERS: dict[str, dict[str, Any]] = {
    "in1k-224px": {"vision_backbone_id": "in1k-vit-l"},
    "dinov2-224px": {"vision_backbone_id": "dinov2-vit-l"},
    "clip-224px": {"vision_backbone_id": "clip-vit-l"},
    "siglip-224px": {"vision_backbone_id": "siglip-vit-so400m"},
    "clip-336px": {},
    "siglip-384px": {"vision_backbone_id": "siglip-vit-so400m-384px"},
    "dinoclip-336px": {"vision_backbone_id": "dinoclip-vit-l-336px", **FUSED},
    "dinosiglip-384px": {"vision_backbone_id": "dinosiglip-vit-so-384px", **FUSED},
    "dinosiglip-224px": {"vision_backbone_id": "dinosiglip-vit-so-224px", **FUSED},
}
STRATEGIES = {f"-{name}": {"image_resize_strategy": name} for name in ("letterbox", "resize-crop", "resize-naive")}
NAIVE = {"image_resize_strategy": "resize-naive"}
LLAMA_7B, LLAMA_13B = {"llm_backbone_id": "llama2-7b-pure"}, {"llm_backbone_id": "llama2-13b-pure"}
PRISMS: dict[str, dict[str, Any]] = {
    "prism-clip": {},
    "prism-siglip": TOWERS["siglip-384px"],
    "prism-dinosiglip": TOWERS["dinosiglip-384px"],
    "prism-dinosiglip-224px": TOWERS["dinosiglip-224px"],
}
COMMON_VLMS = (
    "one-stage",
    "full-ft-one-stage",
    "vicuna-no-cotraining",
    "train-1.25-epochs",
    "train-1.5-epochs",
    "train-2-epochs",
    "train-3-epochs",
    "llava-lvis4v",
    "llava-lrv",
    "llava-lvis4v-lrv",
)
BASE_VLMS: dict[str, dict[str, Any]] = {
    "reproduction-llava-v15+7b": {"arch_specifier": "gelu-mlp"},
    "reproduction-llava-v15+13b": {"arch_specifier": "gelu-mlp", "llm_backbone_id": "vicuna-v15-13b"},
    "full-ft-multi-stage+7b": {"arch_specifier": "gelu-mlp"},
    "one-stage+13b": {"llm_backbone_id": "vicuna-v15-13b"},
    "llama2+7b": LLAMA_7B,
    "llama2+13b": LLAMA_13B,
    "llama2-chat+7b": {"llm_backbone_id": "llama2-7b-chat"},
    "llama2-chat+13b": {"llm_backbone_id": "llama2-13b-chat"},
    "mistral-v0.1+7b": {"llm_backbone_id": "mistral-v0.1-7b-pure"},
    "mistral-instruct-v0.1+7b": {"llm_backbone_id": "mistral-v0.1-7b-instruct"},
    "phi-2+3b": {"llm_backbone_id": "phi-2-3b"},
    "llama2-no-cotraining+7b": LLAMA_7B,
    "prism-siglip+13b": {**NAIVE, **LLAMA_13B},  # sic: the reference's entry keeps CLIP's tower
    **{f"{name}+7b": {} for name in COMMON_VLMS},
    **{f"{tower}+7b": fields for tower, fields in TOWERS.items()},
    **{
        f"{tower}{strategy}+7b": {**fields, **strategy_fields}
        for tower, fields in TOWERS.items()
        for strategy, strategy_fields in STRATEGIES.items()
    },
    **{f"{name}{kind}+7b": {**f, **NAIVE, **LLAMA_7B} for name, f in PRISMS.items() for kind in ("", "-controlled")},
    **{
        f"{name}{kind}+13b": {**f, **NAIVE, **LLAMA_13B}
        for name, f in PRISMS.items()
        for kind in ("", "-controlled")
        if (name, kind) != ("prism-siglip", "")
    },
    **{
        f"prism-{kind}-dinosiglip-224px+0_5b": {
            **{**TOWERS["dinosiglip-224px"], **NAIVE, "llm_max_length": 32768},
            "llm_backbone_id": backbone,
        }
        for kind, backbone in (("qwen25", "qwen25-0_5b-pure"), ("qwen25-extra", "qwen25-0_5b-extra"))
    },
}
# Attention heads of the registry's language models; every other size is read from the tensors.
ATTENTION_HEADS = {
    **dict.fromkeys(("llama2-13b-pure", "llama2-13b-chat", "vicuna-v15-13b"), 40),
    **dict.fromkeys(("qwen25-0_5b-pure", "qwen25-0_5b-extra"), 14),
    "qwen25-1_5b-pure": 12,
    "qwen25-3b-pure": 16,
}
COMMON_ATTENTION_HEADS = 32
CHAT_ENDINGS = ("-chat", "-instruct")
# Fields of text_config that tensors do not show and that differ from transformers' defaults: from the language models'
# own config.json, and the padding token that the reference adds (Qwen has one). rms_norm_eps of the Llamas stays at
# transformers' 1e-6: the reference's converter left it there, and every published checkpoint has it.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": 32000},
    "mistral": {"pad_token_id": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
    "phi": {"pad_token_id": 50295, "bos_token_id": 50256, "eos_token_id": 50256, "partial_rotary_factor": 0.4},
    "qwen2": {
        "pad_token_id": 151643,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}
