"""LeRobot's processors around an OpenVLA policy: they rename, batch and move observations, and round actions."""

from __future__ import annotations

from typing import Any

import torch
from lerobot.processor import (
    DeviceProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from .configuration_openvla import OpenVLAConfig

Stats = dict[str, dict[str, torch.Tensor]]
Pipelines = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]


def make_openvla_pre_post_processors(config: OpenVLAConfig, dataset_stats: Stats | None = None) -> Pipelines:
    """Return the pipelines before and after the policy.

    The (un-)normalising steps are LeRobot's, and do nothing (their mode is identity): its commands address them by name
    when they load a checkpoint. The last step rounds the policy's float64 actions to float32, LeRobot's dtype of
    actions.

    Args:
        config: The policy's configuration.
        dataset_stats: Statistics of LeRobot, saved with the pipelines and not used.
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, DeviceProcessorStep(device="cpu", float_dtype="float32")],
    )
