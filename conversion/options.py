"""Options of a conversion, as ``openvla convert`` takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..configuration_openvla import PrismaticConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class OftOptions:
    """Facts of an OpenVLA-OFT run that its files do not hold.

    Attributes:
        preset: Robot platform, a key of ``PLATFORMS``: chunk length, normalisation, dimensions.
        num_images: Number of cameras.
        parallel_decoding: Whether a model without an action head predicts a chunk of tokens in parallel.
        step: Training step of the part files, where there are several; such as "150000".
        base: Folder or Hub id of the base of an adapter; None takes the one that the adapter names.
    """

    preset: str | None = None
    num_images: int | None = None
    parallel_decoding: bool = False
    step: str | None = None
    base: str | os.PathLike | None = None


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion to a Hub folder.

    Attributes:
        max_shard_bytes: Size of the weight files.
        tokenizer: Folder or Hub id; None takes the tokenizer in the source.
        dtype: A key of ``DTYPES``; None is bfloat16 for native runs and each tensor's own dtype for Hub folders.
        config_overrides: Fields of config.json.
        image_preset: Preprocessing that evaluation applies to frames; None keeps the source's.
        oft: Options of OpenVLA-OFT.
        vq: For openvla-mini: folder of the VQ autoencoder whose codes the action tokens are.
    """

    max_shard_bytes: int
    tokenizer: str | os.PathLike | None = None
    dtype: str | None = None
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    image_preset: str | None = None
    oft: OftOptions = OftOptions()
    vq: Path | None = None


class ConvertedModel(NamedTuple):
    """Tensors of the layout other than the Hub folder, under their Hub names, and the configuration of both."""

    tensors: dict[str, torch.Tensor]
    config: PrismaticConfig
