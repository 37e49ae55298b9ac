"""FSDP2: shard a model and its optimizer state over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import distributed as dist
from torch import nn

from ..adapters.targets import unused_modules
from ..errors_openvla import OpenVLAImportError
from ..heads_openvla import HEAD_MODULES
from ..modeling_openvla import OpenVLAForActionPrediction
from .layers import repeated_layers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The first version in which fully_shard and DTensor are public.
FIRST_TORCH = (2, 6)


def shard_model(model: OpenVLAForActionPrediction, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Shard a model over all processes, in place; create its optimizer afterwards.

    Each layer of the language model, block of a vision tower, projector and head is gathered when it runs and freed
    afterwards. Embeddings, the final norm and the LM head stay gathered from the forward to the backward pass.

    Args:
        model: Complete model on ``device``, with ``requires_grad`` set.
        device: Device of this process.
        dtype: Dtype of gathered parameters and of computation; gradients are reduced in float32. None keeps the
            parameters' dtype.

    Raises:
        OpenVLAImportError: This version of torch has no FSDP2.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < FIRST_TORCH:
        required = ".".join(map(str, FIRST_TORCH))
        raise OpenVLAImportError(f"distributed: fsdp needs torch {required} or newer, this is {torch.__version__}.")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if model.config.parallel_decoding:
        model.require_bidirectional()  # runs the first layer, which is impossible once it is sharded
    options: dict[str, Any] = {"mesh": dist.init_device_mesh(device.type, (dist.get_world_size(),))}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:  # every process initialises new adapters and heads; use those of rank 0
            dist.broadcast(parameter.detach(), src=0)
    for unit in _units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)


def _units(model: OpenVLAForActionPrediction) -> list[nn.Module]:
    """Return the modules to gather one at a time; modules that never run are units too, so they stay sharded."""
    layers = repeated_layers(model)
    backbone, unused = model.vision_backbone, unused_modules(model)
    towers = [tower for tower in (backbone.featurizer, backbone.fused_featurizer) if tower is not None]
    units = [*layers, *(module for tower in towers for module in tower.children() if module in unused)]
    heads = [getattr(model, name) for name in HEAD_MODULES if hasattr(model, name)]
    return [*units, model.projector, *heads]


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return True if this process holds only a shard of the tensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor; for a sharded one this is a collective operation that every process must call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def to_local(content: Any) -> Any:
    """Return nested dicts and lists with each sharded tensor replaced by this process's shard."""
    if isinstance(content, dict):
        return {key: to_local(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_local(value) for value in content]
    return content.to_local() if torch.is_tensor(content) and is_dtensor(content) else content


def local_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return start and stop of the part of a tensor's first dimension that this process holds.

    FSDP2 splits the first dimension as ``torch.chunk`` does: all shards have the same length, except for the last ones.
    """
    if not is_dtensor(tensor):
        return 0, len(tensor)
    mesh = tensor.device_mesh
    length = -(-len(tensor) // mesh.size())
    start = min(mesh.get_local_rank() * length, len(tensor))
    stop = min(start + length, len(tensor))
    if stop - start != len(tensor.to_local()):
        raise AssertionError(f"FSDP2 split {len(tensor)} rows otherwise: {len(tensor.to_local())} are local.")
    return start, stop


def as_dtensor(local: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return a DTensor with this local shard and the layout of ``reference``, or ``local`` if that is not sharded."""
    if not is_dtensor(reference):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.to(reference.device),
        reference.device_mesh,
        reference.placements,
        shape=reference.shape,
        stride=reference.stride(),
    )


def gather_trained(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor] | None:
    """Gather the trained parameters on the CPU, one at a time; every process must call this.

    Args:
        model: Sharded model.
        keep: Return the parameters in this process. Elsewhere the result is None.
    """
    gathered = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = full_tensor(parameter.detach())
            if keep:
                gathered[name] = tensor.cpu()
    return gathered if keep else None
