"""Methods of models with 8- and 4-bit weights: exact saving and training, which bitsandbytes lacks, and no moving.

``loading.attach_package`` gives them to ``PrismaticPreTrainedModel``; every other model does as transformers does.
"""

from __future__ import annotations

import copy
import importlib
import logging as std_logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..adapters.targets import forbid_torchao
from ..errors_openvla import OpenVLAValueError
from ..quantization_openvla import is_quantized, is_torchao

logger = logging.get_logger(__name__)

LOADED_STATE = "loaded_quant_state"  # attribute of a module: bitsandbytes' state as it was loaded
# Measured: docs/quantising.md.
SLOW_ON_CPU = (
    "8-bit weights are slow on a CPU: an action took 1.6 to 3.3 times as long as with whole weights, in 4 bits 1.3 to "
    "2.1 times. Take bits=4 for less memory, or whole weights for speed (dtype=torch.bfloat16 for half of float32's "
    "memory)."
)
CPU_PACKING_ROWS = 32  # rows of a weight matrix that bitsandbytes packs together for AVX512-BF16


def keep_quantized_weights(model: nn.Module) -> None:
    """Keep the scales of a loaded model; switch off repacking that would fail, and a log line at every product.

    Weights of torchao are frozen with the rest of their model: no gradient passes through their products, so that what
    is trained below them would get a wrong one.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first prediction, rounds their scales to
    bfloat16 and computes in it, whatever the compute dtype; on sizes that it cannot divide, such as SigLIP's 4304, it
    crashes. The scales that it restores when the model is saved or trained are not the loaded ones, so those are kept
    (1.6 % of the weights, 6 % without double quantisation).
    """
    if is_torchao(model):
        model.requires_grad_(False)
    if getattr(model, "is_loaded_in_8bit", False):
        bitsandbytes_log = std_logging.getLogger("bitsandbytes.autograd._functions")
        if _drop_float16_line not in bitsandbytes_log.filters:
            bitsandbytes_log.addFilter(_drop_float16_line)
        if any(type(p).__name__ == "Int8Params" and p.device.type == "cpu" for p in model.parameters()):
            logger.warning_once(SLOW_ON_CPU)
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


def state_dict(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Return the state dict, with quantised weights as they were loaded."""
    undo_cpu_packing(model)
    return PreTrainedModel.state_dict(model, *args, **kwargs)


def train(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """Set training mode, with quantised weights as they were loaded.

    Raises:
        ValueError: The weights are of torchao, through which no gradient passes.
    """
    if mode:
        forbid_torchao(model, "train")
        undo_cpu_packing(model)
    return PreTrainedModel.train(model, mode)


def to(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """Move or cast as torch does.

    Raises:
        ValueError: The model is quantised, and this names another device, or a dtype.
    """
    if is_quantized(model):
        _require_no_move(model, *args, **kwargs)
        return model
    moved: PreTrainedModel = PreTrainedModel.to(model, *args, **kwargs)
    return moved


def cuda(model: PreTrainedModel, device: int | str | torch.device | None = None) -> PreTrainedModel:
    """Move to a GPU, as ``to`` does."""
    return to(model, torch.device("cuda", device) if isinstance(device, int) else device or "cuda")


def _require_no_move(model: nn.Module, *args: Any, **kwargs: Any) -> None:
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


def _drop_float16_line(record: std_logging.LogRecord) -> bool:
    """Return False for bitsandbytes' log line about casting inputs to float16."""
    return "inputs will be cast from" not in str(record.msg)


METHODS: tuple[Callable[..., Any], ...] = (state_dict, train, to, cuda)  # of the model
