"""LoRA: small trainable matrices beside frozen weights, as methods of the model."""

from __future__ import annotations

import copy
import importlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .actions_openvla import nearest_name
from .adapter_files_openvla import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    PEFT_PREFIX,
    RECORD_FILE,
    LoraAdapter,
    base_record,
    peft_config,
    quantized_merge_note,
    read_adapter,
    require_not_merged,
    require_same_base,
)
from .compatibility_openvla import DTYPE_FIELD, require_peft_of_transformers
from .configuration_openvla import require_hub_keywords, write_json
from .errors_openvla import OpenVLAImportError, OpenVLAValueError
from .heads_openvla import FILM_LAYER, HEAD_MODULES, is_action_head_param
from .parallel_openvla import refuse_loose_parts
from .publishing_openvla import mark_code, require_own_kind
from .quantization_openvla import is_quantized

logger = logging.get_logger(__name__)

ADAPTER_NAME = "default"
NAMED_TARGETS = ("all-linear", "language", "sandwich")


def _as_transformers(name: str, own: str) -> Callable[..., Any]:
    """Return transformers' own method of this name, which says clearly where peft is too old for it."""

    def method(self: LoraMixin, *args: Any, **kwargs: Any) -> Any:
        require_peft_of_transformers(name, own)
        return getattr(super(LoraMixin, self), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"Do as transformers' own method; :meth:`{own}` needs no particular version of peft."
    return method


class LoraMixin:
    """LoRA on a model. Only making and using adapters needs peft (``pip install 'openvla[lora]'``)."""

    _lora: LoraAdapter | None = None  # settings of the adapter in use; its tensors are parameters of the modules

    add_adapter = _as_transformers("add_adapter", "enable_lora")
    load_adapter = _as_transformers("load_adapter", "load_lora")
    set_adapter = _as_transformers("set_adapter", "load_lora")
    delete_adapter = _as_transformers("delete_adapter", "merge_lora")
    get_adapter_state_dict = _as_transformers("get_adapter_state_dict", "save_lora")

    def enable_lora(
        self,
        r: int = 32,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        modules_to_save: Sequence[str] = (),
    ) -> None:
        """Freeze the model and put trainable LoRA matrices beside some of its weights, in place.

        Outputs do not change until the matrices are trained: they start as the reference's, A normal with deviation
        1 / r and B zero (an embedding's the other way round). They are float32, bfloat16 beside quantised weights.

        Args:
            r: Rank.
            alpha: The change of a weight is scaled by alpha / r.
            dropout: Share of a layer's inputs dropped in front of the matrices, in training.
            targets: "all-linear", the reference's recipe: every linear layer of towers, projector and language model,
                without its head. "language": those of the language model alone (the paper found frozen towers much
                worse). "sandwich": what the paper's sandwich fine-tuning trains: towers, projector, token embedding,
                last decoder layer, head. Or a list of names of linear layers and embeddings, or their endings. What
                never runs (each tower's last block and pooling head) is left out everywhere.
            modules_to_save: Full names of modules to train whole; they are saved with the adapter. Action heads,
                their projectors and FiLM always are.

        Raises:
            ValueError: A number is out of range, a name is unknown, or the model already has an adapter.
            ImportError: peft is not installed.
        """
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise OpenVLAValueError(f"r must be a whole number, 1 or more, got {r!r}.")
        if not (alpha > 0 and math.isfinite(alpha) and 0 <= dropout < 1):
            raise OpenVLAValueError(f"alpha must be positive and dropout in [0, 1), got {alpha!r} and {dropout!r}.")
        self._require_no_adapter()
        names = lora_targets(self, targets)
        known = [name for name, _ in self.named_modules() if name]
        for name in modules_to_save:
            if name not in known:
                raise OpenVLAValueError(
                    f"modules_to_save: no module {name!r}; nearest is {nearest_name(name, known)!r}."
                )
        answer = self.config.action_config if self.config.parallel_decoding else None
        settings = LoraAdapter(r, alpha, base=base_record(self), answer=answer)
        whole = [*answer_modules(self), *modules_to_save]
        self._inject(settings, names, list(dict.fromkeys(whole)), dropout)

    def load_lora(self, name_or_path: str | os.PathLike, *, trainable: bool = False, **hub: Any) -> None:
        """Put a saved adapter on this model, its base, and take over the action statistics that lie beside it.

        An adapter that answers in parallel brings its heads along: this model then does too.

        Args:
            name_or_path: Adapter folder or Hub repository.
            trainable: Go on training it.
            **hub: revision, token, ... as for ``from_pretrained``.

        Raises:
            ValueError: The adapter belongs to another base, is merged into it already, is damaged, or its OpenVLA-OFT
                heads lie in part files in the folder above; the model is left as it was.
            FileNotFoundError: There is no adapter.
            TypeError: A keyword is unknown.
            ImportError: peft is not installed.
        """
        self._require_no_adapter()
        require_hub_keywords("load_lora", hub)
        adapter = read_adapter(name_or_path, **hub)
        own = base_record(self)
        require_same_base(adapter.base, own, name_or_path)
        modules = dict(self.named_modules())
        enabling = adapter.answer is not None and not self.config.parallel_decoding
        if not enabling and self.config.parallel_decoding and adapter.answer != self.config.action_config:
            raise OpenVLAValueError(
                f"{name_or_path} answers as {adapter.answer}, this model as {self.config.action_config}."
            )
        whole = sorted({name.rpartition(".")[0] for name in adapter.whole})
        wrong = [name for name in adapter.adapted if not _fits(modules.get(name), adapter.change(name))]
        wrong += [name for name in whole if name not in modules and not (enabling and is_action_head_param(name))]
        if wrong:
            raise OpenVLAValueError(
                f"{name_or_path} does not fit this model: {len(wrong)} modules, such as {wrong[:3]}."
            )
        if adapter.base is None and os.path.isdir(name_or_path):
            refuse_loose_parts(Path(os.path.abspath(name_or_path)).parent, {})
        if adapter.base is None and not is_quantized(self):
            weights = {f"{name}.weight": modules[name].weight for name in adapter.adapted}
            require_not_merged(adapter, weights, name_or_path)
        if enabling:
            self.enable_parallel_decoding(**adapter.answer)
        if not trainable:  # it was trained beside what it says, whatever holds the base's weights here
            own["quantization"] = (adapter.base or {}).get("quantization")
        settings = replace(adapter, base=own, tensors={})
        self._inject(settings, adapter.adapted, whole, dropout=0.0)
        with torch.no_grad():
            for name, parameter in _adapter_parameters(self.named_parameters()).items():
                parameter.copy_(adapter.tensors[name])
                parameter.requires_grad_(trainable)
        self._read_statistics(name_or_path, hub, is_adapter=True)
        if adapter.default_unnorm_key in self.norm_stats:
            self.config.default_unnorm_key = adapter.default_unnorm_key

    def save_lora(self, folder: str | os.PathLike, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the adapter's folder; ``save_pretrained`` does this for a model that has one.

        Args:
            folder: Where to; made if need be.
            state_dict: The model's, where a trainer has gathered it; else its own parameters.

        Raises:
            ValueError: The model has no adapter, or the folder holds whole weights.
        """
        lora, folder = self._require_adapter(), Path(folder)
        require_own_kind(folder, is_adapter=True)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = self.named_parameters() if state_dict is None else state_dict.items()
        lora = replace(lora, tensors=_adapter_parameters(parameters))
        tensors = {PEFT_PREFIX + name: t.detach().cpu().contiguous() for name, t in lora.tensors.items()}
        temporary = folder / f".{ADAPTER_WEIGHTS_FILE}.{os.getpid()}.tmp"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / ADAPTER_WEIGHTS_FILE)
        config = copy.deepcopy(self.config)
        # Of the base as it was loaded, not of the adapter.
        for field in ("quantization_config", "_pre_quantization_dtype"):
            config.__dict__.pop(field, None)
        custom_object_save(self, folder, config=config)
        mark_code(folder)
        config.save_pretrained(folder)
        record = {"base": lora.base, "default_unnorm_key": config.default_unnorm_key, "answer": lora.answer}
        write_json(folder / RECORD_FILE, record)
        write_json(folder / ADAPTER_CONFIG_FILE, peft_config(lora))

    def merge_lora(self) -> Any:
        """The plain model with the adapter in its weights; the same numbers as ``openvla merge`` gives.

        Each weight becomes ``W + alpha / r * B A``, computed in float32 on the CPU and rounded once to the dtype of W,
        one weight at a time and in place: for bfloat16 a weight moves by at most 2^-9 of its size from the exact sum.

        A quantised model is left as it is: the adapter goes into the base's own files, loaded on the CPU in their own
        dtype. The adapter was trained beside rounded (say nf4) weights and now stands beside the unrounded ones, so
        the result differs from the model that was trained by what quantisation had changed.

        Returns:
            This model, or for a quantised one a new model.

        Raises:
            ValueError: There is no adapter, or a result would not be finite; the model is then left as it was.
        """
        lora = replace(self._require_adapter(), tensors=_adapter_parameters(self.named_parameters()))
        plain = self._loaded_base() if is_quantized(self) else self
        weights = {name: _base_weight(plain, name) for name in [f"{m}.weight" for m in lora.adapted] + lora.whole}
        for name, weight in weights.items():
            _require_mergeable(lora, name, weight)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(lora.merged(name, weight))
        return plain._without_lora()

    def disable_adapters(self) -> None:
        """Predict as the base does, heads included, until ``enable_adapters``.

        Raises:
            ValueError: There is no adapter.
        """
        self._switch_adapters(False)

    def enable_adapters(self) -> None:
        """Predict with the adapter again, with the modules that were trained whole too.

        transformers' own method (seen up to 5.24) leaves those switched off.

        Raises:
            ValueError: There is no adapter.
        """
        self._switch_adapters(True)

    def active_adapters(self) -> list[str]:
        """Return the names of the adapters in use: one of this package's, or those of transformers' ``add_adapter``.

        Raises:
            ValueError: There is no adapter.
        """
        self._require_any_adapter()
        return [ADAPTER_NAME] if self._lora is not None else super().active_adapters()

    def _switch_adapters(self, enabled: bool) -> None:
        self._require_any_adapter()
        kinds = (_import_peft("tuners.tuners_utils").BaseTunerLayer, _import_peft("utils").ModulesToSaveWrapper)
        for module in self.modules():
            if isinstance(module, kinds):
                module.enable_adapters(enabled)

    def _inject(self, settings: LoraAdapter, names: list[str], whole: list[str], dropout: float) -> None:
        """Wrap modules in peft's layers, in place."""
        peft = _import_peft()
        config = peft.LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=dropout,
            use_rslora=settings.rslora,
            target_modules=names,
            modules_to_save=whole or None,
            init_lora_weights="gaussian",
        )
        peft.inject_adapter_in_model(config, self, adapter_name=ADAPTER_NAME)
        self._lora = settings
        self._hf_peft_config_loaded = True  # what transformers' trainer and gradient checkpointing look at
        dtype = torch.bfloat16 if is_quantized(self) else torch.float32
        for name, parameter in _adapter_parameters(self.named_parameters()).items():
            parameter.requires_grad_(True)  # peft 0.11 leaves modules_to_save frozen
            if ".lora_" in name:
                parameter.data = parameter.data.to(dtype)

    def _require_no_adapter(self) -> None:
        if self._lora is not None:
            raise OpenVLAValueError("This model already has an adapter; call merge_lora(), or load the base again.")

    def _require_any_adapter(self) -> None:
        """Raise without an adapter, of this package or of transformers."""
        if not self._hf_peft_config_loaded:
            self._require_adapter()

    def _require_adapter(self) -> LoraAdapter:
        if self._lora is None:
            raise OpenVLAValueError("This model has no adapter; call enable_lora() or load_lora(folder) first.")
        return self._lora

    def _loaded_base(self) -> Any:
        """The base of a quantised model, from its own files."""
        base = self._lora.base
        if base["quantization"] is not None:
            logger.warning(quantized_merge_note(base))
        plain = type(self).from_pretrained(base["id"], low_cpu_mem_usage=True, **{DTYPE_FIELD: "auto"})
        require_same_base(base, base_record(plain), "This adapter")
        if self._lora.answer is not None and not plain.config.parallel_decoding:
            plain.enable_parallel_decoding(**self._lora.answer)
        plain.norm_stats, plain.config.default_unnorm_key = self.norm_stats, self.config.default_unnorm_key
        return plain

    def _without_lora(self) -> Any:
        """Put the base's modules back in the place of peft's layers."""
        for name, module in list(self.named_modules()):
            if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                inner = module.original_module
            elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                inner = module.base_layer
            else:
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(parent), leaf, inner)
        for attribute in ("peft_config", "modules_to_save", "_hf_peft_config_loaded", "_lora"):
            self.__dict__.pop(attribute, None)
        self.config._name_or_path = ""  # no longer what those files hold
        return self.requires_grad_(True)


def lora_targets(model: Any, targets: str | Sequence[str]) -> list[str]:
    """Names of the modules that ``targets`` (see ``enable_lora``) stands for.

    Raises:
        ValueError: A target is unknown, or the model ties what "sandwich" would adapt apart.
    """
    idle = idle_modules(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module not in idle and not is_action_head_param(name)
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    body = [name for name, module in found.items() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        return [name for name in body if name.startswith(("vision_backbone.", "projector.", "language_model."))]
    if targets == "language":
        return [name for name in body if name.startswith("language_model.")]
    if targets == "sandwich":
        if model.config.text_config.tie_word_embeddings:
            raise OpenVLAValueError(
                "'sandwich' adapts embedding and head apart, but this model ties them; name modules."
            )
        last = {embedding, head, *model.language_model.model.layers[-1].modules()}
        return [n for n, m in found.items() if n.startswith(("vision_backbone.", "projector.")) or m in last]
    if isinstance(targets, str) or not targets:
        raise OpenVLAValueError(
            f"Unknown targets {targets!r}; allowed: {list(NAMED_TARGETS)} or a list of module names."
        )
    chosen = set()
    for target in targets:
        matching = [name for name in found if name == target or name.endswith(f".{target}")]
        if not matching:
            endings = sorted({name.rpartition(".")[2] for name in found})
            raise OpenVLAValueError(
                f"Unknown target {target!r}: no linear layer or embedding that runs. Endings: {endings}."
            )
        chosen.update(matching)
    return sorted(chosen)


def answer_modules(model: Any) -> list[str]:
    """Names of the heads, whole, and of FiLM's layers in blocks that run."""
    idle = idle_modules(model)
    film = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and FILM_LAYER.fullmatch(name) and module not in idle
    ]
    return [name for name in HEAD_MODULES if hasattr(model, name)] + film


def idle_modules(model: Any) -> set[nn.Module]:
    """Modules of the towers that never run."""
    towers = [model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer]
    return {module for tower in towers if tower is not None for part in tower.unused for module in part.modules()}


def _adapter_parameters(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Those of a model's parameters that belong to its adapter, under peft's names on disk without the prefix."""
    found = {}
    for name, parameter in parameters:
        if ".lora_" in name:
            found[name.replace(f".{ADAPTER_NAME}", "")] = parameter
        elif f".modules_to_save.{ADAPTER_NAME}." in name:
            found[name.replace(f".modules_to_save.{ADAPTER_NAME}", "")] = parameter
    return found


def _base_weight(model: Any, name: str) -> torch.Tensor:
    """The base's tensor under peft's layers, or without them."""
    *path, leaf = name.split(".")
    module = model
    for part in path:  # a module that is trained whole may lie above
        module = getattr(getattr(module, "original_module", module), part)
    module = getattr(module, "original_module", getattr(module, "base_layer", module))
    weight = getattr(module, leaf)
    if weight.is_meta:
        raise OpenVLAValueError(f"{name} is offloaded; save the adapter and merge it with: openvla merge ADAPTER OUT.")
    return weight


def _require_mergeable(lora: LoraAdapter, name: str, weight: torch.Tensor) -> None:
    """Raise before anything is written if a merged weight might not be finite."""
    beside = f"{name.removesuffix('.weight')}.lora_"
    matrices = [t for n, t in lora.tensors.items() if n == name or n.startswith(beside)]
    sizes = [float(matrix.detach().abs().max()) for matrix in matrices]
    bound = sizes[0] if len(sizes) == 1 else lora.scaling * lora.r * sizes[0] * sizes[1]
    bound += float(weight.detach().abs().max())
    if not bound <= torch.finfo(weight.dtype).max:  # also where it is NaN
        raise OpenVLAValueError(f"{name} with the adapter is not finite in {weight.dtype}; use an earlier adapter.")


def _fits(module: nn.Module | None, change: torch.Tensor | None) -> bool:
    if isinstance(module, nn.Linear):
        return change.shape == (module.out_features, module.in_features)
    return isinstance(module, nn.Embedding) and change.shape == module.weight.shape


def _import_peft(module: str = "") -> Any:
    try:
        return importlib.import_module(f"peft.{module}".rstrip("."))
    except ImportError as error:
        raise OpenVLAImportError(f"LoRA needs peft: pip install 'openvla[lora]' ({error})") from error
