"""Processor that fits a configuration: the preprocessing that its vision towers were trained with, and its prompt."""

from __future__ import annotations

from typing import Any

from .configuration_openvla import PrismaticConfig
from .processing_openvla import OpenVLAImageProcessor, OpenVLAProcessor

# Channel means and standard deviations that timm's towers were trained with, by a part of their ids; (0.5, 0.5, 0.5)
# for both where none matches.
HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PIXEL_STATISTICS = {"dinov2": IMAGENET, ".openai": OPENAI_CLIP}


def default_image_processor(config: PrismaticConfig) -> OpenVLAImageProcessor:
    """Return the image processor that a model's towers were trained with."""
    statistics = [
        next((known for part, known in PIXEL_STATISTICS.items() if part in timm_id), (HALF, HALF))
        for timm_id in config.timm_model_ids
    ]
    return OpenVLAImageProcessor(
        use_fused_vision_backbone=config.use_fused_vision_backbone,
        image_resize_strategy=config.image_resize_strategy,
        input_sizes=[(3, size, size) for size in config.image_sizes],
        interpolations=["bicubic"] * len(config.image_sizes),
        means=[mean for mean, _ in statistics],
        stds=[std for _, std in statistics],
    )


def default_processor(
    config: PrismaticConfig, tokenizer: Any, image_processor: OpenVLAImageProcessor | None = None
) -> OpenVLAProcessor:
    """Return the processor of a model.

    Args:
        config: The model's configuration.
        tokenizer: The language model's tokenizer.
        image_processor: None for the one that the towers were trained with.
    """
    return OpenVLAProcessor(
        image_processor or default_image_processor(config),
        tokenizer,
        prompt_style=config.prompt_style,
        empty_token_id=config.empty_token_id,
        num_images_in_input=config.num_images_in_input,
    )
