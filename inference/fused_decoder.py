"""Fast decoder with fused kernels, for a GPU: per layer three kernels beside products and attention.

``merge_products`` lays the weights of queries, keys and values, and those of gate and up projection, side by side in
memory, so that each group is one product. The modules keep their parameters, which become views: saved names and values
are unchanged. Where weights do not lie side by side (adapters, quantised or replaced weights) their products run one by
one, so nothing has to be undone when a model is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fast_decoder import COMPILED_FLAG, NORMS, FastDecoder, Function, decoder_of, functional, select
from .fused_kernels import PLAIN, kernels_for
from .patch_detection import head_dim


def merge_products(language_model: nn.Module) -> int:
    """Lay weights that are multiplied with the same input side by side, in place; return the number of groups.

    Each group is copied once, so that a layer's weights are in memory twice for a moment.
    """
    merged = 0
    for layer in decoder_of(language_model).layers:
        for group in _groups(layer):
            if all(_is_plain_linear(part) for part in group) and _merged_weight(group) is None:
                for name in ("weight", "bias"):
                    parameters = [getattr(part, name) for part in group]
                    if parameters[0] is not None:
                        together = torch.cat([parameter.data for parameter in parameters])
                        for parameter, view in zip(parameters, together.split([len(p) for p in parameters])):
                            parameter.data = view
                merged += 1
    return merged


def _groups(layer: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)


def _is_plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors that follow each other in one storage as one tensor; None where they do not."""
    first, end = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        follows = tensor.untyped_storage().data_ptr() == storage and tensor.storage_offset() == end
        if not follows or not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        end += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _merged_weight(group: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return weight and bias of linear layers as one; None where they do not lie side by side."""
    weight = _side_by_side([part.weight.data for part in group])
    if weight is None or group[0].bias is None:
        return None if weight is None or any(part.bias is not None for part in group) else (weight, None)
    bias = None if any(part.bias is None for part in group) else _side_by_side([part.bias.data for part in group])
    return None if bias is None else (weight, bias)


def _product(group: Sequence[Any]) -> Function:
    """Return a function for the outputs of linear layers side by side, ``(tokens, sum of sizes)``."""
    if all(_is_plain_linear(part) for part in group):
        merged = _merged_weight(group)
        if merged is not None:
            weight, bias = merged
            return lambda x: F.linear(x, weight, bias)
    parts = [functional(part) for part in group]
    return lambda x: torch.cat([part(x) for part in parts], dim=-1)


class FusedDecoder(FastDecoder):
    """``FastDecoder`` whose pointwise operations are fused kernels; its results are those of ``FastDecoder``.

    A product of merged weights may round differently from those of its parts.
    """

    @staticmethod
    def supports(language_model: nn.Module, reference: torch.Tensor) -> bool:
        """Return whether Triton's kernels can run a language model on the device and in the dtype of a tensor."""
        config: Any = language_model.config
        decoder = decoder_of(language_model)
        norms = [decoder.norm]
        for layer in decoder.layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        size = head_dim(config)
        return (
            kernels_for(reference.device) is not PLAIN
            and not getattr(language_model, COMPILED_FLAG, False)
            and size & (size - 1) == 0
            and all(type(norm).__name__ in NORMS and norm.weight.dtype == reference.dtype for norm in norms)
            and all(functional(layer.mlp.act_fn) is F.silu for layer in decoder.layers)
        )

    def __init__(
        self,
        language_model: nn.Module,
        ref: torch.Tensor,
        length: int,
        mask: torch.Tensor | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__(language_model, ref, length, mask, causal)
        decoder = decoder_of(language_model)
        self.kernels = kernels_for(ref.device)
        self.products = [tuple(map(_product, _groups(layer))) for layer in decoder.layers]
        # The norm before each layer's attention, before its MLP, and after the last layer, in order.
        norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in (*norms, decoder.norm)]

    def run(self, x: torch.Tensor, start: int, read: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Return normalised last hidden states of some positions, as ``FastDecoder.run``."""
        batch, count, size = x.shape
        end = start + count
        rope, positions = self.rope.select(slice(start, end)), self.positions[:, start:end]
        cosines, sines = (table.expand(batch, -1, -1, -1).reshape(-1, self.head_dim) for table in rope)
        mask = self._mask(positions, end)
        kv = [part.transpose(2, 3).unbind() for part in self.cache[:, :, :, :end]]
        new_keys, new_values = (part.unbind() for part in self.cache[:, :, :, start:end])
        add_rms_norm, gated_silu = self.kernels.add_rms_norm, self.kernels.gated_silu
        x, normed = add_rms_norm(x.reshape(-1, size), None, *self.norms[0])
        for index, layer in enumerate(self.layers):
            layer_idx, (qkv, gate_up) = index % len(kv[0]), self.products[index]
            queries = self.kernels.rotate_and_cache(
                qkv(normed), cosines, sines, new_keys[layer_idx], new_values[layer_idx]
            )
            if read is not None and index == len(self.layers) - 1:
                queries, x = select(queries, read), select(x.view(batch, count, size), read).flatten(0, 1)
                mask = self._mask(select(positions, read), end)
            mixed = layer.output(self._attention(queries, kv[0][layer_idx], kv[1][layer_idx], *mask))
            x, normed = add_rms_norm(x, mixed, *self.norms[2 * index + 1])
            x, normed = add_rms_norm(x, layer.down(gated_silu(gate_up(normed))), *self.norms[2 * index + 2])
        return normed.view(batch, -1, size)
