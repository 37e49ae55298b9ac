"""Decoder with a preallocated KV cache for Llama, Mistral and Qwen2.

It skips work that greedy action decoding does not need: the last layer computes attention and MLP, and the LM head
logits, only for the positions that are read. Draft tokens are verified in the prefill. Results equal those of
``decode_greedily`` up to floating-point reordering: a product of one row may round differently from that of many.

Layers are written out from the modules that transformers loaded: linear layers as products (``merged_products``),
norms, rotation and activation as kernels (``kernels``), adapters and quantised weights by calling their modules.
Nothing of the model is cached between two calls, so that every change of its weights counts. ``unsupported_reason``
says when the language model's own forward has to run instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..actions_openvla import ActionTokenizer, NormalizationStatistics, as_numbers
from ..compatibility_openvla import attention_implementation
from ..decoding_openvla import positions_of
from ..errors_openvla import OpenVLAValueError
from .cuda_graphs import Stages, drop_graphs, finish
from .kernels import COMPILED, PLAIN, Kernels, kernels_for
from .merged_products import Product, merged_groups, merged_product, product
from .patch_detection import any_hooked, changed_number, head_dim, is_hooked, patched_function, rotary_of

logger = logging.get_logger(__name__)

# Language models of one architecture: rotary positions, a norm before attention and one before a gated MLP.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
NORMS = tuple(f"{family.removesuffix('ForCausalLM')}RMSNorm" for family in FAMILIES)
SILU = ("SiLU", "SiLUActivation")
UNSCALED_ROTARY_FIELDS = {"rope_theta", "rope_type", "type"}
COMPILED_FLAG = "_pointwise_operations_are_compiled"  # an attribute of the language model


def unsupported_reason(language_model: nn.Module, length: int) -> str | None:
    """Return why ``FastDecoder`` cannot run this language model on ``length`` positions; None if it can."""
    config: Any = language_model.config
    name = type(language_model).__name__
    if name not in FAMILIES:
        return f"{name} is none of {', '.join(FAMILIES)}"
    if language_model.training:
        return "the model is in training mode"
    if attention_implementation(config) != "sdpa":
        return f"attention is {attention_implementation(config)}, not sdpa"
    rotary = _rotary_fields(config)
    if rotary.get("rope_type", rotary.get("type", "default")) != "default" or set(rotary) - UNSCALED_ROTARY_FIELDS:
        return f"its rotary positions are scaled: {rotary}"
    if getattr(config, "pretraining_tp", 1) > 1:
        return "its products are split (pretraining_tp)"
    has_window = getattr(config, "use_sliding_window", True)
    if has_window and (getattr(config, "sliding_window", None) or length) < length:
        return f"its attention slides over {config.sliding_window} positions, fewer than {length}"
    decoder = decoder_of(language_model)
    if is_hooked(decoder) or is_hooked(language_model) or is_hooked(decoder.norm):
        return "its decoder has hooks, or one of its methods was replaced"
    for layer in decoder.layers:
        if any_hooked(layer):
            return "its layers have hooks, methods of them were replaced, or they are spread over devices"
        for part in (layer, layer.self_attn, layer.mlp):
            if not type(part).__name__.startswith(name.removesuffix("ForCausalLM")):
                return f"a {type(part).__name__} is among its layers"
        if any(type(part).__name__ == "Linear8bitLt" for part in (*layer.self_attn.children(), *layer.mlp.children())):
            return "its weights are LLM.int8, where a row's result depends on the other rows of a product"
    return changed_number(language_model) or patched_function(language_model)


def _rotary_fields(config: Any) -> dict[str, Any]:
    """Return ``rope_theta`` and what scales it: one field, ``rope_parameters``, since 5.0, two before."""
    fields = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", None), **fields}


def decoder_of(language_model: Any) -> Any:
    """Return the transformer of a causal language model, without its LM head."""
    return language_model.get_decoder()


def compile_pointwise(model: Any) -> None:
    """Let torch.compile fuse the pointwise operations of the fast decoder: each norm, rotation and gate to one kernel.

    The first prediction waits for the compiler. Where compiling fails, one warning says so and the operations run
    uncompiled. Sums may be rounded in another order, as on another device.

    Args:
        model: An ``OpenVLAForActionPrediction`` in eval mode.

    Raises:
        ValueError: The fast decoder does not support the language model.
    """
    reason = unsupported_reason(model.language_model, 1)
    if reason:
        raise OpenVLAValueError(f"compile is for models that the fast decoder supports: {reason}.")
    setattr(model.language_model, COMPILED_FLAG, True)
    drop_graphs(model)  # they hold uncompiled operations


def rope_tables(
    frequencies: torch.Tensor, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines ``(length, head_dim)`` of rotary positions (Su et al. 2021), rounded as by transformers.

    The first half of the sines is negated, so that applying them needs no negation.

    Args:
        frequencies: ``(head_dim / 2,)``, read from the model at every call, so that a change of them counts.
        length: Number of positions.
        device: Device of the result.
        dtype: Dtype of the result.
    """
    angles = torch.arange(length, device=device)[:, None].float() * frequencies.to(device, torch.float32)
    sines, cosines = angles.sin().to(dtype), angles.cos().to(dtype)
    return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


def select(x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
    """Return some positions of ``(batch or 1, length, ...)``: a slice for all, or int64 ``(batch, count)``."""
    if isinstance(positions, slice):
        return x[:, positions]
    index = positions.view(*positions.shape, *[1] * (x.ndim - 2)).expand(*positions.shape, *x.shape[2:])
    return x.expand(len(positions), *x.shape[1:]).gather(1, index)


def _is_plain(module: Any, names: Sequence[str]) -> bool:
    """Return whether a module is one of transformers' or torch's classes with these names, with a plain weight or none.

    Its function may then run without it. It is asked at every call, so that a replaced or wrapped module counts.
    """
    kind = type(module)
    is_library_class = kind.__name__ in names and kind.__module__.startswith(("torch.", "transformers."))
    return is_library_class and type(getattr(module, "weight", None)) in (nn.Parameter, type(None))


class _Layer:
    """The functions of one decoder layer between its norms."""

    __slots__ = ("down", "gate_up", "gated_act", "output", "qkv")

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.output, self.down = product(attention.o_proj), product(mlp.down_proj)
        self.gated_act = kernels.gated_silu if _is_plain(mlp.act_fn, SILU) else _gated(mlp.act_fn)
        qkv, gate_up = merged_groups(layer)
        parts = [product(part) for part in qkv]
        self.qkv = merged_product(qkv) or (lambda x: torch.cat([part(x) for part in parts], dim=-1))
        both, gate, up = merged_product(gate_up), *(product(part) for part in gate_up)
        self.gate_up = (lambda x: (gate(x), up(x))) if both is None else (lambda x: both(x).chunk(2, dim=-1))


def _gated(activation: Product) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: activation(gate) * up


def _add_norm(norm: Any, kernels: Kernels) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that adds a block's output to the residual stream and applies the next norm to the sum."""
    if _is_plain(norm, NORMS):
        return functools.partial(kernels.add_rms_norm, weight=norm.weight, epsilon=norm.variance_epsilon)

    def add_norm(x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if delta is None else x + delta
        return total, norm(total[None])[0]

    return add_norm


class FastDecoder:
    """The layers of a language model with a KV cache, for one batch of sequences and one prediction.

    Args:
        language_model: One that ``unsupported_reason`` has no reason against.
        ref: Embeddings ``(batch, ..., hidden)`` that give batch size, dtype and device.
        length: Number of positions that the cache holds.
        mask: ``(batch, length)``, zero on left padding; None if nothing is masked.
        causal: Mask later positions; False for bidirectional attention.
    """

    def __init__(
        self,
        language_model: nn.Module,
        ref: torch.Tensor,
        length: int,
        mask: torch.Tensor | None = None,
        causal: bool = True,
    ) -> None:
        config: Any = language_model.config
        decoder = decoder_of(language_model)
        # The norm before each layer's attention, the one before its MLP, and the one after the last layer, in order.
        norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        norms.append(decoder.norm)
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.kernels = kernels_for(ref.device, ref.dtype)
        has_one_dtype = all(getattr(norm, "weight", ref).dtype == ref.dtype for norm in norms)
        if getattr(language_model, COMPILED_FLAG, False):
            self.kernels = COMPILED
        elif not has_one_dtype or self.head_dim & (self.head_dim - 1):  # Triton's blocks are powers of two
            self.kernels = PLAIN
        self.layers = [_Layer(layer, self.kernels) for layer in decoder.layers]
        self.add_norms = [_add_norm(norm, self.kernels) for norm in norms]
        self.visible, self.causal = None if mask is None else mask.to(torch.bool), causal
        self.positions = torch.arange(length, device=ref.device)[None]
        tables = rope_tables(rotary_of(decoder).inv_freq, length, ref.device, ref.dtype)
        position_ids = self.positions if mask is None else positions_of(mask)
        self.rope = [table[position_ids][:, :, None].expand(len(ref), -1, -1, -1) for table in tables]
        # A bidirectional sequence cannot be continued, so that its layers share one cache.
        num_caches = len(self.layers) if causal else 1
        shape = (2, num_caches, len(ref), length, self.num_kv_heads, self.head_dim)
        self.cache = torch.empty(shape, dtype=ref.dtype, device=ref.device)

    def run(self, x: torch.Tensor, start: int, read: slice | torch.Tensor | None = None) -> torch.Tensor:
        """Return normalised last hidden states of some positions; keys and values of all go into the cache.

        Args:
            x: Embeddings ``(batch, count, hidden)``.
            start: Position of the first of them; positions before it were run before.
            read: Which of them are returned: a slice, or int64 ``(batch, read)``; None for all.

        Returns:
            ``(batch, read, hidden)``.
        """
        batch, count, size = x.shape
        end = start + count
        positions = self.positions[:, start:end]
        rope = [table[:, start:end] for table in self.rope]
        mask = self._mask(positions, end)
        keys, values = (part.transpose(2, 3).unbind() for part in self.cache[:, :, :, :end])
        new_keys, new_values = (part.unbind() for part in self.cache[:, :, :, start:end])
        x, normed = self.add_norms[0](x.reshape(-1, size), None)
        for index, layer in enumerate(self.layers):
            layer_idx = index % len(keys)
            queries = self.kernels.rotate_and_cache(
                layer.qkv(normed), *rope, new_keys[layer_idx], new_values[layer_idx]
            )
            if read is not None and index == len(self.layers) - 1:
                queries, x = select(queries, read), select(x.view(batch, count, size), read).flatten(0, 1)
                mask = self._mask(select(positions, read), end)
            attended = layer.output(self._attention(queries, keys[layer_idx], values[layer_idx], *mask))
            x, normed = self.add_norms[2 * index + 1](x, attended)
            x, normed = self.add_norms[2 * index + 2](x, layer.down(layer.gated_act(*layer.gate_up(normed))))
        return normed.view(batch, -1, size)

    def _attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """Return attention output ``(batch * count, heads * head_dim)`` for queries ``(batch, count, heads, dim)``."""
        if self.num_kv_heads != self.num_heads:
            keys, values = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (keys, values))
        queries = queries.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=is_causal)
        return mixed.transpose(1, 2).reshape(-1, self.num_heads * self.head_dim)

    def _mask(self, queries: torch.Tensor, end: int) -> tuple[torch.Tensor | None, bool]:
        """Return which keys queries at positions ``(batch or 1, count)`` attend to.

        Padding attends to itself, so that no softmax is over nothing.

        Returns:
            bool ``(batch or 1, 1, count, end)``, or None; and whether attention is causal without a mask.
        """
        if self.visible is None and (not self.causal or queries.shape[1] == 1):
            return None, False
        if self.visible is None and queries.shape[1] == end:
            return None, True
        queries, keys = queries[:, None, :, None], self.positions[:, None, None, :end]
        attended = keys <= queries if self.causal else torch.ones_like(keys <= queries)
        if self.visible is not None:
            attended = attended & self.visible[:, None, None, :end] | (keys == queries)
        return attended, False


def encode_decoded(tokenizer: ActionTokenizer, actions: np.ndarray) -> np.ndarray:
    """Return the token ids of decoded actions, int64 of the same shape: the inverse of ``tokenizer.decode``.

    Two tokens decode to the highest bin; this returns the one of the top edge, because training clips saturated labels
    (such as an open gripper) to +1, which encodes to it.
    """
    tokens = tokenizer.encode(actions)
    return np.where(tokens == tokenizer.first_token_id + 1, tokenizer.first_token_id, tokens)


def encode_draft(draft: Any, tokenizer: ActionTokenizer, statistics: Sequence[NormalizationStatistics]) -> torch.Tensor:
    """Return the tokens of a draft action, all but the last: int64 ``(batch, action_dim - 1)``.

    Args:
        draft: Robot units, ``(action_dim,)`` or ``(batch, action_dim)``.
        tokenizer: The model's action tokenizer.
        statistics: Statistics of each sample.

    Raises:
        ValueError: The draft has another shape.
    """
    actions = np.atleast_2d(as_numbers(draft, "draft"))
    if actions.shape != (len(statistics), statistics[0].dimension):
        expected = f"({len(statistics)}, {statistics[0].dimension})"
        raise OpenVLAValueError(f"draft must be one action a sample, {expected}, got shape {np.shape(draft)}.")
    tokens = [encode_decoded(tokenizer, entry.normalize(action)) for entry, action in zip(statistics, actions)]
    return torch.from_numpy(np.stack(tokens)[:, :-1])


class _Decoding:
    """Greedy decoding of one batch: tokens and logits of every step are written into one tensor each.

    Args:
        language_model: One that ``unsupported_reason`` has no reason against.
        embeds: Embeddings of the prompts ``(batch, length, hidden)``, left-padded.
        mask: int64 ``(batch, length)``; None if nothing is masked.
        steps: Number of tokens.
        allowed: Token ids to choose from; None for all.
    """

    def __init__(
        self, language_model: Any, embeds: torch.Tensor, mask: torch.Tensor | None, steps: int, allowed: slice | None
    ) -> None:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), steps - 1)], dim=1)
        self.embeds, self.steps, self.allowed = embeds, steps, allowed
        self.decoder = FastDecoder(language_model, embeds, embeds.shape[1] + steps - 1, mask)
        self.embed, self.head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        self.tokens = torch.empty(len(embeds), steps, dtype=torch.int64, device=embeds.device)
        self.logits = embeds.new_empty(len(embeds), 0, 0)  # ``(batch, steps, vocabulary)`` from the prefill on

    def prefill(self, draft: torch.Tensor | None) -> None:
        """Run the prompt and choose the first token; with a draft choose the token after each of its tokens, too."""
        x, count = self.embeds, 1
        if draft is not None:
            x, count = torch.cat([x, self.embed(draft).to(x.dtype)], dim=1), self.steps
        logits = self.head(self.decoder.run(x, 0, slice(x.shape[1] - count, None)))
        self.logits = logits.new_empty(len(logits), self.steps, logits.shape[2])
        self._choose(logits, 0)

    def step(self, step: int) -> None:
        """Run the token before a step and choose the token of the step."""
        x = self.embed(self.tokens[:, step - 1 : step]).to(self.embeds.dtype)
        self._choose(self.head(self.decoder.run(x, self.embeds.shape[1] + step - 1)), step)

    def _choose(self, logits: torch.Tensor, step: int) -> None:
        batch, count, vocab_size = logits.shape
        chosen = self.decoder.kernels.choose_tokens(logits.reshape(-1, vocab_size), self.allowed)
        self.tokens[:, step : step + count] = chosen.view(batch, count)
        self.logits[:, step : step + count] = logits


def decode_in_stages(
    language_model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    steps: int,
    allowed: slice | None = None,
    draft: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | Stages:
    """Return what ``decode_fast`` returns, logits in the model's dtype; with a draft, the stages that compute it.

    The first stage verifies the draft in the prefill; each later one is a decode step. Only between the first and the
    others is the device waited for: it says how many steps the draft saved.
    """
    decoding = _Decoding(language_model, embeds, mask, steps, allowed)
    decoding.prefill(draft)
    if draft is None:
        for step in range(1, steps):
            decoding.step(step)
        return decoding.tokens, decoding.logits
    num_accepted = (decoding.tokens[:, :-1] == draft).all(0).long().cumprod(0).sum()
    later = [functools.partial(decoding.step, step) for step in range(1, steps)]
    return Stages((decoding.tokens, decoding.logits), later, num_accepted)


def decode_fast(
    language_model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.Tensor | None,
    steps: int,
    allowed: slice | None = None,
    draft: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``decode_greedily`` returns, unchecked; without a draft it never synchronises with the device.

    Args:
        language_model: One that ``unsupported_reason`` has no reason against.
        embeds: ``(batch, length, hidden)``, left-padded.
        mask: int64 ``(batch, length)``; None if nothing is masked.
        steps: Number of tokens.
        allowed: Token ids to choose from; None for all.
        draft: int64 ``(batch, steps - 1)``, a guess of all tokens but the last. The leading ones that every sample
            would have chosen itself are accepted and need no decode step; the rest is dropped.

    Returns:
        int64 tokens ``(batch, steps)`` and the float32 logits ``(batch, steps, vocabulary)`` they were chosen from.
    """
    tokens, logits = finish(decode_in_stages(language_model, embeds, mask, steps, allowed, draft))
    return tokens, logits.float()


def bidirectional_hidden_states(
    language_model: nn.Module, embeds: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """Return last hidden states of some positions from one pass in which every position attends to every visible one.

    Args:
        language_model: One that ``unsupported_reason`` has no reason against.
        embeds: ``(batch, length, hidden)``, left-padded.
        mask: ``(batch, length)``; None if nothing is masked.
        positions: int64 ``(batch, count)``.

    Returns:
        ``(batch, count, hidden)``.
    """
    return FastDecoder(language_model, embeds, embeds.shape[1], mask, causal=False).run(embeds, 0, positions)
