"""Parallel decoding for a loaded OpenVLA that predicts one action token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..actions_openvla import validate_norm_stats
from ..configuration_openvla import ACTION_CONFIG_FIELDS, OpenVLAConfig, require_known
from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import is_action_head_param

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction


def enable_parallel_decoding(model: OpenVLAForActionPrediction, **fields: Any) -> None:
    """Make a loaded OpenVLA predict chunks of actions, in place: new heads and FiLM layers are added, untrained.

    Its actions are useless until it is fine-tuned.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        **fields: Fields of ``OpenVLAConfig``: ``action_dim`` and what differs from one action in tokens, such as
            ``**PLATFORMS["libero"], action_head="l1", num_images_in_input=2``.

    Raises:
        ValueError: The model has parallel decoding or an adapter already, or fields are unknown or contradict each
            other; the model is unchanged.
    """
    if model.config.parallel_decoding:
        raise OpenVLAValueError(f"This model already has parallel decoding: {model.config.action_config}.")
    if not fields.get("parallel_decoding", True):
        raise OpenVLAValueError("enable_parallel_decoding makes parallel_decoding true; leave parallel_decoding out.")
    require_no_adapter(model)
    model._require_masked_attention()
    set_action_config(model.config, **{**fields, "parallel_decoding": True})
    model.build_heads(model.config)
    model.vision_backbone.configure(model.config)
    projection = model.projector.fc1
    weight = projection.weight if projection.weight.is_floating_point() else projection.bias
    for name, module in model.named_modules():
        if is_action_head_param(name):
            module.to(device=weight.device, dtype=weight.dtype)


def require_no_adapter(model: OpenVLAForActionPrediction) -> None:
    """Raise ValueError for a model with an adapter."""
    if model.lora_adapter is not None:
        raise OpenVLAValueError("This model already has an adapter; call merge_lora(), or load the base again.")


def set_action_config(config: OpenVLAConfig, **fields: Any) -> None:
    """Set fields of ``OpenVLAConfig.action_config``, all or none.

    Raises:
        ValueError: A field is unknown, has a value that is not allowed, or contradicts another.
    """
    for name in fields:
        require_known("field", name, ACTION_CONFIG_FIELDS)
    before = config.action_config
    vars(config).update(fields)
    try:
        config.validate_action_config()
        validate_norm_stats(config.norm_stats or {}, config.normalization)
    except ValueError:
        vars(config).update(before)
        raise
