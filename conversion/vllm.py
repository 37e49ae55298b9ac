"""``openvla verify --for vllm``: whether vLLM can run a folder, from its configuration, preprocessing and tensor names.

vLLM 0.33.0 (2026-11-01) has a model of its own for OpenVLA: fused DINOv2 and SigLIP towers for 224 pixels, built by
timm, one image, Llama; it refuses tensors that it does not know and returns tokens (``openvla.actions_from_tokens``).
Some differences it does not notice: it always resizes with Pillow's bicubic filter, whatever a folder's preprocessing
says, and does not append the empty token to the prompt. Facts from its source: ``model_executor/models/openvla.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ..configuration_openvla import OpenVLAConfig
from ..errors_openvla import OpenVLAValueError
from ..modeling_openvla import OpenVLAForActionPrediction
from .files import read_json
from .hub_weights import weight_files

VLLM_VERSION = "0.33.0"  # whose source these checks follow
# What vLLM's model is built for, by key of config.json.
CONFIG = {
    "model_type": "openvla",
    "use_fused_vision_backbone": True,
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [224, 224],
}
# Means and standard deviations of the towers' pixels in vLLM's processor: the published, bfloat16-rounded ones.
PIXEL_STATISTICS = {
    "mean": [[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
    "std": [[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
}
PIXEL_TOLERANCE = 1e-2  # of the same numbers before that rounding
MAX_NAMES = 3  # tensors that a message names


def require_vllm_support(folder: Path) -> int:
    """Check that vLLM can run a folder as this package does.

    Args:
        folder: Folder of whole weights in safetensors.

    Returns:
        The number of tensors.

    Raises:
        ValueError: vLLM would refuse the folder, or predict other tokens; every reason is named.
    """
    files = weight_files(folder)
    reasons = list(unsupported_by_vllm(folder, set(files)))
    if reasons:
        raise OpenVLAValueError(f"vLLM {VLLM_VERSION} cannot run {folder} as it was trained: " + "; ".join(reasons))
    return len(files)


def unsupported_by_vllm(folder: Path, tensor_names: set[str]) -> Iterator[str]:
    """Yield the reasons why vLLM cannot run a folder with these tensors."""
    fields = read_json(folder / "config.json")
    different = {name: fields.get(name) for name, value in CONFIG.items() if fields.get(name) != value}
    if different:
        yield ", ".join(f"{name} is {value!r}, not {CONFIG[name]!r}" for name, value in different.items())
    text = fields.get("text_config", {})
    if text.get("model_type") != "llama":
        yield f"its language model is {text.get('model_type')!r}, not 'llama'"
    if fields.get("quantization_config"):
        yield "its weights are quantised; give the folder that they were made from, which vLLM can quantise"
    if fields.get("model_type") != "openvla":
        return
    config = OpenVLAConfig.from_pretrained(folder)
    if config.action_head is not None or config.parallel_decoding:
        yield "it predicts action chunks (OpenVLA-OFT)"
    if config.num_images_in_input != 1:
        yield f"it takes {config.num_images_in_input} images"
    if text.get("model_type") == "llama":
        yield from _changed_text_fields(LlamaConfig(**text), config.text_config)
    with torch.device("meta"):
        expected = set(OpenVLAForActionPrediction(config).state_dict())
    for kind, names in (("missing", expected - tensor_names), ("unknown", tensor_names - expected)):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            yield f"tensors are {kind}: {sorted(names)[:MAX_NAMES]}{more}"
    if any((kwargs or {}).keys() - {"img_size"} for kwargs in config.timm_model_kwargs):
        yield "its vision towers have other sizes than timm's (timm_model_kwargs)"
    yield from _unsupported_preprocessing(folder)


def _changed_text_fields(read: LlamaConfig, ours: Any) -> Iterator[str]:
    """Yield where a language model's configuration means something else to vLLM, because a field is not written."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(read, name) != getattr(ours, name):
            yield f"text_config.{name} is {getattr(read, name)} for vLLM, not {getattr(ours, name)}"


def _unsupported_preprocessing(folder: Path) -> Iterator[str]:
    """Yield what in a folder's preprocessing vLLM does not do."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return
    fields = read_json(file)
    strategy, preset = fields.get("image_resize_strategy"), fields.get("image_preset") or "none"
    if strategy != "resize-naive":
        yield f"images are resized by {strategy!r}, vLLM always takes 'resize-naive'"
    if preset != "none":
        yield f"it was evaluated with image_preset={preset!r}: prepare the images with this package's processor first"
    for name, expected in PIXEL_STATISTICS.items():
        values = [tower[name] for tower in fields.get("tvf_normalize_params", [])]
        differs = len(values) != len(expected) or any(
            abs(a - b) > PIXEL_TOLERANCE for pair in zip(values, expected) for a, b in zip(*pair)
        )
        if differs:
            yield f"the {name} of the pixels is {values}, vLLM's {expected}"
