"""LoRA on a model in memory; ``loading.attach_methods`` makes the public functions methods of the model.

Only making and using adapters needs peft (``pip install 'openvla[lora]'``).
"""

from __future__ import annotations

import copy
import importlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..actions_openvla import nearest_name
from ..compatibility_openvla import DTYPE_FIELD, requested_attention
from ..configuration_openvla import ADAPTER_CONFIG_FILE, HUB_KEYWORDS, write_json
from ..errors_openvla import OpenVLAImportError, OpenVLATypeError, OpenVLAValueError
from ..heads_openvla import is_action_head_param
from ..modeling_openvla import STATISTICS_FILE
from ..parallel_openvla import refuse_loose_parts
from ..publishing_openvla import mark_code
from ..quantization_openvla import is_quantized
from ..saved_folder import refuse_two_kinds, require_own_kind
from .base_record import quantized_merge_note, record_base, require_not_merged, require_same_base
from .files import (
    ADAPTER_WEIGHTS_FILE,
    PEFT_PREFIX,
    RECORD_FILE,
    BaseRecord,
    LoraAdapter,
    find_beside_or_above,
    locate_base,
    peft_config,
    read_adapter,
)
from .parallel_decoding import enable_parallel_decoding, require_no_adapter
from .targets import forbid_torchao, head_modules, lora_targets

if TYPE_CHECKING:
    from ..modeling_openvla import OpenVLAForActionPrediction

logger = logging.get_logger(__name__)

ADAPTER_NAME = "default"
NO_ADAPTER = "This model has no adapter; call enable_lora() or load_lora(folder) first."
# Keywords of transformers' save_pretrained, 4.40.1 to 5.24.
SAVE_KEYWORDS = (
    "state_dict",
    "save_function",
    "push_to_hub",
    "max_shard_size",
    "safe_serialization",
    "variant",
    "token",
    "save_peft_format",
    "save_original_format",
    "distributed_checkpoint",
)


def enable_lora(
    model: OpenVLAForActionPrediction,
    r: int = 32,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
) -> None:
    """Freeze the model and add trainable LoRA matrices to some of its weights, in place.

    Outputs do not change until the matrices are trained: A starts normally distributed with standard deviation
    1 / r and B as zero (for an embedding A as zero), as in the reference. They are float32, or bfloat16 beside
    quantised weights.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        r: Rank.
        alpha: The change of a weight is scaled by alpha / r.
        dropout: Dropout probability of the matrices' inputs in training.
        targets: "all-linear", as in the reference: every linear layer of vision towers, projector and language
            model, without the LM head. "language": the linear layers of the language model alone (the paper found
            frozen towers much worse). "sandwich": what the paper's sandwich fine-tuning trains: towers, projector,
            token embedding, last decoder layer, LM head. Or a list of names of linear layers and embeddings, or of
            their endings. Modules that never run (each tower's last block and pooling head) are left out.
        modules_to_save: Full names of modules to train in full; they are saved with the adapter. Action heads,
            their projectors and FiLM always are.

    Raises:
        ValueError: A number is out of range, a name is unknown, or the model already has an adapter.
        ImportError: peft, or in the code of a saved folder the openvla package, is not installed.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise OpenVLAValueError(f"r must be a whole number, 1 or more, got {r!r}.")
    if not (alpha > 0 and math.isfinite(alpha) and 0 <= dropout < 1):
        raise OpenVLAValueError(f"alpha must be positive and dropout in [0, 1), got {alpha!r} and {dropout!r}.")
    require_no_adapter(model)
    forbid_torchao(model, "use an adapter")
    target_modules = lora_targets(model, targets)
    known = [name for name, _ in model.named_modules() if name]
    for name in modules_to_save:
        if name not in known:
            raise OpenVLAValueError(f"modules_to_save: no module {name!r}; nearest is {nearest_name(name, known)!r}.")
    action_config = model.config.action_config if model.config.parallel_decoding else None
    adapter = LoraAdapter(r, alpha, base=record_base(model), action_config=action_config)
    trained_in_full = list(dict.fromkeys([*head_modules(model), *modules_to_save]))
    _inject(model, adapter, target_modules, trained_in_full, dropout)


def load_lora(
    model: OpenVLAForActionPrediction,
    name_or_path: str | os.PathLike[str],
    *,
    trainable: bool = False,
    **hub_kwargs: Any,
) -> None:
    """Load a saved adapter on the model, its base, with the action statistics beside it.

    An adapter of a model with parallel decoding brings its heads: the model then decodes in parallel too.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        name_or_path: Adapter folder or Hub repository.
        trainable: Continue training it.
        **hub_kwargs: revision, token, ... as for ``from_pretrained``.

    Raises:
        ValueError: The adapter belongs to another base, is merged into it already, is damaged, or its OpenVLA-OFT
            heads are in part files in the folder above; the model is then unchanged.
        FileNotFoundError: There is no adapter.
        TypeError: A keyword is unknown.
        ImportError: peft, or in the code of a saved folder the openvla package, is not installed.
    """
    require_no_adapter(model)
    forbid_torchao(model, "use an adapter")
    unknown = sorted(set(hub_kwargs) - {*HUB_KEYWORDS, "repo_type", "user_agent"})
    if unknown:  # transformers would drop them
        raise OpenVLATypeError(f"load_lora takes no {', '.join(unknown)}; allowed: {list(HUB_KEYWORDS)}.")
    adapter = read_adapter(name_or_path, **hub_kwargs)
    base = record_base(model)
    require_same_base(adapter.base, base, name_or_path)
    enables_parallel_decoding = _require_fit(model, adapter, name_or_path)
    if adapter.base is None and os.path.isdir(name_or_path):
        refuse_loose_parts(Path(os.path.abspath(name_or_path)).parent, {})
    if adapter.base is None and not is_quantized(model):
        modules = dict(model.named_modules())
        weights = {f"{name}.weight": modules[name].weight for name in adapter.target_modules}
        require_not_merged(adapter, weights, name_or_path)
    if adapter.action_config is not None and enables_parallel_decoding:
        enable_parallel_decoding(model, **adapter.action_config)
    if not trainable:  # the adapter was trained beside the weights of its record, whatever holds the base's here
        base["quantization"] = adapter.base.get("quantization") if adapter.base else None
    settings = replace(adapter, base=base, tensors={})
    _inject(model, settings, adapter.target_modules, adapter.modules_to_save, dropout=0.0)
    with torch.no_grad():
        for name, parameter in _adapter_parameters(model.named_parameters()).items():
            parameter.copy_(adapter.tensors[name])
            parameter.requires_grad_(trainable)
    _load_statistics(model, name_or_path, hub_kwargs)
    if adapter.default_unnorm_key in model.norm_stats:
        model.config.default_unnorm_key = adapter.default_unnorm_key


def _require_fit(model: OpenVLAForActionPrediction, adapter: LoraAdapter, name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether the adapter needs parallel decoding, which the model has not; raise where it does not fit."""
    config = model.config
    enables_parallel_decoding = adapter.action_config is not None and not config.parallel_decoding
    if config.parallel_decoding and adapter.action_config != config.action_config:
        raise OpenVLAValueError(
            f"{name_or_path} predicts as {adapter.action_config}, this model as {config.action_config}."
        )
    modules = dict(model.named_modules())
    wrong = [
        name for name in adapter.target_modules if not _has_weight_shape(modules.get(name), adapter.delta_weight(name))
    ]
    wrong += [
        name
        for name in adapter.modules_to_save
        if name not in modules and not (enables_parallel_decoding and is_action_head_param(name))
    ]
    if wrong:
        raise OpenVLAValueError(f"{name_or_path} does not fit this model: {len(wrong)} modules, such as {wrong[:3]}.")
    return enables_parallel_decoding


def _has_weight_shape(module: nn.Module | None, delta: torch.Tensor | None) -> bool:
    """Return whether a change fits the weight of a module; a quantised weight has another shape than its layer."""
    if isinstance(module, nn.Linear):
        return delta is not None and delta.shape == (module.out_features, module.in_features)
    return isinstance(module, nn.Embedding) and delta is not None and delta.shape == module.weight.shape


def _load_statistics(
    model: OpenVLAForActionPrediction, adapter: str | os.PathLike[str], hub_kwargs: dict[str, Any]
) -> None:
    """Add the action statistics beside an adapter to a model; warn where there are none."""
    file = find_beside_or_above(adapter, STATISTICS_FILE, hub_kwargs)
    if file is not None:
        model._read_statistics(file, adapter)
    elif model.norm_stats:
        logger.warning(
            f"{adapter} has no {STATISTICS_FILE}: the model knows {sorted(model.norm_stats)} alone. If it was trained "
            "on another robot, add its statistics: model.add_norm_stats(key, statistics)."
        )


def load_base_and_adapter(
    model_class: type[OpenVLAForActionPrediction],
    adapter: str | os.PathLike[str],
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """Load an adapter on the base that it names.

    Args:
        model_class: Class of the model.
        adapter: Folder or Hub repository.
        hub_kwargs: revision, token, ... of the adapter.
        kwargs: Keywords of ``from_pretrained``, for the base.

    Returns:
        What ``from_pretrained`` of the base returns: the model, or with ``output_loading_info`` the model and that.

    Raises:
        FileNotFoundError: The base cannot be found.
        ValueError: The adapter does not fit the base.
    """
    refuse_two_kinds(os.path.join(adapter, hub_kwargs.get("subfolder") or ""))
    config = kwargs.pop("config", None)  # read by an Auto class, of the adapter or the base; the base has its own
    if requested_attention(config):
        kwargs.setdefault("attn_implementation", requested_attention(config))
    base, kwargs["revision"] = locate_base(adapter, hub_kwargs)
    for name in ("subfolder", "_commit_hash"):  # of the adapter
        kwargs.pop(name, None)
    loaded = model_class.from_pretrained(base, **{name: value for name, value in kwargs.items() if value is not None})
    load_lora(loaded[0] if isinstance(loaded, tuple) else loaded, adapter, **hub_kwargs)
    return loaded


def save_lora(
    model: OpenVLAForActionPrediction,
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter's folder; ``save_pretrained`` does this for a model that has an adapter.

    Args:
        model: The model; in typed code this is a function, else a method of the model.
        folder: Folder to write; created where it does not exist.
        state_dict: The model's state dict, where a trainer has gathered it; None takes the model's parameters.

    Raises:
        ValueError: The model has no adapter, or the folder holds the weights of a whole model.
        ImportError: This is the code of a saved folder, and the openvla package is not installed.
    """
    adapter, base = _require_adapter(model)
    folder = Path(folder)
    require_own_kind(folder, is_adapter=True)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = model.named_parameters() if state_dict is None else state_dict.items()
    adapter = replace(adapter, tensors=_adapter_parameters(parameters))
    tensors = {PEFT_PREFIX + name: t.detach().cpu().contiguous() for name, t in adapter.tensors.items()}
    temporary = folder / f".{ADAPTER_WEIGHTS_FILE}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / ADAPTER_WEIGHTS_FILE)
    config = copy.deepcopy(model.config)
    for field in ("quantization_config", "_pre_quantization_dtype"):  # of the loaded base, not of the adapter
        config.__dict__.pop(field, None)
    custom_object_save(model, folder, config=config)  # type: ignore[arg-type]  # annotated as a dictionary
    mark_code(folder)
    config.save_pretrained(folder)
    record = {"base": base, "default_unnorm_key": config.default_unnorm_key, "answer": adapter.action_config}
    write_json(folder / RECORD_FILE, record)
    write_json(folder / ADAPTER_CONFIG_FILE, peft_config(adapter, base))


def require_save_keywords(kwargs: Mapping[str, Any]) -> None:
    """Check the keywords of ``save_pretrained`` of a model with an adapter.

    Raises:
        ValueError: A keyword has no effect on an adapter.
        TypeError: A keyword is unknown.
    """
    unknown = sorted(set(kwargs) - set(SAVE_KEYWORDS))
    if unknown:
        raise OpenVLATypeError(f"save_pretrained takes no {', '.join(unknown)}; allowed: {list(SAVE_KEYWORDS)}.")
    allowed = {"push_to_hub": False, "safe_serialization": True, "variant": None, "save_peft_format": True}
    allowed["distributed_checkpoint"] = False
    for name, value in allowed.items():
        if kwargs.get(name, value) not in (value, None):
            raise OpenVLAValueError(
                f"{name}={kwargs[name]!r} has no effect on a model with an adapter; leave it out (merge_lora() gives a "
                "whole model, push_to_hub() uploads either)."
            )


def merge_lora(model: OpenVLAForActionPrediction) -> OpenVLAForActionPrediction:
    """Return the plain model with the adapter in its weights, equal in every bit to that of ``openvla merge``.

    Each weight becomes ``W + alpha / r * B A``, computed in float32 on the CPU and rounded once to the dtype of W,
    one weight at a time and in place: in bfloat16 a weight differs from the exact sum by at most 2^-9 of its size.

    A quantised model is not changed: the adapter is merged into the files that it was quantised from, loaded on
    the CPU in their own dtype. The adapter was trained beside quantised weights, so the merged model differs from
    the trained one by the quantisation error.

    Returns:
        The given model, or for a quantised one a new model.

    Raises:
        ValueError: There is no adapter, or a result would not be finite; the model is then unchanged.
        ImportError: This is the code of a saved folder, and the openvla package is not installed.
    """
    adapter, base = _require_adapter(model)
    adapter = replace(adapter, tensors=_adapter_parameters(model.named_parameters()))
    merged = _load_unquantized_base(model, adapter, base) if is_quantized(model) else model
    names = [f"{module}.weight" for module in adapter.target_modules] + adapter.full_tensors
    weights = {name: _base_weight(merged, name) for name in names}
    for name, weight in weights.items():
        _require_mergeable(adapter, name, weight)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(adapter.merge_tensor(name, weight))
    _remove_peft_layers(merged)
    return merged


def _load_unquantized_base(
    model: OpenVLAForActionPrediction, adapter: LoraAdapter, base: BaseRecord
) -> OpenVLAForActionPrediction:
    """Load the base of a quantised model from the files that it was quantised from."""
    if base["quantization"] is not None:
        logger.warning(quantized_merge_note(base))
    loaded: OpenVLAForActionPrediction = type(model).from_pretrained(
        base["id"], low_cpu_mem_usage=True, **{DTYPE_FIELD: "auto"}
    )
    require_same_base(base, record_base(loaded), "This adapter")
    if adapter.action_config is not None and not loaded.config.parallel_decoding:
        enable_parallel_decoding(loaded, **adapter.action_config)
    loaded.norm_stats, loaded.config.default_unnorm_key = model.norm_stats, model.config.default_unnorm_key
    return loaded


def _base_weight(model: OpenVLAForActionPrediction, name: str) -> torch.Tensor:
    """Return the base's tensor of a name, under peft's layers where there are some."""
    *path, leaf = name.split(".")
    module: Any = model
    for part in path:  # a module that is trained in full may lie above
        module = getattr(getattr(module, "original_module", module), part)
    module = getattr(module, "original_module", getattr(module, "base_layer", module))
    weight: torch.Tensor = getattr(module, leaf)
    if weight.is_meta:
        raise OpenVLAValueError(f"{name} is offloaded; save the adapter and merge it with: openvla merge ADAPTER OUT.")
    return weight


def _require_mergeable(adapter: LoraAdapter, name: str, weight: torch.Tensor) -> None:
    """Raise, before any weight is changed, if a merged weight might not be finite."""
    prefix = f"{name.removesuffix('.weight')}.lora_"
    tensors = [tensor for key, tensor in adapter.tensors.items() if key == name or key.startswith(prefix)]
    largest = [float(tensor.detach().abs().max()) for tensor in tensors]
    bound = largest[0] if len(largest) == 1 else adapter.scaling * adapter.r * largest[0] * largest[1]
    bound += float(weight.detach().abs().max())
    if not bound <= torch.finfo(weight.dtype).max:  # also where it is NaN
        raise OpenVLAValueError(f"{name} with the adapter is not finite in {weight.dtype}; use an earlier adapter.")


def _remove_peft_layers(model: OpenVLAForActionPrediction) -> None:
    """Replace peft's layers by the base's modules in them."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            original = module.original_module
        elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            original = module.base_layer
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, original)
    for attribute in ("peft_config", "modules_to_save", "_hf_peft_config_loaded", "lora_adapter"):
        model.__dict__.pop(attribute, None)
    model.config._name_or_path = ""  # the weights are no longer those of the files
    model.requires_grad_(True)


def _inject(
    model: OpenVLAForActionPrediction,
    adapter: LoraAdapter,
    target_modules: list[str],
    modules_to_save: list[str],
    dropout: float,
) -> None:
    """Wrap modules in peft's layers, in place, and freeze the rest; ``adapter`` gives the settings."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=dropout,
        use_rslora=adapter.use_rslora,
        target_modules=target_modules,
        modules_to_save=modules_to_save or None,
        init_lora_weights="gaussian",
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    model.lora_adapter = adapter
    model._hf_peft_config_loaded = True  # transformers' trainer and gradient checkpointing read it
    dtype = torch.bfloat16 if is_quantized(model) else torch.float32
    for name, parameter in _adapter_parameters(model.named_parameters()).items():
        parameter.requires_grad_(True)  # peft 0.11 leaves modules_to_save frozen
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _adapter_parameters(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return those of a model's parameters that belong to its adapter, by peft's names on disk without the prefix."""
    selected = {}
    for name, parameter in parameters:
        if ".lora_" in name:
            selected[name.replace(f".{ADAPTER_NAME}", "")] = parameter
        elif f".modules_to_save.{ADAPTER_NAME}." in name:
            selected[name.replace(f".modules_to_save.{ADAPTER_NAME}", "")] = parameter
    return selected


def _require_adapter(model: OpenVLAForActionPrediction) -> tuple[LoraAdapter, BaseRecord]:
    """Return the settings of a model's adapter and the record of its base; raise where it has none."""
    adapter: LoraAdapter | None = model.lora_adapter
    if adapter is None or adapter.base is None:
        raise OpenVLAValueError(NO_ADAPTER)
    return adapter, adapter.base


def import_peft(submodule: str = "") -> Any:
    """Import peft or one of its modules; raise ImportError that names the extra where it is not installed."""
    try:
        return importlib.import_module(f"peft.{submodule}" if submodule else "peft")
    except ImportError as error:
        raise OpenVLAImportError(f"Adapters (LoRA) need peft: pip install 'openvla[lora]' ({error})") from error
