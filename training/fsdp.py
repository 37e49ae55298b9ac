"""FSDP2: a model spread over processes, each of which holds a share of every tensor and of its optimiser's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ..adapters.targets import unused_modules
from ..errors_openvla import OpenVLAImportError
from ..heads_openvla import HEAD_MODULES

# Where fully_shard and what it needs have lived since it was no longer experimental.
FIRST_TORCH = (2, 6)


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Spread a model over all processes, in place; its optimiser is to be made afterwards.

    Layers of the language model, blocks of the towers, projector and heads are each gathered when they run and let go
    after; embeddings, the last norm and the language model's head stay gathered from forward to backward.

    Args:
        model: Whole, on the device, what is trained set apart.
        device: Of this process.
        dtype: What layers are gathered and computed in; gradients are added up in float32. None: as the weights are.

    Raises:
        ImportError: This torch has no FSDP2.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < FIRST_TORCH:
        needed = ".".join(map(str, FIRST_TORCH))
        raise OpenVLAImportError(f"parallelism: fsdp needs torch {needed} or newer, this is {torch.__version__}.")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if model.config.parallel_decoding:
        model.require_bidirectional()  # while its first layer can be run alone
    options: dict[str, Any] = {"mesh": dist.init_device_mesh(device.type, (dist.get_world_size(),))}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:  # new adapters and heads are drawn by each process; the first one's count
            dist.broadcast(parameter.detach(), src=0)
    for unit in _units(model):
        fully_shard(unit, **options)
    fully_shard(model, **options)


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once. What never runs is among it, so that it is never gathered."""
    backbone = model.vision_backbone
    towers = [tower for tower in (backbone.featurizer, backbone.fused_featurizer) if tower is not None]
    units = [*model.language_model.get_decoder().layers, *(block for tower in towers for block in tower.blocks)]
    idle = unused_modules(model)
    units += [part for tower in towers for part in tower.children() if part in idle]
    return [*units, model.projector, *(getattr(model, name) for name in HEAD_MODULES if hasattr(model, name))]


def is_sharded(tensor: Any) -> bool:
    """Whether a process holds a share of it only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; of a share every process must ask at once."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def share_of(content: Any) -> Any:
    """Nested mappings and lists with this process's shares in the place of tensors that are spread."""
    if isinstance(content, dict):
        return {key: share_of(value) for key, value in content.items()}
    if isinstance(content, list):
        return [share_of(value) for value in content]
    return content.to_local() if is_sharded(content) else content


def spread_as(share: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor whose shares the processes hold, spread as a parameter is; a plain one where that is plain."""
    if not is_sharded(like):
        return share
    from torch.distributed.tensor import DTensor

    share = share.to(like.device)
    return DTensor.from_local(share, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def trained_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Whole trained weights on the CPU, gathered one at a time; every process calls, those that ``keep`` get them."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = whole(parameter.detach())
            if keep:
                found[name] = tensor.cpu()
    return found
