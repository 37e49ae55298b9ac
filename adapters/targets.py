"""Groups of a model's modules: targets of LoRA, heads that are always trained, modules that never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors_openvla import OpenVLAValueError
from ..heads_openvla import FILM_LAYER, HEAD_MODULES, is_action_head_param
from ..quantization_openvla import is_torchao

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction

NAMED_TARGETS = ("all-linear", "language", "sandwich")


def lora_targets(model: OpenVLAForActionPrediction, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the modules that ``targets`` of ``enable_lora`` stands for.

    Raises:
        ValueError: A target is unknown, or "sandwich" is given for a model that ties embedding and head.
    """
    unused = unused_modules(model)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module not in unused and not is_action_head_param(name)
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = [name for name, module in candidates.items() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        return [name for name in linear if name.startswith(("vision_backbone.", "projector.", "language_model."))]
    if targets == "language":
        return [name for name in linear if name.startswith("language_model.")]
    if targets == "sandwich":
        if model.config.text_config.tie_word_embeddings:
            raise OpenVLAValueError(
                "'sandwich' adapts embedding and head apart, but this model ties them; name modules."
            )
        decoder: Any = model.get_decoder()
        last = {embedding, head, *decoder.layers[-1].modules()}
        return [
            name
            for name, module in candidates.items()
            if name.startswith(("vision_backbone.", "projector.")) or module in last
        ]
    if isinstance(targets, str) or not targets:
        raise OpenVLAValueError(
            f"Unknown targets {targets!r}; allowed: {list(NAMED_TARGETS)} or a list of module names."
        )
    names = set()
    for target in targets:
        matching = [name for name in candidates if name == target or name.endswith(f".{target}")]
        if not matching:
            endings = sorted({name.rpartition(".")[2] for name in candidates})
            raise OpenVLAValueError(
                f"Unknown target {target!r}: no linear layer or embedding that runs. Endings: {endings}."
            )
        names.update(matching)
    return sorted(names)


def head_modules(model: OpenVLAForActionPrediction) -> list[str]:
    """Return the names of OpenVLA-OFT's modules, which are always trained in full: heads, and FiLM in used blocks."""
    unused = unused_modules(model)
    film = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and FILM_LAYER.fullmatch(name) and module not in unused
    ]
    return [name for name in HEAD_MODULES if hasattr(model, name)] + film


def unused_modules(model: OpenVLAForActionPrediction) -> set[nn.Module]:
    """Return the modules of the vision towers that never run: the last block and the pooling head of each."""
    backbone = model.vision_backbone
    towers = [tower for tower in (backbone.featurizer, backbone.fused_featurizer) if tower is not None]
    unused = [part for tower in towers for part in (tower.blocks[-1], tower.norm)]
    unused += [tower.attn_pool for tower in towers if hasattr(tower, "attn_pool")]
    return {module for part in unused for module in part.modules()}


def forbid_torchao(model: nn.Module, action: str) -> None:
    """Raise ValueError where the weights are of torchao, through whose products no gradient passes.

    Args:
        model: The model.
        action: What was asked for, for the message.
    """
    if is_torchao(model):
        raise OpenVLAValueError(
            f"A model with weights of torchao can only predict; to {action}, load it with "
            "quantization_config(bits), which takes bitsandbytes, or in full precision."
        )
