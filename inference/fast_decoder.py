"""Decoder with a preallocated KV cache for Llama, Mistral and Qwen2.

It skips work that greedy action decoding does not need: the last layer computes queries, attention output and MLP, and
the LM head logits, only for the positions that are read. Draft tokens are verified in the prefill. Results equal those
of ``decode_greedily`` up to floating-point reordering: a product of one row may round differently from that of many.

Layers are written out from the modules that transformers loaded: linear layers and norms as plain functions, adapters
and quantised weights by calling their modules. Nothing of the model is cached between two calls, so that every change
of its weights counts. ``unsupported_reason`` says when the language model's own forward has to run instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..actions_openvla import ActionTokenizer, NormalizationStatistics, as_numbers
from ..compatibility_openvla import attention_implementation
from ..decoding_openvla import mask_logits, positions_of
from ..errors_openvla import OpenVLAValueError
from .cuda_graphs import drop_graphs
from .patch_detection import any_hooked, changed_number, head_dim, is_hooked, patched_function, rotary_of

logger = logging.get_logger(__name__)

# Language models of one architecture: rotary positions, a norm before attention and one before a gated MLP.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
NORMS = tuple(f"{family.removesuffix('ForCausalLM')}RMSNorm" for family in FAMILIES)
UNSCALED_ROTARY_FIELDS = {"rope_theta", "rope_type", "type"}
COMPILED_FLAG = "_pointwise_operations_are_compiled"  # an attribute of the language model
Function = Callable[[torch.Tensor], torch.Tensor]


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


class _CompiledOp:
    """A pointwise function compiled to one kernel; the function itself where torch.compile does not work."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.compiled: Callable[..., torch.Tensor] | None = None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.compiled is None:
            import torch._inductor.config as settings

            # Round between the operations as they do when they run one by one.
            options: dict[str, Any] = (
                {"emulate_precision_casts": True} if hasattr(settings, "emulate_precision_casts") else {}
            )
            self.compiled = torch.compile(self.function, dynamic=True, options=options)
        if self.compiled is not self.function:
            try:
                return self.compiled(*tensors)
            except Exception as error:  # the compiler raises errors of many kinds
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning_once(f"Running uncompiled: torch.compile failed with {reason[0]}.")
                self.compiled = self.function
        return self.function(*tensors)


class Rope(NamedTuple):
    """Rotary position embedding (Su et al. 2021), ``(batch or 1, length, 1, head_dim)`` each.

    Attributes:
        cos: Cosines.
        sin: Sines, the first half negated, so that applying them needs no negation.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def select(self, positions: slice | torch.Tensor) -> Rope:
        """Return the embedding of some positions, as ``_select`` takes them."""
        return Rope(_select(self.cos, positions), _select(self.sin, positions))


def _rope_tables(
    frequencies: torch.Tensor, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines ``(length, head_dim)`` of rotary positions, rounded as transformers does.

    Args:
        frequencies: ``(head_dim / 2,)``, read from the model at every call, so that a change of them counts.
        length: Number of positions.
        device: Device of the result.
        dtype: Dtype of the result.
    """
    angles = torch.arange(length, device=device)[:, None].float() * frequencies.to(device, torch.float32)
    sines, cosines = angles.sin().to(dtype), angles.cos().to(dtype)
    return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


def _apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1) * sin)


def _select(x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
    """Return some positions of ``(batch or 1, length, ...)``: a slice for all, or int64 ``(batch, count)``."""
    if isinstance(positions, slice):
        return x[:, positions]
    index = positions.view(*positions.shape, *[1] * (x.ndim - 2)).expand(*positions.shape, *x.shape[2:])
    return x.expand(len(positions), *x.shape[1:]).gather(1, index)


def _functional(module: Any, compiled: bool = False) -> Function:
    """Return what a module computes on ``(tokens, size)`` as a plain function, or the module where it is not plain.

    It is made for every call, so that weights which were changed, moved, wrapped or quantised count.

    Args:
        module: A linear layer, a norm, an activation, or what replaced it.
        compiled: Compile a norm to one kernel.
    """
    kind = type(module)
    weight: Any = getattr(module, "weight", None)
    library_name = kind.__name__ if kind.__module__.startswith(("torch.", "transformers.")) else None
    is_plain = weight is None or type(weight) is nn.Parameter
    if is_plain:
        if kind is nn.Linear:
            bias = module.bias
            return lambda x: F.linear(x, weight, bias)
        if library_name in NORMS:
            if compiled:
                norm = _compiled_norm(module.variance_epsilon)
                return lambda x: norm(x, weight)
            epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32, device="cpu")  # faster than a float
            return functools.partial(_rms_norm, weight=weight, epsilon=epsilon)
        if library_name in ("SiLU", "SiLUActivation"):
            return F.silu
        if kind.__name__ == "PrepackedLinear":
            return module.forward
    return lambda x: module(x[None])[0]  # adapters and quantised weights expect a batch axis


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor | float) -> torch.Tensor:
    """Return RMSNorm (Zhang and Sennrich 2019), rounded where transformers rounds."""
    exact = x if x.dtype is torch.float32 else x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True).add_(epsilon))
    return weight * (exact if x.dtype is torch.float32 else exact.to(x.dtype))


def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


@functools.cache
def _compiled_norm(epsilon: float) -> _CompiledOp:
    return _CompiledOp(lambda x, weight: _rms_norm(x, weight, epsilon))


_compiled_rope, _compiled_gated_silu = _CompiledOp(_apply_rope), _CompiledOp(_gated_silu)


class _Layer:
    """The functions of one decoder layer."""

    __slots__ = ("down", "gate", "gated_act", "input_norm", "key", "output", "post_attn_norm", "query", "up", "value")

    def __init__(self, layer: Any, compiled: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = _functional(layer.input_layernorm, compiled)
        self.post_attn_norm = _functional(layer.post_attention_layernorm, compiled)
        self.query, self.key = _functional(attention.q_proj), _functional(attention.k_proj)
        self.value, self.output = _functional(attention.v_proj), _functional(attention.o_proj)
        self.gate, self.up, self.down = (_functional(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.gated_act = _gated_activation(_functional(mlp.act_fn), compiled)


def _gated_activation(activation: Function, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if activation is F.silu:
        return _compiled_gated_silu if compiled else _gated_silu
    return lambda gate, up: activation(gate) * up


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
        compiled = getattr(language_model, COMPILED_FLAG, False)
        self.layers = [_Layer(layer, compiled) for layer in decoder.layers]
        self.norm = _functional(decoder.norm, compiled)
        self.apply_rope: Callable[..., torch.Tensor] = _compiled_rope if compiled else _apply_rope
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.visible, self.causal = None if mask is None else mask.to(torch.bool), causal
        self.positions = torch.arange(length, device=ref.device)[None]
        tables = _rope_tables(rotary_of(decoder).inv_freq, length, ref.device, ref.dtype)
        position_ids = self.positions if mask is None else positions_of(mask)
        self.rope = Rope(*(table[position_ids][:, :, None] for table in tables))
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
        rope, positions = self.rope.select(slice(start, end)), self.positions[:, start:end]
        mask = self._mask(positions, end)
        kv = [part.transpose(2, 3).unbind() for part in self.cache[:, :, :, :end]]
        new_kv = [part.unbind() for part in self.cache[:, :, :, start:end]]
        x, by_head = x.reshape(-1, size), (batch, count, -1, self.head_dim)
        for index, layer in enumerate(self.layers):
            layer_idx = index % len(kv[0])
            normed = layer.input_norm(x)
            new_kv[1][layer_idx].copy_(layer.value(normed).view(by_head))
            if read is not None and index == len(self.layers) - 1:
                new_kv[0][layer_idx].copy_(self.apply_rope(layer.key(normed).view(by_head), *rope))
                x, normed = (_select(y.view(batch, count, size), read).flatten(0, 1) for y in (x, normed))
                rope, mask = rope.select(read), self._mask(_select(positions, read), end)
                queries = self.apply_rope(layer.query(normed).view(batch, -1, self.num_heads, self.head_dim), *rope)
            else:
                both = torch.cat([layer.query(normed), layer.key(normed)], dim=-1).view(by_head)
                both = self.apply_rope(both, *rope)
                queries, keys = torch.split_with_sizes(both, (self.num_heads, self.num_kv_heads), 2)
                new_kv[0][layer_idx].copy_(keys)
            x = x + layer.output(self._attention(queries, kv[0][layer_idx], kv[1][layer_idx], *mask))
            normed = layer.post_attn_norm(x)
            x = x + layer.down(layer.gated_act(layer.gate(normed), layer.up(normed)))
        return self.norm(x).view(batch, -1, size)

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
    length, num_later = embeds.shape[1], steps - 1
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), num_later)], dim=1)
    decoder = FastDecoder(language_model, embeds, length + num_later, mask)
    model: Any = language_model
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()

    def choose(x: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        read = None if x.shape[1] == count else slice(x.shape[1] - count, None)
        logits = head(decoder.run(x.to(embeds.dtype), start, read)).float()
        return (logits if allowed is None else mask_logits(logits, allowed)).argmax(-1), logits

    if draft is None:
        tokens, logits = choose(embeds, 0, 1)
    else:
        tokens, logits = choose(torch.cat([embeds, embed(draft).to(embeds.dtype)], dim=1), 0, steps)
        num_accepted = int((tokens[:, :num_later] == draft).all(0).long().cumprod(0).sum())
        tokens, logits = tokens[:, : num_accepted + 1], logits[:, : num_accepted + 1]
    all_tokens, all_logits = [tokens], [logits]
    for step in range(tokens.shape[1], steps):
        tokens, logits = choose(embed(all_tokens[-1][:, -1:]), length + step - 1, 1)
        all_tokens.append(tokens)
        all_logits.append(logits)
    return torch.cat(all_tokens, dim=1), torch.cat(all_logits, dim=1)


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
