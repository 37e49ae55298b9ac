"""8- and 4-bit weights of bitsandbytes and torchao: checks before and after loading."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from .compatibility_openvla import DTYPE_FIELD, LOADS_TORCHAO, QUANTIZES_ON_CPU, release
from .configuration_openvla import hub_keywords
from .errors_openvla import OpenVLAImportError, OpenVLAValueError

TORCHAO_VERSION = (0, 18)  # the first one that this package was tested with
INT8_TORCH_VERSION = (2, 6)  # before, int8 products were wrong on CPUs without VNNI (pytorch/pytorch#136746)
# Formats of torchao by its classes of settings; a product's weights and inputs have it, with a scale per row.
TORCHAO_FORMATS = {
    "Int8DynamicActivationInt8WeightConfig": "int8",
    "Float8DynamicActivationFloat8WeightConfig": "float8",
}


def require_bitsandbytes() -> None:
    """Raise ImportError where bitsandbytes is missing, or this transformers version cannot use it on this machine."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OpenVLAImportError("8- and 4-bit weights need bitsandbytes: pip install 'openvla[quant]'")
    accelerators = [torch.cuda, getattr(torch, "xpu", None)]
    if not QUANTIZES_ON_CPU and not any(kind is not None and kind.is_available() for kind in accelerators):
        raise OpenVLAImportError(
            f"transformers {transformers.__version__} cannot use bitsandbytes without a GPU; install transformers 4.53 "
            "or later, or load in full precision. No weight was read."
        )


def require_torchao() -> None:
    """Raise ImportError where torchao is missing or too old, or this transformers version cannot save its weights."""
    if not LOADS_TORCHAO:
        raise OpenVLAImportError(
            f"transformers {transformers.__version__} cannot save and load weights of torchao; install transformers "
            "5.0 or later, or quantise by bitsandbytes. No weight was read."
        )
    found = importlib.util.find_spec("torchao") is not None
    if not found or release(importlib.metadata.version("torchao")) < TORCHAO_VERSION:
        raise OpenVLAImportError("These 8-bit weights need torchao 0.18 or later: pip install -U 'openvla[torchao]'")
    if release(torch.__version__) < INT8_TORCH_VERSION:
        raise OpenVLAImportError(f"Weights of torchao need torch 2.6 or later, this is {torch.__version__}.")


def is_quantized(model: nn.Module) -> bool:
    """Return whether bitsandbytes or torchao holds (part of) the model's weights."""
    in_bitsandbytes = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    return bool(in_bitsandbytes or is_torchao(model))


def is_torchao(model: nn.Module) -> bool:
    """Return whether torchao holds (part of) the model's weights."""
    return _method(getattr(model, "quantization_method", None)) == "torchao"


def quantization_name(model: Any) -> str | None:
    """Return "int8", "nf4", "fp4" (bitsandbytes), "torchao int8" or "torchao float8"; None if nothing is quantised."""
    if not is_quantized(model):
        return None
    if is_torchao(model):
        settings = type(model.config.quantization_config.quant_type).__name__
        return f"torchao {TORCHAO_FORMATS.get(settings, settings)}"
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    name: str = model.config.quantization_config.bnb_4bit_quant_type
    return name


def prepare_quantization(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]) -> None:
    """Check the quantization in the keywords of ``from_pretrained`` before it reads any weight, and set its dtype.

    Without a dtype, modules that are not quantised keep the checkpoint's; transformers 4.x would make them float16.

    Raises:
        ValueError: The checkpoint is already quantised.
        ImportError: bitsandbytes or torchao is missing, or this transformers version cannot use it on this machine.
    """
    requested = kwargs.get("quantization_config")
    if kwargs.get("load_in_8bit") or kwargs.get("load_in_4bit"):
        requested = requested or {"quant_method": "bitsandbytes"}
    config, stored = kwargs.get("config"), None
    if isinstance(config, PretrainedConfig):
        stored = getattr(config, "quantization_config", None)
    elif name_or_path is not None:
        fields, _ = PretrainedConfig.get_config_dict(name_or_path, **hub_keywords(kwargs))
        stored = fields.get("quantization_config")
    if requested is not None and stored is not None:
        raise OpenVLAValueError(
            f"{name_or_path} is already quantised; leave quantization_config (or bits) out, or load the checkpoint "
            "that it was made from."
        )
    method = _method(requested if requested is not None else stored)
    if method in ("bitsandbytes", "torchao"):
        require_torchao() if method == "torchao" else require_bitsandbytes()
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs[DTYPE_FIELD] = "auto"


def _method(quantization: Any) -> str | None:
    """Return ``quant_method`` of a quantization: a configuration, or its dictionary."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    return None if method is None else str(getattr(method, "value", method))


def require_scales(model: nn.Module) -> None:
    """Raise ValueError where a loaded model lacks quantisation scales, which transformers does not always notice."""
    wrong = [name for name, module in model.named_modules() if not _has_scales(module)]
    if wrong:
        raise OpenVLAValueError(f"The checkpoint lacks quantisation scales of {len(wrong)} modules: {wrong}.")


def forbid_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on some CPUs: sizes crash, and what it saves is not exact."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  bitsandbytes' attribute


def _has_scales(module: nn.Module) -> bool:
    """Return whether a module has the scales that its weight needs; True for a weight that is not quantised."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Int8Params":
        scales = getattr(weight, "SCB", None)
        return scales is not None and scales.numel() == weight.shape[0]
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        blocks = -(-state.shape.numel() // state.blocksize)
        return state.absmax.numel() == blocks and state.absmax.is_floating_point() != bool(state.nested)
    return True
