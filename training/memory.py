"""A training step in less memory and with fewer operations; :func:`lean` stands around the loop of ``finetune``.

What norms and activations give is cheap to compute again, so it is computed again when the gradient asks for it, from
inputs that are kept anyway: the same numbers, bit for bit. A linear layer with LoRA beside it is one function in place
of six, whose sums are rounded elsewhere but no more often. Modules that are not as expected are left as they are.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..vision_openvla import QuickGELU

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
ACTIVATIONS = (nn.GELU, QuickGELU)


@contextlib.contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Train a model in less memory for as long as this stands; inference is as ever.

    Args:
        model: Whose adapters and frozen weights do not change meanwhile which of them they are. With gradient
            checkpointing on, whole layers are computed again anyway, and only LoRA's layers are touched.
    """
    recomputed = _Recomputed()
    replaced = []
    try:
        for module, forward in _lean_forwards(model, recomputed):
            module.forward = forward
            replaced.append(module)
        with torch.autograd.graph.saved_tensors_hooks(recomputed.pack, recomputed.unpack):
            yield
    finally:
        for module in replaced:
            del module.forward


def _lean_forwards(model: nn.Module, recomputed: _Recomputed) -> list[tuple[nn.Module, Callable]]:
    """What stands in for the forward of which module."""
    found: list[tuple[nn.Module, Callable]] = []
    inner = {module.act_fn for module in model.modules() if type(module).__name__ in GATED_MLPS}
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for module in model.modules():
        if "forward" in vars(module):  # someone else's, such as accelerate's
            continue
        if _is_plain_lora(module):
            found.append((module, _adapted(module)))
        elif checkpointed or module in inner:
            continue
        elif type(module).__name__ in GATED_MLPS:
            found.append((module, _gated(module, recomputed)))
        elif type(module).__name__.endswith("RMSNorm"):
            found.append((module, _rms_norm(module, recomputed)))
        elif isinstance(module, (nn.LayerNorm, *ACTIVATIONS)):
            found.append((module, functools.partial(recomputed, module.forward)))
    return found


def _rms_norm(norm: nn.Module, recomputed: _Recomputed) -> Callable:
    """Written out in several operations, which keep copies of their own where they widen, or a gain is trained."""
    plain = norm.forward

    def within(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(plain, x, use_reentrant=False, preserve_rng_state=False)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        keeps = hidden_states.dtype != torch.float32 or norm.weight.requires_grad
        return recomputed(plain, hidden_states, first=within if keeps and torch.is_grad_enabled() else plain)

    return forward


def _gated(mlp: nn.Module, recomputed: _Recomputed) -> Callable:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = recomputed(mlp.act_fn, mlp.gate_proj(x))
        return mlp.down_proj(recomputed(torch.mul, gate, mlp.up_proj(x)))

    return forward


class _Result:
    """What a computation gave: known as long as it lives, computed again from then on.

    Args:
        output: It.
        compute: Makes it once more.
        inputs: Of ``compute``, packed.
    """

    def __init__(self, output: torch.Tensor, compute: Callable, inputs: tuple[Any, ...]) -> None:
        self.compute, self.inputs = compute, inputs
        self.dtype, self.size, self.version = output.dtype, output.numel(), output._version
        self.autocast = _autocast(output.device.type)
        self.readers = 0  # who have yet to ask
        self.value: torch.Tensor | None = None

    def again(self, shape: torch.Size) -> torch.Tensor:
        """The output in this shape; kept until the last of its readers has asked."""
        value = self.value
        if value is None:
            with torch.no_grad(), self.autocast():
                value = self.compute(*map(_Recomputed.unpack, self.inputs))
        self.readers -= 1
        self.value = value if self.readers > 0 else None
        return value.view(shape)


class _Recomputed:
    """Calls functions of cheap operations so that their result does not stay for the gradient; around a pass."""

    def __init__(self) -> None:
        self.results: dict[int, _Result] = {}  # by address, of outputs that live

    def __call__(self, compute: Callable, *inputs: torch.Tensor, first: Callable | None = None) -> torch.Tensor:
        """The output of ``first`` (or ``compute``, which gives the same)."""
        output = (first or compute)(*inputs)
        if output.requires_grad and output.is_contiguous():
            address = output.data_ptr()
            packed = tuple(self.pack(tensor.detach()) for tensor in inputs)
            self.results[address] = _Result(output, compute, packed)
            weakref.finalize(output, self.results.pop, address, None)
        return output

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is kept in the place of a tensor."""
        result = self.results.get(tensor.data_ptr()) if type(tensor) is torch.Tensor else None
        if result is None or not tensor.is_contiguous():
            return tensor
        if (tensor.dtype, tensor.numel(), tensor._version) != (result.dtype, result.size, result.version):
            return tensor
        result.readers += 1
        return result, tensor.shape

    @staticmethod
    def unpack(kept: Any) -> torch.Tensor:
        """The tensor."""
        return kept if torch.is_tensor(kept) else kept[0].again(kept[1])


def _autocast(device: str) -> Callable:
    """What makes the mixed precision of now once more."""
    dtype = _autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, dtype is not None)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What mixed precision computes in on a kind of device; None where it is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda":  # torch up to 2.3 has a pair of functions for each kind
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if device == "cpu" and torch.is_autocast_cpu_enabled() else None


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether a module is peft's linear layer with one adapter that does nothing but LoRA beside frozen weights."""
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or list(getattr(module, "lora_A", ())) != module.active_adapters:
        return False
    if len(module.active_adapters) != 1 or module.merged or module.disable_adapters:
        return False
    name = module.active_adapters[0]
    special = getattr(module, "use_dora", {}).get(name) or name in getattr(module, "lora_variant", {})
    drops = getattr(module.lora_dropout[name], "p", 0.0) > 0
    beside = (base, module.lora_A[name], module.lora_B[name])
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in beside)
    biased = any(layer.bias is not None for layer in beside[1:])
    return not (special or drops or hooked or biased or any(p.requires_grad for p in base.parameters()))


def _adapted(layer: nn.Module) -> Callable:
    """The forward of peft's linear layer as one function."""
    name = layer.active_adapters[0]
    base, down, up, scaling = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = _autocast_dtype(x.device.type) or x.dtype
        if base.weight.dtype != dtype or not torch.is_grad_enabled():
            return plain(x)
        return _AdaptedLinear.apply(x, base.weight, base.bias, down.weight, up.weight, scaling)

    return forward


class _AdaptedLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' of frozen W and b, in the dtype of W (LoRA, Hu et al. 2021)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
            low = F.linear(rows, down.to(weight.dtype)).mul_(scaling)
            output = F.linear(rows, weight, bias).addmm_(low, up.to(weight.dtype).T)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        of_low = (gradient @ up.to(weight.dtype)).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_low, down.to(weight.dtype)).view(x.shape).to(x.dtype)
        return of_x, None, None, (of_low.T @ rows).to(down.dtype), (gradient.T @ low).to(up.dtype), None
