"""8- and 4-bit weights of bitsandbytes: checks and exact saving, which bitsandbytes and transformers lack."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .compatibility_openvla import DTYPE_FIELD, QUANTIZES_ON_CPU
from .configuration_openvla import hub_keywords
from .errors_openvla import OpenVLAImportError, OpenVLAValueError

LOADED_STATE = "loaded_quant_state"  # attribute of a module: bitsandbytes' state as it was loaded

# Measured: docs/quantising.md.
SLOW_ON_CPU = (
    "8-bit weights are slow on a CPU: an action took 1.6 to 3.3 times as long as with whole weights, in 4 bits 1.3 to "
    "2.1 times. Take bits=4 for less memory, or whole weights for speed (dtype=torch.bfloat16 for half of float32's "
    "memory)."
)
CPU_PACKING_ROWS = 32  # rows of a weight matrix that bitsandbytes packs together for AVX512-BF16


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


def is_quantized(model: nn.Module) -> bool:
    """Return whether bitsandbytes holds (part of) the model's weights."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def quantization_name(model: PreTrainedModel) -> str | None:
    """Return the format of the quantised weights: "int8", "nf4" or "fp4"; None for an unquantised model."""
    if not is_quantized(model):
        return None
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    name: str = getattr(model.config, "quantization_config").bnb_4bit_quant_type  # noqa: B009  set by transformers
    return name


def prepare_quantization(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]) -> None:
    """Check the quantization in the keywords of ``from_pretrained`` before it reads any weight, and set its dtype.

    Without a dtype, modules that are not quantised keep the checkpoint's; transformers 4.x would make them float16.

    Raises:
        ValueError: The checkpoint is already quantised.
        ImportError: bitsandbytes is missing, or this transformers version cannot use it on this machine.
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
    if _method(requested if requested is not None else stored) == "bitsandbytes":
        require_bitsandbytes()
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs[DTYPE_FIELD] = "auto"


def _method(quantization: Any) -> str | None:
    """Return ``quant_method`` of a quantization: a configuration, or its dictionary."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    return None if method is None else str(getattr(method, "value", method))


def prepare_quantized_weights(model: nn.Module) -> None:
    """Check the scales of a loaded model and keep them; switch off repacking that would fail.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first prediction, rounds their scales to
    bfloat16 and computes in it, whatever the compute dtype; on sizes that it cannot divide, such as SigLIP's 4304, it
    crashes. The scales that it restores when the model is saved or trained are not the loaded ones, so those are kept
    (1.6 % of the weights, 6 % without double quantisation).

    Raises:
        ValueError: Scales are missing, which transformers does not always notice.
    """
    wrong = [name for name, module in model.named_modules() if not _has_scales(module)]
    if wrong:
        raise OpenVLAValueError(f"The checkpoint lacks quantisation scales of {len(wrong)} modules: {wrong}.")
    if getattr(model, "is_loaded_in_8bit", False):
        bitsandbytes_log = logging.getLogger("bitsandbytes.autograd._functions")
        if _drop_float16_line not in bitsandbytes_log.filters:
            bitsandbytes_log.addFilter(_drop_float16_line)
        if any(type(p).__name__ == "Int8Params" and p.device.type == "cpu" for p in model.parameters()):
            transformers_logging.get_logger(__name__).warning_once(SLOW_ON_CPU)
    for module in model.modules():
        state = _quant_state(module)
        if state is not None:
            setattr(module, LOADED_STATE, copy.copy(state))
            rows, columns = state.shape
            packs = rows % CPU_PACKING_ROWS == 0 and columns % state.blocksize == 0
            if not packs or getattr(module, "compute_dtype", None) is not torch.bfloat16:
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  bitsandbytes' attribute


def undo_cpu_packing(model: nn.Module) -> None:
    """Restore the layout and the scales with which repacked 4-bit weights were loaded."""
    for module in model.modules():
        state = _quant_state(module)
        if state is None or not getattr(state, "packing_format_for_cpu", False):
            continue
        loaded = getattr(module, LOADED_STATE, None)
        if loaded is None:
            raise OpenVLAValueError(
                "These 4-bit weights were repacked for the CPU before this model could keep their scales, so they "
                "can no longer be saved or trained exactly; load them again with from_pretrained."
            )
        state.original_nested = False  # the scales are restored below, not recomputed
        unpack = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
        weight: Any = module.weight
        weight.data, _ = unpack(weight.data, state)
        weight.quant_state = copy.copy(loaded)
        setattr(module, "quant_state", weight.quant_state)  # noqa: B010  bitsandbytes' attribute


def require_no_move(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raise ValueError where arguments of ``to`` name another device, or a dtype, for a quantised model."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    current = next(model.parameters()).device
    moves = device is not None and (device.type, device.index or 0) != (current.type, current.index or 0)
    if moves or dtype is not None:
        raise OpenVLAValueError(
            f"A quantised model stays on the device and in the dtype that it was loaded with ({current}); load it "
            "where it should be, from_pretrained(..., device_map={'': 'cuda'}), and leave .to() out."
        )


def _quant_state(module: nn.Module) -> Any:
    """Return bitsandbytes' state of a module's 4-bit weight (scales, shape, block size); None for another module."""
    return getattr(getattr(module, "weight", None), "quant_state", None)


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


def _drop_float16_line(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' log line about casting inputs to float16."""
    return "inputs will be cast from" not in str(record.msg)
