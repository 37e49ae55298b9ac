"""Fused pointwise kernels of the fast decoder in Triton: one kernel where PyTorch launches up to six.

Each has a plain PyTorch function of the same name in ``PLAIN``, with the same results where sums are exact: values are
computed in float32 and rounded to the weights' dtype where transformers rounds. Triton comes with torch on CUDA;
elsewhere, without it, or with ``OPENVLA_TRITON=0`` the plain functions run (``kernels_for``).

Under ``TRITON_INTERPRET=1`` the kernels run on a CPU, for the tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

SWITCH = "OPENVLA_TRITON"  # environment variable; 0 switches the kernels off
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(device: torch.device) -> Any:
    """Return the kernels for tensors on a device: Triton's on CUDA, PyTorch's where Triton cannot run or is off."""
    on_triton = (device.type == "cuda" or INTERPRETED) and os.environ.get(SWITCH) != "0"
    return _triton_kernels() if on_triton and importlib.util.find_spec("triton") else PLAIN


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + delta`` and its RMSNorm (Zhang and Sennrich 2019), both in the dtype of ``x``.

    Args:
        x: The residual stream ``(tokens, hidden)``.
        delta: What a block adds to it, of the same shape; None for nothing.
        weight: ``(hidden,)``.
        epsilon: Added to the mean of the squares.
    """
    total = x if delta is None else x + delta
    exact = total.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return total, weight * exact.to(x.dtype)


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` ``(tokens, size)`` of ``(tokens, 2 * size)``, gates first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_and_cache(
    qkv: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into the cache.

    Args:
        qkv: Queries, keys and values of every token, ``(batch * count, (heads + 2 * key_value_heads) * head_dim)``.
        cosines: ``(batch * count, head_dim)``.
        sines: Of the same shape, the first half negated.
        keys: Where keys are written, ``(batch, count, key_value_heads, head_dim)``; the last dimension is contiguous.
        values: Where values are written, likewise.

    Returns:
        Rotated queries ``(batch, count, heads, head_dim)``.
    """
    batch, count, num_kv_heads, head_dim = keys.shape
    heads = qkv.view(batch, count, -1, head_dim)
    num_heads = heads.shape[2] - 2 * num_kv_heads
    cosines, sines = (table.view(batch, count, 1, head_dim) for table in (cosines, sines))
    rotated = heads[:, :, : num_heads + num_kv_heads]
    rotated = rotated * cosines + rotated.roll(head_dim // 2, -1) * sines
    keys.copy_(rotated[:, :, num_heads:])
    values.copy_(heads[:, :, num_heads + num_kv_heads :])
    return rotated[:, :, :num_heads].contiguous()


PLAIN = SimpleNamespace(add_rms_norm=add_rms_norm, gated_silu=gated_silu, rotate_and_cache=rotate_and_cache)


@functools.cache
def _triton_kernels() -> Any:
    return importlib.import_module(f"{__package__}.triton_kernels")
