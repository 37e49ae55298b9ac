"""Compare one forward pass of a checkpoint in both of its layouts on the same input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import psutil
import torch

from ..configuration_openvla import PrismaticConfig
from ..errors_openvla import OpenVLAValueError
from ..loading import MODEL_CLASSES
from ..modeling_openvla import OpenVLAForActionPrediction
from ..parallel_openvla import append_action_placeholders
from ..prismatic_openvla import PrismaticForConditionalGeneration
from .hub_weights import weight_files

PROMPT_LENGTH = 16
HEADROOM = 1.2  # memory for weights and activations, as a multiple of the weights


def compare_forward(folder: Path, tensors: Mapping[str, torch.Tensor], config: PrismaticConfig) -> str:
    """Run a Hub folder and then the other layout's tensors; one model at a time is in memory.

    Args:
        folder: The Hub folder.
        tensors: The other layout's tensors under their Hub names; cast to the folder's dtype.
        config: The configuration of both.

    Returns:
        A line that says what was compared, or that memory is too small.

    Raises:
        ValueError: The outputs differ or are not finite.
    """
    needed = HEADROOM * sum(file.stat().st_size for file in set(weight_files(folder).values()))
    available = psutil.virtual_memory().available
    if needed > available:
        return f"forward not compared: it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    model = MODEL_CLASSES[config.model_type].from_pretrained(folder, torch_dtype="auto").eval()
    outputs = _forward(model, config)
    # Load into the same memory: a CPU may round the last bit differently where weights have another alignment.
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    other_outputs = _forward(model, config)
    if not torch.isfinite(outputs).all():
        raise OpenVLAValueError(f"The forward pass of {folder} is not finite; its weights hold NaN or infinity.")
    kind = "actions" if getattr(config, "action_head", None) else "logits"
    if not torch.equal(outputs, other_outputs):
        count = (outputs != other_outputs).sum().item()
        raise OpenVLAValueError(f"{count} of {outputs.numel()} {kind} differ between the source and {folder}.")
    return f"forward compared: {outputs.numel()} {kind} equal in every bit"


@torch.inference_mode()
def _forward(model: PrismaticForConditionalGeneration, config: PrismaticConfig) -> torch.Tensor:
    """Return logits, or a head's actions, for seeded noise as images and the vocabulary's first ids as prompt."""
    generator = torch.Generator().manual_seed(0)
    size, channels = config.image_sizes[0], 3 * len(config.image_sizes) * config.num_images_in_input
    pixel_values = torch.randn(1, channels, size, size, generator=generator).to(model.dtype)
    input_ids = cast(torch.LongTensor, torch.arange(1, PROMPT_LENGTH + 1)[None])
    if not (isinstance(model, OpenVLAForActionPrediction) and getattr(config, "parallel_decoding", False)):
        mask = torch.ones_like(input_ids)
        return model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values).logits
    with_slots = append_action_placeholders(input_ids, None, model.tokens_per_chunk, config.text_config.eos_token_id)
    proprio = None if config.proprio_dim is None else torch.zeros(1, config.proprio_dim)
    seen = model.embed_observation(*with_slots, pixel_values, proprio)
    if config.action_head is None:
        return model.chunk_logits(seen)[0]
    noise = cast(torch.FloatTensor, torch.zeros(1, config.chunk_length, config.action_dim))
    return model.predict_normalized_chunk(seen, noise, num_inference_steps=1, fast=False)[0]
