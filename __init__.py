"""OpenVLA on every transformers from 4.40.1 on: load a checkpoint, see the image, get the action.

Importing this package registers the model types "openvla" and "prismatic" with transformers' Auto classes, so that
published checkpoints load without ``trust_remote_code``. Public names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .actions_openvla import ActionTokenizer, NormalizationStatistics
    from .configuration_openvla import PLATFORMS, OpenVLAConfig, PrismaticConfig
    from .decoding_openvla import ActionOutput, NoActionError
    from .errors_openvla import OpenVLAError
    from .inference.action_queue import ActionQueue
    from .inference.policy import Policy, load_policy
    from .inference.quantization import quantization_config
    from .inference.sampling import ValueHead, observation_batch
    from .inference.token_actions import actions_from_tokens
    from .inference.visual_trace import CoTracker3, VisualTrace
    from .loading import AutoModelForVision2Seq, AutoProcessor
    from .modeling_openvla import OpenVLAForActionPrediction
    from .prismatic_openvla import PrismaticForConditionalGeneration
    from .processing_openvla import (
        OpenVLAImageProcessor,
        OpenVLAProcessor,
        PrismaticImageProcessor,
        PrismaticProcessor,
    )
    from .serving.client import PolicyClient
    from .vq_openvla import VQActionTokenizer

__version__ = "0.1.0"

_MODULES = {
    "PLATFORMS": "configuration_openvla",
    "ActionOutput": "decoding_openvla",
    "ActionQueue": "inference.action_queue",
    "ActionTokenizer": "actions_openvla",
    "AutoModelForVision2Seq": "loading",
    "AutoProcessor": "loading",
    "CoTracker3": "inference.visual_trace",
    "NoActionError": "decoding_openvla",
    "NormalizationStatistics": "actions_openvla",
    "OpenVLAConfig": "configuration_openvla",
    "OpenVLAError": "errors_openvla",
    "OpenVLAForActionPrediction": "modeling_openvla",
    "OpenVLAImageProcessor": "processing_openvla",
    "OpenVLAProcessor": "processing_openvla",
    "Policy": "inference.policy",
    "PolicyClient": "serving.client",
    "PrismaticConfig": "configuration_openvla",
    "PrismaticForConditionalGeneration": "prismatic_openvla",
    "PrismaticImageProcessor": "processing_openvla",
    "PrismaticProcessor": "processing_openvla",
    "actions_from_tokens": "inference.token_actions",
    "VisualTrace": "inference.visual_trace",
    "VQActionTokenizer": "vq_openvla",
    "ValueHead": "inference.sampling",
    "load_policy": "inference.policy",
    "observation_batch": "inference.sampling",
    "quantization_config": "inference.quantization",
}

__all__ = [
    "PLATFORMS",
    "ActionOutput",
    "ActionQueue",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "CoTracker3",
    "NoActionError",
    "NormalizationStatistics",
    "OpenVLAConfig",
    "OpenVLAError",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAProcessor",
    "Policy",
    "PolicyClient",
    "PrismaticConfig",
    "PrismaticForConditionalGeneration",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "actions_from_tokens",
    "VisualTrace",
    "VQActionTokenizer",
    "ValueHead",
    "load_policy",
    "observation_batch",
    "quantization_config",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
