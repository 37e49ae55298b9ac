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

# The first version in which fully_shard is public and distribute_tensor can leave out communication.
FIRST_TORCH = (2, 7)


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


def distribute_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return a full tensor sharded as ``reference`` is, without communication, or as it is if that is not sharded."""
    if not is_dtensor(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def gather(content: Any, *, keep: bool) -> Any:
    """Copy nested dicts and lists, with every tensor full and on the CPU; every process must call this.

    Args:
        content: The dicts and lists; sharded tensors are gathered one at a time.
        keep: Keep the tensors in this process; elsewhere they are replaced by None.
    """
    if isinstance(content, dict):
        return {key: gather(value, keep=keep) for key, value in content.items()}
    if isinstance(content, list):
        return [gather(value, keep=keep) for value in content]
    if not torch.is_tensor(content):
        return content
    tensor = full_tensor(content.detach())
    return tensor.cpu().contiguous() if keep else None
