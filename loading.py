"""Auto classes for OpenVLA and Prismatic checkpoints, registered with transformers and independent of its version."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

# From its own module: transformers 5.4 to 5.2x put a placeholder in its place where torchvision is not installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from . import saved_folder
from .adapters import peft_methods
from .adapters.lora import enable_lora, load_lora, merge_lora, save_lora
from .adapters.parallel_decoding import enable_parallel_decoding
from .configuration_openvla import OpenVLAConfig, PrismaticConfig, hub_keywords
from .conversion.hub_upload import push_to_hub
from .decoding_openvla import ActionOutput
from .dimension_labels import dimension_labels
from .errors_openvla import OpenVLAValueError
from .inference import processor_extras, quantized_weights
from .inference.accelerator import attach_accelerator
from .inference.device_images import pixels_on_device
from .inference.sampling import action_log_probs, sample_actions
from .inference.scoring import score_actions
from .modeling_openvla import OpenVLAForActionPrediction
from .prismatic_openvla import PrismaticForConditionalGeneration, PrismaticPreTrainedModel
from .processing_openvla import (
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    PrismaticImageProcessor,
    PrismaticProcessor,
)
from .publishing_openvla import PushToHub
from .training.parallel_loss import parallel_forward
from .training.token_loss import loss_at_labels

MODEL_CLASSES = {
    OpenVLAConfig.model_type: OpenVLAForActionPrediction,
    PrismaticConfig.model_type: PrismaticForConditionalGeneration,
}
# Model types that are recognised and refused, and why.
REFUSED_MODEL_TYPES = {
    "phi3_v": "the Phi-3 variants of TraceVLA and OpenVLA (tracevla_phi3v, openvla_phi3v) are another model: its "
    "code for actions exists only as remote code on the Hub, and nothing here could be compared with it. Take the 7B "
    "checkpoint (furonghuang-lab/tracevla_7b), or that remote code"
}
# Functions that are methods of the model where the package is installed; their first argument is the model.
MODEL_METHODS: tuple[Callable[..., Any], ...] = (
    enable_lora,
    load_lora,
    save_lora,
    merge_lora,
    *peft_methods.METHODS,
    enable_parallel_decoding,
    loss_at_labels,
    parallel_forward,
    score_actions,
    sample_actions,
    action_log_probs,
)


def refuse_model_type(source: Any, model_type: Any) -> None:
    """Raise ValueError for a model type of ``REFUSED_MODEL_TYPES``."""
    if model_type in REFUSED_MODEL_TYPES:
        raise OpenVLAValueError(f"{source} is of type {model_type!r}: {REFUSED_MODEL_TYPES[model_type]}.")


def register_auto_classes() -> None:
    """Register the model types "openvla" and "prismatic" with transformers' Auto classes.

    Called once transformers and any module of this package are imported (``registration.py``).
    """
    attach_package()
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


def attach_package() -> None:
    """Give the shipped classes what only the installed package has; a copy beside a checkpoint lacks it."""
    PushToHub.hub_uploader = push_to_hub
    OpenVLAImageProcessor.device_pixels = staticmethod(pixels_on_device)
    OpenVLAProcessor.package = processor_extras
    PrismaticPreTrainedModel.keep_quantized_weights = staticmethod(quantized_weights.keep_quantized_weights)
    PrismaticPreTrainedModel.saved_folder = saved_folder
    PrismaticPreTrainedModel.loss_at_labels = loss_at_labels
    for function in quantized_weights.METHODS:
        setattr(PrismaticPreTrainedModel, function.__name__, function)
    ActionOutput.label_dimensions = staticmethod(dimension_labels)
    attach_methods(OpenVLAForActionPrediction)
    attach_accelerator()


def attach_methods(model_class: type) -> None:
    """Set ``MODEL_METHODS`` on a model class: the package's, or that of a saved folder's code at its first use."""
    for function in MODEL_METHODS:
        setattr(model_class, function.__name__, function)


def _register_image_processor(config: type[PretrainedConfig], image_processor: type) -> None:
    """Register an image processor; the argument was renamed in transformers 4.42 and again in 5.x."""
    register = AutoImageProcessor.register
    parameters = inspect.signature(register).parameters
    if "image_processor_classes" in parameters:
        register(config, image_processor_classes={"pil": image_processor}, exist_ok=True)
    elif "slow_image_processor_class" in parameters:
        register(config, slow_image_processor_class=image_processor, exist_ok=True)
    else:
        register(config, image_processor, exist_ok=True)


class AutoModelForVision2Seq:
    """Transformers' class of this name, which 5.x removed, for OpenVLA and Prismatic checkpoints.

    A script written for transformers 4.40 needs one changed line: ``from openvla import AutoModelForVision2Seq``.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any) -> Any:
        """Load a folder or a Hub repository with this package's code, whatever ``trust_remote_code`` says.

        Raises:
            ValueError: The checkpoint has another model type.
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
    """Transformers' ``AutoProcessor`` for OpenVLA and Prismatic checkpoints, which always runs this package's code.

    On transformers 4.x ``trust_remote_code=True`` would run the old code in the checkpoint, which needs timm.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> OpenVLAProcessor:
        """Load a folder or a Hub repository."""
        kwargs.pop("trust_remote_code", None)
        return OpenVLAProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)


def _model_type(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> str:
    """Return the model type of a checkpoint, or of the configuration in ``kwargs``."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        model_type: str | None = config.model_type
    else:
        fields, _ = PretrainedConfig.get_config_dict(name_or_path, **hub_keywords(kwargs))
        model_type = fields.get("model_type")
    refuse_model_type(name_or_path, model_type)
    if model_type not in MODEL_CLASSES:
        raise OpenVLAValueError(
            f"{name_or_path} holds a model of type {model_type!r}; this class loads {sorted(MODEL_CLASSES)}. For other "
            "models use transformers' AutoModelForImageTextToText."
        )
    return model_type
