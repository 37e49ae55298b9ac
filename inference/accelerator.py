"""Accelerator of the package's models: the fast decoder and CUDA graphs, which saved folders do not carry.

``loading.register_auto_classes`` attaches it, so that it is in use wherever the package is installed and its classes
are. A model whose code comes from a saved folder (``trust_remote_code``) runs without it, and predicts the same tokens.
"""

from __future__ import annotations

from ..modeling_openvla import OpenVLAForActionPrediction
from ..vision_openvla import PrismaticVisionBackbone
from .cuda_graphs import run_graphed, run_on_two_streams
from .fast_decoder import bidirectional_hidden_states, decode_fast, encode_draft, unsupported_reason


class PackageAccelerator:
    """Implementation of the protocol ``decoding_openvla.Accelerator``."""

    unsupported_reason = staticmethod(unsupported_reason)
    encode_draft = staticmethod(encode_draft)
    decode = staticmethod(decode_fast)
    bidirectional_hidden_states = staticmethod(bidirectional_hidden_states)
    run_graphed = staticmethod(run_graphed)


def attach_accelerator() -> None:
    """Let the package's models use the fast decoder and CUDA graphs."""
    OpenVLAForActionPrediction.accelerator = PackageAccelerator()
    PrismaticVisionBackbone.run_both = staticmethod(run_on_two_streams)
