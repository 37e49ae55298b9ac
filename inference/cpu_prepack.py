"""Linear layers whose weights are laid out once for the CPU's matrix products.

oneDNN, which torch multiplies with, needs weights in its own blocked layout. A plain ``Linear`` reorders them at every
prediction, which in bfloat16 takes as long as the product of one row. Here only the reordered weights are kept: nothing
needs more memory, and the weights cannot be changed unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors_openvla import OpenVLAValueError
from ..quantization_openvla import is_quantized, quantization_name

NUM_ROWS = 256  # rows of a product that the layout is chosen for: patches and prompt; it is fast for one row too
DTYPES = (torch.bfloat16, torch.float32)


class PrepackedLinear(nn.Module):
    """``Linear`` with reordered weights, for inference only; a saved folder holds the plain weight.

    Args:
        linear: On a CPU, in bfloat16 or float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), NUM_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            raise RuntimeError("Prepacked weights are for inference only; to train, load the model without prepack.")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.packed.to_dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Prepacked weights cannot be loaded into; load the model without prepack.")

    def __deepcopy__(self, memo: dict[int, Any]) -> PrepackedLinear:
        """Return the same layer: packed weights never change, so that copies share them."""
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.packed.dtype}"


def has_matmul(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies in one of ``DTYPES`` on this CPU."""
    return dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(model: PreTrainedModel) -> None:
    """Replace all linear layers but the output embeddings by prepacked ones, in place.

    Args:
        model: On a CPU, in bfloat16 or float32, neither quantised nor with adapters. Afterwards it can predict and be
            saved, but not be trained, adapted, quantised or moved.

    Raises:
        ValueError: The model is on another device or of another kind, this torch has no oneDNN, or oneDNN has no
            bfloat16 on this CPU.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        raise OpenVLAValueError("prepack needs a torch with oneDNN, as its CPU builds have.")
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    if not kinds <= {("cpu", dtype) for dtype in DTYPES}:
        got = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise OpenVLAValueError(f"prepack is for whole weights on a CPU in bfloat16 or float32, not for {got}.")
    if is_quantized(model):
        raise OpenVLAValueError(f"prepack is for whole weights, not for {quantization_name(model)}.")
    if not all(has_matmul(dtype) for _, dtype in kinds):
        raise OpenVLAValueError("prepack needs AVX-512 for bfloat16, which this CPU has not; give dtype='float32'.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise OpenVLAValueError("prepack is for a model without adapters; merge them first (model.merge_lora()).")
    output_embeddings = model.get_output_embeddings()  # transformers reads its weight
    # A list of the linear layers would keep every plain weight alive to the end.
    for parent in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child is not output_embeddings:
                setattr(parent, name, PrepackedLinear(child))
