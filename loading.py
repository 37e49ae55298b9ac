"""Ways into a checkpoint that do not depend on the installed transformers."""

from __future__ import annotations

import inspect
import os
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

# From its own module: transformers 5.4 to 5.2x put a placeholder in its place where torchvision is not installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .adapters import lora
from .configuration_openvla import OpenVLAConfig, PrismaticConfig, hub_keywords
from .errors_openvla import OpenVLAValueError
from .modeling_openvla import OpenVLAForActionPrediction
from .prismatic_openvla import PrismaticForConditionalGeneration
from .processing_openvla import (
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    PrismaticImageProcessor,
    PrismaticProcessor,
)

MODEL_CLASSES = {
    OpenVLAConfig.model_type: OpenVLAForActionPrediction,
    PrismaticConfig.model_type: PrismaticForConditionalGeneration,
}


def register_auto_classes() -> None:
    """Teach transformers' Auto classes the model types "openvla" and "prismatic", and the model its adapters."""
    OpenVLAForActionPrediction.adapter_functions = lora
    for config, processor, image_processor in (
        (OpenVLAConfig, OpenVLAProcessor, OpenVLAImageProcessor),
        (PrismaticConfig, PrismaticProcessor, PrismaticImageProcessor),
    ):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)
        _register_image_processor(config, image_processor)
        for name in ("AutoModel", "AutoModelForVision2Seq", "AutoModelForImageTextToText"):
            if hasattr(transformers, name):  # Vision2Seq until 4.57, ImageTextToText from 4.46
                getattr(transformers, name).register(config, MODEL_CLASSES[config.model_type], exist_ok=True)


def _register_image_processor(config: type[PretrainedConfig], image_processor: type) -> None:
    """The argument was renamed in 4.42 and again in 5.x."""
    register = AutoImageProcessor.register
    parameters = inspect.signature(register).parameters
    if "image_processor_classes" in parameters:
        register(config, image_processor_classes={"pil": image_processor}, exist_ok=True)
    elif "slow_image_processor_class" in parameters:
        register(config, slow_image_processor_class=image_processor, exist_ok=True)
    else:
        register(config, image_processor, exist_ok=True)


class AutoModelForVision2Seq:
    """transformers' class of this name, which 5.x removed, for OpenVLA and Prismatic checkpoints.

    A script written for transformers 4.40 needs one changed line: ``from openvla import AutoModelForVision2Seq``.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder or a Hub repository with this package's code, whatever ``trust_remote_code`` says.

        Raises:
            ValueError: The checkpoint is of another model type.
        """
        kwargs.pop("trust_remote_code", None)
        model_class = MODEL_CLASSES[_model_type(pretrained_model_name_or_path, kwargs)]
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Build a model with fresh weights."""
        kwargs.pop("trust_remote_code", None)
        return MODEL_CLASSES[config.model_type]._from_config(config, **kwargs)


class AutoProcessor:
    """transformers' ``AutoProcessor`` for OpenVLA and Prismatic checkpoints: this package's code, always.

    On transformers 4.x ``trust_remote_code=True`` would run the old code in the checkpoint, which needs timm.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> OpenVLAProcessor:
        """Load a folder or a Hub repository."""
        kwargs.pop("trust_remote_code", None)
        return OpenVLAProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)


def _model_type(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> str:
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        model_type = config.model_type
    else:
        hub = hub_keywords(kwargs)
        model_type = PretrainedConfig.get_config_dict(name_or_path, **hub)[0].get("model_type")
    if model_type not in MODEL_CLASSES:
        raise OpenVLAValueError(
            f"{name_or_path} holds a model of type {model_type!r}; this class loads {sorted(MODEL_CLASSES)}. For other "
            "models use transformers' AutoModelForImageTextToText."
        )
    return model_type
