"""Kernels of the fast decoder: its operations other than matrix products and attention, as one function each.

There are three sets with the same functions. ``PLAIN`` runs PyTorch's operations one by one, on any device. On CUDA
``triton_kernels`` runs one kernel where PyTorch launches up to six; ``OPENVLA_TRITON=0`` switches it off. ``COMPILED``
(``load_policy(compile=True)``) lets torch.compile generate the kernels. All compute in float32 and round to the dtype
of their input where transformers rounds; only sums may be added in another order.

With ``TRITON_INTERPRET=1`` the Triton kernels run on a CPU, for the tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

SWITCH = "OPENVLA_TRITON"  # environment variable; 0 switches the Triton kernels off
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + delta`` and its RMSNorm (Zhang and Sennrich 2019), ``(tokens, hidden)`` each.

    Args:
        x: The residual stream ``(tokens, hidden)``.
        delta: What a block adds to it, of the same shape; None for nothing.
        weight: ``(hidden,)``.
        epsilon: Added to the mean of the squares.
    """
    total = x if delta is None else x + delta
    exact = total.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True).add_(epsilon))
    return total, weight * exact.to(total.dtype)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``, all ``(tokens, size)``."""
    return F.silu(gate).mul_(up)


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return heads ``(..., head_dim)`` rotated to their positions (Su et al. 2021); see ``rotate_and_cache``."""
    return (heads * cosines).add_(heads.roll(heads.shape[-1] // 2, -1) * sines)


def rotate_and_cache(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotate: Rotate = rotate,
) -> torch.Tensor:
    """Rotate queries and keys to their positions, and write keys and values into the cache.

    Args:
        qkv: Queries, keys and values of every token, ``(batch * count, (heads + 2 * key_value_heads) * head_dim)``.
        cosines: ``(batch, count, 1, head_dim)``.
        sines: Of the same shape, the first half negated.
        keys: Where keys are written, ``(batch, count, key_value_heads, head_dim)``; the last dimension is contiguous.
        values: Where values are written, likewise.
        rotate: The rotation.

    Returns:
        Rotated queries ``(batch, count, heads, head_dim)``.
    """
    batch, count, num_kv_heads, head_dim = keys.shape
    heads = qkv.view(batch, count, -1, head_dim)
    num_heads = heads.shape[2] - 2 * num_kv_heads
    unrotated, new_values = heads.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 2)
    queries, new_keys = rotate(unrotated, cosines, sines).split_with_sizes((num_heads, num_kv_heads), 2)
    keys.copy_(new_keys)
    values.copy_(new_values)
    return queries


def choose_tokens(logits: torch.Tensor, allowed: slice | None) -> torch.Tensor:
    """Return the token of the highest logit, the first of equal ones: int64 ``(samples,)``.

    Args:
        logits: ``(samples, vocabulary)``; not a number is an error that the caller finds.
        allowed: Token ids to choose from; None for all.
    """
    return logits.argmax(-1) if allowed is None else logits[:, allowed].argmax(-1) + allowed.start


class Kernels(NamedTuple):
    """A set of kernels; the functions of this module describe them."""

    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gated_silu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotate_and_cache: Callable[..., torch.Tensor]
    choose_tokens: Callable[[torch.Tensor, slice | None], torch.Tensor]


PLAIN = Kernels(add_rms_norm, gated_silu, rotate_and_cache, choose_tokens)


class CompiledOp:
    """A pointwise function compiled to one kernel; the function itself where torch.compile does not work."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is None:
            import torch._inductor.config as settings

            # Round between the operations as they do when they run one by one.
            options: dict[str, Any] = (
                {"emulate_precision_casts": True} if hasattr(settings, "emulate_precision_casts") else {}
            )
            self.compiled = torch.compile(self.function, dynamic=True, options=options)
        if self.compiled is not self.function:
            try:
                return self.compiled(*args, **kwargs)
            except Exception as error:  # the compiler raises errors of many kinds
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning_once(f"Running uncompiled: torch.compile failed with {reason[0]}.")
                self.compiled = self.function
        return self.function(*args, **kwargs)


COMPILED = Kernels(
    CompiledOp(add_rms_norm),
    CompiledOp(gated_silu),
    functools.partial(rotate_and_cache, rotate=CompiledOp(rotate)),
    choose_tokens,
)


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return the kernels for tensors of a device and dtype: Triton's on CUDA where Triton works, else ``PLAIN``.

    Under autocast, where the inputs of one operation have several dtypes, it is ``PLAIN``, too.
    """
    on_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not on_triton or os.environ.get(SWITCH) == "0" or dtype not in TRITON_DTYPES or torch.is_autocast_enabled():
        return PLAIN
    return _triton_kernels(device, dtype) or PLAIN


@functools.cache
def _triton_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Return Triton's kernels if they run on a device; else warn, unless Triton is not installed, and return None."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        module = importlib.import_module(f"{__package__}.triton_kernels")
        kernels = Kernels(*(getattr(module, name) for name in Kernels._fields))
        kernels.gated_silu(*torch.ones(2, 1, 2, device=device, dtype=dtype))
    except Exception as error:  # of a missing C compiler, an old GPU or driver: of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        logger.warning_once(
            f"Running without fused kernels, slower: Triton failed with {reason}. {SWITCH}=0 hides this warning."
        )
        return None
    return kernels
