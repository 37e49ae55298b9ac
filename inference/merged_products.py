"""Matrix products of a layer: several linear layers of the same input as one product, where their weights allow it.

``merge_products`` lays the weights of queries, keys and values, and those of gate and up projection, side by side in
memory. The modules keep their parameters, which become views: saved names and values are unchanged. Where weights do
not lie side by side (adapters, quantised, moved or replaced weights) their products run one by one, so nothing has to
be undone when a model is changed. A merged product may round differently from its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Product = Callable[[torch.Tensor], torch.Tensor]


def merge_products(language_model: Any) -> int:
    """Lay weights that are multiplied with the same input side by side, in place; return the number of groups.

    Each group is copied once: in memory there is one group more for a moment.

    Args:
        language_model: A Llama, Mistral or Qwen2 model on one device. Other models are left as they are.
    """
    merged = 0
    for layer in getattr(language_model.get_decoder(), "layers", ()):
        for group in merged_groups(layer):
            if all(map(_is_plain_linear, group)) and merged_product(group) is None:
                for name in ("weight", "bias"):
                    parameters = [parameter for part in group if (parameter := getattr(part, name)) is not None]
                    if parameters:
                        together = torch.cat([parameter.data for parameter in parameters])
                        for parameter, view in zip(parameters, together.split(list(map(len, parameters)))):
                            parameter.data = view
                merged += 1
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the allocator could not use the weights' old memory for the next group
    return merged


def merged_groups(layer: Any) -> list[list[Any]]:
    """Return the linear layers of a decoder layer that have the same input: those of attention, and of the MLP."""
    names = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
    groups = [[getattr(getattr(layer, block, None), name, None) for name in names[block]] for block in names]
    return [group for group in groups if None not in group]


def _is_plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors that follow each other in one storage as one tensor; None where they do not."""
    first = tensors[0]
    end = first.storage_offset() + first.numel()
    for tensor in tensors[1:]:
        if tensor.storage_offset() != end or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += tensor.numel()
    if len({tensor.dtype for tensor in tensors}) > 1 or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    rows = sum(map(len, tensors))
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _merged_weights(group: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return weight and bias of linear layers as one; None where they do not lie side by side."""
    weight = _side_by_side([part.weight for part in group])
    biases = [part.bias for part in group if part.bias is not None]
    if weight is None or not biases:
        return None if weight is None else (weight, None)
    bias = _side_by_side(biases) if len(biases) == len(group) else None
    return None if bias is None else (weight, bias)


def product(linear: Any) -> Product:
    """Return what a linear layer, or what replaced it, computes on ``(tokens, size)``."""
    if _is_plain_linear(linear):
        weight, bias = linear.weight, linear.bias
        return lambda x: F.linear(x, weight, bias)
    if type(linear).__name__ == "PrepackedLinear":
        return linear.forward
    return lambda x: linear(x[None])[0]  # adapters and quantised weights expect a batch axis


def merged_product(group: Sequence[Any]) -> Product | None:
    """Return the outputs of linear layers, side by side, as one product; None where their weights are apart."""
    merged = _merged_weights(group) if all(map(_is_plain_linear, group)) else None
    if merged is None:
        return None
    weight, bias = merged
    return lambda x: F.linear(x, weight, bias)
