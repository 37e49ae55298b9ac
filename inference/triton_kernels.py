"""The functions of ``kernels`` in Triton, one kernel each; that module describes them.

To round as PyTorch's own CUDA kernels do, they use its exponential and reciprocal root, exact division, and no fused
multiply-add, where Triton's defaults are approximate.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

EXACT = {"enable_fp_fusion": False}
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
COLUMNS = 2048  # numbers that one program of gated_silu computes


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Round float32 to a dtype, to nearest, ties to even.

    bfloat16 is rounded on the bits, because Triton's interpreter truncates (findings/). A NaN stays one.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _exp(x):
    if INTERPRETED:  # the interpreter has no libdevice
        result = tl.exp(x)
    else:
        result = libdevice.exp(x)
    return result


@triton.jit
def _add_rms_norm(
    x, delta, weight, total, normed, size, inverse_size, epsilon, has_delta: tl.constexpr, block: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside, index = column < size, row * size + column
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        value = _rounded(value + tl.load(delta + index, mask=inside, other=0.0).to(tl.float32), dtype).to(tl.float32)
        tl.store(total + index, _rounded(value, dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) * inverse_size + epsilon)
    exact = _rounded(value * scale, dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + index, _rounded(weights * exact, dtype), mask=inside)


@triton.jit
def _gated_silu(gate, up, out, size, gate_row, up_row, block: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = column < size
    dtype: tl.constexpr = gate.dtype.element_ty
    gates = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    silu = _rounded(tl.div_rn(gates, 1.0 + _exp(-gates)), dtype).to(tl.float32)
    tl.store(out + row * size + column, _rounded(silu * ups, dtype), mask=inside)


@triton.jit
def _rotate_and_cache(
    qkv, cosines, sines, queries, keys, values, qkv_row, table_sequence, table_token, count, sequence, token, key_head,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
):  # fmt: skip
    """One program a token and head: queries first, then keys, then values."""
    row, head, index = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, head_dim)
    dtype: tl.constexpr = qkv.dtype.element_ty
    sample, position = row // count, row % count
    place = sample * sequence + position * token  # in the cache
    angle = sample * table_sequence + position * table_token + index
    start = qkv + row * qkv_row + head * head_dim
    x = tl.load(start + index)
    if head < num_heads + num_kv_heads:
        other = tl.load(start + (index + head_dim // 2) % head_dim).to(tl.float32)
        cosine = tl.load(cosines + angle).to(tl.float32)
        sine = tl.load(sines + angle).to(tl.float32)
        first, second = _rounded(x.to(tl.float32) * cosine, dtype), _rounded(other * sine, dtype)
        x = _rounded(first.to(tl.float32) + second.to(tl.float32), dtype)
    if head < num_heads:
        tl.store(queries + (row * num_heads + head) * head_dim + index, x)
    elif head < num_heads + num_kv_heads:
        tl.store(keys + place + (head - num_heads) * key_head + index, x)
    else:
        tl.store(values + place + (head - num_heads - num_kv_heads) * key_head + index, x)


@triton.jit
def _choose_tokens(logits, tokens, row_size, first, count, block: tl.constexpr):
    """One program a sample. Not a number counts as minus infinity, so that the token exists."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    values = tl.load(logits + row * row_size + first + column, mask=column < count, other=float("-inf"))
    values = values.to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    tl.store(tokens + row, (first + tl.argmax(values, 0, tie_break_left=True)).to(tl.int64))


def _on_its_device(function):
    """Let a function launch its kernels on the device of its first argument, as PyTorch's operations do."""

    @functools.wraps(function)
    def launch(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return launch


@_on_its_device
def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + delta`` and its RMSNorm."""
    tokens, size = x.shape
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    total, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(tokens,)](
        x, delta, weight, total, normed, size, 1 / size, epsilon, delta is not None, block, num_warps=8, **EXACT
    )
    return total, normed


@_on_its_device
def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``; each may be some columns of a larger tensor."""
    tokens, size = gate.shape
    out = gate.new_empty(tokens, size)
    _gated_silu[(tokens, triton.cdiv(size, COLUMNS))](
        gate, up, out, size, gate.stride(0), up.stride(0), COLUMNS, num_warps=4, **EXACT
    )
    return out


@_on_its_device
def rotate_and_cache(
    qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values into the cache, and return the queries."""
    batch, count, num_kv_heads, head_dim = keys.shape
    if keys.stride() != values.stride() or keys.stride(3) != 1 or cosines.stride() != sines.stride():
        raise RuntimeError("Keys and values, cosines and sines must lie in memory in the same way.")
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    queries = qkv.new_empty(batch, count, num_heads, head_dim)
    _rotate_and_cache[(batch * count, num_heads + 2 * num_kv_heads)](
        qkv, cosines, sines, queries, keys, values, qkv.stride(0), *cosines.stride()[:2], count, *keys.stride()[:3],
        num_heads, num_kv_heads, head_dim, num_warps=1, **EXACT,
    )  # fmt: skip
    return queries


@_on_its_device
def choose_tokens(logits: torch.Tensor, allowed: slice | None) -> torch.Tensor:
    """Return the token of the highest logit, the first of equal ones."""
    first, end = (0, logits.shape[1]) if allowed is None else (allowed.start, allowed.stop)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _choose_tokens[(len(logits),)](
        logits, tokens, logits.stride(0), first, end - first, triton.next_power_of_2(end - first), num_warps=8, **EXACT
    )
    return tokens
