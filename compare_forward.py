"""One forward pass of a checkpoint in both of its layouts on the same input: the proof beyond equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from .checkpoint_files import weight_files
from .configuration_openvla import PrismaticConfig
from .loading import MODEL_CLASSES

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
        ValueError: The logits differ or are not finite.
    """
    needed = HEADROOM * sum(file.stat().st_size for file in set(weight_files(folder).values()))
    available = psutil.virtual_memory().available
    if needed > available:
        return f"forward not compared: it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"
    model = MODEL_CLASSES[config.model_type].from_pretrained(folder, torch_dtype="auto").eval()
    ours = _logits(model, config)
    # Copied into the same memory: where weights lie at other alignments, a CPU may round the last bit otherwise.
    model.load_state_dict(tensors, strict=not config.tie_word_embeddings)
    theirs = _logits(model, config)
    if not torch.isfinite(ours).all():
        raise ValueError(f"The forward pass of {folder} is not finite; its weights hold NaN or infinity.")
    if not torch.equal(ours, theirs):
        differing = (ours != theirs).sum().item()
        raise ValueError(f"{differing} of {ours.numel()} logits differ between the source and {folder}.")
    return f"forward compared: {ours.numel()} logits equal in every bit"


@torch.inference_mode()
def _logits(model: torch.nn.Module, config: PrismaticConfig) -> torch.Tensor:
    """Logits for seeded noise as image and a prompt of the vocabulary's first ids."""
    generator = torch.Generator().manual_seed(0)
    size = config.image_sizes[0]
    pixel_values = torch.randn(1, 3 * len(config.image_sizes), size, size, generator=generator).to(model.dtype)
    input_ids = torch.arange(1, PROMPT_LENGTH + 1)[None]
    mask = torch.ones_like(input_ids)
    return model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values).logits
