"""OpenVLA on every transformers from 4.40.1 on: load a checkpoint, see the image, get the action.

Importing this package teaches transformers' Auto classes the model types "openvla" and "prismatic", so that published
checkpoints load without ``trust_remote_code``.
"""

from .action_chunk import ActionChunk
from .actions_openvla import ActionTokenizer, NormalizationStatistics
from .answers_openvla import ActionOutput
from .configuration_openvla import PLATFORMS, OpenVLAConfig, PrismaticConfig
from .decoding_openvla import NoActionError
from .loading import AutoModelForVision2Seq, AutoProcessor, register_auto_classes
from .modeling_openvla import OpenVLAForActionPrediction
from .policy import Policy, load_policy
from .policy_client import PolicyClient
from .prismatic_openvla import PrismaticForConditionalGeneration
from .processing_openvla import (
    OpenVLAImageProcessor,
    OpenVLAProcessor,
    PrismaticImageProcessor,
    PrismaticProcessor,
)
from .quantization_openvla import quantization_config

__version__ = "0.1.0"

__all__ = [
    "PLATFORMS",
    "ActionChunk",
    "ActionOutput",
    "ActionTokenizer",
    "AutoModelForVision2Seq",
    "AutoProcessor",
    "NoActionError",
    "NormalizationStatistics",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAProcessor",
    "Policy",
    "PolicyClient",
    "PrismaticConfig",
    "PrismaticForConditionalGeneration",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "load_policy",
    "quantization_config",
]

register_auto_classes()
