"""Adapters on disk and in memory.

An adapter folder holds what peft reads (adapter_config.json, adapter_model.safetensors), the model's configuration,
code and action statistics, and openvla_adapter.json: the record of the base model (``base_record.py``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ..configuration_openvla import ADAPTER_CONFIG_FILE, optional_file
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError

logger = logging.get_logger(__name__)

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "openvla_adapter.json"
# Endings of the names of A and B, beside a linear layer and beside an embedding.
LINEAR_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B")
PEFT_PREFIX = "base_model.model."
PEFT_DEFAULT = 8  # of r and lora_alpha, where adapter_config.json has none
# Fields of peft's configuration that leave W + scaling * B A as it is. Any other one that is set (use_dora,
# rank_pattern, alora_invocation_tokens, a field of a future peft) may give the same matrices another meaning: refused.
PLAIN_FIELDS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "bias"}
PLAIN_FIELDS |= {"inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
PLAIN_FIELDS |= {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
# Settings of variants that need another field to switch them on.
PLAIN_FIELDS |= {"megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config"}
PLAIN_FIELDS |= {"runtime_config"}
# Initialisations that leave the base's weights unchanged; pissa, olora, corda, loftq and lora_ga change them.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


class BaseRecord(TypedDict):
    """Which base model an adapter was trained on.

    Attributes:
        id: Hub id or absolute path.
        revision: Commit on the Hub; None for a folder.
        config: Digest of the configuration fields that give the weights their meaning.
        weights: Digest of the weights; None where they could not be read.
        quantization: int8, nf4 or fp4 where the adapter was trained beside quantised weights; else None.
    """

    id: str
    revision: str | None
    config: str
    weights: str | None
    quantization: str | None


@dataclass
class LoraAdapter:
    """A LoRA adapter: its scaling, the base that it was trained on, its tensors.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling.
        use_rslora: Scale by alpha / sqrt(r) instead of alpha / r.
        base: Record of the base model; None for an adapter that peft alone saved.
        default_unnorm_key: Field of the model's configuration of that name.
        action_config: ``OpenVLAConfig.action_config`` of a model with parallel decoding, whose heads are trained in
            full; else None.
        tensors: Tensors by peft's names without its prefix: ``X.lora_A.weight`` ``(r, in)`` and ``X.lora_B.weight``
            ``(out, r)`` beside a linear layer, ``X.lora_embedding_A`` ``(r, vocabulary)`` and ``X.lora_embedding_B``
            ``(dim, r)`` beside an embedding; any other name is a tensor that was trained in full.
    """

    r: int
    alpha: float
    use_rslora: bool = False
    base: BaseRecord | None = None
    default_unnorm_key: str | None = None
    action_config: dict[str, Any] | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """Return the factor of B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def target_modules(self) -> list[str]:
        """Return the names of the modules that have LoRA matrices."""
        return sorted({name.partition(".lora_")[0] for name in self.tensors if ".lora_" in name})

    @property
    def full_tensors(self) -> list[str]:
        """Return the names of the tensors that were trained in full."""
        return sorted(name for name in self.tensors if ".lora_" not in name)

    @property
    def modules_to_save(self) -> list[str]:
        """Return the names of the modules that hold the tensors that were trained in full."""
        return sorted({name.rpartition(".")[0] for name in self.full_tensors})

    def delta_weight(self, module: str) -> torch.Tensor | None:
        """Return what the adapter adds to a module's weight; None for a module without LoRA matrices.

        Returns:
            float32 ``(out, in)`` on the CPU.

        Raises:
            ValueError: A matrix is missing or of another rank.
        """
        for suffix_a, suffix_b in (LINEAR_SUFFIXES, EMBEDDING_SUFFIXES):
            a, b = self.tensors.get(module + suffix_a), self.tensors.get(module + suffix_b)
            if a is None and b is None:
                continue
            if a is None or b is None or (a.shape[0], b.shape[1]) != (self.r, self.r):
                raise OpenVLAValueError(f"The adapter's matrices of {module} are not a pair of rank {self.r}.")
            product = b.detach().to("cpu", torch.float32) @ a.detach().to("cpu", torch.float32)
            return self.scaling * (product if suffix_a == LINEAR_SUFFIXES[0] else product.T)
        return None

    def merge_tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base with the adapter in it: float32 on the CPU, rounded once to the tensor's dtype.

        Args:
            name: Name of the base's tensor, such as ``X.weight``.
            tensor: The base's tensor; returned as it is where the adapter does not change it.

        Raises:
            ValueError: Shapes disagree, or the result is not finite.
        """
        delta = self.delta_weight(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if name in self.tensors:
            merged = self.tensors[name].detach().to("cpu", tensor.dtype)
        elif delta is None:
            return tensor
        elif delta.shape == tensor.shape:
            merged = tensor.detach().to("cpu", torch.float32).add(delta).to(tensor.dtype)
        else:
            merged = delta
        if merged.shape != tensor.shape:
            raise OpenVLAValueError(
                f"The adapter's {name} is of shape {tuple(merged.shape)}, the base's {tuple(tensor.shape)}."
            )
        if not merged.isfinite().all():
            raise OpenVLAValueError(f"{name} with the adapter is not finite in {tensor.dtype}; use an earlier adapter.")
        return merged


def read_adapter(name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> LoraAdapter:
    """Read an adapter from a folder or Hub repository, saved by this package or by peft.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: It is not plain LoRA, is damaged, or holds a tensor that is not finite.
    """
    config_file, weights_file, record_file = (
        optional_file(name_or_path, name, hub_kwargs)
        for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, RECORD_FILE)
    )
    if config_file is None or weights_file is None:
        missing = ADAPTER_WEIGHTS_FILE if config_file else ADAPTER_CONFIG_FILE
        raise OpenVLAFileNotFoundError(f"{name_or_path} is no adapter: it has no {missing}.")
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    _require_plain_lora(config, name_or_path)
    record = json.loads(Path(record_file).read_text(encoding="utf-8")) if record_file else {}
    return LoraAdapter(
        r=config.get("r", PEFT_DEFAULT),
        alpha=config.get("lora_alpha", PEFT_DEFAULT),
        use_rslora=bool(config.get("use_rslora")),
        base=record.get("base"),
        default_unnorm_key=record.get("default_unnorm_key"),
        action_config=record.get("answer"),  # under its first name, which adapters on disk have
        tensors=_read_tensors(weights_file, name_or_path),
    )


def _read_tensors(file: str, name_or_path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, by peft's names without its prefix."""
    try:
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
    except Exception as error:  # safetensors raises its own error class from Rust
        raise OpenVLAValueError(
            f"{file} is not a complete safetensors file: {error}. Copy it again from its source."
        ) from error
    suffixes = LINEAR_SUFFIXES + EMBEDDING_SUFFIXES
    unknown = [name for name in tensors if ".lora_" in name and not name.endswith(suffixes)]
    if unknown:
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({unknown[:3]}): not supported.")
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise OpenVLAValueError(
            f"{name_or_path}: {infinite[:3]} is not finite; training diverged. Use an earlier adapter."
        )
    return tensors


def _require_plain_lora(config: dict[str, Any], name_or_path: str | os.PathLike[str]) -> None:
    """Raise unless a configuration of peft describes W + scaling * B A on the base's unchanged weights."""
    if config.get("peft_type") != "LORA":
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({config.get('peft_type')}): not supported.")
    if config.get("bias", "none") != "none":
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA (bias={config['bias']!r}): not supported.")
    unknown = sorted(name for name, value in config.items() if value and name not in PLAIN_FIELDS)
    if unknown:
        raise OpenVLAValueError(f"{name_or_path} is not plain LoRA ({unknown}): not supported.")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in PLAIN_INITIALISATIONS:
        raise OpenVLAValueError(
            f"{name_or_path} was trained from init_lora_weights={initialisation!r}, which also changes the base; on "
            "the unchanged base it would be another model. Convert it to plain LoRA with peft: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def peft_config(adapter: LoraAdapter, base: BaseRecord) -> dict[str, Any]:
    """Return the content of adapter_config.json, which every peft since 0.11 reads."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base["id"] or None,
        "revision": base["revision"],
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.use_rslora,
        "bias": "none",
        "target_modules": adapter.target_modules,
        "modules_to_save": adapter.modules_to_save or None,
    }


def locate_base(adapter: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> tuple[str, str | None]:
    """Return the id or path of an adapter's base, and its revision on the Hub.

    Raises:
        FileNotFoundError: The adapter names no base, or one in a folder that does not exist.
    """
    file = optional_file(adapter, ADAPTER_CONFIG_FILE, hub_kwargs)
    if file is None:
        raise OpenVLAFileNotFoundError(f"{adapter} is no adapter: it has no {ADAPTER_CONFIG_FILE}.")
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base or (os.path.isabs(base) and not os.path.isdir(base)):
        raise OpenVLAFileNotFoundError(
            f"The base of {adapter}, {base!r}, is not here. Load it from where it is, then model.load_lora(adapter)."
        )
    return base, None if os.path.isdir(base) else config.get("revision")


def find_beside_or_above(
    adapter: str | os.PathLike[str], name: str, hub_kwargs: dict[str, Any] | None = None
) -> str | None:
    """Return the path of a file of an adapter, or of the folder above, where published scripts leave it; else None."""
    file = optional_file(adapter, name, hub_kwargs)
    above = Path(os.path.abspath(adapter)).parent / name
    if file is None and os.path.isdir(adapter) and above.is_file():
        logger.warning(f"{adapter} has no {name}; that of the folder above is used: {above}.")
        return str(above)
    return file
