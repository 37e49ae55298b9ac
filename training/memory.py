"""Training steps in less memory and with fewer operations, for the training loop of ``finetune``.

Normalization layers and activation functions are cheap to compute, so their outputs are not kept for the backward pass
but recomputed from inputs that are kept anyway, bit for bit. A linear layer with LoRA is one autograd function instead
of six operations; its sums are rounded in another order, but not more often. Modules of other classes are unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..vision_openvla import QuickGELU

GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
ACTIVATIONS = (nn.GELU, QuickGELU)

TensorFunction = Callable[..., torch.Tensor]


@contextlib.contextmanager
def memory_efficient_training(model: nn.Module) -> Iterator[None]:
    """Train a model in less memory inside this context; inference is unchanged.

    Args:
        model: ``requires_grad`` flags and adapters must not change inside the context. With gradient checkpointing,
            which recomputes whole layers anyway, only LoRA layers are replaced.
    """
    recompute = _Recompute()
    replaced = []
    try:
        for module, forward in _memory_efficient_forwards(model, recompute):
            module.forward = forward
            replaced.append(module)
        with torch.autograd.graph.saved_tensors_hooks(recompute.pack, recompute.unpack):
            yield
    finally:
        for module in replaced:
            del module.forward


def _memory_efficient_forwards(model: nn.Module, recompute: _Recompute) -> list[tuple[nn.Module, TensorFunction]]:
    """Return the modules to change, each with its new forward."""
    forwards: list[tuple[nn.Module, TensorFunction]] = []
    gate_activations = {cast(_GatedMLP, module).act_fn for module in model.modules() if _is_gated_mlp(module)}
    is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for module in model.modules():
        if "forward" in vars(module):  # replaced by another library, such as accelerate
            continue
        if _is_plain_lora(module):
            forwards.append((module, _lora_forward(cast(_LoraLinear, module))))
        elif is_checkpointed or module in gate_activations:
            continue
        elif _is_gated_mlp(module):
            forwards.append((module, _gated_mlp_forward(cast(_GatedMLP, module), recompute)))
        elif type(module).__name__.endswith("RMSNorm"):
            forwards.append((module, _rms_norm_forward(module, recompute)))
        elif isinstance(module, (nn.LayerNorm, *ACTIVATIONS)):
            forwards.append((module, functools.partial(recompute, module.forward)))
    return forwards


class _GatedMLP(Protocol):
    """The gated MLP of transformers' decoders: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module


def _is_gated_mlp(module: nn.Module) -> bool:
    return type(module).__name__ in GATED_MLPS


def _gated_mlp_forward(mlp: _GatedMLP, recompute: _Recompute) -> TensorFunction:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate = recompute(mlp.act_fn, mlp.gate_proj(x))
        return mlp.down_proj(recompute(torch.mul, gate, mlp.up_proj(x)))

    return forward


def _rms_norm_forward(norm: nn.Module, recompute: _Recompute) -> TensorFunction:
    """Recompute an RMSNorm, which upcasts to float32 and otherwise keeps the upcast copy for the backward pass."""
    original = norm.forward
    weight = cast(nn.Parameter, norm.weight)

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(original, x, use_reentrant=False, preserve_rng_state=False)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        keeps_copies = hidden_states.dtype != torch.float32 or weight.requires_grad
        first = checkpointed if keeps_copies and torch.is_grad_enabled() else original
        return recompute(original, hidden_states, first=first)

    return forward


class _Activation:
    """A recomputable activation: returned from memory while alive, recomputed from its inputs afterwards.

    Args:
        output: The activation.
        compute: Function that computes it.
        inputs: Arguments of ``compute``, packed by :class:`_Recompute`.
    """

    def __init__(self, output: torch.Tensor, compute: TensorFunction, inputs: tuple[Any, ...]) -> None:
        self.compute, self.inputs = compute, inputs
        self.dtype, self.size, self.version = output.dtype, output.numel(), output._version
        self.autocast = _current_autocast(output.device.type)
        self.pending_reads = 0
        self.value: torch.Tensor | None = None

    def read(self, shape: torch.Size) -> torch.Tensor:
        """Return the activation in this shape; it is kept until its last pending read."""
        value = self.value
        if value is None:
            with torch.no_grad(), self.autocast():
                value = self.compute(*map(_Recompute.unpack, self.inputs))
        self.pending_reads -= 1
        self.value = value if self.pending_reads > 0 else None
        return value.view(shape)


class _Recompute:
    """Calls cheap functions and recomputes their outputs in the backward pass instead of keeping them.

    ``pack`` and ``unpack`` are the hooks of ``torch.autograd.graph.saved_tensors_hooks``.
    """

    def __init__(self) -> None:
        self.activations: dict[int, _Activation] = {}  # by data_ptr, of outputs that are alive

    def __call__(
        self, compute: TensorFunction, *inputs: torch.Tensor, first: TensorFunction | None = None
    ) -> torch.Tensor:
        """Return the output of ``first``, which must equal that of ``compute``; it defaults to ``compute``."""
        output = (first or compute)(*inputs)
        if output.requires_grad and output.is_contiguous():
            address = output.data_ptr()
            packed = tuple(self.pack(tensor.detach()) for tensor in inputs)
            self.activations[address] = _Activation(output, compute, packed)
            weakref.finalize(output, self.activations.pop, address, None)
        return output

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return what autograd keeps: the tensor, or a reference to a recomputable activation and a shape."""
        activation = self.activations.get(tensor.data_ptr()) if type(tensor) is torch.Tensor else None
        if activation is None or not tensor.is_contiguous():
            return tensor
        expected = (activation.dtype, activation.size, activation.version)
        if (tensor.dtype, tensor.numel(), tensor._version) != expected:
            return tensor
        activation.pending_reads += 1
        return activation, tensor.shape

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """Return the tensor that was packed."""
        if torch.is_tensor(packed):
            return packed
        activation, shape = packed
        return activation.read(shape)


def _current_autocast(device: str) -> Callable[[], torch.autocast]:
    """Return a function that creates an autocast context with the settings of now."""
    dtype = _autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, dtype is not None)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Return autocast's dtype on a device type; None where autocast is off."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda":  # torch before 2.4 has a pair of functions per device type
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if device == "cpu" and torch.is_autocast_cpu_enabled() else None


class _LoraLinear(Protocol):
    """The attributes of ``peft.tuners.lora.Linear`` that are used here."""

    base_layer: nn.Linear
    active_adapters: list[str]
    lora_A: dict[str, nn.Linear]
    lora_B: dict[str, nn.Linear]
    lora_dropout: dict[str, nn.Module]
    scaling: dict[str, float]
    merged: bool
    disable_adapters: bool
    forward: TensorFunction


def _is_plain_lora(module: nn.Module) -> bool:
    """Return True for peft's linear layer with one adapter of plain LoRA and frozen base weights."""
    if type(getattr(module, "base_layer", None)) is not nn.Linear:
        return False
    layer = cast(_LoraLinear, module)
    if list(getattr(layer, "lora_A", ())) != layer.active_adapters:
        return False
    if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters:
        return False
    name = layer.active_adapters[0]
    is_variant = getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {})
    has_dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0
    base, adapter = layer.base_layer, (layer.lora_A[name], layer.lora_B[name])
    is_hooked = any(linear._forward_hooks or linear._forward_pre_hooks for linear in (base, *adapter))
    has_bias = any(linear.bias is not None for linear in adapter)
    is_trained = any(parameter.requires_grad for parameter in base.parameters())
    return not (is_variant or has_dropout or is_hooked or has_bias or is_trained)


def _lora_forward(layer: _LoraLinear) -> TensorFunction:
    """Return the forward of peft's linear layer as one autograd function."""
    name = layer.active_adapters[0]
    base, down, up, scaling = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    original = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        dtype = _autocast_dtype(x.device.type) or x.dtype
        if base.weight.dtype != dtype or not torch.is_grad_enabled():
            return original(x)
        return _LoraLinearFunction.apply(x, base.weight, base.bias, down.weight, up.weight, scaling)

    return forward


class _LoraLinearFunction(torch.autograd.Function):
    """Compute ``x W' + b + s (x A') B'`` with frozen W and b, in the dtype of W (LoRA, Hu et al. 2021)."""

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
            inputs = x.reshape(-1, x.shape[-1]).to(weight.dtype)
            low_rank = F.linear(inputs, down.to(weight.dtype)).mul_(scaling)
            output = F.linear(inputs, weight, bias).addmm_(low_rank, up.to(weight.dtype).T)
        ctx.save_for_backward(x, weight, down, up, low_rank)
        ctx.scaling = scaling
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, low_rank = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        grad_low_rank = (gradient @ up.to(weight.dtype)).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (gradient @ weight).addmm_(grad_low_rank, down.to(weight.dtype)).view(x.shape).to(x.dtype)
        grad_down = (grad_low_rank.T @ inputs).to(down.dtype)
        grad_up = (gradient.T @ low_rank).to(up.dtype)
        return grad_x, None, None, grad_down, grad_up, None
