"""One forward pass of a checkpoint in both of its layouts on the same input: the proof beyond equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from ..configuration_openvla import PrismaticConfig
from ..errors_openvla import OpenVLAValueError
from ..loading import MODEL_CLASSES
from ..parallel_openvla import append_action_placeholders
from .safetensors_io import weight_files

PROMPT_LENGTH = 16
HEADROOM = 1.2  # for activations, beside the weights


def compare_forward(folder: Path, tensors: Mapping[str, torch.Tensor], config: PrismaticConfig) -> str:
    """Run a Hub folder, and the other layout's tensors under their Hub names; only one model is in memory.

    Args:
        folder: The Hub folder.
        tensors: Of the other layout; cast to the folder's dtype.
        config: Of both.

    Returns:
        What was found, or that memory is too small.

    Raises:
        ValueError: The outputs differ or are not finite.
    """
    needed = HEADROOM * sum(file.stat().st_size for file in set(weight_files(folder).values()))
    available = psutil.virtual_memory().available
    if needed > available:
        return f"forward not compared: it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    model = MODEL_CLASSES[config.model_type].from_pretrained(folder, torch_dtype="auto").eval()
    ours = _output(model, config)
    # Copied into the same memory: where weights lie at other alignments, a CPU may round the last bit otherwise.
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    theirs = _output(model, config)
    if not torch.isfinite(ours).all():
        raise OpenVLAValueError(f"The forward pass of {folder} is not finite; its weights hold NaN or infinity.")
    compared = "actions" if getattr(config, "action_head", None) else "logits"
    if not torch.equal(ours, theirs):
        differing = (ours != theirs).sum().item()
        raise OpenVLAValueError(f"{differing} of {ours.numel()} {compared} differ between the source and {folder}.")
    return f"forward compared: {ours.numel()} {compared} equal in every bit"


@torch.inference_mode()
def _output(model: torch.nn.Module, config: PrismaticConfig) -> torch.Tensor:
    """Logits, or a head's actions, for seeded noise as images and a prompt of the vocabulary's first ids."""
    generator = torch.Generator().manual_seed(0)
    size, channels = config.image_sizes[0], 3 * len(config.image_sizes) * config.num_images_in_input
    pixel_values = torch.randn(1, channels, size, size, generator=generator).to(model.dtype)
    input_ids = torch.arange(1, PROMPT_LENGTH + 1)[None]
    if not getattr(config, "parallel_decoding", False):
        mask = torch.ones_like(input_ids)
        return model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values).logits
    with_slots = append_action_placeholders(input_ids, None, model.tokens_per_chunk, config.text_config.eos_token_id)
    proprio = None if config.proprio_dim is None else torch.zeros(1, config.proprio_dim)
    seen = model.embed_observation(*with_slots, pixel_values, proprio)
    if config.action_head is None:
        return model.chunk_logits(seen)[0]
    noise = torch.zeros(1, config.chunk_length, config.action_dim)
    return model.predict_normalized_chunk(seen, noise, None, 1)[0]
