"""Differences between transformers versions: one constant or function for each.

A version in a comment is the first one with the newer behaviour, from 4.40.1 to 5.24.0. ``tests/library_surface.py``
lists every unstable name that this package touches; ``tests/test_library_surface.py`` fails when one changes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


TRANSFORMERS_VERSION = release(transformers.__version__)

# transformers 5.0 removed load_in_8bit= and load_in_4bit=, and infers a processor's parts; 4.x needs them declared.
TRANSFORMERS_4 = TRANSFORMERS_VERSION < (5, 0)

# transformers 4.56 renamed a configuration's torch_dtype to dtype and warns about the old name. Files carry both.
DTYPE_FIELD = "dtype" if "dtype" in inspect.signature(PretrainedConfig.__init__).parameters else "torch_dtype"

# transformers 5.24 renamed past_key_values to cache, in forward's arguments and in its output. The old name warns, and
# is announced to go in 5.40 (forward) and 6.0 (generate).
CACHE_FIELD = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)

# Before 4.53 transformers' check of devices fails without an accelerator ("No GPU found", or an AttributeError).
QUANTIZES_ON_CPU = TRANSFORMERS_VERSION >= (4, 53)

# transformers 5.0 saves weights of torchao as safetensors and reads them back; 4.x does not save those of torchao 0.18.
LOADS_TORCHAO = TRANSFORMERS_VERSION >= (5, 0)

# torch's CPU wheels (2.13 too) use a oneMKL that picks each function's kernel on its first call. Where several threads
# make that call at once, one of them may get a kernel of low accuracy, once: cosines were off by 1.5e-4, and a first
# action had other bits (https://github.com/pytorch/pytorch/issues/188792, open; not seen from oneMKL 2025.0 on).
MKL_FUNCTIONS = (
    *("cos", "sin", "tan", "cosh", "sinh", "tanh", "acos", "asin", "atan", "exp", "expm1", "log", "log10"),
    *("log2", "log1p", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "lgamma"),
)


def make_reproducible() -> None:
    """Let torch compute the same bits in every call: choose oneMKL's kernels now, and do without cuDNN's attention.

    On Hopper, cuDNN 9.19's attention of one query differs from call to call (torch 2.11). To use it all the same, call
    ``torch.backends.cuda.enable_cudnn_sdp(True)`` after loading.
    """
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):  # torch 2.5; flash or memory-efficient attention remains
        torch.backends.cuda.enable_cudnn_sdp(False)
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in MKL_FUNCTIONS:
            getattr(torch, function)(one)


def language_model_class(config: PretrainedConfig) -> type[nn.Module]:
    """Return transformers' causal language model for a configuration such as ``LlamaConfig``."""
    model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class


def cache_of(output: Any) -> Any:
    """Return the KV cache in a model's output; None where it has none."""
    return getattr(output, CACHE_FIELD, None)


def cached_length(cache: Any) -> int:
    """Return the number of tokens in a KV cache: an object, or the tuples of transformers 4.40; 0 for None or empty."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache[0][0].shape[-2] if len(cache) else 0


def attention_implementation(config: PretrainedConfig) -> str | None:
    """Return how a loaded model computes attention: "eager", "sdpa", "flash_attention_2", ..."""
    return config._attn_implementation  # no public way to read it up to 5.24


def set_attention_implementation(config: PretrainedConfig, implementation: str | None) -> None:
    """Set how a model that is built from this configuration computes attention."""
    config._attn_implementation = implementation  # public from 4.54, on a built model only (set_attn_implementation)


def requested_attention(config: Any) -> str | None:
    """Return the attention that a configuration asks for; None where it leaves the choice to transformers."""
    return getattr(config, "_attn_implementation_internal", None)  # _attn_implementation gives a default before 5.0


def tied_weight_names(model: nn.Module) -> list[str]:
    """Return the tied names that the outermost model has to repeat: on 4.x, which looks there only; none on 5.x."""
    tied = getattr(model, "_tied_weights_keys", None)
    return list(tied) if isinstance(tied, (list, tuple)) else []  # a dict, of each part's own, since 5.0


def is_checkpointing(model: nn.Module) -> bool:
    """Return whether some part of the model computes its activations anew in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
