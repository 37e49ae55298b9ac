"""The quick way from embeddings to answers: only what one answer reads is computed, into a cache that does not grow.

``FastDecoder`` writes out the layers of a language model that transformers loaded: plain products and norms without the
modules' machinery, adapters and quantised weights by calling their modules. Keys and values go to their place in one
tensor instead of being concatenated; the last layer computes queries, output and MLP only for the rows that are read,
and so does the head; drafted tokens are verified in the pass of the prompt. In exact arithmetic nothing changes; in
floating point a product of one row may round otherwise than that of many.

Nothing of the model is kept from one answer to the next, so no change to it can be missed. ``fuse`` lets torch.compile
make one kernel of each group of small operations between the products.

Where ``reason_against`` names a reason, the language model's own forward is taken (``decode_greedily``).
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

from .actions_openvla import as_numbers
from .compatibility_openvla import attention_implementation, rotary_fields
from .decoding_openvla import only, positions_of
from .errors_openvla import OpenVLAValueError
from .own_functions_openvla import any_hooked, changed_number, head_dim, is_hooked, patched_function, rotary_of

logger = logging.get_logger(__name__)

# Language models of one shape: rotary positions, a norm before attention and one before a gated MLP.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
NORMS = tuple(f"{family.removesuffix('ForCausalLM')}RMSNorm" for family in FAMILIES)
PLAIN_ROTARY = {"rope_theta", "rope_type", "type"}
FUSED = "_small_operations_are_fused"  # an attribute of the language model


def reason_against(language_model: nn.Module, length: int) -> str | None:
    """Why this language model has to run a sequence of ``length`` its own way; None if it does not."""
    config, name = language_model.config, type(language_model).__name__
    if name not in FAMILIES:
        return f"{name} is none of {', '.join(FAMILIES)}"
    if language_model.training:
        return "the model is in training mode"
    if attention_implementation(config) != "sdpa":
        return f"attention is {attention_implementation(config)}, not sdpa"
    rotary = rotary_fields(config)
    if rotary.get("rope_type", rotary.get("type", "default")) != "default" or set(rotary) - PLAIN_ROTARY:
        return f"its rotary positions are scaled: {rotary}"
    if getattr(config, "pretraining_tp", 1) > 1:
        return "its products are split (pretraining_tp)"
    windowed = getattr(config, "use_sliding_window", True)
    if windowed and (getattr(config, "sliding_window", None) or length) < length:
        return f"its attention slides over {config.sliding_window} positions, fewer than {length}"
    decoder = language_model.get_decoder()
    if is_hooked(decoder) or is_hooked(language_model) or is_hooked(decoder.norm):
        return "hooks hang on its decoder, or a method of it was replaced"
    for layer in decoder.layers:
        if any_hooked(layer):
            return "hooks hang on its layers, methods of them were replaced, or they are spread over devices"
        for part in (layer, layer.self_attn, layer.mlp):
            if not type(part).__name__.startswith(name.removesuffix("ForCausalLM")):
                return f"a {type(part).__name__} is among its layers"
        if any(type(part).__name__ == "Linear8bitLt" for part in (*layer.self_attn.children(), *layer.mlp.children())):
            return "its weights are LLM.int8, where what else is in a product changes a row's result"
    return changed_number(language_model) or patched_function(language_model)


def goes_fast(fast: bool | None, language_model: nn.Module, length: int) -> bool:
    """Whether to go the fast way: None where possible, False never, True with a warning where it is not."""
    if fast is False:
        return False
    reason = reason_against(language_model, length)
    if reason and fast:
        logger.warning_once(f"The same actions, but not the fast way: {reason}. (Said once.)")
    return reason is None


def require_fast(fast: bool | None, draft: Any, decodes: bool, language_model: nn.Module, length: int) -> None:
    """Raise ValueError for ``fast=True`` or a draft that would not be used.

    Args:
        fast: As of ``goes_fast``.
        draft: As of ``predict_action``.
        decodes: Whether tokens are chosen greedily, with a cache.
        language_model: As of ``goes_fast``.
        length: As of ``goes_fast``.
    """
    if draft is None and not fast:
        return
    reason = None if decodes else "tokens are sampled, searched, or computed without a cache"
    if draft is not None:
        reason = reason or ("fast is False" if fast is False else reason_against(language_model, length))
    if reason:
        name = "fast=True" if draft is None else "draft"
        raise OpenVLAValueError(f"{name} has no effect on this call: {reason}. Leave {name} out.")


def fuse(model: nn.Module) -> None:
    """Let torch.compile make one kernel of each norm, rotation and gate of the language model's answers.

    The first answer waits for the compiler. Where that fails, one warning says so, and nothing is fused. Sums may be
    rounded in another order, as on another device.

    Args:
        model: An ``OpenVLAForActionPrediction`` in eval mode.

    Raises:
        ValueError: Its language model does not go the fast way, so that there is nothing to fuse.
    """
    reason = reason_against(model.language_model, 1)
    if reason:
        raise OpenVLAValueError(f"compile is for models that go the fast way: {reason}.")
    setattr(model.language_model, FUSED, True)
    model._recordings = None  # of what was not fused


class _Fused:
    """A function of small operations as one kernel; the function itself where torch.compile does not work."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function, self.compiled = function, None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.compiled is None:
            import torch._inductor.config as settings

            # Rounds between the operations as they do by themselves.
            options = {"emulate_precision_casts": True} if hasattr(settings, "emulate_precision_casts") else {}
            self.compiled = torch.compile(self.function, dynamic=True, options=options)
        if self.compiled is not self.function:
            try:
                return self.compiled(*tensors)
            except Exception as error:  # of the compiler, which has errors of many kinds
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning_once(
                    f"The same actions, but nothing fused: torch.compile says {reason[0]}. (Said once.)"
                )
                self.compiled = self.function
        return self.function(*tensors)


def _rotation(frequencies: torch.Tensor, length: int, device: torch.device, dtype: torch.dtype) -> tuple:
    """Compute cosines and sines ``(length, dim)`` of rotary positions (Su et al. 2021), rounded as transformers does.

    The first half of the sines is negated, so that a rotation need not negate half of what it turns.

    Args:
        frequencies: ``(dim / 2,)``, as the model has them now, so that a change of them counts.
        length: Number of positions.
        device: Of the result.
        dtype: Of the result.
    """
    angles = torch.arange(length, device=device)[:, None].float() * frequencies.to(device, torch.float32)
    sines, cosines = angles.sin().to(dtype), angles.cos().to(dtype)
    return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


def _rotated(x: torch.Tensor, rotation: Sequence[torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1) * sin)


def _rows(x: torch.Tensor, rows: slice | torch.LongTensor) -> torch.Tensor:
    """Rows of ``(batch, length, ...)``: a slice of all, or each its own ``(batch, count)``."""
    if isinstance(rows, slice):
        return x[:, rows]
    index = rows.view(*rows.shape, *[1] * (x.ndim - 2)).expand(*rows.shape, *x.shape[2:])
    return x.expand(len(rows), *x.shape[1:]).gather(1, index)


def _bare(module: nn.Module, fused: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a module makes of rows ``(count, size)``: a plain one's arithmetic without its machinery, else the module.

    Made anew for every answer, so that weights that were changed, moved, wrapped or quantised since count.

    Args:
        module: A linear layer, a norm, an activation, or what took its place.
        fused: Whether a norm is one kernel.
    """
    kind, weight = type(module), getattr(module, "weight", None)
    own_kind = kind.__name__ if kind.__module__.startswith(("torch.", "transformers.")) else None
    if weight is None or type(weight) is nn.Parameter:
        if kind is nn.Linear:
            bias = module.bias
            return lambda x: F.linear(x, weight, bias)
        if own_kind in NORMS:
            if fused:
                norm = _fused_norm(module.variance_epsilon)
                return lambda x: norm(x, weight)
            epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32, device="cpu")  # faster than a number
            return functools.partial(_rms_normed, weight=weight, epsilon=epsilon)
        if own_kind in ("SiLU", "SiLUActivation"):
            return F.silu
        if kind.__name__ == "PrepackedLinear":
            return module.forward
    return lambda x: module(x[None])[0]  # adapters and quantised weights are used to batches


def _rms_normed(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor | float) -> torch.Tensor:
    """RMSNorm, rounded where transformers rounds."""
    exact = x if x.dtype is torch.float32 else x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True).add_(epsilon))
    return weight * (exact if x.dtype is torch.float32 else exact.to(x.dtype))


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


@functools.cache
def _fused_norm(epsilon: float) -> _Fused:
    return _Fused(lambda x, weight: _rms_normed(x, weight, epsilon))


_fused_rotated, _fused_gated = _Fused(lambda x, cos, sin: _rotated(x, (cos, sin))), _Fused(_gated)


class _Layer:
    """What one layer computes, by the names of its parts."""

    __slots__ = ("before", "between", "down", "gate", "gated", "key", "output", "query", "up", "value")

    def __init__(self, layer: nn.Module, fused: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = _bare(layer.input_layernorm, fused), _bare(layer.post_attention_layernorm, fused)
        self.query, self.key, self.value = _bare(attention.q_proj), _bare(attention.k_proj), _bare(attention.v_proj)
        self.output, activation = _bare(attention.o_proj), _bare(mlp.act_fn)
        self.gate, self.up, self.down = _bare(mlp.gate_proj), _bare(mlp.up_proj), _bare(mlp.down_proj)
        plain = _gated if activation is F.silu else lambda gate, up: activation(gate) * up
        self.gated = _fused_gated if fused and activation is F.silu else plain


class FastDecoder:
    """The layers of a language model, for one batch of sequences and one answer.

    Args:
        language_model: One that ``reason_against`` has nothing against.
        like: Embeddings ``(batch, ..., hidden)``, for batch, dtype and device.
        length: Positions that the cache has room for.
        mask: ``(batch, length)``, zero on left padding; None if nothing is masked.
        causal: Whether a position sees earlier ones only.
    """

    def __init__(
        self,
        language_model: nn.Module,
        like: torch.Tensor,
        length: int,
        mask: torch.LongTensor | None = None,
        causal: bool = True,
    ) -> None:
        config = language_model.config
        decoder = language_model.get_decoder()
        fused = getattr(language_model, FUSED, False)
        self.layers, self.norm = [_Layer(layer, fused) for layer in decoder.layers], _bare(decoder.norm, fused)
        self.rotated = (lambda x, turn: _fused_rotated(x, *turn)) if fused else _rotated
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.dim = head_dim(config)
        self.visible, self.causal = None if mask is None else mask.to(torch.bool), causal
        self.positions = torch.arange(length, device=like.device)[None]
        tables = _rotation(rotary_of(decoder).inv_freq, length, like.device, like.dtype)
        places = self.positions if mask is None else positions_of(mask)
        self.rotation = tuple(table[places][:, :, None] for table in tables)  # (batch or 1, length, 1, dim)
        kept = len(self.layers) if causal else 1  # without causality nothing can be added to a sequence
        shape = (2, kept, len(like), length, self.groups, self.dim)
        self.cache = torch.empty(shape, dtype=like.dtype, device=like.device)

    def run(self, x: torch.Tensor, start: int, rows: slice | torch.LongTensor | None = None) -> torch.Tensor:
        """Normalised last hidden states of some rows; the keys and values of all are kept.

        Args:
            x: Embeddings ``(batch, count, hidden)``.
            start: The position of the first; what stands before it was run before.
            rows: Which of them are read: a slice, or int64 ``(batch, rows)``; None for all.

        Returns:
            ``(batch, rows, hidden)``.
        """
        batch, count, size = x.shape
        end = start + count
        turn, positions = [table[:, start:end] for table in self.rotation], self.positions[:, start:end]
        mask = self._mask(positions, end)
        so_far = [part.transpose(2, 3).unbind() for part in self.cache[:, :, :, :end]]
        new = [part.unbind() for part in self.cache[:, :, :, start:end]]
        x, by_head = x.reshape(-1, size), (batch, count, -1, self.dim)
        for index, layer in enumerate(self.layers):
            kept = index % len(so_far[0])
            normed = layer.before(x)
            new[1][kept].copy_(layer.value(normed).view(by_head))
            if rows is not None and index == len(self.layers) - 1:
                new[0][kept].copy_(self.rotated(layer.key(normed).view(by_head), turn))
                x, normed = (_rows(y.view(batch, count, size), rows).flatten(0, 1) for y in (x, normed))
                turn, mask = [_rows(table, rows) for table in turn], self._mask(_rows(positions, rows), end)
                queries = self.rotated(layer.query(normed).view(batch, -1, self.heads, self.dim), turn)
            else:
                both = torch.cat([layer.query(normed), layer.key(normed)], dim=-1).view(by_head)
                queries, keys = torch.split_with_sizes(self.rotated(both, turn), (self.heads, self.groups), 2)
                new[0][kept].copy_(keys)
            x = x + layer.output(self._attention(queries, so_far[0][kept], so_far[1][kept], *mask))
            normed = layer.between(x)
            x = x + layer.down(layer.gated(layer.gate(normed), layer.up(normed)))
        return self.norm(x).view(batch, -1, size)

    def _attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.BoolTensor | None,
        square: bool,
    ) -> torch.Tensor:
        """What queries ``(batch, count, heads, dim)`` read: ``(batch * count, heads * dim)``."""
        if self.groups != self.heads:
            keys, values = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (keys, values))
        queries = queries.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=square)
        return mixed.transpose(1, 2).reshape(-1, self.heads * self.dim)

    def _mask(self, queries: torch.LongTensor, end: int) -> tuple[torch.BoolTensor | None, bool]:
        """What queries at positions ``(batch or 1, count)`` see, ``(batch or 1, 1, count, end)``; or that it is causal.

        Padding sees itself, so that no row is empty.
        """
        if self.visible is None and (not self.causal or queries.shape[1] == 1):
            return None, False
        if self.visible is None and queries.shape[1] == end:
            return None, True
        queries, keys = queries[:, None, :, None], self.positions[:, None, None, :end]
        seen = keys <= queries if self.causal else torch.ones_like(keys <= queries)
        if self.visible is not None:
            seen = seen & self.visible[:, None, None, :end] | (keys == queries)
        return seen, False


def draft_tokens(draft: Any, tokenizer: Any, statistics: Sequence[Any]) -> torch.LongTensor:
    """All tokens but the last of a guessed action.

    Args:
        draft: Robot units, ``(action_dim,)`` or ``(batch, action_dim)``.
        tokenizer: The model's ``ActionTokenizer``.
        statistics: Of every row.

    Raises:
        ValueError: Its shape is another.
    """
    guesses = np.atleast_2d(as_numbers(draft, "draft"))
    if guesses.shape != (len(statistics), statistics[0].dimension):
        expected = f"({len(statistics)}, {statistics[0].dimension})"
        raise OpenVLAValueError(f"draft must be one action a row, {expected}, got shape {np.shape(draft)}.")
    tokens = [tokenizer.encode_decoded(row.normalize(guess)) for row, guess in zip(statistics, guesses)]
    return torch.from_numpy(np.stack(tokens)[:, :-1])


def decode_fast(
    language_model: nn.Module,
    embeds: torch.Tensor,
    mask: torch.LongTensor | None,
    steps: int,
    allowed: slice | None = None,
    draft: torch.LongTensor | None = None,
) -> tuple[torch.LongTensor, torch.FloatTensor]:
    """What ``decode_greedily`` gives, the quick way and unchecked: without a draft it never waits for the device.

    Args:
        language_model: As of ``decode_greedily``; ``reason_against`` has nothing against it.
        embeds: ``(batch, length, hidden)``, left-padded.
        mask: int64 ``(batch, length)``; None if nothing is masked.
        steps: Number of tokens.
        allowed: Ids to choose from; None for all.
        draft: int64 ``(batch, steps - 1)``, a guess of all tokens but the last. Those that the model would have chosen
            itself, in every row, need no step of their own; the others are dropped.

    Returns:
        int64 tokens ``(batch, steps)`` and the float32 logits ``(batch, steps, vocabulary)`` they were chosen from.
    """
    length, later = embeds.shape[1], steps - 1
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), later)], dim=1)
    decoder = FastDecoder(language_model, embeds, length + later, mask)
    embed, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()

    def choose(x: torch.Tensor, start: int, count: int) -> tuple[torch.LongTensor, torch.FloatTensor]:
        rows = None if x.shape[1] == count else slice(x.shape[1] - count, None)
        logits = head(decoder.run(x.to(embeds.dtype), start, rows)).float()
        return (logits if allowed is None else only(logits, allowed)).argmax(-1), logits

    if draft is None:
        tokens, logits = choose(embeds, 0, 1)
    else:
        tokens, logits = choose(torch.cat([embeds, embed(draft).to(embeds.dtype)], dim=1), 0, steps)
        agreed = (tokens[:, :later] == draft).all(0).long().cumprod(0).sum().item()
        tokens, logits = tokens[:, : agreed + 1], logits[:, : agreed + 1]
    all_tokens, all_logits = [tokens], [logits]
    for step in range(tokens.shape[1], steps):
        tokens, logits = choose(embed(all_tokens[-1][:, -1:]), length + step - 1, 1)
        all_tokens.append(tokens)
        all_logits.append(logits)
    return torch.cat(all_tokens, dim=1), torch.cat(all_logits, dim=1)
